//! Sets up a run: its limits, its devices, how its broker behaves.

use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tidegate::budget::Account;
use tidegate::hashing::HashSeed;
use tidegate::mqtt::{QoS, Version};
use tidegate::router::{BrokerFeatures, Router, RouterConfig};
use tidegate::session::{QueueFull, SLEEP_AFTER, SessionLimits};
use tidegate::store::Memory;

use crate::actions::{DISJOINT, FILTERS};
use crate::broker::{Broker, Copies};
use crate::device::{Device, Profile};
use crate::oracle::{Oracle, Rules};
use crate::world::World;
use tidegate::time::{Millis, UnixMillis};
use tidegate_kit::rng::Rng;

/// The router's shards of sessions.
const SHARDS: u64 = 32;

impl World {
    /// Sets up the world of a seed. Keep the order of the random draws, so that old seeds replay
    /// the same run.
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let copies = rng.pick(&[
            Copies::PerFilter,
            Copies::PerFilter,
            Copies::One,
            Copies::Unnamed,
        ]);
        let small = rng.chance(25);
        let evicts = rng.chance(10);
        let queue_full = match rng.below(8) {
            0 => QueueFull::Newest,
            1 => QueueFull::EndSession,
            _ => QueueFull::Oldest,
        };
        let mut limits = session_limits(small, queue_full, &mut rng);
        let mut config = router_config(evicts, &mut rng);
        if seed % 8 == 5 {
            // There is less room for output than the clients leave unread.
            config.output = 300;
        }
        let (publish_links, publish_links_max) = (config.publish_links, config.publish_links_max);
        let devices = rng.between(2, 5) as usize;
        let mut profiles: Vec<Profile> = (0..devices).map(|n| profile(n, &mut rng)).collect();
        // Drawn apart, so that seeds from before it stay as they are.
        let mut apart = Rng::new(seed ^ 0x5EED);
        for profile in &mut profiles {
            profile.miscounts = apart.chance(30);
        }
        let audience = Audience::new(seed);
        if audience.together {
            name_together(&mut profiles, limits.hash_seed);
        }
        limits.sleep_after = audience.sleep_after;
        let grants = rng.pick(&[
            QoS::ExactlyOnce,
            QoS::ExactlyOnce,
            QoS::ExactlyOnce,
            QoS::AtLeastOnce,
        ]);
        let rules = Rules {
            grants,
            hold: config.subscribe_wait,
            expiry_max: limits.expiry_max,
            expiry_v3: 120,
            evicts,
            roomy: !small && !evicts && limits.queue_bytes_max >= 1 << 20,
            ends_full: queue_full == QueueFull::EndSession,
            nests: copies == Copies::Unnamed,
        };
        let expiry_max = limits.expiry_max;
        let tight =
            config.publishes_waiting < 1 << 20 || config.publishes_waiting_per_client < 1 << 20;
        let router = connected_router(limits, config, copies);
        if trace {
            eprintln!("{rules:?}\n{:?}", router.limits());
            for p in &profiles {
                eprintln!("{p:?}");
            }
        }
        let window = rng.pick(&[1, 5, 50]);
        let retained = rng.chance(60);
        let mut oracle = Oracle::new(rules, &profiles);
        oracle.inbound.tight = tight;
        oracle.trace = trace;
        Self {
            broker: Broker::new(copies, grants, window, publish_links_max),
            oracle,
            sequence: vec![0; devices],
            devices: profiles.into_iter().map(Device::new).collect(),
            rng,
            now: Millis::new(1000),
            router,
            links: BTreeMap::new(),
            fetches: VecDeque::new(),
            next_link: 0,
            events: 0,
            broker_back_at: Millis::ZERO,
            trace,
            quiet: false,
            retained,
            expiry_max,
            forwarded: 0,
            ticked: Millis::ZERO,
            publish_links,
            relinked_at: Millis::ZERO,
            kept: true,
            filters: audience.filters,
            together: audience.together,
            away_until: Millis::ZERO,
            asleep: 0,
        }
    }
}

/// The conditions under which sessions that are away sleep together. They are drawn apart, so that seeds from
/// before them stay as they are.
struct Audience {
    sleep_after: Duration,
    /// All sessions are in one shard: those of different ones have nothing in common.
    together: bool,
    /// The filters that devices subscribe to. Overlapping subscriptions do not sleep.
    filters: &'static [&'static str],
}

impl Audience {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x000A_51EE);
        Self {
            sleep_after: rng.pick(&[0, 100, 2000].map(Duration::from_millis)),
            together: rng.chance(70),
            filters: match rng.chance(50) {
                true => &DISJOINT,
                false => &FILTERS,
            },
        }
    }
}

/// Gives devices client identifiers whose sessions are in one shard.
fn name_together(profiles: &mut [Profile], seed: HashSeed) {
    let names = (0..).map(|n| format!("device-{n}"));
    let mut names = names.filter(|id| seed.hash_one(id.as_str()).is_multiple_of(SHARDS));
    for (profile, name) in profiles.iter_mut().zip(&mut names) {
        profile.id = name;
    }
}

