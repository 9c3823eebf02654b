//! The records of sessions, their messages, filters and links in the log. `filters` describes the latter two.
//!
//! A session's record is total: it says everything about the session, and the last one counts. It names
//! the session by its incarnation, a number that no other session ever has. A record of the end of an
//! incarnation cancels the records before it; so does a record of a later incarnation with the same key.
//!
//! All numbers are little endian. Texts and bytes follow their length. A body begins with the version of
//! its format.

mod fields;
mod filters;
mod found;
mod message;
mod owed;
mod received;

use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU32};

use crate::time::UnixMillis;

use fields::{Reader, Writer};
pub use filters::{
    FILTER, FILTER_GONE, FilterGoneRecord, FilterRecord, FilterState, FoundFilter, FoundFilters,
    FoundLink, FoundRest, LINK, LinkRecord, LinkState,
};
pub use found::{FoundMessage, FoundSession, FoundSessions};
pub use message::{AddresseeRecord, CheckpointRecord, ContentRecord, MessageRecord};
pub use owed::{OwedMessage, OwedRecord, OwedStage};
pub use received::{LinkReceived, LinkReleased};

/// The kind of a [`SessionRecord`] in the log.
pub const SESSION: u8 = 1;
/// The kind of the record of a session's end; see [`encode_end`].
pub const SESSION_END: u8 = 2;
/// The kind of a [`MessageRecord`] in the log.
pub const MESSAGE: u8 = 6;
/// The kind of a [`CheckpointRecord`] in the log.
pub const CHECKPOINT: u8 = 7;
/// The kind of a [`LinkReleased`] in the log.
pub const LINK_RELEASED: u8 = 8;

/// The version of the records' format. A record of a later version is refused.
pub const RECORDS_VERSION: u8 = 1;

/// The length of the body of a session's end, in bytes.
pub const END_BYTES: usize = 9;

/// Why the body of a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A later program wrote it.
    #[error("the record has version {0}, and this program reads version {RECORDS_VERSION}")]
    Version(u8),
    /// A later program wrote it: its kind is not known.
    #[error("the record is of kind {0}, which this program does not know")]
    Kind(u8),
    /// It is not a record of its kind.
    #[error("the record is malformed")]
    Malformed,
}

/// A session as the log keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRecord<'a> {
    /// Names the session, and no other one ever.
    pub incarnation: u64,
    /// Client identifier and mount.
    pub key: &'a str,
    /// Who the session belongs to.
    pub principal: &'a str,
    /// The principal is the one of all anonymous clients.
    pub anonymous: bool,
    /// The address of the client's last connection.
    pub address: IpAddr,
    /// The protocol level of the last connection: 3, 4 or 5.
    pub level: u8,
    /// The last connection was that of a bridge.
    pub bridge: bool,
    /// The session is over, and only its will is still to be published.
    pub over: bool,
    /// Session Expiry Interval in seconds; 0xFFFF_FFFF: the session never ends.
    pub expiry: u32,
    /// When the client went away; `None`: it was connected.
    pub detached_at: Option<UnixMillis>,
    /// Messages lost by a named limit since the session began.
    pub gaps: u64,
    /// The packet identifier that was given last.
    pub last_id: u16,
    /// The will.
    pub will: Option<WillRecord<'a>>,
    /// The subscriptions, in the order of their grants.
    pub subscriptions: Vec<SubscriptionRecord<'a>>,
    /// Of the messages up to this sequence number, the session is owed only those in `owed`; later ones it is
    /// owed by its subscriptions.
    pub through: u64,
    /// Later messages of QoS 2 that its client has already.
    pub done: Vec<u64>,
    /// Messages that it is owed, in the order of sending.
    pub owed: Vec<OwedRecord<'a>>,
}

/// The will of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WillRecord<'a> {
    /// Its topic, below the client's mount.
    pub topic: &'a str,
    /// Raw properties that travel with the message.
    pub properties: &'a [u8],
    /// Application message.
    pub payload: &'a [u8],
    /// 0, 1 or 2.
    pub qos: u8,
    /// Will Retain.
    pub retain: bool,
    /// Will Delay Interval in seconds.
    pub delay: u32,
    /// Message Expiry Interval in seconds, counted from the publication.
    pub message_expiry: Option<u32>,
}

/// A subscription of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscriptionRecord<'a> {
    /// The topic filter, below the client's mount.
    pub name: &'a str,
    /// Granted QoS and options, as the options byte of MQTT 5 (§3.8.3.1).
    pub options: u8,
    /// The QoS that the client asked for.
    pub asked: u8,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// The length of the client's mount in bytes, where the filter begins with a wildcard below it.
    pub wild_below: Option<NonZeroU16>,
}

const ANONYMOUS: u8 = 1;
const BRIDGE: u8 = 1 << 1;
const OVER: u8 = 1 << 2;
const DETACHED: u8 = 1 << 3;
const WILL: u8 = 1 << 4;
const ALL: u8 = ANONYMOUS | BRIDGE | OVER | DETACHED | WILL;

const RETAIN: u8 = 1 << 2;
const MESSAGE_EXPIRY: u8 = 1 << 3;

const IDENTIFIER: u8 = 1 << 2;
const WILD_BELOW: u8 = 1 << 3;

