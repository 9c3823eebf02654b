//! CONNECT (MQTT 5 §3.1; 3.1.1 §3.1; 3.1 §3.1).

use crate::mqtt::head::{self, Head, read_varint};
use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::write::{bytes_len, put_bytes, put_head, put_str, put_u16, str_len};
use crate::mqtt::{Error, QoS, Version};
use crate::topics::valid_topic_name;

/// A CONNECT. In 3.x the MQTT 5 fields have their defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect<'a> {
    /// Protocol that the client speaks.
    pub version: Version,
    /// The client is a bridge: bit 7 of its protocol level is set. No standard has this bit, which mosquitto
    /// invented for 3.1 and 3.1.1. It is not written in MQTT 5.
    pub bridge: bool,
    /// Clean Start (5) or Clean Session (3.x).
    pub clean_start: bool,
    /// Seconds; 0: off.
    pub keep_alive: u16,
    /// May be empty; 3.1.1 with `clean_start` off then asks for return code 2 ([MQTT-3.1.3-8]).
    pub client_id: &'a str,
    /// Will, if the Will Flag is set.
    pub will: Option<Will<'a>>,
    /// User name.
    pub username: Option<&'a str>,
    /// Password; in 3.x only with a user name ([MQTT-3.1.2-22] of 3.1.1).
    pub password: Option<&'a [u8]>,
    /// Seconds; None is 0.
    pub session_expiry: Option<u32>,
    /// Never 0; None is 65,535.
    pub receive_maximum: Option<u16>,
    /// Bytes, never 0; None: no limit.
    pub maximum_packet_size: Option<u32>,
    /// 0: the client takes no aliases.
    pub topic_alias_maximum: u16,
    /// The client asks for response information.
    pub request_response_information: bool,
    /// Default true ([MQTT-3.1.2-29]).
    pub request_problem_information: bool,
    /// Method of extended authentication.
    pub authentication_method: Option<&'a str>,
    /// Only with a method.
    pub authentication_data: Option<&'a [u8]>,
    /// All properties, validated. `encode` ignores them.
    pub properties: Properties<'a>,
}

/// The will of a CONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Will<'a> {
    /// QoS to publish it with.
    pub qos: QoS,
    /// RETAIN flag to publish it with.
    pub retain: bool,
    /// A valid topic name.
    pub topic: &'a str,
    /// Application message.
    pub payload: &'a [u8],
    /// Will Delay Interval, seconds.
    pub delay: u32,
    /// Seconds from its publication on.
    pub message_expiry: Option<u32>,
    /// All will properties, validated.
    pub properties: Properties<'a>,
}

impl Default for Connect<'_> {
    /// MQTT 5, clean start, keep alive off, everything else absent.
    fn default() -> Self {
        Connect {
            version: Version::V5,
            bridge: false,
            clean_start: true,
            keep_alive: 0,
            client_id: "",
            will: None,
            username: None,
            password: None,
            session_expiry: None,
            receive_maximum: None,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            request_response_information: false,
            request_problem_information: true,
            authentication_method: None,
            authentication_data: None,
            properties: Properties(&[]),
        }
    }
}

/// Decodes the first packet of a connection, whose version is not yet known (server side).
/// Returns the packet and its length, or `None` if it is not complete. `max` bounds the whole packet in
/// bytes and is checked before the body has arrived.
///
/// # Errors
/// The bytes are not a well-formed CONNECT of a known version ([MQTT-3.1.0-1], [MQTT-3.1.4-1]).
pub fn decode_connect(buf: &[u8], max: u32) -> Result<Option<(Connect<'_>, usize)>, Error> {
    let Some((&first, rest)) = buf.split_first() else {
        return Ok(None);
    };
    match first {
        0x10 => {}
        0x16 => {
            return Err(Error::Malformed(
                "not CONNECT but TLS, on a listener without TLS",
            ));
        }
        0x11..=0x1F => return Err(Error::Malformed("CONNECT flags are not 0 [MQTT-2.1.3-1]")),
        _ => {
            return Err(Error::Protocol(
                "the first packet is not CONNECT [MQTT-3.1.0-1]",
            ));
        }
    }
    let Some(length) = read_varint(rest)? else {
        return Ok(None);
    };
    let head = Head::bounded(first, length, max)?;
    let Some(body) = buf.get(head.len..head.len + head.remaining) else {
        return Ok(None);
    };
    let connect = Connect::read(body)?;
    if connect.version == Version::V5 && !length.is_minimal() {
        return Err(Error::Malformed(
            "remaining length is not minimal [MQTT-1.5.5-1]",
        ));
    }
    Ok(Some((connect, head.len + head.remaining)))
}

