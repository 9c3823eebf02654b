//! One delivery of a message to one client: the entries of a session's queue and window.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::flow::{InFlight, Stage};
use crate::mqtt::{Message, QoS};
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::session::SessionLimits;

/// The client's Subscription Identifiers for one delivery, in 4 bytes: none (0), one, or the index of
/// several in [`IdSets`]. An identifier has 28 bits and is not 0 (§1.5.5, §3.8.2.1.2), so the top bit
/// marks an index.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ids(u32);

const MANY: u32 = 1 << 31;

/// Sets of several identifiers. They are rare, so entries do not have room for them.
#[derive(Debug, Default)]
pub(super) struct IdSets(Option<Box<Sets>>);

#[derive(Debug, Default)]
struct Set {
    ids: Box<[u32]>,
    /// The filter of a shared subscription, if the delivery is for one.
    group: Option<FilterId>,
}

impl Set {
    /// A set of several identifiers, or of a group. Else it is free.
    fn is_used(&self) -> bool {
        !self.ids.is_empty() || self.group.is_some()
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.ids)
    }
}

#[derive(Debug, Default)]
struct Sets {
    sets: Vec<Set>,
    /// A set has or had a group.
    grouped: bool,
    /// Bytes of the sets that are in use.
    bytes: usize,
    free: Vec<u32>,
    last: u32,
    sweep_at: usize,
}

impl IdSets {
    /// Keeps `ids` and the group for as long as one of `entries` refers to them.
    pub(super) fn keep<'a>(
        &mut self,
        ids: &[u32],
        group: Option<FilterId>,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> Ids {
        match (ids, group) {
            ([], None) => Ids(0),
            ([one], None) => Ids(*one),
            _ => {
                let sets = self.0.get_or_insert_default();
                sets.grouped |= group.is_some();
                Ids(MANY | sets.place(ids, group, entries))
            }
        }
    }

    /// Whether deliveries of shared subscriptions may be among the entries.
    pub(super) fn grouped(&self) -> bool {
        self.0.as_ref().is_some_and(|sets| sets.grouped)
    }

    /// The group of a delivery.
    pub(super) fn group(&self, ids: Ids) -> Option<FilterId> {
        let sets = self.0.as_ref().filter(|_| ids.0 & MANY != 0)?;
        sets.sets.get((ids.0 & !MANY) as usize)?.group
    }

    /// The identifiers that `ids` stands for.
    pub(super) fn get<'a>(&'a self, ids: &'a Ids) -> &'a [u32] {
        match (ids.0, &self.0) {
            (0, _) => &[],
            (n, Some(sets)) if n & MANY != 0 => {
                sets.sets.get((n & !MANY) as usize).map_or(&[], |s| &s.ids)
            }
            _ => std::slice::from_ref(&ids.0),
        }
    }

    /// No entry remains.
    pub(super) fn clear(&mut self) {
        self.0 = None;
    }

    /// Frees the sets to which none of `entries` refers.
    pub(super) fn keep_of<'a>(&mut self, entries: impl Iterator<Item = &'a Entry>) {
        if let Some(sets) = &mut self.0 {
            sets.sweep(entries);
            if sets.bytes == 0 {
                self.clear();
            }
        }
    }

    /// Bytes of the sets that are in use.
    pub(super) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |sets| sets.bytes)
    }
}

impl Sets {
    fn place<'a>(
        &mut self,
        ids: &[u32],
        group: Option<FilterId>,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> u32 {
        // Messages of one topic often follow each other, and have the same set.
        if self
            .sets
            .get(self.last as usize)
            .is_some_and(|s| *s.ids == *ids && s.group == group)
        {
            return self.last;
        }
        if self.free.is_empty() && self.sets.len() >= self.sweep_at {
            self.sweep(entries);
        }
        let ids = ids.into();
        let set = Set { ids, group };
        self.bytes += set.bytes();
        self.last = match self.free.pop() {
            Some(at) => {
                self.sets[at as usize] = set;
                at
            }
            None => {
                self.sets.push(set);
                self.sets.len() as u32 - 1
            }
        };
        self.last
    }

    /// Frees the sets that no entry refers to any more.
    fn sweep<'a>(&mut self, entries: impl Iterator<Item = &'a Entry>) {
        let mut used = vec![false; self.sets.len()];
        for entry in entries.filter(|e| e.ids.0 & MANY != 0) {
            used[(entry.ids.0 & !MANY) as usize] = true;
        }
        for (at, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
            if self.sets[at].is_used() {
                self.bytes -= self.sets[at].bytes();
                self.sets[at] = Set::default();
                self.free.push(at as u32);
            }
        }
        self.sweep_at = (2 * (self.sets.len() - self.free.len())).max(16);
    }
}

/// One delivery of a message to this client, waiting or in flight.
#[derive(Debug)]
pub(super) struct Entry {
    /// `None` once the client has the message.
    pub message: Option<Message>,
    pub ids: Ids,
    /// When it was queued, later when it was sent: the low 32 bits of the time in milliseconds.
    pub at: u32,
    /// While it waits: the low bits of [`Offer::position`].
    pub packet_id: u16,
    pub qos: QoS,
    pub state: State,
    pub retain: bool,
    /// The stream on which it is to be sent, or was sent.
    pub stream: StreamId,
}

