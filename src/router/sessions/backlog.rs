//! The backlog of a filter in one shard: its messages, kept once for all members that sleep.
//!
//! A member sleeps while its client is away: no message of the filter is put into its session's queue.
//! It has a cursor, the number of the first message that is its own; [`sleep`](super::sleep) has the rules by
//! which members fall asleep and wake.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::ops::Range;

use crate::mqtt::{Message, QoS};
use crate::session::{Incarnation, SessionLimits, hides};
use crate::time::Millis;

/// Bytes charged for each message of a backlog beside the message itself, with a share for the memory
/// that is reserved ahead.
pub(super) const BACKLOG_ENTRY_BYTES: usize = size_of::<Entry>() * 3 / 2;

/// A message of a filter.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) message: Message,
    /// The place among the messages of all backlogs of the shard.
    pub(super) position: u64,
    /// The place among the messages of the filter.
    pub(super) number: u64,
    /// The origin mark of the publisher.
    pub(super) origin_mark: Option<Incarnation>,
    /// When it arrived: the low 32 bits of the time in milliseconds.
    pub(super) at: u32,
}

/// A member that sleeps. There may be a million, so it takes 12 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sleeper {
    pub(super) slot: u32,
    /// The cursor, in two parts: the number of the first message that is its own.
    cursor_low: u32,
    cursor_high: u16,
    /// Some messages are kept for it. Else, at QoS 0, they are only counted.
    pub(super) keeps: bool,
    view: View,
}

/// The topics of a filter that a member gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    All,
    /// Its mount hides topics from it that begin with `$` below the mount.
    Plain,
    /// The member does not sleep any longer.
    Gone,
}

const _: () = assert!(size_of::<Sleeper>() == 12);

impl Sleeper {
    /// The member in `slot`; messages from number `cursor` on are its own.
    pub(super) fn new(slot: u32, cursor: u64, keeps: bool) -> Self {
        // 2^48 messages of one filter take longer than a process lives.
        Self {
            slot,
            cursor_low: cursor as u32,
            cursor_high: (cursor >> 32) as u16,
            keeps,
            view: View::All,
        }
    }

    /// The member, from which its mount hides topics.
    pub(super) fn below_mount(self) -> Self {
        let view = View::Plain;
        Self { view, ..self }
    }

    fn is_there(&self) -> bool {
        self.view != View::Gone
    }

    /// The number of the first message that is its own.
    pub(super) fn cursor(&self) -> u64 {
        u64::from(self.cursor_high) << 32 | u64::from(self.cursor_low)
    }
}

/// The messages of a sleeper that its backlog has dropped, by the limit that it dropped them for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// The limits of a queue.
    pub(super) full: u64,
    /// The budget of all queues.
    pub(super) budget: u64,
    /// Messages of QoS 0 that are not kept, and expired ones.
    pub(super) unkept: u64,
}

/// The memory of a backlog, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) messages: usize,
    pub(super) entries: usize,
}

impl Held {
    pub(super) fn bytes(self) -> usize {
        self.messages + self.entries
    }
}

/// The messages of a filter, once for all members that sleep.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// By number. Numbers are missing where messages are not kept.
    entries: VecDeque<Entry>,
    /// Bytes of the messages.
    bytes: usize,
    /// The number of the next message of the filter.
    next: u64,
    /// Messages with lower numbers were dropped, because of a limit.
    first: u64,
    /// Messages with lower numbers were dropped, the last of them because of the budget.
    trimmed: u64,
    /// By slot, with members that are gone: to take each of them out at once would make a mass of clients that
    /// come back expensive.
    sleepers: Vec<Sleeper>,
    /// The number of members that are gone.
    gone: usize,
    /// Sleepers that get all topics.
    open: usize,
    /// The [`wild_below`](crate::session::Subscription::wild_below) of the others, whose mounts all end at the
    /// first wildcard of the filter.
    wild_below: Option<NonZeroU16>,
    /// Sleepers for which messages are kept.
    keeping: u32,
    /// A number up to that of the first message.
    lowest: u64,
    /// Sleepers for which messages are kept from there on, or from before: while there is one, it is owed the
    /// first message.
    at_lowest: u32,
}

