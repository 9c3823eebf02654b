//! Reason codes (MQTT 5 §2.4) and the 3.x return codes that they map to.

/// A reason code of one byte. The type can hold any byte; decoding accepts only listed codes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ReasonCode(pub u8);

macro_rules! codes {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        /// The names of the specification.
        impl ReasonCode {
            $(#[doc = $text]
            pub const $name: ReasonCode = ReasonCode($value);)*

            /// The specification's name, for logs. 0x00 is "Success" whatever the packet.
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($value => $text,)*
                    _ => "Unknown",
                }
            }
        }
    };
}

codes! {
    SUCCESS = 0x00, "Success";
    GRANTED_QOS_1 = 0x01, "Granted QoS 1";
    GRANTED_QOS_2 = 0x02, "Granted QoS 2";
    DISCONNECT_WITH_WILL_MESSAGE = 0x04, "Disconnect with Will Message";
    NO_MATCHING_SUBSCRIBERS = 0x10, "No matching subscribers";
    NO_SUBSCRIPTION_EXISTED = 0x11, "No subscription existed";
    CONTINUE_AUTHENTICATION = 0x18, "Continue authentication";
    RE_AUTHENTICATE = 0x19, "Re-authenticate";
    UNSPECIFIED_ERROR = 0x80, "Unspecified error";
    MALFORMED_PACKET = 0x81, "Malformed Packet";
    PROTOCOL_ERROR = 0x82, "Protocol Error";
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83, "Implementation specific error";
    UNSUPPORTED_PROTOCOL_VERSION = 0x84, "Unsupported Protocol Version";
    CLIENT_IDENTIFIER_NOT_VALID = 0x85, "Client Identifier not valid";
    BAD_USER_NAME_OR_PASSWORD = 0x86, "Bad User Name or Password";
    NOT_AUTHORIZED = 0x87, "Not authorized";
    SERVER_UNAVAILABLE = 0x88, "Server unavailable";
    SERVER_BUSY = 0x89, "Server busy";
    BANNED = 0x8A, "Banned";
    SERVER_SHUTTING_DOWN = 0x8B, "Server shutting down";
    BAD_AUTHENTICATION_METHOD = 0x8C, "Bad authentication method";
    KEEP_ALIVE_TIMEOUT = 0x8D, "Keep Alive timeout";
    SESSION_TAKEN_OVER = 0x8E, "Session taken over";
    TOPIC_FILTER_INVALID = 0x8F, "Topic Filter invalid";
    TOPIC_NAME_INVALID = 0x90, "Topic Name invalid";
    PACKET_IDENTIFIER_IN_USE = 0x91, "Packet Identifier in use";
    PACKET_IDENTIFIER_NOT_FOUND = 0x92, "Packet Identifier not found";
    RECEIVE_MAXIMUM_EXCEEDED = 0x93, "Receive Maximum exceeded";
    TOPIC_ALIAS_INVALID = 0x94, "Topic Alias invalid";
    PACKET_TOO_LARGE = 0x95, "Packet too large";
    MESSAGE_RATE_TOO_HIGH = 0x96, "Message rate too high";
    QUOTA_EXCEEDED = 0x97, "Quota exceeded";
    ADMINISTRATIVE_ACTION = 0x98, "Administrative action";
    PAYLOAD_FORMAT_INVALID = 0x99, "Payload format invalid";
    RETAIN_NOT_SUPPORTED = 0x9A, "Retain not supported";
    QOS_NOT_SUPPORTED = 0x9B, "QoS not supported";
    USE_ANOTHER_SERVER = 0x9C, "Use another server";
    SERVER_MOVED = 0x9D, "Server moved";
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E, "Shared Subscriptions not supported";
    CONNECTION_RATE_EXCEEDED = 0x9F, "Connection rate exceeded";
    MAXIMUM_CONNECT_TIME = 0xA0, "Maximum connect time";
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1, "Subscription Identifiers not supported";
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2, "Wildcard Subscriptions not supported";
}

impl ReasonCode {
    /// 0x00 in a DISCONNECT.
    pub const NORMAL_DISCONNECTION: ReasonCode = ReasonCode(0x00);
    /// 0x00 in a SUBACK.
    pub const GRANTED_QOS_0: ReasonCode = ReasonCode(0x00);

    /// True from 0x80 on: the operation failed.
    pub const fn is_error(self) -> bool {
        self.0 >= 0x80
    }

    /// The 3.x CONNACK return code (0 to 5) nearest to this code (MQTT 3.1.1 §3.2.2.3).
    pub const fn connack_v3(self) -> u8 {
        match self.0 {
            0x00 => 0,
            0x84 => 1,
            0x85 => 2,
            0x86 => 4,
            0x87 | 0x8A | 0x8C | 0x90 => 5,
            _ => 3,
        }
    }

