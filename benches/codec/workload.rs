//! The work that the codec's benchmarks and `codec_count` run.
#![allow(dead_code, reason = "each of the benches uses a part of it")]

use mqtt_protocol_core::mqtt;
use std::hint::black_box;
use tidegate::mqtt::*;
use tokio_util::codec::Decoder as _;

/// Packets in one buffer.
pub(crate) const PACKETS: usize = 1000;

const TOPIC: &str = "plant/7/line/12/robot/0042/joint/3/pos";

/// The kinds of PUBLISH.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Case {
    V311,
    V5,
    /// MQTT 5 with message expiry and one user property.
    V5Properties,
}

impl Case {
    pub(crate) const ALL: [Case; 3] = [Case::V311, Case::V5, Case::V5Properties];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Case::V311 => "v3.1.1",
            Case::V5 => "v5",
            Case::V5Properties => "v5 with 2 properties",
        }
    }

    pub(crate) fn version(self) -> Version {
        if self == Case::V311 {
            Version::V311
        } else {
            Version::V5
        }
    }
}

/// One PUBLISH, QoS 1.
pub(crate) fn frame(case: Case) -> Vec<u8> {
    let topic = &TOPIC.as_bytes()[..37];
    let properties: &[u8] = match case {
        Case::V311 => b"",
        Case::V5 => b"\0",
        Case::V5Properties => b"\x14\x02\0\0\x0E\x10\x26\0\x05trace\0\x05abcde",
    };
    let mut body = vec![0, 37];
    body.extend_from_slice(topic);
    body.extend_from_slice(&[0x12, 0x34]);
    body.extend_from_slice(properties);
    body.extend((0..100u8).map(|i| i.wrapping_mul(37)));
    let mut frame = vec![0x32, body.len() as u8 | 0x80, (body.len() >> 7) as u8];
    frame.extend(body);
    frame
}

pub(crate) fn stream(case: Case) -> Vec<u8> {
    frame(case).repeat(PACKETS)
}

pub(crate) fn ours(case: Case, mut buf: &[u8]) {
    let decoder = Decoder {
        version: case.version(),
        receiver: Receiver::Server,
        max: 1 << 20,
    };
    let mut seen = 0;
    while let Ok(Some((Packet::Publish(publish), taken))) = decoder.next(buf) {
        black_box(&publish);
        seen += 1;
        buf = &buf[taken..];
    }
    assert_eq!(seen, PACKETS);
}

pub(crate) fn rmqtt(case: Case, buf: &mut bytes::BytesMut) {
    let mut seen = 0;
    if case == Case::V311 {
        let mut codec = rmqtt_codec::v3::Codec::new(1 << 20);
        while let Some((packet, _)) = codec.decode(buf).expect("legal") {
            black_box(&packet);
            seen += 1;
        }
    } else {
        let mut codec = rmqtt_codec::v5::Codec::new(1 << 20, 1 << 20);
        while let Some((packet, _)) = codec.decode(buf).expect("legal") {
            black_box(&packet);
            seen += 1;
        }
    }
    assert_eq!(seen, PACKETS);
}

/// The parser alone: the simplest possible framing replaces its own.
pub(crate) fn protocol_core(case: Case, mut buf: &[u8]) {
    let mut seen = 0;
    while let [first, low, high, ..] = *buf {
        let len = usize::from(low & 127) | usize::from(high) << 7;
        let body = mqtt::Arc::from(&buf[3..3 + len]);
        if case == Case::V311 {
            let parsed = mqtt::packet::v3_1_1::Publish::parse(first & 15, body);
            black_box(parsed.expect("legal"));
        } else {
            let parsed = mqtt::packet::v5_0::Publish::parse(first & 15, body);
            black_box(parsed.expect("legal"));
        }
        seen += 1;
        buf = &buf[3 + len..];
    }
    assert_eq!(seen, PACKETS);
}

/// The message of a frame's PUBLISH.
pub(crate) fn message(case: Case, frame: &[u8]) -> Message {
    let decoder = Decoder {
        version: case.version(),
        receiver: Receiver::Server,
        max: 1 << 20,
    };
    let Ok(Some((Packet::Publish(publish), _))) = decoder.next(frame) else {
        unreachable!("a PUBLISH");
    };
    Message::new(&MessageSpec {
        topic: publish.topic,
        properties: publish.properties,
        payload: publish.payload,
        qos: publish.qos,
        retain: publish.retain,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

/// The delivery options of a receiver in this case.
pub(crate) fn delivery(case: Case) -> Delivery<'static> {
    let expiry = (case == Case::V5Properties).then_some(3600);
    Delivery {
        version: case.version(),
        dup: false,
        qos: QoS::AtLeastOnce,
        retain: false,
        packet_id: 1,
        alias: Alias::None,
        message_expiry: expiry,
        subscription_ids: &[],
        user_property: None,
        hidden: 0,
    }
}
