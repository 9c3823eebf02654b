//! How a receiver gets a message: a computed head, shared tails (MQTT 5 §3.3).

use crate::mqtt::head::{MAX_REMAINING, PUBLISH, varint_len};
use crate::mqtt::props::{MESSAGE_EXPIRY, SUBSCRIPTION_IDENTIFIER, TOPIC_ALIAS, USER_PROPERTY};
use crate::mqtt::write::{put_head, put_str, put_u16, put_u32, put_varint, str_len};
use crate::mqtt::{Message, QoS, Version};

/// The part of a PUBLISH that is one receiver's own.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// What the receiver speaks; 3.x gets no properties.
    pub version: Version,
    /// This very packet was sent before ([MQTT-3.3.1-3]); ignored at QoS 0 ([MQTT-3.3.1-2]).
    pub dup: bool,
    /// Granted QoS, at most the message's own.
    pub qos: QoS,
    /// RETAIN as this receiver sees it.
    pub retain: bool,
    /// Not 0 above QoS 0; left out at QoS 0 ([MQTT-2.2.1-2]).
    pub packet_id: u16,
    /// Topic alias (MQTT 5).
    pub alias: Alias,
    /// Seconds left ([MQTT-3.3.2-6]).
    pub message_expiry: Option<u32>,
    /// The receiver's own identifiers ([MQTT-3.3.4-4]).
    pub subscription_ids: &'a [u32],
    /// One user property more, before the message's own.
    pub user_property: Option<(&'a str, &'a str)>,
    /// Bytes at the start of the topic that the receiver does not see.
    pub hidden: u16,
}

/// What stands for the topic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Alias {
    /// The topic, without an alias.
    #[default]
    None,
    /// Topic and alias: from now on the alias will do.
    Define(u16),
    /// The alias alone; the topic is empty.
    Use(u16),
}

impl Delivery<'_> {
    /// Bytes of the whole packet. Over 268,435,460 there is none, and `encode` writes nothing.
    pub fn size(&self, m: &Message) -> usize {
        let len = self.layout(m).remaining;
        1 + varint_len(len) + len
    }

    /// Appends the PUBLISH.
    #[inline]
    pub fn encode(&self, m: &Message, out: &mut Vec<u8>) {
        self.write(m, out);
    }

    // Returns where the packet identifier is, counted from the start of the packet.
    #[inline]
    fn write(&self, m: &Message, out: &mut Vec<u8>) -> Option<usize> {
        let start = out.len();
        let layout = self.layout(m);
        let qos0 = self.qos == QoS::AtMostOnce;
        let first = PUBLISH << 4
            | u8::from(self.dup && !qos0) << 3
            | (self.qos as u8) << 1
            | u8::from(self.retain);
        if !put_head(first, layout.remaining, out) {
            return None;
        }
        match self.alias {
            Alias::Use(_) if self.version == Version::V5 => put_u16(0, out),
            _ if self.hidden == 0 => out.extend_from_slice(m.wire_topic()),
            _ => {
                let seen = m.topic().as_bytes().get(usize::from(self.hidden)..);
                let seen = seen.unwrap_or_default();
                put_u16(seen.len() as u16, out);
                out.extend_from_slice(seen);
            }
        }
        let at = out.len() - start;
        if !qos0 {
            put_u16(self.packet_id, out);
        }
        match layout.properties {
            None => out.extend_from_slice(m.payload()),
            Some(len) => {
                put_varint(len, out);
                self.put_own(out);
                out.extend_from_slice(m.tail());
            }
        }
        (!qos0).then_some(at)
    }

    #[inline]
    fn layout(&self, m: &Message) -> Layout {
        let hidden = usize::from(self.hidden).min(m.wire_topic().len() - 2);
        let topic = m.wire_topic().len() - hidden;
        let mut remaining = topic + m.payload().len();
        if self.qos != QoS::AtMostOnce {
            remaining += 2;
        }
        if self.version != Version::V5 {
            return Layout {
                remaining,
                properties: None,
            };
        }
        if let Alias::Use(_) = self.alias {
            remaining -= topic - 2;
        }
        let properties = self.own_len() + m.properties().len();
        Layout {
            remaining: remaining + varint_len(properties) + properties,
            properties: Some(properties),
        }
    }

    fn own_len(&self) -> usize {
        let alias = if self.alias == Alias::None { 0 } else { 3 };
        let expiry = if self.message_expiry.is_some() { 5 } else { 0 };
        let ids: usize = self
            .subscription_ids
            .iter()
            .map(|&id| 1 + varint_len(id as usize))
            .sum();
        alias
            + expiry
            + ids
            + self
                .user_property
                .map_or(0, |(k, v)| 1 + str_len(k) + str_len(v))
    }

    fn put_own(&self, out: &mut Vec<u8>) {
        if let Alias::Define(alias) | Alias::Use(alias) = self.alias {
            out.push(TOPIC_ALIAS);
            put_u16(alias, out);
        }
        if let Some(seconds) = self.message_expiry {
            out.push(MESSAGE_EXPIRY);
            put_u32(seconds, out);
        }
        for &id in self.subscription_ids {
            out.push(SUBSCRIPTION_IDENTIFIER);
            put_varint(id as usize, out);
        }
        if let Some((key, value)) = self.user_property {
            out.push(USER_PROPERTY);
            put_str(key, out);
            put_str(value, out);
        }
    }
}