impl Entry {
    /// Whether the message is past its Message Expiry Interval [MQTT-3.3.2-5].
    pub(super) fn has_expired(&self, now: Millis) -> bool {
        self.message.as_ref().is_none_or(|m| m.has_expired(now))
    }

    /// Whether the message has waited for `session.queue_age_max`.
    pub(super) fn is_too_old(&self, limits: &SessionLimits, now: Millis) -> bool {
        let age = Duration::from_millis(now.age_of(self.at).into());
        limits.queue_age_max.is_some_and(|max| age >= max)
    }

    pub(super) fn offer<'a>(&'a self, sets: &'a IdSets) -> Option<Offer<'a>> {
        Some(Offer {
            message: self.message.as_ref()?,
            qos: self.qos,
            retain: self.retain,
            ids: sets.get(&self.ids),
            group: sets.group(self.ids),
            stream: self.stream,
            fetched: self.state == State::Fetched,
            position: u64::from(self.packet_id),
        })
    }

    pub(super) fn size(&self) -> usize {
        self.message.as_ref().map_or(0, Message::size)
    }
}

/// A message that was kept elsewhere for a client that is away, as the client is to get it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The message.
    pub message: Message,
    /// The smaller of the message's and the subscription's QoS.
    pub qos: QoS,
    /// The RETAIN flag for this client.
    pub retain: bool,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// When it arrived: the low 32 bits of the time in milliseconds.
    pub at: u32,
    /// The messages that had been kept before, with this one.
    pub position: u64,
}

impl From<Kept> for Entry {
    fn from(kept: Kept) -> Self {
        Self {
            message: Some(kept.message),
            ids: Ids(kept.identifier.map_or(0, NonZeroU32::get)),
            at: kept.at,
            packet_id: kept.position as u16,
            qos: kept.qos,
            state: State::Waiting,
            retain: kept.retain,
            stream: StreamId::CONTROL,
        }
    }
}

impl InFlight for Entry {
    fn packet_id(&self) -> u16 {
        self.packet_id
    }

    fn stage(&self) -> Stage {
        match self.state {
            State::InFlight(stage) => stage,
            // A waiting entry is never in a window.
            State::Waiting | State::Fetched => Stage::Done,
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        self.state = State::InFlight(stage);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not sent yet.
    Waiting,
    /// Not sent yet; a retained message that was fetched for a subscription.
    Fetched,
    /// Sent, and in the window.
    InFlight(Stage),
}

/// A message as one client gets it.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// The message.
    pub message: &'a Message,
    /// The smaller of the message's and the subscription's QoS.
    pub qos: QoS,
    /// The RETAIN flag for this client.
    pub retain: bool,
    /// The client's own Subscription Identifiers.
    pub ids: &'a [u32],
    /// The filter, if the subscription is shared: another member gets the message if this client does
    /// not take it.
    pub group: Option<FilterId>,
    /// The stream of its subscription.
    pub stream: StreamId,
    /// It is a retained message that was fetched; such messages have queue limits of their own.
    pub fetched: bool,
    /// The messages that had been kept elsewhere for clients that are away. It orders messages of the
    /// same millisecond.
    pub position: u64,
}

/// A delivery of a shared subscription that another member is to get.
#[derive(Clone, Debug)]
pub struct Redelivery {
    /// The filter.
    pub filter: FilterId,
    /// The message.
    pub message: Message,
}

#[cfg(test)]
mod tests {
    use super::*;

    // The memory of queues is in these.
    const _: () = assert!(size_of::<Entry>() == 24);

    fn entry(ids: Ids) -> Entry {
        Entry {
            message: None,
            ids,
            at: 0,
            packet_id: 0,
            qos: QoS::AtLeastOnce,
            state: State::Waiting,
            retain: false,
            stream: StreamId::CONTROL,
        }
    }

    #[test]
    fn every_entry_keeps_its_own_identifiers() {
        let mut sets = IdSets::default();
        let mut entries: Vec<(Entry, Vec<u32>)> = Vec::new();
        for n in 1..2000_u32 {
            let ids: Vec<u32> = (0..n % 4).map(|i| n / 7 + i + 1).collect();
            let kept = sets.keep(&ids, None, entries.iter().map(|(e, _)| e));
            entries.push((entry(kept), ids));
            if entries.len() > 30 {
                entries.drain(..n as usize % 30);
            }
            for (entry, ids) in &entries {
                assert_eq!(sets.get(&entry.ids), ids);
            }
            let all = sets.0.iter().flat_map(|s| &s.sets);
            let used: usize = all.filter(|set| set.is_used()).map(Set::bytes).sum();
            assert_eq!(sets.bytes(), used);
        }
        let held = sets.0.as_ref().map_or(0, |s| s.sets.len());
        assert!(held <= 80, "{held} sets for at most 30 entries");
        let last = entries.pop().expect("some are kept");
        sets.keep_of(std::iter::once(&last.0));
        assert_eq!(sets.get(&last.0.ids), last.1);
        assert!(sets.bytes() <= size_of::<Set>() + 4 * last.1.len());
        sets.keep_of(std::iter::empty());
        assert_eq!(sets.bytes(), 0);
        assert_eq!(sets.get(&Ids(7)), [7]);
        assert!(sets.get(&Ids(0)).is_empty());
    }
}
