//! Retained messages and overlapping filters while links are away.

use std::sync::Arc;

use crate::mqtt::{
    Message, MessageSpec, Packet, Properties, Publish, QoS, Suback, SubscribeOptions, Version,
    encode_subscribe, encode_unsubscribe,
};
use crate::router::{Connected, Router, RouterConfig};
use crate::sim::testing::{
    PROBES, client, config, facts, packet_of, read, router_of, subscribe_handling, up,
};
use crate::store::Memory;
use crate::topics::FilterId;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::Machine;

use crate::time::Millis;
use crate::upstream::link::data::DataLink;

/// Data links to a broker that grants every SUBSCRIBE.
struct Broker {
    router: Arc<Router>,
    links: Vec<DataLink>,
}

impl Broker {
    fn new(links: usize) -> Self {
        let router = router_of(RouterConfig {
            data_links: links,
            ..config()
        });
        router.set_broker_features(&facts(), Millis::ZERO);
        let link = |n| DataLink::new(router.clone(), n, 1, PROBES.into(), &Memory);
        let mut broker = Self {
            links: (0..links).map(link).collect(),
            router,
        };
        for n in 0..links {
            broker.connects(n, false);
        }
        broker
    }

    /// A link connects, and its SUBSCRIBEs are granted.
    fn connects(&mut self, link: usize, session_present: bool) {
        let mut out = Vec::new();
        self.links[link].connected(&up(session_present, 100), Millis::ZERO, &mut out);
        self.grant(link, out);
    }

    fn disconnects(&mut self, link: usize) {
        self.links[link].disconnected(&LinkEnd::Closed, Millis::ZERO);
    }

    /// The client subscribes, and the broker grants it. Returns the link that has the filter.
    fn subscribe(&mut self, who: Connected, filter: &str, retain_handling: u8) -> usize {
        subscribe_handling(&self.router, who, filter, retain_handling);
        let granted = |broker: &mut Self, link: usize| {
            let mut out = Vec::new();
            broker.links[link].poll(Millis::ZERO, &mut out);
            broker.grant(link, out)
        };
        let link = (0..self.links.len()).find(|link| granted(self, *link));
        link.expect("one link is asked")
    }

    /// The client sends UNSUBSCRIBE.
    fn unsubscribe(&self, who: Connected, filter: &str) {
        let mut bytes = Vec::new();
        encode_unsubscribe(Version::V5, 9, std::iter::once(filter), &mut bytes);
        packet_of(&self.router, who, &bytes, Millis::ZERO);
    }

    fn grant(&mut self, link: usize, mut asked: Vec<u8>) -> bool {
        let asked = read(&mut asked);
        for (what, packet_id) in &asked {
            assert_eq!(what, "subscribe");
            let suback = Suback {
                packet_id: *packet_id,
                codes: &[1],
                properties: Properties::default(),
            };
            self.links[link]
                .packet(&Packet::Suback(suback), Millis::ZERO, &mut Vec::new())
                .expect("it is expected");
        }
        !asked.is_empty()
    }

    /// The retained link brings a message for a filter.
    fn fetched(&self, number: FilterId, payload: &str) {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        self.router.fetched(number, &message, Millis::ZERO);
    }

    /// A data link brings a QoS 1 message for a filter.
    fn brings(&mut self, link: usize, number: FilterId, payload: &str, retain: bool) {
        let identifier = [0x0B, number.subscription_identifier() as u8];
        let publish = Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain,
            topic: "t",
            packet_id: 1,
            payload: payload.as_bytes(),
            properties: Properties(&identifier),
            message_expiry: None,
            topic_alias: None,
            has_subscription_ids: true,
        };
        let (link, mut out) = (&mut self.links[link], Vec::new());
        link.packet(&Packet::Publish(publish), Millis::ZERO, &mut out)
            .expect("it is expected");
        link.batch_ended(Millis::ZERO, &mut out);
    }

    /// Answers PINGREQs.
    fn answers(&mut self, link: usize) {
        self.links[link].poll(Millis::ZERO, &mut Vec::new());
        while self.links[link].wants_ping() {
            self.links[link].ping_answered(Millis::ZERO);
            self.links[link].poll(Millis::ZERO, &mut Vec::new());
        }
    }

    /// The payloads that a client receives now, each of one digit.
    fn got(&self, who: Connected) -> String {
        let mut taken = Vec::new();
        self.router
            .take_output(who.session, who.connection_no, &mut taken, Millis::ZERO)
            .expect("it is connected");
        let mut got = String::new();
        while !taken.is_empty() {
            let rest = taken.split_off(2 + usize::from(taken[1]));
            if taken[0] >> 4 == 3 {
                got.push(char::from(*taken.last().expect("a payload")));
            }
            taken = rest;
        }
        got
    }
}

