//! Why a link's connection to the broker ended.

use std::io;

use crate::mqtt::{Error, ReasonCode};
use crate::telemetry::LinkDownReason;

use crate::upstream::role::Role;

/// Why a link's connection ended, from its source to the log, the metric label and the DISCONNECT
/// that is sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkEnd {
    /// The broker closed the connection.
    #[error("the broker closed the connection")]
    Closed,
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The broker sent DISCONNECT.
    #[error("the broker sent DISCONNECT: {}", .0.name())]
    Disconnect(ReasonCode),
    /// A PINGREQ got no answer, and nothing else arrived either.
    #[error("the broker answers no PINGREQ")]
    KeepAlive,
    /// The broker sent bytes that are not a legal packet.
    #[error("the broker sent a packet that is not legal: {0}")]
    Malformed(Error),
    /// The broker sent a packet that has no place on a link of this role.
    #[error("the broker sent a packet that a {} link does not expect", .0.name())]
    Unexpected(Role),
    /// A SUBACK or UNSUBACK names no request.
    #[error("SUBACK or UNSUBACK for packet identifier {0}, which is not in use")]
    UnknownRequest(u16),
    /// All filters were placed anew, so the link has to begin again.
    #[error("filters were placed anew")]
    PlacedAnew,
    /// All links go to another server.
    #[error("the links go to another server")]
    Failover,
    /// The probe came back to a listener of this process.
    #[error(
        "upstream.servers leads to a listener of this Tidegate, so every message would circle: write \
         the broker's address"
    )]
    OwnListener,
    /// The link's task panicked.
    #[error("the link's task panicked")]
    Panicked,
    /// The process ends.
    #[error("shutting down")]
    Shutdown,
}

impl LinkEnd {
    /// The metric label.
    pub(crate) fn label(&self) -> LinkDownReason {
        match self {
            Self::Closed => LinkDownReason::Closed,
            Self::Io(_) => LinkDownReason::Io,
            Self::Disconnect(ReasonCode::SESSION_TAKEN_OVER) => LinkDownReason::TakenOver,
            Self::Disconnect(_) => LinkDownReason::Disconnect,
            Self::KeepAlive => LinkDownReason::KeepAlive,
            Self::Malformed(_)
            | Self::Unexpected(_)
            | Self::UnknownRequest(_)
            | Self::PlacedAnew => LinkDownReason::Protocol,
            Self::Failover => LinkDownReason::Failover,
            Self::OwnListener => LinkDownReason::Refused,
            Self::Panicked => LinkDownReason::Panic,
            Self::Shutdown => LinkDownReason::Shutdown,
        }
    }

    /// The reason code of the DISCONNECT that the broker is sent; `None`: the connection is closed
    /// without one.
    pub(crate) fn disconnect_code(&self) -> Option<ReasonCode> {
        match self {
            Self::Malformed(error) => Some(error.reason_code()),
            Self::Unexpected(_) | Self::UnknownRequest(_) => Some(ReasonCode::PROTOCOL_ERROR),
            Self::Shutdown => Some(ReasonCode::SUCCESS),
            _ => None,
        }
    }

    /// Whether the broker may have ended the connection because of a packet that it was sent.
    pub(crate) fn may_be_for_a_packet(&self) -> bool {
        use LinkDownReason::{Closed, Disconnect, Io};
        matches!(self.label(), Closed | Disconnect | Io)
    }
}
