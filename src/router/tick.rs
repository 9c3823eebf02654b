//! What the time brings: expiry, wills, keepalive, stalled sockets, lingering filters, waiting
//! SUBSCRIBEs.

use std::sync::atomic::Ordering;

use parking_lot::RwLockWriteGuard;

use crate::mqtt::{QoS, ReasonCode};
use crate::session::CloseReason;
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::filters::filter::{Filter, Release};
use crate::router::filters::linger::{Idle, Overdue};
use crate::router::filters::subscribe::FILTERS_MAX;
use crate::router::filters::table::Table;
use crate::router::sessions::connect::Due;

/// Unread messages on a lingering filter that make it busy.
const BUSY: u32 = 100;

/// Known filters beyond which those that linger make room whatever their age.
const FILTERS_CROWDED: usize = FILTERS_MAX / 10 * 9;

/// Bytes of the names of lingering filters; past it the oldest leave whatever their age.
const LINGERING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Lingering filters that are looked at, or let go of, before the table's lock is given back.
const CHUNK: usize = 4096;

impl Router {
    /// To be called a few times a second.
    pub fn tick(&self, now: Millis) {
        // Not in the loop's head: there the lock is held to the loop's end, and whoever holds a shard
        // may wait for it.
        let deferred = std::mem::take(&mut *self.deferred.lock());
        for due in deferred {
            self.settle_due(due, now);
        }
        let waiting = std::mem::take(&mut *self.waiting_for_room.lock());
        for wake in waiting {
            wake.unqueue();
        }
        self.tick_output();
        for number in 0..self.shards.len() {
            self.tick_shard(number, now);
        }
        self.tick_held(now);
        self.tick_left(now);
        self.tick_retained(now);
        // Walks over all that linger: not at each tick.
        if self
            .ticks
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(10)
        {
            self.tick_linger(now);
            self.table.read().suggest_root();
        }
    }

    /// Near the budget of all output, each connection's is kept short.
    fn tick_output(&self) {
        let used = self.output_used();
        let now = self.limits.output_buffer.load(Ordering::Relaxed);
        if used > self.config.output && now == self.output_buffer {
            self.limits.output_buffer.store(PRESSED, Ordering::Relaxed);
        } else if used < self.config.output / 5 * 4 && now != self.output_buffer {
            let normal = self.output_buffer;
            self.limits.output_buffer.store(normal, Ordering::Relaxed);
        }
    }

    fn tick_shard(&self, number: usize, now: Millis) {
        let mut due = Due {
            shard: number as u16,
            ..Due::default()
        };
        let mut shard = self.shards[number].lock();
        while let Some(slot) = shard.fired(now) {
            let Some(s) = shard.slots.get_mut(slot as usize) else {
                continue;
            };
            if !s.session.attached() {
                self.expire(&mut shard, slot, now, &mut due);
                continue;
            }
            if let Some(connection) = s.session.connection()
                && connection.unread
            {
                connection.last_seen = now;
            }
            if s.session.deadline().is_some_and(|at| at <= now)
                && let Some(handle) = &s.handle
            {
                handle.close(CloseReason::KeepAlive);
                // Asked once; the task ends the connection.
                if let Some(connection) = s.session.connection() {
                    connection.stop_keep_alive();
                }
            }
            shard.settle(slot);
        }
        self.charge_entries(&mut shard);
        drop(shard);
        self.settle_due(due, now);
    }

    /// By when `bytes` must be taken that are offered from `since` on, milliseconds. Who takes them
    /// slowly but steadily may; a byte now and then is not enough.
    pub fn stalled_at(&self, since: u64, bytes: usize) -> u64 {
        let more = bytes as u64 * 1000 / SLOWEST;
        since.saturating_add(self.config.write_stall + more)
    }

    /// The output of all connections is over its budget.
    pub fn output_pressed(&self) -> bool {
        self.limits.output_buffer.load(Ordering::Relaxed) != self.output_buffer
    }

