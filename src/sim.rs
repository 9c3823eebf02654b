//! A simulation of the whole: clients, the router, links of every role, and a core with the faults
//! of real ones, on a virtual clock. Links are lost, the core restarts, clients flap; an oracle that
//! knows only what clients and core were told judges what each client got.
//!
//! `TIDEGATE_SEEDS` many seeds from `TIDEGATE_FIRST_SEED` on; `SEED=7` replays one and tells it.

macro_rules! tell {
    ($world:expr, $($what:tt)*) => {
        if $world.tell {
            eprintln!("{:>7} {}", $world.now, format!($($what)*));
        }
    };
}

mod devices;
mod links;
mod oracle;
mod seen;
pub(crate) mod testing;

use std::sync::Arc;
use std::task::Waker;

use crate::client::End;
use crate::client::machine::Machine as ClientMachine;
use crate::config::Quirk;
use crate::embedded::EmbeddedOptions;
use crate::embedded::stepped::{Ended, SteppedBroker, SteppedConnection};
use crate::mqtt::{
    self, AckKind, Connack, Connect, Decoder, Packet, Properties, Publish, QoS, ReasonCode,
    Receiver, SubscribeOptions, Version, encode_ack, encode_pingreq, encode_subscribe,
    encode_unsubscribe,
};
use crate::router::{LinkSession, Router, RouterConfig};
use crate::sim::testing::{PROBES, admit, config, context, router_of};
use crate::store::Memory;
use crate::time::Millis;
use crate::transport::Closed;

use crate::upstream::link::data::DataLink;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::link::publish::PublishLink;
use crate::upstream::link::retained::RetainedLink;
use crate::upstream::profile::{
    BrokerProfile, Capabilities, Identifiers, Mapping, SharedSubscriptions, Source, WINDOW_PROBED,
};
use devices::Device;
use links::SimLink;
use oracle::Oracle;
use seen::Got;
use tidegate_kit::rng::Rng;

/// A step of the clock, milliseconds.
const STEP: u64 = 10;
const TOPICS: [&str; 6] = ["a", "a/b", "a/c", "b/b", "c", "c/d/e"];
const FILTERS: [&str; 12] = [
    "a",
    "a/b",
    "a/+",
    "+/b",
    "a/#",
    "c/#",
    "#",
    "c",
    "+/+",
    "$share/g/a/#",
    "$share/g/c",
    "$share/h/+/b",
];
const CORES: [&[Quirk]; 12] = [
    &[],
    &[Quirk::One],
    &[Quirk::LowestQos],
    &[Quirk::NoIds],
    &[Quirk::NoIds, Quirk::One],
    &[Quirk::Dup0],
    &[Quirk::SmallWindow],
    &[Quirk::DeadShared],
    &[Quirk::NoRap],
    &[Quirk::V311],
    &[Quirk::V311, Quirk::TwoQueues],
    &[Quirk::LateRetained, Quirk::SmallWindow, Quirk::Dup0],
];
const ROOTS: [&[&str]; 3] = [&[], &["a/#"], &["c/#", "b/#"]];

struct World {
    now: Millis,
    rng: Rng,
    tell: bool,
    router: Arc<Router>,
    core: SteppedBroker,
    core_back_at: Option<(u64, bool)>,
    profile: BrokerProfile,
    links: Vec<SimLink>,
    devices: Vec<Device>,
    oracle: Oracle,
    number: u32,
    /// The core has forgotten a data link's session, not long ago.
    forgot: bool,
    /// Links are lost and the core restarts.
    stormy: bool,
    /// Some publishes make the core close the connection.
    poisonous: bool,
}

