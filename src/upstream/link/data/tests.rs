use crate::mqtt::{
    Decoder, Message, MessageSpec, Oversized, Packet, Properties, Publish, QoS, ReasonCode,
    Receiver, Suback, Version, encode_unsubscribe,
};
use crate::router::{BrokerFeatures, LinkSession};
use crate::sim::testing::{
    PROBES, ack, client, config, facts, packet_of, read, router, router_of, subscribe,
    subscribe_handling, up,
};
use crate::store::{Identifiers, Memory, Received, Ring, Store};
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};

use crate::time::Millis;
use crate::topics::FilterId;
use crate::upstream::link::data::DataLink;

mod gaps;
mod kept;
mod lag;
mod placement;

fn publish<'a>(id: u16, qos: QoS, payload: &'a [u8], properties: &'a [u8]) -> Publish<'a> {
    Publish {
        dup: false,
        qos,
        retain: false,
        topic: "t",
        packet_id: id,
        payload,
        properties: Properties(properties),
        message_expiry: None,
        topic_alias: None,
        has_subscription_ids: !properties.is_empty(),
    }
}

/// I8: acknowledgements to the broker are in the order of arrival, and wait for no client.
/// The broker grants QoS 1.
fn grant(link: &mut DataLink, packet_id: u16, out: &mut Vec<u8>) {
    let suback = Suback {
        packet_id,
        codes: &[1],
        properties: Properties::default(),
    };
    link.packet(&Packet::Suback(suback), Millis::ZERO, out)
        .expect("it is expected");
}

#[test]
fn acknowledgements_are_first_in_first_out() {
    let router = router();
    let mut link = DataLink::new(router, 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    for (id, qos) in [
        (7, QoS::AtLeastOnce),
        (3, QoS::ExactlyOnce),
        (9, QoS::AtLeastOnce),
        (1, QoS::ExactlyOnce),
    ] {
        link.packet(
            &Packet::Publish(publish(id, qos, b"x", b"")),
            Millis::ZERO,
            &mut out,
        )
        .expect("it is expected");
    }
    link.batch_ended(Millis::ZERO, &mut out);
    let order: Vec<(String, u16)> = read(&mut out);
    let expected = [("puback", 7), ("pubrec", 3), ("puback", 9), ("pubrec", 1)];
    assert_eq!(order.len(), expected.len());
    for ((what, id), (word, number)) in order.iter().zip(expected) {
        assert_eq!((what.as_str(), *id), (word, number));
    }
}

/// I1, I11: one delivery for a message that the broker sends again after a reconnect.
#[test]
fn a_redelivery_is_acknowledged_and_not_delivered_again() {
    let router = router();
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    subscribe(&router, who, "t");
    link.poll(Millis::ZERO, &mut out);
    let asked = read(&mut out);
    assert_eq!(asked.len(), 1, "{asked:?}");
    grant(&mut link, asked[0].1, &mut out);
    let delivered = || {
        let mut taken = Vec::new();
        router
            .take_output(who.session, who.connection_no, &mut taken, Millis::ZERO)
            .expect("the client is connected");
        taken.windows(3).filter(|w| w == b"one").count()
    };
    // Subscription Identifier 1.
    let message = publish(5, QoS::AtLeastOnce, b"one", &[0x0B, 1]);
    link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(delivered(), 1);
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(true, 100), Millis::ZERO, &mut out);
    out.clear();
    let message = publish(5, QoS::AtLeastOnce, b"one", &[0x0B, 1]);
    link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(delivered(), 0);
    assert_eq!(read(&mut out), [("puback".to_owned(), 5)]);
    // An identical message without a reconnect is another message.
    link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(delivered(), 1);
}

/// A store that remembers one message of link 1 from before.
#[derive(Debug)]
struct Before;

impl Store for Before {
    fn identifiers(&self) -> Box<dyn Identifiers> {
        Memory.identifiers()
    }

    fn ring(&self, link: usize) -> Box<dyn Ring> {
        let mut ring = Memory.ring(link);
        if link == 1 {
            let digest = ring.digest("t", b"one", 1);
            ring.remember(Received {
                packet_id: 5,
                digest,
            });
        }
        ring
    }
}

