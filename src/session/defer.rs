//! A session's live messages that wait for retained ones: they are kept back, and delivered in turn.

use std::sync::Arc;

use crate::budget::Allowance;
use crate::session::entry::Offer;
use crate::session::outbound::{Delivered, Shed};
use crate::session::waiting::{
    Deferral, Deferred, Subscription, WAITING_MAX, Waiting, WaitingMax, WaitingTotal,
};
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
        until: Millis,
        total: &Arc<WaitingTotal>,
    ) -> bool {
        let Some(connection) = self.phase.connection_mut() else {
            return false;
        };
        let waiting = connection
            .waiting
            .get_or_insert_with(|| Waiting::new(total));
        let subscription = waiting.subscriptions.entry(filter);
        let subscription = subscription.or_insert_with(|| Subscription {
            until,
            messages: Vec::new(),
        });
        subscription.until = until;
        true
    }

    /// Whether the live messages of a subscription wait.
    pub fn waits(&self, filter: FilterId) -> bool {
        self.waiting()
            .is_some_and(|waiting| waiting.subscriptions.contains_key(&filter))
    }

    /// Whether the time of a subscription's wait is over.
    pub fn has_waited(&self, filter: FilterId, now: Millis) -> bool {
        let subscription = self.waiting().and_then(|w| w.subscriptions.get(&filter));
        subscription.is_some_and(|subscription| subscription.until <= now)
    }

    fn waiting(&self) -> Option<&Waiting> {
        self.phase.connection()?.waiting.as_deref()
    }

    /// Keeps a message of the subscription on `filter` back, if that waits, or if an earlier message on
    /// its topic waits. `max` bounds the messages of the shard.
    pub fn defer(&mut self, filter: FilterId, offer: &Offer<'_>, max: WaitingMax) -> Deferral {
        let connection = self.phase.connection_mut();
        let Some(waiting) = connection.and_then(|c| c.waiting.as_deref_mut()) else {
            return Deferral::Due;
        };
        let waits = waiting.subscriptions.contains_key(&filter);
        let topic = offer.message.topic();
        let on_topic = |s: &Subscription| s.messages.iter().any(|d| d.message.topic() == topic);
        let behind = match waits {
            true => Some(filter),
            // Another subscription has become the primary one since.
            false if waiting.messages == 0 => None,
            false => {
                let mut all = waiting.subscriptions.iter();
                all.find(|(_, s)| on_topic(s)).map(|(filter, _)| *filter)
            }
        };
        let Some(behind) = behind else {
            return Deferral::Due;
        };
        let Some(subscription) = waiting.subscriptions.get_mut(&behind) else {
            return Deferral::Due;
        };
        let room = waiting.total.has_room(offer.message.size(), max);
        if !room || subscription.messages.len() >= WAITING_MAX {
            return Deferral::Full(behind);
        }
        subscription.messages.push(Deferred {
            number: waiting.next,
            message: offer.message.clone(),
            qos: offer.qos,
            retain: offer.retain,
            ids: offer.ids.into(),
            fetched: offer.fetched,
        });
        waiting.next += 1;
        waiting.messages += 1;
        waiting.bytes += offer.message.size();
        waiting.total.add(offer.message);
        Deferral::Waits
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
        if waiting.subscriptions.is_empty()
            && let Some(connection) = self.phase.connection_mut()
        {
            connection.waiting = None;
        }
        let stream = self.stream_of(filter);
        for deferred in &messages {
            if deferred.message.has_expired(now) {
                self.outbound.shed.expired += 1;
                continue;
            }
            let offer = Offer {
                message: &deferred.message,
                qos: deferred.qos,
                retain: deferred.retain,
                ids: &deferred.ids,
                group: None,
                stream,
                fetched: deferred.fetched,
            };
            let outcome = self.deliver(limits, now, &offer, output);
            self.outbound.shed.add(outcome);
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

    /// The connection ends: the messages that wait go to the session's queue.
    pub(super) fn queue_waiting(&mut self, now: Millis) {
        let connection = self.phase.connection_mut();
        let Some(mut waiting) = connection.and_then(|c| c.waiting.take()) else {
            return;
        };
        for deferred in waiting.take_all() {
            let offer = Offer {
                message: &deferred.message,
                qos: deferred.qos,
                retain: deferred.retain,
                ids: &deferred.ids,
                group: None,
                stream: StreamId::CONTROL,
                fetched: deferred.fetched,
            };
            self.outbound.enqueue(now, &offer);
        }
    }

    /// Bytes of the messages that wait for retained ones, each counted in full.
    pub fn deferred_bytes(&self) -> usize {
        self.waiting().map_or(0, |waiting| waiting.bytes)
    }

    /// Messages that wait for the retained messages of their subscriptions.
    pub fn deferred(&self) -> usize {
        self.waiting().map_or(0, Waiting::messages)
    }

    /// Messages that wait in the session, for whatever reason.
    pub fn queued(&self) -> usize {
        self.outbound.queued() + self.deferred()
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
