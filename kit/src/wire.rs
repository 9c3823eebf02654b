//! A small MQTT codec of the kit's own: versions 3.1, 3.1.1 and 5, both directions.
//!
//! The codec is written for judging, not for speed: [`decode`] builds an owned [`Packet`] and
//! refuses packets that the specifications forbid. Loads read deliveries with the borrowed
//! [`PublishRef`] instead.

mod decode;
mod encode;
mod fields;
mod props;

pub use decode::{Frame, PublishRef, ack_of, decode, frame};
pub use encode::{encode, put_ack, put_publish};
pub use props::{Props, Value, prop};

use thiserror::Error;

/// A protocol version, as the level byte of CONNECT names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// MQTT 3.1 (`MQIsdp`, level 3).
    V31,
    /// MQTT 3.1.1 (level 4).
    V311,
    /// MQTT 5 (level 5).
    V5,
}

impl Version {
    /// The protocol level byte of CONNECT.
    pub fn level(self) -> u8 {
        match self {
            Self::V31 => 3,
            Self::V311 => 4,
            Self::V5 => 5,
        }
    }

    /// The version of a protocol level byte, or `None` for an unknown level.
    pub fn from_level(level: u8) -> Option<Self> {
        match level {
            3 => Some(Self::V31),
            4 => Some(Self::V311),
            5 => Some(Self::V5),
            _ => None,
        }
    }

    /// Whether packets of this version carry properties and reason codes.
    pub fn is_v5(self) -> bool {
        self == Self::V5
    }
}

/// The reason why bytes are not a legal packet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{packet}: {what}")]
pub struct WireError {
    /// The packet type's name, or `frame` for an error of the fixed header.
    pub packet: &'static str,
    /// A description of the fault.
    pub what: String,
}

/// The names of the packet types by their number in the fixed header.
pub const TYPE_NAMES: [&str; 16] = [
    "RESERVED",
    "CONNECT",
    "CONNACK",
    "PUBLISH",
    "PUBACK",
    "PUBREC",
    "PUBREL",
    "PUBCOMP",
    "SUBSCRIBE",
    "SUBACK",
    "UNSUBSCRIBE",
    "UNSUBACK",
    "PINGREQ",
    "PINGRESP",
    "DISCONNECT",
    "AUTH",
];

/// Packet type numbers, as the high half of the first byte holds them.
pub mod kind {
    /// CONNECT.
    pub const CONNECT: u8 = 1;
    /// CONNACK.
    pub const CONNACK: u8 = 2;
    /// PUBLISH.
    pub const PUBLISH: u8 = 3;
    /// PUBACK.
    pub const PUBACK: u8 = 4;
    /// PUBREC.
    pub const PUBREC: u8 = 5;
    /// PUBREL.
    pub const PUBREL: u8 = 6;
    /// PUBCOMP.
    pub const PUBCOMP: u8 = 7;
    /// SUBSCRIBE.
    pub const SUBSCRIBE: u8 = 8;
    /// SUBACK.
    pub const SUBACK: u8 = 9;
    /// UNSUBSCRIBE.
    pub const UNSUBSCRIBE: u8 = 10;
    /// UNSUBACK.
    pub const UNSUBACK: u8 = 11;
    /// PINGREQ.
    pub const PINGREQ: u8 = 12;
    /// PINGRESP.
    pub const PINGRESP: u8 = 13;
    /// DISCONNECT.
    pub const DISCONNECT: u8 = 14;
    /// AUTH.
    pub const AUTH: u8 = 15;
}

/// A will, as CONNECT carries it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Will {
    /// Topic name.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// QoS 0, 1 or 2.
    pub qos: u8,
    /// Retain flag.
    pub retain: bool,
    /// Will properties, Will Delay among them (5 only).
    pub props: Props,
}

/// CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Protocol version.
    pub version: Version,
    /// Client identifier.
    pub client_id: String,
    /// Clean Start (5) or Clean Session (3.x).
    pub clean: bool,
    /// Keep Alive in seconds; 0 turns it off.
    pub keep_alive: u16,
    /// Properties (5 only).
    pub props: Props,
    /// The will, if any.
    pub will: Option<Will>,
    /// User name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<Vec<u8>>,
}

impl Connect {
    /// A clean MQTT 5 CONNECT with a Keep Alive of 60 s and no further field.
    pub fn new(client_id: impl Into<String>) -> Self {
        Self {
            version: Version::V5,
            client_id: client_id.into(),
            clean: true,
            keep_alive: 60,
            props: Props::default(),
            will: None,
            username: None,
            password: None,
        }
    }

