//! Why a connection ends: what the client, the log and the metrics are told.

use crate::mqtt::{Error, ReasonCode};
use crate::session::CloseReason;
use crate::telemetry::{DisconnectReason, metrics};
use crate::transport::{CloseHow, Closed};

/// Why the connection ends.
#[derive(Debug)]
pub struct End {
    /// The label of the metric and of the log.
    pub label: DisconnectReason,
    /// Sent to an MQTT 5 client in DISCONNECT; SUCCESS: nothing is sent.
    pub code: ReasonCode,
    /// For the log.
    pub why: std::borrow::Cow<'static, str>,
    /// The client sent DISCONNECT 0x00: its will is discarded.
    pub normal: bool,
    /// How the transport closes.
    pub how: CloseHow,
}

impl End {
    /// Whether the connection is lost: nothing more can be sent.
    pub fn is_lost(&self) -> bool {
        matches!(self.label, DisconnectReason::Closed | DisconnectReason::Io)
    }

    /// Whether the client sent DISCONNECT.
    pub fn is_by_client(&self) -> bool {
        use DisconnectReason as D;
        matches!(self.label, D::Normal | D::NormalWithWill)
    }

    /// A limit of ours is reached.
    pub(super) fn quota(why: &'static str) -> Self {
        Self {
            label: DisconnectReason::Quota,
            code: ReasonCode::QUOTA_EXCEEDED,
            why: why.into(),
            normal: false,
            how: CloseHow::Protocol,
        }
    }

    /// The end that `reason` asks for; counts a packet that broke the protocol.
    pub fn from_close(reason: CloseReason) -> Self {
        let (label, how) = label_and_how(reason);
        let code = reason.reason_code();
        if !reason.by_client() && how == CloseHow::Protocol {
            metrics().packet_rejected(code.0, code.name());
        }
        Self {
            label,
            code: match reason.by_client() {
                true => ReasonCode::SUCCESS,
                false => code,
            },
            why: reason.text().into(),
            normal: reason.discards_will(),
            how,
        }
    }

    /// A packet that cannot be decoded.
    pub(super) fn from_error(error: &Error) -> Self {
        use DisconnectReason as D;
        let code = error.reason_code();
        metrics().packet_rejected(code.0, code.name());
        let label = match code {
            ReasonCode::PACKET_TOO_LARGE => D::TooLarge,
            ReasonCode::PROTOCOL_ERROR => D::Protocol,
            ReasonCode::TOPIC_NAME_INVALID | ReasonCode::TOPIC_FILTER_INVALID => D::Topic,
            ReasonCode::TOPIC_ALIAS_INVALID => D::TopicAlias,
            _ => D::Malformed,
        };
        Self {
            label,
            code,
            why: error.to_string().into(),
            normal: false,
            how: CloseHow::Protocol,
        }
    }

    /// The transport ended.
    pub fn from_closed(closed: Closed) -> Self {
        use DisconnectReason as D;
        let (label, code, how) = match &closed {
            Closed::Eof | Closed::Reset(_) => (D::Closed, ReasonCode::SUCCESS, CloseHow::Normal),
            Closed::TooLarge => (
                D::TooLarge,
                ReasonCode::PACKET_TOO_LARGE,
                CloseHow::Protocol,
            ),
            Closed::TooManyResets => (D::Quota, ReasonCode::QUOTA_EXCEEDED, CloseHow::Overload),
            Closed::Violation(_) => (D::Protocol, ReasonCode::PROTOCOL_ERROR, CloseHow::Protocol),
            Closed::StreamReset(_) | Closed::Io(_) => {
                (D::Io, ReasonCode::SUCCESS, CloseHow::Normal)
            }
        };
        Self {
            label,
            code,
            why: closed.to_string().into(),
            normal: false,
            how,
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
        C::TopicLevels => (D::Topic, CloseHow::Protocol),
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
