//! Properties that must hold for any bytes that reach a decoder. The fuzz targets and the stable
//! tests call the same functions.

use tidegate::mqtt::*;
use tidegate::topics::{split_shared, valid_filter, valid_topic_name};

/// Every version, as both roles.
pub const DECODERS: [(Version, Receiver); 6] = [
    (Version::V31, Receiver::Server),
    (Version::V311, Receiver::Server),
    (Version::V5, Receiver::Server),
    (Version::V31, Receiver::Client),
    (Version::V311, Receiver::Client),
    (Version::V5, Receiver::Client),
];

/// A stream of packets: all properties below, packet by packet.
pub fn stream(version: Version, receiver: Receiver, mut buf: &[u8]) {
    let decoder = Decoder {
        version,
        receiver,
        max: u32::MAX,
    };
    loop {
        split(buf, |b| decoder.next(b));
        bound(version, receiver, buf);
        let Ok(Some((packet, taken))) = decoder.next(buf) else {
            return;
        };
        assert!(taken >= 2 && taken <= buf.len());
        read_all(&packet);
        round_trip(&packet, version, receiver);
        if let Packet::Publish(publish) = &packet {
            deliver(publish);
        }
        buf = &buf[taken..];
    }
}

/// The first packet of a connection.
pub fn first(buf: &[u8]) {
    split(buf, |b| decode_connect(b, u32::MAX));
    let Ok(Some((connect, taken))) = decode_connect(buf, u32::MAX) else {
        return;
    };
    assert!(matches!(decode_connect(buf, taken as u32), Ok(Some(_))));
    assert!(matches!(
        decode_connect(&buf[..5], taken as u32 - 1),
        Err(Error::TooLarge { .. })
    ));
    let packet = Packet::Connect(Box::new(connect));
    read_all(&packet);
    round_trip(&packet, connect.version, Receiver::Server);
    if let Some(will) = connect.will {
        deliver(&Publish {
            topic: will.topic,
            payload: will.payload,
            properties: will.properties,
            ..Publish::default()
        });
    }
    bridge_bit(&connect, &buf[..taken]);
}

/// The bridge bit of the level changes nothing else in a CONNECT of 3.x, and is illegal in MQTT 5.
fn bridge_bit(connect: &Connect<'_>, packet: &[u8]) {
    let name_len = if connect.version == Version::V31 {
        6
    } else {
        4
    };
    let fixed = packet.iter().skip(1).position(|byte| byte & 0x80 == 0);
    let level = fixed.expect("legal") + 2 + 2 + name_len;
    let mut other = packet.to_vec();
    other[level] ^= 0x80;
    let decoded = decode_connect(&other, u32::MAX);
    if connect.version == Version::V5 {
        assert_eq!(decoded, Err(Error::UnsupportedVersion { level: 0x85 }));
        return;
    }
    let expected = Connect {
        bridge: !connect.bridge,
        ..*connect
    };
    assert_eq!(decoded, Ok(Some((expected, packet.len()))));
}

/// Bytes that come one by one give no packet until the last one, and then the same packet as all
/// bytes at once. An error may come earlier, but must be the same.
fn split<'a, T: PartialEq + std::fmt::Debug>(
    buf: &'a [u8],
    decode: impl Fn(&'a [u8]) -> Result<Option<(T, usize)>, Error>,
) {
    let whole = decode(buf);
    let end = match &whole {
        Ok(Some((_, taken))) => *taken,
        _ => buf.len(),
    };
    // For long packets: every cut near both ends, some between.
    let cuts = (0..end).filter(|&cut| cut < 64 || end - cut < 64 || cut % 997 == 0);
    for cut in cuts {
        match decode(&buf[..cut]) {
            Ok(None) => {}
            Err(early) => assert_eq!(Err(early), whole, "cut at {cut}"),
            Ok(Some(_)) => panic!("a packet out of {cut} of {end} bytes"),
        }
    }
    if whole.is_ok() {
        assert_eq!(decode(&buf[..end]), whole);
    }
}

/// A bound is judged on the fixed header alone, and exactly.
fn bound(version: Version, receiver: Receiver, buf: &[u8]) {
    let bounded = |max| Decoder {
        version,
        receiver,
        max,
    };
    let Ok(Some((_, taken))) = bounded(u32::MAX).next(buf) else {
        return;
    };
    let size = taken as u32;
    assert!(matches!(bounded(size).next(buf), Ok(Some(_))));
    let header = &buf[..buf.len().min(5)];
    assert_eq!(
        bounded(size - 1).next(header),
        Err(Error::TooLarge {
            size,
            max: size - 1
        })
    );
}