    /// Ends connections whose socket takes too little; walks all sessions, so not at each tick.
    pub fn close_stalled(&self, now: Millis) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            for (_, slot) in shard.slots.iter_mut() {
                let Some(handle) = &slot.handle else {
                    continue;
                };
                let moved = slot.taken_at.max(handle.moved_at());
                let stands = moved.saturating_add(self.config.write_stall) < now;
                let drags = self.stalled_at(slot.taken_at, slot.offered) < now;
                if slot.offered > 0 && (stands || drags) {
                    handle.close(CloseReason::WriteStall);
                }
            }
        }
    }

    /// Asks for a WebSocket ping on connections that have been silent: proxies cut those that are.
    /// Whether the client is still there is for its keep alive to say, and for TCP.
    pub fn ping_idle(&self, now: Millis) {
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                let after = slot.peer.as_ref().map_or(0, |o| o.ping_after);
                let (Some(connection), Some(handle)) =
                    (slot.session.connection_ref(), &slot.handle)
                else {
                    continue;
                };
                let last = connection.last_seen.max(handle.sent_at());
                if after > 0 && last + after <= now {
                    handle.ping(now);
                }
            }
        }
    }

    /// Asks up to `most` connections to end.
    pub fn close_some(&self, reason: CloseReason, most: usize) {
        let mut left = most;
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                if left == 0 {
                    return;
                }
                if let Some(handle) = &slot.handle
                    && slot.session.attached()
                    && handle.closing().is_none()
                {
                    handle.close(reason);
                    left -= 1;
                }
            }
        }
    }

    /// SUBSCRIBEs that have waited long enough for the core.
    fn tick_held(&self, now: Millis) {
        loop {
            let mut table = self.table.write();
            let Some(&(deadline, number)) = table.deadlines.first() else {
                return;
            };
            if deadline > now {
                return;
            }
            table.deadlines.remove(&(deadline, number));
            let source = table.source(number);
            let active = table.get(source).filter(|f| f.is_active());
            let active = active.map(Filter::granted);
            let confirmed = active.is_some();
            let granted = active.unwrap_or(QoS::ExactlyOnce);
            let granted = ReasonCode(granted as u8);
            let mut late = Vec::new();
            if let Some(filter) = table.get_mut(number) {
                late = filter.take_late(now);
                if !confirmed && self.config.subscribe_accept {
                    filter.presume();
                    if source != number {
                        table.awaiting_root.insert(number);
                    }
                }
            }
            drop(table);
            if late.is_empty() {
                continue;
            }
            let code = if confirmed {
                granted
            } else if self.config.subscribe_accept {
                metrics().upstream_gaps.increment(1);
                tracing::warn!(
                    clients = late.len(),
                    "The core did not answer a SUBSCRIBE in time; it is granted, and messages until the core holds the filter are missed"
                );
                granted
            } else {
                ReasonCode::UNSPECIFIED_ERROR
            };
            self.settle_waiters(number, &late, code, confirmed, now);
        }
    }

    /// Shared filters whose members are all gone.
    fn tick_left(&self, now: Millis) {
        let mut table = self.table.write();
        if table.release_soon.is_empty() {
            return;
        }
        let mut due = std::mem::take(&mut table.release_soon);
        // A filter that was used and unsubscribed again is there for each time.
        due.sort_unstable();
        due.dedup();
        let (mut idle, mut gone): (Vec<Idle>, Vec<FilterId>) = Default::default();
        for id in due {
            match table.get(id).map(Filter::idle_since) {
                None => gone.push(id),
                Some(None) => {}
                Some(Some(since)) => idle.push((since, id)),
            }
        }
        self.forget_groups(&gone);
        let awaited = self.leave(table, &idle, now);
        // Answered soon, and then due at a later tick.
        self.table.write().release_soon.extend(awaited);
    }

    /// Filters that nobody came back for.
    fn tick_linger(&self, now: Millis) {
        let mut overdue = {
            let table = self.table.read();
            let lingering = &table.lingering;
            // Those that are on their way out make room soon.
            let leaving: usize = table
                .unsubscribe_queue
                .iter()
                .map(|queue| queue.len())
                .sum();
            Overdue {
                idle_before: now.saturating_sub(self.config.linger),
                busy_before: now.saturating_sub(self.config.linger_busy_min),
                surplus: (lingering.len()).saturating_sub(self.config.filters_lingering_max),
                urgent: table.len().saturating_sub(FILTERS_CROWDED + leaving),
                urgent_bytes: lingering.bytes().saturating_sub(LINGERING_BYTES_MAX),
            }
        };
        let mut leaving = Vec::new();
        let mut last = None;
        let mut more = true;
        while more {
            // Others have their turn in between.
            let table = self.table.read();
            more = false;
            for ((since, number), bytes) in table.lingering.behind(last).take(CHUNK) {
                let filter = table.get(number);
                let busy = || filter.is_some_and(|f| f.unread() > BUSY);
                let leaves = overdue.next(since, bytes, busy);
                more = leaves.is_some();
                if leaves == Some(true) {
                    leaving.push((since, number));
                }
                if !more {
                    break;
                }
                last = Some((since, number));
            }
        }
        for some in leaving.chunks(CHUNK) {
            // Those that are awaited still linger, and are found again.
            self.leave(self.table.write(), some, now);
        }
    }

    /// Lets go of filters that are idle since a moment; returns those for which an answer is awaited.
    fn leave(
        &self,
        mut table: RwLockWriteGuard<'_, Table>,
        leaving: &[Idle],
        now: Millis,
    ) -> Vec<FilterId> {
        let mut wake = 0u64;
        let mut forget = Vec::new();
        let mut awaited = Vec::new();
        for &(since, number) in leaving {
            let Some(filter) = table.get_mut(number) else {
                table.lingering.remove((since, number));
                continue;
            };
            // It is in use again.
            if filter.idle_since() != Some(since) {
                continue;
            }
            match filter.release() {
                Release::Unsubscribe(link) => {
                    table.lingering.remove((since, number));
                    table.unsubscribe_queue[usize::from(link)].push_back(number);
                    wake |= 1 << link;
                    forget.push(number);
                }
                Release::Remove => {
                    table.remove(number, now);
                    forget.push(number);
                }
                Release::Later => awaited.push(number),
            }
        }
        self.forget_groups(&forget);
        drop(table);
        self.forget_retained(forget.into_iter());
        for (link, data) in self.data.iter().enumerate() {
            if wake & (1 << link) != 0 {
                data.raise();
            }
        }
        awaited
    }
}

