//! Why a connection ends, and what is said of it: to the client, in the log, in the metrics.

use crate::mqtt::{Error, ReasonCode};
use crate::router::WRITE_STALL;
use crate::session::Close;
use crate::telemetry::{DisconnectReason, metrics};
use crate::transport::{CloseHow, Closed};

/// Why the connection ends.
pub(super) struct End {
    pub label: DisconnectReason,
    /// Sent to an MQTT 5 client; SUCCESS: nothing is sent.
    pub code: ReasonCode,
    pub why: std::borrow::Cow<'static, str>,
    /// DISCONNECT 0x00: the will is discarded.
    pub normal: bool,
    pub how: CloseHow,
}

impl End {
    pub fn quota(why: &'static str) -> Self {
        Self {
            label: DisconnectReason::Quota,
            code: ReasonCode::QUOTA_EXCEEDED,
            why: why.into(),
            normal: false,
            how: CloseHow::Protocol,
        }
    }

    pub fn from_close(close: Close) -> Self {
        use DisconnectReason as D;
        let code = close.reason;
        let (label, how) = match code {
            ReasonCode::SUCCESS => (D::Normal, CloseHow::Normal),
            ReasonCode::DISCONNECT_WITH_WILL_MESSAGE => (D::NormalWithWill, CloseHow::Normal),
            ReasonCode::SESSION_TAKEN_OVER => (D::TakenOver, CloseHow::Normal),
            ReasonCode::KEEP_ALIVE_TIMEOUT => (D::KeepAlive, CloseHow::Normal),
            ReasonCode::SERVER_SHUTTING_DOWN => (D::Draining, CloseHow::GoingAway),
            ReasonCode::RECEIVE_MAXIMUM_EXCEEDED => (D::ReceiveMaximum, CloseHow::Protocol),
            ReasonCode::TOPIC_ALIAS_INVALID => (D::TopicAlias, CloseHow::Protocol),
            ReasonCode::TOPIC_NAME_INVALID | ReasonCode::TOPIC_FILTER_INVALID => {
                (D::Topic, CloseHow::Protocol)
            }
            ReasonCode::QOS_NOT_SUPPORTED | ReasonCode::RETAIN_NOT_SUPPORTED => {
                (D::NotSupported, CloseHow::Protocol)
            }
            _ if close == WRITE_STALL => (D::WriteStall, CloseHow::Overload),
            ReasonCode::QUOTA_EXCEEDED => (D::Quota, CloseHow::Overload),
            ReasonCode::PROTOCOL_ERROR => (D::Protocol, CloseHow::Protocol),
            _ => (D::Other, CloseHow::Normal),
        };
        let client_ended = matches!(label, D::Normal | D::NormalWithWill);
        if !client_ended && how == CloseHow::Protocol {
            metrics().packet_rejected(code.0, code.name());
        }
        Self {
            label,
            code: if client_ended {
                ReasonCode::SUCCESS
            } else {
                code
            },
            why: close.why.into(),
            normal: label == D::Normal,
            how,
        }
    }

    pub fn from_error(error: &Error) -> Self {
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

    pub fn from_closed(closed: Closed) -> Self {
        use DisconnectReason as D;
        let (label, code, how) = match &closed {
            Closed::Eof | Closed::Reset(_) => (D::Closed, ReasonCode::SUCCESS, CloseHow::Normal),
            Closed::TooLarge => (
                D::TooLarge,
                ReasonCode::PACKET_TOO_LARGE,
                CloseHow::Protocol,
            ),
            Closed::Quota(_) => (D::Quota, ReasonCode::QUOTA_EXCEEDED, CloseHow::Overload),
            Closed::Violation { .. } => {
                (D::Protocol, ReasonCode::PROTOCOL_ERROR, CloseHow::Protocol)
            }
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
