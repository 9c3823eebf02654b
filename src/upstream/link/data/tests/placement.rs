//! Random subscriptions and publishes with brokers of every kind: each message reaches each client
//! once, and one member of each group. The check matches topics by brute force.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::mqtt::{
    Decoder, Packet, Properties, Publish, QoS, Receiver, Suback, SubscribeOptions, Unsuback,
    Version, encode_subscribe, encode_unsubscribe,
};
use crate::router::{BrokerFeatures, Connected, Router, RouterConfig};
use crate::sim::testing::{PROBES, client, config, facts, packet_of, router_of, up};
use crate::store::Memory;
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::split_shared;
use crate::upstream::link::machine::{Handshake, Machine};

use crate::upstream::link::data::DataLink;

const CLIENTS: usize = 4;
const FILTERS: [&str; 20] = [
    "a",
    "b",
    "a/b",
    "a/+",
    "+/b",
    "#",
    "a/#",
    "+",
    "b/#",
    "+/+",
    "c/x",
    "c/+",
    "c/#",
    "c/x/y",
    "+/x/#",
    "$share/g/a/#",
    "$share/g/+/b",
    "$share/h/a/#",
    "$share/h/c/x",
    "$share/g/#",
];
const TOPICS: [&str; 8] = ["a", "b", "a/b", "b/b", "c/x", "c/y", "a/b/c", "c/x/y"];
const ROOTS: [&[&str]; 4] = [&[], &["c/#"], &["a/#", "c/+"], &["+/x", "b"]];

/// How the broker sends a message for overlapping filters of one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Many,
    One,
    Lowest,
    /// MQTT 3.1.1, one copy at the lowest QoS: filters must never overlap on a link.
    Nameless,
    /// As `Nameless`, and a second SUBSCRIBE leaves another copy at the QoS of the first.
    Queues,
}

