//! A shard: a part of all sessions, and for each filter its members among them.
//!
//! A shard is only touched under its mutex, for a short time, never over an await.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use crate::hashing::LookUp;
use crate::router::account::{Holder, SessionAccount};
use crate::session::{Ended, Session, SessionKey, Unsubscribed, WaitNumber, WaitingTotal};
use crate::telemetry::{DropReason, metrics};
use crate::time::{Deadline, Millis};
use crate::topics::FilterId;

use crate::router::lost::Lost;
use crate::router::sessions::absences::Absences;
use crate::router::sessions::accounts::Accounts;
use crate::router::sessions::by_key::ByKey;
use crate::router::sessions::handover::Handovers;
use crate::router::sessions::journal::Journal;
use crate::router::sessions::members::Members;
use crate::router::sessions::pass::Backlogs;
use crate::router::sessions::slot::{Slot, SlotBy};
use crate::router::sessions::{ClosedSession, SessionActions};
use crate::router::types::SessionRef;

/// How long publishes of a closed session are recognised when its client sends them again. It is
/// longer than a publish may be under way on a link that is found to be dead.
const REMEMBER_CLOSED: Duration = Duration::from_secs(2 * 60);

#[derive(Debug)]
pub(in crate::router) struct Shard {
    pub number: u16,
    account: Arc<SessionAccount>,
    pub slots: Slab<Box<Slot>>,
    by_key: ByKey,
    pub members: LookUp<FilterId, Members>,
    /// The sessions' accounts.
    pub accounts: Accounts,
    /// The sessions without a connection.
    pub(super) absences: Absences,
    /// The slots of sessions, by the time at which they are due.
    timers: BTreeSet<SlotBy<Deadline>>,
    slot_version: u32,
    /// Scratch space: the Subscription Identifiers of one delivery.
    pub(super) identifiers: Vec<u32>,
    pub(super) lost: Arc<Lost>,
    /// Filters that sessions gave up, until overlapping ones have taken over from them.
    pub handovers: Handovers,
    pub(super) backlogs: Backlogs,
    /// The sessions' records in the log. `None`: sessions end with the process.
    pub(in crate::router) journal: Option<Box<Journal>>,
    /// The latest time that the shard has been told.
    pub(super) now: Millis,
    /// Live messages that wait for retained ones, in all sessions.
    pub waiting: Arc<WaitingTotal>,
    /// Subscriptions whose live messages wait for retained ones, by the time of the end: slot and filter.
    /// The waits of connections that have ended are among them until their time.
    pub waits: BTreeSet<(Millis, u32, FilterId)>,
    /// The number of the last wait.
    pub last_wait: WaitNumber,
}

impl Shard {
    pub(super) fn new(
        number: u16,
        lost: Arc<Lost>,
        account: Arc<SessionAccount>,
        accounts: Accounts,
    ) -> Self {
        Self {
            number,
            account,
            slots: Slab::new(),
            by_key: ByKey::default(),
            members: LookUp::default(),
            accounts,
            absences: Absences::default(),
            timers: BTreeSet::new(),
            slot_version: 0,
            identifiers: Vec::new(),
            lost,
            handovers: Handovers::default(),
            backlogs: Backlogs::default(),
            journal: None,
            now: Millis::ZERO,
            waiting: Arc::default(),
            waits: BTreeSet::new(),
            last_wait: WaitNumber::default(),
        }
    }

    /// Adds a session, which is charged to `holder` once [`hold`](Self::hold) is called.
    pub(crate) fn insert(&mut self, session: Session, holder: Holder) -> u32 {
        self.slot_version = self.slot_version.wrapping_add(1);
        let key = session.key.clone();
        let at = self.slots.vacant_key() as u32;
        let share = self.accounts.begin(&session.principal, at);
        let slot = self.slots.insert(Box::new(Slot {
            slot_version: self.slot_version,
            session,
            handle: None,
            peer: None,
            woken: false,
            share,
            listed: false,
            publish_link: 0,
            armed: None,
            charged_entry_bytes: 0,
            charged_output_bytes: 0,
            holder,
            charged_bytes: 0,
            will_bytes: 0,
            ended_for_others: false,
            charged_queue_bytes: 0,
            asleep: 0,
        })) as u32;
        let Self { slots, by_key, .. } = self;
        by_key.insert(&key, slot, |at| &slots[at as usize].session.key);
        slot
    }

    /// The slot of the session with a key.
    pub(crate) fn find(&self, key: &SessionKey) -> Option<u32> {
        let is = |at: u32| self.slots[at as usize].session.key == *key;
        self.by_key.get(key, is)
    }

    /// The keys of all sessions for which a condition holds, in their order. Closed sessions are not
    /// among them.
    pub(super) fn keys(&self, holds: impl Fn(&SessionKey) -> bool) -> Vec<&SessionKey> {
        let sessions = self.slots.iter().map(|(_, slot)| &slot.session);
        let live = sessions.filter(|s| holds(&s.key) && !s.is_closed());
        let mut keys: Vec<&SessionKey> = live.map(|s| &s.key).collect();
        keys.sort_unstable();
        keys
    }

