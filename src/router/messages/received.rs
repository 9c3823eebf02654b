//! The messages of QoS 2 that links have received, so that each is delivered once although the process ends in
//! between (MQTT 5 §4.3.3).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::mqtt::Message;
use crate::router::messages::Numbers;
use crate::store::log::{Claim, Life, Log, Pass, Piece, Position, Room};
use crate::store::records::{LINK_RECEIVED, LINK_RELEASED, LinkReceived, LinkReleased};

/// A record that is to be written.
#[derive(Debug)]
pub(in crate::router) enum Unwritten {
    /// The record of a message.
    Message(Message),
    /// A link has received a message of QoS 2.
    Received(LinkReceived),
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

/// The messages of QoS 2 that have a record.
#[derive(Debug, Default)]
pub(in crate::router) struct ReceivedMessages(Mutex<ByIdentifier>);

/// The messages by link and packet identifier, with the claims of their records.
type ByIdentifier = BTreeMap<(u16, u16), (LinkReceived, Option<Claim>)>;

impl ReceivedMessages {
    /// Takes over the messages that an earlier process has left, with the claims of their records.
    pub(crate) fn restore(&self, found: impl Iterator<Item = (LinkReceived, Claim)>) {
        let found = found.map(|(r, claim)| ((r.link, r.packet_id), (r, Some(claim))));
        self.0.lock().extend(found);
    }

    /// The messages of a link.
    pub(crate) fn of(&self, link: u16) -> Vec<LinkReceived> {
        let all = self.0.lock();
        let of_link = all.range((link, 0)..=(link, u16::MAX));
        of_link.map(|(_, (received, _))| *received).collect()
    }

    /// Appends the record of a message.
    pub(crate) fn append(&self, log: &Log, room: &mut Room, received: LinkReceived) -> Appended {
        let body = received.encode();
        let needed = Log::record_bytes(body.len());
        if room.bytes() < needed {
            return Appended::NoRoom(needed);
        }
        let position = log.append(room, LINK_RECEIVED, &[&body], Life::Living);
        let position = position.ok().flatten();
        let claim = position.map(|position| Claim::new(position, body.len()));
        let key = (received.link, received.packet_id);
        if let Some((_, Some(before))) = self.0.lock().insert(key, (received, claim)) {
            log.claims().release(before);
        }
        Appended::At(position)
    }

    /// Appends the record of a release, if it releases something.
    pub(crate) fn append_release(
        &self,
        log: &Log,
        room: &mut Room,
        released: LinkReleased,
    ) -> Appended {
        let mut all = self.0.lock();
        let link = released.link;
        let ids = released.packet_id.map_or(0..=u16::MAX, |id| id..=id);
        let range = (link, *ids.start())..=(link, *ids.end());
        let keys: Vec<(u16, u16)> = all.range(range).map(|(key, _)| *key).collect();
        if keys.is_empty() {
            return Appended::At(None);
        }
        let body = released.encode();
        let needed = Log::record_bytes(body.len());
        if room.bytes() < needed {
            return Appended::NoRoom(needed);
        }
        let position = log.append(room, LINK_RELEASED, &[&body], Life::Passing);
        for key in keys {
            if let Some((_, Some(claim))) = all.remove(&key) {
                log.claims().release(claim);
            }
        }
        Appended::At(position.ok().flatten())
    }

    /// Writes the records again that belong to a pass of the log.
    pub(crate) fn rewrite(&self, log: &Log, pass: Pass, piece: &mut Piece<'_>) {
        for (received, claim) in self.0.lock().values_mut() {
            let belongs = match pass {
                Pass::All => claim.is_none_or(|c| c.segment < piece.first_segment()),
                Pass::Until(last) => claim.is_some_and(|c| c.segment <= last),
            };
            if !belongs {
                continue;
            }
            let body = received.encode();
            if let Ok(Some(position)) = piece.append(LINK_RECEIVED, &[&body])
                && let Some(before) = claim.replace(Claim::new(position, body.len()))
            {
                log.claims().release(before);
            }
        }
    }
}

impl Numbers {
    /// A link has received a message of QoS 2. Its record is written before that of the message.
    pub(crate) fn link_received(&self, received: LinkReceived) {
        if self.kept().is_some() {
            self.write_one(Unwritten::Received(received));
        }
    }

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
