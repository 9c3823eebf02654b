//! What befalls retained messages and overlapping filters while links are away.

use std::sync::Arc;

use crate::mqtt::{Message, MessageSpec, Packet, Properties, Publish, QoS, Suback};
use crate::router::{Connected, Router, RouterConfig};
use crate::sim::testing::{PROBES, client, config, facts, read, router_of, subscribe_handling, up};
use crate::store::Memory;
use crate::topics::FilterId;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::Machine;

use crate::upstream::link::data::DataLink;

/// Data links to a core that grants what it is asked.
struct Core {
    router: Arc<Router>,
    links: Vec<DataLink>,
}

impl Core {
    fn new(links: usize) -> Self {
        let router = router_of(RouterConfig {
            data_links: links,
            ..config()
        });
        router.set_broker_features(&facts(), 0);
        let link = |n| DataLink::new(router.clone(), n, 1, PROBES.into(), &Memory);
        let mut core = Self {
            links: (0..links).map(link).collect(),
            router,
        };
        for n in 0..links {
            core.rises(n, false);
        }
        core
    }

    /// A link comes up, and is granted what it asks for.
    fn rises(&mut self, link: usize, session_present: bool) {
        let mut out = Vec::new();
        self.links[link].connected(&up(session_present, 100), 0, &mut out);
        self.grant(link, out);
    }

    fn falls(&mut self, link: usize) {
        self.links[link].disconnected(&LinkEnd::Closed, 0);
    }

    /// The client subscribes, and the core grants it on whatever link it is asked on: that link's.
    fn subscribe(&mut self, who: Connected, filter: &str, retain_handling: u8) -> usize {
        subscribe_handling(&self.router, who, filter, retain_handling);
        let granted = |core: &mut Self, link: usize| {
            let mut out = Vec::new();
            core.links[link].poll(0, &mut out);
            core.grant(link, out)
        };
        let link = (0..self.links.len()).find(|link| granted(self, *link));
        link.expect("one link is asked")
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
                .packet(&Packet::Suback(suback), 0, &mut Vec::new())
                .expect("it is expected");
        }
        !asked.is_empty()
    }

    /// A retained message is fetched for a filter.
    fn fetched(&self, number: FilterId, payload: &str) {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        });
        self.router.fetched(number, &message, 0);
    }

    /// A QoS 1 message comes by a filter.
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
        link.packet(&Packet::Publish(publish), 0, &mut out)
            .expect("it is expected");
        link.batch_ended(0, &mut out);
    }

    /// Answers PINGREQs.
    fn answers(&mut self, link: usize) {
        self.links[link].poll(0, &mut Vec::new());
        while self.links[link].wants_ping() {
            self.links[link].ping_answered(0);
            self.links[link].poll(0, &mut Vec::new());
        }
    }

    /// What a client gets now: payloads, for those that are a digit.
    fn got(&self, who: Connected) -> String {
        let mut taken = Vec::new();
        self.router
            .take_output(who.session, who.connection_no, &mut taken, 0)
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

/// I6: a fetch that is over while the data link is away may have missed what changed since.
#[test]
fn a_fetch_while_the_data_link_is_away_is_handed_on_behind_it_and_not_kept() {
    let mut core = Core::new(1);
    let first = client(&core.router, "first");
    core.subscribe(first, "t", 2);
    core.falls(0);
    let who = client(&core.router, "a");
    subscribe_handling(&core.router, who, "t", 0);
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "2");
    core.router.fetch_answered(&[number]);
    core.router.fetch_ended(&[number], true, 0);
    assert_eq!(
        core.got(who),
        "",
        "what the link's session kept comes first"
    );
    core.rises(0, true);
    core.brings(0, number, "1", false);
    assert_eq!(core.got(who), "1");
    core.answers(0);
    assert_eq!(core.got(who), "2");
    let other = client(&core.router, "b");
    subscribe_handling(&core.router, other, "t", 0);
    assert_eq!(core.router.next_fetches(1).len(), 1, "it is fetched anew");
}

/// It waits no longer than some seconds.
#[test]
fn a_data_link_that_stays_away_keeps_no_fetch() {
    let mut core = Core::new(1);
    let first = client(&core.router, "first");
    core.subscribe(first, "t", 2);
    core.falls(0);
    let who = client(&core.router, "a");
    subscribe_handling(&core.router, who, "t", 0);
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "2");
    core.router.fetch_ended(&[number], true, 0);
    core.router.tick(4_999);
    assert_eq!(core.got(who), "");
    core.router.tick(5_000);
    assert_eq!(core.got(who), "2");
    assert_eq!(core.router.retained_pending(), 0);
    let other = client(&core.router, "b");
    subscribe_handling(&core.router, other, "t", 0);
    assert_eq!(core.router.next_fetches(1).len(), 1, "it is not kept");
}

/// What came live after the core had a lost filter again is not told once more.
#[test]
fn a_resync_tells_what_is_not_known() {
    let mut core = Core::new(1);
    let who = client(&core.router, "a");
    core.subscribe(who, "t", 2);
    core.falls(0);
    core.rises(0, false);
    core.brings(0, FilterId(0), "1", true);
    assert_eq!(core.got(who), "1");
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "1");
    core.answers(0);
    core.router.fetch_ended(&[number], true, 0);
    assert_eq!(core.got(who), "");
    // Once more, and nothing comes before it is fetched.
    core.falls(0);
    core.rises(0, false);
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "2");
    core.answers(0);
    core.router.fetch_ended(&[number], true, 0);
    assert_eq!(core.got(who), "2");
}

