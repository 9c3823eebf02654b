//! The byte budgets over all queues and all output: which messages are dropped, and in which order,
//! when the queues exceed theirs.

mod backlogs;
mod closing;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::session::CloseReason;
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;

use crate::router::sessions::accounts::Rank;
use crate::router::sessions::budget::backlogs::{Candidate, Candidates, Waiting};
use crate::router::sessions::budget::closing::Closing;
use crate::router::sessions::principals::{Level, Moved};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::{Sessions, losses};
use crate::router::types::SessionRef;

/// Bytes below the budget at which eviction starts: a batch from a data link is charged before it
/// is handed out, and must still fit.
const BATCH_BYTES: u64 = 256 * 1024;

/// Bytes of each connection's output under pressure.
const PRESSED_OUTPUT_BYTES: usize = 2048;

/// All queues are searched for expired messages and QoS 0 once in this time at most.
const PURGE_INTERVAL: Duration = Duration::from_secs(1);

/// The sessions of the heaviest principal are searched for large ones once in this time at most, and the
/// shards for backlogs, unless the backlogs that were found are empty and others have grown.
const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// After all sessions were visited and the budget is not met, they are not visited again for this
/// long, unless the queues grow by [`GROWTH_DIVISOR`].
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The queues may grow by this part of their budget before sessions are visited again that had nothing to
/// drop, and before a caller waits for the one that evicts.
const GROWTH_DIVISOR: u64 = 64;

/// Sessions that are evicted before a shard's lock is given back, and backlogs that are trimmed before the
/// queues are looked at again.
const EVICTIONS_MAX: usize = 16;

/// A principal that uses this part of the budget loses the messages of its connected clients before
/// others lose those of clients that are away, and so does one session before others of its principal.
const HEAVY_DIVISOR: u64 = 4;

/// The messages of a connected client that are dropped; each step drops more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drop {
    Qos0,
    Queue,
    /// Unacknowledged messages too; the connection, which may have parts of them, ends.
    All,
}

/// The state of the one caller that evicts.
#[derive(Debug, Default)]
pub(super) struct Evicting {
    /// When all queues were searched for expired messages.
    purged_at: Option<Millis>,
    /// When the sessions of the heaviest principal were searched for large ones.
    searched_at: Option<Millis>,
    /// When all sessions were visited and the budget was not met, and the bytes in use afterwards.
    in_vain: Option<(Millis, u64)>,
    backlogs: Candidates,
    closing: Closing,
}

impl Sessions {
    /// Warns of messages that connected clients lost, and tells the shards the principals' levels. Keeps
    /// each connection's output short while the output of all is near its budget.
    pub(crate) fn tick_budgets(&self, now: Millis) {
        losses::warn(now);
        self.rank();
        if self.queue_used() <= self.budgets.queue_bytes / 2
            && let Some(mut evicting) = self.evicting.try_lock()
        {
            evicting.backlogs = Candidates::default();
        }
        let (used, budget) = (self.output_account.used(), self.budgets.output_bytes);
        let current = self.limits.output_buffer.load(Ordering::Relaxed);
        let limit = if used > budget - budget / 16 && current == self.output_buffer {
            PRESSED_OUTPUT_BYTES
        } else if used < budget / 5 * 4 && current != self.output_buffer {
            self.output_buffer
        } else {
            return;
        };
        self.limits.output_buffer.store(limit, Ordering::Relaxed);
    }

    /// The output of all connections is over its budget.
    pub(crate) fn output_pressed(&self) -> bool {
        self.limits.output_buffer.load(Ordering::Relaxed) != self.output_buffer
    }