/// I11: a link begins with the messages that the store remembers, if the broker kept its session.
#[test]
fn what_the_store_remembers_of_a_link_is_not_delivered_again() {
    for (number, session_present, delivered) in [(1, true, 0), (1, false, 1), (0, true, 1)] {
        let mut link = DataLink::new(router(), number, 1, PROBES.into(), &Before);
        let mut out = Vec::new();
        link.connected(&up(session_present, 100), Millis::ZERO, &mut out);
        let message = publish(5, QoS::AtLeastOnce, b"one", b"");
        link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
            .expect("it is expected");
        assert_eq!(link.batch.len(), delivered, "{number} {session_present}");
    }
}

/// A QoS 2 message is received once until its PUBREL, however often the broker repeats it.
#[test]
fn qos_2_is_delivered_once_until_released() {
    let router = router();
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    for _ in 0..3 {
        let message = publish(5, QoS::ExactlyOnce, b"two", b"");
        link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    assert_eq!(link.batch.len(), 1);
    link.packet(&Packet::Pubrel(ack(5)), Millis::ZERO, &mut out)
        .expect("it is expected");
    let message = publish(5, QoS::ExactlyOnce, b"two", b"");
    link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
        .expect("it is expected");
    assert_eq!(link.batch.len(), 2);
}

/// I18: after a lost session every filter is subscribed again.
#[test]
fn a_lost_session_is_subscribed_again() {
    let router = router();
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    subscribe(&router, who, "t");
    link.poll(Millis::ZERO, &mut out);
    let asked = read(&mut out);
    let suback = Suback {
        packet_id: asked[0].1,
        codes: &[ReasonCode::GRANTED_QOS_1.0],
        properties: Properties::default(),
    };
    link.packet(&Packet::Suback(suback), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    assert!(!router.data_settled());
    link.connected(&up(true, 100), Millis::ZERO, &mut out);
    assert!(read(&mut out).is_empty(), "the broker has it still");
    assert!(router.data_settled());
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    let again = read(&mut out);
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].0, "subscribe");
    assert!(!router.data_settled(), "not before the broker has it");
}

/// I2: a message that is fetched as retained while it is in flight as a live one is delivered once, live.
#[test]
fn a_fetched_message_waits_for_what_the_data_link_carries() {
    for live in [true, false] {
        let router = router();
        let who = client(&router, "a");
        let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
        let mut out = Vec::new();
        link.connected(&up(false, 100), Millis::ZERO, &mut out);
        subscribe_handling(&router, who, "t", 0);
        link.poll(Millis::ZERO, &mut out);
        grant(&mut link, read(&mut out)[0].1, &mut out);
        let (number, _) = router.next_fetches(1)[0].clone();
        let delivered = || {
            let mut taken = Vec::new();
            router
                .take_output(who.session, who.connection_no, &mut taken, Millis::ZERO)
                .expect("the client is connected");
            let at = taken.windows(3).position(|w| w == b"one");
            at.map(|_| taken[taken.iter().position(|b| b >> 4 == 3).unwrap_or(0)] & 1 == 1)
        };
        assert_eq!(delivered(), None);
        let stored = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: b"one",
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        router.fetched(number, &stored, Millis::ZERO);
        router.fetch_answered(&[number], Millis::ZERO);
        link.poll(Millis::ZERO, &mut out);
        assert!(link.wants_ping(), "the data link is asked");
        if live {
            let message = Publish {
                retain: true,
                ..publish(5, QoS::AtLeastOnce, b"one", &[0x0B, 1])
            };
            link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
                .expect("it is expected");
        }
        assert_eq!(delivered(), None, "not before the answer");
        link.ping_answered(Millis::ZERO);
        // RETAIN is set on a stored message only.
        assert_eq!(delivered(), Some(!live));
        assert_eq!(delivered(), None, "once");
        router.fetch_ended(&[number], true, Millis::ZERO);
        assert_eq!(delivered(), None, "once");
    }
}

/// A PUBLISH of 5,000 bytes on the topic `t` with Subscription Identifier 1.
fn oversized(first: u8, packet_id: u8) -> Oversized {
    let mut bytes = vec![first, 0x88, 0x27, 0, 1, b't'];
    if first & 6 != 0 {
        bytes.extend([0, packet_id]);
    }
    bytes.extend([2, 0x0B, 1]);
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: 1024,
    };
    let read = decoder.oversized(&bytes).expect("it is legal");
    read.expect("its beginning is there")
}

