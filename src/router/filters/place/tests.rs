//! Where filters that overlap are placed before a broker without Subscription Identifiers, and how they
//! move.

mod growth;
mod retained;
mod unanswered;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::mqtt::{
    Decoder, Message, MessageSpec, Packet, Properties, QoS, ReasonCode, Receiver, SubscribeOptions,
    Version, encode_subscribe, encode_unsubscribe,
};
use crate::router::{Arrived, BrokerFeatures, Connected, LinkSession, Router, RouterConfig};
use crate::sim::testing;
use crate::time::Millis;
use std::time::Duration;

/// A router and the filters that its broker has, by link.
struct World {
    router: Arc<Router>,
    now: Millis,
    held: Vec<BTreeSet<String>>,
    /// Filters that the broker refuses.
    refused: Vec<&'static str>,
    packet_id: u16,
}

impl World {
    /// With two data links and one shared link at first.
    fn new(data_links_max: usize, linger: Duration) -> Self {
        let world = Self::before_the_broker(config(data_links_max, linger));
        world.connect();
        world
    }

    /// No link has been connected yet.
    fn before_the_broker(config: RouterConfig) -> Self {
        Self {
            held: vec![BTreeSet::new(); config.data_links_max + config.shared_links_max],
            router: testing::router_of(config),
            now: Millis::new(1),
            refused: Vec::new(),
            packet_id: 0,
        }
    }

    /// All links connect for the first time.
    fn connect(&self) {
        let features = BrokerFeatures {
            identifiers: false,
            ..testing::facts()
        };
        self.router.set_broker_features(&features, self.now);
        for link in 0..self.held.len() {
            (self.router).data_link_up(link, LinkSession::New, true, self.now);
        }
    }

    /// The broker answers what a link has to send.
    fn answer(&mut self, link: usize) {
        for (id, name) in self.router.next_unsubscribes(link, 1000) {
            self.held[link].remove(&*name);
            self.router.unsuback(id, self.now);
        }
        for wanted in self.router.next_subscribes(link, 1000) {
            let refused = self.refused.contains(&&*wanted.name);
            let code = match refused {
                true => ReasonCode::NOT_AUTHORIZED,
                false => ReasonCode(wanted.qos as u8),
            };
            if !refused {
                self.held[link].insert((*wanted.name).to_owned());
            }
            self.router.suback(wanted.filter, code, self.now);
        }
        self.assert_disjoint();
    }

    fn pass_barriers(&self, link: usize) {
        while self.router.barrier_wanted(link) {
            let number = self.router.barrier_begins(link);
            self.router.barrier_passed(link, number, self.now);
        }
    }

    /// Lets so much time pass, with a broker that answers at once.
    fn pass(&mut self, span: Duration) {
        let until = self.now + span;
        loop {
            for link in 0..self.held.len() {
                self.answer(link);
                self.pass_barriers(link);
            }
            self.router.tick(self.now);
            if self.now >= until {
                return;
            }
            self.now += Duration::from_millis(50);
        }
    }

    /// Releases the filters whose time is over. Their UNSUBSCRIBEs wait.
    fn tick_ten_times(&self) {
        for _ in 0..10 {
            self.router.tick(self.now);
        }
    }

    /// The broker answers nothing for so long that SUBSCRIBEs are granted without it.
    fn pass_unanswered(&mut self) {
        self.now += testing::config().subscribe_wait;
        self.router.tick(self.now);
    }

    fn assert_disjoint(&self) {
        let plain =
            |f: &String| crate::topics::split_shared(f).map_or(f.clone(), |(_, f)| f.into());
        for held in &self.held {
            for (at, a) in held.iter().enumerate() {
                for b in held.iter().take(at) {
                    assert!(
                        !crate::topics::overlaps(&plain(a), &plain(b)),
                        "{a} and {b}"
                    );
                }
            }
        }
    }

    /// Sends a SUBSCRIBE, which the broker does not answer yet.
    fn ask(&mut self, client: Connected, filters: &[&str]) {
        self.ask_at(QoS::AtLeastOnce, client, filters);
    }

    fn ask_at(&mut self, qos: QoS, client: Connected, filters: &[&str]) {
        let options = SubscribeOptions {
            qos,
            retain_handling: 2,
            ..SubscribeOptions::default()
        };
        self.ask_with(options, client, filters);
    }

    fn ask_with(&mut self, options: SubscribeOptions, client: Connected, filters: &[&str]) {
        self.packet_id += 1;
        let mut packet = Vec::new();
        let filters = filters.iter().map(|f| (*f, options));
        encode_subscribe(Version::V5, self.packet_id, None, filters, &mut packet);
        testing::packet_of(&self.router, client, &packet, self.now);
    }

