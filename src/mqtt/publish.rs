//! PUBLISH (MQTT 5 §3.3), borrowed from the read buffer.

use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::{Error, QoS, Receiver, Version, text};

/// A PUBLISH as received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Publish<'a> {
    /// The sender sent it before, perhaps ([MQTT-3.3.1-1]).
    pub dup: bool,
    /// Quality of service of this hop.
    pub qos: QoS,
    /// RETAIN flag.
    pub retain: bool,
    /// Topic name without wildcards; empty only when `topic_alias` stands for it.
    pub topic: &'a str,
    /// 0 at QoS 0, else never 0.
    pub packet_id: u16,
    /// Application message; not checked against the payload format indicator.
    pub payload: &'a [u8],
    /// All properties, validated. Empty in 3.x.
    pub properties: Properties<'a>,
    /// Seconds; None: no expiry.
    pub message_expiry: Option<u32>,
    /// Never 0; whether it is above the maximum is the session's to judge.
    pub topic_alias: Option<u16>,
    /// Whether `subscription_ids` yields any.
    pub has_subscription_ids: bool,
}

impl<'a> Publish<'a> {
    /// Subscription identifiers in wire order; only a server sends them ([MQTT-3.3.4-6]).
    pub fn subscription_ids(&self) -> impl Iterator<Item = u32> + Clone + use<'a> {
        let properties = if self.has_subscription_ids {
            self.properties
        } else {
            Properties(&[])
        };
        properties.iter().filter_map(|p| match p {
            Property::SubscriptionIdentifier(id) => Some(id),
            _ => None,
        })
    }

    // Into its one caller, so that the fields go straight to where they end up.
    #[inline(always)]
    pub(crate) fn read(
        first: u8,
        body: &'a [u8],
        version: Version,
        receiver: Receiver,
    ) -> Result<Publish<'a>, Error> {
        let mut r = Reader(body);
        let qos = match first >> 1 & 3 {
            0 => QoS::AtMostOnce,
            1 => QoS::AtLeastOnce,
            _ => QoS::ExactlyOnce,
        };
        let topic = topic(r.binary()?)?;
        let packet_id = if qos == QoS::AtMostOnce {
            0
        } else {
            r.packet_id()?
        };
        let mut properties = Properties(&[]);
        let (mut message_expiry, mut topic_alias, mut has_subscription_ids) = (None, None, false);
        if version == Version::V5 {
            let allowed = match receiver {
                Receiver::Server => props::ON_PUBLISH_BY_CLIENT,
                Receiver::Client => props::ON_PUBLISH_BY_SERVER,
            };
            properties = props::read(&mut r, allowed, |p| match p {
                Property::MessageExpiryInterval(seconds) => message_expiry = Some(seconds),
                Property::TopicAlias(alias) => topic_alias = Some(alias),
                Property::SubscriptionIdentifier(_) => has_subscription_ids = true,
                _ => {}
            })?;
        }
        if topic.is_empty() && topic_alias.is_none() {
            return Err(nameless(version));
        }
        Ok(Publish {
            dup: first & 0b1000 != 0,
            qos,
            retain: first & 1 != 0,
            topic,
            packet_id,
            payload: r.rest(),
            properties,
            message_expiry,
            topic_alias,
            has_subscription_ids,
        })
    }
}

#[cold]
fn nameless(version: Version) -> Error {
    match version {
        Version::V5 => Error::Protocol("empty topic without an alias (§3.3.2.1)"),
        _ => Error::TopicName("empty [MQTT-4.7.3-1]"),
    }
}

// One look at the bytes for all that a name may not have; which it was matters on refusal only.
#[inline(always)]
fn topic(bytes: &[u8]) -> Result<&str, Error> {
    if crate::topics::scan::has_nul_or_wildcard(bytes) {
        return Err(suspect(bytes));
    }
    std::str::from_utf8(bytes).map_err(|_| text::NOT_UTF8)
}

#[cold]
fn suspect(bytes: &[u8]) -> Error {
    match text::utf8(bytes) {
        Err(e) => e,
        Ok(_) => Error::TopicName("wildcard in a topic name [MQTT-3.3.2-2]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_borrowed() {
        let body = b"\0\x03a/b\0\x07\x10\x02\0\0\0\x09\x23\0\x02\x0B\x01\x0B\x02\x03\0\x01thi";
        let p = Publish::read(0x3B, body, Version::V5, Receiver::Client).expect("legal");
        assert_eq!((p.dup, p.qos, p.retain), (true, QoS::AtLeastOnce, true));
        assert_eq!((p.topic, p.packet_id, p.payload), ("a/b", 7, &b"hi"[..]));
        assert_eq!((p.message_expiry, p.topic_alias), (Some(9), Some(2)));
        assert!(p.subscription_ids().eq([1, 2]));
        let range = body.as_ptr_range();
        assert!(range.contains(&p.topic.as_ptr()) && range.contains(&p.payload.as_ptr()));
    }

    #[test]
    fn v3_has_no_properties() {
        let p =
            Publish::read(0x30, b"\0\x01a\0hi", Version::V311, Receiver::Server).expect("legal");
        assert_eq!((p.packet_id, p.payload), (0, &b"\0hi"[..]));
        assert_eq!(p.subscription_ids().count(), 0);
    }
}
