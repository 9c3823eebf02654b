//! The accounts of a shard's sessions: the bytes of their queues and their output, and the order in
//! which queues are evicted.

use lru::LruCache;

use crate::budget::Allowance;
use crate::hashing::LookUpHasher;
use crate::session::{Delivered, Offer, SessionLimits};
use crate::time::Millis;

use crate::router::sessions::shard::Slot;
use crate::router::sessions::tally::Tally;

/// Detached sessions by slot, each with the time when it was left.
pub(super) type Detached = LruCache<u32, Millis, LookUpHasher>;

/// The accounts of a shard's sessions.
#[derive(Debug)]
pub(in crate::router) struct Accounts {
    /// Bytes of queue entries to add to the account when the lock is given back.
    pub(super) entry_bytes: i64,
    /// The shard's part of the budget of all output.
    pub(super) output: Allowance,
    /// Detached sessions, least recently connected last.
    pub(super) detached: Detached,
}

impl Accounts {
    pub(super) fn new(output: Allowance) -> Self {
        Self {
            entry_bytes: 0,
            output,
            detached: LruCache::unbounded_with_hasher(LookUpHasher::default()),
        }
    }

    /// Charges the entries and the output of a session that was worked on.
    pub(super) fn charge(&mut self, slot: &mut Slot) {
        let (entries, output) = slot.charge();
        self.entry_bytes += entries;
        self.output.change(output);
    }

    /// Gives back the charge of a session that is removed.
    pub(super) fn release(&mut self, slot: &mut Slot) {
        let (entries, output) = slot.discharge();
        self.entry_bytes += entries;
        self.output.change(output);
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
        if outcome == Delivered::Queued && !slot.listed && !slot.session.attached() {
            // It left the order because it was the oldest, or had nothing: the oldest again.
            slot.listed = true;
            self.detached.put(at, slot.session.since);
            self.detached.demote(&at);
        }
        tally.outcome(slot, outcome);
        outcome
    }
}
