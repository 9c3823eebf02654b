//! The client's answers to messages.

use crate::flow::{InFlight as _, Stage};
use crate::mqtt::QoS;
use crate::session::outbound::Outbound;
use crate::streams::StreamId;
use crate::time::Millis;

impl Outbound {
    /// The client's PUBACK, or a PUBREC of 0x80 and above [MQTT-4.4.0-2].
    pub fn acknowledged(&mut self, packet_id: u16, now: Millis) {
        let Some(index) = self.window.find(packet_id) else {
            return;
        };
        let entry = self.window.get(index);
        let after = now.age_of(entry.at);
        self.shed.acknowledged_after = Some(after);
        if matches!(entry.stage(), Stage::Sent | Stage::Resend) {
            self.finish(index);
        }
    }

    /// The client's PUBREC: the answer is PUBREL, whatever we know [MQTT-4.3.3-4], on the stream on
    /// which it arrived. False: the identifier is unknown.
    pub fn received(&mut self, packet_id: u16, stream: StreamId) -> bool {
        let Some(index) = self.window.find(packet_id) else {
            return false;
        };
        let entry = self.window.get_mut(index);
        entry.stream = stream;
        match entry.stage() {
            Stage::Sent | Stage::Resend if entry.qos == QoS::ExactlyOnce => {
                // The client has the message [MQTT-4.3.3-6]: only the identifier is still of use.
                self.inflight_bytes -= entry.size();
                let message = entry.message.take();
                self.done.extend(message.and_then(|m| m.sequence()));
                self.window.release(index);
                true
            }
            Stage::Released => true,
            Stage::ReleaseAgain => {
                self.window.release(index);
                true
            }
            _ => false,
        }
    }

    /// The client's PUBCOMP.
    pub fn completed(&mut self, packet_id: u16) {
        if let Some(index) = self.window.find(packet_id) {
            let stage = self.window.get(index).stage();
            if matches!(stage, Stage::Released | Stage::ReleaseAgain) {
                self.finish(index);
            }
        }
    }

    fn finish(&mut self, index: usize) {
        let entry = self.window.get_mut(index);
        self.inflight_bytes -= entry.size();
        entry.message = None;
        self.window.finish(index);
        self.tidy();
    }

    /// Gives memory back that an empty window does not need.
    pub(super) fn tidy(&mut self) {
        if self.window.is_empty() {
            self.window.shrink(64);
            if self.queue.is_empty() {
                self.sets.clear();
            }
        }
    }
}
