//! The backlog of a filter in one shard: its messages, kept once for all members that sleep.
//!
//! A member sleeps while its client is away: no message of the filter is put into its session's queue.
//! It has a cursor, the number of the first message that is its own; [`sleep`](super::sleep) has the rules by
//! which members fall asleep and wake.

mod lost;

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU16;
use std::ops::Range;

use crate::mqtt::{Message, QoS};
use crate::session::{Incarnation, SessionLimits, hides};
use crate::time::Millis;

pub(super) use lost::{Lost, Reason};

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
    /// Messages with lower numbers are not here any longer.
    first: u64,
    /// Messages with lower numbers are for no sleeper, or are only counted. The numbers below begin here.
    base: u64,
    /// Messages that were dropped at the front.
    front: Lost,
    /// Others that were dropped.
    scattered: Lost,
    /// Messages with lower numbers were kept or dropped.
    handled: u64,
    /// By slot, with members that are gone: to take each of them out at once would make a mass of clients that
    /// come back expensive.
    sleepers: Vec<Sleeper>,
    /// The number of members that are gone.
    gone: usize,
    /// The slots of sleepers with No Local, by the numbers of their incarnations. Some may be gone.
    no_local: BTreeMap<u64, u32>,
    /// Sleepers that get all topics.
    open: usize,
    /// The [`wild_below`](crate::session::Subscription::wild_below) of the others, whose mounts all end at the
    /// first wildcard of the filter.
    wild_below: Option<NonZeroU16>,
    /// Sleepers for which messages are kept.
    keeping: u32,
    /// A number above which no sleeper has its cursor.
    highest: u64,
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
        let nobodys = self.keeping == 0 || number < self.base;
        if number < self.handled || nobodys || !quality {
            return;
        }
        self.handled = number + 1;
        // Not one message may have room.
        if size > limits.queue_bytes_max || limits.queue_messages_max == 0 {
            let reason = match size > limits.queue_bytes_max {
                true => Reason::Bytes,
                false => Reason::Messages,
            };
            return self.scattered.add(reason, 1);
        }
        loop {
            let reason = if self.entries.len() >= limits.queue_messages_max {
                Reason::Messages
            } else if self.bytes + size > limits.queue_bytes_max {
                Reason::Bytes
            } else {
                break;
            };
            self.drop_first(reason);
        }
        // A quarter more at a time: doubling would leave half of a long backlog unused.
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact((self.entries.len() / 4).max(4));
        }
        self.bytes += size;
        if let Some(numbered) = message.numbered() {
            numbered.hurry();
        }
        self.entries.push_back(Entry {
            message: message.clone(),
            position,
            number,
            origin_mark,
            at: now.low_bits(),
        });
    }

    /// Whether the message that arrived last, with this number, was dropped after it was for a sleeper.
    pub(super) fn has_dropped(&self, number: u64) -> bool {
        let kept = self.entries.back().is_some_and(|e| e.number == number);
        number < self.handled && !kept
    }

    fn pop(&mut self) -> Option<u64> {
        let oldest = self.entries.pop_front()?;
        self.bytes -= oldest.message.size();
        Some(oldest.number)
    }

    fn drop_first(&mut self, reason: Reason) {
        if let Some(oldest) = self.pop() {
            self.first = oldest + 1;
            self.front.add(reason, 1);
        }
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
        self.keeping += keeping.clone().count() as u32;
        let highest = keeping.clone().map(Sleeper::cursor).max();
        self.highest = self.highest.max(highest.unwrap_or(0));
        if let Some(least) = keeping.map(Sleeper::cursor).min() {
            // The first of their messages may have arrived when it was for nobody.
            self.base = self.base.min(least);
        }
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

    /// The member in `slot`, which falls asleep, has No Local.
    pub(super) fn hide_own(&mut self, slot: u32, origin_mark: Incarnation) {
        self.no_local.insert(origin_mark.get(), slot);
    }

    /// The slot of a sleeper that published a message and has No Local. To be compared with the session that
    /// is in the slot.
    pub(super) fn publisher(&self, origin_mark: Option<Incarnation>) -> Option<u32> {
        let slot = *self.no_local.get(&origin_mark?.get())?;
        self.sleeper(slot).map(|s| s.slot)
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
            let mut no_local = std::mem::take(&mut self.no_local);
            no_local.retain(|_, slot| self.sleeper(*slot).is_some());
            self.no_local = no_local;
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
        self.begin_at(first);
        while self.entries.front().is_some_and(|e| e.number < first) {
            if let Some(number) = self.pop()
                && number + 1 == self.handled
            {
                // A member that falls asleep with this message is to find it.
                self.handled = number;
            }
        }
        shrink(&mut self.entries);
        // The message that arrived last may still be kept.
        let none = self.next.saturating_sub(1);
        self.lowest = self.entries.front().map_or(none, |e| e.number);
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

    /// The messages, counted for each sleeper.
    pub(super) fn owed(&self) -> usize {
        self.owed_at_once().unwrap_or_else(|| {
            let cursors = self.keepers().map(Sleeper::cursor);
            cursors.map(|cursor| self.count_since(cursor)).sum()
        })
    }

    /// The number if all sleepers are owed all messages.
    fn owed_at_once(&self) -> Option<usize> {
        let first = self.entries.front().map_or(self.next, |e| e.number);
        (self.highest <= first).then(|| self.keeping() * self.entries.len())
    }

    fn place(&self, from: u64) -> usize {
        self.entries.partition_point(|e| e.number < from)
    }

    /// The messages of a sleeper that are not here any more, or never were. The reasons are estimated for a
    /// sleeper that fell asleep after others.
    pub(super) fn lost(&self, sleeper: &Sleeper) -> Lost {
        let (mut lost, scattered) = match sleeper.keeps {
            true => self.dropped_from(sleeper.cursor()),
            false => Default::default(),
        };
        lost.add_all(scattered);
        let unkept = self
            .missing_from(sleeper.cursor())
            .saturating_sub(lost.sum());
        lost.add(Reason::Qos0, unkept);
        lost
    }

    /// How many messages from a number on are not here.
    fn missing_from(&self, from: u64) -> u64 {
        self.next - from - self.count_since(from) as u64
    }

    /// The messages from a number on that were dropped at the front, and others.
    fn dropped_from(&self, from: u64) -> (Lost, Lost) {
        let below = |from| self.first.saturating_sub(from);
        let front = self.front.part(below(from), below(self.base));
        let scattered = self.scattered.part(
            self.missing_from(from).saturating_sub(front.sum()),
            self.missing_from(self.base)
                .saturating_sub(self.front.sum()),
        );
        (front, scattered)
    }

    /// Nobody sleeps for whom messages with lower numbers are kept.
    fn begin_at(&mut self, number: u64) {
        if number > self.base {
            (self.front, self.scattered) = self.dropped_from(number);
            self.base = number;
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
        let (bytes, scattered) = (&mut self.bytes, &mut self.scattered);
        self.entries.retain(|e| {
            let age = now.age_of(e.at);
            let aged = limits
                .queue_age_max
                .is_some_and(|max| u128::from(age) >= max.as_millis());
            let reason = if e.message.has_expired(now) {
                Reason::Expired
            } else if aged {
                Reason::Age
            } else if e.message.qos() == QoS::AtMostOnce {
                Reason::Budget
            } else {
                return true;
            };
            *bytes -= e.message.size();
            scattered.add(reason, 1);
            false
        });
        shrink(&mut self.entries);
    }

    /// Drops the older half of the messages. Returns how many.
    pub(super) fn trim(&mut self) -> usize {
        let half = self.entries.len().div_ceil(2);
        for _ in 0..half {
            self.drop_first(Reason::Budget);
        }
        self.entries.shrink_to_fit();
        half
    }
}

/// Gives memory back that most messages have left.
fn shrink(entries: &mut VecDeque<Entry>) {
    if entries.len() < entries.capacity() / 4 {
        entries.shrink_to(entries.len() * 5 / 4);
    }
}

#[cfg(test)]
mod tests;
