//! Why a connection ends: one value from its source to the log, the metric, the DISCONNECT and the
//! transport's close.

use crate::mqtt::{Error, ReasonCode};
use crate::session::CloseReason;
use crate::telemetry::{DisconnectReason, StreamReason, metrics};
use crate::transport::{CloseHow, Closed};

/// Why a connection ends. `Display` gives the reason for the log and contains no text that the client
/// chose.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The session or the router ends it.
    #[error("{}", .0.text())]
    Session(CloseReason),
    /// A packet cannot be decoded.
    #[error("{0}")]
    Packet(Error),
    /// The transport ended.
    #[error("{0}")]
    Transport(Closed),
    /// A packet was not complete within `limits.packet_deadline`.
    #[error("a packet was not complete within limits.packet_deadline")]
    PacketDeadline,
    /// The incomplete packets of all clients are over their budget, and this client has one of them.
    #[error("incomplete packets of all clients use up their budget")]
    InputBudget,
    /// The connection's task panicked. Nothing more is sent: the output may end within a packet.
    #[error("its task panicked")]
    Panicked,
}

impl End {
    /// The end for which the session or the router asks; counts a packet that broke the protocol.
    pub(super) fn from_close(reason: CloseReason) -> Self {
        let end = Self::Session(reason);
        if !reason.by_client() && end.how() == CloseHow::Protocol {
            end.count_packet();
        }
        end
    }

    /// The end after a packet that cannot be decoded, which is counted.
    pub(super) fn from_error(error: Error) -> Self {
        let end = Self::Packet(error);
        end.count_packet();
        end
    }

    fn count_packet(&self) {
        let code = self.code();
        metrics().packet_rejected(code.0, code.name());
    }

    /// Whether the connection is lost: nothing more can be sent.
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Panicked
                | Self::Transport(
                    Closed::Eof | Closed::Reset(_) | Closed::StreamReset(_) | Closed::Io(_)
                )
        )
    }

    /// Whether the client sent DISCONNECT.
    pub fn is_by_client(&self) -> bool {
        matches!(self, Self::Session(reason) if reason.by_client())
    }

    /// Whether the client sent DISCONNECT 0x00, which discards its will [MQTT-3.14.4-3].
    pub fn discards_will(&self) -> bool {
        matches!(self, Self::Session(reason) if reason.discards_will())
    }

    /// The label of the metric and of the log.
    pub fn label(&self) -> DisconnectReason {
        use DisconnectReason as D;
        match self {
            Self::Session(reason) => label_and_how(*reason).0,
            Self::Packet(error) => match error {
                Error::TooLarge { .. } => D::TooLarge,
                Error::Protocol(_) => D::Protocol,
                Error::TopicName(_) | Error::TopicFilter(_) => D::Topic,
                Error::TopicAlias(_) => D::TopicAlias,
                Error::Malformed(_) | Error::UnsupportedVersion { .. } | Error::ProtocolName => {
                    D::Malformed
                }
            },
            Self::Transport(closed) => match closed {
                Closed::Eof | Closed::Reset(_) => D::Closed,
                Closed::TooLarge => D::TooLarge,
                Closed::TooManyResets => D::Quota,
                Closed::Violation(_) => D::Protocol,
                Closed::StreamReset(_) | Closed::Io(_) => D::Io,
            },
            Self::PacketDeadline => D::PacketDeadline,
            Self::InputBudget => D::Quota,
            Self::Panicked => D::Panic,
        }
    }

    /// The reason code of the DISCONNECT that an MQTT 5 client is sent; SUCCESS: none is sent.
    pub fn code(&self) -> ReasonCode {
        match self {
            Self::Session(reason) if reason.by_client() => ReasonCode::SUCCESS,
            Self::Session(reason) => reason.reason_code(),
            Self::Packet(error) => error.reason_code(),
            Self::Transport(closed) => match closed {
                Closed::Eof | Closed::Reset(_) | Closed::StreamReset(_) | Closed::Io(_) => {
                    ReasonCode::SUCCESS
                }
                Closed::TooLarge => ReasonCode::PACKET_TOO_LARGE,
                Closed::TooManyResets => ReasonCode::QUOTA_EXCEEDED,
                Closed::Violation(_) => ReasonCode::PROTOCOL_ERROR,
            },
            Self::PacketDeadline | Self::InputBudget => ReasonCode::QUOTA_EXCEEDED,
            Self::Panicked => ReasonCode::UNSPECIFIED_ERROR,
        }
    }

    /// How the transport closes.
    pub fn how(&self) -> CloseHow {
        match self {
            Self::Session(reason) => label_and_how(*reason).1,
            Self::Packet(_) | Self::PacketDeadline | Self::InputBudget | Self::Panicked => {
                CloseHow::Protocol
            }
            Self::Transport(closed) => match closed {
                Closed::Eof | Closed::Reset(_) | Closed::StreamReset(_) | Closed::Io(_) => {
                    CloseHow::Normal
                }
                Closed::TooLarge | Closed::Violation(_) => CloseHow::Protocol,
                Closed::TooManyResets => CloseHow::Overload,
            },
        }
    }

    /// The label of a reset, if this fault of a packet on a data stream ends only that stream; `None`:
    /// it ends the connection.
    pub(super) fn stream_reason(&self) -> Option<StreamReason> {
        use StreamReason as S;
        match self {
            Self::Session(reason) => stream_reason(*reason),
            Self::Packet(error) => Some(match error {
                Error::TooLarge { .. } => S::TooLarge,
                Error::Protocol(_)
                | Error::TopicName(_)
                | Error::TopicFilter(_)
                | Error::TopicAlias(_) => S::Protocol,
                Error::Malformed(_) | Error::UnsupportedVersion { .. } | Error::ProtocolName => {
                    S::Malformed
                }
            }),
            Self::Transport(_) | Self::Panicked => None,
            Self::PacketDeadline => Some(S::PacketDeadline),
            Self::InputBudget => Some(S::Quota),
        }
    }
}