struct Layout {
    remaining: usize,
    // None: the version has no properties at all.
    properties: Option<usize>,
}

/// A finished PUBLISH that one fan-out copies to many receivers; only the packet identifier
/// differs. Made for one fan-out and dropped with it.
#[derive(Clone, Debug)]
pub struct Image {
    bytes: Vec<u8>,
    packet_id_at: Option<usize>,
}

impl Image {
    /// Encodes once; `d.packet_id` is a placeholder.
    pub fn new(d: &Delivery<'_>, m: &Message) -> Image {
        let mut bytes = Vec::new();
        let packet_id_at = d.write(m, &mut bytes);
        Image {
            bytes,
            packet_id_at,
        }
    }

    /// Appends a copy with this packet identifier, which QoS 0 ignores.
    #[inline]
    pub fn write(&self, packet_id: u16, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        if let Some(at) = self.packet_id_at {
            out[start + at..start + at + 2].copy_from_slice(&packet_id.to_be_bytes());
        }
    }

    /// Bytes of the whole packet.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True when the message was too large for any packet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The largest packet that can be, fixed header included, in bytes.
pub const MAX_PACKET: usize = MAX_REMAINING + 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties};

    fn message() -> Message {
        Message::new(&MessageSpec {
            topic: "ab",
            properties: Properties(b"\x01\x01"),
            payload: b"xyz",
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        })
    }

    const PLAIN: Delivery<'_> = Delivery {
        version: Version::V311,
        dup: false,
        qos: QoS::AtMostOnce,
        retain: false,
        packet_id: 0x0102,
        alias: Alias::None,
        message_expiry: None,
        subscription_ids: &[],
        user_property: None,
        hidden: 0,
    };

    fn bytes(d: Delivery<'_>) -> Vec<u8> {
        let (m, mut out) = (message(), Vec::new());
        d.encode(&m, &mut out);
        assert_eq!(out.len(), d.size(&m));
        out
    }

    #[test]
    fn v3_has_no_properties() {
        assert_eq!(bytes(PLAIN), b"\x30\x07\0\x02abxyz");
        let full = Delivery {
            qos: QoS::ExactlyOnce,
            dup: true,
            retain: true,
            alias: Alias::Use(1),
            message_expiry: Some(1),
            subscription_ids: &[1],
            user_property: Some(("k", "v")),
            ..PLAIN
        };
        assert_eq!(bytes(full), b"\x3D\x09\0\x02ab\x01\x02xyz");
    }

    #[test]
    fn v5_has_the_receivers_own_first() {
        let v5 = Delivery {
            version: Version::V5,
            qos: QoS::AtLeastOnce,
            ..PLAIN
        };
        assert_eq!(bytes(v5), b"\x32\x0C\0\x02ab\x01\x02\x02\x01\x01xyz");
        let full = Delivery {
            alias: Alias::Define(9),
            message_expiry: Some(1),
            subscription_ids: &[1, 200],
            user_property: Some(("k", "v")),
            ..v5
        };
        let wanted = b"\x32\x20\0\x02ab\x01\x02\x16\x23\0\x09\x02\0\0\0\x01\x0B\x01\x0B\xC8\x01\x26\0\x01k\0\x01v\x01\x01xyz";
        assert_eq!(bytes(full), wanted);
        let used = Delivery {
            alias: Alias::Use(9),
            ..v5
        };
        assert_eq!(
            bytes(used),
            b"\x32\x0D\0\0\x01\x02\x05\x23\0\x09\x01\x01xyz"
        );
    }

    #[test]
    fn a_part_of_the_topic_can_be_hidden() {
        assert_eq!(
            bytes(Delivery { hidden: 1, ..PLAIN }),
            b"\x30\x06\0\x01bxyz"
        );
        let past = Delivery { hidden: 9, ..PLAIN };
        assert_eq!(bytes(past), b"\x30\x05\0\0xyz");
    }

    #[test]
    fn qos_0_never_has_dup() {
        assert_eq!(bytes(Delivery { dup: true, ..PLAIN })[0], 0x30);
    }

    #[test]
    fn an_image_differs_in_its_identifier_only() {
        for qos in [QoS::AtMostOnce, QoS::AtLeastOnce] {
            let d = Delivery {
                version: Version::V5,
                qos,
                ..PLAIN
            };
            let (m, mut out) = (message(), vec![1, 2, 3]);
            let image = Image::new(
                &Delivery {
                    packet_id: 0xFFFF,
                    ..d
                },
                &m,
            );
            image.write(0x0102, &mut out);
            assert_eq!(out[3..], bytes(d));
            assert_eq!(image.len(), out.len() - 3);
            assert!(!image.is_empty());
        }
    }
}
