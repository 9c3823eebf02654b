//! A simulation of clients, router, links of every role, and a broker with the quirks and faults of
//! real ones, on a virtual clock. Links are lost, the broker restarts, clients flap. An oracle judges
//! what each client received; it knows only what clients and broker were told. Some clients use data
//! streams beside the control stream, and end or reset them; some leave streams unread.
//!
//! A third of the seeds is durable: the node keeps its sessions in a log on a simulated disk, and crashes at
//! any moment, within operations of the disk too. Its clients also leave, begin anew and change their expiry.
//! In some of these seeds the disk runs full or fails for a while.
//!
//! One test runs `TIDEGATE_SEEDS` seeds from `TIDEGATE_FIRST_SEED` on. To replay one seed and print its
//! trace: `SEED=7 cargo test --lib sim -- --nocapture`.

/// Adds an event to the trace of a run, if anybody reads it.
macro_rules! trace {
    ($world:expr, $($what:tt)*) => {
        if $world.trace.is_on() {
            let line = format!($($what)*);
            $world.trace.line($world.now, &line);
        }
    };
}

mod connections;
mod crash;
mod devices;
mod kept;
mod links;
mod oracle;
mod rest;
mod seen;
mod setup;
mod store;
pub(crate) mod testing;
mod trace;
mod wills;
mod wires;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

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
use crate::session::{Session, SessionKey};
use crate::sim::testing::{PROBES, admit, config, context, router_limited};
use crate::store::Memory;
use crate::store::log::disk::sim::SimDisk;
use crate::streams::StreamId;
use crate::time::Millis;
use crate::transport::{Closed, OutBuf, Traffic};

use crate::upstream::link::data::DataLink;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::link::publish::PublishLink;
use crate::upstream::link::retained::RetainedLink;
use crate::upstream::profile::{
    BrokerProfile, Capabilities, Identifiers, Mapping, SharedSubscriptions, Source, WINDOW_PROBED,
};
use devices::{Asked, DISJOINT, Device, names_of, number_of};
use links::SimLink;
use oracle::Oracle;
use seen::{Conditions, Got};
use setup::{Setup, profile_of};
use store::{DURABLE_PERCENT, Store};
use tidegate_kit::rng::Rng;
use trace::Trace;
use wires::{Outgoing, STREAMS_MAX, Wire};

/// Seeds that are run twice, to compare their traces.
const SEEDS_TRACED: usize = 40;

/// The size of a large message.
const LARGE_BYTES: usize = 20_000;

/// A step of the clock.
const STEP: Duration = Duration::from_millis(10);

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
const BROKERS: [&[Quirk]; 12] = [
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

/// What runs did, to show that they do it.
#[derive(Clone, Copy, Debug, Default)]
struct Exercised {
    /// Packets on data streams.
    streams: u64,
    /// Data streams that clients ended.
    ended: u64,
    /// Data streams that clients reset.
    reset: u64,
    /// Streams that clients left unread.
    unread: u64,
    /// Steps in which the machine left a client unread.
    left_unread: u64,
    /// Steps in which sessions slept.
    asleep: u64,
    /// Crashes of the node.
    crashes: u64,
    /// Crashes while the disk was degraded.
    stale: u64,
    /// Times in which the log became durable again.
    returned: u64,
}

impl Exercised {
    fn add(self, other: Self) -> Self {
        Self {
            streams: self.streams + other.streams,
            ended: self.ended + other.ended,
            reset: self.reset + other.reset,
            unread: self.unread + other.unread,
            left_unread: self.left_unread + other.left_unread,
            asleep: self.asleep + other.asleep,
            crashes: self.crashes + other.crashes,
            stale: self.stale + other.stale,
            returned: self.returned + other.returned,
        }
    }
}

struct World {
    now: Millis,
    /// The time by the clock of the node's process, which begins at zero.
    node_now: Millis,
    rng: Rng,
    /// Decides about durable seeds' own events, so that other seeds stay as they are.
    fate: Rng,
    setup: Setup,
    /// The number of the node's process.
    process: u64,
    /// The log of the sessions, in a durable seed.
    store: Option<Store>,
    /// The disk of the run runs full or fails at times.
    disk_fails: bool,
    /// It does so now.
    disk_is_bad: bool,
    trace: Trace,
    router: Arc<Router>,
    broker: SteppedBroker,
    /// While the broker is stopped: when it starts again, and whether with its sessions.
    broker_back_at: Option<(Millis, bool)>,
    profile: BrokerProfile,
    links: Vec<SimLink>,
    devices: Vec<Device>,
    oracle: Oracle,
    /// The number of the last message.
    number: u32,
    /// The broker has lost a data link's session.
    session_lost: bool,
    /// Links are lost and the broker restarts.
    stormy: bool,
    /// Some publishes make the broker close the connection.
    poisonous: bool,
    /// How often clients sent a poison publish.
    poisons_sent: u32,
    /// Some messages are large.
    large: bool,
    exercised: Exercised,
    /// Each filter finds a link on which it overlaps no other.
    links_suffice: bool,
    /// The filters that clients subscribe to.
    filters: &'static [&'static str],
}

