//! The order of SUBACK, retained messages and live messages.

use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{
    Decoder, Message, MessageSpec, Packet, Properties, QoS, ReasonCode, Receiver, SubscribeOptions,
    Version, encode_subscribe, encode_unsubscribe,
};
use crate::router::{Arrived, Connected, LinkSession, Router};
use crate::sim::testing::{self, packet_of};
use crate::time::Millis;
use crate::topics::FilterId;

/// A client, and the links to its broker.
struct World {
    router: Arc<Router>,
    client: Connected,
    now: Millis,
}

impl World {
    fn new() -> Self {
        let router = testing::router();
        let client = testing::kept_client_of(&router, "a", Version::V5, None, Millis::ZERO);
        Self {
            router,
            client,
            now: Millis::ZERO,
        }
    }

    /// The client subscribes to filters, with retained messages.
    fn subscribes(&self, filters: &[&str]) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            ..SubscribeOptions::default()
        };
        let filters = filters.iter().map(|filter| (*filter, options));
        let mut bytes = Vec::new();
        encode_subscribe(Version::V5, 1, None, filters, &mut bytes);
        packet_of(&self.router, self.client, &bytes, self.now);
    }

    fn unsubscribes(&self, filter: &str) {
        let mut bytes = Vec::new();
        encode_unsubscribe(Version::V5, 2, std::iter::once(filter), &mut bytes);
        packet_of(&self.router, self.client, &bytes, self.now);
    }

    /// The broker grants what it is asked for. Returns the filters.
    fn grants(&self) -> Vec<FilterId> {
        let asked = self.router.next_subscribes(0, 100);
        let grant = |filter| {
            let code = ReasonCode(QoS::AtLeastOnce as u8);
            self.router.suback(filter, code, self.now);
            filter
        };
        asked.into_iter().map(|asked| grant(asked.filter)).collect()
    }

    fn message(topic: &str, payload: &str, retain: bool) -> Message {
        Message::new(&MessageSpec {
            topic,
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: QoS::AtLeastOnce,
            retain,
            expires_at: None,
            strip_key: None,
            account: None,
        })
    }

    /// A live message comes.
    fn brings(&self, filter: FilterId, topic: &str, payload: &str) {
        let mut batch = [Arrived {
            message: Self::message(topic, payload, false),
            filters: [filter].as_slice().into(),
            link: 0,
            origin_mark: None,
            skipped: false,
        }];
        self.router.fan_out(&mut batch, self.now);
    }

    /// The filters whose fetch begins now are fetched: each has one retained message.
    fn fetches(&self, topic: &str, payload: &str) {
        for (filter, _) in self.router.next_fetches(10) {
            let message = Self::message(topic, payload, true);
            self.router.fetched(filter, &message, self.now);
            self.router.fetch_answered(&[filter], self.now);
            self.passes_barrier();
            self.router.fetch_ended(&[filter], true, self.now);
        }
    }

    fn passes_barrier(&self) {
        while self.router.barrier_wanted(0) {
            let number = self.router.barrier_begins(0);
            self.router.barrier_passed(0, number, self.now);
        }
    }

    fn disconnects(&self) {
        let client = self.client;
        (self.router).disconnected(client.session, client.connection_no, false, self.now);
    }

    /// The packets that the client gets now.
    fn got(&self) -> Vec<String> {
        let (client, mut bytes) = (self.client, Vec::new());
        let taken =
            (self.router).take_output(client.session, client.connection_no, &mut bytes, self.now);
        taken.expect("it is connected");
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let (mut got, mut at) = (Vec::new(), 0);
        while let Ok(Some((packet, size))) = decoder.next(&bytes[at..]) {
            at += size;
            got.push(match packet {
                Packet::Suback(_) => "SUBACK".to_owned(),
                Packet::Unsuback(_) => "UNSUBACK".to_owned(),
                // A message that an earlier connection had and did not acknowledge.
                Packet::Publish(p) if p.dup => continue,
                Packet::Publish(p) => {
                    let payload = String::from_utf8_lossy(p.payload);
                    format!("{payload}{}", if p.retain { " retained" } else { "" })
                }
                other => format!("{other:?}"),
            });
        }
        got
    }
}

#[test]
fn first_comes_suback_then_the_retained_messages_then_live_ones() {
    let world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    assert_eq!(world.got(), ["SUBACK"], "it waits for nothing else");
    world.brings(filter, "t", "live");
    assert!(world.got().is_empty());
    world.fetches("t", "stored");
    assert_eq!(world.got(), ["stored retained", "live"]);
    world.brings(filter, "t", "later");
    assert_eq!(world.got(), ["later"]);
    // From the cache.
    world.subscribes(&["t"]);
    assert_eq!(world.got(), ["SUBACK", "stored retained"]);
    world.brings(filter, "t", "last");
    assert_eq!(world.got(), ["last"]);
}

