use std::sync::Arc;

use super::*;
use crate::mqtt::{QoS, ReasonCode};
use crate::router::account::Full;
use crate::router::{Connected, LinkSession, Router, RouterConfig, testing};
use crate::session::Will;

mod property;

/// `session.evict_after` of these tests.
const AFTER: Duration = Duration::from_secs(60);

/// A router whose account of sessions has so many bytes.
fn router(sessions: u64) -> Arc<Router> {
    router_of(config(sessions))
}

fn config(sessions: u64) -> RouterConfig {
    RouterConfig {
        sessions,
        evict_after: Some(AFTER),
        ..testing::config()
    }
}

fn router_of(config: RouterConfig) -> Arc<Router> {
    started(testing::router_of(config))
}

fn started(router: Arc<Router>) -> Arc<Router> {
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// A router whose publish links can grow from two to eight.
fn router_of_links(sessions: u64) -> Arc<Router> {
    router_of(RouterConfig {
        publish_links: 2,
        publish_links_max: 8,
        ..config(sessions)
    })
}

/// The publish links become eight, so that the next sessions of most clients begin on other links.
fn grow(router: &Router) {
    let now = Millis::ZERO;
    for link in 0..2 {
        router.publish_link_up(link, true, now);
    }
    for link in 2..8 {
        assert!(router.add_publish_link());
        router.publish_link_up(link, true, now);
        for older in 0..link {
            assert!(router.publish_ping_due(older, now));
            router.publish_ping_answered(older);
        }
    }
}

/// New clients connect, until one is refused. Returns their number, and how many sessions ended.
fn connect_until_refused(router: &Router, first: usize, now: u64) -> (usize, usize) {
    let before = router.totals().detached;
    let connects = |n: &usize| Client::anonymous(first + n).connect(router, now).is_err();
    let connected = (0..1000).find(connects).expect("the account is bounded");
    (connected, before - router.totals().detached)
}

/// A client whose session is kept. Anonymous clients have a network each, others have one together.
struct Client {
    name: String,
    principal: Option<&'static str>,
    address: String,
}

impl Client {
    fn anonymous(n: usize) -> Self {
        Self {
            name: format!("c{n:06}"),
            principal: None,
            address: format!("198.18.{}.{}", n / 256, n % 256),
        }
    }

    fn of(principal: &'static str, n: usize) -> Self {
        Self {
            name: format!("{principal}{n:06}"),
            principal: Some(principal),
            ..Self::anonymous(n)
        }
    }

    fn connect(&self, router: &Router, now: u64) -> Result<Connected, Refused> {
        self.connect_with(router, None, now)
    }

    fn connect_with(
        &self,
        router: &Router,
        will: Option<Will>,
        now: u64,
    ) -> Result<Connected, Refused> {
        let connect = testing::request_from(&self.name, self.principal, &self.address, will);
        router.connect(connect, Millis::new(now), |_, _| {})
    }

    /// Connects and goes away in the same millisecond.
    fn visit(&self, router: &Router, now: u64) -> Result<(), Refused> {
        let client = self.connect(router, now)?;
        leave(router, client, now);
        Ok(())
    }

    fn exists(&self, router: &Router) -> bool {
        router.session(&self.name.as_str().into()).is_some()
    }
}

fn leave(router: &Router, client: Connected, now: u64) {
    router.disconnected(
        client.session,
        client.connection_no,
        false,
        Millis::new(now),
    );
}

/// One client after the other connects and goes away, one in each millisecond from `from` on, until one
/// is refused. Returns their number.
fn fill(router: &Router, client: impl Fn(usize) -> Client, from: u64) -> usize {
    (0..100_000)
        .find(|n| client(*n).visit(router, from + *n as u64).is_err())
        .expect("the account is bounded")
}

#[test]
fn the_least_recently_connected_session_ends_for_a_new_one() {
    let router = router(1 << 18);
    let count = fill(&router, Client::anonymous, 1);
    // The first client was here again, and the third one still is.
    Client::anonymous(0)
        .visit(&router, 30_000)
        .expect("its session is there");
    Client::anonymous(2)
        .connect(&router, 30_000)
        .expect("its session is there");
    let new = |n: usize| Client::anonymous(count + n);
    // Nobody has been away for longer than that.
    assert_eq!(
        new(0).connect(&router, 60_000).map(|_| ()),
        Err(Refused::NotKept(Full::All))
    );
    assert_eq!(router.totals().detached, count - 1);
    new(0)
        .connect(&router, 60_002)
        .expect("the second session ends");
    new(1)
        .connect(&router, 60_004)
        .expect("the fourth session ends");
    let gone: Vec<usize> = (0..count)
        .filter(|n| !Client::anonymous(*n).exists(&router))
        .collect();
    assert_eq!(gone, [1, 3]);
    let refused = new(2).connect(&router, 60_004).map(|_| ());
    assert_eq!(refused, Err(Refused::NotKept(Full::All)));
}

#[test]
fn clients_that_are_connected_keep_their_sessions() {
    let router = router(1 << 18);
    let connected = (0..10_000).find(|n| Client::anonymous(*n).connect(&router, 1).is_err());
    let count = connected.expect("the account is bounded");
    let later = 1 + 10 * AFTER.as_millis() as u64;
    for n in 0..50 {
        let refused = Client::anonymous(count + n).connect(&router, later);
        assert!(refused.is_err());
    }
    for _ in 0..5 {
        router.tick(Millis::new(later));
    }
    assert_eq!(router.totals().attached, count);
}

#[test]
fn a_client_whose_share_is_used_up_ends_a_session_of_its_share_only() {
    let router = router(1 << 18);
    // The other principal's session is older.
    Client::of("bob", 0)
        .visit(&router, 0)
        .expect("there is room");
    let alice = |n| Client::of("alice", n);
    let count = fill(&router, alice, 1);
    let refused = alice(count).connect(&router, 1000).map(|_| ());
    assert_eq!(refused, Err(Refused::NotKept(Full::Principal)));
    let later = 1000 + AFTER.as_millis() as u64;
    alice(count)
        .connect(&router, later)
        .expect("one ends for it");
    assert!(Client::of("bob", 0).exists(&router));
    assert!(!alice(0).exists(&router) && alice(1).exists(&router));
}

/// The share of a principal that floods the table is an eighth, so others lose no more than that.
#[test]
fn one_principal_ends_few_sessions_of_others() {
    let router = router(1 << 20);
    let others = fill(&router, Client::anonymous, 1);
    let later = 2 * AFTER.as_millis() as u64;
    for n in 0..2 * others {
        let _ = Client::of("mallory", n).visit(&router, later + n as u64 / 100);
    }
    let remaining = (0..others).filter(|n| Client::anonymous(*n).exists(&router));
    let remaining = remaining.count();
    assert!(
        remaining * 100 > others * 85,
        "{remaining} of {others} remain"
    );
}

/// Of `count` clients some come back and stay, and fill the last tenth of the account of `size` bytes with
/// filters that all of them have. Returns their number.
fn fill_last_tenth(router: &Router, count: usize, size: u64) -> usize {
    let now = 100_000;
    for n in 0..count {
        if router.session_bytes() > size - 8192 {
            return n;
        }
        let client = Client::anonymous(n).connect(router, now);
        let client = client.expect("its session is there");
        for m in 0..20 {
            testing::subscribe(router, client, &format!("t/{m}"));
            for wanted in router.next_subscribes(0, 100) {
                router.suback(wanted.filter, ReasonCode(1), Millis::ZERO);
            }
            let (session, number) = (client.session, client.connection_no);
            let _ = router.take_output(session, number, &mut Vec::new(), Millis::new(now));
        }
    }
    panic!("all clients together have too few filters");
}

#[test]
fn a_tick_ends_sessions_until_nine_tenths_are_used_and_no_more_than_its_share_of_them() {
    let router = router(8 << 20);
    let count = fill(&router, Client::anonymous, 0);
    assert!(count > 3 * 256, "{count}");
    let subscribed = fill_last_tenth(&router, count, 8 << 20);
    let most = (8 << 20) / 10 * 9;
    assert!(router.session_bytes() > most + 256 * 1000, "{subscribed}");
    router.tick(Millis::new(100_000));
    let detached = count - subscribed;
    assert_eq!(router.totals().detached, detached - 256);
    for _ in 0..100 {
        router.tick(Millis::new(100_000));
    }
    let used = router.session_bytes();
    assert!(used <= most && used > most - 2000, "{used} of {most}");
    assert_eq!(router.totals().attached, subscribed);
}

#[test]
fn the_will_of_a_session_that_ends_is_published() {
    let router = router(1 << 18);
    let message = testing::numbered(7, QoS::AtLeastOnce);
    let first = Client::anonymous(60_000);
    let will = Some(Will::new(message, 100_000, None));
    let client = first.connect_with(&router, will, 0).expect("there is room");
    leave(&router, client, 0);
    fill(&router, Client::anonymous, 1);
    let published = |router: &Router| router.publish_queues(0, |queues| queues.pop()).is_some();
    assert!(!published(&router));
    // The first session is remembered while its will waits for the broker, and no second one ends.
    let later = AFTER.as_millis() as u64 + 1;
    Client::anonymous(50_000)
        .connect(&router, later)
        .expect("one ends for it");
    assert!(published(&router) && !first.exists(&router));
    assert!(Client::anonymous(0).exists(&router));
}

#[test]
fn where_publish_links_have_grown_a_connect_ends_one_session_that_was_away_for_long() {
    let router = router_of_links(1 << 18);
    let count = fill(&router, Client::anonymous, 1);
    grow(&router);
    for n in 0..10 {
        let new = Client::anonymous(count + n).connect(&router, 200_000);
        new.expect("one session ends for it");
        assert_eq!(router.totals().detached, count - 1 - n);
    }
}

#[test]
fn sessions_that_end_and_are_remembered_are_enough_for_the_ticks_that_follow() {
    let router = router_of_links(8 << 20);
    let count = fill(&router, Client::anonymous, 0);
    let subscribed = fill_last_tenth(&router, count, 8 << 20);
    grow(&router);
    let most = (8 << 20) / 10 * 9;
    let surplus = (router.session_bytes() - most) as usize;
    let session = 500;
    for _ in 0..20 {
        router.tick(Millis::new(100_000));
    }
    let ended = count - subscribed - router.totals().detached;
    assert!(
        ended > 256 && ended < surplus / session,
        "{ended} for {surplus} bytes"
    );
    assert!(router.session_bytes() > most, "most of them are remembered");
    for later in [221_000, 222_000] {
        router.tick(Millis::new(later));
    }
    let used = router.session_bytes();
    assert!(used <= most && used > most - 2000, "{used} of {most}");
}

/// Publishes of these clients may be under way, so their sessions are remembered.
#[test]
fn sessions_that_end_and_are_remembered_end_for_one_connect_each() {
    let router = router_of_links(1 << 18);
    let count = fill(&router, Client::anonymous, 1);
    grow(&router);
    let now = 1000 + AFTER.as_millis() as u64;
    let (connected, ended) = connect_until_refused(&router, count, now);
    assert!(
        connected > 10 && ended <= connected + 1,
        "{connected} connected, {ended} ended"
    );
    let used = router.session_bytes();
    assert!(
        used <= (1 << 18) / 20 * 19,
        "half of the last tenth is free"
    );
    // The rest of the room is on its way.
    for _ in 0..50 {
        let before = router.totals().detached;
        assert!(Client::anonymous(60_000).connect(&router, now).is_err());
        router.tick(Millis::new(now));
        assert_eq!(router.totals().detached, before);
    }
    // Nothing of it is lost.
    for later in [121_000, 122_000] {
        router.tick(Millis::new(now + later));
    }
    assert!(router.session_bytes() < used - 10 * 600);
    assert!(router.account.bytes.comes_back(0, 0));
}

#[test]
fn sessions_whose_wills_wait_for_the_broker_end_for_one_connect_each() {
    let router = router(1 << 18);
    let will = || {
        Some(Will::new(
            testing::numbered(7, QoS::AtLeastOnce),
            100_000,
            None,
        ))
    };
    let mut count = 0;
    while let Ok(client) = Client::anonymous(count).connect_with(&router, will(), 1) {
        leave(&router, client, 1);
        count += 1;
    }
    let later = 200_000;
    let (connected, ended) = connect_until_refused(&router, count, later);
    assert!(
        connected > 5 && ended <= connected + 1,
        "{connected} connected, {ended} ended"
    );
    let before = router.totals().detached;
    assert!(Client::anonymous(60_000).connect(&router, later).is_err());
    assert_eq!(router.totals().detached, before);
    let mut wills = 0;
    while router.publish_queues(0, |queues| queues.pop()).is_some() {
        wills += 1;
    }
    assert_eq!(wills, ended);
}

#[test]
fn the_grace_of_a_will_is_over_for_a_client_that_was_away_for_longer() {
    let router = started(testing::router_limited(config(1 << 18), |limits| {
        limits.will_grace = Duration::from_secs(10);
    }));
    let will = Will::new(testing::numbered(7, QoS::AtLeastOnce), 100_000, None);
    let client = Client::anonymous(0);
    let connected = client.connect_with(&router, Some(will), 1);
    leave(&router, connected.expect("there is room"), 1);
    let soon = || {
        Some(Will::new(
            testing::numbered(8, QoS::AtLeastOnce),
            100_000,
            None,
        ))
    };
    let other = Client::anonymous(1);
    let connected = other.connect_with(&router, soon(), 50_000);
    leave(&router, connected.expect("there is room"), 50_000);
    let wills = || {
        let popped = std::iter::from_fn(|| router.publish_queues(0, |queues| queues.pop()));
        popped.count()
    };
    for client in [&client, &other] {
        router.end_session(&client.name.as_str().into(), Millis::new(55_000));
    }
    assert_eq!(wills(), 1);
    // The other client could still be back.
    router.tick(Millis::new(59_999));
    assert_eq!(wills(), 0);
    router.tick(Millis::new(60_001));
    assert_eq!(wills(), 1);
}

/// The end of others' sessions is of no use to it.
#[test]
fn a_principal_that_has_used_up_its_share_ends_its_own_session_in_a_full_account() {
    let router = router(1 << 18);
    let alice = |n| Client::of("alice", n);
    // The oldest sessions are those of others, who use more than half.
    let mut others = 0;
    while router.session_bytes() < (1 << 18) * 6 / 10 {
        Client::anonymous(others)
            .visit(&router, 1)
            .expect("there is room");
        others += 1;
    }
    let own = fill(&router, alice, 10);
    let more = fill(&router, |n| Client::anonymous(others + n), 2000);
    let later = 10_000 + AFTER.as_millis() as u64;
    alice(own).connect(&router, later).expect("one ends for it");
    let remain = (0..others + more).filter(|n| Client::anonymous(*n).exists(&router));
    assert_eq!(remain.count(), others + more);
    assert!(!alice(0).exists(&router) && alice(1).exists(&router));
}

#[test]
fn a_session_whose_client_comes_back_meanwhile_is_passed_over() {
    let router = router(1 << 18);
    for n in 0..3 {
        Client::anonymous(n)
            .visit(&router, n as u64)
            .expect("there is room");
    }
    let later = Millis::new(1000) + AFTER;
    let candidates = router.sessions.absent_longest(AFTER, |_| true, later);
    assert_eq!(candidates.len(), 3);
    Client::anonymous(0)
        .connect(&router, later.as_u64())
        .expect("its session is there");
    let ended = router.sessions.end_first(candidates, later);
    assert_eq!(ended.map(|e| e.key), Some("c000001".into()));
    assert_eq!(router.totals().detached, 1);
}

/// These filters go at once, as the account is used beyond seven eighths.
#[test]
fn no_session_ends_while_filters_that_nobody_uses_make_room() {
    let router = router(1 << 18);
    let filters = Client::anonymous(60_000);
    let client = filters.connect(&router, 0).expect("there is room");
    for n in 0..50 {
        testing::subscribe(&router, client, &format!("t/{n}"));
        for wanted in router.next_subscribes(0, 100) {
            router.suback(wanted.filter, ReasonCode(1), Millis::ZERO);
        }
    }
    router.end_session(&filters.name.as_str().into(), Millis::new(1));
    let count = fill(&router, Client::anonymous, 1);
    let later = 2000 + AFTER.as_millis() as u64;
    assert!(Client::anonymous(count).connect(&router, later).is_err());
    assert_eq!(router.totals().detached, count);
    for _ in 0..10 {
        router.tick(Millis::new(later));
        for gone in router.next_unsubscribes(0, 100) {
            router.unsuback(gone.0, Millis::new(later));
        }
    }
    Client::anonymous(count)
        .connect(&router, later)
        .expect("the filters are gone");
    assert_eq!(router.totals().detached, count);
}
