//! One run: devices, lossy links, the real router, a model core, a virtual clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tidegate::limits::Account;
use tidegate::mqtt::{Message, MessageSpec, QoS, ReasonCode, SubscribeOptions, Version};
use tidegate::router::{CoreFacts, Router, RouterConfig};
use tidegate::session::{QueueFull, SessionLimits};

use crate::core::{Copies, Copy, Core, Item, arrived, matching};
use crate::device::{Device, Outgoing, Profile, Seen, WillSpec};
use crate::edge::{Edge, QOS};
use crate::oracle::{Checked, Oracle, Rules};
use crate::rng::Rng;

const FILTERS: [&str; 12] = [
    "a/b", "a/+", "a/#", "+/b", "#", "b", "b/+", "c/d/e", "c/#", "r/#", "r/1", "no/x",
];
const TOPICS: [&str; 7] = ["a/b", "a/c", "b", "b/b", "c/d/e", "c", "a"];
const RETAINED: [&str; 3] = ["r/1", "r/2", "r/3"];

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    chunks: VecDeque<(u64, Vec<u8>)>,
    last: u64,
    bytes: usize,
}

impl Pipe {
    fn send(&mut self, bytes: Vec<u8>, rng: &mut Rng, now: u64) {
        if bytes.is_empty() {
            return;
        }
        let delay = match rng.below(8) {
            0..5 => 0,
            5..7 => rng.below(30),
            _ => rng.below(400),
        };
        self.last = self.last.max(now + delay);
        self.bytes += bytes.len();
        self.chunks.push_back((self.last, bytes));
    }

    /// What arrives now: often not all of it, so that a cut may come at any byte.
    fn receive(&mut self, rng: &mut Rng, now: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while self.chunks.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, chunk)) = self.chunks.front_mut() else {
                break;
            };
            if rng.chance(15) {
                let part = rng.below(chunk.len() as u64) as usize;
                out.extend(chunk.drain(..part));
                break;
            }
            if let Some((_, chunk)) = self.chunks.pop_front() {
                out.extend(chunk);
            }
        }
        self.bytes -= out.len();
        out
    }
}

struct Link {
    up: Pipe,
    down: Pipe,
    edge: Edge,
    /// When the server's end learns that the link is cut.
    eof_at: Option<u64>,
    /// The device reads nothing.
    stalled: bool,
}

struct Fetch {
    at: u64,
    number: u32,
    filter: String,
    found: Option<VecDeque<(String, Vec<u8>, QoS)>>,
}

pub struct World {
    rng: Rng,
    now: u64,
    router: Arc<Router>,
    core: Core,
    oracle: Oracle,
    devices: Vec<Device>,
    links: BTreeMap<u64, Link>,
    fetches: VecDeque<Fetch>,
    next_link: u64,
    sequence: Vec<u64>,
    events: u64,
    core_back_at: u64,
    trace: bool,
    quiet: bool,
    retained: bool,
    expiry_max: u32,
}

/// What a run saw, to show that runs are not empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub connects: u64,
    pub delivered: u64,
    pub forwarded: u64,
}

/// Runs one seed.
pub fn run(seed: u64, trace: bool) -> Result<Report, String> {
    let mut world = World::new(seed, trace);
    let steps = 150 + world.rng.below(250);
    for step in 0..steps {
        world
            .step(true)
            .map_err(|e| format!("step {step}, at {} ms: {e}", world.now))?;
    }
    world
        .settle()
        .map_err(|e| format!("while it settles, at {} ms: {e}", world.now))?;
    world
        .end()
        .map_err(|e| format!("at the end, at {} ms: {e}", world.now))?;
    Ok(Report {
        connects: world.next_link,
        delivered: world.oracle.delivered,
        forwarded: world.core.forwarded.len() as u64,
    })
}