    /// Subscribes, and returns the codes of all SUBACKs that the client gets.
    fn subscribe(&mut self, client: Connected, filters: &[&str]) -> Vec<u8> {
        self.ask(client, filters);
        self.pass(Duration::ZERO);
        self.pass(Duration::ZERO);
        self.seen(client).0
    }

    fn unsubscribe(&mut self, client: Connected, filter: &str) {
        self.packet_id += 1;
        let mut packet = Vec::new();
        let filters = std::iter::once(filter);
        encode_unsubscribe(Version::V5, self.packet_id, filters, &mut packet);
        testing::packet_of(&self.router, client, &packet, self.now);
    }

    /// A link brings a message.
    fn bring(&self, link: usize, topic: &str, number: u32) {
        let message = Message::new(&MessageSpec {
            topic,
            properties: Properties::default(),
            payload: number.to_string().as_bytes(),
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let mut batch = [Arrived {
            message,
            filters: Default::default(),
            link,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }];
        self.router.fan_out(&mut batch, self.now);
    }

    /// The SUBACK codes and the numbers of the messages that a client has received.
    fn seen(&self, client: Connected) -> (Vec<u8>, Vec<u32>) {
        let mut out = Vec::new();
        let router = &self.router;
        router.take_output(client.session, client.connection_no, &mut out, self.now);
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let (mut at, mut codes, mut numbers) = (0, Vec::new(), Vec::new());
        while let Some((packet, used)) = decoder.next(&out[at..]).expect("legal") {
            at += used;
            match packet {
                Packet::Suback(s) => codes.extend_from_slice(s.codes),
                Packet::Publish(p) => {
                    let text = String::from_utf8_lossy(p.payload);
                    numbers.push(text.parse().expect("a number"));
                }
                _ => {}
            }
        }
        (codes, numbers)
    }

    fn client(&self, id: &str) -> Connected {
        testing::client(&self.router, id)
    }

    fn held(&self) -> Vec<&str> {
        let mut all: Vec<&str> = self.held.iter().flatten().map(String::as_str).collect();
        all.sort_unstable();
        all
    }
}

const LONG: Duration = Duration::from_secs(600);

fn config(data_links_max: usize, linger: Duration) -> RouterConfig {
    RouterConfig {
        data_links: 2.min(data_links_max),
        data_links_max,
        shared_links: 1,
        shared_links_max: 8,
        linger,
        linger_busy_min: linger,
        ..testing::config()
    }
}

#[test]
fn a_filter_that_another_client_left_keeps_nobody_out() {
    for data_links_max in [1, 2, 8] {
        let mut world = World::new(data_links_max, LONG);
        let [a, b, c] = ["a", "b", "c"].map(|id| world.client(id));
        assert_eq!(world.subscribe(a, &["#"]), [1]);
        world.unsubscribe(a, "#");
        assert_eq!(world.subscribe(b, &["a/#"]), [1]);
        assert_eq!(world.subscribe(c, &["a/+"]), [1], "{data_links_max} links");
        assert!(!world.held().contains(&"a/+"), "a/# brings its messages");
    }
}

#[test]
fn filters_that_cover_everything_keep_nobody_out() {
    let mut world = World::new(8, LONG);
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    assert_eq!(world.subscribe(a, &["#", "+/#"]), [1, 1]);
    let others = ["x", "x/y", "+", "x/+/z", "+/y"];
    assert_eq!(world.subscribe(b, &others), [1; 5]);
    assert_eq!(world.held(), ["#"]);
}

#[test]
fn filters_inside_one_another_are_granted_in_any_order() {
    let nested = ["fleet/#", "fleet/+/gps", "fleet/7/gps"];
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let mut world = World::new(8, LONG);
        let client = world.client("a");
        for at in order {
            assert_eq!(world.subscribe(client, &[nested[at]]), [1], "{order:?}");
        }
    }
}

#[test]
fn shared_groups_on_one_filter_get_links_of_their_own() {
    let mut world = World::new(8, LONG);
    let client = world.client("a");
    let groups = [
        "$share/g/a/b",
        "$share/h/a/b",
        "$share/i/a/#",
        "$share/g/a/#",
    ];
    assert_eq!(world.subscribe(client, &groups), [1; 4]);
    // A group that its members left makes room at once.
    let more: Vec<String> = (0..4).map(|n| format!("$share/{n}/a/b")).collect();
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    assert_eq!(world.subscribe(client, &more), [1; 4]);
    world.unsubscribe(client, "$share/g/a/b");
    assert_eq!(world.subscribe(client, &["$share/new/a/b"]), [1]);
}

#[test]
fn filters_that_cross_are_never_refused() {
    let mut world = World::new(8, Duration::ZERO);
    let client = world.client("a");
    // Each overlaps each other, and none lies inside another.
    let crossing: Vec<String> = (0..12)
        .map(|at| {
            let mut levels = ["+"; 12];
            levels[at] = "x";
            levels.join("/")
        })
        .collect();
    for filter in &crossing {
        assert_eq!(world.subscribe(client, &[filter]), [1]);
    }
    assert!(world.held().contains(&"#"), "the rest lies inside it");
    world.bring(7, &["x"; 12].join("/"), 1);
    // Enough of them go, and the others move to the links that are free.
    for filter in &crossing[..8] {
        world.unsubscribe(client, filter);
    }
    world.pass(Duration::from_secs(8));
    assert_eq!(world.held(), crossing[8..].iter().rev().collect::<Vec<_>>());
}

#[test]
fn a_refused_filter_is_no_reason_to_refuse_those_inside_it() {
    for data_links_max in [2, 8] {
        let mut world = World::new(data_links_max, LONG);
        world.refused = vec!["#"];
        let [a, b] = ["a", "b"].map(|id| world.client(id));
        world.ask(a, &["#"]);
        // It is placed inside the other before the broker has answered.
        world.ask(b, &["a/b"]);
        world.pass(Duration::from_millis(100));
        assert_eq!(world.seen(a).0, [0x87]);
        assert_eq!(world.seen(b).0, [1]);
        assert_eq!(world.held(), ["a/b"]);
    }
}

#[test]
fn a_filter_that_is_wanted_again_after_it_yielded_gets_another_link() {
    let mut world = World::new(8, LONG);
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    assert_eq!(world.subscribe(a, &["a/+"]), [1]);
    assert_eq!(world.subscribe(b, &["+/x"]), [1]);
    world.unsubscribe(a, "a/+");
    // Its UNSUBSCRIBE is not answered yet.
    world.ask(b, &["a/x/#"]);
    world.ask(a, &["a/+"]);
    world.pass(Duration::from_millis(100));
    assert_eq!(world.seen(a).0, [1]);
    assert_eq!(world.held(), ["+/x", "a/+", "a/x/#"]);
    assert!(world.held[0].contains("a/x/#"));
}

#[test]
fn a_filter_that_yielded_and_is_needed_for_others_gets_another_link() {
    let mut world = World::new(3, LONG);
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|id| world.client(id));
    assert_eq!(world.subscribe(a, &["#"]), [1]);
    world.unsubscribe(a, "#");
    assert_eq!(world.subscribe(b, &["+/x"]), [1]);
    // `#` yields, and its UNSUBSCRIBE is not answered yet.
    world.ask(c, &["x/+"]);
    // The two links are taken, so this one comes to lie inside `#`.
    world.ask(d, &["+/+"]);
    world.pass(Duration::from_millis(100));
    assert_eq!(world.seen(c).0, [1]);
    assert_eq!(world.seen(d).0, [1]);
    assert!(world.held[2].contains("#"));
}

