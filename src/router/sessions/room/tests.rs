use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::mqtt::{QoS, ReasonCode};
use crate::router::account::Full;
use crate::router::{Connected, LinkSession, Router, RouterConfig, testing};
use crate::session::Will;

/// `session.evict_after` of these tests.
const AFTER: Duration = Duration::from_secs(60);

/// A router whose account of sessions has so many bytes.
fn router(sessions: u64) -> Arc<Router> {
    let config = RouterConfig {
        sessions,
        evict_after: Some(AFTER),
        ..testing::config()
    };
    let router = testing::router_of(config);
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
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

#[test]
fn a_tick_ends_sessions_until_nine_tenths_are_used_and_no_more_than_its_share_of_them() {
    let router = router(8 << 20);
    let count = fill(&router, Client::anonymous, 0);
    assert!(count > 3 * 256, "{count}");
    // Clients that stay fill the last tenth with filters that all of them have.
    let mut subscribed = 0;
    for n in 0..count {
        let client = Client::anonymous(n);
        if router.session_bytes() > (8 << 20) - 8192 {
            break;
        }
        let client = client
            .connect(&router, 100_000)
            .expect("its session is there");
        for m in 0..20 {
            testing::subscribe(&router, client, &format!("t/{m}"));
            for wanted in router.next_subscribes(0, 100) {
                router.suback(wanted.filter, ReasonCode(1), Millis::ZERO);
            }
            let _ = router.take_output(
                client.session,
                client.connection_no,
                &mut Vec::new(),
                Millis::new(100_000),
            );
        }
        subscribed += 1;
    }
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
    // The first session is remembered while its will waits for the broker, so that a second one ends, too.
    let later = AFTER.as_millis() as u64 + 1;
    Client::anonymous(50_000)
        .connect(&router, later)
        .expect("two end for it");
    assert!(published(&router) && !first.exists(&router));
    assert!(!Client::anonymous(0).exists(&router) && Client::anonymous(1).exists(&router));
}

/// What a client of the property does.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It connects, with a will of this delay.
    Connect {
        expiry: u32,
        clean_start: bool,
        will_delay: Option<u32>,
    },
    Lose {
        normal: bool,
    },
    Subscribe(u8),
    /// An operator ends its session.
    End,
    Wait(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let expiry = prop::sample::select(vec![0, 5, 100, u32::MAX]);
    let will_delay = prop::sample::select(vec![None, None, Some(0), Some(10), Some(3000)]);
    let connect = (expiry, any::<bool>(), will_delay);
    prop_oneof![
        6 => connect.prop_map(|(expiry, clean_start, will_delay)| Step::Connect {
            expiry,
            clean_start,
            will_delay,
        }),
        3 => any::<bool>().prop_map(|normal| Step::Lose { normal }),
        3 => any::<u8>().prop_map(Step::Subscribe),
        1 => Just(Step::End),
        2 => (1..70_000u64).prop_map(Step::Wait),
    ]
}

proptest! {
    /// However sessions begin and end, the order of the detached ones is complete, and nothing is
    /// charged in the end.
    #[test]
    fn every_session_gives_back_its_bytes(
        steps in prop::collection::vec((0..24usize, any_step()), 1..120),
    ) {
        let router = router(12 * 1024);
        let mut connected: BTreeMap<usize, Connected> = BTreeMap::new();
        let mut now = 1;
        for (n, step) in steps {
            let client = Client::anonymous(n);
            match step {
                Step::Connect { expiry, clean_start, will_delay } => {
                    let message = testing::numbered(7, QoS::AtLeastOnce);
                    let will = will_delay.map(|delay| Will::new(message, delay, None));
                    let request = testing::request_from(&client.name, None, &client.address, will);
                    let request = Connect { expiry, clean_start, ..request };
                    if let Ok(client) = router.connect(request, Millis::new(now), |_, _| {}) {
                        connected.insert(n, client);
                    }
                }
                Step::Lose { normal } => {
                    if let Some(c) = connected.remove(&n) {
                        router.disconnected(c.session, c.connection_no, normal, Millis::new(now));
                    }
                }
                Step::Subscribe(filter) => {
                    if let Some(c) = connected.get(&n) {
                        testing::subscribe(&router, *c, &format!("t/{}", filter % 8));
                    }
                }
                Step::End => {
                    router.end_session(&client.name.as_str().into(), Millis::new(now));
                    connected.remove(&n);
                }
                Step::Wait(ms) => {
                    now += ms;
                    router.tick(Millis::new(now));
                }
            }
            let listed: usize = router.sessions.shards()
                .map(|shard| router.sessions.shard(shard).absences.longest(Duration::ZERO, Millis::MAX).count())
                .sum();
            prop_assert_eq!(listed, router.totals().detached);
        }
        for (_, c) in connected {
            router.disconnected(c.session, c.connection_no, true, Millis::new(now));
        }
        for n in 0..24 {
            router.end_session(&Client::anonymous(n).name.as_str().into(), Millis::new(now));
        }
        // Ended sessions are remembered for a while, and filters linger.
        for _ in 0..30 {
            now += 200_000;
            // The broker gets the wills.
            while router.publish_queues(0, |queues| queues.pop()).is_some() {}
            router.tick(Millis::new(now));
            for wanted in router.next_subscribes(0, 100) {
                router.suback(wanted.filter, ReasonCode(1), Millis::new(now));
            }
            for gone in router.next_unsubscribes(0, 100) {
                router.unsuback(gone.0, Millis::new(now));
            }
        }
        prop_assert_eq!((router.filters_known(), router.session_bytes()), (0, 0));
    }
}