/// Every accessor yields values that decoding has promised.
fn read_all(packet: &Packet<'_>) {
    let properties = properties_of(packet);
    let listed: usize = properties.iter().map(|_| 1).sum();
    assert_eq!(listed == 0, properties.is_empty());
    assert!(properties.user_properties().count() <= listed);
    match packet {
        Packet::Publish(p) => {
            assert_eq!(p.packet_id == 0, p.qos == QoS::AtMostOnce);
            assert!(valid_topic_name(p.topic) || (p.topic.is_empty() && p.topic_alias.is_some()));
            assert_eq!(
                p.has_subscription_ids,
                p.subscription_ids().next().is_some()
            );
            assert!(p.subscription_ids().all(|id| id != 0));
            assert_ne!(p.topic_alias, Some(0));
        }
        Packet::Connect(c) => {
            assert!(c.authentication_data.is_none() || c.authentication_method.is_some());
            assert!(c.will.is_none_or(|will| valid_topic_name(will.topic)));
        }
        Packet::Subscribe(s) => {
            assert!(s.packet_id != 0 && s.filters().count() > 0);
            for (filter, options) in s.filters() {
                assert!(valid_filter(filter));
                assert!(!(options.no_local && split_shared(filter).is_some()));
                assert!(options.retain_handling < 3);
            }
        }
        Packet::Unsubscribe(u) => {
            assert!(u.packet_id != 0 && u.filters().count() > 0);
            assert!(u.filters().all(valid_filter));
        }
        Packet::Suback(s) => assert!(s.packet_id != 0 && !s.codes.is_empty()),
        Packet::Puback(a) | Packet::Pubrec(a) | Packet::Pubrel(a) | Packet::Pubcomp(a) => {
            assert_ne!(a.packet_id, 0);
            assert_ne!(a.reason.name(), "Unknown");
        }
        _ => {}
    }
}

/// A packet that is encoded and decoded again is the same, except for properties that the encoder
/// leaves out.
fn round_trip(packet: &Packet<'_>, version: Version, receiver: Receiver) {
    let Some(bytes) = encode(packet, version) else {
        return;
    };
    let decoder = Decoder {
        version,
        receiver,
        max: u32::MAX,
    };
    let (again, taken) = decoder
        .next(&bytes)
        .unwrap_or_else(|e| panic!("{e}: {packet:?} as {bytes:02X?}"))
        .expect("whole");
    assert_eq!(taken, bytes.len());
    assert_eq!(bare(again), bare(packet.clone()));
}

/// Our own encoding of a packet; `None` where the crate never writes that packet whole.
pub fn encode(packet: &Packet<'_>, version: Version) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let out_ref = &mut out;
    match packet {
        Packet::Connect(c) => c.encode(out_ref),
        Packet::Connack(c) => {
            c.encode(version, out_ref);
            assert_eq!(c.size(version), out_ref.len());
        }
        Packet::Publish(p) => {
            let message = message(p, None);
            let ids: Vec<u32> = p.subscription_ids().collect();
            let alias = match p.topic_alias {
                None => Alias::None,
                Some(alias) if p.topic.is_empty() => Alias::Use(alias),
                Some(alias) => Alias::Define(alias),
            };
            let delivery = Delivery {
                version,
                dup: p.dup,
                qos: p.qos,
                retain: p.retain,
                packet_id: p.packet_id,
                alias,
                message_expiry: p.message_expiry,
                subscription_ids: &ids,
                user_property: None,
                hidden: 0,
            };
            delivery.encode(&message, out_ref);
            assert_eq!(delivery.size(&message), out_ref.len());
        }
        Packet::Puback(a) => ack(version, AckKind::Puback, a, out_ref),
        Packet::Pubrec(a) => ack(version, AckKind::Pubrec, a, out_ref),
        Packet::Pubrel(a) => ack(version, AckKind::Pubrel, a, out_ref),
        Packet::Pubcomp(a) => ack(version, AckKind::Pubcomp, a, out_ref),
        Packet::Subscribe(s) => {
            encode_subscribe(
                version,
                s.packet_id,
                s.subscription_id,
                s.filters(),
                out_ref,
            );
        }
        Packet::Suback(s) => encode_suback(version, s.packet_id, s.codes, out_ref),
        Packet::Unsubscribe(u) => encode_unsubscribe(version, u.packet_id, u.filters(), out_ref),
        Packet::Unsuback(u) => encode_unsuback(version, u.packet_id, u.codes, out_ref),
        Packet::Pingreq => encode_pingreq(out_ref),
        Packet::Pingresp => encode_pingresp(out_ref),
        Packet::Disconnect(d) if d.server_reference.is_some() => return None,
        Packet::Disconnect(d) => {
            encode_disconnect(
                version,
                d.reason,
                d.session_expiry,
                d.reason_string,
                out_ref,
            );
        }
        Packet::Auth(a) if a.reason_string.is_some() => return None,
        Packet::Auth(a) => encode_auth(a.reason, a.method, a.data, out_ref),
    }
    Some(out)
}