#[test]
fn a_filter_whose_unsubscribe_has_no_answer_keeps_nobody_out() {
    for group in ["", "$share/g/"] {
        let mut world = World::before_the_broker(RouterConfig {
            shared_links_max: 1,
            ..config(1, Duration::ZERO)
        });
        world.connect();
        let [a, b] = ["a", "b"].map(|id| world.client(id));
        let [old, new] = ["a/+", "+/x"].map(|filter| format!("{group}{filter}"));
        assert_eq!(world.subscribe(a, &[&old]), [1]);
        world.unsubscribe(a, &old);
        world.tick_ten_times();
        let link = usize::from(!group.is_empty());
        let sent = world.router.next_unsubscribes(link, 10);
        assert_eq!(sent.len(), 1);
        world.ask(b, &[&new]);
        assert!(world.seen(b).0.is_empty(), "{new} is not refused");
        world.held[link].clear();
        world.router.unsuback(sent[0].0, world.now);
        world.answer(link);
        assert_eq!(world.seen(b).0, [1]);
        assert_eq!(world.held(), [&new]);
    }
}

#[test]
fn a_filter_that_is_needed_for_others_while_its_link_is_away_is_subscribed_again() {
    for session in [
        LinkSession::New,
        LinkSession::Doubtful,
        LinkSession::Resumed,
    ] {
        let mut world = World::new(3, Duration::ZERO);
        let [a, b] = ["a", "b"].map(|id| world.client(id));
        assert_eq!(world.subscribe(a, &["x/+", "+/x", "+/+"]), [1; 3]);
        assert!(world.held[2].contains("#"), "the last one lies inside it");
        world.router.data_link_down(2, world.now);
        world.unsubscribe(a, "+/+");
        // `#` is to be unsubscribed.
        world.tick_ten_times();
        world.ask(b, &["+/+"]);
        if session == LinkSession::New {
            world.held[2].clear();
        }
        world.router.data_link_up(2, session, false, world.now);
        world.pass(Duration::from_millis(100));
        assert_eq!(world.seen(b).0, [1], "{session:?}");
        assert!(world.held[2].contains("#"), "{session:?}");
        world.bring(2, "q/r", 1);
        assert_eq!(world.seen(b).1, [1]);
    }
}