    /// The code that a 3.x CONNACK return code stands for; None above 5.
    pub const fn from_connack_v3(code: u8) -> Option<ReasonCode> {
        Some(match code {
            0 => Self::SUCCESS,
            1 => Self::UNSUPPORTED_PROTOCOL_VERSION,
            2 => Self::CLIENT_IDENTIFIER_NOT_VALID,
            3 => Self::SERVER_UNAVAILABLE,
            4 => Self::BAD_USER_NAME_OR_PASSWORD,
            5 => Self::NOT_AUTHORIZED,
            _ => return None,
        })
    }
}

impl std::fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0x{:02X} {}", self.0, self.name())
    }
}

/// A set of byte codes, for the per packet tables of listed codes.
#[derive(Clone, Copy)]
pub(crate) struct CodeSet([u64; 4]);

impl CodeSet {
    pub(crate) const fn of(codes: &[u8]) -> CodeSet {
        let mut set = [0u64; 4];
        let mut i = 0;
        while i < codes.len() {
            set[(codes[i] >> 6) as usize] |= 1 << (codes[i] & 63);
            i += 1;
        }
        CodeSet(set)
    }

    #[inline]
    pub(crate) const fn has(&self, code: u8) -> bool {
        self.0[(code >> 6) as usize] & (1 << (code & 63)) != 0
    }
}

/// [MQTT-3.2.2-8]
pub(crate) const CONNACK: CodeSet = CodeSet::of(&[
    0x00, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C, 0x90, 0x95, 0x97,
    0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F,
]);
/// [MQTT-3.4.2-1], [MQTT-3.5.2-1]
pub(crate) const PUBACK: CodeSet =
    CodeSet::of(&[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99]);
/// [MQTT-3.6.2-1], [MQTT-3.7.2-1]
pub(crate) const PUBREL: CodeSet = CodeSet::of(&[0x00, 0x92]);
/// [MQTT-3.9.3-2]
pub(crate) const SUBACK: CodeSet = CodeSet::of(&[
    0x00, 0x01, 0x02, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2,
]);
/// [MQTT-3.9.3-2] of 3.1.1
pub(crate) const SUBACK_V3: CodeSet = CodeSet::of(&[0x00, 0x01, 0x02, 0x80]);
/// [MQTT-3.11.3-2]
pub(crate) const UNSUBACK: CodeSet = CodeSet::of(&[0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91]);
/// [MQTT-3.14.2-1], "sent by Client"
pub(crate) const DISCONNECT_BY_CLIENT: CodeSet = CodeSet::of(&[
    0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99,
]);
/// [MQTT-3.14.2-1], "sent by Server"; 0x8C is listed for DISCONNECT in §2.4 only.
pub(crate) const DISCONNECT_BY_SERVER: CodeSet = CodeSet::of(&[
    0x00, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8C, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94, 0x95,
    0x96, 0x97, 0x98, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
]);
/// [MQTT-3.15.2-1], sent by Client
pub(crate) const AUTH_BY_CLIENT: CodeSet = CodeSet::of(&[0x18, 0x19]);
/// [MQTT-3.15.2-1], sent by Server
pub(crate) const AUTH_BY_SERVER: CodeSet = CodeSet::of(&[0x00, 0x18]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_hold_what_they_list() {
        assert!(PUBREL.has(0x00) && PUBREL.has(0x92) && !PUBREL.has(0x91));
        assert!(SUBACK.has(0xA2) && !SUBACK.has(0xA3) && !SUBACK.has(0x03));
        assert!(DISCONNECT_BY_CLIENT.has(0x04) && !DISCONNECT_BY_SERVER.has(0x04));
        assert!(!DISCONNECT_BY_CLIENT.has(0x8E) && DISCONNECT_BY_SERVER.has(0x8E));
    }

    #[test]
    fn v3_codes_round_trip() {
        for code in 0..=5 {
            let v5 = ReasonCode::from_connack_v3(code).expect("0 to 5 are listed");
            assert_eq!(v5.connack_v3(), code);
        }
        assert_eq!(ReasonCode::from_connack_v3(6), None);
        assert_eq!(ReasonCode::QUOTA_EXCEEDED.connack_v3(), 3);
    }

    #[test]
    fn shown_with_number_and_name() {
        assert_eq!(
            ReasonCode::SESSION_TAKEN_OVER.to_string(),
            "0x8E Session taken over"
        );
        assert_eq!(ReasonCode(0x7F).name(), "Unknown");
        assert!(ReasonCode(0x80).is_error() && !ReasonCode(0x7F).is_error());
    }
}