/// I6: a fetch that ends while the data link is away may have missed later changes.
#[test]
fn a_fetch_while_the_data_link_is_away_is_handed_on_behind_it_and_not_kept() {
    let mut broker = Broker::new(1);
    let first = client(&broker.router, "first");
    broker.subscribe(first, "t", 2);
    broker.disconnects(0);
    let who = client(&broker.router, "a");
    subscribe_handling(&broker.router, who, "t", 0);
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "2");
    broker.router.fetch_answered(&[number], Millis::ZERO);
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    assert_eq!(
        broker.got(who),
        "",
        "what the link's session kept comes first"
    );
    broker.connects(0, true);
    broker.brings(0, number, "1", false);
    assert_eq!(broker.got(who), "1");
    broker.answers(0);
    assert_eq!(broker.got(who), "2");
    let other = client(&broker.router, "b");
    subscribe_handling(&broker.router, other, "t", 0);
    assert_eq!(broker.router.next_fetches(1).len(), 1, "it is fetched anew");
}

/// I6: two filters of a client are fetched at different times, while their link is away.
#[test]
fn an_older_fetched_value_does_not_follow_a_newer_one() {
    for older in [0, 1] {
        let mut broker = Broker::new(1);
        let first = client(&broker.router, "first");
        let who = client(&broker.router, "a");
        for filter in ["t", "+"] {
            broker.subscribe(first, filter, 2);
        }
        broker.disconnects(0);
        for filter in ["t", "+"] {
            subscribe_handling(&broker.router, who, filter, 0);
        }
        let numbers: Vec<FilterId> = (broker.router.next_fetches(2).iter())
            .map(|(number, _)| *number)
            .collect();
        broker.fetched(numbers[older], "1");
        broker.fetched(numbers[1 - older], "2");
        broker.router.fetch_ended(&numbers, true, Millis::ZERO);
        broker.connects(0, true);
        broker.answers(0);
        assert_eq!(broker.got(who), "22", "each filter brings the newer value");
    }
}

/// I6: a value that one filter's fetch showed to be old is not served from the cache of another filter.
#[test]
fn a_cached_value_is_forgotten_when_another_filter_brings_a_newer_one() {
    let mut broker = Broker::new(2);
    let first = client(&broker.router, "first");
    let fetch = |broker: &mut Broker, who, filter, payload| {
        broker.subscribe(who, filter, 0);
        let fetches = broker.router.next_fetches(1);
        let (number, _) = fetches.first()?.clone();
        broker.fetched(number, payload);
        (0..2).for_each(|link| broker.answers(link));
        broker.router.fetch_ended(&[number], true, Millis::ZERO);
        Some(broker.got(who))
    };
    assert_eq!(fetch(&mut broker, first, "t", "1").as_deref(), Some("1"));
    let who = client(&broker.router, "a");
    assert_eq!(fetch(&mut broker, who, "+", "2").as_deref(), Some("2"));
    subscribe_handling(&broker.router, who, "t", 0);
    assert_eq!(broker.got(who), "", "the data link has yet to bring it");
    assert_eq!(broker.router.next_fetches(1).len(), 1, "it is fetched anew");
}

/// Fetched messages wait for the data link for some seconds only.
#[test]
fn a_data_link_that_stays_away_keeps_no_fetch() {
    let mut broker = Broker::new(1);
    let first = client(&broker.router, "first");
    broker.subscribe(first, "t", 2);
    broker.disconnects(0);
    let who = client(&broker.router, "a");
    subscribe_handling(&broker.router, who, "t", 0);
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "2");
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    broker.router.tick(Millis::new(4_999));
    assert_eq!(broker.got(who), "");
    broker.router.tick(Millis::new(5_000));
    assert_eq!(broker.got(who), "2");
    assert_eq!(broker.router.retained_pending(), 0);
    let other = client(&broker.router, "b");
    subscribe_handling(&broker.router, other, "t", 0);
    assert_eq!(broker.router.next_fetches(1).len(), 1, "it is not kept");
}

/// A resync does not deliver messages that arrived live after the broker had a lost filter again.
#[test]
fn a_resync_delivers_only_messages_that_are_not_known() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    broker.subscribe(who, "t", 2);
    broker.disconnects(0);
    broker.connects(0, false);
    broker.brings(0, FilterId(0), "1", true);
    assert_eq!(broker.got(who), "1");
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "1");
    broker.answers(0);
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    assert_eq!(broker.got(who), "");
    // Once more, and now no live message arrives before the fetch.
    broker.disconnects(0);
    broker.connects(0, false);
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "2");
    broker.answers(0);
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    assert_eq!(broker.got(who), "2");
}

