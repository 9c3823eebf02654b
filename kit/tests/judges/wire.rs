//! The kit's codec reads every packet that it writes, and refuses illegal ones.

use tidegate_kit::wire::{
    Ack, Codes, ConnAck, Connect, Packet, Props, Publish, Reason, Subscribe, Unsubscribe, Value,
    Version, Will, decode, encode, prop,
};

const VERSIONS: [Version; 3] = [Version::V31, Version::V311, Version::V5];

fn every_packet(v5: bool) -> Vec<Packet> {
    let props = |id: u8, value: Value| {
        if v5 {
            Props::default().with(id, value)
        } else {
            Props::default()
        }
    };
    let reason = || props(prop::REASON_STRING, Value::Text("why".into()));
    let code = |code: u8| if v5 { code } else { 0 };
    let ack = Ack {
        id: 9,
        code: code(0x10),
        props: reason(),
    };
    let mut all = vec![
        Packet::ConnAck(ConnAck {
            session_present: true,
            code: 0,
            props: props(prop::RECEIVE_MAX, Value::Two(20)),
        }),
        Packet::Publish(Publish {
            dup: true,
            qos: 2,
            retain: true,
            topic: "a/ä".into(),
            id: 65535,
            props: props(prop::USER_PROPERTY, Value::Pair("k".into(), "v".into())),
            payload: vec![0, 255, 7],
        }),
        Packet::Publish(Publish {
            topic: "q0".into(),
            payload: vec![1; 300],
            ..Publish::default()
        }),
        Packet::PubAck(ack.clone()),
        Packet::PubRec(ack.clone()),
        Packet::PubRel(ack.clone()),
        Packet::PubComp(Ack {
            id: 1,
            ..Ack::default()
        }),
        Packet::Subscribe(Subscribe {
            id: 3,
            props: props(prop::SUBSCRIPTION_ID, Value::Var(268_435_455)),
            filters: vec![("a/+".into(), 1), ("#".into(), 2)],
        }),
        Packet::SubAck(Codes {
            id: 3,
            props: reason(),
            codes: vec![1, 0x80],
        }),
        Packet::Unsubscribe(Unsubscribe {
            id: 4,
            props: Props::default(),
            filters: vec!["a/+".into()],
        }),
        Packet::UnsubAck(Codes {
            id: 4,
            props: reason(),
            codes: if v5 { vec![0x11] } else { vec![] },
        }),
        Packet::PingReq,
        Packet::PingResp,
        Packet::Disconnect(Reason {
            code: code(0x8E),
            props: reason(),
        }),
    ];
    if v5 {
        let method = Props::default().with(prop::AUTH_METHOD, Value::Text("m".into()));
        all.push(Packet::Auth(Reason {
            code: 0x18,
            props: method,
        }));
    }
    all
}

#[test]
fn every_packet_survives_its_own_bytes_and_any_cut() {
    for version in VERSIONS {
        let mut packets = every_packet(version.is_v5());
        let mut connect = Connect::new("client")
            .version(version)
            .login("user", "secret");
        let mut will = Will {
            topic: "w".into(),
            payload: vec![1],
            qos: 1,
            ..Will::default()
        };
        if version.is_v5() {
            connect = connect.expiry(300).receive_max(7);
            will.props = Props::default().with(prop::WILL_DELAY, Value::Four(30));
        }
        packets.push(Packet::Connect(Box::new(connect.will(will).clean(false))));
        for packet in packets {
            let mut bytes = Vec::new();
            encode(&packet, version, &mut bytes);
            let (back, len) = decode(version, &bytes)
                .unwrap()
                .expect("the packet is whole");
            assert_eq!((&back, len), (&packet, bytes.len()), "{version:?}");
            for cut in 0..bytes.len() {
                assert_eq!(
                    decode(version, &bytes[..cut]),
                    Ok(None),
                    "{version:?} {packet:?} {cut}"
                );
            }
        }
    }
}

#[test]
fn illegal_packets_are_refused() {
    let illegal: [(&str, Version, &[u8]); 12] = [
        ("QoS 3", Version::V311, b"\x36\x05\x00\x01a\x00\x01"),
        ("packet id 0", Version::V311, b"\x32\x05\x00\x01a\x00\x00"),
        ("DUP on QoS 0", Version::V311, b"\x38\x03\x00\x01a"),
        ("wildcard topic", Version::V311, b"\x30\x03\x00\x01#"),
        ("bad UTF-8", Version::V311, b"\x30\x03\x00\x01\xff"),
        ("reserved flags", Version::V311, b"\xd1\x00"),
        ("trailing bytes", Version::V311, b"\x40\x03\x00\x01\x00"),
        ("type 15 in 3.1.1", Version::V311, b"\xf0\x00"),
        ("not minimal", Version::V5, b"\xc0\x80\x00"),
        ("no topic, no alias", Version::V5, b"\x30\x03\x00\x00\x00"),
        (
            "property twice",
            Version::V5,
            b"\x30\x08\x00\x01a\x04\x01\x00\x01\x01",
        ),
        (
            "property elsewhere",
            Version::V5,
            b"\x40\x06\x00\x01\x00\x02\x24\x01",
        ),
    ];
    for (what, version, bytes) in illegal {
        assert!(decode(version, bytes).is_err(), "accepted: {what}");
    }
}
