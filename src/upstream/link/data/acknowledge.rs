//! Acknowledgements of the broker's messages.

use crate::mqtt::{AckKind, Publish, QoS};
use crate::time::Millis;

use crate::upstream::link::common::acknowledge;
use crate::upstream::link::data::{Arrival, DataLink};

impl DataLink {
    /// Acknowledges a message of the broker, at once or when the log allows it. The link had received so many
    /// messages of QoS 1 before.
    pub(super) fn acknowledge(
        &mut self,
        p: &Publish<'_>,
        arrival: Arrival,
        received: u64,
        now: Millis,
        out: &mut Vec<u8>,
    ) {
        let Some(acks) = &mut self.acks else {
            return acknowledge(self.version, p, out);
        };
        let kind = match p.qos {
            QoS::AtMostOnce => return,
            QoS::AtLeastOnce => AckKind::Puback,
            QoS::ExactlyOnce => AckKind::Pubrec,
        };
        match arrival {
            Arrival::New => acks.push_batched(kind, p.packet_id, received, now),
            Arrival::Again => acks.push_again(kind, p.packet_id, received, now),
            Arrival::Unwanted => acks.push(kind, p.packet_id, received, now),
        }
    }

    /// Sends the acknowledgements that need not wait any longer. `barrier`: a PINGREQ is to follow.
    pub(super) fn let_go(&mut self, barrier: bool, now: Millis, out: &mut Vec<u8>) {
        let Some(acks) = &mut self.acks else {
            return;
        };
        let once = &mut self.exactly_once;
        let messages = acks.let_go(self.version, barrier, now, out, |id| once.release(id));
        if !messages.is_empty() {
            self.router.write_messages(messages);
        }
    }
}