/// The packet without its raw properties.
pub fn bare(mut packet: Packet<'_>) -> Packet<'_> {
    match &mut packet {
        Packet::Connect(c) => {
            c.properties = Properties::default();
            if let Some(will) = &mut c.will {
                will.properties = Properties::default();
            }
        }
        Packet::Connack(p) => p.properties = Properties::default(),
        Packet::Publish(p) => p.properties = Properties::default(),
        Packet::Puback(p) | Packet::Pubrec(p) | Packet::Pubrel(p) | Packet::Pubcomp(p) => {
            p.properties = Properties::default();
        }
        Packet::Subscribe(p) => p.properties = Properties::default(),
        Packet::Suback(p) => p.properties = Properties::default(),
        Packet::Unsubscribe(p) => p.properties = Properties::default(),
        Packet::Unsuback(p) => p.properties = Properties::default(),
        Packet::Disconnect(p) => p.properties = Properties::default(),
        Packet::Auth(p) => p.properties = Properties::default(),
        Packet::Pingreq | Packet::Pingresp => {}
    }
    packet
}

/// The raw properties of any packet.
pub fn properties_of<'a>(packet: &Packet<'a>) -> Properties<'a> {
    match packet {
        Packet::Connect(p) => p.properties,
        Packet::Connack(p) => p.properties,
        Packet::Publish(p) => p.properties,
        Packet::Puback(p) | Packet::Pubrec(p) | Packet::Pubrel(p) | Packet::Pubcomp(p) => {
            p.properties
        }
        Packet::Subscribe(p) => p.properties,
        Packet::Suback(p) => p.properties,
        Packet::Unsubscribe(p) => p.properties,
        Packet::Unsuback(p) => p.properties,
        Packet::Disconnect(p) => p.properties,
        Packet::Auth(p) => p.properties,
        Packet::Pingreq | Packet::Pingresp => Properties::default(),
    }
}

/// The properties that travel with a message, in order.
pub fn travelling<'a>(properties: Properties<'a>, strip: Option<&str>) -> Vec<Property<'a>> {
    properties
        .iter()
        .filter(|p| match p {
            Property::PayloadFormatIndicator(_)
            | Property::ContentType(_)
            | Property::ResponseTopic(_)
            | Property::CorrelationData(_) => true,
            Property::UserProperty(key, _) => strip != Some(key),
            _ => false,
        })
        .collect()
}

fn ack(version: Version, kind: AckKind, a: &Ack<'_>, out: &mut Vec<u8>) {
    encode_ack(version, kind, a.packet_id, a.reason, a.reason_string(), out);
}

fn message(publish: &Publish<'_>, strip_key: Option<&str>) -> Message {
    Message::new(&MessageSpec {
        topic: publish.topic,
        properties: publish.properties,
        payload: publish.payload,
        qos: publish.qos,
        retain: publish.retain,
        expires_at: None,
        strip_key,
        account: None,
    })
}

/// A stored message equals the published one, and every delivery of it decodes to the same.
fn deliver(publish: &Publish<'_>) {
    let strip = publish
        .properties
        .user_properties()
        .next()
        .map(|(key, _)| key);
    for strip in [None, strip] {
        let message = message(publish, strip);
        assert_eq!(message.topic(), publish.topic);
        assert_eq!(message.payload(), publish.payload);
        assert!(message.size() >= publish.topic.len() + publish.payload.len());
        for version in [Version::V31, Version::V311, Version::V5] {
            for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
                delivered(publish, &message, version, qos, strip);
            }
        }
    }
}

fn delivered(
    publish: &Publish<'_>,
    message: &Message,
    version: Version,
    qos: QoS,
    strip: Option<&str>,
) {
    if publish.topic.is_empty() {
        // A delivery needs the topic name behind the alias.
        return;
    }
    let delivery = Delivery {
        version,
        dup: publish.dup,
        qos,
        retain: publish.retain,
        packet_id: 0x1234,
        alias: publish.topic_alias.map_or(Alias::None, Alias::Define),
        message_expiry: publish.message_expiry,
        subscription_ids: &[1, 268_435_455],
        user_property: Some(("k", "v")),
        hidden: 0,
    };
    let mut bytes = vec![0xAA];
    delivery.encode(message, &mut bytes);
    let bytes = &bytes[1..];
    assert_eq!(delivery.size(message), bytes.len());

    let decoder = Decoder {
        version,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    let Ok(Some((Packet::Publish(got), taken))) = decoder.next(bytes) else {
        panic!("{:?} of {bytes:02X?}", decoder.next(bytes));
    };
    assert_eq!(taken, bytes.len());
    let id = if qos == QoS::AtMostOnce { 0 } else { 0x1234 };
    assert_eq!(
        (got.qos, got.packet_id, got.retain),
        (qos, id, publish.retain)
    );
    assert_eq!(got.dup, publish.dup && qos != QoS::AtMostOnce);
    assert_eq!((got.topic, got.payload), (publish.topic, publish.payload));
    if version == Version::V5 {
        assert_eq!(got.topic_alias, publish.topic_alias);
        assert_eq!(got.message_expiry, publish.message_expiry);
        assert!(got.subscription_ids().eq([1, 268_435_455]));
        let mut wanted = vec![Property::UserProperty("k", "v")];
        wanted.extend(travelling(publish.properties, strip));
        assert_eq!(travelling(got.properties, None), wanted);
    } else {
        assert!(got.properties.is_empty());
    }
}