impl Backlog {
    /// A message of the filter arrived. Returns its number.
    pub(super) fn arrived(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Keeps the message that arrived last, unless it is kept already, if it is for a sleeper at its QoS.
    pub(super) fn keep(
        &mut self,
        limits: &SessionLimits,
        message: &Message,
        origin_mark: Option<Incarnation>,
        position: u64,
        now: Millis,
    ) {
        let number = self.next - 1;
        let size = message.size();
        let quality = limits.queue_qos0 || message.qos() > QoS::AtMostOnce;
        let known = self.entries.back().is_some_and(|e| e.number == number);
        if known || self.keeping == 0 || !quality || size > limits.queue_bytes_max {
            return;
        }
        while self.entries.len() >= limits.queue_messages_max
            || self.bytes + size > limits.queue_bytes_max
        {
            let Some(oldest) = self.pop() else {
                // Not one message has room.
                return;
            };
            self.first = oldest + 1;
        }
        // A quarter more at a time: doubling would leave half of a long backlog unused.
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact((self.entries.len() / 4).max(4));
        }
        self.bytes += size;
        self.entries.push_back(Entry {
            message: message.clone(),
            position,
            number,
            origin_mark,
            at: now.low_bits(),
        });
    }

    fn pop(&mut self) -> Option<u64> {
        let oldest = self.entries.pop_front()?;
        self.bytes -= oldest.message.size();
        Some(oldest.number)
    }

    /// The number of the next message of the filter.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The sleepers, by slot.
    pub(super) fn sleepers(&self) -> impl Iterator<Item = &Sleeper> {
        self.sleepers.iter().filter(|s| s.is_there())
    }

    fn keepers(&self) -> impl Iterator<Item = &Sleeper> {
        self.sleepers().filter(|s| s.keeps)
    }

    /// The number of sleepers.
    pub(super) fn count(&self) -> usize {
        self.sleepers.len() - self.gone
    }

    /// The sleepers in these slots.
    pub(super) fn sleepers_in(&self, slots: Range<u32>) -> impl Iterator<Item = &Sleeper> {
        let from = self.sleepers.partition_point(|s| s.slot < slots.start);
        let rest = &self.sleepers[from..];
        let some = &rest[..rest.partition_point(|s| s.slot < slots.end)];
        some.iter().filter(|s| s.is_there())
    }

    /// The slot of the sleeper behind the first `max` sleepers from slot `from` on.
    pub(super) fn behind(&self, from: u32, max: usize) -> Option<u32> {
        let mut rest = self.sleepers_in(from..u32::MAX);
        rest.nth(max).map(|s| s.slot)
    }

    /// The slot of the only sleeper.
    pub(super) fn lone(&self) -> Option<u32> {
        let alone = self.count() == 1;
        let lone = alone.then(|| self.sleepers().next()).flatten();
        lone.map(|s| s.slot)
    }

    /// Whether a message's topic is hidden from all sleepers by their mounts.
    pub(super) fn hides(&self, message: &Message) -> bool {
        self.open == 0 && hides(self.wild_below, message.topic())
    }

    /// Members fall asleep. `wild_below` is that of the members from which topics are hidden.
    pub(super) fn add(&mut self, sleepers: &[Sleeper], wild_below: Option<NonZeroU16>) {
        self.wild_below = self.wild_below.or(wild_below);
        self.sweep();
        let keeping = sleepers.iter().filter(|s| s.keeps);
        let lowest = keeping.clone().filter(|s| s.cursor() <= self.lowest);
        self.at_lowest += lowest.count() as u32;
        self.keeping += keeping.count() as u32;
        self.open += sleepers.iter().filter(|s| s.view == View::All).count();
        if self.sleepers.len() + sleepers.len() > self.sleepers.capacity() {
            let more = (self.sleepers.len() / 4).max(sleepers.len());
            self.sleepers.reserve_exact(more);
        }
        self.sleepers.extend_from_slice(sleepers);
        // Two runs in order, which a stable sort merges.
        self.sleepers.sort_by_key(|s| s.slot);
        self.drop_unowned();
    }

    /// A member does not sleep any longer. Once its messages are read, [`drop_unowned`](Self::drop_unowned) is to
    /// be called.
    pub(super) fn remove(&mut self, slot: u32) -> Option<Sleeper> {
        let at = self.sleepers.binary_search_by_key(&slot, |s| s.slot).ok()?;
        let sleeper = self.sleepers[at];
        if !sleeper.is_there() {
            return None;
        }
        self.sleepers[at].view = View::Gone;
        self.gone += 1;
        self.keeping -= u32::from(sleeper.keeps);
        self.open -= usize::from(sleeper.view == View::All);
        self.at_lowest -= u32::from(sleeper.keeps && sleeper.cursor() <= self.lowest);
        if self.gone > self.sleepers.len() / 2 {
            self.sweep();
        }
        Some(sleeper)
    }

