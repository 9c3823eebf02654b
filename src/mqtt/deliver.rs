//! A PUBLISH toward one receiver: a computed head before the message's shared bytes (MQTT 5 §3.3).

use crate::mqtt::head::{MAX_REMAINING_BYTES, PUBLISH, varint_len};
use crate::mqtt::props::{
    MESSAGE_EXPIRY, RESPONSE_TOPIC, SUBSCRIPTION_IDENTIFIER, TOPIC_ALIAS, USER_PROPERTY,
    response_topic,
};
use crate::mqtt::write::{put_str, put_u16, put_u32, put_varint, str_len};
use crate::mqtt::{Message, QoS, Version};

/// The part of a PUBLISH that is one receiver's own.
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    /// The receiver's protocol version. Only MQTT 5 has properties.
    pub version: Version,
    /// The packet was sent before ([MQTT-3.3.1-3]); ignored at QoS 0 ([MQTT-3.3.1-2]).
    pub dup: bool,
    /// Granted QoS, at most the message's own.
    pub qos: QoS,
    /// RETAIN for this receiver.
    pub retain: bool,
    /// Not 0 above QoS 0; omitted at QoS 0 ([MQTT-2.2.1-2]).
    pub packet_id: u16,
    /// Topic alias (MQTT 5).
    pub alias: Alias,
    /// Remaining seconds ([MQTT-3.3.2-6]).
    pub message_expiry: Option<u32>,
    /// The receiver's own identifiers ([MQTT-3.3.4-4]).
    pub subscription_ids: &'a [u32],
    /// A user property to be added before the message's own.
    pub user_property: Option<(&'a str, &'a str)>,
    /// Bytes to be cut from the start of the topic, and of a Response Topic that begins with the same
    /// bytes.
    pub hidden: u16,
}

/// How the packet names the topic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Alias {
    /// The topic, without an alias.
    #[default]
    None,
    /// Topic and alias: the alias alone is enough from now on.
    Define(u16),
    /// The alias alone; the topic is empty.
    Use(u16),
}

impl Delivery<'_> {
    /// Bytes of the whole packet. MQTT has no packet above [`MAX_PACKET_BYTES`], and `encode`
    /// writes nothing for it.
    pub fn size(&self, m: &Message) -> usize {
        let len = self.layout(m).remaining;
        1 + varint_len(len) + len
    }

    /// Appends the PUBLISH.
    #[inline]
    pub fn encode(&self, m: &Message, out: &mut Vec<u8>) {
        let layout = self.layout(m);
        if layout.remaining > MAX_REMAINING_BYTES {
            return;
        }
        out.reserve(1 + varint_len(layout.remaining) + layout.remaining);
        let end = self.put_start(m, &layout, out);
        out.extend_from_slice(m.end(end));
    }

    /// Appends the PUBLISH without the last part, which the packet and the message have in common.
    /// Returns the bytes of that part, [`Message::end`].
    pub fn encode_head(&self, m: &Message, out: &mut Vec<u8>) -> usize {
        self.put_start(m, &self.layout(m), out)
    }

    #[inline]
    fn put_start(&self, m: &Message, layout: &Layout<'_>, out: &mut Vec<u8>) -> usize {
        let qos0 = self.qos == QoS::AtMostOnce;
        let first = PUBLISH << 4
            | u8::from(self.dup && !qos0) << 3
            | (self.qos as u8) << 1
            | u8::from(self.retain);
        if layout.remaining > MAX_REMAINING_BYTES {
            return 0;
        }
        out.push(first);
        put_varint(layout.remaining, out);
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
        if !qos0 {
            put_u16(self.packet_id, out);
        }
        match layout.properties {
            None => m.payload().len(),
            Some(len) => {
                put_varint(len, out);
                self.put_own(out);
                let mut tail = m.tail();
                if let Some((at, text)) = layout.response_topic {
                    let (before, after) = tail.split_at(at);
                    let seen = &text[usize::from(self.hidden)..];
                    out.extend_from_slice(before);
                    out.push(RESPONSE_TOPIC);
                    put_u16(seen.len() as u16, out);
                    out.extend_from_slice(seen);
                    tail = &after[3 + text.len()..];
                }
                tail.len()
            }
        }
    }

    #[inline]
    fn layout<'m>(&self, m: &'m Message) -> Layout<'m> {
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
                response_topic: None,
            };
        }
        if let Alias::Use(_) = self.alias {
            remaining -= topic - 2;
        }
        let response_topic = self.partly_hidden(m, hidden);
        let cut = response_topic.map_or(0, |_| hidden);
        let properties = self.own_len() + m.properties().len() - cut;
        Layout {
            remaining: remaining + varint_len(properties) + properties,
            properties: Some(properties),
            response_topic,
        }
    }

    /// The Response Topic with a hidden part, and its place among the properties.
    #[inline]
    fn partly_hidden<'m>(&self, m: &'m Message, hidden: usize) -> Option<(usize, &'m [u8])> {
        if hidden == 0 {
            return None;
        }
        let mount = &m.topic().as_bytes()[..hidden];
        let (at, text) = response_topic(m.properties())?;
        let seen = text.strip_prefix(mount)?;
        (!seen.is_empty()).then_some((at, text))
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

struct Layout<'m> {
    remaining: usize,
    // None: the version has no properties at all.
    properties: Option<usize>,
    // The Response Topic that is cut, with the index of its identifier among the message's properties.
    response_topic: Option<(usize, &'m [u8])>,
}

/// The largest packet that MQTT allows, fixed header included.
pub const MAX_PACKET_BYTES: usize = MAX_REMAINING_BYTES + 5;

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
            expires_at: None,
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
    fn a_response_topic_loses_the_hidden_part_too() {
        let sent = |topic, properties: &'static [u8], version| {
            let message = Message::new(&MessageSpec {
                topic,
                properties: Properties(properties),
                payload: b"p",
                qos: QoS::AtMostOnce,
                retain: false,
                expires_at: None,
                strip_key: None,
                account: None,
            });
            let delivery = Delivery {
                version,
                hidden: 2,
                ..PLAIN
            };
            let mut out = Vec::new();
            delivery.encode(&message, &mut out);
            assert_eq!(out.len(), delivery.size(&message));
            out
        };
        let (v5, v311) = (Version::V5, Version::V311);
        let mounted = b"\x01\x01\x08\0\x03t/r\x09\0\x01c";
        assert_eq!(
            sent("t/a", mounted, v5),
            b"\x30\x0F\0\x01a\x0A\x01\x01\x08\0\x01r\x09\0\x01cp"
        );
        assert_eq!(sent("t/a", mounted, v311), b"\x30\x04\0\x01ap");
        // Outside the mount, or nothing but the mount: it stays as it is.
        assert_eq!(
            sent("t/a", b"\x08\0\x03u/r", v5),
            b"\x30\x0B\0\x01a\x06\x08\0\x03u/rp"
        );
        assert_eq!(
            sent("t/a", b"\x08\0\x02t/", v5),
            b"\x30\x0A\0\x01a\x05\x08\0\x02t/p"
        );
    }

    #[test]
    fn qos_0_never_has_dup() {
        assert_eq!(bytes(Delivery { dup: true, ..PLAIN })[0], 0x30);
    }
}
