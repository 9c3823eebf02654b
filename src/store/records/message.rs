//! The records of messages.

use std::num::NonZeroU64;

use crate::time::UnixMillis;

use super::fields::{Reader, Writer};
use super::{LinkReceived, RECORDS_VERSION, RecordError, versioned};

/// A message as the log keeps it, once for all sessions. The last record of a sequence number counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageRecord<'a> {
    /// Names the message in the records of sessions.
    pub sequence: u64,
    /// The incarnation of the session that published it, if it is known.
    pub origin_mark: Option<NonZeroU64>,
    /// When it arrived.
    pub arrived_at: UnixMillis,
    /// When it expires; `None`: never.
    pub expires_at: Option<UnixMillis>,
    /// A link has it, which the broker may send it to again: it is of QoS 2 and not released.
    pub received: Option<LinkReceived>,
    /// The sessions that it is for.
    pub addressees: Vec<AddresseeRecord<'a>>,
    /// Its parts.
    pub content: ContentRecord<'a>,
}

/// The parts of a message that its receivers get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRecord<'a> {
    /// Topic name.
    pub topic: &'a str,
    /// Raw properties that travel with the message.
    pub properties: &'a [u8],
    /// Application message.
    pub payload: &'a [u8],
    /// 0, 1 or 2.
    pub qos: u8,
    /// RETAIN as received.
    pub retain: bool,
}

/// The sessions that a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddresseeRecord<'a> {
    /// The filter of their subscriptions.
    pub filter: &'a str,
    /// The incarnation of the member that has the message, if the subscription is shared.
    pub member: Option<NonZeroU64>,
    /// The sequence number with which they were given it, if that is not the message's own.
    pub since: Option<u64>,
}

const ORIGIN_MARK: u8 = 1;
const EXPIRES: u8 = 1 << 1;
const RECEIVED: u8 = 1 << 2;
const ALL: u8 = ORIGIN_MARK | EXPIRES | RECEIVED;

const RETAIN: u8 = 1 << 2;

const MEMBER: u8 = 1;
const SINCE: u8 = 1 << 1;
/// The filter is the topic of the message.
const IS_TOPIC: u8 = 1 << 2;
const ALL_OF_ADDRESSEE: u8 = MEMBER | SINCE | IS_TOPIC;

fn flag(is_set: bool, flag: u8) -> u8 {
    if is_set { flag } else { 0 }
}

impl<'a> MessageRecord<'a> {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u64(self.sequence);
        let origin_mark = flag(self.origin_mark.is_some(), ORIGIN_MARK);
        let expires = flag(self.expires_at.is_some(), EXPIRES);
        w.u8(origin_mark | expires | flag(self.received.is_some(), RECEIVED));
        if let Some(origin_mark) = self.origin_mark {
            w.u64(origin_mark.get());
        }
        w.u64(self.arrived_at.as_u64());
        if let Some(at) = self.expires_at {
            w.u64(at.as_u64());
        }
        if let Some(received) = &self.received {
            received.encode(&mut w);
        }
        self.content.encode(&mut w);
        w.u32(self.addressees.len() as u32);
        for addressee in &self.addressees {
            addressee.encode(self.content.topic, &mut w);
        }
    }

    /// Reads the body of a record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(body: &'a [u8]) -> Result<Self, RecordError> {
        let mut r = versioned(body)?;
        Self::read(&mut r)
            .filter(|_| r.is_empty())
            .ok_or(RecordError::Malformed)
    }

    fn read(r: &mut Reader<'a>) -> Option<Self> {
        let sequence = r.u64()?;
        let flags = r.u8().filter(|flags| flags & !ALL == 0)?;
        let origin_mark = match flags & ORIGIN_MARK {
            0 => None,
            _ => Some(NonZeroU64::new(r.u64()?)?),
        };
        let arrived_at = UnixMillis::new(r.u64()?);
        let expires_at = match flags & EXPIRES {
            0 => None,
            _ => Some(UnixMillis::new(r.u64()?)),
        };
        let received = match flags & RECEIVED {
            0 => None,
            _ => Some(LinkReceived::read(r)?),
        };
        let content = ContentRecord::read(r)?;
        let addressees = r.u32()?;
        // A damaged number must not reserve memory.
        let addressees = (0..addressees).map(|_| AddresseeRecord::read(content.topic, r));
        Some(Self {
            sequence,
            origin_mark,
            arrived_at,
            expires_at,
            received,
            addressees: addressees.collect::<Option<_>>()?,
            content,
        })
    }
}

impl<'a> ContentRecord<'a> {
    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u8(self.qos | flag(self.retain, RETAIN));
        w.bytes(self.topic.as_bytes());
        w.bytes(self.properties);
        w.bytes(self.payload);
    }

    pub(super) fn read(r: &mut Reader<'a>) -> Option<Self> {
        let flags = r.u8()?;
        let qos = flags & 3;
        if flags & !(3 | RETAIN) != 0 || qos == 3 {
            return None;
        }
        Some(Self {
            qos,
            retain: flags & RETAIN != 0,
            topic: r.text()?,
            properties: r.bytes()?,
            payload: r.bytes()?,
        })
    }
}

impl<'a> AddresseeRecord<'a> {
    fn encode(&self, topic: &str, w: &mut Writer<'_>) {
        let is_topic = self.filter == topic;
        let member = flag(self.member.is_some(), MEMBER);
        w.u8(member | flag(self.since.is_some(), SINCE) | flag(is_topic, IS_TOPIC));
        if let Some(member) = self.member {
            w.u64(member.get());
        }
        if let Some(since) = self.since {
            w.u64(since);
        }
        if !is_topic {
            w.bytes(self.filter.as_bytes());
        }
    }

    fn read(topic: &'a str, r: &mut Reader<'a>) -> Option<Self> {
        let flags = r.u8().filter(|flags| flags & !ALL_OF_ADDRESSEE == 0)?;
        let member = match flags & MEMBER {
            0 => None,
            _ => Some(NonZeroU64::new(r.u64()?)?),
        };
        let since = match flags & SINCE {
            0 => None,
            _ => Some(r.u64()?),
        };
        let filter = match flags & IS_TOPIC {
            // Each record has one form.
            0 => r.text().filter(|filter| *filter != topic)?,
            _ => topic,
        };
        Some(Self {
            filter,
            member,
            since,
        })
    }
}

/// How far the sessions of connected clients are: every message up to a sequence number is done, but for some
/// sessions. It counts for the sessions whose last record is an earlier one and says that their client was
/// connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Messages up to this sequence number are done.
    pub through: u64,
    /// Sessions by their incarnations, with the lowest sequence number of a message that is not done.
    pub behind: Vec<(u64, u64)>,
}

impl CheckpointRecord {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u64(self.through);
        w.u32(self.behind.len() as u32);
        for (incarnation, lowest) in &self.behind {
            w.u64(*incarnation);
            w.u64(*lowest);
        }
    }

    /// Reads the body of a record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(body: &[u8]) -> Result<Self, RecordError> {
        let mut r = versioned(body)?;
        Self::read(&mut r)
            .filter(|_| r.is_empty())
            .ok_or(RecordError::Malformed)
    }

    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let through = r.u64()?;
        let count = r.u32()?;
        let behind = (0..count).map(|_| Some((r.u64()?, r.u64()?)));
        Some(Self {
            through,
            behind: behind.collect::<Option<_>>()?,
        })
    }
}