impl Shape {
    fn named(self) -> bool {
        !matches!(self, Self::Nameless | Self::Queues)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Subscribe(usize, &'static str, QoS),
    Unsubscribe(usize, &'static str),
    Publish(&'static str, QoS),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let qos = || select(vec![QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]);
    let filter = || select(FILTERS.to_vec());
    vec(
        prop_oneof![
            4 => (0..CLIENTS, filter(), qos()).prop_map(|(c, f, q)| Step::Subscribe(c, f, q)),
            1 => (0..CLIENTS, filter()).prop_map(|(c, f)| Step::Unsubscribe(c, f)),
            4 => (select(TOPICS.to_vec()), qos()).prop_map(|(t, q)| Step::Publish(t, q)),
        ],
        1..60,
    )
}

/// A link with the filters that the broker has for it.
struct Link {
    machine: DataLink,
    held: BTreeMap<String, (Option<u32>, QoS)>,
}

struct Run {
    router: Arc<Router>,
    shape: Shape,
    links: Vec<Link>,
    clients: Vec<Connected>,
    /// What each client was granted.
    granted: Vec<BTreeMap<String, QoS>>,
    now: Millis,
    packet_id: u16,
    number: u32,
}

impl Run {
    fn new(
        shape: Shape,
        (data_links, shared_links, local_groups): (usize, usize, bool),
        roots: &[&str],
    ) -> Self {
        let router = router_of(RouterConfig {
            data_links,
            shared_links,
            local_groups,
            roots: roots.iter().map(|r| (*r).to_owned()).collect(),
            linger: Duration::ZERO,
            linger_busy_min: Duration::ZERO,
            ..config()
        });
        let named = shape.named();
        let known = BrokerFeatures {
            identifiers: named,
            replaces: shape != Shape::Queues,
            ..facts()
        };
        router.set_broker_features(&known, Millis::ZERO);
        let mut links = Vec::new();
        for number in 0..data_links + shared_links {
            let mut machine = DataLink::new(router.clone(), number, 1, PROBES.into(), &Memory);
            let state = Handshake {
                identifiers: named,
                ..up(false, 65_535)
            };
            let mut out = Vec::new();
            machine.connected(&state, Millis::ZERO, &mut out);
            links.push(Link {
                machine,
                held: BTreeMap::new(),
            });
            let last = links.len() - 1;
            broker_reads(&mut links[last], shape, &out, Millis::ZERO);
        }
        let clients = (0..CLIENTS)
            .map(|n| client(&router, &format!("c{n}")))
            .collect();
        Self {
            router,
            shape,
            links,
            clients,
            granted: vec![BTreeMap::new(); CLIENTS],
            now: Millis::new(1),
            packet_id: 0,
            number: 0,
        }
    }

    /// Lets everything settle: requests to the broker, its answers, lingering filters.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.now += Duration::from_millis(10);
            for _ in 0..10 {
                self.router.tick(self.now);
            }
            for link in &mut self.links {
                let mut out = Vec::new();
                link.machine.poll(self.now, &mut out);
                broker_reads(link, self.shape, &out, self.now);
            }
        }
    }

    fn send(&mut self, client: usize, bytes: &[u8]) {
        packet_of(&self.router, self.clients[client], bytes, self.now);
    }

    /// The SUBACK codes and the messages that a client has received.
    fn seen(&mut self, client: usize) -> (Vec<u8>, Vec<(u32, QoS)>) {
        let who = self.clients[client];
        let mut out = Vec::new();
        self.router
            .take_output(who.session, who.connection_no, &mut out, self.now);
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let (mut at, mut codes, mut messages, mut acks) = (0, Vec::new(), Vec::new(), Vec::new());
        while let Some((packet, used)) = decoder.next(&out[at..]).expect("legal") {
            at += used;
            match packet {
                Packet::Suback(s) => codes.extend_from_slice(s.codes),
                Packet::Publish(p) => {
                    let text = String::from_utf8_lossy(p.payload);
                    messages.push((text.parse().expect("a number"), p.qos));
                    acks.push((p.packet_id, p.qos));
                }
                _ => {}
            }
        }
        for (id, qos) in acks {
            self.router.with(who.session, who.connection_no, |s, _| {
                let outbound = s.outbound_mut();
                match qos {
                    QoS::AtMostOnce => {}
                    QoS::AtLeastOnce => outbound.acknowledged(id, Millis::ZERO),
                    QoS::ExactlyOnce => {
                        outbound.received(id, StreamId::CONTROL);
                        outbound.completed(id);
                    }
                }
            });
        }
        (codes, messages)
    }

    fn step(&mut self, step: &Step) {
        self.packet_id += 1;
        let mut bytes = Vec::new();
        match step {
            Step::Subscribe(client, filter, qos) => {
                let options = SubscribeOptions {
                    qos: *qos,
                    no_local: false,
                    retain_as_published: false,
                    retain_handling: 2,
                };
                let filters = [(*filter, options)].into_iter();
                encode_subscribe(Version::V5, self.packet_id, None, filters, &mut bytes);
                self.send(*client, &bytes);
                self.settle();
                let (codes, _) = self.seen(*client);
                assert_eq!(codes.len(), 1, "one answer to {step:?}");
                match QoS::from_u8(codes[0]) {
                    Some(granted) => {
                        assert_eq!(granted, *qos, "{step:?}");
                        self.granted[*client].insert((*filter).to_owned(), granted);
                    }
                    None => {
                        assert!(!self.shape.named(), "{step:?} is refused {codes:?}");
                        assert!(!self.granted[*client].contains_key(*filter), "{step:?}");
                    }
                }
            }
            Step::Unsubscribe(client, filter) => {
                let filters = std::iter::once(*filter);
                encode_unsubscribe(Version::V5, self.packet_id, filters, &mut bytes);
                self.send(*client, &bytes);
                self.granted[*client].remove(*filter);
                self.settle();
                self.seen(*client);
            }
            Step::Publish(topic, qos) => self.publish(topic, *qos),
        }
        if !self.shape.named() {
            self.nothing_overlaps();
        }
    }

    fn publish(&mut self, topic: &str, qos: QoS) {
        self.number += 1;
        let payload = self.number.to_string();
        for link in &mut self.links {
            for (ids, qos) in copies(&link.held, self.shape, topic, qos) {
                let mut properties = Vec::new();
                for id in &ids {
                    crate::mqtt::Property::SubscriptionIdentifier(*id).write(&mut properties);
                }
                self.packet_id += 1;
                let publish = Publish {
                    dup: false,
                    qos,
                    retain: false,
                    topic,
                    packet_id: if qos == QoS::AtMostOnce {
                        0
                    } else {
                        self.packet_id
                    },
                    payload: payload.as_bytes(),
                    properties: Properties::own(&properties),
                    message_expiry: None,
                    topic_alias: None,
                    has_subscription_ids: !ids.is_empty(),
                };
                let mut out = Vec::new();
                let packet = Packet::Publish(publish);
                let taken = link.machine.packet(&packet, self.now, &mut out);
                taken.expect("it is expected");
                link.machine.batch_ended(self.now, &mut out);
            }
        }
        self.check(topic, qos);
    }

    fn check(&mut self, topic: &str, qos: QoS) {
        let number = self.number;
        let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for client in 0..CLIENTS {
            let (_, messages) = self.seen(client);
            let granted = self.granted[client].clone();
            let plain = granted.iter().filter(|(f, _)| split_shared(f).is_none());
            let best = plain
                .filter(|(f, _)| brute(f, topic))
                .map(|(_, q)| *q)
                .max();
            let mine: Vec<&String> = granted
                .keys()
                .filter(|f| split_shared(f).is_some_and(|(_, f)| brute(f, topic)))
                .collect();
            for group in &mine {
                groups.entry((*group).clone()).or_default().0 += 1;
            }
            assert!(
                messages.iter().all(|(n, _)| *n == number),
                "late: {messages:?}"
            );
            let plain = usize::from(best.is_some());
            assert!(
                messages.len() >= plain && messages.len() <= plain + mine.len(),
                "c{client} with {granted:?} got {} copies on {topic}",
                messages.len()
            );
            if let Some(best) = best.filter(|_| self.shape != Shape::Lowest) {
                let wanted = best.min(qos);
                assert!(
                    messages.iter().any(|(_, q)| *q == wanted),
                    "c{client} with {granted:?} got {messages:?} on {topic}, not at {wanted:?}"
                );
            }
            if mine.is_empty() {
                continue;
            }
            let extra = messages.len() - plain;
            groups.entry("all".into()).or_default().1 += extra;
        }
        let with_members = groups.iter().filter(|(name, _)| *name != "all").count();
        let shared = groups.get("all").map_or(0, |(_, copies)| *copies);
        assert_eq!(
            shared, with_members,
            "one copy for each group on {topic}: {groups:?}"
        );
    }

    /// I13: no link has two filters that overlap.
    fn nothing_overlaps(&self) {
        for (n, link) in self.links.iter().enumerate() {
            for topic in TOPICS {
                let matching: Vec<&String> = link
                    .held
                    .keys()
                    .filter(|f| brute(split_shared(f).map_or(f, |(_, f)| f), topic))
                    .collect();
                assert!(
                    matching.len() <= 1,
                    "link {n} holds {matching:?} for {topic}"
                );
            }
        }
    }
}

/// The broker answers the packets of a link.
fn broker_reads(link: &mut Link, shape: Shape, bytes: &[u8], now: Millis) {
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let mut at = 0;
    while let Some((packet, used)) = decoder.next(&bytes[at..]).expect("legal") {
        at += used;
        let mut out = Vec::new();
        match packet {
            Packet::Subscribe(s) => {
                let mut codes = Vec::new();
                for (filter, options) in s.filters() {
                    let new = (s.subscription_id, options.qos);
                    let old = link.held.insert(filter.to_owned(), new);
                    let kept = old.is_none_or(|(_, q)| q == options.qos);
                    assert!(kept || shape != Shape::Queues, "{filter} is held twice");
                    codes.push(options.qos as u8);
                }
                let answer = Packet::Suback(Suback {
                    packet_id: s.packet_id,
                    codes: &codes,
                    properties: Properties::default(),
                });
                link.machine
                    .packet(&answer, now, &mut out)
                    .expect("it waits");
            }
            Packet::Unsubscribe(u) => {
                let mut codes = Vec::new();
                for filter in u.filters() {
                    assert!(link.held.remove(filter).is_some(), "{filter} is not held");
                    codes.push(0);
                }
                let answer = Packet::Unsuback(Unsuback {
                    packet_id: u.packet_id,
                    codes: &codes,
                    properties: Properties::default(),
                });
                link.machine
                    .packet(&answer, now, &mut out)
                    .expect("it waits");
            }
            _ => {}
        }
        link.machine.batch_ended(now, &mut out);
        if !out.is_empty() {
            broker_reads(link, shape, &out, now);
        }
    }
}

/// The copies that the broker sends one link: identifiers and QoS of each.
fn copies(
    held: &BTreeMap<String, (Option<u32>, QoS)>,
    shape: Shape,
    topic: &str,
    qos: QoS,
) -> Vec<(Vec<u32>, QoS)> {
    let plain: Vec<&(Option<u32>, QoS)> = held
        .iter()
        .filter(|(f, _)| split_shared(f).is_none() && brute(f, topic))
        .map(|(_, h)| h)
        .collect();
    let ids = |all: &[&(Option<u32>, QoS)]| all.iter().filter_map(|(id, _)| *id).collect();
    let mut made: Vec<(Vec<u32>, QoS)> = Vec::new();
    if !plain.is_empty() {
        let all = plain.iter().map(|(_, q)| *q);
        match shape {
            Shape::Many => made.extend(plain.iter().map(|h| (ids(&[*h]), h.1.min(qos)))),
            Shape::One => made.push((ids(&plain), all.max().unwrap_or_default().min(qos))),
            _ => made.push((ids(&plain), all.min().unwrap_or_default().min(qos))),
        }
    }
    let shared = held
        .iter()
        .filter(|(f, _)| split_shared(f).is_some_and(|(_, f)| brute(f, topic)));
    made.extend(shared.map(|(_, h)| (ids(&[h]), h.1.min(qos))));
    made
}

/// Topic matching straight from §4.7, independent of the program's own.
fn brute(filter: &str, topic: &str) -> bool {
    let topic: Vec<&str> = topic.split('/').collect();
    let filter: Vec<&str> = filter.split('/').collect();
    for (at, level) in filter.iter().enumerate() {
        match *level {
            "#" => return at <= topic.len(),
            "+" if at < topic.len() => {}
            name if topic.get(at) == Some(&name) => {}
            _ => return false,
        }
    }
    filter.len() == topic.len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// I1, I2, I12, I13, I15: with identifiers, without them, below roots, on one link or more.
    #[test]
    fn each_client_gets_one_copy_and_each_group_one(
        steps in steps(),
        shape in select(vec![Shape::Many, Shape::One, Shape::Lowest, Shape::Nameless, Shape::Queues]),
        data_links in 1usize..5,
        shared_links in 1usize..3,
        local_groups in proptest::bool::ANY,
        roots in select(ROOTS.to_vec()),
    ) {
        let links = (data_links, shared_links, local_groups);
        let mut run = Run::new(shape, links, roots);
        for step in &steps {
            run.step(step);
        }
        let names: BTreeSet<&String> = run.links.iter().flat_map(|l| l.held.keys()).collect();
        let total: usize = run.links.iter().map(|l| l.held.len()).sum();
        prop_assert_eq!(names.len(), total, "a filter is held on one link");
    }
}
