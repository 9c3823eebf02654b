//! The wire format: strict, borrowed decoding and allocation-free encoding of MQTT 5, 3.1.1 and 3.1, in
//! both roles. No I/O, no clock, no sessions.
//!
//! This module checks every rule that the bytes of one packet can show. Rules that need the state of a
//! connection (a second CONNECT, an alias above the maximum, an unknown packet identifier) belong to
//! the session. `[MQTT-x.y.z-n]` names a statement of the specification (of MQTT 5 unless said),
//! `§` a section of it.

mod acks;
mod connack;
mod connect;
mod deliver;
mod disconnect;
mod error;
mod head;
mod message;
mod numbered;
mod oversized;
mod props;
mod publish;
mod read;
mod reason;
mod subscribe;
mod text;
mod write;

pub use acks::{Ack, AckKind, encode_ack, encode_pingreq, encode_pingresp};
pub use connack::Connack;
pub use connect::{Connect, Will, answerable, decode_connect};
pub use deliver::{Alias, Delivery, MAX_PACKET_BYTES};
pub use disconnect::{Auth, Disconnect, encode_auth, encode_disconnect};
pub use error::Error;
pub use head::MAX_REMAINING_BYTES;
pub use message::{Message, MessageSpec, Mounting};
pub use numbered::{Addressee, LinkOrigin, Numbered, RecordPlace, Records};
pub use oversized::Oversized;
pub use props::{Properties, Property};
pub use publish::Publish;
pub use reason::ReasonCode;
pub use subscribe::{
    Suback, Subscribe, SubscribeOptions, Unsuback, Unsubscribe, encode_suback, encode_subscribe,
    encode_unsuback, encode_unsubscribe,
};
pub use text::has_discouraged;

pub use crate::qos::QoS;

/// A protocol version; the value is the protocol level of CONNECT.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Version {
    /// MQTT 3.1 (`MQIsdp`).
    V31 = 3,
    /// MQTT 3.1.1.
    V311 = 4,
    /// MQTT 5.0.
    V5 = 5,
}

impl Version {
    /// The version as people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V31 => "3.1",
            Self::V311 => "3.1.1",
            Self::V5 => "5",
        }
    }
}

/// Our role, which decides the legal packet types.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Receiver {
    /// The peer is a client.
    Server,
    /// The peer is a server.
    Client,
}

/// A decoded packet that borrows from the read buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Boxed: rare and large.
    Connect(Box<Connect<'a>>),
    /// §3.2
    Connack(Connack<'a>),
    /// §3.3
    Publish(Publish<'a>),
    /// §3.4
    Puback(Ack<'a>),
    /// §3.5
    Pubrec(Ack<'a>),
    /// §3.6
    Pubrel(Ack<'a>),
    /// §3.7
    Pubcomp(Ack<'a>),
    /// §3.8
    Subscribe(Subscribe<'a>),
    /// §3.9
    Suback(Suback<'a>),
    /// §3.10
    Unsubscribe(Unsubscribe<'a>),
    /// §3.11
    Unsuback(Unsuback<'a>),
    /// §3.12
    Pingreq,
    /// §3.13
    Pingresp,
    /// §3.14
    Disconnect(Disconnect<'a>),
    /// §3.15
    Auth(Auth<'a>),
}

/// Decodes the packets of a connection whose version is known.
#[derive(Clone, Copy, Debug)]
pub struct Decoder {
    /// The connection's protocol version.
    pub version: Version,
    /// Our role.
    pub receiver: Receiver,
    /// The largest packet that is accepted, in bytes, fixed header included.
    pub max: u32,
}

impl Decoder {
    /// The packet at the start of `buf` and the bytes it took; None = needs more bytes. First
    /// byte, length and size bound are judged before the body is there.
    ///
    /// # Errors
    /// Every rule that these bytes break ([MQTT-4.13.1-1]); the connection is then to be closed.
    // Into its few callers: then a PUBLISH is taken apart without ever being moved.
    #[inline(always)]
    pub fn next<'a>(&self, buf: &'a [u8]) -> Result<Option<(Packet<'a>, usize)>, Error> {
        let Some(head) = head::Head::read(buf, self.version, self.receiver, self.max)? else {
            return Ok(None);
        };
        let end = head.len + head.remaining;
        let Some(body) = buf.get(head.len..end) else {
            return Ok(None);
        };
        if head.first >> 4 != head::PUBLISH {
            return self.other(head.first >> 4, body, end);
        }
        let publish = Publish::read(head.first, body, self.version, self.receiver)?;
        Ok(Some((Packet::Publish(publish), end)))
    }

    // Kept apart, so that the way of a PUBLISH stays short.
    #[inline(never)]
    fn other<'a>(
        &self,
        kind: u8,
        body: &'a [u8],
        end: usize,
    ) -> Result<Option<(Packet<'a>, usize)>, Error> {
        let version = self.version;
        let packet = match kind {
            head::CONNECT => Packet::Connect(Box::new(Connect::read(body)?)),
            head::CONNACK => Packet::Connack(Connack::read(body, version)?),
            head::PUBACK => Packet::Puback(Ack::read(AckKind::Puback, body, version)?),
            head::PUBREC => Packet::Pubrec(Ack::read(AckKind::Pubrec, body, version)?),
            head::PUBREL => Packet::Pubrel(Ack::read(AckKind::Pubrel, body, version)?),
            head::PUBCOMP => Packet::Pubcomp(Ack::read(AckKind::Pubcomp, body, version)?),
            head::SUBSCRIBE => Packet::Subscribe(Subscribe::read(body, version)?),
            head::SUBACK => Packet::Suback(Suback::read(body, version)?),
            head::UNSUBSCRIBE => Packet::Unsubscribe(Unsubscribe::read(body, version)?),
            head::UNSUBACK => Packet::Unsuback(Unsuback::read(body, version)?),
            head::DISCONNECT => Packet::Disconnect(Disconnect::read(body, version, self.receiver)?),
            head::AUTH => Packet::Auth(Auth::read(body, self.receiver)?),
            ping => {
                read::Reader(body).end()?;
                if ping == head::PINGREQ {
                    Packet::Pingreq
                } else {
                    Packet::Pingresp
                }
            }
        };
        Ok(Some((packet, end)))
    }
}