/// Two overlapping filters of a client, on different links.
struct Overlapping {
    core: Core,
    who: Connected,
    /// The senior's link; its number is 0.
    senior: usize,
    junior: usize,
    junior_number: FilterId,
}

impl Overlapping {
    fn new() -> Self {
        let filters = ["t", "#", "+", "t/#", "+/#"];
        let mut core = Core::new(2);
        // Each is where the filter of one client alone is put.
        let mut place = |f| {
            let one = client(&core.router, f);
            core.subscribe(one, f, 2)
        };
        let links = filters.map(&mut place);
        let who = client(&core.router, "a");
        for filter in filters {
            subscribe_handling(&core.router, who, filter, 2);
        }
        // The first is senior; the other is the first one on another link.
        let other = links.iter().position(|l| *l != links[0]).expect("both");
        Self {
            core,
            who,
            senior: links[0],
            junior: links[other],
            junior_number: FilterId::from_index(other),
        }
    }

    /// A message comes by the junior; what the client gets.
    fn by_junior(&mut self, payload: &str) -> String {
        let (junior, number) = (self.junior, self.junior_number);
        self.core.brings(junior, number, payload, false);
        self.core.got(self.who)
    }

    fn by_senior(&mut self, payload: &str) -> String {
        self.core.brings(self.senior, FilterId(0), payload, false);
        self.core.got(self.who)
    }
}

/// A message that comes by one while the link of the other is away is kept back for the other's only
/// while the core is sure to have that.
#[test]
fn a_copy_is_not_dropped_for_a_filter_that_the_core_may_have_forgotten() {
    for lost in [false, true] {
        let mut two = Overlapping::new();
        two.core.falls(two.senior);
        two.core.falls(two.junior);
        two.core.rises(two.junior, !lost);
        let got = if lost { "1" } else { "" };
        assert_eq!(two.by_junior("1"), got, "lost: {lost}");
        // As it had its session all the time, the doubt is over.
        two.core.rises(two.senior, true);
        assert_eq!(two.by_junior("2"), "");
        assert_eq!(two.by_senior("2"), "2");
    }
}

/// A link that seems to be there may be dead: its loss soon after counts as well.
#[test]
fn the_doubt_reaches_a_link_that_is_found_dead_later() {
    let mut two = Overlapping::new();
    two.core.falls(two.junior);
    two.core.rises(two.junior, false);
    assert_eq!(two.by_junior("1"), "", "the senior's link is there");
    two.core.falls(two.senior);
    assert_eq!(two.by_junior("2"), "2");
}

/// What a core that forgot all holds again is known from then on, even if the link flaps meanwhile.
#[test]
fn a_flap_before_the_answer_makes_nothing_known_new() {
    let mut core = Core::new(1);
    let who = client(&core.router, "a");
    core.subscribe(who, "t", 0);
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "1");
    core.answers(0);
    core.router.fetch_ended(&[number], true, 0);
    assert_eq!(core.got(who), "1");
    core.falls(0);
    let link = &mut core.links[0];
    link.connected(&up(false, 100), 0, &mut Vec::new());
    core.falls(0);
    core.rises(0, true);
    let (number, _) = core.router.next_fetches(1)[0].clone();
    core.fetched(number, "1");
    core.answers(0);
    core.router.fetch_ended(&[number], true, 0);
    assert_eq!(core.got(who), "", "it knows that one");
}

/// A group gets no retained messages, and a fetch for it would be a member of it.
#[test]
fn a_lost_group_is_not_fetched() {
    let mut core = Core::new(1);
    let shared = core.router.shared_link(0);
    let link = DataLink::new(core.router.clone(), shared, 1, PROBES.into(), &Memory);
    core.links.push(link);
    core.rises(1, false);
    let who = client(&core.router, "a");
    core.subscribe(who, "$share/g/t", 0);
    core.falls(1);
    core.rises(1, false);
    assert!(core.router.data_settled());
    assert!(core.router.next_fetches(1).is_empty());
}

/// What was about to leave the core is not subscribed again when all begins anew.
#[test]
fn a_filter_that_nobody_holds_is_not_revived_by_other_facts() {
    let mut core = Core::new(1);
    let who = client(&core.router, "a");
    core.subscribe(who, "t", 2);
    core.falls(0);
    let name = "t".to_owned();
    let number = 0;
    let left = [crate::session::Unsubscribed {
        filter: FilterId(number),
        name: name.as_str().into(),
        no_local: false,
        primary_over: Vec::new(),
    }];
    core.router.with(who.session, who.connection_no, |s, _| {
        s.remove_subscription(FilterId(number))
    });
    core.router.unsubscribe(who.session, &left, 0);
    core.router.tick(600_001);
    let other = crate::router::BrokerFeatures {
        identifiers: false,
        ..facts()
    };
    assert!(core.router.set_broker_features(&other, 600_001));
    let mut out = Vec::new();
    core.links[0].connected(&up(false, 100), 600_001, &mut out);
    assert!(read(&mut out).is_empty());
}

/// Filters are subscribed with what is known of the core.
#[test]
fn another_word_on_retain_begins_all_links_anew() {
    let mut core = Core::new(1);
    let who = client(&core.router, "a");
    core.subscribe(who, "t", 2);
    let other = crate::router::BrokerFeatures {
        keeps_retain: false,
        ..facts()
    };
    assert!(!core.router.set_broker_features(&facts(), 0));
    assert!(core.router.set_broker_features(&other, 0));
    assert!(!core.router.set_broker_features(&other, 0));
    core.falls(0);
    let mut out = Vec::new();
    core.links[0].connected(&up(false, 100), 0, &mut out);
    assert_eq!(read(&mut out).len(), 1);
}
