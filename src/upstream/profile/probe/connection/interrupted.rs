//! Why a probe ends before its end.

use std::io;

use crate::mqtt::{Error, ReasonCode};

/// Why a step of a probe could not be completed.
#[derive(Debug, thiserror::Error)]
pub(in crate::upstream::profile::probe) enum Interrupted {
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The broker closed the connection.
    #[error("the broker closed the connection")]
    Closed,
    /// The broker sent DISCONNECT.
    #[error("the broker sent DISCONNECT: {}", .0.name())]
    Disconnect(ReasonCode),
    /// The broker sent bytes that are not a legal packet.
    #[error("a packet that is not legal: {0}")]
    Malformed(Error),
    /// An answer did not arrive before the deadline of the probe.
    #[error("no answer in time")]
    Timeout,
    /// A SUBACK refuses the filter with this code.
    #[error("SUBSCRIBE refused with 0x{0:02X}")]
    SubscribeRefused(u8),
    /// A SUBACK has no code.
    #[error("SUBACK without a code")]
    EmptySuback,
    /// A PUBACK refuses the publish.
    #[error("PUBLISH refused: {}", .0.name())]
    PublishRefused(ReasonCode),
    /// Far more arrived than the probe asked for.
    #[error("too much arrived")]
    TooMuch,
    /// The broker delivered no copy of a publish.
    #[error("nothing came back")]
    NothingDelivered,
}