/// The bit of the protocol level that says that the client is a bridge.
const BRIDGE: u8 = 0x80;

/// The version, and whether the client is a bridge.
fn protocol(r: &mut Reader<'_>) -> Result<(Version, bool), Error> {
    let name = r.binary()?;
    let level = r.u8()?;
    let (number, bridge) = (level & !BRIDGE, level & BRIDGE != 0);
    match (name, number) {
        (b"MQTT", 5) if !bridge => Ok((Version::V5, false)),
        (b"MQTT", 4) => Ok((Version::V311, bridge)),
        (b"MQIsdp", 3) => Ok((Version::V31, bridge)),
        (b"MQTT" | b"MQIsdp", _) => Err(Error::UnsupportedVersion { level }),
        _ => Err(Error::ProtocolName),
    }
}

/// The version in which a client that sent a faulty CONNECT can read the answer. `input` begins with that
/// CONNECT. `None`: the client gets none, because the bytes name no version, or because a server of MQTT 3
/// closes the connection of a malformed CONNECT without an answer [MQTT-3.1.4-1]. Such a server does say
/// that it does not know a version [MQTT-3.1.2-2].
pub fn answerable(input: &[u8]) -> Option<Version> {
    if input.first() != Some(&0x10) {
        return None;
    }
    // The name follows the length, which may be at fault itself.
    let level_after = |name: &[u8]| {
        let mut all = input.windows(name.len()).take(7);
        let at = all.position(|bytes| bytes == name)?;
        Some(input.get(at + name.len())? & !BRIDGE)
    };
    match (level_after(b"\0\x04MQTT"), level_after(b"\0\x06MQIsdp")) {
        (Some(4), _) | (_, Some(3)) => None,
        (Some(level), _) if level >= 5 => Some(Version::V5),
        (Some(_), _) => Some(Version::V311),
        (None, Some(_)) => Some(Version::V31),
        (None, None) => None,
    }
}

const RESERVED: u8 = 0x01;
const CLEAN: u8 = 0x02;
const WILL: u8 = 0x04;
const WILL_QOS: u8 = 0x18;
const WILL_RETAIN: u8 = 0x20;
const PASSWORD: u8 = 0x40;
const USERNAME: u8 = 0x80;

fn check_flags(flags: u8, version: Version) -> Result<(), Error> {
    if flags & RESERVED != 0 {
        return Err(Error::Malformed("reserved CONNECT flag [MQTT-3.1.2-3]"));
    }
    if flags & WILL_QOS == WILL_QOS {
        return Err(Error::Malformed("Will QoS 3 [MQTT-3.1.2-12]"));
    }
    if flags & WILL == 0 && flags & (WILL_QOS | WILL_RETAIN) != 0 {
        return Err(Error::Malformed(
            "Will QoS or Will Retain without a will [MQTT-3.1.2-11]",
        ));
    }
    if version != Version::V5 && flags & PASSWORD != 0 && flags & USERNAME == 0 {
        return Err(Error::Malformed(
            "password without a user name [MQTT-3.1.2-22]",
        ));
    }
    Ok(())
}