/// Two overlapping filters of a client, on different links.
struct Overlapping {
    broker: Broker,
    who: Connected,
    /// The primary's link; its number is 0.
    primary: usize,
    secondary: usize,
    secondary_number: FilterId,
}

impl Overlapping {
    fn new() -> Self {
        let filters = ["t", "#", "+", "t/#", "+/#"];
        let mut broker = Broker::new(2);
        // The link on which each filter is placed when one client alone has it.
        let mut place = |f| {
            let one = client(&broker.router, f);
            broker.subscribe(one, f, 2)
        };
        let links = filters.map(&mut place);
        let who = client(&broker.router, "a");
        for filter in filters {
            subscribe_handling(&broker.router, who, filter, 2);
        }
        // The first filter is primary; the secondary is the first on another link.
        let other = links.iter().position(|l| *l != links[0]).expect("both");
        Self {
            broker,
            who,
            primary: links[0],
            secondary: links[other],
            secondary_number: FilterId::from_index(other),
        }
    }

    /// A message arrives through the secondary filter; returns what the client gets.
    fn by_secondary(&mut self, payload: &str) -> String {
        let (secondary, number) = (self.secondary, self.secondary_number);
        self.broker.brings(secondary, number, payload, false);
        self.broker.got(self.who)
    }

    fn by_primary(&mut self, payload: &str) -> String {
        self.broker
            .brings(self.primary, FilterId(0), payload, false);
        self.broker.got(self.who)
    }
}

/// A message that arrives through one filter while the other's link is away is dropped in favour of the
/// other's copy only while the broker certainly has the other filter.
#[test]
fn a_copy_is_not_dropped_for_a_filter_that_the_broker_may_have_lost() {
    for lost in [false, true] {
        let mut two = Overlapping::new();
        two.broker.disconnects(two.primary);
        two.broker.disconnects(two.secondary);
        two.broker.connects(two.secondary, !lost);
        let got = if lost { "1" } else { "" };
        assert_eq!(two.by_secondary("1"), got, "lost: {lost}");
        // The broker kept the link's session, so the doubt is over.
        two.broker.connects(two.primary, true);
        assert_eq!(two.by_secondary("2"), "");
        assert_eq!(two.by_primary("2"), "2");
    }
}

/// A link that seems connected may be dead: a loss soon afterwards counts as well.
#[test]
fn the_doubt_reaches_a_link_that_is_found_dead_later() {
    let mut two = Overlapping::new();
    two.broker.disconnects(two.secondary);
    two.broker.connects(two.secondary, false);
    assert_eq!(two.by_secondary("1"), "", "the primary's link is there");
    two.broker.disconnects(two.primary);
    assert_eq!(two.by_secondary("2"), "2");
}

/// While the broker may have lost the filter that takes over from an unsubscribed one, the copies of the
/// unsubscribed one are delivered.
#[test]
fn a_handover_to_a_filter_that_the_broker_may_have_lost_drops_no_message() {
    let Overlapping {
        mut broker,
        primary,
        secondary,
        secondary_number,
        ..
    } = Overlapping::new();
    let names = ["t", "#", "+", "t/#", "+/#"];
    let remaining = secondary_number.subscription_identifier() as usize - 1;
    let later = (1..names.len()).find(|n| *n != remaining).expect("five");
    let who = client(&broker.router, "b");
    for name in [names[0], names[remaining]] {
        subscribe_handling(&broker.router, who, name, 2);
    }
    broker.disconnects(secondary);
    broker.disconnects(primary);
    broker.connects(primary, false);
    broker.unsubscribe(who, names[0]);
    subscribe_handling(&broker.router, who, names[later], 2);
    broker.brings(primary, FilterId(0), "1", false);
    assert_eq!(broker.got(who), "1");
    broker.connects(secondary, true);
    broker.brings(secondary, secondary_number, "1", false);
    assert_eq!(broker.got(who), "", "the broker had kept the filter");
}

/// The fetches of two filters come at different times, so neither may count on the other's.
#[test]
fn a_resync_during_a_handover_drops_no_message() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    for filter in ["t", "+"] {
        broker.subscribe(who, filter, 2);
    }
    broker.unsubscribe(who, "t");
    broker.disconnects(0);
    broker.connects(0, false);
    let fetches = broker.router.next_fetches(2);
    let number = |name: &str| {
        let found = fetches.iter().find(|(_, n)| **n == *name);
        found.map(|(number, _)| *number)
    };
    broker.fetched(number("+").expect("it was lost"), "1");
    broker.answers(0);
    if let Some(gone) = number("t") {
        broker.fetched(gone, "1");
        broker.answers(0);
    }
    assert_eq!(broker.got(who), "1");
}

