//! The sequence numbers of messages, and the messages that wait for their records in the log.
//!
//! With `store.durability = "disk"` each message of QoS 1 or 2 that a link brings gets the next number, once
//! for all sessions. A session's record says up to which number its messages are done, so a number must not
//! count as done while its message is on its way to the sessions: [`Numbers::through`].

mod received;

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::mqtt::{Addressee, Message, Numbered, QoS, RecordPlace, Records};
use crate::router::handle::TaskWaker;
use crate::router::types::Arrived;
use crate::session::Incarnation;
use crate::store::log::{Claim, Claims, Position};
use crate::time::{Millis, UnixMillis};

pub(crate) use received::Committed;
pub(in crate::router) use received::{Appended, ReceivedMessages, Unwritten};

/// See the module.
#[derive(Debug, Default)]
pub(in crate::router) struct Numbers {
    /// `None`: messages are not kept in a log.
    kept: OnceLock<Kept>,
    state: Mutex<State>,
    /// Messages, and changes of the links' state, whose records are to be written.
    outbox: Mutex<VecDeque<Unwritten>>,
    /// The messages of QoS 2 that the broker may send again.
    pub(in crate::router) received: ReceivedMessages,
    /// The bytes of records of messages since the last checkpoint.
    since_checkpoint: AtomicU64,
    /// A checkpoint is to be written.
    checkpoint_due: AtomicBool,
}

/// The means to keep messages in a log.
#[derive(Debug)]
pub(in crate::router) struct Kept {
    /// Is told when a record is not needed any more.
    pub records: Arc<dyn Records>,
    /// Wakes the task that writes.
    pub waker: Arc<TaskWaker>,
    /// The time of day when the clock was at zero.
    pub started_at: UnixMillis,
}

/// Gives the claims of messages' records back.
#[derive(Debug)]
pub(in crate::router) struct MessageClaims(pub Arc<Claims>);

impl Records for MessageClaims {
    fn release(&self, place: RecordPlace) {
        let position = Position::from_u64(place.position);
        self.0.release(Claim::new(position, place.bytes as usize));
    }
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    /// The first numbers of the batches that are on their way to the sessions.
    under_way: SmallVec<[u64; 8]>,
}

/// A batch of messages is on its way to the sessions until this is dropped.
#[derive(Debug)]
pub(in crate::router) struct UnderWay<'a> {
    numbers: &'a Numbers,
    first: u64,
}

impl UnderWay<'_> {
    /// The number of the message at a place in the batch.
    fn number(&self, at: usize) -> u64 {
        self.first + at as u64
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut state = self.numbers.state.lock();
        let first = self.first;
        if let Some(at) = state.under_way.iter().position(|n| *n == first) {
            state.under_way.swap_remove(at);
        }
    }
}

impl Numbers {
    /// From now on messages are numbered, behind `last`. Only the first call counts.
    pub(crate) fn keep(&self, kept: Kept, last: u64) {
        self.state.lock().last = last;
        let _ = self.kept.set(kept);
    }