#[test]
fn a_message_that_is_too_large_is_acknowledged_and_leaves_a_gap_in_the_sessions_of_its_receivers() {
    let router = router();
    let [reader, other] = ["a", "b"].map(|id| client(&router, id));
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    subscribe(&router, reader, "t");
    subscribe(&router, other, "u");
    link.poll(Millis::ZERO, &mut out);
    for (_, packet_id) in read(&mut out) {
        grant(&mut link, packet_id, &mut out);
    }
    // The broker repeats the QoS 2 message before it releases it.
    for (first, id) in [(0x30, 0), (0x32, 7), (0x34, 9), (0x34, 9)] {
        link.oversized(&oversized(first, id), Millis::ZERO, &mut out)
            .expect("it is skipped");
    }
    let normal = publish(8, QoS::AtLeastOnce, b"small", &[0x0B, 1]);
    link.packet(&Packet::Publish(normal), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    let acks = [("puback", 7), ("pubrec", 9), ("pubrec", 9), ("puback", 8)];
    assert_eq!(read(&mut out), acks.map(|(what, id)| (what.to_owned(), id)));
    let gaps = |id: &str| router.session(&id.into()).map(|info| info.gaps);
    assert_eq!((gaps("a"), gaps("b")), (Some(3), Some(0)));
    let mut taken = Vec::new();
    router
        .take_output(
            reader.session,
            reader.connection_no,
            &mut taken,
            Millis::ZERO,
        )
        .expect("the client is connected");
    assert_eq!(taken.windows(5).filter(|w| w == b"small").count(), 1);
    // The broker sends a message again whose acknowledgement was lost.
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(true, 100), Millis::ZERO, &mut out);
    out.clear();
    link.oversized(&oversized(0x3A, 7), Millis::ZERO, &mut out)
        .expect("it is skipped");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(read(&mut out), [("puback".to_owned(), 7)]);
    assert_eq!(gaps("a"), Some(3), "the same message");
}

/// The filters that the broker reads in the next SUBSCRIBEs, with their packet identifiers.
fn asked(out: &mut Vec<u8>) -> Vec<(String, u16)> {
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let (mut at, mut filters) = (0, Vec::new());
    while let Some((packet, used)) = decoder.next(&out[at..]).expect("what we send is legal") {
        at += used;
        if let Packet::Subscribe(s) = packet {
            filters.extend(s.filters().map(|(name, _)| (name.to_owned(), s.packet_id)));
        }
    }
    out.clear();
    filters
}

/// A broker that closes the link when it reads a SUBSCRIBE for `bad`. Returns how often it did, and the
/// filters that it granted, in order.
fn until_quarantined(names: &[&str], restarts: bool) -> (usize, Vec<String>) {
    let router = router();
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let (mut out, mut granted, mut cuts) = (Vec::new(), Vec::new(), 0);
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    for name in names {
        subscribe(&router, who, name);
    }
    link.poll(Millis::ZERO, &mut out);
    'connection: loop {
        let filters = asked(&mut out);
        if filters.is_empty() || cuts > 20 {
            return (cuts, granted);
        }
        // It reads all of them before its answers are read, as when they arrive at once.
        if filters.iter().any(|(name, _)| name == "bad") {
            cuts += 1;
            if restarts {
                router.link_lost_unprovoked();
            }
            link.disconnected(&LinkEnd::Closed, Millis::ZERO);
            link.connected(&up(true, 100), Millis::ZERO, &mut out);
            continue 'connection;
        }
        let mut answered = None;
        for (name, packet_id) in filters {
            granted.push(name);
            if answered.replace(packet_id) != Some(packet_id) {
                grant(&mut link, packet_id, &mut out);
            }
        }
        link.batch_ended(Millis::ZERO, &mut out);
    }
}