#[test]
fn the_retained_messages_of_each_filter_follow_the_suback_of_all() {
    let world = World::new();
    world.subscribes(&["t"]);
    let first = world.grants()[0];
    world.fetches("t", "stored");
    world.got();
    // One is granted and cached, the other is new.
    world.subscribes(&["t", "u"]);
    world.brings(first, "t", "live");
    assert!(world.got().is_empty());
    let second = world.grants()[0];
    assert_eq!(world.got(), ["SUBACK", "stored retained", "live"]);
    world.brings(second, "u", "other");
    world.brings(first, "t", "again");
    assert_eq!(world.got(), ["again"], "only one waits");
    world.fetches("u", "its own");
    assert_eq!(world.got(), ["its own retained", "other"]);
}

#[test]
fn live_messages_wait_for_a_second_at_most() {
    let mut world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.brings(filter, "t", "live");
    world.now = Millis::new(999);
    world.router.tick(world.now);
    assert!(world.got().is_empty());
    world.now = Millis::new(1000);
    world.router.tick(world.now);
    assert_eq!(world.got(), ["live"]);
    world.brings(filter, "t", "more");
    world.fetches("t", "stored");
    assert_eq!(world.got(), ["more", "stored retained"]);
}

#[test]
fn a_bounded_number_of_live_messages_waits_and_none_is_lost() {
    let world = World::new();
    world.subscribes(&["t", "u"]);
    let filters = world.grants();
    world.got();
    for n in 0..=256 {
        assert!(world.got().is_empty());
        world.brings(filters[0], "t", &n.to_string());
    }
    let all: Vec<String> = (0..=256).map(|n| n.to_string()).collect();
    assert_eq!(world.got(), all);
    world.brings(filters[1], "u", "other");
    assert!(world.got().is_empty(), "the other subscription waits");
}

#[test]
fn a_bounded_number_of_live_messages_waits_in_a_shard() {
    let world = World::new();
    let filters: Vec<String> = (0..20).map(|n| format!("t/{n}")).collect();
    let names: Vec<&str> = filters.iter().map(String::as_str).collect();
    world.subscribes(&names);
    let filters = world.grants();
    world.got();
    for n in 0..4096 {
        world.brings(filters[n % 17], names[n % 17], "waits");
    }
    assert!(world.got().is_empty());
    world.brings(filters[18], names[18], "not");
    assert_eq!(world.got(), ["not"], "nor does it have a wait any more");
}

#[test]
fn a_bounded_number_of_bytes_waits_in_a_shard() {
    let world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.brings(filter, "t", "small");
    assert!(world.got().is_empty());
    world.brings(filter, "t", &"x".repeat(1024 * 1024));
    assert!(world.got()[0] == "small");
}

#[test]
fn messages_that_wait_go_before_the_unsuback_or_into_the_queue() {
    let mut world = World::new();
    for leaves in [true, false] {
        world.subscribes(&["t"]);
        world.grants();
        let filter = FilterId(0);
        world.got();
        world.router.next_fetches(10);
        world.brings(filter, "t", "live");
        if leaves {
            world.unsubscribes("t");
            assert_eq!(world.got(), ["live", "UNSUBACK"]);
            continue;
        }
        world.disconnects();
        let router = &world.router;
        world.client = testing::kept_client_of(router, "a", Version::V5, None, world.now);
        assert_eq!(world.got(), ["live"]);
    }
}

#[test]
fn retained_messages_are_sent_though_the_connection_ended_before_its_suback() {
    let mut world = World::new();
    world.subscribes(&["t"]);
    world.grants();
    world.fetches("t", "stored");
    world.got();
    world.subscribes(&["t", "u"]);
    world.disconnects();
    world.client = testing::kept_client_of(&world.router, "a", Version::V5, None, world.now);
    assert_eq!(world.got(), ["stored retained"]);
}

#[test]
fn nothing_waits_while_the_data_link_is_away() {
    let world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.brings(filter, "t", "waits");
    world.router.data_link_down(0, world.now);
    assert_eq!(world.got(), ["waits"]);
    world.subscribes(&["t"]);
    assert_eq!(world.got(), ["SUBACK"]);
    (world.router).data_link_up(0, LinkSession::Resumed, false, world.now);
    // The link's session kept it, so it is older than retained messages that are fetched now.
    world.brings(filter, "t", "kept");
    assert_eq!(world.got(), ["kept"]);
}

#[test]
fn other_messages_of_a_topic_stay_behind_those_that_wait() {
    let world = World::new();
    world.subscribes(&["t"]);
    let first = world.grants()[0];
    world.got();
    world.subscribes(&["+"]);
    let second = world.grants()[0];
    world.got();
    world.brings(first, "t", "1");
    // The broker has lost the first filter, so the second one brings its messages.
    world
        .router
        .data_link_up(0, LinkSession::New, false, world.now);
    world.grants();
    world.brings(second, "t", "2");
    world.brings(first, "t", "2");
    let got = world.got();
    assert!(got.is_empty() || got == ["1", "2"], "{got:?}");
    let late = world.now + Duration::from_secs(1);
    world.router.tick(late);
    assert!(!got.is_empty() || world.got() == ["1", "2"]);
}
