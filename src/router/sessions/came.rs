//! A message on its way to the members of one filter.

use crate::mqtt::Message;
use crate::session::{Incarnation, Session};
use crate::time::Millis;
use crate::topics::FilterId;

/// The way by which a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Source {
    /// A live message, with the origin mark of its publisher.
    Live(Option<Incarnation>),
    /// A live message that was too large to be kept: its receivers get a gap in its place.
    Skipped(Option<Incarnation>),
    /// A retained message that was fetched. Its publisher is unknown, so No Local hides it from all.
    Fetched,
}

impl Source {
    /// Whether No Local hides the message from `session`.
    pub(super) fn is_own(self, session: &Session) -> bool {
        match self {
            Self::Live(origin_mark) | Self::Skipped(origin_mark) => {
                origin_mark == Some(session.incarnation)
            }
            Self::Fetched => true,
        }
    }
}

/// A message that came by one filter.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct Came<'a> {
    pub message: &'a Message,
    pub filter: FilterId,
    pub source: Source,
    /// The message is one of an earlier process.
    pub replayed: Option<Replayed>,
    pub now: Millis,
}

/// The numbers of a message of an earlier process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) struct Replayed {
    /// Its sequence number.
    pub sequence: u64,
    /// The number with which it was given to the members of the filter.
    pub since: u64,
}
