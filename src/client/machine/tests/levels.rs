//! Topics with more levels than `limits.topic_levels_max`, which is three here.

use super::*;
use crate::client::connect::{Admission, Applicant};
use crate::mqtt::{Connect, Decoder, Message, MessageSpec, Will};
use crate::router::publish::queue::Outgoing;
use crate::session::Scope;
use crate::sim::testing::{peer, publish_of, router_limited};

const DEEP: &str = "a/b/c/d";

/// A connected client, perhaps below a mount.
fn rig(version: Version, mount: &str) -> Rig {
    let router = router_limited(config(), |limits| limits.topic_levels_max = 3);
    let mut rig = Rig::on_router(router);
    rig.machine = machine(&rig.router, "deep", version, Millis::ZERO);
    rig.take();
    let (session, connection_no) = (rig.machine.session, rig.machine.connection_no);
    rig.router.with(session, connection_no, |session, _| {
        let connection = session.connection().expect("it is connected");
        connection.scope = scope(mount);
    });
    rig
}

fn scope(mount: &str) -> Option<Arc<Scope>> {
    (!mount.is_empty()).then(|| {
        Arc::new(Scope {
            mount: mount.into(),
            sender: Box::default(),
        })
    })
}

/// A PUBLISH with the packet identifier 7.
fn to(version: Version, topic: &str, qos: QoS, properties: &[u8]) -> Vec<u8> {
    let message = Message::new(&MessageSpec {
        topic,
        properties: Properties::own(properties),
        payload: b"x",
        qos,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    });
    publish_of(version, 7, &message)
}

/// The acknowledgements among these bytes: a word for each, and its reason code.
fn answers(version: Version, bytes: &[u8]) -> Vec<(&'static str, u8)> {
    let decoder = Decoder {
        version,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    let (mut all, mut at) = (Vec::new(), 0);
    while let Some((packet, size)) = decoder.next(&bytes[at..]).expect("it is legal") {
        at += size;
        all.push(match packet {
            Packet::Puback(a) => ("PUBACK", a.reason.0),
            Packet::Pubrec(a) => ("PUBREC", a.reason.0),
            Packet::Pubcomp(_) => ("PUBCOMP", 0),
            Packet::Suback(s) => ("SUBACK", s.codes[0]),
            Packet::Pingresp => ("PINGRESP", 0),
            other => panic!("{other:?}"),
        });
    }
    all
}

fn forwarded(rig: &Rig) -> Option<Outgoing> {
    rig.router.publish_queues(0, |queues| queues.pop())
}

#[test]
fn a_publish_with_too_many_levels_is_answered_and_the_connection_goes_on() {
    for version in [Version::V5, Version::V311, Version::V31] {
        let refused = match version {
            Version::V5 => 0x90,
            _ => 0,
        };
        for (qos, answer) in [
            (QoS::AtMostOnce, None),
            (QoS::AtLeastOnce, Some(("PUBACK", refused))),
            (QoS::ExactlyOnce, Some(("PUBREC", refused))),
        ] {
            let mut rig = rig(version, "");
            // A client with a store sends it again.
            for _ in 0..2 {
                let bytes = [to(version, DEEP, qos, &[]), vec![0xC0, 0]].concat();
                let reset = rig.received(StreamId::CONTROL, &bytes);
                assert!(reset.expect("the connection goes on").is_none());
                let expected: Vec<_> = answer.into_iter().chain([("PINGRESP", 0)]).collect();
                assert_eq!(
                    answers(version, &rig.take()),
                    expected,
                    "{version:?} {qos:?}"
                );
            }
            assert!(forwarded(&rig).is_none());
            if qos == QoS::ExactlyOnce && version < Version::V5 {
                rig.received(StreamId::CONTROL, &[0x62, 2, 0, 7])
                    .expect("PUBREL is legal");
                assert_eq!(answers(version, &rig.take()), [("PUBCOMP", 0)]);
            }
            rig.received(StreamId::CONTROL, &to(version, "a/b/c", qos, &[]))
                .expect("it is legal");
            assert!(forwarded(&rig).is_some());
        }
    }
}

#[test]
fn a_publish_with_too_many_levels_spares_its_data_stream() {
    let (mut rig, stream) = (rig(Version::V5, ""), StreamId::new(3));
    let bytes = to(Version::V5, DEEP, QoS::AtLeastOnce, &[]);
    let reset = rig.received(stream, &bytes).expect("it is answered");
    assert!(reset.is_none(), "{reset:?}");
    rig.machine
        .transmit(&rig.router, rig.now)
        .expect("it has the session");
    let bytes = std::mem::take(&mut rig.machine.output(stream).buf);
    assert_eq!(answers(Version::V5, &bytes), [("PUBACK", 0x90)]);
}

#[test]
fn the_levels_of_a_mount_count() {
    for (topic, code) in [("b/c", None), ("b/c/d", Some(0x90))] {
        let mut rig = rig(Version::V5, "a/");
        rig.received(
            StreamId::CONTROL,
            &to(Version::V5, topic, QoS::AtLeastOnce, &[]),
        )
        .expect("it is answered");
        let refused = answers(Version::V5, &rig.take()).first().map(|a| a.1);
        assert_eq!(refused, code, "{topic}");
        assert_eq!(forwarded(&rig).is_none(), code.is_some(), "{topic}");
    }
    let mut rig = rig(Version::V5, "a/");
    rig.received(StreamId::CONTROL, &subscribe("b/c/#"))
        .expect("it is answered");
    assert_eq!(answers(Version::V5, &rig.take()), [("SUBACK", 0x8F)]);
    rig.received(StreamId::CONTROL, &subscribe("b/#"))
        .expect("it waits for the broker");
    assert_eq!(rig.router.next_subscribes(0, 10).len(), 1);
}

#[test]
fn a_response_topic_with_too_many_levels_is_removed() {
    for (mount, topic, kept) in [
        ("", "a/b/c", true),
        ("", DEEP, false),
        ("m/", "a/b", true),
        ("m/", "a/b/c", false),
    ] {
        let mut rig = rig(Version::V5, mount);
        let mut properties = vec![0x08, 0, topic.len() as u8];
        properties.extend(topic.bytes());
        let bytes = to(Version::V5, "t", QoS::AtMostOnce, &properties);
        rig.received(StreamId::CONTROL, &bytes)
            .expect("it is legal");
        let outgoing = forwarded(&rig).expect("it is passed on");
        let properties = outgoing.message.properties();
        assert_eq!(!properties.is_empty(), kept, "{mount}{topic}");
    }
}

#[test]
fn a_will_with_too_many_levels_is_refused() {
    let rig = rig(Version::V5, "");
    for (mount, topic, refused) in [
        ("", "a/b/c", false),
        ("", DEEP, true),
        ("m/", "a/b", false),
        ("m/", "a/b/c", true),
    ] {
        let admission = Admission {
            router: &rig.router,
            policy: &Open,
            session: &Default::default(),
            limits: &Default::default(),
            now: Millis::ZERO,
        };
        let applicant = Applicant {
            client_id: "will".into(),
            owner: "anonymous".into(),
            scope: scope(mount),
            added_bytes: 0,
            keep_alive_max: None,
            peer: peer(),
            ping_after: None,
        };
        let connect = Connect {
            client_id: "will",
            will: Some(Will {
                topic,
                ..Will::default()
            }),
            ..Connect::default()
        };
        let admitted = admission.admit(&connect, applicant);
        assert_eq!(admitted.is_err(), refused, "{mount}{topic}");
    }
}