/// What a client takes of its output at least once that has waited for `limits.write_stall`, bytes a second.
const SLOWEST: u64 = 8192;

/// Bytes of each connection's output under pressure.
const PRESSED: usize = 2048;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::mqtt::{Message, MessageSpec, Properties, QoS, Version};
    use crate::router::handle::ConnectionHandle;
    use crate::router::{Connect, Peer};
    use crate::session::ConnectionSpec;
    use crate::sim::testing;

    /// A client that has been offered 1 MiB at 1 s, and last took some of it at `moved`.
    fn offered(router: &Router, moved: u64) -> Arc<ConnectionHandle> {
        let client = testing::client(router, "c");
        let mut shard = router.shards[usize::from(client.session.shard)].lock();
        let slot = shard.get(client.session).expect("there");
        let wake = Arc::new(ConnectionHandle::default());
        (slot.offered, slot.taken_at, slot.handle) = (1 << 20, 1000, Some(wake.clone()));
        wake.moved(moved);
        wake
    }

    fn ends_after(router: &Router, wake: &ConnectionHandle, last: u64) {
        router.close_stalled(last);
        assert!(wake.closing().is_none());
        router.close_stalled(last + 1);
        assert_eq!(wake.closing(), Some(CloseReason::WriteStall));
    }

    #[test]
    fn who_takes_its_output_slowly_has_time_for_all_of_it() {
        let router = testing::router();
        let last = 1000 + router.config.write_stall + (1 << 20) * 1000 / SLOWEST;
        ends_after(&router, &offered(&router, last - 5), last);
    }

    #[test]
    fn who_takes_nothing_has_no_more_time_however_much_it_is() {
        let router = testing::router();
        let last = 2000 + router.config.write_stall;
        ends_after(&router, &offered(&router, 2000), last);
    }

    #[test]
    fn what_is_deferred_is_settled_without_its_lock() {
        let router = testing::router();
        let client = testing::client(&router, "c");
        let will = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: b"x",
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        });
        router.defer(Due {
            wills: vec![(client.session, 0, will)],
            ..Due::default()
        });
        // Whoever has this lock may have something to defer; the will waits for it.
        let shard = router.shards[usize::from(client.session.shard)].lock();
        std::thread::scope(|scope| {
            scope.spawn(|| router.tick(1));
            loop {
                let deferred = router.deferred.try_lock_for(Duration::from_secs(10));
                if deferred.expect("it is free").is_empty() {
                    break;
                }
                std::thread::yield_now();
            }
            drop(shard);
        });
    }

    #[test]
    fn a_websocket_is_pinged_once_for_each_interval_of_silence() {
        let router = testing::router();
        let wakes = [45_000, 0].map(|ping_after| {
            let wake = Arc::new(ConnectionHandle::default());
            let connect = Connect {
                client_id: format!("{ping_after}").into(),
                principal: "anonymous".into(),
                clean_start: true,
                expiry: 0,
                spec: ConnectionSpec {
                    version: Version::V5,
                    receive_maximum: 1,
                    maximum_packet_size: u32::MAX,
                    topic_alias_maximum: 0,
                    problem_information: true,
                    keep_alive: 0,
                    scope: None,
                },
                will: None,
                handle: wake.clone(),
                peer: Arc::new(Peer {
                    listener: "test".into(),
                    transport: "ws",
                    ping_after,
                    address: ([127, 0, 0, 1], 1).into(),
                }),
            };
            let connected = router.connect(connect, 1000, |_, out| out.push(0));
            (wake, connected.ok().map(|c| (c.session, c.connection_no)))
        });
        let [(pinged, session), (left_alone, _)] = &wakes;
        let (session, connection_no) = session.expect("connected");
        let walks = |from: u64, to: u64| {
            let times = (from..=to).step_by(2000);
            let pings = times.filter(|&now| {
                router.ping_idle(now);
                assert!(!left_alone.take_ping());
                pinged.take_ping()
            });
            pings.collect::<Vec<_>>()
        };
        assert_eq!(walks(1000, 140_000), [47_000, 93_000, 139_000]);
        // What is sent to it is no silence.
        let mut out = Vec::new();
        router.take_output(session, connection_no, &mut out, 150_000);
        assert!(!out.is_empty());
        assert_eq!(walks(150_000, 200_000), [196_000]);
        // To look for output that is not there is.
        router.take_output(session, connection_no, &mut Vec::new(), 200_000);
        assert_eq!(walks(202_000, 245_000), [242_000]);
    }
}
