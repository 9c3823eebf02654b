//! Which QoS 1 messages the core sends a second time after a reconnect.
//!
//! The core resends, in order, what it has no acknowledgement for: some of what we acknowledged
//! last. A message counts as redelivered only then, only in that order, and only until the first
//! that is not among them; by packet identifier and content, never by DUP, which brokers forget.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use crate::mqtt::Publish;

/// Messages remembered: no core has more than 65,535 unacknowledged.
const REMEMBERED: usize = 65_535;

/// What was received last on one link, and perhaps not acknowledged in the core's eyes.
#[derive(Debug, Default)]
pub struct Redelivery {
    received: VecDeque<(u16, u64)>,
    /// How many were received before the front.
    before: u64,
    hasher: RandomState,
    /// Of the remembered, how many may still be resent, counted from `resumed_at`; 0: none.
    candidates: usize,
    resumed_at: u64,
}

impl Redelivery {
    /// The link came up with Session Present 1.
    pub fn resumed(&mut self) {
        self.candidates = self.received.len();
        self.resumed_at = self.before;
    }

    /// Nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Names what has been received until now.
    pub fn mark(&self) -> u64 {
        self.before + self.received.len() as u64
    }

    /// The core has the acknowledgements for all that had been received at `mark`.
    pub fn confirmed(&mut self, mark: u64) {
        while self.before < mark && self.received.pop_front().is_some() {
            self.before += 1;
        }
        let past = self.before.saturating_sub(self.resumed_at) as usize;
        if past > 0 {
            self.candidates = self.candidates.saturating_sub(past);
            self.resumed_at = self.before;
        }
    }

    /// Whether this QoS 1 message is one that was received before the link was lost.
    pub fn seen(&mut self, publish: &Publish<'_>) -> bool {
        let content = (publish.topic, publish.payload, publish.qos as u8);
        let entry = (publish.packet_id, self.hasher.hash_one(content));
        if self.candidates > 0 {
            // Candidates are the oldest remembered; what came since the resume is behind them.
            let from = self.resumed_at.saturating_sub(self.before) as usize;
            let to = from + self.candidates;
            let found = self.received.range(from..to).position(|e| *e == entry);
            match found {
                Some(skipped) => {
                    self.candidates -= skipped + 1;
                    self.resumed_at += skipped as u64 + 1;
                    return true;
                }
                None => self.candidates = 0,
            }
        }
        if self.received.len() >= REMEMBERED {
            self.received.pop_front();
            self.before += 1;
        }
        self.received.push_back(entry);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::QoS;

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
        let mut r = Redelivery::default();
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
        let mut r = Redelivery::default();
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
        let mut r = Redelivery::default();
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
        let mut r = Redelivery::default();
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
        let mut r = Redelivery::default();
        r.seen(&publish(1, b"a"));
        r.seen(&publish(2, b"b"));
        r.resumed();
        assert!(r.seen(&publish(2, b"b")));
        assert!(!r.seen(&publish(1, b"a")));
    }
}