/// One client leaves `#`, inside which `a/b` and `a/+` of another one lie.
fn about_to_move() -> (World, Connected) {
    let mut world = World::new(8, Duration::ZERO);
    let [monitor, client] = ["monitor", "client"].map(|id| world.client(id));
    assert_eq!(world.subscribe(monitor, &["#"]), [1]);
    assert_eq!(world.subscribe(client, &["a/+"]), [1]);
    assert_eq!(world.held(), ["#"]);
    world.unsubscribe(monitor, "#");
    for _ in 0..10 {
        world.router.tick(world.now);
    }
    (world, client)
}

#[test]
fn while_a_filter_moves_each_message_comes_once_and_in_order() {
    // How many messages the own link is ahead of the outer one.
    for lead in -3_i32..=3 {
        let (mut world, client) = about_to_move();
        let outer = (world.held.iter().position(|h| h.contains("#"))).expect("it is subscribed");
        world.bring(outer, "a/b", 1);
        let own = (0..8).find(|link| {
            world.answer(*link);
            world.held[*link].contains("a/+")
        });
        let own = own.expect("it is subscribed");
        // They were published after the SUBACK.
        let mut brought = (1, 1);
        let mut bring = |world: &World, outer_until: u32, own_until: u32| {
            for number in brought.1 + 1..=own_until {
                world.bring(own, "a/b", number);
            }
            for number in brought.0 + 1..=outer_until {
                world.bring(outer, "a/b", number);
            }
            brought = (brought.0.max(outer_until), brought.1.max(own_until));
        };
        let at = |number: u32| {
            let own = number.saturating_add_signed(lead.max(0));
            (number.saturating_add_signed((-lead).max(0)), own)
        };
        bring(&world, at(4).0, at(4).1);
        world.router.tick(world.now);
        // Everything that was published before this barrier has come by both links.
        bring(&world, 10, 10);
        world.pass_barriers(own);
        bring(&world, at(14).0, at(14).1);
        world.now += Duration::from_millis(600);
        world.router.tick(world.now);
        bring(&world, at(20).0, at(20).1);
        world.pass_barriers(outer);
        bring(&world, at(25).0, at(25).1);
        bring(&world, 40, 40);
        world.pass(Duration::from_secs(3));
        world.bring(own, "a/b", 41);
        assert_eq!(world.held(), ["a/+"], "lead {lead}");
        let expected: Vec<u32> = (1..=41).collect();
        assert_eq!(world.seen(client).1, expected, "lead {lead}");
    }
}

#[test]
fn a_move_that_the_broker_refuses_loses_nothing() {
    let (mut world, client) = about_to_move();
    world.refused = vec!["a/+"];
    world.pass(Duration::from_secs(5));
    assert_eq!(world.held(), ["#"]);
    let outer = (world.held.iter().position(|h| h.contains("#"))).expect("it is subscribed");
    world.bring(outer, "a/b", 1);
    assert_eq!(world.seen(client).1, [1]);
    world.refused.clear();
    world.pass(Duration::from_secs(70));
    assert_eq!(world.held(), ["a/+"]);
}

#[test]
fn filters_inside_a_moving_one_go_along_with_it() {
    let (mut world, client) = about_to_move();
    assert_eq!(world.subscribe(client, &["a/b"]), [1]);
    world.pass(Duration::from_secs(5));
    assert_eq!(world.held(), ["a/+"]);
    let own = (world.held.iter().position(|h| h.contains("a/+"))).expect("it is subscribed");
    world.bring(own, "a/b", 1);
    assert_eq!(world.seen(client).1, [1]);
}

#[test]
fn the_plain_filter_of_a_local_group_moves_with_the_group_s_qos() {
    let mut world = World::before_the_broker(RouterConfig {
        local_groups: true,
        ..config(8, Duration::ZERO)
    });
    world.connect();
    let [monitor, client] = ["monitor", "client"].map(|id| world.client(id));
    assert_eq!(world.subscribe(monitor, &["#"]), [1]);
    assert_eq!(world.subscribe(client, &["$share/g/a/b"]), [1]);
    assert_eq!(world.held(), ["#"]);
    world.unsubscribe(monitor, "#");
    for _ in 0..10 {
        world.router.tick(world.now);
    }
    let moving: Vec<_> = (0..8)
        .flat_map(|link| world.router.next_subscribes(link, 10))
        .map(|wanted| (wanted.name.to_string(), wanted.qos))
        .collect();
    assert_eq!(moving, [("a/b".to_owned(), QoS::AtLeastOnce)]);
}
