//! The messages that wait for a client behind its window, and the limits on them while it is away.

use std::collections::VecDeque;

use crate::mqtt::QoS;
use crate::session::entry::{Entry, State};
use crate::session::{DropReason, SessionLimits};
use crate::time::{CLOCKS_APART, Millis};

/// Retained messages of new subscriptions may wait beyond a session's limits, because they arrive all
/// at once: at most this many for a client that is away.
const FETCHED_MAX: usize = 100_000;
/// The most bytes of such messages for a client that is away.
const FETCHED_MAX_BYTES: usize = 16 * 1024 * 1024;

/// The waiting entries, in the order of sending.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    bytes: usize,
    fetched_bytes: usize,
    /// Bytes of the live messages that waited when the client went away.
    kept_bytes: usize,
    qos0: u32,
    /// The number of entries in [`State::Fetched`].
    fetched: u32,
    /// At least this many entries at the front are fetched.
    fetched_ahead: u32,
    /// The number of live messages that waited when the client went away.
    kept: u32,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the messages, each counted in full.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Entries of QoS 0.
    pub(super) fn qos0(&self) -> u32 {
        self.qos0
    }

    pub(super) fn front(&self) -> Option<&Entry> {
        self.entries.front()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// The entries; their size, QoS and state must not be changed.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        self.entries.iter_mut()
    }

    /// The client went away. The limits do not count the live messages that wait now: a short absence
    /// must not cost a client messages that it would have got without it.
    pub(super) fn client_left(&mut self) {
        self.kept = self.live();
        self.kept_bytes = self.live_bytes();
    }

    /// The limit that another message of `size` bytes for a client that is away would exceed. Fetched
    /// and live messages have separate limits and do not displace each other.
    pub(super) fn full(
        &self,
        limits: &SessionLimits,
        size: usize,
        fetched: bool,
    ) -> Option<DropReason> {
        let (messages, bytes, messages_max, bytes_max) = match fetched {
            true => (
                self.fetched as usize,
                self.fetched_bytes,
                limits.queue_messages_max.max(FETCHED_MAX),
                limits.queue_bytes_max.max(FETCHED_MAX_BYTES),
            ),
            false => (
                self.live() as usize,
                self.live_bytes(),
                limits.queue_messages_max + self.kept as usize,
                limits.queue_bytes_max + self.kept_bytes,
            ),
        };
        if messages >= messages_max {
            Some(DropReason::QueueFull)
        } else if bytes + size > bytes_max {
            Some(DropReason::QueueBytes)
        } else {
            None
        }
    }

    fn live(&self) -> u32 {
        // The budget for all queues has no room for 4 billion entries.
        self.entries.len() as u32 - self.fetched
    }

    fn live_bytes(&self) -> usize {
        self.bytes - self.fetched_bytes
    }

    pub(super) fn push(&mut self, entry: Entry) {
        self.bytes += entry.size();
        self.qos0 += u32::from(entry.qos == QoS::AtMostOnce);
        if entry.state == State::Fetched {
            self.fetched += 1;
            self.fetched_bytes += entry.size();
        }
        // A quarter more at a time: doubling would leave half of a long queue unused.
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact((self.entries.len() / 4).max(4));
        }
        self.entries.push_back(entry);
    }

    /// Puts messages that were kept elsewhere while the client was away among the waiting ones, in the order
    /// of arrival. Both are in that order.
    pub(super) fn merge(&mut self, arrived: Vec<Entry>, now: Millis) {
        // Some clocks may be a little ahead of the caller's.
        let latest = (now + CLOCKS_APART).low_bits();
        let age = |entry: &Entry| latest.wrapping_sub(entry.at);
        let is_before = |waiting: &Entry, kept: &Entry| {
            // In one millisecond fewer than 2^15 messages are kept. The one at a waiting message's position
            // was kept before it.
            let later = kept.packet_id.wrapping_sub(waiting.packet_id) as i16 > 0;
            age(waiting) > age(kept) || age(waiting) == age(kept) && later
        };
        let mut waiting = std::mem::take(&mut self.entries).into_iter().peekable();
        self.fetched_ahead = 0;
        self.entries.reserve_exact(waiting.len() + arrived.len());
        for entry in arrived {
            while let Some(earlier) = waiting.next_if(|w| is_before(w, &entry)) {
                self.entries.push_back(earlier);
            }
            self.push(entry);
        }
        self.entries.extend(waiting);
    }

    /// The limit on live messages of a client that is away that is exceeded now.
    pub(super) fn exceeded(&self, limits: &SessionLimits) -> Option<DropReason> {
        if self.live() as usize > self.live_max(limits) {
            Some(DropReason::QueueFull)
        } else if self.live_bytes() > limits.queue_bytes_max + self.kept_bytes {
            Some(DropReason::QueueBytes)
        } else {
            None
        }
    }

    /// Live messages that may wait for a client that is away: the limit, and the messages that waited when it
    /// left.
    pub(super) fn live_max(&self, limits: &SessionLimits) -> usize {
        limits.queue_messages_max + self.kept as usize
    }

    pub(super) fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        self.fetched_ahead = self.fetched_ahead.saturating_sub(1);
        self.removed(&entry);
        Some(entry)
    }

    /// Takes out the oldest message that is not fetched.
    pub(super) fn pop_live(&mut self) -> Option<Entry> {
        let mut rest = self.entries.range(self.fetched_ahead as usize..);
        self.fetched_ahead += rest.position(|e| e.state != State::Fetched)? as u32;
        let entry = self.entries.remove(self.fetched_ahead as usize)?;
        self.removed(&entry);
        Some(entry)
    }

    /// Keeps the entries for which `keep` is true.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&Entry) -> bool) {
        let mut entries = std::mem::take(&mut self.entries);
        entries.retain(|entry| {
            let kept = keep(entry);
            if !kept {
                self.removed(entry);
            }
            kept
        });
        self.entries = entries;
        self.fetched_ahead = 0;
    }

    /// Gives memory back that a long queue needed.
    pub(super) fn shrink(&mut self) {
        if self.entries.is_empty() && self.entries.capacity() > 64 {
            self.entries = VecDeque::new();
        }
    }

    fn removed(&mut self, entry: &Entry) {
        self.bytes -= entry.size();
        self.qos0 -= u32::from(entry.qos == QoS::AtMostOnce);
        if entry.state == State::Fetched {
            self.fetched -= 1;
            self.fetched_bytes -= entry.size();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{Message, MessageSpec, Properties};
    use crate::session::entry::Ids;
    use crate::streams::StreamId;

    fn entry(number: u8, state: State) -> Entry {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: &[number],
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        Entry {
            message: Some(message),
            ids: Ids::default(),
            at: 0,
            packet_id: 0,
            qos: QoS::AtLeastOnce,
            state,
            retain: false,
            stream: StreamId::CONTROL,
        }
    }

    fn at(time: u32, position: u16, number: u8, state: State) -> Entry {
        Entry {
            at: time,
            packet_id: position,
            ..entry(number, state)
        }
    }

    #[test]
    fn messages_that_arrived_meanwhile_take_their_places_by_time() {
        let mut queue = Queue::default();
        let (fetched, live) = (State::Fetched, State::Waiting);
        for (time, position, number, state) in [
            (u32::MAX - 1, 7, 0, live),
            (3, u16::MAX, 1, fetched),
            (3, 1, 2, live),
            (5, 2, 3, live),
        ] {
            queue.push(at(time, position, number, state));
        }
        let arrived = [
            (u32::MAX, u16::MAX, 4),
            (3, 0, 5),
            (3, 1, 6),
            (4, 2, 7),
            (9, 3, 8),
        ];
        let arrived = arrived.map(|(time, position, n)| at(time, position, n, live));
        queue.merge(arrived.into(), Millis::new((1 << 32) + 9));
        assert_eq!(numbers(&queue), [0, 4, 1, 5, 6, 2, 7, 3, 8]);
        assert_eq!((queue.live(), queue.fetched), (8, 1));
        assert_eq!(queue.bytes(), 9 * entry(0, live).size());
        for _ in 0..8 {
            assert!(queue.pop_live().is_some());
        }
        assert_eq!(numbers(&queue), [1]);
    }

    fn numbers(queue: &Queue) -> Vec<u8> {
        let payload = |e: &Entry| e.message.as_ref().map_or(0, |m| m.payload()[0]);
        queue.iter().map(payload).collect()
    }

    #[test]
    fn live_messages_displace_the_oldest_live_message() {
        let mut queue = Queue::default();
        let (fetched, live) = (State::Fetched, State::Waiting);
        for (number, state) in [
            (0, fetched),
            (1, fetched),
            (2, live),
            (3, fetched),
            (4, live),
            (5, live),
        ] {
            queue.push(entry(number, state));
        }
        assert!(queue.pop_live().is_some());
        assert_eq!(numbers(&queue), [0, 1, 3, 4, 5]);
        assert!(queue.pop().is_some());
        assert!(queue.pop_live().is_some());
        assert_eq!(numbers(&queue), [1, 3, 5]);
        queue.retain(|e| e.message.as_ref().is_some_and(|m| m.payload() != [1]));
        assert!(queue.pop_live().is_some());
        assert!(queue.pop_live().is_none());
        assert_eq!(numbers(&queue), [3]);
        assert_eq!((queue.fetched, queue.fetched_bytes), (1, queue.bytes()));
        assert!(queue.pop().is_some());
        assert_eq!(
            (queue.fetched, queue.fetched_bytes, queue.bytes()),
            (0, 0, 0)
        );
    }
}
