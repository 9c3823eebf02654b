//! Why bytes were refused.

use crate::mqtt::ReasonCode;

/// A refusal of received bytes. Every variant ends the connection (MQTT 5 §4.13).
///
/// The text names the rule, so that a log line with it can be acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes cannot be parsed as the specification says.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
    /// The packet parses, but is not allowed here or carries a value that is not allowed.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// A topic name that breaks §4.7.
    #[error("topic name invalid: {0}")]
    TopicName(&'static str),
    /// A topic filter that breaks §4.7 or §4.8.2.
    #[error("topic filter invalid: {0}")]
    TopicFilter(&'static str),
    /// A topic alias that can never be valid.
    #[error("topic alias invalid: {0}")]
    TopicAlias(&'static str),
    /// The packet, fixed header included, is larger than allowed. Sizes in bytes.
    #[error("packet of {size} bytes is larger than the {max} bytes allowed")]
    TooLarge {
        /// Size that the fixed header announces, fixed header included.
        size: u32,
        /// The bound that was set.
        max: u32,
    },
    /// The protocol name is known, its level is not ([MQTT-3.1.2-2]).
    #[error("protocol level {level} is not supported; use MQTT 5, 3.1.1 or 3.1")]
    UnsupportedVersion {
        /// The protocol level byte of the CONNECT.
        level: u8,
    },
    /// The protocol name is neither `MQTT` nor `MQIsdp` ([MQTT-3.1.2-1]).
    #[error("the protocol name is neither MQTT nor MQIsdp")]
    ProtocolName,
}

impl Error {
    /// The MQTT 5 reason code for the CONNACK or DISCONNECT that answers this.
    pub const fn reason_code(&self) -> ReasonCode {
        match self {
            Error::Malformed(_) => ReasonCode::MALFORMED_PACKET,
            Error::Protocol(_) => ReasonCode::PROTOCOL_ERROR,
            Error::TopicName(_) => ReasonCode::TOPIC_NAME_INVALID,
            Error::TopicFilter(_) => ReasonCode::TOPIC_FILTER_INVALID,
            Error::TopicAlias(_) => ReasonCode::TOPIC_ALIAS_INVALID,
            Error::TooLarge { .. } => ReasonCode::PACKET_TOO_LARGE,
            Error::UnsupportedVersion { .. } | Error::ProtocolName => {
                ReasonCode::UNSUPPORTED_PROTOCOL_VERSION
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_lines() {
        let e = Error::TooLarge { size: 20, max: 16 };
        assert_eq!(e.reason_code(), ReasonCode::PACKET_TOO_LARGE);
        assert_eq!(
            e.to_string(),
            "packet of 20 bytes is larger than the 16 bytes allowed"
        );
        assert_eq!(Error::Malformed("x").reason_code().0, 0x81);
        assert_eq!(Error::Protocol("x").reason_code().0, 0x82);
        assert_eq!(Error::ProtocolName.reason_code().0, 0x84);
        assert_eq!(Error::TopicFilter("x").reason_code().0, 0x8F);
        assert_eq!(Error::TopicName("x").reason_code().0, 0x90);
        assert_eq!(Error::TopicAlias("x").reason_code().0, 0x94);
    }
}