    pub(crate) fn reference(&self, slot: u32) -> SessionRef {
        SessionRef {
            shard: self.number,
            slot,
            slot_version: self.slots[slot as usize].slot_version,
        }
    }

    pub(crate) fn get(&mut self, reference: SessionRef) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(reference.slot as usize)?;
        (slot.slot_version == reference.slot_version).then_some(&mut **slot)
    }

    /// A session, and the accounts of all.
    pub(in crate::router) fn with_accounts(
        &mut self,
        reference: SessionRef,
    ) -> Option<(&mut Slot, &mut Accounts)> {
        let slot = self.slots.get_mut(reference.slot as usize)?;
        let same = slot.slot_version == reference.slot_version;
        same.then_some((&mut **slot, &mut self.accounts))
    }

    /// A session, and the accounts of all, if `connection_no` is its current connection.
    pub(super) fn connected_with_accounts(
        &mut self,
        reference: SessionRef,
        connection_no: u64,
    ) -> Option<(&mut Slot, &mut Accounts)> {
        self.with_accounts(reference)
            .filter(|(s, _)| s.session.connection_no() == connection_no && s.session.attached())
    }

    /// A session, if `connection_no` is its current connection.
    pub(crate) fn connected(
        &mut self,
        reference: SessionRef,
        connection_no: u64,
    ) -> Option<&mut Slot> {
        self.get(reference)
            .filter(|s| s.session.connection_no() == connection_no && s.session.attached())
    }

    /// Removes a session; its subscriptions must be gone.
    pub(crate) fn remove(&mut self, slot: u32) {
        if !self.slots.contains(slot as usize) {
            return;
        }
        let mut removed = self.slots.remove(slot as usize);
        self.by_key.remove(&removed.session.key, slot);
        if let Some(journal) = &mut self.journal {
            journal.removed(slot);
        }
        if let Some(at) = removed.armed {
            self.timers.remove(&SlotBy(at, slot));
        }
        self.accounts.end(&mut removed, slot);
        let (account, bytes) = (&self.account.bytes, removed.charged_bytes.into());
        account.release(removed.holder, bytes);
        if removed.ended_for_others {
            account.note_ending(removed.holder, bytes, 0);
        }
    }

    /// Brings the account of sessions in line with a session whose will or subscriptions have changed.
    pub(super) fn hold(&mut self, slot: u32) {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let bytes = s.session_bytes();
        let before = std::mem::replace(&mut s.charged_bytes, bytes);
        let account = &self.account.bytes;
        match bytes.checked_sub(before) {
            Some(more) => account.charge(s.holder, more.into()),
            None => account.release(s.holder, (before - bytes).into()),
        }
        if s.ended_for_others {
            // If its client is back, the bytes stay in use.
            s.ended_for_others = s.session.is_closed();
            let ending = if s.ended_for_others { bytes } else { 0 };
            account.note_ending(s.holder, before.into(), ending.into());
        }
    }

    /// A session has ended to make room for others.
    pub(super) fn ended_for_others(&mut self, slot: u32) {
        if let Some(s) = self.slots.get_mut(slot as usize)
            && !std::mem::replace(&mut s.ended_for_others, true)
        {
            let account = &self.account.bytes;
            account.note_ending(s.holder, 0, s.charged_bytes.into());
        }
    }

    /// A session's client is connected from another network, whose share is charged from now on if
    /// there is room.
    pub(super) fn move_to(&mut self, slot: u32, holder: Holder) {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let (account, bytes) = (&self.account.bytes, s.charged_bytes.into());
        if s.holder == holder || !account.has_room_to_move(s.holder, holder, bytes) {
            return;
        }
        account.release(s.holder, bytes);
        account.charge(holder, bytes);
        if s.ended_for_others {
            account.note_ending(s.holder, bytes, 0);
            account.note_ending(holder, 0, bytes);
        }
        s.holder = holder;
    }

    /// Brings account and timer in line with the session after it was worked on.
    pub(crate) fn settle(&mut self, slot: u32) {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        self.accounts.charge(s);
        // Later deadlines are found when the earlier one fires.
        if let Some(deadline) = s.session.deadline().map(Deadline::at)
            && s.armed.is_none_or(|armed| deadline < armed)
        {
            if let Some(at) = s.armed.replace(deadline) {
                self.timers.remove(&SlotBy(at, slot));
            }
            self.timers.insert(SlotBy(deadline, slot));
        }
    }

    /// The next session whose timer has fired.
    pub(crate) fn fired(&mut self, now: Millis) -> Option<u32> {
        let &SlotBy(at, slot) = self.timers.first()?;
        if !at.is_due(now) {
            return None;
        }
        self.timers.pop_first();
        if let Some(s) = self.slots.get_mut(slot as usize) {
            s.armed = None;
        }
        Some(slot)
    }

    /// Takes a session out of a filter's members. Returns how many messages it had in a backlog.
    pub(crate) fn leave(&mut self, slot: u32, filter: FilterId) -> usize {
        let messages = self.leave_asleep(slot, filter);
        if let Some(members) = self.members.get_mut(&filter) {
            members.leave(slot);
            if members.is_empty() {
                self.members.remove(&filter);
            }
        }
        messages
    }

    /// Overlap marks may have changed for all of a session's subscriptions.
    pub(crate) fn rejoin(&mut self, slot: u32) {
        let Self { slots, members, .. } = self;
        let Some(s) = slots.get(slot as usize) else {
            return;
        };
        for s in s.session.subscriptions().iter().filter(|s| !s.shared) {
            members.entry(s.filter).or_default().join(slot, s);
        }
    }

    /// A session has ended the subscriptions on these filters. Where no other one takes over,
    /// `primary_over` becomes `None`.
    pub(crate) fn unsubscribed(&mut self, slot: u32, filters: &mut [Unsubscribed]) {
        for gone in filters {
            self.leave(slot, gone.filter);
            if gone.primary_over.is_some() && !self.handovers.begin(slot, gone) {
                gone.primary_over = None;
            }
        }
        self.rejoin(slot);
    }

    /// Takes all subscriptions of a session; returns their filters.
    pub(crate) fn release(&mut self, slot: u32) -> Vec<FilterId> {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return Vec::new();
        };
        let taken = s.session.take_subscriptions();
        let mut filters = self.handovers.forget(slot);
        let mut messages = 0;
        for s in taken {
            messages += self.leave(slot, s.filter);
            filters.push(s.filter);
        }
        if messages > 0 {
            metrics().messages_dropped[DropReason::SessionEnd].increment(messages as u64);
        }
        self.hold(slot);
        filters
    }

    /// After a connection ended: marks the session detached, or closes it.
    pub(crate) fn detached(
        &mut self,
        slot: u32,
        ended: &Ended,
        now: Millis,
        actions: &mut SessionActions,
    ) {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        s.handle = None;
        s.woken = false;
        if ended.session {
            return self.finish(slot, now, actions);
        }
        if s.session.outbound().entries() > 0 {
            self.accounts.list(s, slot);
        }
        self.absences.begin(s.session.since(), slot);
        self.hold(slot);
        self.settle(slot);
        if let Some(journal) = &mut self.journal
            && let Some(s) = self.slots.get(slot as usize)
        {
            journal.detached(slot, &s.session, now);
        }
    }

    /// A session ended. It is remembered while that is of use: if the session itself does not know,
    /// the actions say that it may be forgotten.
    pub(crate) fn finish(&mut self, slot: u32, now: Millis, actions: &mut SessionActions) {
        actions.released.extend(self.release(slot));
        self.unlist(slot);
        let session = self.reference(slot);
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if s.session.worth_remembering() {
            s.session.remember_until(now + REMEMBER_CLOSED);
        } else {
            actions.closed.push(ClosedSession {
                session,
                publish_link: s.publish_link,
                just_left: now < s.session.since() + REMEMBER_CLOSED,
            });
        }
        self.settle(slot);
        self.compare_with_record(slot);
    }

    /// A closed session was remembered long enough, unless the broker has yet to answer publishes of
    /// it: a new session of its client must not overtake them on another publish link.
    pub(crate) fn outlived(&mut self, slot: u32, now: Millis, actions: &mut SessionActions) {
        let session = self.reference(slot);
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if s.session.publishes_under_way() > 0 {
            s.session.remember_until(now + REMEMBER_CLOSED);
            return self.settle(slot);
        }
        s.session.forget_publishes();
        actions.closed.push(ClosedSession {
            session,
            publish_link: s.publish_link,
            just_left: false,
        });
    }

    /// Forgets a closed session, unless it is to be kept: for its publishes, or for a will or an
    /// absence that it still owes.
    pub(crate) fn forget(&mut self, session: SessionRef, keep: bool, now: Millis) {
        let Some(s) = self.get(session).filter(|s| s.session.is_closed()) else {
            return;
        };
        if keep || s.session.worth_remembering() {
            s.session.remember_until(now + REMEMBER_CLOSED);
            self.settle(session.slot);
        } else {
            self.remove(session.slot);
        }
    }

    /// The client of a restored session is away.
    pub(super) fn begin_absence(&mut self, slot: u32) {
        if let Some(s) = self.slots.get(slot as usize)
            && !s.session.is_closed()
        {
            self.absences.begin(s.session.since(), slot);
        }
    }

    /// The client of a session is back, or its session ends: to be called before the session is told.
    pub(super) fn end_absence(&mut self, slot: u32) {
        if let Some(s) = self.slots.get(slot as usize) {
            self.absences.end(s.session.since(), slot);
        }
    }

    /// Takes a session out of the order in which queues are evicted.
    pub(crate) fn unlist(&mut self, slot: u32) {
        if let Some(s) = self.slots.get_mut(slot as usize) {
            self.accounts.unlist(s, slot);
        }
    }
}
