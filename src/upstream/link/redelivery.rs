//! Recognises the QoS 1 messages that the broker sends a second time after a reconnect.
//!
//! The broker resends, in order, the messages whose acknowledgement it did not receive: some of the
//! last ones that were acknowledged. A message counts as redelivered only after a reconnect, only in
//! that order, and only up to the first message that is not among them. Packet identifier and content
//! decide, and never DUP, which brokers forget to set.

use std::ops::Range;

use crate::mqtt::Publish;
use crate::store::{Received, Ring};

/// Messages that are remembered. No broker has more than 65,535 without an acknowledgement.
const REMEMBERED_MAX: u64 = 65_535;

/// The QoS 1 messages that one link has received, to tell new ones from redeliveries.
#[derive(Debug)]
pub(super) struct Redelivery {
    ring: Box<dyn Ring>,
    /// Positions in the ring of the messages that the broker may still resend.
    candidates: Range<u64>,
}

impl Redelivery {
    /// `ring` holds the messages that were received before.
    pub(super) fn new(ring: Box<dyn Ring>) -> Self {
        Self {
            ring,
            candidates: 0..0,
        }
    }

    /// The link has connected with Session Present 1.
    pub(super) fn resumed(&mut self) {
        self.candidates = self.ring.positions();
    }

    /// The link has connected with Session Present 0: the broker resends nothing.
    pub(super) fn began_anew(&mut self) {
        self.ring.clear();
        self.candidates = 0..0;
    }

    /// Whether no message is remembered.
    pub(super) fn is_empty(&self) -> bool {
        self.ring.positions().is_empty()
    }

    /// The position after the last message that was received.
    pub(super) fn mark(&self) -> u64 {
        self.ring.positions().end
    }

    /// The broker has the acknowledgements of all messages before the position `mark`.
    pub(super) fn confirmed(&mut self, mark: u64) {
        self.ring.settle(mark);
        let first = self.ring.positions().start;
        self.candidates.start = self.candidates.start.max(first);
    }

    /// What identifies a message's content.
    pub(super) fn digest(&self, publish: &Publish<'_>) -> u64 {
        let qos = publish.qos as u8;
        self.ring.digest(publish.topic, publish.payload, qos)
    }

    /// Whether this QoS 1 message was received before the link was lost. A new one is remembered.
    pub(super) fn seen(&mut self, publish: &Publish<'_>) -> bool {
        let received = Received {
            packet_id: publish.packet_id,
            digest: self.digest(publish),
        };
        if !self.candidates.is_empty() {
            if let Some(at) = self.ring.find(self.candidates.clone(), received) {
                self.candidates.start = at + 1;
                return true;
            }
            self.candidates = 0..0;
        }
        let remembered = self.ring.positions();
        if remembered.end - remembered.start >= REMEMBERED_MAX {
            self.ring.settle(remembered.start + 1);
        }
        self.ring.remember(received);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::QoS;
    use crate::store::{Memory, Store};

    fn redelivery() -> Redelivery {
        Redelivery::new(Memory.ring(0))
    }

    fn publish<'a>(id: u16, payload: &'a [u8]) -> Publish<'a> {
        Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: "t",
            packet_id: id,
            payload,
            properties: Default::default(),
            message_expiry: None,
            topic_alias: None,
            has_subscription_ids: false,
        }
    }

    #[test]
    fn redeliveries_are_recognised_in_order_without_dup() {
        let mut r = redelivery();
        for id in 1..=5 {
            assert!(!r.seen(&publish(id, &[id as u8])));
        }
        r.resumed();
        assert!(r.seen(&publish(3, &[3])));
        assert!(r.seen(&publish(5, &[5])));
        assert!(!r.seen(&publish(6, &[6])));
    }

    #[test]
    fn an_identical_message_is_not_swallowed() {
        let mut r = redelivery();
        assert!(!r.seen(&publish(1, b"on")));
        // The same identifier and content again, without a reconnect: a new message.
        assert!(!r.seen(&publish(1, b"on")));
        r.resumed();
        assert!(
            !r.seen(&publish(2, b"other")),
            "the first message that differs ends it"
        );
        assert!(!r.seen(&publish(1, b"on")));
    }

    #[test]
    fn a_message_like_a_confirmed_one_is_not_swallowed() {
        let mut r = redelivery();
        // The broker uses the lowest free identifier, and the payload never changes.
        for _ in 0..100 {
            assert!(!r.seen(&publish(1, b"on")));
            let mark = r.mark();
            r.confirmed(mark);
        }
        assert!(r.is_empty());
        r.resumed();
        for _ in 0..100 {
            assert!(!r.seen(&publish(1, b"on")));
        }
    }

    #[test]
    fn a_mark_confirms_only_the_messages_before_it() {
        let mut r = redelivery();
        r.seen(&publish(1, b"a"));
        let mark = r.mark();
        r.seen(&publish(2, b"b"));
        r.confirmed(mark);
        r.resumed();
        assert!(r.seen(&publish(2, b"b")));
        assert!(!r.seen(&publish(1, b"a")));
    }

    #[test]
    fn a_message_out_of_order_is_new() {
        let mut r = redelivery();
        r.seen(&publish(1, b"a"));
        r.seen(&publish(2, b"b"));
        r.resumed();
        assert!(r.seen(&publish(2, b"b")));
        assert!(!r.seen(&publish(1, b"a")));
    }

    #[test]
    fn nothing_is_recognised_in_a_new_session() {
        let mut r = redelivery();
        r.seen(&publish(1, b"a"));
        r.resumed();
        r.began_anew();
        assert!(r.is_empty());
        assert!(!r.seen(&publish(1, b"a")));
    }

    #[test]
    fn the_oldest_message_is_forgotten_when_all_identifiers_are_remembered() {
        let mut r = redelivery();
        for id in 0..=u16::MAX {
            assert!(!r.seen(&publish(id, b"")));
        }
        assert_eq!(r.ring.positions(), 1..65_536);
        r.resumed();
        assert!(r.seen(&publish(1, b"")), "the oldest remaining message");
        assert!(!r.seen(&publish(0, b"")));
    }
}
