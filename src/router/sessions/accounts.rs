//! The accounts of a shard's sessions: the bytes of their queues and their output, and the order in
//! which queues are evicted.

use std::collections::BTreeSet;
use std::sync::Arc;

use slab::Slab;

use crate::budget::Allowance;
use crate::hashing::LookUp;
use crate::session::{Delivered, Offer, SessionLimits};
use crate::time::Millis;

use crate::router::sessions::backlog::Held;
use crate::router::sessions::principals::{Level, Moved, PrincipalId, Principals, Share};
use crate::router::sessions::slot::{Charge, Slot, SlotBy};
use crate::router::sessions::tally::Tally;

/// The place of a detached session in the order of eviction: first the principals that use most, and
/// among equals the least recently connected session. In 8 bytes: the level is in the high bits, inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u64);

/// The bits of a rank for the time, in milliseconds.
const TIME_BITS: u32 = u64::BITS - Level::BITS;

impl Rank {
    fn new(level: Level, since: Millis) -> Self {
        let last = (1 << TIME_BITS) - 1;
        Self(
            u64::from(Level::MAX.number() - level.number()) << TIME_BITS | since.as_u64().min(last),
        )
    }

    /// The level of the session's principal.
    pub(super) fn level(self) -> Level {
        // The level has no more bits.
        Level::MAX.below((self.0 >> TIME_BITS) as u8)
    }
}

/// The accounts of a shard's sessions.
#[derive(Debug)]
pub(in crate::router) struct Accounts {
    /// The shard.
    number: u16,
    /// Bytes of queue entries to add to the account when the lock is given back.
    pub(super) entry_bytes: i64,
    /// The shard's part of the budget of all output.
    pub(super) output: Allowance,
    /// Bytes of all backlogs of the shard: each message in full, with its entry.
    pub(super) backlog_bytes: usize,
    /// The messages that the backlogs of the shard have got. Orders them and those in queues.
    pub(in crate::router) position: u64,
    principals: Arc<Principals>,
    /// The principals of the sessions, with their use of this shard.
    shares: Slab<Share>,
    share_of: LookUp<PrincipalId, u32>,
    /// The sessions by share.
    sessions: BTreeSet<(u32, u32)>,
    /// Detached sessions that may have messages, by rank.
    order: BTreeSet<SlotBy<Rank>>,
}

impl Accounts {
    pub(super) fn new(number: u16, output: Allowance, principals: Arc<Principals>) -> Self {
        Self {
            number,
            entry_bytes: 0,
            backlog_bytes: 0,
            output,
            position: 0,
            principals,
            shares: Slab::new(),
            share_of: LookUp::default(),
            sessions: BTreeSet::new(),
            order: BTreeSet::new(),
        }
    }

    /// A session begins in slot `at`. Returns the number of its principal's share.
    pub(super) fn begin(&mut self, principal: &Arc<str>, at: u32) -> u32 {
        let share = self.principals.join(principal, self.number);
        let number = match self.share_of.get(&share.id) {
            Some(number) => *number,
            None => {
                let id = share.id;
                let number = self.shares.insert(share) as u32;
                self.share_of.insert(id, number);
                number
            }
        };
        self.shares[number as usize].sessions += 1;
        self.sessions.insert((number, at));
        number
    }

    /// The session that was in slot `at` is removed: gives its charge back.
    pub(super) fn end(&mut self, slot: &mut Slot, at: u32) {
        self.unlist(slot, at);
        let change = slot.discharge();
        self.add(slot, change);
        self.sessions.remove(&(slot.share, at));
        let share = &mut self.shares[slot.share as usize];
        share.sessions -= 1;
        if share.sessions == 0 {
            let share = self.shares.remove(slot.share as usize);
            self.share_of.remove(&share.id);
            self.principals.report(share.id, share.end());
            self.principals.leave(share.id, self.number);
        }
    }

    /// The memory of a backlog has changed.
    pub(super) fn backlog_changed(&mut self, before: Held, after: Held) {
        self.entry_bytes += after.entries as i64 - before.entries as i64;
        self.backlog_bytes = self.backlog_bytes + after.bytes() - before.bytes();
    }

    /// The principal of a session.
    pub(super) fn principal_of(&self, slot: &Slot) -> PrincipalId {
        self.shares[slot.share as usize].id
    }