    /// Brings the queues under their budget: expired messages and QoS 0 first, then backlogs and the queues
    /// of detached sessions, and the queues of connected clients; queues of the principals that use most
    /// first, and among equals of the least recently connected. It locks one shard at a time. One
    /// caller evicts; the others go on while the excess is small, and else wait for it, so that each of them
    /// adds one batch at most. The caller must hold no lock of a shard.
    pub(crate) fn enforce_budget(&self, now: Millis) {
        let queues = self.budgets.queue_bytes;
        let limit = queues - BATCH_BYTES.min(queues / 16);
        if self.queue_used() <= limit {
            return;
        }
        let growth = queues / GROWTH_DIVISOR;
        let mut evicting = match self.evicting.try_lock() {
            Some(evicting) => evicting,
            None if self.queue_used() > limit + growth => self.evicting.lock(),
            None => return,
        };
        let evicting = &mut *evicting;
        evicting.closing.look(self, now);
        let used = self.queue_used();
        if used <= limit + evicting.closing.bytes() {
            return;
        }
        // A little below, so that not every message evicts.
        let target = limit - queues / 32;
        if (evicting.purged_at).is_none_or(|at| now >= at + PURGE_INTERVAL) {
            evicting.purged_at = Some(now);
            self.purge(now);
        }
        if (evicting.searched_at).is_none_or(|at| now >= at + SEARCH_INTERVAL) {
            evicting.searched_at = Some(now);
            self.evict_large(&mut evicting.closing, now, target);
        }
        let in_vain = |(at, left)| now < at + RETRY_INTERVAL && used < left + growth;
        let in_vain = evicting.in_vain.is_some_and(in_vain);
        if !in_vain && self.is_over(target, &evicting.closing) {
            evicting.backlogs.search(self, now);
        }
        self.evict_absent(evicting, now, target);
        if !in_vain && self.is_over(target, &evicting.closing) {
            evicting.in_vain = None;
            self.evict_connected(&mut evicting.closing, now, target);
            if self.is_over(target, &evicting.closing) {
                evicting.in_vain = Some((now, self.queue_used()));
            }
        }
    }

    /// Whether the queues use more than `target` bytes, without the bytes that the tasks of closed
    /// connections will give back.
    fn is_over(&self, target: u64, closing: &Closing) -> bool {
        self.queue_used() > target + closing.bytes()
    }

    /// Drops messages for clients that are away, in backlogs and in queues, and those of heavy principals
    /// before.
    fn evict_absent(&self, evicting: &mut Evicting, now: Millis, target: u64) {
        // No more principals than that can be heavy.
        let mut heavy_left = HEAVY_DIVISOR;
        while self.is_over(target, &evicting.closing) {
            self.rank();
            let queue = self.next_detached();
            let backlog = evicting.backlogs.first(self);
            let waiting = queue.map(|q| q.waiting);
            if heavy_left > 0
                && let Some(heavy) = self.heavier(waiting, backlog)
            {
                heavy_left -= 1;
                self.evict_principal(&heavy, &mut evicting.closing, now, target);
                continue;
            }
            match (backlog, queue) {
                (Some(backlog), _) if backlog.goes_before(waiting) => {
                    self.trim_backlogs(backlog, waiting, evicting, target);
                }
                (_, Some(queue)) => {
                    let target = target + evicting.closing.bytes();
                    self.evict_detached(queue, backlog, now, target);
                }
                (_, None) => return,
            }
        }
    }

    /// Drops messages of all principals' sessions, those of the principal that uses most first.
    fn evict_connected(&self, closing: &mut Closing, now: Millis, target: u64) {
        let mut principal = None;
        while self.is_over(target, closing) {
            principal = self.principals.heaviest(principal);
            match &principal {
                Some(principal) => self.evict_principal(principal, closing, now, target),
                None => break,
            }
        }
    }

    /// Drops messages of backlogs, the older half each time, while they go before this queue.
    fn trim_backlogs(
        &self,
        mut backlog: Candidate,
        queue: Option<Waiting>,
        evicting: &mut Evicting,
        target: u64,
    ) {
        for _ in 0..EVICTIONS_MAX {
            let mut shard = self.shard(backlog.shard);
            shard.trim_backlog(backlog.filter);
            self.charge(&mut shard);
            drop(shard);
            if !self.is_over(target, &evicting.closing) {
                return;
            }
            let next = evicting.backlogs.first(self);
            let Some(next) = next.filter(|next| next.goes_before(queue)) else {
                return;
            };
            backlog = next;
        }
    }

