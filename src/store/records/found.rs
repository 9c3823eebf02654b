//! The sessions and messages that the records of a log leave.

use std::collections::BTreeMap;

use crate::store::log::{Position, Record};
use crate::time::UnixMillis;

use super::{
    CHECKPOINT, CheckpointRecord, LINK_RELEASED, LinkReceived, LinkReleased, MESSAGE,
    MessageRecord, RecordError, SESSION, SESSION_END, SessionRecord, decode_end,
};

/// The body of a session's last record.
#[derive(Clone, Debug)]
pub struct FoundSession {
    /// Where the record is.
    pub position: Position,
    /// It can be read.
    pub body: Box<[u8]>,
    incarnation: u64,
    detached_at: Option<UnixMillis>,
}

/// The body of a message's last record.
#[derive(Clone, Debug)]
pub struct FoundMessage {
    /// Where the record is.
    pub position: Position,
    /// It can be read.
    pub body: Box<[u8]>,
}

/// How far the sessions of connected clients were.
#[derive(Clone, Debug)]
struct Checkpoint {
    position: Position,
    through: u64,
    behind: BTreeMap<u64, u64>,
}

/// The sessions of a log, and their messages, while its records are replayed.
#[derive(Debug, Default)]
pub struct FoundSessions {
    by_key: BTreeMap<Box<str>, FoundSession>,
    /// The keys of the incarnations.
    keys: BTreeMap<u64, Box<str>>,
    largest: u64,
    messages: BTreeMap<u64, FoundMessage>,
    checkpoint: Option<Checkpoint>,
    largest_sequence: u64,
    /// The messages of QoS 2 that the broker has not released, by link and packet identifier.
    received: BTreeMap<(u16, u16), (LinkReceived, u64)>,
}

impl FoundSessions {
    /// Takes the next record.
    ///
    /// # Errors
    /// [`RecordError`]; the record says nothing.
    pub fn take(&mut self, record: &Record<'_>) -> Result<(), RecordError> {
        match record.kind {
            SESSION => {
                let session = SessionRecord::decode(record.body)?;
                self.session(&session, record);
            }
            SESSION_END => {
                let incarnation = decode_end(record.body)?;
                self.largest = self.largest.max(incarnation);
                if let Some(key) = self.keys.remove(&incarnation) {
                    self.by_key.remove(&key);
                }
            }
            MESSAGE => {
                let message = MessageRecord::decode(record.body)?;
                self.message(&message, record);
            }
            CHECKPOINT => {
                let checkpoint = CheckpointRecord::decode(record.body)?;
                self.saw(checkpoint.through);
                self.checkpoint = Some(Checkpoint {
                    position: record.position,
                    through: checkpoint.through,
                    behind: checkpoint.behind.into_iter().collect(),
                });
            }
            LINK_RELEASED => {
                let released = LinkReleased::decode(record.body)?;
                let is_released = |(link, id): (u16, u16)| {
                    link == released.link && released.packet_id.is_none_or(|r| r == id)
                };
                self.received.retain(|key, _| !is_released(*key));
            }
            kind => return Err(RecordError::Kind(kind)),
        }
        Ok(())
    }

    fn saw(&mut self, sequence: u64) {
        self.largest_sequence = self.largest_sequence.max(sequence);
    }

    fn session(&mut self, session: &SessionRecord<'_>, record: &Record<'_>) {
        let incarnation = session.incarnation;
        self.largest = self.largest.max(incarnation);
        self.saw(session.through);
        for sequence in &session.done {
            self.saw(*sequence);
        }
        let found = FoundSession {
            position: record.position,
            body: record.body.into(),
            incarnation,
            detached_at: session.detached_at,
        };
        if let Some(old) = self.by_key.insert(session.key.into(), found)
            && old.incarnation != incarnation
        {
            self.keys.remove(&old.incarnation);
        }
        self.keys.insert(incarnation, session.key.into());
    }

    fn message(&mut self, message: &MessageRecord<'_>, record: &Record<'_>) {
        self.saw(message.sequence);
        for since in message.addressees.iter().filter_map(|a| a.since) {
            self.saw(since);
        }
        // The last record of a message decides.
        let sequence = message.sequence;
        if self.messages.contains_key(&sequence) {
            self.received.retain(|_, (_, of)| *of != sequence);
        }
        if let Some(received) = message.received {
            let key = (received.link, received.packet_id);
            self.received.insert(key, (received, sequence));
        }
        let found = FoundMessage {
            position: record.position,
            body: record.body.into(),
        };
        self.messages.insert(message.sequence, found);
    }

    /// The largest incarnation that any record names.
    pub fn largest_incarnation(&self) -> u64 {
        self.largest
    }

    /// The largest sequence number of a message that any record names.
    pub fn largest_sequence(&self) -> u64 {
        self.largest_sequence
    }

    /// The lowest sequence number of a message that a session's client may not have. `record` is its last
    /// record, which is at `position`. Earlier messages are done, whatever the record says.
    pub fn lowest(&self, record: &SessionRecord<'_>, position: Position) -> u64 {
        let connected = record.detached_at.is_none();
        match &self.checkpoint {
            Some(checkpoint) if connected && position < checkpoint.position => {
                let behind = checkpoint.behind.get(&record.incarnation);
                behind.copied().unwrap_or(checkpoint.through + 1)
            }
            _ => 0,
        }
    }

    /// The messages of QoS 2 that links have received and that the broker has not released, with their sequence
    /// numbers.
    pub fn received(&self) -> impl Iterator<Item = (LinkReceived, u64)> {
        self.received.values().copied()
    }

    /// Whether a link has received the message with this sequence number so, and the broker has not released it.
    pub fn is_received(&self, received: &LinkReceived, sequence: u64) -> bool {
        let key = (received.link, received.packet_id);
        self.received.get(&key) == Some(&(*received, sequence))
    }

    /// The messages, in the order of their sequence numbers.
    pub fn messages(&self) -> &BTreeMap<u64, FoundMessage> {
        &self.messages
    }

    /// The sessions, the least recently connected first.
    pub fn sessions(&self) -> Vec<&FoundSession> {
        let mut all: Vec<&FoundSession> = self.by_key.values().collect();
        all.sort_by_key(|s| (s.detached_at.is_none(), s.detached_at, s.position));
        all
    }
}