/// The metric's label for a close reason, and how the transport closes.
fn label_and_how(reason: CloseReason) -> (DisconnectReason, CloseHow) {
    use CloseReason as C;
    use DisconnectReason as D;
    match reason {
        C::Disconnect => (D::Normal, CloseHow::Normal),
        C::DisconnectWithWill => (D::NormalWithWill, CloseHow::Normal),
        C::NotConnected
        | C::SecondConnect
        | C::AuthWithoutMethod
        | C::ServerPacket
        | C::ControlStreamOnly
        | C::ExpirySetOnDisconnect
        | C::PacketIdInUse
        | C::TopicAliasUndefined => (D::Protocol, CloseHow::Protocol),
        C::TopicAliasAboveMaximum => (D::TopicAlias, CloseHow::Protocol),
        C::QosNotSupported | C::RetainNotSupported => (D::NotSupported, CloseHow::Protocol),
        C::ReceiveMaximumExceeded => (D::ReceiveMaximum, CloseHow::Protocol),
        C::SubscribeRefused => (D::Other, CloseHow::Normal),
        C::KeepAlive => (D::KeepAlive, CloseHow::Normal),
        C::WriteStall => (D::WriteStall, CloseHow::Overload),
        C::TopicAliasBytes | C::UnsubscribeFilters | C::SessionQueueFull | C::QueueBudget => {
            (D::Quota, CloseHow::Overload)
        }
        C::TakenOver => (D::TakenOver, CloseHow::Normal),
        C::SessionEnded => (D::SessionEnded, CloseHow::Normal),
        C::Operator | C::NotAuthorized => (D::Admin, CloseHow::Normal),
        C::ShuttingDown => (D::Draining, CloseHow::GoingAway),
    }
}

/// The label of a reset, if the session's fault with a packet ends only the packet's data stream.
fn stream_reason(reason: CloseReason) -> Option<StreamReason> {
    use CloseReason as C;
    use DisconnectReason as D;
    if matches!(reason, C::SessionQueueFull | C::QueueBudget) {
        // The session ended meanwhile, and not for this packet.
        return None;
    }
    match label_and_how(reason).0 {
        D::Protocol | D::TopicAlias | D::Topic | D::NotSupported => Some(StreamReason::Protocol),
        D::Quota => Some(StreamReason::Quota),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::transport::{FrameError, ResetReason, Violation};

    #[test]
    fn the_end_of_a_session_is_not_the_fault_of_a_data_stream() {
        for reason in [CloseReason::SessionQueueFull, CloseReason::QueueBudget] {
            assert_eq!(End::Session(reason).stream_reason(), None);
        }
        let fault = End::Session(CloseReason::TopicAliasBytes).stream_reason();
        assert_eq!(fault, Some(StreamReason::Quota));
    }

    #[test]
    fn ends_have_their_label_code_and_close() {
        use CloseHow as H;
        use DisconnectReason as D;
        let broken = Violation::WebSocket(FrameError::Text);
        for (end, label, code, how) in [
            (End::Transport(Closed::Eof), D::Closed, 0, H::Normal),
            (
                End::Transport(Closed::Reset(ResetReason::ByPeer)),
                D::Closed,
                0,
                H::Normal,
            ),
            (
                End::Transport(Closed::Io(io::Error::other("x"))),
                D::Io,
                0,
                H::Normal,
            ),
            (
                End::Transport(Closed::Violation(broken)),
                D::Protocol,
                0x82,
                H::Protocol,
            ),
            (
                End::Transport(Closed::TooLarge),
                D::TooLarge,
                0x95,
                H::Protocol,
            ),
            (
                End::Transport(Closed::TooManyResets),
                D::Quota,
                0x97,
                H::Overload,
            ),
            (End::PacketDeadline, D::PacketDeadline, 0x97, H::Protocol),
            (End::InputBudget, D::Quota, 0x97, H::Protocol),
            (
                End::Session(CloseReason::Disconnect),
                D::Normal,
                0,
                H::Normal,
            ),
            (
                End::Session(CloseReason::TakenOver),
                D::TakenOver,
                0x8E,
                H::Normal,
            ),
            (
                End::Packet(Error::TopicFilter("x")),
                D::Topic,
                0x8F,
                H::Protocol,
            ),
        ] {
            let found = (end.label(), end.code().0, end.how());
            assert_eq!(found, (label, code, how), "{end:?}");
            assert_eq!(end.is_lost(), matches!(label, D::Closed | D::Io), "{end:?}");
        }
    }

    #[test]
    fn a_full_receive_maximum_ends_the_connection_also_from_a_data_stream() {
        let end = End::Session(CloseReason::ReceiveMaximumExceeded);
        assert_eq!(end.stream_reason(), None);
        let end = End::Session(CloseReason::TopicAliasUndefined);
        assert_eq!(end.stream_reason(), Some(StreamReason::Protocol));
    }
}