    fn purge(&self, now: Millis) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            for slot in shard.accounts.listed() {
                self.purge_detached(&mut shard, slot, now);
            }
            shard.purge_backlogs(&self.limits, now);
            self.charge(&mut shard);
        }
    }

    /// Drops a detached session's expired messages and QoS 0.
    fn purge_detached(&self, shard: &mut Shard, slot: u32, now: Millis) {
        let Some(s) = shard.slots.get_mut(slot as usize) else {
            return;
        };
        if s.session.outbound().queued() == 0 {
            return;
        }
        let (expired, zero) = s.session.outbound_mut().purge(&self.limits, now, true);
        s.session.gaps += (expired + zero) as u64;
        metrics().messages_dropped[DropReason::Expired].increment(expired as u64);
        metrics().messages_dropped[DropReason::Budget].increment(zero as u64);
        shard.settle(slot);
    }

    /// Tells the shards the principals' new levels.
    fn rank(&self) {
        for moved in self.principals.take_moved() {
            let mut shards = moved.shards;
            while shards != 0 {
                let number = shards.trailing_zeros() as u16;
                shards &= shards - 1;
                let shard = &mut *self.shard(number);
                shard.accounts.rank(&shard.slots, &moved);
            }
        }
    }

    /// A principal that is to lose the messages of its connected clients before lighter ones lose those of a
    /// detached session or of a backlog.
    fn heavier(&self, queue: Option<Waiting>, backlog: Option<Candidate>) -> Option<Moved> {
        let heavy = Level::of(self.budgets.queue_bytes / HEAVY_DIVISOR);
        let first = self.principals.heaviest(None)?;
        let backlog = backlog.map(|b| b.level_against(first.id));
        let level = queue.map(|q| q.level).max(backlog)?;
        (first.level > level && first.level >= heavy).then_some(first)
    }

    /// The detached session with a queue that is the first to be evicted.
    fn next_detached(&self) -> Option<NextDetached> {
        let mut best: Option<(Rank, usize, Waiting)> = None;
        let mut next: Option<Rank> = None;
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.lock();
            while let Some((rank, slot)) = shard.accounts.first() {
                let Some(waiting) = waiting(&shard, rank, slot) else {
                    // Nothing to gain here: out of the order until it gets something again.
                    shard.unlist(slot);
                    continue;
                };
                match best {
                    Some((first, ..)) if first <= rank => {
                        next = Some(next.map_or(rank, |next| next.min(rank)));
                    }
                    _ => {
                        next = best.map(|(first, ..)| first);
                        best = Some((rank, index, waiting));
                    }
                }
                break;
            }
        }
        best.map(|(_, shard, waiting)| NextDetached {
            waiting,
            shard,
            until: next,
        })
    }

    /// Evicts detached sessions of one shard that go before this backlog.
    fn evict_detached(
        &self,
        next: NextDetached,
        backlog: Option<Candidate>,
        now: Millis,
        target: u64,
    ) {
        let mut shard = self.shards[next.shard].lock();
        for _ in 0..EVICTIONS_MAX {
            let Some((rank, slot)) = shard.accounts.first() else {
                break;
            };
            if next.until.is_some_and(|until| rank > until) {
                break;
            }
            let waiting = waiting(&shard, rank, slot);
            if waiting.is_some() && backlog.is_some_and(|b| b.goes_before(waiting)) {
                break;
            }
            self.purge_detached(&mut shard, slot, now);
            self.charge(&mut shard);
            if self.queue_used() <= target {
                break;
            }
            shard.unlist(slot);
            let Some(s) = shard.slots.get_mut(slot as usize) else {
                continue;
            };
            let dropped = s.session.outbound_mut().evict();
            s.session.gaps += dropped as u64;
            metrics().messages_dropped[DropReason::Budget].increment(dropped as u64);
            shard.settle(slot);
            self.charge(&mut shard);
            if self.queue_used() <= target {
                break;
            }
        }
    }

    /// Drops the messages that wait in large sessions of the principal that uses most: one client does
    /// not push out the others that have the same principal, as all anonymous clients do.
    fn evict_large(&self, closing: &mut Closing, now: Millis, target: u64) {
        let large = self.budgets.queue_bytes / HEAVY_DIVISOR;
        let heaviest = self.principals.heaviest(None);
        if let Some(first) = heaviest.filter(|first| first.level >= Level::of(large)) {
            let sessions = self.sessions_of(&first, large);
            let steps = [Drop::Qos0, Drop::Queue];
            self.drop_messages(&sessions, &steps, closing, now, target);
        }
    }

    /// The sessions of a principal that use `least` bytes or more, the largest first.
    fn sessions_of(&self, principal: &Moved, least: u64) -> Vec<(u64, SessionRef)> {
        let mut all: Vec<(u64, SessionRef)> = Vec::new();
        let mut shards = principal.shards;
        while shards != 0 {
            let number = shards.trailing_zeros() as u16;
            shards &= shards - 1;
            let shard = self.shard(number);
            let sessions = shard.accounts.of(principal.id);
            let charged = sessions.filter_map(|slot| {
                let bytes = shard.slots.get(slot as usize)?.charged_queue_bytes;
                (bytes >= least).then(|| (bytes, shard.reference(slot)))
            });
            all.extend(charged);
        }
        all.sort_unstable_by(|a, b| b.cmp(a));
        all
    }

    /// Drops the messages of a principal's sessions, the largest first. A client whose unacknowledged
    /// messages or whose output hold the memory loses its connection too.
    fn evict_principal(&self, principal: &Moved, closing: &mut Closing, now: Millis, target: u64) {
        let sessions = self.sessions_of(principal, 1);
        let steps = [Drop::Qos0, Drop::Queue, Drop::All];
        self.drop_messages(&sessions, &steps, closing, now, target);
    }

    /// Drops messages of sessions, in steps that drop more and more. Connections that are closed are added
    /// to `closing`.
    fn drop_messages(
        &self,
        sessions: &[(u64, SessionRef)],
        steps: &[Drop],
        closing: &mut Closing,
        now: Millis,
        target: u64,
    ) {
        for &what in steps {
            for (_, reference) in sessions {
                if !self.is_over(target, closing) {
                    return;
                }
                let mut shard = self.shard(reference.shard);
                let Some(s) = shard.get(*reference) else {
                    continue;
                };
                if let Some(handle) = &s.handle
                    && what == Drop::All
                    && s.holds_messages()
                {
                    handle.close(CloseReason::QueueBudget);
                    let bytes = s.shared_output() as u64;
                    closing.note(*reference, s.session.connection_no(), bytes, now);
                }
                let deferred = match what {
                    Drop::Qos0 => 0,
                    Drop::Queue | Drop::All => s.session.drop_deferred(),
                };
                let outbound = s.session.outbound_mut();
                let (expired, dropped) = match what {
                    Drop::Qos0 => outbound.purge_connected(now),
                    Drop::Queue => (0, outbound.drop_queue() + deferred),
                    Drop::All => (0, outbound.evict() + deferred),
                };
                s.session.gaps += (expired + dropped) as u64;
                metrics().messages_dropped[DropReason::Expired].increment(expired as u64);
                metrics().messages_dropped[DropReason::Budget].increment(dropped as u64);
                losses::note(&s.session, DropReason::Budget, dropped as u64);
                shard.settle(reference.slot);
                self.charge(&mut shard);
            }
        }
    }
}

/// The bytes of a detached session that is in the order of eviction. `None`: it has no message.
fn waiting(shard: &Shard, rank: Rank, slot: u32) -> Option<Waiting> {
    let slot = shard.slots.get(slot as usize)?;
    let any = slot.session.outbound().entries() > 0;
    any.then(|| Waiting {
        level: rank.level(),
        principal: shard.accounts.principal_of(slot),
        bytes: slot.charged_queue_bytes,
    })
}

/// The detached session that is the first to be evicted.
#[derive(Clone, Copy, Debug)]
struct NextDetached {
    waiting: Waiting,
    shard: usize,
    /// The rank of the first session in the next shard.
    until: Option<Rank>,
}