    /// The means to keep messages, if they are kept in a log.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.get()
    }

    fn wake(&self) {
        if let Some(kept) = self.kept.get() {
            kept.waker.raise();
        }
    }

    /// A number behind all others.
    pub(crate) fn next(&self) -> u64 {
        let mut state = self.state.lock();
        state.last += 1;
        state.last
    }

    /// The last number up to which every message has been given to the sessions.
    pub(crate) fn through(&self) -> u64 {
        let state = self.state.lock();
        let first = state.under_way.iter().min();
        first.map_or(state.last, |first| first - 1)
    }

    /// The last number that was given.
    pub(crate) fn last(&self) -> u64 {
        self.state.lock().last
    }

    /// Numbers the messages of a batch that are to be kept. `None`: messages are not kept.
    pub(crate) fn number(&self, batch: &mut [Arrived], now: Millis) -> Option<UnderWay<'_>> {
        let kept = self.kept.get()?;
        let arrived_at = kept.started_at.at(now);
        let mut state = self.state.lock();
        let first = state.last + 1;
        state.last += batch.len() as u64;
        state.under_way.push(first);
        drop(state);
        let under_way = UnderWay {
            numbers: self,
            first,
        };
        for (at, arrived) in batch.iter_mut().enumerate() {
            let needs_one = !arrived.skipped && arrived.message.qos() > QoS::AtMostOnce;
            // A message that was kept back until now has its number already.
            if needs_one && arrived.message.numbered().is_none() {
                let origin_mark = arrived.origin_mark.map(Incarnation::get);
                let origin_mark = origin_mark.and_then(NonZeroU64::new);
                let number = under_way.number(at);
                let records = kept.records.clone();
                let link_origin = arrived.link_origin;
                let numbered = Numbered::new(number, origin_mark, link_origin, arrived_at, records);
                arrived.message.number(numbered);
                if let Some(origin) = link_origin {
                    self.received.insert(origin, arrived.message.clone());
                }
            }
        }
        Some(under_way)
    }

    /// The message at a place in the batch is for the sessions with these filters.
    pub(crate) fn address(
        &self,
        under_way: &UnderWay<'_>,
        at: usize,
        message: &Message,
        filters: impl Iterator<Item = Arc<str>>,
    ) {
        let Some(numbered) = message.numbered() else {
            return;
        };
        let since = under_way.number(at);
        let outdated = numbered.address(filters.map(|filter| Addressee {
            filter,
            member: None,
            since,
        }));
        if outdated {
            self.write([message.clone()]);
        }
    }

    /// A member of a shared subscription has a message.
    pub(crate) fn hand_to(&self, message: &Message, filter: &Arc<str>, member: Incarnation) {
        let Some(numbered) = message.numbered() else {
            return;
        };
        let outdated = numbered.hand_to(Addressee {
            filter: filter.clone(),
            member: NonZeroU64::new(member.get()),
            since: self.next(),
        });
        if outdated {
            self.write([message.clone()]);
        }
    }

    /// The records of these messages are to be written.
    pub(crate) fn write(&self, messages: impl IntoIterator<Item = Message>) {
        let messages = messages.into_iter().map(Unwritten::Message);
        self.outbox.lock().extend(messages);
        self.wake();
    }

    /// This is to be written.
    pub(super) fn write_one(&self, unwritten: Unwritten) {
        self.outbox.lock().push_back(unwritten);
        self.wake();
    }

    /// Whether something is to be written.
    pub(crate) fn has_work(&self) -> bool {
        self.checkpoint_due.load(Ordering::Relaxed) || !self.outbox.lock().is_empty()
    }

    /// The next record that is to be written.
    pub(crate) fn pop(&self) -> Option<Unwritten> {
        self.outbox.lock().pop_front()
    }

    /// The next one again, since its record did not find room.
    pub(crate) fn put_back(&self, unwritten: Unwritten) {
        self.outbox.lock().push_front(unwritten);
    }

    /// Records of messages of so many bytes were appended.
    pub(crate) fn wrote(&self, bytes: u64) {
        self.since_checkpoint.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Asks for a checkpoint, if messages were written since the last one.
    pub(crate) fn ask_for_checkpoint(&self) {
        if self.since_checkpoint.load(Ordering::Relaxed) > 0
            && !self.checkpoint_due.swap(true, Ordering::Relaxed)
        {
            self.wake();
        }
    }

    /// Takes the wish for a checkpoint, with the bytes that were written since the last one.
    pub(crate) fn take_checkpoint(&self) -> Option<u64> {
        let due = self.checkpoint_due.swap(false, Ordering::Relaxed);
        due.then(|| self.since_checkpoint.load(Ordering::Relaxed))
    }

    /// A checkpoint was appended, which covers the bytes that had been written by then.
    pub(crate) fn checkpointed(&self, bytes: u64) {
        self.since_checkpoint.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nothing;

    impl Records for Nothing {
        fn release(&self, _: crate::mqtt::RecordPlace) {}
    }

    #[test]
    fn a_number_does_not_count_while_its_batch_or_an_earlier_one_is_on_its_way() {
        let numbers = Numbers::default();
        let kept = Kept {
            records: Arc::new(Nothing),
            waker: Arc::default(),
            started_at: UnixMillis::default(),
        };
        numbers.keep(kept, 7);
        assert_eq!(numbers.through(), 7);
        let first = numbers.number(&mut [], Millis::ZERO);
        assert_eq!(numbers.next(), 8);
        assert_eq!(numbers.through(), 7);
        let second = numbers.number(&mut [], Millis::ZERO);
        drop(first);
        assert_eq!(numbers.through(), 8);
        drop(second);
        assert_eq!((numbers.next(), numbers.through()), (9, 9));
    }
}