    /// Sets the protocol version.
    pub fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Sets Clean Start (Clean Session).
    pub fn clean(mut self, clean: bool) -> Self {
        self.clean = clean;
        self
    }

    /// Sets the Session Expiry Interval in seconds (5 only).
    pub fn expiry(mut self, seconds: u32) -> Self {
        self.props.set(prop::SESSION_EXPIRY, Value::Four(seconds));
        self
    }

    /// Sets the Receive Maximum (5 only).
    pub fn receive_max(mut self, packets: u16) -> Self {
        self.props.set(prop::RECEIVE_MAX, Value::Two(packets));
        self
    }

    /// Sets the Keep Alive in seconds.
    pub fn keep_alive(mut self, seconds: u16) -> Self {
        self.keep_alive = seconds;
        self
    }

    /// Sets user name and password.
    pub fn login(mut self, user: impl Into<String>, password: impl Into<Vec<u8>>) -> Self {
        self.username = Some(user.into());
        self.password = Some(password.into());
        self
    }

    /// Sets the will.
    pub fn will(mut self, will: Will) -> Self {
        self.will = Some(will);
        self
    }
}

/// CONNACK.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnAck {
    /// Session Present.
    pub session_present: bool,
    /// Reason code (5) or return code (3.x); 0 is success.
    pub code: u8,
    /// Properties (5 only).
    pub props: Props,
}

/// PUBLISH.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publish {
    /// DUP flag.
    pub dup: bool,
    /// QoS 0, 1 or 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// Topic name; empty when a topic alias stands for it.
    pub topic: String,
    /// Packet identifier; 0 for QoS 0.
    pub id: u16,
    /// Properties (5 only).
    pub props: Props,
    /// Payload.
    pub payload: Vec<u8>,
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ack {
    /// Packet identifier.
    pub id: u16,
    /// Reason code (5 only, else 0).
    pub code: u8,
    /// Properties (5 only).
    pub props: Props,
}

/// SUBSCRIBE: each filter with its options byte (the QoS alone in 3.x).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subscribe {
    /// Packet identifier.
    pub id: u16,
    /// Properties (5 only).
    pub props: Props,
    /// Filters and options.
    pub filters: Vec<(String, u8)>,
}

/// UNSUBSCRIBE.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unsubscribe {
    /// Packet identifier.
    pub id: u16,
    /// Properties (5 only).
    pub props: Props,
    /// Filters.
    pub filters: Vec<String>,
}

/// SUBACK or UNSUBACK; the latter has no codes in 3.x.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Codes {
    /// Packet identifier.
    pub id: u16,
    /// Properties (5 only).
    pub props: Props,
    /// A code for each filter.
    pub codes: Vec<u8>,
}

/// DISCONNECT or AUTH.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reason {
    /// Reason code (5 only, else 0).
    pub code: u8,
    /// Properties (5 only).
    pub props: Props,
}

/// Any control packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// CONNECT.
    Connect(Box<Connect>),
    /// CONNACK.
    ConnAck(ConnAck),
    /// PUBLISH.
    Publish(Publish),
    /// PUBACK.
    PubAck(Ack),
    /// PUBREC.
    PubRec(Ack),
    /// PUBREL.
    PubRel(Ack),
    /// PUBCOMP.
    PubComp(Ack),
    /// SUBSCRIBE.
    Subscribe(Subscribe),
    /// SUBACK.
    SubAck(Codes),
    /// UNSUBSCRIBE.
    Unsubscribe(Unsubscribe),
    /// UNSUBACK.
    UnsubAck(Codes),
    /// PINGREQ.
    PingReq,
    /// PINGRESP.
    PingResp,
    /// DISCONNECT.
    Disconnect(Reason),
    /// AUTH (5 only).
    Auth(Reason),
}

impl Packet {
    /// The packet type's number in the fixed header.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Connect(_) => kind::CONNECT,
            Self::ConnAck(_) => kind::CONNACK,
            Self::Publish(_) => kind::PUBLISH,
            Self::PubAck(_) => kind::PUBACK,
            Self::PubRec(_) => kind::PUBREC,
            Self::PubRel(_) => kind::PUBREL,
            Self::PubComp(_) => kind::PUBCOMP,
            Self::Subscribe(_) => kind::SUBSCRIBE,
            Self::SubAck(_) => kind::SUBACK,
            Self::Unsubscribe(_) => kind::UNSUBSCRIBE,
            Self::UnsubAck(_) => kind::UNSUBACK,
            Self::PingReq => kind::PINGREQ,
            Self::PingResp => kind::PINGRESP,
            Self::Disconnect(_) => kind::DISCONNECT,
            Self::Auth(_) => kind::AUTH,
        }
    }
}
