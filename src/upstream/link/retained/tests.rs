use std::sync::Arc;

use crate::mqtt::{
    Decoder, Packet, Properties, Publish, QoS, ReasonCode, Receiver, Suback, Version,
};
use crate::sim::testing::{PROBES, client, router, subscribe_handling, up};
use crate::time::Millis;
use crate::topics::FilterId;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::Machine;
use crate::upstream::link::retained::{REMEMBERED, RetainedLink};

/// A filter that is not fetched again, because nobody wants it any more, must not slow the others'
/// fetches for ever.
#[test]
fn a_suspect_that_nobody_wants_any_more_is_forgotten() {
    let router = router();
    let who = client(&router, "a");
    let mut link = RetainedLink::new(router.clone(), Arc::from(PROBES));
    let mut out = Vec::new();
    let mut fetches_of = |link: &mut RetainedLink, names: [&str; 2], now| {
        for name in names {
            subscribe_handling(&router, who, name, 0);
        }
        for subscribe in router.next_subscribes(0, 10) {
            router.suback(subscribe.filter, ReasonCode::SUCCESS, now);
        }
        link.poll(now, &mut out);
        link.fetches.len()
    };
    link.suspect(&[(FilterId::from_index(1000), "gone".into())], Millis::ZERO);
    link.connected(&up(false, 20), Millis::ZERO, &mut Vec::new());
    assert_eq!(fetches_of(&mut link, ["a", "b"], Millis::ZERO), 1);
    link.disconnected(&LinkEnd::Failover, Millis::ZERO);
    let later = Millis::ZERO + REMEMBERED;
    link.connected(&up(false, 20), later, &mut Vec::new());
    assert_eq!(
        link.fetches.iter().map(|f| f.filters.len()).sum::<usize>(),
        2
    );
    assert!(link.suspects.is_empty());
}

/// Filters without wildcards share packets and an identifier.
#[test]
fn messages_of_filters_that_share_a_packet_are_told_apart_by_their_topics() {
    let router = router();
    let who = client(&router, "a");
    let mut link = RetainedLink::new(router.clone(), Arc::from(PROBES));
    let mut out = Vec::new();
    link.connected(&up(false, 20), Millis::ZERO, &mut out);
    for name in ["a", "b", "+"] {
        subscribe_handling(&router, who, name, 0);
    }
    for subscribe in router.next_subscribes(0, 10) {
        router.suback(subscribe.filter, ReasonCode::SUCCESS, Millis::ZERO);
    }
    link.poll(Millis::ZERO, &mut out);
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let (mut at, mut packets) = (0, Vec::new());
    while let Some((packet, size)) = decoder.next(&out[at..]).expect("it is legal") {
        at += size;
        if let Packet::Subscribe(s) = packet {
            let names: Vec<String> = s.filters().map(|(name, _)| name.to_owned()).collect();
            packets.push((s.packet_id, s.subscription_id.expect("it has one"), names));
        }
    }
    assert_eq!(packets.len(), 2);
    assert_eq!(
        (&*packets[0].2, &*packets[1].2),
        (&["a", "b"].map(String::from)[..], &["+".to_owned()][..])
    );
    for (packet_id, _, _) in &packets {
        let suback = Suback {
            packet_id: *packet_id,
            codes: &[0],
            properties: Properties::default(),
        };
        link.packet(&Packet::Suback(suback), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    let mut brings = |topic, payload: &[u8], identifier: u32| {
        let properties = [0x0B, identifier as u8];
        let message = Publish {
            dup: false,
            qos: QoS::AtMostOnce,
            retain: true,
            topic,
            packet_id: 0,
            payload,
            properties: Properties(&properties),
            message_expiry: None,
            topic_alias: None,
            has_subscription_ids: true,
        };
        link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
            .expect("it is expected");
    };
    brings("b", b"x", packets[0].1);
    brings("b", b"y", packets[1].1);
    while router.barrier_wanted(0) {
        let number = router.barrier_begins(0);
        router.barrier_passed(0, number, Millis::ZERO);
    }
    let mut taken = Vec::new();
    router.take_output(who.session, who.connection_no, &mut taken, Millis::ZERO);
    // The older value is not delivered behind the newer one.
    let got = taken.iter().filter(|byte| **byte == b'y').count();
    assert_eq!(got, 2, "one by each filter: {taken:?}");
}