impl World {
    fn new(seed: u64, tell: bool) -> Self {
        let mut rng = Rng::new(seed);
        let quirks = rng.pick(&CORES);
        let roots = if rng.chance(30) {
            rng.pick(&ROOTS)
        } else {
            &[]
        };
        let data_links = rng.between(1, 4) as usize;
        let publish_links = rng.between(1, 2) as usize;
        let has = |quirk: Quirk| quirks.contains(&quirk);
        let dead = has(Quirk::DeadShared);
        let local_groups = dead && rng.chance(50);
        let v5 = !has(Quirk::V311);
        let router = router_of(RouterConfig {
            data_links,
            shared_links: 1,
            roots: roots.iter().map(|r| (*r).to_owned()).collect(),
            local_groups,
            publish_links,
            publish_links_max: publish_links,
            linger: 2000,
            linger_busy_min: 500,
            ..config()
        });
        let version = if v5 { Version::V5 } else { Version::V311 };
        let profile = profile_of(version, quirks);
        let mut links: Vec<SimLink> = Vec::new();
        let mut add = |name: String, machine: Box<dyn Machine>| {
            let role = name.as_bytes()[0];
            links.push(SimLink {
                name,
                machine,
                data: matches!(role, b'd' | b's'),
                retained: role == b'r',
                publishes: role == b'p',
                version,
                begun: false,
                unanswered: false,
                redial_at: 0,
                conn: None,
            });
        };
        for n in 0..=data_links {
            let machine = DataLink::new(router.clone(), n, 1, PROBES.into(), &Memory);
            let name = if n < data_links {
                format!("d{n}")
            } else {
                "s0".into()
            };
            add(name, Box::new(machine));
        }
        for n in 0..publish_links {
            let machine = PublishLink::new(router.clone(), n, 1);
            add(format!("p{n}"), Box::new(machine));
        }
        add(
            "r0".into(),
            Box::new(RetainedLink::new(router.clone(), PROBES.into())),
        );
        let stormy = rng.chance(70);
        let poisonous = rng.chance(20);
        let devices = (0..4).map(|n| Device {
            id: format!("device-{n}"),
            version: match rng.chance(25) {
                true => Version::V311,
                false => Version::V5,
            },
            will: None,
            machine: None,
            last_id: 0,
            open: Vec::new(),
            asked: Vec::new(),
        });
        let devices: Vec<Device> = devices.collect();
        if tell {
            eprintln!(
                "{quirks:?} roots {roots:?} {data_links} data links, {publish_links} publish links, local groups {local_groups}, stormy {stormy}, poisonous {poisonous}"
            );
        }
        Self {
            now: 0,
            oracle: Oracle::new(
                devices.iter().map(|d| d.version == Version::V5).collect(),
                stormy,
                data_links,
                has(Quirk::LowestQos),
                has(Quirk::SmallWindow),
            ),
            rng,
            tell,
            router,
            core: SteppedBroker::new(EmbeddedOptions::with_quirks(quirks)),
            core_back_at: None,
            profile,
            links,
            devices,
            number: 0,
            forgot: false,
            stormy,
            poisonous,
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        let now = self.now;
        self.core.at(now);
        self.bid_farewell();
        if let Some((at, keep)) = self.core_back_at
            && at <= now
        {
            self.core_back_at = None;
            self.core.start(keep);
            tell!(self, "the core is back, sessions kept {keep}");
        }
        for n in 0..self.links.len() {
            self.dial(n);
            self.upward(n);
        }
        // What one link published another gets in the same moment.
        for n in 0..self.links.len() {
            self.upward(n);
            self.downward(n);
        }
        self.router.tick(now);
        for n in 0..self.devices.len() {
            self.read(n);
        }
    }

    fn latency(&mut self) -> u64 {
        self.now + self.rng.between(0, 30)
    }

    fn act(&mut self) {
        let n = self.rng.below(self.devices.len() as u64) as usize;
        let connected = self.devices[n].machine.is_some();
        match self.rng.below(100) {
            0..=39 if !connected => self.connect(n),
            _ if !connected => {}
            // The oracle learns of a request when it is sent, so none may wait behind another.
            0..=82 if self.devices[n].is_paused() => {}
            0..=54 => self.publish(n),
            55..=74 => self.subscribe(n),
            75..=82 => self.unsubscribe(n),
            83..=90 => self.cut(n),
            91..=97 if self.stormy => {
                let link = self.rng.below(self.links.len() as u64) as usize;
                match self.rng.chance(15) {
                    true => self.forget(link),
                    false => self.lose(link),
                }
            }
            98..=99 if self.stormy && self.core_back_at.is_none() => self.restart_core(),
            _ => {}
        }
    }

    fn run(&mut self) -> Result<(), String> {
        // The links are up before the first client comes.
        for _ in 0..30 {
            self.step();
        }
        for _ in 0..150 {
            self.act();
            for _ in 0..self.rng.below(4) {
                self.step();
            }
            if let Some(fault) = self.oracle.first_fault() {
                return Err(format!("at {} ms: {fault}", self.now));
            }
        }
        // Everything comes to rest.
        self.stormy = false;
        for n in 0..self.devices.len() {
            if self.devices[n].machine.is_none() {
                self.connect(n);
            }
        }
        for _ in 0..800 {
            self.step();
        }
        self.ask_for_all();
        let retained = self.core.retained();
        let number = |payload: &[u8]| String::from_utf8_lossy(payload).parse().ok();
        let mut retained: Vec<u32> = retained.iter().filter_map(|(_, p)| number(p)).collect();
        if !self.profile.keeps_retain() {
            // Any later message of the topic counts as newer there.
            retained.clear();
        }
        self.oracle.settle(self.now, &retained);
        self.at_core();
        match self.oracle.first_fault() {
            Some(fault) => Err(format!("at rest: {fault}")),
            None => Ok(()),
        }
    }

    /// I6: who asks now gets the retained messages as the core has them, fetched or from the cache.
    fn ask_for_all(&mut self) {
        let id = self.next_id(0);
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: 0,
        };
        let all: Vec<(String, SubscribeOptions)> = ["a/#", "c"]
            .iter()
            .map(|f| ((*f).to_owned(), options))
            .collect();
        let since = self.now;
        self.ask(0, id, all);
        for _ in 0..200 {
            self.step();
        }
        for (topic, payload) in self.core.retained() {
            let payload = String::from_utf8_lossy(&payload).into_owned();
            self.oracle.has(0, &topic, &payload, since);
        }
    }