    /// Takes out the members that are gone.
    fn sweep(&mut self) {
        if self.gone > 0 {
            self.gone = 0;
            self.sleepers.retain(Sleeper::is_there);
            if self.sleepers.len() < self.sleepers.capacity() / 2 {
                self.sleepers.shrink_to(self.sleepers.len() * 5 / 4);
            }
        }
    }

    /// Drops the messages from before the cursors of all sleepers. It looks at the sleepers only where none is
    /// left that is owed the first message, so that a ring of messages costs a walk for each of them at
    /// most, however many sleepers leave.
    pub(super) fn drop_unowned(&mut self) {
        let nothing = self.keeping == 0 && self.entries.is_empty();
        if self.at_lowest > 0 || nothing {
            return;
        }
        let first = self.keepers().map(Sleeper::cursor).min();
        let first = first.unwrap_or(self.next);
        while self.entries.front().is_some_and(|e| e.number < first) {
            self.pop();
        }
        self.lowest = self.entries.front().map_or(self.next, |e| e.number);
        let lowest = self.keepers().filter(|s| s.cursor() <= self.lowest);
        self.at_lowest = lowest.count() as u32;
    }

    /// The member in a slot, if it sleeps.
    pub(super) fn sleeper(&self, slot: u32) -> Option<&Sleeper> {
        let at = self.sleepers.binary_search_by_key(&slot, |s| s.slot).ok()?;
        self.sleepers.get(at).filter(|s| s.is_there())
    }

    /// The messages from a number on.
    pub(super) fn since(&self, from: u64) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.range(self.place(from)..)
    }

    /// How many messages are kept from a number on.
    pub(super) fn count_since(&self, from: u64) -> usize {
        self.entries.len() - self.place(from)
    }

    fn place(&self, from: u64) -> usize {
        self.entries.partition_point(|e| e.number < from)
    }

    /// The messages of a sleeper that are not here any more, or never were.
    pub(super) fn lost(&self, sleeper: &Sleeper) -> Lost {
        let from = sleeper.cursor();
        let all = self.next - from - self.count_since(from) as u64;
        let budget = self.trimmed.saturating_sub(from).min(all);
        let full = self.first.saturating_sub(from.max(self.trimmed));
        let full = full.min(all - budget);
        Lost {
            full,
            budget,
            unkept: all - budget - full,
        }
    }

    /// The memory of the messages and of their entries.
    pub(super) fn held(&self) -> Held {
        Held {
            messages: self.bytes,
            entries: self.entries.len() * BACKLOG_ENTRY_BYTES,
        }
    }

    /// The number of sleepers for which messages are kept.
    pub(super) fn keeping(&self) -> usize {
        self.keeping as usize
    }

    /// Some of the sleepers for which messages are kept: `max` at most, spread over all.
    pub(super) fn sample(&self, max: usize) -> impl Iterator<Item = &Sleeper> {
        self.keepers().step_by(self.keeping().div_ceil(max).max(1))
    }

    /// Drops messages that are past their expiry or too old, and QoS 0.
    pub(super) fn purge(&mut self, limits: &SessionLimits, now: Millis) {
        let bytes = &mut self.bytes;
        self.entries.retain(|e| {
            let age = now.age_of(e.at);
            let aged = limits
                .queue_age_max
                .is_some_and(|max| u128::from(age) >= max.as_millis());
            let late = aged || e.message.has_expired(now);
            let kept = !late && e.message.qos() > QoS::AtMostOnce;
            if !kept {
                *bytes -= e.message.size();
            }
            kept
        });
    }

    /// Drops the older half of the messages. Returns how many.
    pub(super) fn trim(&mut self) -> usize {
        let half = self.entries.len().div_ceil(2);
        for _ in 0..half {
            if let Some(oldest) = self.pop() {
                self.trimmed = oldest + 1;
            }
        }
        self.entries.shrink_to_fit();
        half
    }
}

#[cfg(test)]
mod tests;