/// A client unsubscribes a filter while the broker has yet to grant an overlapping one.
#[test]
fn a_message_is_delivered_once_if_its_filter_goes_before_another_is_granted() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    let options = SubscribeOptions {
        retain_handling: 2,
        ..SubscribeOptions::default()
    };
    let mut bytes = Vec::new();
    let filters = std::iter::once(("t", options));
    encode_subscribe(Version::V5, 8, None, filters, &mut bytes);
    packet_of(&broker.router, who, &bytes, Millis::ZERO);
    let poll = |broker: &mut Broker| {
        let mut out = Vec::new();
        broker.links[0].poll(Millis::ZERO, &mut out);
        out
    };
    let asked = poll(&mut broker);
    assert!(broker.grant(0, asked));
    broker.brings(0, FilterId(0), "1", false);
    assert_eq!(broker.got(who), "1");
    subscribe_handling(&broker.router, who, "+", 2);
    let asked = poll(&mut broker);
    broker.unsubscribe(who, "t");
    assert!(broker.grant(0, asked));
    // The copies of the first one serve the second one too, which asked for QoS 1.
    let raised = poll(&mut broker);
    assert!(broker.grant(0, raised));
    broker.brings(0, FilterId(1), "1", false);
    assert_eq!(broker.got(who), "");
    broker.brings(0, FilterId(0), "2", false);
    broker.brings(0, FilterId(1), "2", false);
    assert_eq!(broker.got(who), "2");
    broker.answers(0);
    broker.brings(0, FilterId(1), "3", false);
    assert_eq!(broker.got(who), "3");
}

/// After a broker has lost everything, the filters that it has again are known, even if the link flaps.
#[test]
fn a_flap_before_the_answer_makes_nothing_known_new() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    broker.subscribe(who, "t", 0);
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "1");
    broker.answers(0);
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    assert_eq!(broker.got(who), "1");
    broker.disconnects(0);
    let link = &mut broker.links[0];
    link.connected(&up(false, 100), Millis::ZERO, &mut Vec::new());
    broker.disconnects(0);
    broker.connects(0, true);
    let (number, _) = broker.router.next_fetches(1)[0].clone();
    broker.fetched(number, "1");
    broker.answers(0);
    broker.router.fetch_ended(&[number], true, Millis::ZERO);
    assert_eq!(broker.got(who), "", "it knows that one");
}

/// A shared subscription gets no retained messages, and a fetch for it would be a member of its group.
#[test]
fn a_lost_group_is_not_fetched() {
    let mut broker = Broker::new(1);
    let shared = broker.router.shared_link(0);
    let link = DataLink::new(broker.router.clone(), shared, 1, PROBES.into(), &Memory);
    broker.links.push(link);
    broker.connects(1, false);
    let who = client(&broker.router, "a");
    broker.subscribe(who, "$share/g/t", 0);
    broker.disconnects(1);
    broker.connects(1, false);
    assert!(broker.router.data_settled());
    assert!(broker.router.next_fetches(1).is_empty());
}

/// A filter that was about to be unsubscribed is not subscribed again when all links begin anew.
#[test]
fn a_filter_without_subscribers_is_not_revived_by_other_features() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    broker.subscribe(who, "t", 2);
    broker.disconnects(0);
    let name = "t".to_owned();
    let number = 0;
    let left = [crate::session::Unsubscribed {
        filter: FilterId(number),
        name: name.as_str().into(),
        no_local: false,
        primary_over: None,
    }];
    broker.router.with(who.session, who.connection_no, |s, _| {
        s.remove_subscription(FilterId(number))
    });
    broker.router.unsubscribe(who.session, &left, Millis::ZERO);
    broker.router.tick(Millis::new(600_001));
    let other = crate::router::BrokerFeatures {
        identifiers: false,
        ..facts()
    };
    assert!(
        broker
            .router
            .set_broker_features(&other, Millis::new(600_001))
    );
    let mut out = Vec::new();
    broker.links[0].connected(&up(false, 100), Millis::new(600_001), &mut out);
    assert!(read(&mut out).is_empty());
}

/// The options of SUBSCRIBE follow the broker's profile.
#[test]
fn all_links_begin_anew_if_the_broker_keeps_retain_no_longer() {
    let mut broker = Broker::new(1);
    let who = client(&broker.router, "a");
    broker.subscribe(who, "t", 2);
    let other = crate::router::BrokerFeatures {
        keeps_retain: false,
        ..facts()
    };
    assert!(!broker.router.set_broker_features(&facts(), Millis::ZERO));
    assert!(broker.router.set_broker_features(&other, Millis::ZERO));
    assert!(!broker.router.set_broker_features(&other, Millis::ZERO));
    broker.disconnects(0);
    let mut out = Vec::new();
    broker.links[0].connected(&up(false, 100), Millis::ZERO, &mut out);
    assert_eq!(read(&mut out).len(), 1);
}
