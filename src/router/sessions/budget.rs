//! The byte budget over every session's queue: what goes when it is exceeded, and in which order.

use crate::session::CloseReason;
use crate::telemetry::{DropReason as DropCause, metrics};
use crate::time::Millis;

use crate::router::Router;
use crate::router::types::SessionRef;

/// Bytes below the budget at which eviction starts: a batch from a D link is charged before it
/// is handed out, and must still fit.
const BATCH: u64 = 256 * 1024;

impl Router {
    /// Brings the queues under their budget: expired messages and QoS 0 first, then the queues of
    /// the least recently connected detached sessions, then the largest of attached clients.
    /// One shard's lock at a time; one caller at a time, the others go on.
    pub fn enforce_budget(&self, now: Millis) {
        let queues = self.config.queues;
        let limit = queues - BATCH.min(queues / 16);
        if self.queue_used() <= limit {
            return;
        }
        let Some(_single) = self.evicting.try_lock() else {
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
            let detached: Vec<u32> = shard.detached.iter().map(|(slot, _)| *slot).collect();
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
            self.charge_entries(&mut shard);
        }
        metrics().messages_dropped[DropCause::Expired].increment(expired as u64);
        metrics().messages_dropped[DropCause::Budget].increment(zero as u64);
    }

    /// The shard whose least recently connected detached session with a queue is the oldest, and
    /// since when the next shard's is detached.
    fn oldest_detached(&self) -> Option<(usize, u64)> {
        let mut best: Option<(u64, usize)> = None;
        let mut next = u64::MAX;
        for (index, shard) in self.shards.iter().enumerate() {
            let mut shard = shard.lock();
            while let Some((&slot, &since)) = shard.detached.peek_lru() {
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
                    Some((at, _)) if at <= since => next = next.min(since),
                    _ => {
                        next = best.map_or(next, |(at, _)| at);
                        best = Some((since, index));
                    }
                }
                break;
            }
        }
        best.map(|(_, index)| (index, next))
    }

    fn evict_oldest(&self, index: usize, until: u64, target: u64) {
        let mut shard = self.shards[index].lock();
        // A few per lock, unless the budget is met before.
        for _ in 0..16 {
            let Some((&slot, &since)) = shard.detached.peek_lru() else {
                break;
            };
            if since > until {
                break;
            }
            shard.unlist(slot);
            let Some(s) = shard.slots.get_mut(slot as usize) else {
                continue;
            };
            let dropped = s.session.outbound_mut().evict();
            s.session.gaps += dropped as u64;
            metrics().messages_dropped[DropCause::Budget].increment(dropped as u64);
            shard.settle(slot);
            self.charge_entries(&mut shard);
            if self.queue_used() <= target {
                break;
            }
        }
    }

    /// Drops the queues of attached clients, the largest first; those whose unacknowledged
    /// messages hold the memory lose their connection too. Each is visited once.
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
                let mut shard = self.shards[usize::from(reference.shard)].lock();
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
                metrics().messages_dropped[DropCause::Budget].increment(dropped as u64);
                shard.settle(reference.slot);
                self.charge_entries(&mut shard);
            }
        }
    }
}
