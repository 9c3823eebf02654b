//! From the core to the clients: one batch of arrived messages, shard by shard.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::session::{Delivered, DropReason, Outbound};
use crate::telemetry::{DropReason as DropCause, Qos, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::filters::table::Table;
use crate::router::handle::ConnectionHandle;
use crate::router::sessions::shard::{Slot, Source};
use crate::router::types::Arrived;

/// Deliveries after which a shard's lock is offered to others.
const CHUNK: usize = 512;

/// What a fan-out did; flushed to the metrics once per batch.
#[derive(Debug, Default)]
pub(in crate::router) struct Tally {
    pub targets: usize,
    pub delivered: [u64; 3],
    pub wakes: Vec<Arc<ConnectionHandle>>,
    pub ended: Vec<(u32, u32)>,
    dropped: [u64; 6],
}

impl Tally {
    pub fn drop(&mut self, reason: DropReason, count: u64) {
        self.dropped[reason as usize] += count;
    }

    /// Counts what a session let go; returns how many messages.
    pub fn shed(&mut self, outbound: &mut Outbound) -> u64 {
        let shed = std::mem::take(&mut outbound.shed);
        self.dropped[DropReason::TooLarge as usize] += u64::from(shed.too_large);
        self.dropped[DropReason::QueueFull as usize] += u64::from(shed.pushed_out);
        self.dropped[DropReason::QueueBytes as usize] += u64::from(shed.pushed_out_bytes);
        self.dropped[DropReason::Qos0Offline as usize] += u64::from(shed.qos0);
        self.dropped[5] += u64::from(shed.expired);
        for (total, sent) in self.delivered.iter_mut().zip(shed.sent) {
            *total += u64::from(sent);
        }
        if let Some(after) = shed.acknowledged_after {
            let seconds = f64::from(after) / 1000.0;
            metrics().delivery_ack_seconds.record(seconds);
        }
        let lost = shed.too_large + shed.pushed_out + shed.pushed_out_bytes + shed.expired;
        u64::from(lost) + u64::from(shed.qos0)
    }

    /// Counts one delivery, and notes whom to wake.
    pub fn outcome(&mut self, slot: &mut Slot, outcome: Delivered) {
        match outcome {
            Delivered::Written(qos) => {
                self.delivered[qos as usize] += 1;
                if !slot.woken {
                    slot.woken = true;
                    self.wakes.extend(slot.handle.clone());
                }
            }
            Delivered::Queued => {}
            Delivered::Dropped(reason) => {
                slot.session.gaps += 1;
                self.drop(reason, 1);
            }
            Delivered::EndSession => {}
        }
        if slot.session.outbound().shed != Default::default() {
            slot.session.gaps += self.shed(slot.session.outbound_mut());
        }
    }

    pub fn wake(&mut self) {
        for wake in self.wakes.drain(..) {
            wake.raise();
        }
    }

    pub fn flush(&mut self) {
        let m = metrics();
        for (qos, count) in [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce]
            .into_iter()
            .zip(self.delivered.iter_mut())
        {
            if *count > 0 {
                m.messages_delivered[qos].increment(std::mem::take(count));
            }
        }
        let causes = [
            DropCause::QueueFull,
            DropCause::QueueBytes,
            DropCause::Qos0Offline,
            DropCause::TooLarge,
            DropCause::Expired,
            DropCause::Expired,
        ];
        for (index, cause) in causes.into_iter().enumerate() {
            let count = std::mem::take(&mut self.dropped[index]);
            if count > 0 {
                m.messages_dropped[cause].increment(count);
            }
        }
    }
}

/// Adds the filters below the roots that a message came by.
fn expand(table: &Table, arrived: &mut Arrived) {
    let came = arrived.filters.len();
    for at in 0..came {
        let number = arrived.filters[at];
        let filters = &mut arrived.filters;
        table.match_root(number, arrived.message.topic(), |n| filters.push(n));
    }
}

impl Router {
    /// Delivers a batch in order. Bounded work per lock; never waits for a client.
    pub fn fan_out(&self, batch: &mut [Arrived], now: Millis) {
        if batch.is_empty() {
            return;
        }
        let mut masks: SmallVec<[u64; 64]> = SmallVec::new();
        let mut shares = false;
        let mut local: SmallVec<[(usize, FilterId); 4]> = SmallVec::new();
        let mut all = 0;
        {
            let table = self.table.read();
            let named = table.identifiers != Some(false);
            for (at, arrived) in batch.iter_mut().enumerate() {
                let mut mask = 0;
                let dead = |n: &FilterId| table.is_tombstone(*n);
                if !arrived.filters.is_empty() && arrived.filters.iter().all(dead) {
                    arrived.filters.clear();
                    metrics().messages_dropped[DropCause::NoReceiver].increment(1);
                } else if !arrived.filters.iter().any(|n| table.get(*n).is_some()) {
                    // Without a working identifier the topic decides, among this link's filters.
                    if named {
                        metrics().upstream_unknown_subscription_ids.increment(1);
                    }
                    let filters = &mut arrived.filters;
                    filters.clear();
                    table.match_topic(arrived.link, arrived.message.topic(), |n| filters.push(n));
                }
                if !table.roots.is_empty() {
                    expand(&table, arrived);
                }
                if arrived.link >= self.config.data_links {
                    shares = true;
                    masks.push(0);
                    continue;
                }
                for number in &arrived.filters {
                    if let Some(filter) = table.get(*number) {
                        mask |= filter.mask();
                        local.extend(filter.groups().iter().map(|g| (at, *g)));
                        if filter.is_unused() {
                            filter.count_unread();
                        }
                    }
                }
                all |= mask;
                masks.push(mask);
            }
        }
        let follows = self.retain_as_published();
        for arrived in batch.iter() {
            if !follows {
                self.retained_doubtful(arrived, now);
            } else if arrived.message.retain() {
                self.retained_live(arrived, now);
            }
        }
        let mut tally = Tally::default();
        if shares {
            for arrived in batch.iter() {
                for number in &arrived.filters {
                    self.share(*number, &arrived.message, now, &mut tally);
                }
            }
            tally.wake();
        }
        for (at, group) in local {
            self.share(group, &batch[at].message, now, &mut tally);
        }
        tally.wake();
        while all != 0 {
            let index = all.trailing_zeros() as usize;
            all &= all - 1;
            let mut shard = self.shards[index].lock();
            for (arrived, mask) in batch.iter().zip(&masks) {
                if mask & (1 << index) == 0 {
                    continue;
                }
                for filter in &arrived.filters {
                    shard.fan_out(
                        &self.limits,
                        now,
                        &arrived.message,
                        *filter,
                        Source::Live(arrived.origin_mark),
                        &mut tally,
                    );
                }
                if tally.targets >= CHUNK {
                    tally.targets = 0;
                    self.charge_entries(&mut shard);
                    parking_lot::MutexGuard::unlocked_fair(&mut shard, || {
                        tally.wake();
                        self.enforce_budget(now);
                    });
                }
            }
            let ended = std::mem::take(&mut tally.ended);
            self.charge_entries(&mut shard);
            for (slot, slot_version) in ended {
                let same = shard
                    .slots
                    .get(slot as usize)
                    .is_some_and(|s| s.slot_version == slot_version);
                if same {
                    self.end_full_session(&mut shard, slot, now);
                }
            }
            drop(shard);
            tally.wake();
        }
        tally.flush();
        self.enforce_budget(now);
    }
}