impl World {
    fn new(seed: u64, mut trace: Trace) -> Self {
        let mut rng = Rng::new(seed);
        let quirks = rng.pick(&BROKERS);
        let roots = if rng.chance(30) {
            rng.pick(&ROOTS)
        } else {
            &[]
        };
        // With links added as they are needed, nothing is refused. With few, all messages are fetched.
        let adds_links = rng.chance(50);
        let (data_links, data_links_max) = match adds_links {
            true => {
                let first = rng.between(1, 2) as usize;
                (first, first + rng.pick(&[1, 2, 6]))
            }
            false => {
                let all = rng.between(1, 4) as usize;
                (all, all)
            }
        };
        let publish_links = rng.between(1, 2) as usize;
        let has = |quirk: Quirk| quirks.contains(&quirk);
        let dead = has(Quirk::DeadShared);
        let local_groups = dead && rng.chance(50);
        let v5 = !has(Quirk::V311);
        let large = rng.chance(15);
        let config = RouterConfig {
            data_links,
            data_links_max,
            data_link_filters: [2, 2000][(seed % 2) as usize],
            shared_links: 1,
            shared_links_max: if adds_links { 4 } else { 1 },
            roots: roots.iter().map(|r| (*r).to_owned()).collect(),
            local_groups,
            publish_links,
            publish_links_max: publish_links,
            linger: Duration::from_secs(2),
            linger_busy_min: Duration::from_millis(500),
            ..config()
        };
        // With a small buffer, messages wait in the sessions' queues.
        let output_buffer = rng.pick(&[64, 64 * 1024, 64 * 1024]);
        // Drawn apart, so that seeds from before it stay as they are.
        let mut apart = Rng::new(seed ^ 0x000A_51EE);
        let sleep_after = apart.pick(&[0, 100, 500].map(Duration::from_millis));
        let version = if v5 { Version::V5 } else { Version::V311 };
        let setup = Setup {
            config,
            version,
            output_buffer,
            sleep_after,
        };
        let router = setup.router(Millis::ZERO);
        let profile = profile_of(version, quirks);
        let links = setup.links(&router, 1);
        let stormy = rng.chance(70);
        let poisonous = rng.chance(20);
        let names = names_of(&router, apart.chance(70));
        let devices = names.into_iter().map(|id| Device::new(id, &mut rng));
        let devices: Vec<Device> = devices.collect();
        if trace.is_on() {
            let line = format!(
                "{quirks:?} roots {roots:?} {data_links} to {data_links_max} data links, {publish_links} publish links, local groups {local_groups}, stormy {stormy}, poisonous {poisonous}, large {large}, output buffer {output_buffer}"
            );
            trace.line(Millis::ZERO, &line);
        }
        let mut fate = Rng::new(seed ^ 0x00D1_5C00);
        let store = fate
            .chance(DURABLE_PERCENT)
            .then(|| Store::open(SimDisk::default(), &router, Millis::ZERO));
        Self {
            now: Millis::ZERO,
            node_now: Millis::ZERO,
            oracle: Oracle::new(Conditions {
                clients_v5: devices.iter().map(|d| d.version == Version::V5).collect(),
                stormy,
                data_links: data_links_max,
                refuses: !adds_links,
                lowest_qos: has(Quirk::LowestQos),
                small_window: has(Quirk::SmallWindow),
            }),
            rng,
            setup,
            process: 1,
            store,
            disk_fails: fate.chance(30),
            disk_is_bad: false,
            fate,
            trace,
            router,
            broker: SteppedBroker::new(EmbeddedOptions::with_quirks(quirks)),
            broker_back_at: None,
            profile,
            links,
            devices,
            number: 0,
            session_lost: false,
            stormy,
            poisonous,
            poisons_sent: 0,
            large,
            exercised: Exercised::default(),
            links_suffice: data_links_max >= 7 && !local_groups,
            filters: match apart.chance(50) {
                true => &DISJOINT,
                false => &FILTERS,
            },
        }
    }

