//! Why a connection gets no session: one value from its source to the log, the metric and the CONNACK.

use crate::auth::Denial;
use crate::mqtt::{Error, ReasonCode};
use crate::router::Full;
use crate::telemetry::RefusedReason;
use crate::transport::{Closed, Detected, NameError};

/// Why a connection gets no session. `Display` gives the reason for the log and contains no text that
/// the client chose.
#[derive(Debug, thiserror::Error)]
pub enum RefusalCause {
    /// CONNECT was not complete within `limits.accept_deadline`.
    #[error("no complete CONNECT within limits.accept_deadline")]
    Deadline,
    /// The incomplete CONNECTs of all clients are over their budget.
    #[error("incomplete CONNECTs use up their budget")]
    ConnectBudget,
    /// The transport ended before CONNECT was complete.
    #[error("{0} before CONNECT was complete")]
    Closed(Closed),
    /// The transport ended before the password was checked.
    #[error("{0} while the password was checked")]
    ClosedDuringCheck(Closed),
    /// The password was not checked within `limits.accept_deadline`.
    #[error("the password could not be checked within limits.accept_deadline")]
    CheckDeadline,
    /// The bytes belong to another protocol than MQTT.
    #[error("no CONNECT; this looks like {0}")]
    OtherProtocol(Detected),
    /// CONNECT cannot be decoded.
    #[error("{error}{}", hint(*.detected))]
    Packet {
        /// The rule that the bytes break.
        error: Error,
        /// The protocol of the bytes, where it is known and is not MQTT.
        detected: Option<Detected>,
    },
    /// The bytes of CONNECT changed between reading and use, which a fault of ours would cause.
    #[error("CONNECT changed while it was read")]
    Changed,
    /// The process is ending.
    #[error("the process is ending")]
    Draining,
    /// `limits.connect_rate_max` is exceeded.
    #[error("limits.connect_rate_max is exceeded")]
    Rate,
    /// An empty client identifier of MQTT 3.x without Clean Session [MQTT-3.1.3-8].
    #[error("an empty client identifier needs Clean Session [MQTT-3.1.3-8]")]
    EmptyClientId,
    /// CONNECT names an authentication method.
    #[error("enhanced authentication is not offered")]
    AuthMethod,
    /// The authenticator denies access, for another reason than the client's certificate.
    #[error("{0}")]
    Denied(Denial),
    /// The listener needs a client certificate.
    #[error("the client gave no certificate")]
    NoCertificate,
    /// The client's certificate does not name a client.
    #[error("{0}")]
    CertificateName(NameError),
    /// The name in the certificate is the principal of all anonymous clients.
    #[error("the name in its certificate stands for clients without one")]
    AnonymousCertificate,
    /// The client's names cannot be part of the listener's mount.
    #[error(
        "the listener's mount needs a user name or client identifier that can stand in a topic: \
         not empty, no wildcard, no /"
    )]
    Mount,
    /// The session of the client identifier belongs to another principal.
    #[error("the client identifier's session belongs to another principal")]
    OtherPrincipal,
    /// The client's protocol level has the bridge bit, and the broker cannot serve No Local.
    #[error(
        "a bridge asks for No Local, which a broker of MQTT 3.1.1 cannot serve; it may connect again \
         without the bridge bit of its protocol level"
    )]
    Bridge,
    /// `memory.sessions`, or the client's share of it, is used up.
    #[error("memory.sessions is used up ({0}): raise it, or end sessions that nobody needs")]
    SessionMemory(Full),
    /// `memory.sessions`, or the client's share of it, has no room for another session that is kept while
    /// its client is away.
    #[error(
        "memory.sessions is used up ({0}) to nine tenths, and no further session is kept: raise it, \
         set session.evict_after, or end sessions that nobody needs"
    )]
    NewSession(Full),
    /// The will's QoS is above the announced maximum [MQTT-3.2.2-12].
    #[error("the will's QoS is above the broker's maximum [MQTT-3.2.2-12]")]
    WillQos,
    /// A retained will, although retained messages are not available [MQTT-3.2.2-13].
    #[error("a retained will where the broker keeps none [MQTT-3.2.2-13]")]
    WillRetain,
    /// The will's topic has more levels than `limits.topic_levels_max`.
    #[error("the will's topic has more levels than limits.topic_levels_max")]
    WillTopicLevels,
    /// No rule allows the will's topic.
    #[error("no rule allows the will's topic")]
    WillForbidden,
    /// No rule allows the Response Topic of the will; the reason code of the refusal.
    #[error("no rule allows the Response Topic of the will")]
    WillResponseTopic(ReasonCode),
    /// The will's topic with the listener's mount has more than 65,535 bytes.
    #[error("the will's topic is too long below the listener's mount")]
    WillTopicBytes,
}