impl<'a> Connect<'a> {
    pub(crate) fn read(body: &'a [u8]) -> Result<Connect<'a>, Error> {
        let mut r = Reader(body);
        let (version, bridge) = protocol(&mut r)?;
        let flags = r.u8()?;
        check_flags(flags, version)?;
        let mut connect = Connect {
            version,
            bridge,
            clean_start: flags & CLEAN != 0,
            keep_alive: r.u16()?,
            ..Connect::default()
        };
        if version == Version::V5 {
            connect.read_properties(&mut r)?;
        }
        connect.client_id = r.string()?;
        if flags & WILL != 0 {
            connect.will = Some(Will::read(&mut r, flags, version)?);
        }
        if flags & USERNAME != 0 {
            connect.username = Some(r.string()?);
        }
        if flags & PASSWORD != 0 {
            connect.password = Some(r.binary()?);
        }
        r.end()?;
        Ok(connect)
    }

    fn read_properties(&mut self, r: &mut Reader<'a>) -> Result<(), Error> {
        use Property as P;
        self.properties = props::read(r, props::ON_CONNECT, |p| match p {
            P::SessionExpiryInterval(v) => self.session_expiry = Some(v),
            P::ReceiveMaximum(v) => self.receive_maximum = Some(v),
            P::MaximumPacketSize(v) => self.maximum_packet_size = Some(v),
            P::TopicAliasMaximum(v) => self.topic_alias_maximum = v,
            P::RequestResponseInformation(v) => self.request_response_information = v == 1,
            P::RequestProblemInformation(v) => self.request_problem_information = v == 1,
            P::AuthenticationMethod(v) => self.authentication_method = Some(v),
            P::AuthenticationData(v) => self.authentication_data = Some(v),
            _ => {}
        })?;
        if self.authentication_data.is_some() && self.authentication_method.is_none() {
            return Err(Error::Protocol(
                "Authentication Data without a method (§3.1.2.11.10)",
            ));
        }
        Ok(())
    }

    /// Appends the packet (client role). The fields are written, but not `properties`; of the will's
    /// properties, only those of its message are written.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let v5 = self.version == Version::V5;
        let own = if v5 { self.block() } else { [None; 8] };
        let (name, level) = match self.version {
            Version::V31 => ("MQIsdp", 3),
            Version::V311 => ("MQTT", 4),
            Version::V5 => ("MQTT", 5),
        };
        let mut len = str_len(name) + 4 + str_len(self.client_id);
        if v5 {
            len += props::framed_len(props::block_len(&own));
        }
        len += self.will.map_or(0, |will| will.size(v5));
        len += self.username.map_or(0, str_len) + self.sent_password().map_or(0, bytes_len);
        if !put_head(head::CONNECT << 4, len, out) {
            return;
        }
        put_str(name, out);
        let bridge = if self.bridge && !v5 { BRIDGE } else { 0 };
        out.push(level | bridge);
        out.push(self.flags());
        put_u16(self.keep_alive, out);
        if v5 {
            props::put_block(&own, out);
        }
        put_str(self.client_id, out);
        if let Some(will) = &self.will {
            will.put(v5, out);
        }
        if let Some(username) = self.username {
            put_str(username, out);
        }
        if let Some(password) = self.sent_password() {
            put_bytes(password, out);
        }
    }