    /// I12, I13, I18: each filter that a client holds is at the core once, or its root is.
    fn at_core(&mut self) {
        let held = self.core.subscriptions();
        for filter in self.oracle.filters() {
            let plain = crate::topics::split_shared(&filter).map_or(&*filter, |(_, f)| f);
            let covers = |name: &String| crate::topics::covers(name, plain) || *name == filter;
            let times = held
                .iter()
                .filter(|(_, names)| names.contains(&filter))
                .count();
            let covered = held.iter().any(|(_, names)| names.iter().any(covers));
            if times > 1 || !covered {
                self.oracle
                    .fault(format!("{filter} is at the core {times} times: {held:?}"));
            }
        }
        if self.profile.mapping() == Mapping::Identifiers {
            return;
        }
        for (link, names) in held.iter().filter(|(link, _)| !link.contains("-r")) {
            for (at, a) in names.iter().enumerate() {
                let plain = |f: &String| {
                    crate::topics::split_shared(f).map_or(f.clone(), |(_, f)| f.to_owned())
                };
                if let Some(b) = names[..at]
                    .iter()
                    .find(|b| crate::topics::overlaps(&plain(a), &plain(b)))
                {
                    self.oracle.fault(format!("{a} and {b} are both on {link}"));
                }
            }
        }
    }
}

/// The profile that a probe finds of a broker with these quirks.
fn profile_of(version: Version, quirks: &[Quirk]) -> BrokerProfile {
    let v5 = version == Version::V5;
    let has = |quirk: Quirk| quirks.contains(&quirk);
    let capabilities = Capabilities::of(
        version,
        &Connack {
            subscription_ids_available: has(Quirk::NoIds).then_some(false),
            ..Connack::default()
        },
    );
    let mut profile = BrokerProfile::unseen(&capabilities, Source::Probed);
    let seen = &mut profile.quirks;
    if seen.identifiers == Identifiers::Assumed {
        seen.identifiers = Identifiers::Working;
    }
    seen.replaces = Some(!has(Quirk::TwoQueues));
    seen.retain_handling = Some(v5);
    seen.retain_as_published = Some(v5 && !has(Quirk::NoRap));
    seen.retained_within = Some(if has(Quirk::LateRetained) { 300 } else { 10 });
    seen.shared = match has(Quirk::DeadShared) {
        true => SharedSubscriptions::Dead,
        false => SharedSubscriptions::Alive,
    };
    seen.properties = Some(v5);
    // Over 3.1.1, retained messages are fetched as from a broker whose window was not seen.
    seen.window = match has(Quirk::SmallWindow) {
        true => Some(10),
        false => v5.then_some(WINDOW_PROBED),
    };
    profile
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let usual = if std::env::var_os("TIDEGATE_FULL").is_some() {
        100_000
    } else {
        1000
    };
    let first = number("TIDEGATE_FIRST_SEED").unwrap_or(0);
    first..first + number("TIDEGATE_SEEDS").unwrap_or(usual)
}

#[test]
fn the_whole_keeps_its_promises_before_any_core() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|s| s.parse().ok()) {
        if let Err(fault) = World::new(seed, true).run() {
            panic!("seed {seed}: {fault}");
        }
        return;
    }
    let all = seeds();
    let workers = 2;
    let failed: Vec<(u64, String)> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..workers)
            .map(|worker| {
                let mine = all.clone().skip(worker).step_by(workers);
                scope.spawn(move || {
                    let run = |seed| World::new(seed, false).run().err().map(|f| (seed, f));
                    mine.filter_map(run).collect::<Vec<_>>()
                })
            })
            .collect();
        runs.into_iter()
            .flat_map(|run| run.join().expect("a worker does not panic"))
            .collect()
    });
    for (seed, fault) in failed.iter().take(20) {
        eprintln!("SEED={seed} cargo test --lib the_whole -- --nocapture\n    {fault}");
    }
    assert!(
        failed.is_empty(),
        "{} of {all:?} seeds failed",
        failed.len()
    );
}