impl<'a> SessionRecord<'a> {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u64(self.incarnation);
        w.u8([
            (self.anonymous, ANONYMOUS),
            (self.bridge, BRIDGE),
            (self.over, OVER),
            (self.detached_at.is_some(), DETACHED),
            (self.will.is_some(), WILL),
        ]
        .iter()
        .map(|(set, flag)| if *set { *flag } else { 0 })
        .sum());
        w.u8(self.level);
        w.u32(self.expiry);
        if let Some(at) = self.detached_at {
            w.u64(at.as_u64());
        }
        w.u64(self.gaps);
        w.u16(self.last_id);
        w.address(self.address);
        w.bytes(self.key.as_bytes());
        w.bytes(self.principal.as_bytes());
        if let Some(will) = &self.will {
            will.encode(&mut w);
        }
        w.u32(self.subscriptions.len() as u32);
        for subscription in &self.subscriptions {
            subscription.encode(&mut w);
        }
        w.u64(self.through);
        w.u32(self.done.len() as u32);
        for sequence in &self.done {
            w.u64(*sequence);
        }
        w.u32(self.owed.len() as u32);
        for owed in &self.owed {
            owed.encode(&mut w);
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
        let incarnation = r.u64()?;
        let flags = r.u8().filter(|flags| flags & !ALL == 0)?;
        let level = r.u8()?;
        let expiry = r.u32()?;
        let detached_at = match flags & DETACHED {
            0 => None,
            _ => Some(UnixMillis::new(r.u64()?)),
        };
        let (gaps, last_id) = (r.u64()?, r.u16()?);
        let address = r.address()?;
        let (key, principal) = (r.text()?, r.text()?);
        let will = match flags & WILL {
            0 => None,
            _ => Some(WillRecord::read(r)?),
        };
        let subscriptions = r.u32()?;
        // A damaged number must not reserve memory.
        let subscriptions = (0..subscriptions).map(|_| SubscriptionRecord::read(r));
        let subscriptions = subscriptions.collect::<Option<_>>()?;
        let through = r.u64()?;
        let done = r.u32()?;
        let done = (0..done).map(|_| r.u64()).collect::<Option<_>>()?;
        let owed = r.u32()?;
        let owed = (0..owed).map(|_| OwedRecord::read(r));
        let owed = owed.collect::<Option<_>>()?;
        Some(Self {
            incarnation,
            key,
            principal,
            anonymous: flags & ANONYMOUS != 0,
            address,
            level,
            bridge: flags & BRIDGE != 0,
            over: flags & OVER != 0,
            expiry,
            detached_at,
            gaps,
            last_id,
            will,
            subscriptions,
            through,
            done,
            owed,
        })
    }
}

impl<'a> WillRecord<'a> {
    fn encode(&self, w: &mut Writer<'_>) {
        let retain = if self.retain { RETAIN } else { 0 };
        let expires = self.message_expiry.map_or(0, |_| MESSAGE_EXPIRY);
        w.u8(self.qos | retain | expires);
        w.u32(self.delay);
        if let Some(seconds) = self.message_expiry {
            w.u32(seconds);
        }
        w.bytes(self.topic.as_bytes());
        w.bytes(self.properties);
        w.bytes(self.payload);
    }

    fn read(r: &mut Reader<'a>) -> Option<Self> {
        let flags = r.u8()?;
        let qos = flags & 3;
        let known = flags & !(3 | RETAIN | MESSAGE_EXPIRY) == 0 && qos < 3;
        let delay = r.u32().filter(|_| known)?;
        let message_expiry = match flags & MESSAGE_EXPIRY {
            0 => None,
            _ => Some(r.u32()?),
        };
        Some(Self {
            topic: r.text()?,
            properties: r.bytes()?,
            payload: r.bytes()?,
            qos,
            retain: flags & RETAIN != 0,
            delay,
            message_expiry,
        })
    }
}

impl<'a> SubscriptionRecord<'a> {
    fn encode(&self, w: &mut Writer<'_>) {
        let identifier = self.identifier.map_or(0, |_| IDENTIFIER);
        let wild_below = self.wild_below.map_or(0, |_| WILD_BELOW);
        w.u8(self.asked | identifier | wild_below);
        w.u8(self.options);
        if let Some(identifier) = self.identifier {
            w.u32(identifier.get());
        }
        if let Some(bytes) = self.wild_below {
            w.u16(bytes.get());
        }
        w.bytes(self.name.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Option<Self> {
        let flags = r.u8()?;
        let asked = flags & 3;
        let known = flags & !(3 | IDENTIFIER | WILD_BELOW) == 0 && asked < 3;
        let options = r.u8().filter(|_| known)?;
        let identifier = match flags & IDENTIFIER {
            0 => None,
            _ => Some(NonZeroU32::new(r.u32()?)?),
        };
        let wild_below = match flags & WILD_BELOW {
            0 => None,
            _ => Some(NonZeroU16::new(r.u16()?)?),
        };
        Some(Self {
            name: r.text()?,
            options,
            asked,
            identifier,
            wild_below,
        })
    }
}

/// The body of the record that says that an incarnation of a session has ended.
pub fn encode_end(incarnation: u64) -> [u8; END_BYTES] {
    let mut body = [RECORDS_VERSION; END_BYTES];
    body[1..].copy_from_slice(&incarnation.to_le_bytes());
    body
}

/// The incarnation that a record of [`encode_end`] ends.
///
/// # Errors
/// [`RecordError`].
pub fn decode_end(body: &[u8]) -> Result<u64, RecordError> {
    let mut r = versioned(body)?;
    r.u64()
        .filter(|_| r.is_empty())
        .ok_or(RecordError::Malformed)
}

/// The fields behind the version.
fn versioned(body: &[u8]) -> Result<Reader<'_>, RecordError> {
    let mut r = Reader(body);
    match r.u8() {
        Some(RECORDS_VERSION) => Ok(r),
        Some(version) if version > RECORDS_VERSION => Err(RecordError::Version(version)),
        _ => Err(RecordError::Malformed),
    }
}

#[cfg(test)]
mod tests;
