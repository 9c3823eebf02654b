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

mod asleep;

/// A client, and the links to its broker.
struct World {
    router: Arc<Router>,
    client: Connected,
    now: Millis,
}

impl World {
    fn new() -> Self {
        Self::of(testing::router())
    }

    fn of(router: Arc<Router>) -> Self {
        let client = testing::kept_client_of(&router, "a", Version::V5, None, Millis::ZERO);
        Self {
            router,
            client,
            now: Millis::ZERO,
        }
    }

    /// The client subscribes to filters, with retained messages.
    fn subscribes(&self, filters: &[&str]) {
        self.subscribes_as(1, filters, 0);
    }

    fn subscribes_as(&self, packet_id: u16, filters: &[&str], retain_handling: u8) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            retain_handling,
            ..SubscribeOptions::default()
        };
        let filters = filters.iter().map(|filter| (*filter, options));
        let mut bytes = Vec::new();
        encode_subscribe(Version::V5, packet_id, None, filters, &mut bytes);
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
        self.brings_message(filter, Self::message(topic, payload, false));
    }

    fn brings_message(&self, filter: FilterId, message: Message) {
        let mut batch = [Arrived {
            message,
            filters: [filter].as_slice().into(),
            link: 0,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }];
        self.router.fan_out(&mut batch, self.now);
    }

    /// The filters whose fetch begins now are fetched: each has one retained message.
    fn fetches(&self, topic: &str, payload: &str) {
        for (filter, _) in self.router.next_fetches(10) {
            self.is_fetched(filter, topic, payload);
        }
    }

    /// The fetch of a filter brings one retained message, and is over.
    fn is_fetched(&self, filter: FilterId, topic: &str, payload: &str) {
        let message = Self::message(topic, payload, true);
        self.router.fetched(filter, &message, self.now);
        self.router.fetch_answered(&[filter], self.now);
        self.passes_barrier();
        self.router.fetch_ended(&[filter], true, self.now);
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
fn a_session_has_a_quarter_of_the_messages_that_may_wait_in_its_shard() {
    let world = World::new();
    let names = ["t/0", "t/1", "t/2", "t/3", "t/4"];
    world.subscribes(&names);
    let filters = world.grants();
    world.got();
    for n in 0..1024 {
        world.brings(filters[n % 4], names[n % 4], "waits");
    }
    assert!(world.got().is_empty());
    world.brings(filters[4], names[4], "not");
    assert_eq!(world.got(), ["not"], "nor does it have a wait any more");
}

#[test]
fn a_bounded_number_of_live_messages_waits_in_a_shard() {
    let mut world = World::new();
    let names = ["t/0", "t/1", "t/2", "t/3", "t/4"];
    let shard = world.client.session.shard;
    let others = (0..).map(|n| {
        let id = format!("client {n}");
        testing::kept_client_of(&world.router, &id, Version::V5, None, Millis::ZERO)
    });
    let others = others.filter(|client| client.session.shard == shard);
    let clients: Vec<Connected> = others.take(5).collect();
    let mut filters = Vec::new();
    for client in &clients {
        world.client = *client;
        world.subscribes(&names);
        filters.extend(world.grants());
        world.got();
    }
    let brings = |n: usize| world.brings(filters[n % 5], names[n % 5], "waits");
    let gets = |client: &Connected| {
        let mut bytes = Vec::new();
        (world.router).take_output(client.session, client.connection_no, &mut bytes, world.now);
        !bytes.is_empty()
    };
    (0..819).for_each(brings);
    assert!(!clients.iter().any(gets), "4,095 wait");
    brings(819);
    let got: Vec<bool> = clients.iter().map(gets).collect();
    let flushed = got.iter().filter(|got| **got).count();
    assert_eq!(flushed, 1, "that makes room for others: {got:?}");
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

#[test]
fn messages_of_a_topic_stay_in_order_though_two_subscriptions_wait() {
    let world = World::new();
    world.subscribes(&["t"]);
    let first = world.grants()[0];
    world.subscribes(&["+"]);
    let second = world.grants()[0];
    world.got();
    world.brings(first, "t", "1");
    // The broker has lost both filters, and has the second one again.
    (world.router).data_link_up(0, LinkSession::New, false, world.now);
    let again = world.router.next_subscribes(0, 100);
    assert!(again.iter().any(|asked| asked.filter == second));
    (world.router).suback(second, ReasonCode(1), world.now);
    world.brings(second, "t", "2");
    world.router.next_fetches(10);
    world.router.fetch_ended(&[second], true, world.now);
    assert!(world.got().is_empty());
    world.is_fetched(first, "t", "0");
    assert_eq!(world.got(), ["0 retained", "1", "2"]);
}

#[test]
fn retained_messages_of_a_subscription_that_ended_do_not_come_before_the_suback_of_the_next() {
    let world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.router.next_fetches(10);
    world.unsubscribes("t");
    assert_eq!(world.got(), ["UNSUBACK"]);
    // The broker has yet to grant the other filter.
    world.subscribes(&["t", "u"]);
    world.is_fetched(filter, "t", "stored");
    assert!(world.got().is_empty());
    world.grants();
    assert_eq!(world.got(), ["SUBACK", "stored retained"]);
}

#[test]
fn retained_messages_of_a_subscription_that_ended_before_its_suback_do_not_come() {
    let world = World::new();
    world.subscribes(&["t"]);
    world.grants();
    world.fetches("t", "stored");
    world.got();
    world.subscribes(&["t", "u"]);
    world.unsubscribes("t");
    world.subscribes_as(3, &["t"], 2);
    assert_eq!(world.got(), ["UNSUBACK", "SUBACK"]);
    world.grants();
    assert_eq!(world.got(), ["SUBACK"]);
}

#[test]
fn live_messages_wait_on_though_an_earlier_connection_gets_its_retained_messages() {
    let mut world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.router.next_fetches(10);
    world.disconnects();
    world.client = testing::kept_client_of(&world.router, "a", Version::V5, None, world.now);
    world.subscribes(&["t", "u"]);
    world.is_fetched(filter, "t", "stored");
    assert_eq!(world.got(), ["stored retained"]);
    world.brings(filter, "t", "live");
    assert!(world.got().is_empty(), "the SUBACK is still to come");
    world.grants();
    assert_eq!(world.got(), ["SUBACK", "stored retained", "live"]);
}

#[test]
fn live_messages_wait_though_the_client_was_answered_before_the_broker_answered() {
    let mut world = World::new();
    world.subscribes(&["t"]);
    world.now = Millis::ZERO + testing::config().subscribe_wait;
    world.router.tick(world.now);
    assert_eq!(world.got(), ["SUBACK"]);
    let filter = world.grants()[0];
    world.brings(filter, "t", "live");
    assert!(world.got().is_empty());
    world.fetches("t", "stored");
    assert_eq!(world.got(), ["stored retained", "live"]);
}

#[test]
fn messages_of_a_client_that_subscribes_again_and_again_wait_no_longer() {
    let mut world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    world.brings(filter, "t", "live");
    world.now = Millis::new(900);
    world.subscribes(&["t"]);
    assert_eq!(world.got(), ["SUBACK"]);
    world.now = Millis::new(1000);
    world.router.tick(world.now);
    assert_eq!(world.got(), ["live"]);
}

/// The broker retained the value when the fetch began, and its live copy waits behind an older one.
#[test]
fn a_retained_value_does_not_come_before_older_ones() {
    let world = World::new();
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    for payload in ["1", "2"] {
        world.brings_message(filter, World::message("t", payload, true));
    }
    world.fetches("t", "2");
    assert_eq!(world.got(), ["1", "2"]);
}

#[test]
fn a_client_is_woken_for_messages_that_may_not_wait() {
    let router = testing::router_limited(testing::config(), |limits| {
        limits.output_buffer = Arc::new(16.into());
    });
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    let world = World::of(router);
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    world.got();
    for _ in 0..256 {
        world.brings(filter, "t", "waits");
    }
    let is_woken = || {
        let mut shard = world.router.sessions.shard(world.client.session.shard);
        shard.get(world.client.session).expect("it is there").woken
    };
    assert!(!is_woken());
    // Not all of them have room in the output.
    world.brings(filter, "t", "last");
    assert!(is_woken());
}
