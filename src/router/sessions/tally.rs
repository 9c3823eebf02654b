//! The outcome of a series of deliveries: counted here, and added to the metrics once per batch.

use std::sync::Arc;

use crate::mqtt::QoS;
use crate::session::{Delivered, DropReason, Session};
use crate::telemetry::{DropReason as DropLabel, Label, metrics};

use crate::router::handle::ConnectionHandle;
use crate::router::sessions::losses;
use crate::router::sessions::slot::Slot;

/// Messages that were not kept, counted by the label that the metrics have for the reason.
#[derive(Debug, Default)]
struct Dropped([u64; DropLabel::ALL.len()]);

impl Dropped {
    fn add(&mut self, label: DropLabel, count: impl Into<u64>) {
        self.0[label.index()] += count.into();
    }

    fn flush(&mut self) {
        for label in DropLabel::ALL {
            let count = std::mem::take(&mut self.0[label.index()]);
            if count > 0 {
                metrics().messages_dropped[*label].increment(count);
            }
        }
    }
}

fn label(reason: DropReason) -> DropLabel {
    match reason {
        DropReason::QueueFull => DropLabel::QueueFull,
        DropReason::QueueBytes => DropLabel::QueueBytes,
        DropReason::Qos0Offline => DropLabel::Qos0Offline,
        DropReason::TooLarge => DropLabel::TooLarge,
    }
}

/// The outcome of a series of deliveries.
#[derive(Debug, Default)]
pub(in crate::router) struct Tally {
    /// Deliveries, and messages into backlogs and out of them, since the shard's lock was last offered to others.
    pub targets: usize,
    /// Sessions to be ended because their queue is full: slot and slot version.
    pub ended: Vec<(u32, u32)>,
    /// Deliveries written, by QoS.
    delivered: [u64; 3],
    wakes: Vec<Arc<ConnectionHandle>>,
    dropped: Dropped,
}

impl Tally {
    /// Counts the messages that a session let go of, and the gaps that they leave.
    pub(crate) fn shed(&mut self, session: &mut Session) {
        let shed = std::mem::take(&mut session.outbound_mut().shed);
        for (label, count) in [
            (DropLabel::TooLarge, shed.too_large),
            (DropLabel::QueueFull, shed.pushed_out),
            (DropLabel::QueueBytes, shed.pushed_out_bytes),
            (DropLabel::Qos0Offline, shed.qos0),
            (DropLabel::Expired, shed.expired),
            (DropLabel::Age, shed.aged),
        ] {
            self.dropped.add(label, count);
            session.gaps += u64::from(count);
        }
        // Its publisher wants an expired message to be dropped.
        losses::note(session, DropLabel::TooLarge, shed.too_large.into());
        for (total, sent) in self.delivered.iter_mut().zip(shed.sent) {
            *total += u64::from(sent);
        }
        if let Some(after) = shed.acknowledged_after {
            let seconds = f64::from(after) / 1000.0;
            metrics().delivery_ack_seconds.record(seconds);
        }
    }

    /// Counts one delivery, and notes the connection to wake.
    pub(crate) fn outcome(&mut self, slot: &mut Slot, outcome: Delivered) {
        match outcome {
            Delivered::Written(qos) => {
                self.delivered[qos as usize] += 1;
                self.note(slot);
            }
            Delivered::Queued => {}
            Delivered::Dropped(reason) => {
                slot.session.gaps += 1;
                self.dropped.add(label(reason), 1u64);
                losses::note(&slot.session, label(reason), 1);
            }
            Delivered::EndSession => {}
        }
        if slot.session.outbound().shed != Default::default() {
            self.shed(&mut slot.session);
        }
    }

    /// Messages that waited were delivered: notes the connection to wake.
    pub(crate) fn flushed(&mut self, slot: &mut Slot) {
        self.note(slot);
        self.shed(&mut slot.session);
    }

    fn note(&mut self, slot: &mut Slot) {
        if !slot.woken {
            slot.woken = true;
            self.wakes.extend(slot.handle.clone());
        }
    }

    /// Wakes the connections that were noted.
    pub(crate) fn wake(&mut self) {
        for handle in self.wakes.drain(..) {
            handle.raise();
        }
    }

    /// Adds the counts to the metrics.
    pub(crate) fn flush(&mut self) {
        let m = metrics();
        for (qos, count) in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]
            .into_iter()
            .zip(self.delivered.iter_mut())
        {
            if *count > 0 {
                m.messages_delivered[qos].increment(std::mem::take(count));
            }
        }
        self.dropped.flush();
    }
}