    fn step(&mut self) {
        self.advance(STEP);
        let now = self.now;
        self.broker.at(now);
        self.publish_due_wills();
        if let Some((at, keep)) = self.broker_back_at
            && at <= now
        {
            self.broker_back_at = None;
            self.broker.start(keep);
            trace!(self, "the broker is back, sessions kept {keep}");
        }
        for n in 0..self.links.len() {
            self.dial(n);
            self.broker_reads(n);
        }
        // A message that one link publishes reaches the other links in the same step.
        for n in 0..self.links.len() {
            self.broker_reads(n);
            self.link_reads(n);
        }
        self.router.tick(self.node_now);
        for n in 0..self.devices.len() {
            self.read(n);
        }
        self.store_works();
        self.end_stale_links();
        self.check_regained();
        self.exercised.asleep += self.router.totals().asleep as u64;
    }

    /// Time passes, for the node too.
    fn advance(&mut self, by: Duration) {
        self.now += by;
        self.node_now += by;
    }

    /// When something that is sent now arrives.
    fn arrival(&mut self) -> Millis {
        self.now + Duration::from_millis(self.rng.between(0, 30))
    }

    fn act(&mut self) {
        let n = self.rng.below(self.devices.len() as u64) as usize;
        let connected = self.devices[n].machine.is_some();
        match self.rng.below(100) {
            0..=39 if !connected && self.devices[n].away_until <= self.now => self.connect(n),
            _ if !connected => {}
            0..=5 => self.change_stream(n),
            // The oracle learns of a request when it is sent, so none may wait behind another.
            6..=82 if self.devices[n].is_busy() || self.is_withheld(n) => {}
            6..=54 => self.publish(n),
            55..=74 => self.subscribe(n),
            75..=82 => self.unsubscribe(n),
            83..=90 if self.store.is_some() && self.fate.chance(40) => self.leave(n),
            83..=90 => self.cut(n),
            91..=97 if self.stormy => {
                let link = self.rng.below(self.links.len() as u64) as usize;
                match self.rng.chance(15) {
                    true => self.forget(link),
                    false => self.lose(link),
                }
            }
            98..=99 if self.stormy && self.broker_back_at.is_none() => self.restart_broker(),
            _ => {}
        }
    }

