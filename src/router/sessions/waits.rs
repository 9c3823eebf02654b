//! Subscriptions whose live messages wait for retained ones: the waits begin when the subscription begins
//! to count, and end behind its retained messages, or after a time.

use std::time::Duration;

use crate::session::{Deferral, Delivered, Offer, SessionLimits, WaitNumber, WaitingMax};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::accounts::Accounts;
use crate::router::sessions::shard::Shard;
use crate::router::sessions::slot::Slot;
use crate::router::sessions::tally::Tally;
use crate::router::sessions::{Sessions, shed};
use crate::router::types::Served;

/// How long the live messages of a subscription wait for the retained ones, beside the time to the next
/// tick.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Live messages that may wait for retained ones in all sessions of a shard.
const WAITING_MAX: WaitingMax = WaitingMax {
    messages: 4096,
    bytes: 1024 * 1024,
};

impl Sessions {
    /// The retained messages of a subscription have been sent: its live messages wait no longer, unless
    /// the client has subscribed again and they wait anew.
    pub(crate) fn end_wait(&self, served: &Served, now: Millis) {
        let mut shard = self.shard(served.session.shard);
        let slot = shard.get(served.session);
        let wait = slot.and_then(|slot| slot.session.wait_of(served.filter));
        if wait.is_some_and(|(number, _)| number == served.wait) {
            self.end_wait_in(&mut shard, served.session.slot, served.filter, now);
        }
    }

    /// Ends the waits of a shard that have taken long enough.
    pub(crate) fn end_late_waits(&self, shard: &mut Shard, now: Millis) {
        while let Some(&(until, at, filter)) = shard.waits.first()
            && until <= now
        {
            shard.waits.pop_first();
            let slot = shard.slots.get(at as usize);
            let wait = slot.and_then(|slot| slot.session.wait_of(filter));
            match wait {
                // Another connection's wait may be the one that is left.
                Some((_, until)) if until > now => {}
                Some(_) => self.end_wait_in(shard, at, filter, now),
                None => shard.note_wait(at, filter, false),
            }
        }
    }

    pub(super) fn end_wait_in(&self, shard: &mut Shard, at: u32, filter: FilterId, now: Millis) {
        let Shard {
            slots,
            accounts,
            waits,
            ..
        } = &mut *shard;
        let Some(slot) = slots.get_mut(at as usize) else {
            return;
        };
        let Some((_, until)) = slot.session.wait_of(filter) else {
            return;
        };
        waits.remove(&(until, at, filter));
        (slot.session).end_wait(filter, &self.limits, now, &mut accounts.output);
        shed(slot);
        let wakes = !std::mem::replace(&mut slot.woken, true);
        let handle = slot.handle.clone().filter(|_| wakes);
        shard.note_wait(at, filter, false);
        self.settle(shard, at);
        if let Some(handle) = handle {
            handle.raise();
        }
    }
}

impl Shard {
    /// Notes whether the messages of a member may have to wait.
    fn note_wait(&mut self, slot: u32, filter: FilterId, waits: bool) {
        if let Some(members) = self.members.get_mut(&filter) {
            members.set_waits(slot, waits);
        }
    }

    /// The live messages of a subscription wait for the retained ones from now on. `None`: they do not,
    /// because no client is connected, or because it has unsubscribed.
    pub(super) fn begin_wait(
        &mut self,
        slot: u32,
        filter: FilterId,
        now: Millis,
    ) -> Option<WaitNumber> {
        let session = &mut self.slots.get_mut(slot as usize)?.session;
        session.subscription(filter)?;
        let number = self.last_wait.next();
        let before = session.wait_of(filter).map(|(_, until)| until);
        if !session.begin_wait(filter, number, now + WAIT_MAX, &self.waiting) {
            return None;
        }
        self.last_wait = number;
        let (_, until) = session.wait_of(filter)?;
        if let Some(before) = before {
            self.waits.remove(&(before, slot, filter));
        }
        self.waits.insert((until, slot, filter));
        self.note_wait(slot, filter, true);
        Some(number)
    }
}

/// Offers a message to one session, by slot, for its subscription on a filter, behind the retained
/// messages of this subscription. The caller ends the session where the outcome says so.
pub(super) fn offer_in_turn(
    accounts: &mut Accounts,
    slot: &mut Slot,
    (at, filter): (u32, FilterId),
    limits: &SessionLimits,
    now: Millis,
    offer: &Offer<'_>,
    tally: &mut Tally,
) -> Delivered {
    loop {
        match slot.session.defer(filter, offer, WAITING_MAX) {
            Deferral::Due => return accounts.offer(slot, at, limits, now, offer, tally),
            Deferral::Waits => {
                accounts.charge(slot);
                return Delivered::Queued;
            }
            Deferral::Full(waiting) => {
                (slot.session).end_wait(waiting, limits, now, &mut accounts.output);
                tally.flushed(slot);
            }
        }
    }
}