    /// Charges the queue and the output of a session that was worked on.
    pub(super) fn charge(&mut self, slot: &mut Slot) {
        let change = slot.charge();
        self.add(slot, change);
    }

    #[inline]
    fn add(&mut self, slot: &Slot, change: Charge) {
        self.entry_bytes += change.entries;
        self.output.change(change.output);
        if change.queued != 0 {
            let share = &mut self.shares[slot.share as usize];
            if let Some(steps) = share.change(change.queued) {
                self.principals.report(share.id, steps);
            }
        }
    }

    /// Offers a message to one session, in slot `at`. The caller ends the session where the outcome says
    /// so.
    pub(in crate::router) fn offer(
        &mut self,
        slot: &mut Slot,
        at: u32,
        limits: &SessionLimits,
        now: Millis,
        offer: &Offer<'_>,
        tally: &mut Tally,
    ) -> Delivered {
        let outcome = slot.session.deliver(limits, now, offer, &mut self.output);
        self.charge(slot);
        if outcome == Delivered::Queued && !slot.session.attached() {
            self.list(slot, at);
        }
        tally.outcome(slot, outcome);
        outcome
    }

    /// Puts a detached session into the order of eviction.
    pub(super) fn list(&mut self, slot: &mut Slot, at: u32) {
        if !slot.listed {
            slot.listed = true;
            self.order.insert(SlotBy(self.rank_of(slot), at));
        }
    }

    /// Takes a session out of the order of eviction.
    pub(super) fn unlist(&mut self, slot: &mut Slot, at: u32) {
        if std::mem::take(&mut slot.listed) {
            let found = self.order.remove(&SlotBy(self.rank_of(slot), at));
            debug_assert!(found, "slot {at} has another place in the order");
        }
    }

    /// The place of a session in the order of eviction. It stands until the session is told of the next change
    /// of its connection.
    fn rank_of(&self, slot: &Slot) -> Rank {
        let level = self.shares[slot.share as usize].level;
        Rank::new(level, slot.session.since())
    }

    /// The first in the order of eviction: its rank and its slot.
    pub(super) fn first(&self) -> Option<(Rank, u32)> {
        self.order.first().map(|&SlotBy(rank, at)| (rank, at))
    }

    /// The slots in the order of eviction.
    pub(super) fn listed(&self) -> Vec<u32> {
        self.order.iter().map(|&SlotBy(_, at)| at).collect()
    }

    /// A principal's level has changed, and with it the rank of its sessions.
    pub(super) fn rank(&mut self, slots: &Slab<Box<Slot>>, moved: &Moved) {
        let Some(number) = self.share_of.get(&moved.id).copied() else {
            return;
        };
        let share = &mut self.shares[number as usize];
        let before = std::mem::replace(&mut share.level, moved.level);
        for (_, at) in self.sessions.range((number, 0)..=(number, u32::MAX)) {
            let slot = slots.get(*at as usize);
            if let Some(slot) = slot.filter(|s| s.listed) {
                let since = slot.session.since();
                self.order.remove(&SlotBy(Rank::new(before, since), *at));
                (self.order).insert(SlotBy(Rank::new(moved.level, since), *at));
            }
        }
    }

    /// The slots of a principal's sessions.
    pub(super) fn of(&self, principal: PrincipalId) -> impl Iterator<Item = u32> {
        let number = self.share_of.get(&principal).copied();
        let sessions = number.map(|n| self.sessions.range((n, 0)..=(n, u32::MAX)));
        sessions.into_iter().flatten().map(|(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_rank_by_level_and_then_by_time() {
        let mib = 1024 * 1024;
        let levels = [0, mib, 1024 * mib, u64::MAX].map(Level::of);
        let times = [0, 1, 1 << 40, (1 << TIME_BITS) - 1].map(Millis::new);
        let all = (levels.iter().rev()).flat_map(|level| times.map(|time| (*level, time)));
        let ranks: Vec<(Level, Rank)> = all.map(|(l, time)| (l, Rank::new(l, time))).collect();
        assert!(ranks.is_sorted_by(|(_, a), (_, b)| a < b));
        assert!(ranks.iter().all(|(level, rank)| rank.level() == *level));
    }
}