fn hint(detected: Option<Detected>) -> String {
    detected.map_or_else(String::new, |what| format!("; this looks like {what}"))
}

impl RefusalCause {
    /// The label of the metric and of the log.
    pub fn label(&self) -> RefusedReason {
        self.label_and_code().0
    }

    /// The reason code of CONNACK.
    pub fn code(&self) -> ReasonCode {
        self.label_and_code().1
    }

    fn label_and_code(&self) -> (RefusedReason, ReasonCode) {
        use ReasonCode as C;
        use RefusedReason as R;
        match self {
            Self::Deadline => (R::Timeout, C::SUCCESS),
            Self::ConnectBudget => (R::Memory, C::QUOTA_EXCEEDED),
            Self::SessionMemory(_) | Self::NewSession(_) => (R::SessionMemory, C::QUOTA_EXCEEDED),
            Self::Closed(closed) => {
                let label = match closed {
                    Closed::TooLarge => R::TooLarge,
                    Closed::Violation(_) => R::Protocol,
                    Closed::Eof
                    | Closed::Reset(_)
                    | Closed::TooManyResets
                    | Closed::StreamReset(_)
                    | Closed::Io(_) => R::Closed,
                };
                (label, C::SUCCESS)
            }
            Self::ClosedDuringCheck(_) => (R::Closed, C::SUCCESS),
            Self::CheckDeadline => (R::Timeout, C::SERVER_BUSY),
            Self::OtherProtocol(_) => (R::Protocol, C::PROTOCOL_ERROR),
            Self::Packet { error, .. } => {
                let label = match error {
                    Error::TooLarge { .. } => R::TooLarge,
                    Error::UnsupportedVersion { .. } => R::Version,
                    Error::Protocol(_) => R::Protocol,
                    Error::Malformed(_)
                    | Error::TopicName(_)
                    | Error::TopicFilter(_)
                    | Error::TopicAlias(_)
                    | Error::ProtocolName => R::Malformed,
                };
                (label, error.reason_code())
            }
            Self::Changed => (R::Malformed, C::MALFORMED_PACKET),
            Self::Draining => (R::Draining, C::SERVER_SHUTTING_DOWN),
            Self::Rate => (R::Rate, C::CONNECTION_RATE_EXCEEDED),
            Self::EmptyClientId | Self::OtherPrincipal => {
                (R::ClientId, C::CLIENT_IDENTIFIER_NOT_VALID)
            }
            Self::AuthMethod => (R::AuthMethod, C::BAD_AUTHENTICATION_METHOD),
            Self::Denied(denial) => match denial {
                Denial::Credentials => (R::BadCredentials, C::BAD_USER_NAME_OR_PASSWORD),
                Denial::ClientId => (R::ClientId, C::CLIENT_IDENTIFIER_NOT_VALID),
                Denial::Certificate => (R::NotAuthorized, C::NOT_AUTHORIZED),
                Denial::Busy => (R::Other, C::SERVER_UNAVAILABLE),
            },
            Self::NoCertificate
            | Self::CertificateName(_)
            | Self::AnonymousCertificate
            | Self::Mount
            | Self::WillForbidden => (R::NotAuthorized, C::NOT_AUTHORIZED),
            Self::WillResponseTopic(code) => (R::NotAuthorized, *code),
            Self::Bridge => (R::Version, C::UNSUPPORTED_PROTOCOL_VERSION),
            Self::WillQos => (R::Will, C::QOS_NOT_SUPPORTED),
            Self::WillRetain => (R::Will, C::RETAIN_NOT_SUPPORTED),
            Self::WillTopicLevels | Self::WillTopicBytes => (R::Will, C::TOPIC_NAME_INVALID),
        }
    }
}