    fn run(&mut self) -> Result<Exercised, String> {
        // The links connect before the first client.
        for _ in 0..30 {
            self.step();
        }
        for _ in 0..150 {
            self.act();
            self.disk_fails_perhaps();
            self.crash_perhaps();
            let steps = match self.rng.chance(1) {
                // A stream that is left unread for a second is gone around.
                true => self.rng.between(100, 150),
                false => self.rng.below(4),
            };
            for _ in 0..steps {
                self.step();
            }
            if let Some(fault) = self.oracle.first_fault() {
                return Err(format!("at {} ms: {fault}", self.now));
            }
        }
        // Everything comes to rest before the oracle judges.
        self.stormy = false;
        self.mend_disk();
        self.read_all();
        for n in 0..self.devices.len() {
            if self.devices[n].machine.is_none() {
                self.connect(n);
            }
        }
        self.rest();
        self.check_retained();
        let retained = self.broker.retained();
        let mut retained: Vec<u32> = retained.iter().filter_map(|(_, p)| number_of(p)).collect();
        if !self.profile.keeps_retain() {
            // With such a broker, any later message of the topic counts as newer.
            retained.clear();
        }
        self.oracle.settle(self.now, &retained);
        self.check_filters();
        if self.trace.is_on() {
            for fault in self.oracle.faults() {
                self.trace.line(self.now, fault);
            }
        }
        if let Some(fault) = self.oracle.first_fault() {
            return Err(format!("at rest: {fault}"));
        }
        self.end();
        self.check_log_is_empty();
        if let Some(fault) = self.oracle.first_fault() {
            return Err(format!("when all have gone: {fault}"));
        }
        let router = &self.router;
        let charged = [
            router.session_bytes(),
            router.queue_used(),
            router.output_used(),
            router.limits().publish_account.used(),
        ];
        match charged {
            [0, 0, 0, 0] => Ok(self.exercised),
            _ => Err(format!(
                "when all have gone, bytes stay charged: {charged:?}"
            )),
        }
    }
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

/// Runs seeds. Returns the faults, and what the runs did.
fn run_seeds(seeds: impl Iterator<Item = u64>) -> (Vec<(u64, String)>, Exercised) {
    let (mut failed, mut all) = (Vec::new(), Exercised::default());
    for seed in seeds {
        let run = AssertUnwindSafe(|| World::new(seed, Trace::Off).run());
        match catch_unwind(run) {
            Ok(Ok(exercised)) => all = all.add(exercised),
            Ok(Err(fault)) => failed.push((seed, fault)),
            Err(_) => failed.push((seed, "it panicked".to_owned())),
        }
    }
    (failed, all)
}

/// Runs each seed, and fails with the first promise that each broke.
#[test]
fn clients_router_links_and_broker_agree() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|s| s.parse().ok()) {
        if let Err(fault) = World::new(seed, Trace::Print).run() {
            panic!("seed {seed}: {fault}");
        }
        return;
    }
    let all = seeds();
    let workers = 2;
    let runs: Vec<(Vec<(u64, String)>, Exercised)> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..workers)
            .map(|worker| {
                let mine = all.clone().skip(worker).step_by(workers);
                scope.spawn(move || run_seeds(mine))
            })
            .collect();
        runs.into_iter()
            .map(|run| run.join().expect("a worker does not panic"))
            .collect()
    });
    let failed: Vec<_> = runs.iter().flat_map(|(failed, _)| failed).collect();
    for (seed, fault) in failed.iter().take(20) {
        eprintln!("SEED={seed} cargo test --lib sim -- --nocapture\n    {fault}");
    }
    assert!(
        failed.is_empty(),
        "{} of {all:?} seeds failed",
        failed.len()
    );
    let did = runs
        .iter()
        .fold(Exercised::default(), |all, (_, did)| all.add(*did));
    eprintln!("{all:?}: {did:?}");
    let count = all.count() as u64;
    let rare = did.ended.min(did.reset).min(did.left_unread);
    assert!(
        count < 500
            || (did.streams.min(did.unread).min(did.asleep) > count
                && rare > count / 10
                && did.crashes > count / 4
                && did.stale > 0
                && did.returned > count / 100),
        "the runs do too little: {did:?}"
    );
}

/// The trace of a seed, with all bytes.
fn record(seed: u64) -> String {
    let mut world = World::new(seed, Trace::Record(String::new()));
    let outcome = world.run();
    let Trace::Record(mut text) = world.trace else {
        unreachable!("it is set above, and nobody changes it");
    };
    text.push_str(&format!("{outcome:?}"));
    text
}

/// A seed gives the same run each time, to the byte.
#[test]
fn one_seed_gives_one_trace() {
    let mut lines_traced = 0;
    for seed in seeds().take(SEEDS_TRACED) {
        let (first, second) = (record(seed), record(seed));
        let mut lines = first.lines().zip(second.lines()).enumerate();
        if let Some((at, (one, other))) = lines.find(|(_, (one, other))| one != other) {
            panic!("SEED={seed}: line {at} of the trace is\n{one}\nand, run again,\n{other}");
        }
        assert_eq!(
            first.len(),
            second.len(),
            "SEED={seed}: one trace is longer"
        );
        lines_traced += first.lines().count();
    }
    assert!(
        lines_traced > 500 * SEEDS_TRACED.min(seeds().count()),
        "the runs are hardly runs"
    );
}
