//! Events at the broker, and their outcomes for one filter.

use crate::mqtt::QoS;

/// The meaning of a SUBACK for a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum SubackOutcome {
    /// It answers a SUBSCRIBE that nobody waits for any more.
    Stray,
    /// The broker refused. All clients that wait get this answer; clients that have the filter keep
    /// it.
    Refused,
    /// The broker granted.
    Granted {
        /// The QoS of the SUBSCRIBE. Clients that wait for more wait for the next SUBACK.
        asked: QoS,
        /// A client has asked for more meanwhile: another SUBSCRIBE is to be queued.
        again: bool,
        /// Clients were granted the filter before, without the broker's answer.
        presumed: bool,
    },
}

/// What the broker has of a link's session when the link has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkSession {
    /// The session is new and has no filters.
    New,
    /// An earlier CONNECT, whose answer was lost, may have begun the session: it may have no filters.
    Doubtful,
    /// The broker kept the session with all its filters.
    Resumed,
}

/// What a filter needs once its link is connected again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Resumed {
    /// Nothing.
    Rests,
    /// A SUBSCRIBE.
    Subscribe,
    /// A SUBSCRIBE: the broker granted the filter before, and may have forgotten it.
    Regain,
    /// An UNSUBSCRIBE.
    Unsubscribe,
    /// The broker does not have it and nobody wants it: it is to be removed.
    Remove,
}

/// How a filter that nobody uses is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Release {
    /// By an UNSUBSCRIBE on this link.
    Unsubscribe(u8),
    /// At once: the broker does not have it.
    Remove,
    /// Later: an answer of the broker, or a client's grant, is still to come.
    Later,
}

/// What an UNSUBACK leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Unsubacked {
    /// It answers an UNSUBSCRIBE that nobody waits for any more.
    Stray,
    /// A client has asked for the filter meanwhile: it is to be requested again at this QoS.
    Again(QoS),
    /// The filter is to be removed.
    Remove,
}
