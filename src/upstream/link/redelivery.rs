//! Which QoS 1 messages the core sends a second time after a reconnect.
//!
//! The core resends, in order, what it has no acknowledgement for: some of what we acknowledged
//! last. A message counts as redelivered only then, only in that order, and only until the first
//! that is not among them; by packet identifier and content, never by DUP, which brokers forget.

use std::ops::Range;

use crate::mqtt::Publish;
use crate::store::{Received, Ring};

/// Messages remembered: no core has more than 65,535 unacknowledged.
const REMEMBERED: u64 = 65_535;

/// Tells, by what one link remembers, what is new from what is sent again.
#[derive(Debug)]
pub struct Redelivery {
    ring: Box<dyn Ring>,
    /// Of the remembered, those that may still be resent.
    candidates: Range<u64>,
}

impl Redelivery {
    /// With what the ring remembers from before.
    pub fn new(ring: Box<dyn Ring>) -> Self {
        Self {
            ring,
            candidates: 0..0,
        }
    }

    /// The link came up with Session Present 1.
    pub fn resumed(&mut self) {
        self.candidates = self.ring.positions();
    }

    /// The link came up with Session Present 0: the core resends nothing.
    pub fn began_anew(&mut self) {
        self.ring.clear();
        self.candidates = 0..0;
    }

    /// Nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.ring.positions().is_empty()
    }

    /// Names what has been received until now.
    pub fn mark(&self) -> u64 {
        self.ring.positions().end
    }

    /// The core has the acknowledgements for all that had been received at `mark`.
    pub fn confirmed(&mut self, mark: u64) {
        self.ring.settle(mark);
        let first = self.ring.positions().start;
        self.candidates.start = self.candidates.start.max(first);
    }

    /// Whether this QoS 1 message is one that was received before the link was lost.
    pub fn seen(&mut self, publish: &Publish<'_>) -> bool {
        let qos = publish.qos as u8;
        let received = Received {
            packet_id: publish.packet_id,
            digest: self.ring.digest(publish.topic, publish.payload, qos),
        };
        if !self.candidates.is_empty() {
            if let Some(at) = self.ring.find(self.candidates.clone(), received) {
                self.candidates.start = at + 1;
                return true;
            }
            self.candidates = 0..0;
        }
        let held = self.ring.positions();
        if held.end - held.start >= REMEMBERED {
            self.ring.settle(held.start + 1);
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
    fn what_was_received_is_recognised_in_order_without_dup() {
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
            "the first that differs ends it"
        );
        assert!(!r.seen(&publish(1, b"on")));
    }

    #[test]
    fn what_the_core_confirmed_is_never_swallowed() {
        let mut r = redelivery();
        // A core that uses the lowest free identifier, and a payload that never changes.
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
    fn a_mark_taken_before_a_resume_ends_only_what_it_covers() {
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
    fn a_step_back_in_order_is_new() {
        let mut r = redelivery();
        r.seen(&publish(1, b"a"));
        r.seen(&publish(2, b"b"));
        r.resumed();
        assert!(r.seen(&publish(2, b"b")));
        assert!(!r.seen(&publish(1, b"a")));
    }

    #[test]
    fn nothing_is_recognised_once_the_core_began_anew() {
        let mut r = redelivery();
        r.seen(&publish(1, b"a"));
        r.resumed();
        r.began_anew();
        assert!(r.is_empty());
        assert!(!r.seen(&publish(1, b"a")));
    }

    #[test]
    fn the_oldest_is_forgotten_when_all_identifiers_are_remembered() {
        let mut r = redelivery();
        for id in 0..=u16::MAX {
            assert!(!r.seen(&publish(id, b"")));
        }
        assert_eq!(r.ring.positions(), 1..65_536);
        r.resumed();
        assert!(r.seen(&publish(1, b"")), "the oldest that is left");
        assert!(!r.seen(&publish(0, b"")));
    }
}