/// The limits of sessions; `small` makes the queues hold few messages.
fn session_limits(small: bool, queue_full: QueueFull, rng: &mut Rng) -> SessionLimits {
    SessionLimits {
        receive_max: rng.pick(&[1, 3, 16]),
        receive_max_hard: 100,
        topic_alias_max: rng.pick(&[0, 2, 8]),
        packet_max: 1 << 20,
        queue_messages_max: if small {
            rng.between(1, 8) as usize
        } else {
            10_000
        },
        queue_bytes_max: if rng.chance(10) { 2000 } else { 1 << 20 },
        queue_age_max: None,
        sleep_after: SLEEP_AFTER,
        shared_redeliver_after: Duration::from_secs(30),
        will_grace: Duration::ZERO,
        presence: false,
        queue_full,
        queue_qos0: rng.chance(40),
        output_buffer: Arc::new(AtomicUsize::new(rng.pick(&[64, 1000, 1 << 16]))),
        subscriptions_max: 100,
        filter_bytes_max: 1 << 16,
        topic_levels_max: 16,
        v3_publishes_max: rng.pick(&[3, 8, 20]),
        expiry_max: 300,
        publish_account: Arc::new(Account::new()),
        reserved_key: "tidegate-sim",
        hash_seed: tidegate::hashing::HashSeed::fixed(),
    }
}

/// The router's own limits; `evicts` makes the budget for queues so small that messages are evicted.
fn router_config(evicts: bool, rng: &mut Rng) -> RouterConfig {
    let publish_links = rng.between(1, 2) as usize;
    let publish_links_max = publish_links + rng.below(3) as usize;
    RouterConfig {
        data_links: 1,
        data_links_max: 1,
        data_link_filters: 2000,
        shared_links: 1,
        shared_links_max: 1,
        roots: Vec::new(),
        local_groups: false,
        publish_links,
        publish_links_max,
        presence_topic: None,
        started_at: UnixMillis::default(),
        linger: rng.pick(&[500, 20_000].map(Duration::from_millis)),
        linger_busy_min: Duration::from_millis(500),
        filters_lingering_max: rng.pick(&[2, 100]) as usize,
        subscribe_wait: Duration::from_secs(10),
        subscribe_accept: true,
        publishes_waiting: rng.pick(&[2000, 1 << 20, 1 << 20]),
        publishes_waiting_per_client: rng.pick(&[1000, 1 << 20, 1 << 20]) as usize,
        retained_cache: rng.pick(&[100, 1 << 20]) as usize,
        retained_resync: false,
        sessions: 1 << 30,
        queues: if evicts { 3000 } else { 1 << 30 },
        output: 1 << 30,
        write_stall: Duration::from_secs(60),
        // Sessions are kept in the order in which they may end; there is room for all.
        evict_after: Some(Duration::from_secs(1)),
    }
}

/// A router whose links to the broker are up.
fn connected_router(limits: SessionLimits, config: RouterConfig, copies: Copies) -> Arc<Router> {
    let publish_links = config.publish_links;
    let router = Arc::new(Router::new(limits, config, &Memory));
    let facts = BrokerFeatures {
        identifiers: copies != Copies::Unnamed,
        properties: true,
        keeps_retain: true,
        shared: true,
        replaces: true,
        maximum_qos: QoS::ExactlyOnce,
        retain_available: true,
        packet_max: None,
    };
    router.set_broker_features(&facts, Millis::ZERO);
    router.data_link_up(0, tidegate::router::LinkSession::New, true, Millis::ZERO);
    for link in 0..publish_links {
        router.publish_link_up(link, true, Millis::ZERO);
    }
    router
}

/// Draws what the device with number `n` is like.
fn profile(n: usize, rng: &mut Rng) -> Profile {
    let version = rng.pick(&[
        Version::V5,
        Version::V5,
        Version::V5,
        Version::V311,
        Version::V31,
    ]);
    let v5 = version == Version::V5;
    let clean = rng.chance(30);
    Profile {
        id: format!("device-{n}"),
        version,
        clean,
        expiry: match clean {
            true => rng.pick(&[0, 0, 10]),
            false => rng.pick(&[5, 60, 300]),
        },
        receive_max: (v5 && rng.chance(60)).then(|| rng.pick(&[1, 2, 5])),
        packet_max: (v5 && rng.chance(20)).then(|| rng.pick(&[60, 138, 200])),
        alias_max: if v5 { rng.pick(&[0, 1, 3, 100]) } else { 0 },
        keep_alive: rng.pick(&[0, 10, 60]),
        stubborn: rng.chance(40),
        counts_anew: rng.chance(50),
        lazy: rng.chance(30),
        miscounts: false,
        streams: if v5 && rng.chance(40) {
            rng.between(1, 3) as u8
        } else {
            0
        },
    }
}