/// Filters without wildcards share packets and their identifier; the topic of a message names its filter.
#[test]
fn filters_without_wildcards_are_subscribed_together() {
    let router = router();
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    let filters = ["a", "b", "c/+", "d", "$share/g/e"];
    for name in filters {
        subscribe(&router, who, name);
    }
    link.poll(Millis::ZERO, &mut out);
    let asked = asked(&mut out);
    let packet_of = |name: &str| asked.iter().find(|(n, _)| n == name).map(|(_, id)| *id);
    let packets = filters[..4]
        .iter()
        .map(|name| packet_of(name).expect("it is asked for"));
    let packets: Vec<u16> = packets.collect();
    assert!(packets[0] == packets[1] && packets[1] != packets[2]);
    assert!(
        packets[2] != packets[3],
        "answers come in the order of the requests"
    );
    assert_eq!(
        packet_of("$share/g/e"),
        None,
        "shared subscriptions have links of their own"
    );
    for packet_id in [packets[0], packets[2], packets[3]] {
        let suback = Suback {
            packet_id,
            codes: &[1],
            properties: Properties::default(),
        };
        link.packet(&Packet::Suback(suback), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    let mut taken = Vec::new();
    router.take_output(who.session, who.connection_no, &mut taken, Millis::ZERO);
    let exact = FilterId::EXACT.subscription_identifier();
    let properties: Vec<u8> = std::iter::once(0x0B)
        .chain((0..4).map(|n| (exact >> (7 * n)) as u8 & 0x7F | if n < 3 { 0x80 } else { 0 }))
        .collect();
    for (id, topic, comes) in [(1, "b", true), (2, "x", false), (3, "d", true)] {
        let message = Publish {
            topic,
            ..publish(id, QoS::AtLeastOnce, topic.as_bytes(), &properties)
        };
        link.packet(&Packet::Publish(message), Millis::ZERO, &mut out)
            .expect("it is expected");
        link.batch_ended(Millis::ZERO, &mut out);
        taken.clear();
        router.take_output(who.session, who.connection_no, &mut taken, Millis::ZERO);
        assert_eq!(taken.last() == Some(&topic.as_bytes()[0]), comes, "{topic}");
    }
}

#[test]
fn a_filter_that_the_broker_closes_the_link_for_is_quarantined() {
    assert_eq!(until_quarantined(&["bad"], false), (2, vec![]), "twice");
    let names: Vec<String> = (0..40).map(|n| format!("f/{n}")).collect();
    let mut all: Vec<&str> = names.iter().map(String::as_str).collect();
    all.insert(20, "bad");
    let (cuts, granted) = until_quarantined(&all, false);
    assert!(cuts <= 3, "with all, in a group, and alone: {cuts}");
    assert_eq!(granted.len(), 40, "every other filter is granted");
}

#[test]
fn a_restart_of_the_broker_quarantines_no_filter() {
    assert_eq!(until_quarantined(&["bad"], true), (21, vec![]));
}

/// A filter that nobody uses makes room for one that it overlaps, while the link tries a suspect.
#[test]
fn a_filter_that_yields_is_unsubscribed_first_after_a_suspect_was_tried() {
    let router = router_of(config());
    let nameless = BrokerFeatures {
        identifiers: false,
        ..facts()
    };
    router.set_broker_features(&nameless, Millis::ZERO);
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    let up = |session_present| Handshake {
        identifiers: false,
        ..up(session_present, 100)
    };
    link.connected(&up(false), Millis::ZERO, &mut out);
    subscribe(&router, who, "a/+");
    link.poll(Millis::ZERO, &mut out);
    grant(&mut link, read(&mut out)[0].1, &mut out);
    subscribe(&router, who, "s");
    link.poll(Millis::ZERO, &mut out);
    out.clear();
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(true), Millis::ZERO, &mut out);
    let tried = read(&mut out);
    assert_eq!(tried.len(), 1, "the suspect: {tried:?}");
    let mut packet = Vec::new();
    encode_unsubscribe(Version::V5, 9, ["a/+"].into_iter(), &mut packet);
    packet_of(&router, who, &packet, Millis::ZERO);
    subscribe(&router, who, "+/b");
    link.poll(Millis::ZERO, &mut out);
    assert_eq!(read(&mut out), [], "the suspect has no answer");
    grant(&mut link, tried[0].1, &mut out);
    link.batch_ended(Millis::ZERO, &mut out);
    let sent: Vec<String> = read(&mut out).into_iter().map(|(word, _)| word).collect();
    assert!(sent[0].starts_with("Unsubscribe"), "{sent:?}");
    assert_eq!(sent[1..], ["subscribe"]);
}

#[test]
fn new_filters_wait_behind_known_ones_after_a_reconnect() {
    let router = router();
    let who = client(&router, "a");
    let mut link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    // The lingering filter has the lowest number.
    for (name, code) in [("new", 0x87), ("known", 1)] {
        subscribe(&router, who, name);
        link.poll(Millis::ZERO, &mut out);
        for (_, packet_id) in asked(&mut out) {
            let suback = Suback {
                packet_id,
                codes: &[code],
                properties: Properties::default(),
            };
            link.packet(&Packet::Suback(suback), Millis::ZERO, &mut out)
                .expect("it is expected");
        }
    }
    subscribe(&router, who, "new");
    link.disconnected(&LinkEnd::KeepAlive, Millis::ZERO);
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    let order: Vec<String> = asked(&mut out).into_iter().map(|(name, _)| name).collect();
    assert_eq!(order, ["known", "new"]);
}

/// After a CONNECT whose answer was lost, the broker goes on with the QoS 2 messages that it has.
#[test]
fn in_doubt_a_qos_2_message_that_is_sent_again_is_not_delivered_again() {
    let mut link = DataLink::new(router(), 0, 1, PROBES.into(), &Memory);
    let mut out = Vec::new();
    let take = |link: &mut DataLink, payload: &[u8]| {
        let message = publish(1, QoS::ExactlyOnce, payload, b"");
        let before = link.batch.len();
        link.packet(&Packet::Publish(message), Millis::ZERO, &mut Vec::new())
            .expect("it is expected");
        link.batch.len() - before
    };
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    assert_eq!(take(&mut link, b"before"), 1);
    link.disconnected(&LinkEnd::KeepAlive, Millis::ZERO);
    let doubtful = Handshake {
        session: LinkSession::Doubtful,
        ..up(true, 100)
    };
    link.connected(&doubtful, Millis::ZERO, &mut out);
    assert!(link.wants_ping(), "it shows when all are sent again");
    assert_eq!(take(&mut link, b"before"), 0);
    link.disconnected(&LinkEnd::KeepAlive, Millis::ZERO);
    link.connected(&doubtful, Millis::ZERO, &mut out);
    assert_eq!(take(&mut link, b"after"), 1, "the session may be another");
}

#[test]
fn a_gap_of_a_link_is_shown_in_the_sessions_that_it_concerns() {
    let router = router();
    let [reader, group, _other] = ["a", "b", "c"].map(|id| client(&router, id));
    let mut data = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    let mut shared = DataLink::new(
        router.clone(),
        router.shared_link(0),
        1,
        PROBES.into(),
        &Memory,
    );
    let mut out = Vec::new();
    for link in [&mut data, &mut shared] {
        link.connected(&up(false, 100), Millis::ZERO, &mut out);
    }
    for filter in ["t/1", "t/2", "t/+"] {
        subscribe(&router, reader, filter);
    }
    subscribe(&router, group, "$share/g/t/1");
    let gaps = |router: &crate::router::Router| {
        ["a", "b", "c"].map(|id| router.session(&id.into()).expect("it is there").gaps)
    };
    for session_present in [true, false] {
        for link in [&mut data, &mut shared] {
            link.poll(Millis::ZERO, &mut out);
            let mut packets: Vec<u16> = asked(&mut out).into_iter().map(|(_, id)| id).collect();
            packets.dedup();
            for packet_id in packets {
                grant(link, packet_id, &mut out);
            }
            out.clear();
            link.disconnected(&LinkEnd::Closed, Millis::ZERO);
            link.connected(&up(session_present, 100), Millis::ZERO, &mut out);
            out.clear();
        }
        if session_present {
            assert_eq!(gaps(&router), [0, 0, 0], "the broker kept the sessions");
        }
    }
    assert_eq!(gaps(&router), [1, 1, 0]);
    assert!(
        router
            .session(&"c".into())
            .is_some_and(|other| other.attached)
    );
}
