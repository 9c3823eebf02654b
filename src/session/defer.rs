//! A session's live messages that wait for retained ones: they are kept back, and delivered in turn.

use std::sync::Arc;

use crate::budget::Allowance;
use crate::session::entry::Offer;
use crate::session::outbound::{Delivered, Shed};
use crate::session::waiting::{Deferral, WaitNumber, Waiting, WaitingMax, WaitingTotal};
use crate::session::{DropReason, Session, SessionLimits};
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::FilterId;

impl Session {
    /// The retained messages of a subscription that counts from now on are still to come: its live
    /// messages wait for them, until `until` at most. `total` counts those of the shard. False: nothing
    /// waits, because no client is connected.
    pub fn begin_wait(
        &mut self,
        filter: FilterId,
        number: WaitNumber,
        until: Millis,
        total: &Arc<WaitingTotal>,
    ) -> bool {
        let Some(connection) = self.phase.connection_mut() else {
            return false;
        };
        let waiting = connection
            .waiting
            .get_or_insert_with(|| Waiting::new(total));
        waiting.begin(filter, number, until);
        true
    }

    /// The number of a subscription's wait for its retained messages, and when it ends at the latest.
    /// `None`: it does not wait.
    pub fn wait_of(&self, filter: FilterId) -> Option<(WaitNumber, Millis)> {
        self.waiting()?.of(filter)
    }

    /// Whether a message waits on this topic that the broker retains: an older or equal value must not
    /// come before it.
    pub fn defers_retained(&self, topic: &str) -> bool {
        self.waiting().is_some_and(|w| w.has_retained(topic))
    }

    fn waiting(&self) -> Option<&Waiting> {
        self.phase.connection()?.waiting.as_deref()
    }

    /// Keeps a message of the subscription on `filter` back, if that waits, or if an earlier message on
    /// its topic waits. `max` bounds the messages of the shard.
    pub fn defer(&mut self, filter: FilterId, offer: &Offer<'_>, max: WaitingMax) -> Deferral {
        let connection = self.phase.connection_mut();
        let waiting = connection.and_then(|c| c.waiting.as_deref_mut());
        waiting.map_or(Deferral::Due, |w| w.defer(filter, offer, max))
    }

    /// A subscription waits no longer: its messages are delivered.
    pub fn end_wait(
        &mut self,
        filter: FilterId,
        limits: &SessionLimits,
        now: Millis,
        output: &mut Allowance,
    ) {
        let connection = self.phase.connection_mut();
        let Some(waiting) = connection.and_then(|c| c.waiting.as_deref_mut()) else {
            return;
        };
        let messages = waiting.take(filter);
        if waiting.is_over()
            && let Some(connection) = self.phase.connection_mut()
        {
            connection.waiting = None;
        }
        for deferred in &messages {
            if deferred.message.has_expired(now) {
                self.outbound_mut().shed.expired += 1;
                continue;
            }
            let offer = deferred.offer(self.stream_of(deferred.filter));
            let outcome = self.deliver(limits, now, &offer, output);
            self.outbound_mut().shed.add(outcome);
        }
    }

    /// The subscriptions at `places` end: they wait no longer.
    pub(super) fn end_waits(&mut self, places: &[usize], limits: &SessionLimits, now: Millis) {
        if self.waiting().is_none() {
            return;
        }
        // A bounded number of bytes, which are charged behind the packet.
        let mut output = Allowance::new(Arc::default(), u64::MAX, 1);
        for at in places {
            let filter = self.subscriptions[*at].filter;
            self.end_wait(filter, limits, now, &mut output);
        }
    }

    /// The subscriptions at `places` end: a SUBACK that is still to come is not followed by their retained
    /// messages.
    pub(super) fn forget_retained(&mut self, places: &[usize]) {
        let Some(connection) = self.phase.connection_mut() else {
            return;
        };
        if (connection.pending.iter()).all(|pending| pending.retained.is_empty()) {
            return;
        }
        let gone = places.iter().map(|at| self.subscriptions[*at].filter);
        let mut gone: Vec<FilterId> = gone.collect();
        gone.sort_unstable();
        for pending in &mut connection.pending {
            (pending.retained).retain(|due| gone.binary_search(&due.filter).is_err());
        }
    }

    /// The connection ends: the messages that wait go to the session's queue.
    pub(super) fn queue_waiting(&mut self, now: Millis) {
        let connection = self.phase.connection_mut();
        let Some(mut waiting) = connection.and_then(|c| c.waiting.take()) else {
            return;
        };
        for deferred in waiting.take_all() {
            let offer = deferred.offer(StreamId::CONTROL);
            self.outbound_mut().enqueue(now, &offer);
        }
    }

    /// Drops the messages that wait for retained ones; returns how many.
    pub fn drop_deferred(&mut self) -> usize {
        let connection = self.phase.connection_mut();
        let waiting = connection.and_then(|c| c.waiting.as_deref_mut());
        waiting.map_or(0, Waiting::drop_messages)
    }

    /// Bytes of the messages that wait for retained ones, each counted in full.
    pub fn deferred_bytes(&self) -> usize {
        self.waiting().map_or(0, Waiting::bytes)
    }

    /// Messages that wait for the retained messages of their subscriptions.
    pub fn deferred(&self) -> usize {
        self.waiting().map_or(0, Waiting::messages)
    }

    /// Messages that wait in the session, for whatever reason.
    pub fn queued(&self) -> usize {
        self.outbound().queued() + self.deferred()
    }
}

impl Shed {
    /// Counts the outcome of a delivery that was put off.
    fn add(&mut self, outcome: Delivered) {
        match outcome {
            Delivered::Written(qos) => self.sent[qos as usize] += 1,
            Delivered::Queued => {}
            Delivered::Dropped(DropReason::QueueBytes) => self.pushed_out_bytes += 1,
            Delivered::Dropped(DropReason::Qos0Offline) => self.qos0 += 1,
            Delivered::Dropped(DropReason::TooLarge) => self.too_large += 1,
            Delivered::Dropped(DropReason::QueueFull) | Delivered::EndSession => {
                self.pushed_out += 1;
            }
        }
    }
}
