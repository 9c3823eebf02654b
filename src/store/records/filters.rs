//! The records of filters at the broker, and of the links' sessions there.
//!
//! A *link session* is the broker's session of one data link or shared link. It has a number that no
//! other one ever has. A filter's record names the link session in which the broker has the filter, or may
//! have it: when the broker has lost that session, one new record of the link makes the records of its
//! filters void.
//!
//! The last record of a filter number counts, and so does the last record of a client identifier.

mod found;

use std::num::NonZeroU64;

use crate::time::UnixMillis;

use super::fields::{Reader, Writer};
use super::{RECORDS_VERSION, RecordError, versioned};
pub use found::{FoundFilter, FoundFilters, FoundLink, FoundRest};

/// The kind of a [`FilterRecord`] in the log.
pub const FILTER: u8 = 3;
/// The kind of a [`FilterGoneRecord`] in the log.
pub const FILTER_GONE: u8 = 4;
/// The kind of a [`LinkRecord`] in the log.
pub const LINK: u8 = 5;

/// A filter that the broker has or may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterRecord<'a> {
    /// Its number, from which its Subscription Identifier follows.
    pub number: u32,
    /// The link session in which the broker has it.
    pub session: NonZeroU64,
    /// The topic filter.
    pub name: &'a str,
    /// The QoS of the last SUBSCRIBE that was or may have been sent: 0, 1 or 2.
    pub asked: u8,
    /// How far it is at the broker.
    pub state: FilterState,
}

/// How far a filter is at the broker, as its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterState {
    /// A SUBSCRIBE is to be sent, or is sent and not answered.
    Asked,
    /// The broker has granted it at this QoS.
    Granted(u8),
    /// The broker has granted it at this QoS, and a SUBSCRIBE for a higher one is to be sent, or is sent
    /// and not answered.
    Rising(u8),
    /// An UNSUBSCRIBE is to be sent, or is sent and not answered.
    Leaving,
}

const ASKED: u8 = 0;
const GRANTED: u8 = 1;
const RISING: u8 = 2;
const LEAVING: u8 = 3;

impl<'a> FilterRecord<'a> {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (state, granted) = match self.state {
            FilterState::Asked => (ASKED, 0),
            FilterState::Granted(qos) => (GRANTED, qos),
            FilterState::Rising(qos) => (RISING, qos),
            FilterState::Leaving => (LEAVING, 0),
        };
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u32(self.number);
        w.u64(self.session.get());
        w.u8(state | granted << 2 | self.asked << 4);
        w.bytes(self.name.as_bytes());
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
        let number = r.u32()?;
        let session = NonZeroU64::new(r.u64()?)?;
        let byte = r.u8()?;
        let (granted, asked) = (byte >> 2 & 3, byte >> 4);
        let state = match (byte & 3, granted) {
            (ASKED, 0) => FilterState::Asked,
            (GRANTED, 0..=2) => FilterState::Granted(granted),
            (RISING, 0..=2) => FilterState::Rising(granted),
            (LEAVING, 0) => FilterState::Leaving,
            _ => return None,
        };
        Some(Self {
            number,
            session,
            name: r.text().filter(|_| asked <= 2)?,
            asked,
            state,
        })
    }
}

/// A filter that the broker does not have any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterGoneRecord {
    /// Its number.
    pub number: u32,
    /// Until when the number means no other filter, because messages with it may still come. `None`: it is
    /// free, or is still the number of this filter, which the broker did not take.
    pub rests_until: Option<UnixMillis>,
}

impl FilterGoneRecord {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u32(self.number);
        w.u8(self.rests_until.is_some().into());
        if let Some(until) = self.rests_until {
            w.u64(until.as_u64());
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
        Some(Self {
            number: r.u32()?,
            rests_until: match r.u8()? {
                0 => None,
                1 => Some(UnixMillis::new(r.u64()?)),
                _ => return None,
            },
        })
    }
}

/// The session of a data link or shared link at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkRecord<'a> {
    /// Names the link session.
    pub session: NonZeroU64,
    /// It is a shared link, and no data link.
    pub shared: bool,
    /// The number among the links of its role.
    pub number: u8,
    /// The broker has Subscription Identifiers, by which the filters were placed.
    pub identifiers: bool,
    /// Live messages of the broker keep RETAIN.
    pub keeps_retain: bool,
    /// How sure it is that the broker has the session.
    pub state: LinkState,
    /// The client identifier at the broker.
    pub client_id: &'a str,
    /// The server that has the session, as `upstream.servers` names it.
    pub server: &'a str,
}

/// How sure it is that the broker has a link session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// The broker has had it since the link last connected.
    Begun,
    /// A CONNECT was to be sent, or was sent, that may have begun another session in its place.
    InDoubt,
    /// It is ended, or is about to be.
    Ended,
}

const IN_DOUBT: u8 = 1;
const ENDED: u8 = 2;
const SHARED: u8 = 1 << 2;
const IDENTIFIERS: u8 = 1 << 3;
const KEEPS_RETAIN: u8 = 1 << 4;

impl<'a> LinkRecord<'a> {
    /// Appends the body of the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let state = match self.state {
            LinkState::Begun => 0,
            LinkState::InDoubt => IN_DOUBT,
            LinkState::Ended => ENDED,
        };
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let mut w = Writer(out);
        w.u8(RECORDS_VERSION);
        w.u64(self.session.get());
        w.u8(state
            | flag(self.shared, SHARED)
            | flag(self.identifiers, IDENTIFIERS)
            | flag(self.keeps_retain, KEEPS_RETAIN));
        w.u8(self.number);
        w.bytes(self.client_id.as_bytes());
        w.bytes(self.server.as_bytes());
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
        let session = NonZeroU64::new(r.u64()?)?;
        let flags = r.u8()?;
        let known = IN_DOUBT | ENDED | SHARED | IDENTIFIERS | KEEPS_RETAIN;
        let state = match flags & (IN_DOUBT | ENDED) {
            0 => LinkState::Begun,
            IN_DOUBT => LinkState::InDoubt,
            ENDED => LinkState::Ended,
            _ => return None,
        };
        Some(Self {
            session,
            shared: flags & SHARED != 0,
            number: r.u8().filter(|_| flags & !known == 0)?,
            identifiers: flags & IDENTIFIERS != 0,
            keeps_retain: flags & KEEPS_RETAIN != 0,
            state,
            client_id: r.text()?,
            server: r.text()?,
        })
    }
}

#[cfg(test)]
mod tests;