    // [MQTT-3.1.2-22] of 3.1.1: none without a user name.
    fn sent_password(&self) -> Option<&'a [u8]> {
        let alone = self.version != Version::V5 && self.username.is_none();
        self.password.filter(|_| !alone)
    }

    fn flags(&self) -> u8 {
        let will = self.will.map_or(0, |will| {
            WILL | (will.qos as u8) << 3 | if will.retain { WILL_RETAIN } else { 0 }
        });
        will | if self.clean_start { CLEAN } else { 0 }
            | if self.username.is_some() { USERNAME } else { 0 }
            | if self.sent_password().is_some() {
                PASSWORD
            } else {
                0
            }
    }

    fn block(&self) -> [Option<Property<'a>>; 8] {
        use Property as P;
        let aliases = Some(self.topic_alias_maximum).filter(|&max| max != 0);
        [
            self.session_expiry.map(P::SessionExpiryInterval),
            self.receive_maximum.map(P::ReceiveMaximum),
            self.maximum_packet_size.map(P::MaximumPacketSize),
            aliases.map(P::TopicAliasMaximum),
            self.request_response_information
                .then_some(P::RequestResponseInformation(1)),
            (!self.request_problem_information).then_some(P::RequestProblemInformation(0)),
            self.authentication_method.map(P::AuthenticationMethod),
            self.authentication_data.map(P::AuthenticationData),
        ]
    }
}

