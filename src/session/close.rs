//! Why a session's connection must end.

use crate::mqtt::ReasonCode;

/// Why a connection must end: one value from the place that decides it to the log, the metric
/// and the DISCONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// The client sent DISCONNECT 0x00, which discards its will [MQTT-3.14.4-3].
    Disconnect,
    /// The client sent DISCONNECT with another reason code: its will is published.
    DisconnectWithWill,
    /// A packet arrived for a session that has no connection.
    NotConnected,
    /// A second CONNECT on one connection [MQTT-3.1.0-2].
    SecondConnect,
    /// AUTH, although CONNECT named no authentication method [MQTT-4.12.0-6].
    AuthWithoutMethod,
    /// A packet type that only servers send.
    ServerPacket,
    /// A packet type that belongs on the control stream arrived on a data stream.
    ControlStreamOnly,
    /// DISCONNECT sets a Session Expiry Interval that CONNECT had at zero [MQTT-3.14.2-2].
    ExpirySetOnDisconnect,
    /// SUBSCRIBE with the packet identifier of one that is not answered yet [MQTT-2.2.1-3].
    PacketIdInUse,
    /// A Topic Alias above our Topic Alias Maximum [MQTT-3.3.2-9].
    TopicAliasAboveMaximum,
    /// A Topic Alias without a topic before the client defined it.
    TopicAliasUndefined,
    /// The topics behind the client's aliases are longer, all together, than we keep.
    TopicAliasBytes,
    /// PUBLISH above the Maximum QoS that CONNACK announced [MQTT-3.2.2-11].
    QosNotSupported,
    /// RETAIN, although CONNACK announced that it is not available [MQTT-3.2.2-14].
    RetainNotSupported,
    /// More unanswered publishes than `limits.receive_max_hard`; of QoS 2, than our Receive Maximum
    /// [MQTT-3.3.4-9].
    ReceiveMaximumExceeded,
    /// A filter was refused to an MQTT 3.1 client, whose SUBACK has no code for it.
    SubscribeRefused,
    /// An UNSUBSCRIBE of more than 65,535 filters, which 3.x cannot be told to be refused.
    UnsubscribeFilters,
    /// No packet for one and a half times the Keep Alive [MQTT-3.1.2-22].
    KeepAlive,
    /// The socket took too little output within `limits.write_stall`.
    WriteStall,
    /// Another connection took the session over [MQTT-3.1.4-3].
    TakenOver,
    /// The session's queue is full and `session.queue_full` is `end_session`.
    SessionQueueFull,
    /// The client does not acknowledge, and the budget of all queues is used up.
    QueueBudget,
    /// The session ended while the connection was still there.
    SessionEnded,
    /// An operator ended the session.
    Operator,
    /// The client's user was removed.
    NotAuthorized,
    /// The process is ending.
    ShuttingDown,
}

impl CloseReason {
    /// The reason code for an MQTT 5 client's DISCONNECT. After the client's own DISCONNECT nothing
    /// is sent: see [`CloseReason::by_client`].
    pub fn reason_code(self) -> ReasonCode {
        match self {
            Self::Disconnect => ReasonCode::SUCCESS,
            Self::DisconnectWithWill => ReasonCode::DISCONNECT_WITH_WILL_MESSAGE,
            Self::NotConnected
            | Self::SecondConnect
            | Self::AuthWithoutMethod
            | Self::ServerPacket
            | Self::ControlStreamOnly
            | Self::ExpirySetOnDisconnect
            | Self::PacketIdInUse
            | Self::TopicAliasUndefined => ReasonCode::PROTOCOL_ERROR,
            Self::TopicAliasAboveMaximum => ReasonCode::TOPIC_ALIAS_INVALID,
            Self::QosNotSupported => ReasonCode::QOS_NOT_SUPPORTED,
            Self::RetainNotSupported => ReasonCode::RETAIN_NOT_SUPPORTED,
            Self::ReceiveMaximumExceeded => ReasonCode::RECEIVE_MAXIMUM_EXCEEDED,
            Self::SubscribeRefused => ReasonCode::NOT_AUTHORIZED,
            Self::KeepAlive => ReasonCode::KEEP_ALIVE_TIMEOUT,
            Self::TakenOver | Self::SessionEnded => ReasonCode::SESSION_TAKEN_OVER,
            Self::TopicAliasBytes
            | Self::UnsubscribeFilters
            | Self::WriteStall
            | Self::SessionQueueFull
            | Self::QueueBudget => ReasonCode::QUOTA_EXCEEDED,
            Self::Operator => ReasonCode::ADMINISTRATIVE_ACTION,
            Self::NotAuthorized => ReasonCode::NOT_AUTHORIZED,
            Self::ShuttingDown => ReasonCode::SERVER_SHUTTING_DOWN,
        }
    }

    /// One phrase for the log.
    pub fn text(self) -> &'static str {
        match self {
            Self::Disconnect => "DISCONNECT",
            Self::DisconnectWithWill => "DISCONNECT with will",
            Self::NotConnected => "the session has no connection",
            Self::SecondConnect => "a second CONNECT [MQTT-3.1.0-2]",
            Self::AuthWithoutMethod => "AUTH without an authentication method",
            Self::ServerPacket => "a packet that only servers send",
            Self::ControlStreamOnly => "a packet that belongs on the control stream",
            Self::ExpirySetOnDisconnect => "DISCONNECT sets an expiry that CONNECT had at zero",
            Self::PacketIdInUse => "a packet identifier that is in use [MQTT-2.2.1-3]",
            Self::TopicAliasAboveMaximum => "a topic alias above our maximum [MQTT-3.3.2-9]",
            Self::TopicAliasUndefined => "a topic alias that was never defined",
            Self::TopicAliasBytes => "the topics behind the client's aliases are too long to keep",
            Self::QosNotSupported => "a QoS above the announced maximum [MQTT-3.2.2-11]",
            Self::RetainNotSupported => "RETAIN where the broker keeps none [MQTT-3.2.2-14]",
            Self::ReceiveMaximumExceeded => {
                "more unanswered publishes than limits.receive_max_hard, or than limits.receive_max of QoS 2"
            }
            Self::SubscribeRefused => "a refused filter, which MQTT 3.1 cannot be told",
            Self::UnsubscribeFilters => "an UNSUBSCRIBE of more than 65,535 filters",
            Self::KeepAlive => "no packet for one and a half times the Keep Alive [MQTT-3.1.2-22]",
            Self::WriteStall => "the socket took too little within limits.write_stall",
            Self::TakenOver => "another connection has the session now",
            Self::SessionQueueFull => {
                "the session's queue is full (session.queue_full = \"end_session\")"
            }
            Self::QueueBudget => {
                "the client does not acknowledge, and the queues' budget is used up"
            }
            Self::SessionEnded => "the session was ended under the connection",
            Self::Operator => "an operator ended the session",
            Self::NotAuthorized => "the user was removed",
            Self::ShuttingDown => "the process is ending",
        }
    }

    /// The client ended the connection itself: nothing is sent back.
    pub fn by_client(self) -> bool {
        matches!(self, Self::Disconnect | Self::DisconnectWithWill)
    }

    /// The client's will is discarded [MQTT-3.14.4-3].
    pub fn discards_will(self) -> bool {
        self == Self::Disconnect
    }
}
