//! The last messages received on a data link, which the broker may consider unacknowledged and send
//! again.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::hash::BuildHasher;
use std::ops::Range;

/// One received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The broker's packet identifier.
    pub packet_id: u16,
    /// The digest of the message, by [`Ring::digest`].
    pub digest: u64,
}

/// The messages that one link remembers. Positions count them and never go back. The ring forgets no
/// message by itself: its owner settles them.
pub trait Ring: Debug + Send {
    /// A digest of a message's content, stable for as long as records of this ring are kept.
    fn digest(&self, topic: &str, payload: &[u8], qos: u8) -> u64;

    /// The positions of all remembered messages, those of earlier processes included.
    fn positions(&self) -> Range<u64>;

    /// Remembers another message. It is called for each message, so it takes no lock and does not wait.
    fn remember(&mut self, received: Received);

    /// The first position in `among` of this message.
    fn find(&self, among: Range<u64>, received: Received) -> Option<u64>;

    /// Forgets the messages before position `mark`.
    fn settle(&mut self, mark: u64);

    /// Forgets all messages, because the broker has lost the link's session.
    fn clear(&mut self);
}

/// A ring that ends with the process.
#[derive(Debug, Default)]
pub(super) struct InMemory<S> {
    received: VecDeque<Received>,
    /// The position of the front.
    first: u64,
    hasher: S,
}

impl<S> InMemory<S> {
    pub(super) fn with_hasher(hasher: S) -> Self {
        Self {
            received: VecDeque::new(),
            first: 0,
            hasher,
        }
    }
}

impl<S: BuildHasher + Debug + Send> Ring for InMemory<S> {
    fn digest(&self, topic: &str, payload: &[u8], qos: u8) -> u64 {
        self.hasher.hash_one((topic, payload, qos))
    }

    fn positions(&self) -> Range<u64> {
        self.first..self.first + self.received.len() as u64
    }

    fn remember(&mut self, received: Received) {
        self.received.push_back(received);
    }

    fn find(&self, among: Range<u64>, received: Received) -> Option<u64> {
        let held = self.positions();
        let from = among.start.max(held.start);
        let to = among.end.min(held.end);
        if from >= to {
            return None;
        }
        let range = (from - self.first) as usize..(to - self.first) as usize;
        let at = self.received.range(range).position(|r| *r == received)?;
        Some(from + at as u64)
    }

    fn settle(&mut self, mark: u64) {
        while self.first < mark && self.received.pop_front().is_some() {
            self.first += 1;
        }
    }

    fn clear(&mut self) {
        self.first = self.positions().end;
        // Its room goes, too: up to a mebibyte for each link.
        self.received = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hashing::{HashSeed, LookUpHasher};

    fn received(packet_id: u16) -> Received {
        Received {
            packet_id,
            digest: 7,
        }
    }

    fn ring(ids: &[u16]) -> InMemory<LookUpHasher> {
        let mut ring = InMemory::<LookUpHasher>::default();
        for id in ids {
            ring.remember(received(*id));
        }
        ring
    }

    #[test]
    fn what_is_remembered_is_found_where_it_is_looked_for() {
        let ring = ring(&[1, 2, 1]);
        assert_eq!(ring.positions(), 0..3);
        assert_eq!(ring.find(0..3, received(1)), Some(0));
        assert_eq!(ring.find(1..3, received(1)), Some(2));
        assert_eq!(ring.find(1..2, received(1)), None);
        let other = Received {
            packet_id: 1,
            digest: 8,
        };
        assert_eq!(ring.find(0..3, other), None);
    }

    #[test]
    fn settling_ends_what_is_before_the_mark() {
        let mut ring = ring(&[1, 2, 3]);
        ring.settle(2);
        assert_eq!(ring.positions(), 2..3);
        assert_eq!(ring.find(0..9, received(2)), None);
        assert_eq!(ring.find(0..9, received(3)), Some(2));
        // A mark of long ago, and one beyond the end.
        ring.settle(1);
        assert_eq!(ring.positions(), 2..3);
        ring.settle(9);
        assert_eq!(ring.positions(), 3..3);
    }

    #[test]
    fn positions_go_on_after_a_clear() {
        let mut ring = ring(&[1, 2]);
        ring.clear();
        assert_eq!(ring.positions(), 2..2);
        ring.remember(received(3));
        assert_eq!(ring.find(0..9, received(3)), Some(2));
        assert_eq!(ring.find(0..9, received(1)), None);
    }

    #[test]
    fn rings_with_one_key_make_the_same_digests() {
        let of = |seed| InMemory::with_hasher(seed).digest("a", b"b", 1);
        let seed = || HashSeed::from_random([7, 8]);
        assert_eq!(of(seed()), of(seed()));
        assert_ne!(of(seed()), of(HashSeed::fixed()));
    }

    #[test]
    fn a_digest_tells_topic_payload_and_qos_apart() {
        let ring = InMemory::<LookUpHasher>::default();
        let digest = ring.digest("ab", b"c", 1);
        assert_eq!(ring.digest("ab", b"c", 1), digest);
        assert_ne!(ring.digest("a", b"bc", 1), digest);
        assert_ne!(ring.digest("ab", b"d", 1), digest);
        assert_ne!(ring.digest("ab", b"c", 2), digest);
    }
}