impl<'a> Will<'a> {
    fn read(r: &mut Reader<'a>, flags: u8, version: Version) -> Result<Will<'a>, Error> {
        let mut will = Will {
            qos: QoS::from_u8((flags & WILL_QOS) >> 3).unwrap_or_default(),
            retain: flags & WILL_RETAIN != 0,
            ..Will::default()
        };
        if version == Version::V5 {
            will.properties = props::read(r, props::ON_WILL, |p| match p {
                Property::WillDelayInterval(s) => will.delay = s,
                Property::MessageExpiryInterval(s) => will.message_expiry = Some(s),
                _ => {}
            })?;
        }
        will.topic = r.string()?;
        if !valid_topic_name(will.topic) {
            return Err(Error::TopicName(
                "Will Topic is empty or has wildcards [MQTT-4.7.0-1]",
            ));
        }
        will.payload = r.binary()?;
        Ok(will)
    }

    fn size(&self, v5: bool) -> usize {
        let block = if v5 {
            props::framed_len(self.block_len())
        } else {
            0
        };
        block + str_len(self.topic) + bytes_len(self.payload)
    }

    fn put(&self, v5: bool, out: &mut Vec<u8>) {
        if v5 {
            crate::mqtt::write::put_varint(self.block_len(), out);
            for property in self.own().iter().flatten() {
                property.write(out);
            }
            self.forwarded()
                .for_each(|span| out.extend_from_slice(span));
        }
        put_str(self.topic, out);
        put_bytes(self.payload, out);
    }

    fn block_len(&self) -> usize {
        props::block_len(&self.own()) + self.forwarded().map(<[u8]>::len).sum::<usize>()
    }

    fn own(&self) -> [Option<Property<'a>>; 2] {
        [
            Some(self.delay)
                .filter(|&s| s != 0)
                .map(Property::WillDelayInterval),
            self.message_expiry.map(Property::MessageExpiryInterval),
        ]
    }

    fn forwarded(&self) -> impl Iterator<Item = &'a [u8]> {
        props::forwarded(self.properties, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(connect: &Connect<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        connect.encode(&mut out);
        out
    }

    #[test]
    fn least_connects() {
        let connect = |version| Connect {
            version,
            keep_alive: 60,
            client_id: "c",
            ..Connect::default()
        };
        assert_eq!(
            bytes(&connect(Version::V5)),
            b"\x10\x0E\0\x04MQTT\x05\x02\0\x3C\0\0\x01c"
        );
        assert_eq!(
            bytes(&connect(Version::V311)),
            b"\x10\x0D\0\x04MQTT\x04\x02\0\x3C\0\x01c"
        );
        assert_eq!(
            bytes(&connect(Version::V31)),
            b"\x10\x0F\0\x06MQIsdp\x03\x02\0\x3C\0\x01c"
        );
    }

    #[test]
    fn a_bridge_sets_a_bit_of_the_level_in_v3() {
        for (version, sent) in [
            (
                Version::V31,
                b"\x10\x0F\0\x06MQIsdp\x83\x02\0\0\0\x01c".as_slice(),
            ),
            (Version::V311, b"\x10\x0D\0\x04MQTT\x84\x02\0\0\0\x01c"),
            (Version::V5, b"\x10\x0E\0\x04MQTT\x05\x02\0\0\0\0\x01c"),
        ] {
            let connect = Connect {
                version,
                bridge: true,
                client_id: "c",
                ..Connect::default()
            };
            assert_eq!(bytes(&connect), sent);
            let (read, _) = decode_connect(sent, 100).expect("legal").expect("whole");
            assert_eq!(
                (read.version, read.bridge),
                (version, version < Version::V5)
            );
        }
    }

    #[test]
    fn an_unknown_level_is_answered_in_a_form_that_the_client_reads() {
        let connect = |name: &str, level: u8| {
            let name_len = name.len() as u8;
            let fixed = [0x10, name_len + 8, 0, name_len];
            [&fixed, name.as_bytes(), &[level, 2, 0, 0, 0, 1, b'c']].concat()
        };
        for level in 0..=u8::MAX {
            let (mqtt, mqisdp) = (connect("MQTT", level), connect("MQIsdp", level));
            let expected = match level & 0x7F {
                4 => None,
                5.. => Some(Version::V5),
                _ => Some(Version::V311),
            };
            assert_eq!(answerable(&mqtt), expected, "{level:#x}");
            let expected = (level & 0x7F != 3).then_some(Version::V31);
            assert_eq!(answerable(&mqisdp), expected, "{level:#x}");
        }
        assert_eq!(answerable(&connect("MQTx", 4)), None);
        assert_eq!(answerable(&connect("MQTT", 5)[1..]), None);
    }

    #[test]
    fn a_password_is_not_alone_in_v3() {
        let alone = |version| Connect {
            version,
            password: Some(b"p"),
            ..Connect::default()
        };
        assert_eq!(
            bytes(&alone(Version::V311)),
            b"\x10\x0C\0\x04MQTT\x04\x02\0\0\0\0"
        );
        assert_eq!(
            bytes(&alone(Version::V5)),
            b"\x10\x10\0\x04MQTT\x05\x42\0\0\0\0\0\0\x01p"
        );
    }

    #[test]
    fn every_field_goes_round() {
        let will = Will {
            qos: QoS::ExactlyOnce,
            retain: true,
            topic: "w",
            payload: &[0, 1],
            delay: 7,
            message_expiry: Some(8),
            // Delay and expiry come from the fields, the rest from here.
            properties: Properties(b"\x18\0\0\0\x09\x03\0\x01t\x26\0\x01k\0\x01v"),
        };
        let all = Connect {
            clean_start: false,
            keep_alive: 1,
            client_id: "c",
            will: Some(will),
            username: Some("u"),
            password: Some(&[0xFF]),
            session_expiry: Some(2),
            receive_maximum: Some(3),
            maximum_packet_size: Some(4),
            topic_alias_maximum: 5,
            request_response_information: true,
            request_problem_information: false,
            authentication_method: Some("m"),
            authentication_data: Some(b"d"),
            ..Connect::default()
        };
        let bytes = bytes(&all);
        let (read, taken) = decode_connect(&bytes, 1000).expect("legal").expect("whole");
        assert_eq!(taken, bytes.len());
        let got = read.will.expect("written");
        let raw = b"\x18\0\0\0\x07\x02\0\0\0\x08\x03\0\x01t\x26\0\x01k\0\x01v";
        assert_eq!(got.properties.raw(), raw);
        let read = Connect {
            properties: Properties(&[]),
            will: Some(Will {
                properties: will.properties,
                ..got
            }),
            ..read
        };
        assert_eq!(read, all);
    }

    #[test]
    fn other_protocols_are_seen_at_once() {
        let tls = decode_connect(&[0x16], 100).expect_err("TLS");
        assert!(tls.to_string().contains("TLS"));
        let http = decode_connect(b"G", 100).expect_err("HTTP");
        assert_eq!(http.reason_code(), crate::mqtt::ReasonCode::PROTOCOL_ERROR);
    }
}
