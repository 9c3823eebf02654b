//! However sessions begin and end, every one gives back its bytes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What a client of the property does.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It connects, with a will of this delay.
    Connect {
        principal: Option<&'static str>,
        network: u8,
        expiry: u32,
        clean_start: bool,
        will_delay: Option<u32>,
    },
    /// Its connection ends. A DISCONNECT may change the expiry.
    Lose {
        normal: bool,
        expiry: Option<u32>,
    },
    Subscribe(u8),
    Publish,
    /// An operator ends its session.
    End,
    /// There is another publish link, or there are eight already.
    Grow,
    /// The broker takes the publishes of a publish link.
    Take(usize),
    Wait(u64),
}

fn any_expiry() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![0, 5, 100, u32::MAX])
}

fn any_step() -> impl Strategy<Value = Step> {
    let will_delay = prop::sample::select(vec![None, None, Some(0), Some(10), Some(3000)]);
    let principal = prop::sample::select(vec![None, None, Some("alice"), Some("bob")]);
    let connect = (principal, 0..6u8, any_expiry(), any::<bool>(), will_delay);
    let lose = (any::<bool>(), prop::option::of(any_expiry()));
    prop_oneof![
        12 => connect.prop_map(|(principal, network, expiry, clean_start, will_delay)| Step::Connect {
            principal,
            network,
            expiry,
            clean_start,
            will_delay,
        }),
        6 => lose.prop_map(|(normal, expiry)| Step::Lose { normal, expiry }),
        6 => any::<u8>().prop_map(Step::Subscribe),
        2 => Just(Step::Publish),
        2 => Just(Step::End),
        1 => Just(Step::Grow),
        1 => (0..8usize).prop_map(Step::Take),
        4 => (1..70_000u64).prop_map(Step::Wait),
    ]
}

/// A router with the clients of the property.
struct Fleet {
    router: Arc<Router>,
    connected: BTreeMap<usize, Connected>,
    now: u64,
}

impl Fleet {
    fn new(will_grace: Duration) -> Self {
        let config = RouterConfig {
            publish_links: 2,
            publish_links_max: 8,
            ..config(12 * 1024)
        };
        let router = testing::router_limited(config, |limits| limits.will_grace = will_grace);
        for link in 0..2 {
            router.publish_link_up(link, true, Millis::ZERO);
        }
        Self {
            router: started(router),
            connected: BTreeMap::new(),
            now: 1,
        }
    }

    fn step(&mut self, n: usize, step: Step) {
        let (router, now) = (&self.router, Millis::new(self.now));
        let name = format!("c{n:06}");
        match step {
            Step::Connect {
                principal,
                network,
                expiry,
                clean_start,
                will_delay,
            } => {
                let message = testing::numbered(7, QoS::AtLeastOnce);
                let will = will_delay.map(|delay| Will::new(message, delay, None));
                let address = format!("198.18.0.{network}");
                let request = testing::request_from(&name, principal, &address, will);
                let request = Connect {
                    expiry,
                    clean_start,
                    ..request
                };
                if let Ok(client) = router.connect(request, now, |_, _| {}) {
                    self.connected.insert(n, client);
                }
            }
            Step::Lose { normal, expiry } => {
                if let Some(c) = self.connected.remove(&n) {
                    router.with(c.session, c.connection_no, |session, _| {
                        // One that is 0 stays [MQTT-3.14.2-2].
                        let changed = expiry.filter(|_| normal && session.expiry > 0);
                        session.expiry = changed.unwrap_or(session.expiry);
                    });
                    router.disconnected(c.session, c.connection_no, normal, now);
                }
            }
            Step::Subscribe(filter) => {
                if let Some(c) = self.connected.get(&n) {
                    testing::subscribe(router, *c, &format!("t/{}", filter % 8));
                }
            }
            Step::Publish => {
                if let Some(c) = self.connected.get(&n) {
                    testing::publish(router, *c, 1);
                }
            }
            Step::End => {
                router.end_session(&name.as_str().into(), now);
                self.connected.remove(&n);
            }
            Step::Grow => {
                if router.add_publish_link() {
                    let added = router.publish_links_wanted() - 1;
                    router.publish_link_up(added, true, now);
                    for older in 0..added {
                        router.publish_ping_due(older, now);
                        router.publish_ping_answered(older);
                    }
                }
            }
            Step::Take(link) => while router.publish_queues(link, |q| q.pop()).is_some() {},
            Step::Wait(ms) => {
                self.now += ms;
                router.tick(Millis::new(self.now));
            }
        }
    }

    /// All sessions end, and the broker takes and answers everything.
    fn end(&mut self) {
        for n in 0..24 {
            let (normal, expiry) = (true, None);
            self.step(n, Step::Lose { normal, expiry });
            self.step(n, Step::End);
        }
        // Ended sessions are remembered for a while, and filters linger.
        for _ in 0..30 {
            for link in 0..8 {
                self.step(0, Step::Take(link));
            }
            self.step(0, Step::Wait(200_000));
            let now = Millis::new(self.now);
            for wanted in self.router.next_subscribes(0, 100) {
                self.router.suback(wanted.filter, ReasonCode(1), now);
            }
            for gone in self.router.next_unsubscribes(0, 100) {
                self.router.unsuback(gone.0, now);
            }
        }
    }
}

proptest! {
    /// However sessions begin and end, the order of the detached ones is complete, and nothing is
    /// charged in the end.
    #[test]
    fn every_session_gives_back_its_bytes(
        will_grace in prop::sample::select(vec![0, 10]),
        steps in prop::collection::vec((0..24usize, any_step()), 1..160),
    ) {
        let mut fleet = Fleet::new(Duration::from_secs(will_grace));
        for (n, step) in steps {
            fleet.step(n, step);
            let router = &fleet.router;
            let listed: usize = router.sessions.shards()
                .map(|shard| router.sessions.shard(shard).absences.longest(Duration::ZERO, Millis::MAX).count())
                .sum();
            prop_assert_eq!(listed, router.totals().detached);
        }
        fleet.end();
        prop_assert_eq!((fleet.router.filters_known(), fleet.router.session_bytes()), (0, 0));
        prop_assert!(fleet.router.account.bytes.is_empty());
    }
}