macro_rules! trace {
    ($world:expr, $($what:tt)*) => {
        if $world.trace {
            eprintln!("{:>8} {}", $world.now, format_args!($($what)*));
        }
    };
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
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
        let publish_account = Arc::new(Account::new());
        let limits = SessionLimits {
            receive_max: rng.pick(&[1, 3, 16]),
            topic_alias_max: rng.pick(&[0, 2, 8]),
            packet_max: 1 << 20,
            queue_messages_max: if small {
                rng.between(1, 8) as usize
            } else {
                10_000
            },
            queue_bytes_max: if rng.chance(10) { 2000 } else { 1 << 20 },
            queue_age_max: u64::MAX,
            queue_full,
            queue_qos0: rng.chance(40),
            output_buffer: Arc::new(AtomicUsize::new(rng.pick(&[64, 1000, 1 << 16]))),
            subscriptions_max: 100,
            filter_bytes_max: 1 << 16,
            topic_levels_max: 16,
            v3_publishes_max: rng.pick(&[3, 8, 20]),
            expiry_max: 300,
            publish_account,
            reserved_key: "tidegate-sim",
            hasher: Default::default(),
        };
        let config = RouterConfig {
            data_links: 1,
            publish_links: 1,
            linger: rng.pick(&[500, 20_000]),
            linger_busy_min: 500,
            filters_lingering_max: rng.pick(&[2, 100]) as usize,
            subscribe_hold: 10_000,
            subscribe_accept: true,
            publishes_waiting: rng.pick(&[2000, 1 << 20, 1 << 20]),
            publishes_waiting_per_client: rng.pick(&[1000, 1 << 20, 1 << 20]) as usize,
            retained_cache: rng.pick(&[100, 1 << 20]) as usize,
            queues: if evicts { 3000 } else { 1 << 30 },
            output: 1 << 30,
            write_stall: 60_000,
        };
        let devices = rng.between(2, 5) as usize;
        let profiles: Vec<Profile> = (0..devices).map(|n| profile(n, &mut rng)).collect();
        let grants = rng.pick(&[
            QoS::ExactlyOnce,
            QoS::ExactlyOnce,
            QoS::ExactlyOnce,
            QoS::AtLeastOnce,
        ]);
        let rules = Rules {
            grants,
            hold: config.subscribe_hold,
            expiry_max: limits.expiry_max,
            expiry_v3: 120,
            evicts,
            ends_full: queue_full == QueueFull::EndSession,
        };
        let expiry_max = limits.expiry_max;
        let tight = config.publishes_waiting < 1 << 20;
        let router = Arc::new(Router::new(limits, config));
        let facts = CoreFacts {
            identifiers: copies != Copies::Unnamed,
            version_5: true,
            maximum_qos: QoS::ExactlyOnce,
            retain_available: true,
            packet_max: u32::MAX,
        };
        router.core_facts(&facts, 0);
        router.data_link_up(0, false, true, 0);
        router.publish_link_up(0, true);
        if trace {
            eprintln!("{rules:?}\n{:?}", router.limits);
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
            core: Core::new(copies, grants, window),
            oracle,
            sequence: vec![0; devices],
            devices: profiles.into_iter().map(Device::new).collect(),
            rng,
            now: 1000,
            router,
            links: BTreeMap::new(),
            fetches: VecDeque::new(),
            next_link: 0,
            events: 0,
            core_back_at: 0,
            trace,
            quiet: false,
            retained,
            expiry_max,
        }
    }

    fn step(&mut self, act: bool) -> Checked {
        let forward = match self.rng.below(20) {
            0..12 => self.rng.below(3),
            12..17 => self.rng.below(60),
            17..19 => self.rng.below(1000),
            _ if act => self.rng.below(20_000),
            _ => self.rng.below(1000),
        };
        let until = self.now + forward;
        // The devices' own timers, and the router's, do not wait for a long step's end.
        while self.now < until {
            self.now = until.min(self.now + 500);
            self.round()?;
        }
        if act {
            let device = self.rng.below(self.devices.len() as u64) as usize;
            self.act(device);
        }
        self.round()
    }

    /// Everything does what is due now.
    fn round(&mut self) -> Checked {
        self.router.tick(self.now);
        self.oracle.ticked(self.now);
        self.devices_work()?;
        self.links_work()?;
        self.core_works()?;
        self.edges_work()?;
        if self.oracle.rules.ends_full || self.rng.chance(5) {
            self.oracle.look(&self.router, self.now)?;
        }
        Ok(())
    }

    fn act(&mut self, n: usize) {
        let what = self.rng.below(100);
        let connected = self.devices[n].connected;
        match what {
            0..30 if connected => self.publish(n),
            0..30 => self.connect(n),
            30..45 => self.publish_elsewhere(),
            45..63 if connected => self.subscribe(n),
            63..70 if connected => {
                let count = self.rng.between(1, 2);
                let filters: Vec<&str> = (0..count).map(|_| self.rng.pick(&FILTERS)).collect();
                trace!(self, "{n} unsubscribes {filters:?}");
                self.devices[n].unsubscribe(&filters);
            }
            70..78 => self.cut(n),
            78..82 => {
                trace!(self, "{n} comes again");
                self.connect(n);
            }
            82..85 if connected => self.leave(n),
            85..88 => {
                if let Some(link) = self.devices[n].link.and_then(|l| self.links.get_mut(&l)) {
                    link.stalled = !link.stalled;
                }
            }
            88..90 if !self.core.away => {
                let time = self.rng.pick(&[200, 3000, 15_000]);
                trace!(self, "the core is away for {time} ms");
                self.core.away = true;
                self.oracle.away = (self.now, u64::MAX);
                self.oracle.inbound.core_was_away = true;
                self.router.publish_link_up(0, false);
                self.core_back_at = self.now + time;
            }
            _ => {}
        }
    }

    fn connect(&mut self, n: usize) {
        if let Some(old) = self.devices[n].link {
            // The server's end of the old one hears nothing, or late.
            let late = self.rng.pick(&[0, 50, 100_000]);
            self.abandon(old, late);
        }
        let clean = self.devices[n].profile.clean != self.rng.chance(8);
        self.next_link += 1;
        let link = self.next_link;
        let will = self.rng.chance(40).then(|| WillSpec {
            topic: "will/t".into(),
            payload: format!("w{n}.{link}:").into_bytes(),
            qos: self.rng.pick(&QOS),
            delay: self.rng.pick(&[0, 1, 5, 100]),
        });
        trace!(self, "{n} connects, link {link}, clean {clean}, {will:?}");
        self.devices[n].connect(link, clean, will.as_ref(), self.now);
        self.links.insert(
            link,
            Link {
                up: Pipe::default(),
                down: Pipe::default(),
                edge: Edge::new(n, link),
                eof_at: None,
                stalled: false,
            },
        );
    }

    fn cut(&mut self, n: usize) {
        let Some(link) = self.devices[n].link else {
            return;
        };
        let late = self.rng.pick(&[0, 0, 20, 3000]);
        trace!(self, "{n} is cut, link {link}");
        self.devices[n].lost();
        self.abandon(link, late);
    }

    fn abandon(&mut self, link: u64, late: u64) {
        if let Some(l) = self.links.get_mut(&link) {
            l.eof_at = Some(self.now + late);
            // A part of what is under way still arrives.
            let keep = self.rng.below(l.up.chunks.len() as u64 + 1) as usize;
            l.up.chunks.truncate(keep);
            if let Some((_, last)) = l.up.chunks.back_mut()
                && self.rng.chance(50)
            {
                last.truncate(self.rng.below(last.len() as u64) as usize);
            }
            l.up.bytes = l.up.chunks.iter().map(|(_, c)| c.len()).sum();
        }
    }

    fn leave(&mut self, n: usize) {
        let v5 = self.devices[n].profile.version == Version::V5;
        let (reason, expiry) = match self.rng.below(4) {
            0 if v5 => (ReasonCode::DISCONNECT_WITH_WILL_MESSAGE, None),
            1 if v5 && self.devices[n].profile.expiry > 0 => {
                (ReasonCode::SUCCESS, Some(self.rng.pick(&[0, 7, 1000])))
            }
            _ => (ReasonCode::SUCCESS, None),
        };
        trace!(self, "{n} leaves: {reason:?} {expiry:?}");
        self.flush(n, true);
        self.devices[n].disconnect(reason, expiry);
        self.flush(n, false);
        if let Some(link) = self.devices[n].link {
            let at = self.links.get(&link).map_or(0, |l| l.up.last);
            if let Some(l) = self.links.get_mut(&link) {
                l.eof_at = Some(at.max(self.now) + 500);
            }
        }
        self.devices[n].lost();
    }

    fn publish(&mut self, n: usize) {
        for _ in 0..self.rng.between(1, 4) {
            let qos = self.rng.pick(&QOS);
            let (topic, key) = match self.rng.below(20) {
                0 => ("$same/t", format!("same{n}")),
                1 => ("deny/t", self.next_key(n)),
                2 => ("refused/t", self.next_key(n)),
                _ => (self.rng.pick(&TOPICS), self.next_key(n)),
            };
            let message = Outgoing {
                topic: topic.into(),
                payload: self.payload(&key),
                qos,
                retain: false,
                expiry: self.rng.chance(10).then(|| self.rng.between(1, 20) as u32),
            };
            trace!(
                self,
                "{n} publishes {key} on {topic} at {qos:?}, expiry {:?}", message.expiry
            );
            self.devices[n].publish(message, &mut self.rng);
        }
    }

    fn next_key(&mut self, n: usize) -> String {
        self.sequence[n] += 1;
        format!("d{n}.{}", self.sequence[n])
    }

    fn payload(&mut self, key: &str) -> Vec<u8> {
        // Identical messages stay identical.
        let long = key.starts_with('d') || key.starts_with('x');
        let length = match self.rng.below(10) {
            _ if !long => 0,
            0..7 => self.rng.below(30),
            7..9 => self.rng.between(80, 140),
            _ => self.rng.below(600),
        };
        format!("{key}:{}", "p".repeat(length as usize)).into_bytes()
    }

    /// Clients of the core that are not ours.
    fn publish_elsewhere(&mut self) {
        if self.core.away {
            return;
        }
        for _ in 0..self.rng.between(1, 6) {
            self.events += 1;
            self.oracle.latest = self.events;
            let retain = self.retained && self.rng.chance(30);
            let (topic, key) = match retain {
                true => (self.rng.pick(&RETAINED), format!("r#{}", self.events)),
                false => (self.rng.pick(&TOPICS), format!("x{}", self.events)),
            };
            let copy = Copy {
                filters: Vec::new(),
                topic: topic.into(),
                payload: self.payload(&key),
                qos: self.rng.pick(&QOS),
                retain,
                expires_at: match self.rng.below(12) {
                    0 if !retain => self.now + self.rng.between(1, 15) * 1000,
                    _ => u64::MAX,
                },
                tag: 0,
            };
            trace!(self, "the core takes {key} on {topic} at {:?}", copy.qos);
            self.core.route(&copy, &mut self.rng, self.now);
        }
    }

    fn subscribe(&mut self, n: usize) {
        if self.devices[n].requests() > 20 {
            return;
        }
        let v5 = self.devices[n].profile.version == Version::V5;
        let mut filters: Vec<(&str, SubscribeOptions)> = Vec::new();
        for _ in 0..self.rng.between(1, 3) {
            let filter = self.rng.pick(&FILTERS);
            if filters.iter().any(|(f, _)| *f == filter) {
                continue;
            }
            let options = SubscribeOptions {
                qos: self.rng.pick(&QOS),
                no_local: v5 && self.rng.chance(20),
                retain_as_published: v5 && self.rng.chance(40),
                retain_handling: if v5 { self.rng.below(3) as u8 } else { 0 },
            };
            filters.push((filter, options));
        }
        let id = (v5 && self.rng.chance(50)).then(|| self.rng.between(1, 300) as u32);
        trace!(self, "{n} subscribes {filters:?} id {id:?}");
        self.devices[n].subscribe(&filters, id);
        if self.rng.chance(10) {
            let gone = filters[0].0;
            trace!(self, "{n} unsubscribes {gone} at once");
            self.devices[n].unsubscribe(&[gone]);
        }
    }

    fn flush(&mut self, n: usize, acks: bool) {
        let Some(link) = self.devices[n].link else {
            return;
        };
        let bytes = self.devices[n].take_output(self.now, acks);
        if let Some(l) = self.links.get_mut(&link) {
            l.up.send(bytes, &mut self.rng, self.now);
        }
    }

    fn devices_work(&mut self) -> Checked {
        for n in 0..self.devices.len() {
            let p = &self.devices[n].profile;
            let (lazy, keep_alive) = (p.lazy, u64::from(p.keep_alive) * 1000);
            if self.devices[n].connected
                && keep_alive > 0
                && self.now >= self.devices[n].last_sent + keep_alive - 600
            {
                self.devices[n].ping();
            }
            let acks = self.quiet || !lazy || self.rng.chance(20);
            self.flush(n, acks);
            if self.quiet && self.devices[n].link.is_none() && self.wants_back(n) {
                self.connect(n);
            }
        }
        Ok(())
    }

    fn wants_back(&self, n: usize) -> bool {
        !self.devices[n].profile.clean
    }

    fn links_work(&mut self) -> Checked {
        let numbers: Vec<u64> = self.links.keys().copied().collect();
        for number in numbers {
            let Some(mut link) = self.links.remove(&number) else {
                continue;
            };
            self.link_works(number, &mut link)?;
            let over = link.edge.ended.is_some()
                && (link.down.chunks.is_empty() && link.edge.output.is_empty()
                    || self.devices[link.edge.device].link != Some(number));
            if over {
                if self.devices[link.edge.device].link == Some(number) {
                    self.devices[link.edge.device].lost();
                }
                continue;
            }
            self.links.insert(number, link);
        }
        Ok(())
    }

    fn link_works(&mut self, number: u64, link: &mut Link) -> Checked {
        let n = link.edge.device;
        if link.edge.ended.is_none() && !link.edge.held {
            let bytes = link.up.receive(&mut self.rng, self.now);
            if link.edge.completes(&bytes) {
                // What the connection that is taken over was written is lost with it.
                for other in self.links.values_mut().filter(|l| l.edge.device == n) {
                    other.edge.peek(&self.router, &mut self.oracle, self.now)?;
                }
            }
            link.edge
                .receive(&bytes, &self.router, &mut self.oracle, self.now)?;
        }
        if link.eof_at.is_some_and(|at| at <= self.now) && link.edge.ended.is_none() {
            trace!(self, "link {number} of {n} ends");
            link.edge.eof(&self.router, &mut self.oracle, self.now)?;
        }
        let current = self.devices[n].link == Some(number);
        if !current {
            link.down.chunks.clear();
            link.edge.output.clear();
        } else if !link.stalled || self.quiet {
            let bytes = link.down.receive(&mut self.rng, self.now);
            let device = &mut self.devices[n];
            device
                .receive(&bytes, &mut self.rng)
                .map_err(|e| format!("device {n}: {e}"))?;
            for seen in std::mem::take(&mut device.seen) {
                if self.trace {
                    match &seen {
                        Seen::Message {
                            topic,
                            payload,
                            qos,
                            dup,
                            retain,
                            fresh,
                        } => trace!(
                            self,
                            "{n} gets {} on {topic} {qos:?} dup {dup} retain {retain} fresh {fresh}",
                            crate::oracle::key(payload)
                        ),
                        other => trace!(self, "{n} sees {other:?}"),
                    }
                }
                self.oracle.seen(n, &seen)?;
                if let Seen::Disconnect(reason) = seen {
                    self.dismissed(n, reason)?;
                    self.devices[n].lost();
                    break;
                }
            }
        }
        Ok(())
    }

    /// A DISCONNECT of the server is for a reason that this run has.
    fn dismissed(&self, n: usize, reason: ReasonCode) -> Checked {
        let fine = match reason {
            ReasonCode::QUOTA_EXCEEDED => self.oracle.rules.ends_full || self.oracle.rules.evicts,
            // Its own earlier CONNECT came late, and took the session away.
            ReasonCode::SESSION_TAKEN_OVER => {
                self.oracle.clients[n].attached != self.devices[n].link
            }
            ReasonCode::KEEP_ALIVE_TIMEOUT => {
                let d = &self.devices[n];
                let silence = u64::from(d.profile.keep_alive) * 1500;
                silence > 0 && self.now >= d.last_sent + silence
            }
            _ => false,
        };
        match fine {
            true => Ok(()),
            false => Err(format!("device {n} is sent away: {reason:?}")),
        }
    }

    fn core_works(&mut self) -> Checked {
        if self.core.away && self.now >= self.core_back_at {
            trace!(self, "the core is back");
            self.core.away = false;
            self.oracle.away.1 = self.now;
            self.router.publish_link_up(0, true);
        }
        let before = self.core.forwarded.len();
        self.core.step(&self.router, &mut self.rng, self.now);
        for i in before..self.core.forwarded.len() {
            let (outgoing, refused) = &self.core.forwarded[i];
            let m = &outgoing.message;
            trace!(
                self,
                "the core gets {} on {}",
                crate::oracle::key(m.payload()),
                m.topic()
            );
            self.oracle
                .inbound
                .forwarded(m.payload(), m.qos(), self.now)?;
            if !refused {
                self.oracle.routed(m.topic(), &self.core.held)?;
            }
        }
        if self.core.forwarded.len() > before {
            // References end here, or the account would never be empty.
            for (outgoing, _) in &mut self.core.forwarded[before..] {
                outgoing.message = Message::new(&MessageSpec {
                    topic: "t",
                    properties: Default::default(),
                    payload: b"",
                    qos: QoS::AtMostOnce,
                    retain: false,
                    expires_at: 0,
                    strip_key: None,
                    account: None,
                });
            }
        }
        if let Some(fault) = self.core.faults.pop() {
            return Err(format!("a needless SUBSCRIBE: {fault} (I21)"));
        }
        self.core_sends()?;
        self.fetches_work();
        Ok(())
    }

    /// The data link: in order, answers apart from messages.
    fn core_sends(&mut self) -> Checked {
        let mut batch = Vec::new();
        while let Some(item) = self.core.next_item(self.now) {
            match item {
                // The core sends nothing that is past its expiry.
                Item::Copies(copies) if copies[0].expires_at <= self.now => {}
                Item::Copies(copies) => {
                    self.oracle.arrives(&copies, self.now);
                    trace!(
                        self,
                        "arrives {} for {:?}",
                        crate::oracle::key(&copies[0].payload),
                        copies.iter().map(|c| &c.filters).collect::<Vec<_>>()
                    );
                    let copies = copies.iter();
                    batch.extend(copies.map(|c| arrived(c, self.core.copies, &self.router)));
                }
                Item::Suback(number, code) => {
                    self.router.fan_out(&mut batch, self.now);
                    batch.clear();
                    trace!(self, "SUBACK of the core for {number}: {code:?}");
                    let held = &self.core.held;
                    let name = held.iter().find(|(_, (n, _))| *n == number).map(|(f, _)| f);
                    if let Some(name) = name {
                        self.oracle.holds(name);
                    }
                    self.router.suback(number, code, self.now);
                }
                Item::Unsuback(number) => {
                    self.router.fan_out(&mut batch, self.now);
                    batch.clear();
                    trace!(self, "UNSUBACK of the core for {number}");
                    self.router.unsuback(number, self.now);
                }
            }
        }
        self.router.fan_out(&mut batch, self.now);
        Ok(())
    }

    /// The R link.
    fn fetches_work(&mut self) {
        if self.core.away {
            return;
        }
        for (number, name) in self.router.next_fetches(4) {
            let at = self.now + self.rng.below(200);
            self.fetches.push_back(Fetch {
                at,
                number,
                filter: name.to_string(),
                found: None,
            });
        }
        let Some(fetch) = self.fetches.front_mut() else {
            return;
        };
        if fetch.at > self.now {
            return;
        }
        match &mut fetch.found {
            None => {
                let found = self.core.retained.iter();
                let found = found.filter(|(topic, _)| matching(&fetch.filter, topic));
                let found = found.map(|(t, (p, q))| (t.clone(), p.clone(), *q));
                fetch.found = Some(found.collect());
            }
            Some(found) => match found.pop_front() {
                Some((topic, payload, qos)) => {
                    let message = Message::new(&MessageSpec {
                        topic: &topic,
                        properties: Default::default(),
                        payload: &payload,
                        qos,
                        retain: true,
                        expires_at: u64::MAX,
                        strip_key: None,
                        account: Some(self.router.queue_account().clone()),
                    });
                    self.router.fetched(fetch.number, &message, self.now);
                    trace!(self, "fetched {topic} {}", crate::oracle::key(&payload));
                    return;
                }
                None => {
                    let complete = self.rng.chance(90);
                    self.router.fetch_ended(&[fetch.number], complete);
                    if !complete {
                        self.oracle.fetched_anew(&fetch.filter);
                    }
                    self.fetches.pop_front();
                    return;
                }
            },
        }
        // What is found now may come much later.
        let delay = self.rng.below(1000);
        if let Some(fetch) = self.fetches.front_mut() {
            fetch.at = self.now + delay;
        }
    }

    fn edges_work(&mut self) -> Checked {
        for link in self.links.values_mut() {
            // A socket takes only so much.
            if link.down.bytes + link.edge.output.len() < 2000 || self.quiet {
                link.edge.poll(&self.router, &mut self.oracle, self.now)?;
            }
            if !link.edge.output.is_empty() && link.down.bytes < 2000 {
                let bytes = std::mem::take(&mut link.edge.output);
                link.down.send(bytes, &mut self.rng, self.now);
            }
        }
        Ok(())
    }

    /// Nothing new happens; who keeps a session comes back, and all comes to rest.
    fn settle(&mut self) -> Checked {
        trace!(self, "settles");
        self.quiet = true;
        self.core_back_at = 0;
        for link in self.links.values_mut() {
            link.stalled = false;
        }
        let mut calm = 0;
        for _ in 0..5000 {
            self.step(false)?;
            let still = self.core.idle()
                && self.fetches.is_empty()
                && self.router.publishes_waiting() == 0
                && self
                    .devices
                    .iter()
                    .all(|d| d.link.is_none() || d.connected && d.idle() && d.requests() == 0)
                && self.links.values().all(|l| {
                    l.up.chunks.is_empty() && l.down.chunks.is_empty() && l.edge.output.is_empty()
                })
                && (0..self.devices.len())
                    .all(|n| self.devices[n].link.is_some() || !self.wants_back(n));
            calm = if still { calm + 1 } else { 0 };
            if calm > 30 {
                self.oracle.look(&self.router, self.now)?;
                self.oracle.settled(&self.router, self.now)?;
                return self.oracle.inbound.settled();
            }
        }
        let stuck: Vec<String> = self
            .devices
            .iter()
            .map(|d| {
                format!(
                    "{}: connected {} idle {} requests {} waiting {}",
                    d.profile.id,
                    d.connected,
                    d.idle(),
                    d.requests(),
                    d.waiting()
                )
            })
            .collect();
        let links: Vec<String> = self.links.values().map(|l| l.edge.state()).collect();
        Err(format!("it does not come to rest: {stuck:?} {links:?}"))
    }

    /// Everybody goes for good: nothing may be left.
    fn end(&mut self) -> Checked {
        trace!(self, "ends");
        for n in 0..self.devices.len() {
            if let Some(link) = self.devices[n].link {
                self.devices[n].lost();
                self.abandon(link, 0);
            }
            self.devices[n].profile.clean = true;
        }
        // Past expiry, will delay, linger and what is remembered of ended sessions.
        let until = self.now + u64::from(self.expiry_max) * 1000 + 300_000;
        while self.now < until {
            self.now += 5000;
            self.round()?;
        }
        for _ in 0..2000 {
            self.now += 50;
            self.round()?;
            if self.core.idle() && self.fetches.is_empty() && self.router.filters_on(0) == 0 {
                break;
            }
        }
        self.oracle.look(&self.router, self.now)?;
        self.oracle.inbound.wills_settled(self.now)?;
        self.core.forwarded.clear();
        let router = &self.router;
        let left = [
            (
                "sessions",
                router.totals().attached + router.totals().detached,
            ),
            ("bytes in queues", router.queue_used() as usize),
            ("bytes of output", router.output_used() as usize),
            ("publishes that wait", router.publishes_waiting()),
            (
                "bytes of publishes",
                router.limits.publish_account.used() as usize,
            ),
            ("filters", router.filters_on(0)),
            ("filters at the core", self.core.held.len()),
            (
                "bytes of retained messages",
                router.retained_bytes() as usize,
            ),
        ];
        for (what, count) in left {
            if count != 0 {
                trace!(self, "{router:#?}");
                return Err(format!("{count} {what} are left"));
            }
        }
        Ok(())
    }
}

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
        lazy: rng.chance(30),
    }
}
