//! The byte budgets over all queues and all output: which messages are dropped, and in which order,
//! when the queues exceed theirs.

#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use crate::session::CloseReason;
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;

use crate::router::sessions::{Sessions, losses};
use crate::router::types::SessionRef;

/// Bytes below the budget at which eviction starts: a batch from a data link is charged before it
/// is handed out, and must still fit.
const BATCH_BYTES: u64 = 256 * 1024;

/// Bytes of each connection's output under pressure.
const PRESSED_OUTPUT_BYTES: usize = 2048;

impl Sessions {
    /// Warns of messages that connected clients lost. Keeps each connection's output short while the
    /// output of all is near its budget.
    pub(crate) fn tick_budgets(&self, now: Millis) {
        losses::warn(now);
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

    /// Brings the queues under their budget: expired messages and QoS 0 first, then the queues of
    /// the least recently connected detached sessions, then the largest of attached clients.
    /// It locks one shard at a time. One caller evicts; the others go on.
    pub(crate) fn enforce_budget(&self, now: Millis) {
        let queues = self.budgets.queue_bytes;
        let limit = queues - BATCH_BYTES.min(queues / 16);
        if self.queue_used() <= limit {
            return;
        }
        let Some(_evicting) = self.evicting.try_lock() else {
            return;
        };
        // A little below, so that not every message evicts.
        let target = limit - queues / 32;
        self.purge(now);
        while self.queue_used() > target {
            let Some((shard, until)) = self.oldest_detached() else {
                break;
            };
            self.evict_oldest(shard, until, target);
        }
        if self.queue_used() > target {
            self.evict_largest(target);
        }
    }

    fn purge(&self, now: Millis) {
        let (mut expired, mut zero) = (0, 0);
        for shard in &self.shards {
            let mut shard = shard.lock();
            let detached: Vec<u32> = shard
                .accounts
                .detached
                .iter()
                .map(|(slot, _)| *slot)
                .collect();
            for slot in detached {
                let Some(s) = shard.slots.get_mut(slot as usize) else {
                    continue;
                };
                if s.session.outbound().queued() == 0 {
                    continue;
                }
                let (e, z) = s.session.outbound_mut().purge(&self.limits, now, true);
                s.session.gaps += (e + z) as u64;
                expired += e;
                zero += z;
                shard.settle(slot);
            }
            self.charge(&mut shard);
        }
        metrics().messages_dropped[DropReason::Expired].increment(expired as u64);
        metrics().messages_dropped[DropReason::Budget].increment(zero as u64);
    }

    /// The shard whose least recently connected detached session with a queue is the oldest, and the
    /// time when the next shard's was left, if another shard has one.
    fn oldest_detached(&self) -> Option<(usize, Option<Millis>)> {
        let mut best: Option<(Millis, usize)> = None;
        let mut next: Option<Millis> = None;
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.lock();
            while let Some((&slot, &since)) = shard.accounts.detached.peek_lru() {
                let empty = shard
                    .slots
                    .get(slot as usize)
                    .is_none_or(|s| s.session.outbound().entries() == 0);
                if empty {
                    // Nothing to gain here: out of the order until it gets something again.
                    shard.unlist(slot);
                    continue;
                }
                match best {
                    Some((at, _)) if at <= since => {
                        next = Some(next.map_or(since, |next| next.min(since)));
                    }
                    _ => {
                        next = best.map(|(at, _)| at);
                        best = Some((since, index));
                    }
                }
                break;
            }
        }
        best.map(|(_, index)| (index, next))
    }

    fn evict_oldest(&self, index: usize, until: Option<Millis>, target: u64) {
        let mut shard = self.shards[index].lock();
        // A few per lock, unless the budget is met before.
        for _ in 0..16 {
            let Some((&slot, &since)) = shard.accounts.detached.peek_lru() else {
                break;
            };
            if until.is_some_and(|until| since > until) {
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

    /// Drops the queues of attached clients, the largest first. A client whose unacknowledged messages
    /// hold the memory loses its connection too. Each is visited once.
    fn evict_largest(&self, target: u64) {
        let mut all: Vec<(usize, SessionRef)> = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            for (slot, s) in &shard.slots {
                let outbound = s.session.outbound();
                let weight = outbound.queued_bytes() + outbound.in_flight_bytes();
                if weight > 0 {
                    all.push((weight, shard.reference(slot as u32)));
                }
            }
        }
        all.sort_unstable_by(|a, b| b.cmp(a));
        for keep_in_flight in [true, false] {
            for (_, reference) in &all {
                if self.queue_used() <= target {
                    return;
                }
                let mut shard = self.shard(reference.shard);
                let Some(s) = shard.get(*reference) else {
                    continue;
                };
                let mut dropped = s.session.outbound_mut().drop_queue();
                if !keep_in_flight && s.session.outbound().in_flight_bytes() > 0 {
                    if let Some(handle) = &s.handle {
                        handle.close(CloseReason::QueueBudget);
                    }
                    dropped += s.session.outbound_mut().evict();
                }
                s.session.gaps += dropped as u64;
                metrics().messages_dropped[DropReason::Budget].increment(dropped as u64);
                losses::note(&s.session, DropReason::Budget, dropped as u64);
                shard.settle(reference.slot);
                self.charge(&mut shard);
            }
        }
    }
}
