//! The messages of QoS 2 that links have received, so that each is delivered once although the process ends in
//! between (MQTT 5 §4.3.3).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::mqtt::{LinkOrigin, Message};
use crate::router::messages::Numbers;
use crate::store::log::{Life, Log, Position, Room};
use crate::store::records::{LINK_RELEASED, LinkReleased};

/// A record that is to be written.
#[derive(Debug)]
pub(in crate::router) enum Unwritten {
    /// The record of a message.
    Message(Message),
    /// The broker has released it, or has forgotten all of the link's. The answer waits for the record.
    Released(LinkReleased, Committed),
}

/// The outcome of an attempt to append a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Appended {
    /// It is in the log at this place; `None`: the log is degraded, or there was nothing to say.
    At(Option<Position>),
    /// It needs so many bytes of room.
    NoRoom(usize),
}

/// Whether a record is on the disk, or the log is degraded. Clones are the same record's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Committed(Arc<AtomicBool>);

impl Committed {
    pub(in crate::router) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the record is on the disk, or the log is degraded.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The messages of QoS 2 that the broker has not released, by link and packet identifier. While it is here, a
/// message has its record.
#[derive(Debug, Default)]
pub(in crate::router) struct ReceivedMessages(Mutex<Received>);

#[derive(Debug, Default)]
struct Received {
    by_identifier: BTreeMap<(u16, u16), Message>,
    /// The log has other messages of these links, from earlier processes.
    unknown: BTreeSet<u16>,
}

impl ReceivedMessages {
    /// A link has received a message.
    pub(crate) fn insert(&self, origin: LinkOrigin, message: Message) {
        let key = (origin.link, origin.packet_id);
        // The broker has given the identifier to another message, so it does not send the old one again.
        if let Some(before) = self.0.lock().by_identifier.insert(key, message)
            && let Some(numbered) = before.numbered()
        {
            numbered.forget_link_origin();
        }
    }

    /// The log has messages of a link whose session an earlier process has lost.
    pub(crate) fn unknown(&self, link: u16) {
        self.0.lock().unknown.insert(link);
    }

    /// The messages of a link.
    pub(crate) fn of(&self, link: u16) -> Vec<LinkOrigin> {
        let all = self.0.lock();
        let of_link = all.by_identifier.range((link, 0)..=(link, u16::MAX));
        of_link
            .filter_map(|(_, message)| message.numbered()?.link_origin())
            .collect()
    }

    /// All messages.
    pub(crate) fn all(&self) -> Vec<Message> {
        self.0.lock().by_identifier.values().cloned().collect()
    }

    /// Appends the record of a release. From then on no record of a released message names its link.
    pub(crate) fn append_release(
        &self,
        log: &Log,
        room: &mut Room,
        released: LinkReleased,
    ) -> Appended {
        let Received {
            by_identifier: all,
            unknown,
        } = &mut *self.0.lock();
        let link = released.link;
        let ids = released.packet_id.map_or(0..=u16::MAX, |id| id..=id);
        let range = (link, *ids.start())..=(link, *ids.end());
        let keys: Vec<(u16, u16)> = all.range(range).map(|(key, _)| *key).collect();
        let others = released.packet_id.is_none() && unknown.contains(&link);
        if keys.is_empty() && !others {
            return Appended::At(None);
        }
        let body = released.encode();
        let needed = Log::record_bytes(body.len());
        if room.bytes() < needed {
            return Appended::NoRoom(needed);
        }
        if others {
            unknown.remove(&link);
        }
        for key in keys {
            if let Some(message) = all.remove(&key)
                && let Some(numbered) = message.numbered()
            {
                numbered.forget_link_origin();
            }
        }
        let position = log.append(room, LINK_RELEASED, &[&body], Life::Passing);
        Appended::At(position.ok().flatten())
    }
}

impl Numbers {
    /// The broker has released a message of a link, or has forgotten all of them.
    pub(crate) fn link_released(&self, released: LinkReleased) -> Committed {
        let committed = Committed::default();
        match self.kept() {
            Some(_) => self.write_one(Unwritten::Released(released, committed.clone())),
            None => committed.set(),
        }
        committed
    }
}
