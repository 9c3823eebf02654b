//! A simulation of the whole: clients, the router, links of every role, and a core with the faults
//! of real ones, on a virtual clock. Links are lost, the core restarts, clients flap; an oracle that
//! knows only what clients and core were told judges what each client got.
//!
//! `TIDEGATE_SEEDS` many seeds from `TIDEGATE_FIRST_SEED` on; `SEED=7` replays one and tells it.

mod oracle;
#[path = "../../tests/sim/rng.rs"]
mod rng;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::config::Habit;
use crate::mqtt::{
    AckKind, Connect, Decoder, Packet, Properties, Publish, QoS, ReasonCode, Receiver,
    SubscribeOptions, Version, encode_ack, encode_pingreq, encode_subscribe, encode_unsubscribe,
};
use crate::router::wake::Wake;
use crate::router::{Connected, CoreFacts, Place, Router, RouterConfig};
use crate::session::{ConnectionSpec, Effect, Policy};
use crate::telemetry::LinkDownReason;
use crate::upstream::embedded::EmbeddedOptions;
use crate::upstream::embedded::stepped::{Ended, SteppedConn, SteppedCore};
use crate::upstream::testing::{PROBES, config, facts, router_of};

use super::data::Data;
use super::fetch::Fetch;
use super::machine::{LinkEnd, Machine, Up};
use super::publish::Publisher;
use oracle::{Got, Oracle};
use rng::Rng;

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
const CORES: [&[Habit]; 12] = [
    &[],
    &[Habit::One],
    &[Habit::LowestQos],
    &[Habit::NoIds],
    &[Habit::NoIds, Habit::One],
    &[Habit::Dup0],
    &[Habit::SmallWindow],
    &[Habit::DeadShared],
    &[Habit::NoRap],
    &[Habit::V311],
    &[Habit::V311, Habit::TwoQueues],
    &[Habit::LateRetained, Habit::SmallWindow, Habit::Dup0],
];
const ROOTS: [&[&str]; 3] = [&[], &["a/#"], &["c/#", "+/b"]];

/// Bytes on their way, in order.
#[derive(Default)]
struct Pipe(VecDeque<(u64, Vec<u8>)>);

impl Pipe {
    fn put(&mut self, bytes: Vec<u8>, at: u64) {
        if !bytes.is_empty() {
            let at = at.max(self.0.back().map_or(0, |(last, _)| *last));
            self.0.push_back((at, bytes));
        }
    }

    fn take(&mut self, now: u64) -> Vec<u8> {
        let mut all = Vec::new();
        while self.0.front().is_some_and(|(at, _)| *at <= now) {
            all.extend(self.0.pop_front().into_iter().flat_map(|(_, bytes)| bytes));
        }
        all
    }
}

/// One link and its connection.
struct SimLink {
    name: String,
    machine: Box<dyn Machine>,
    data: bool,
    retained: bool,
    publishes: bool,
    version: Version,
    /// The core has a session of this process.
    begun: bool,
    /// A CONNECT was not answered.
    unanswered: bool,
    redial_at: u64,
    conn: Option<Conn>,
}

struct Conn {
    core: SteppedConn,
    to_core: Pipe,
    to_us: Pipe,
    input: Vec<u8>,
    up: bool,
    pings: VecDeque<bool>,
}

struct Device {
    id: String,
    at: Option<Connected>,
    last_id: u16,
    /// PUBLISH packets of its own that are not done: identifier, number, QoS.
    open: Vec<(u16, u32, QoS)>,
    asked: Vec<(u16, Vec<(String, SubscribeOptions)>)>,
}

struct Open;

impl Policy for Open {
    fn may_publish(&self, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str) -> bool {
        true
    }
}

struct World {
    now: u64,
    rng: Rng,
    tell: bool,
    router: Arc<Router>,
    core: SteppedCore,
    core_back_at: Option<(u64, bool)>,
    named: bool,
    facts: CoreFacts,
    links: Vec<SimLink>,
    devices: Vec<Device>,
    oracle: Oracle,
    number: u32,
    /// Links are lost and the core restarts.
    stormy: bool,
}

macro_rules! tell {
    ($world:expr, $($what:tt)*) => {
        if $world.tell {
            eprintln!("{:>7} {}", $world.now, format!($($what)*));
        }
    };
}

impl World {
    fn new(seed: u64, tell: bool) -> Self {
        let mut rng = Rng::new(seed);
        let habits = rng.pick(&CORES);
        let roots = if rng.chance(30) {
            rng.pick(&ROOTS)
        } else {
            &[]
        };
        let data_links = rng.between(1, 4) as usize;
        let publish_links = rng.between(1, 2) as usize;
        let has = |habit: Habit| habits.contains(&habit);
        let dead = has(Habit::DeadShared);
        let local_groups = dead && rng.chance(50);
        let v5 = !has(Habit::V311);
        let named = v5 && !has(Habit::NoIds);
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
        let facts = CoreFacts {
            identifiers: named,
            properties: v5,
            keeps_retain: v5 && !has(Habit::NoRap),
            shared: !dead,
            replaces: !has(Habit::TwoQueues),
            ..facts()
        };
        let version = if v5 { Version::V5 } else { Version::V311 };
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
            let machine = Data::new(router.clone(), n, 1, PROBES.into());
            let name = if n < data_links {
                format!("d{n}")
            } else {
                "s0".into()
            };
            add(name, Box::new(machine));
        }
        for n in 0..publish_links {
            let machine = Publisher::new(router.clone(), n, 1);
            add(format!("p{n}"), Box::new(machine));
        }
        add(
            "r0".into(),
            Box::new(Fetch::new(router.clone(), PROBES.into())),
        );
        let stormy = rng.chance(70);
        let devices = (0..4).map(|n| Device {
            id: format!("device-{n}"),
            at: None,
            last_id: 0,
            open: Vec::new(),
            asked: Vec::new(),
        });
        let devices: Vec<Device> = devices.collect();
        if tell {
            eprintln!(
                "{habits:?} roots {roots:?} {data_links} data links, {publish_links} publish links, local groups {local_groups}, stormy {stormy}"
            );
        }
        Self {
            now: 0,
            oracle: Oracle::new(devices.len(), stormy, data_links, has(Habit::LowestQos)),
            rng,
            tell,
            router,
            core: SteppedCore::new(EmbeddedOptions::with_habits(habits)),
            core_back_at: None,
            named,
            facts,
            links,
            devices,
            number: 0,
            stormy,
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        let now = self.now;
        self.core.at(now);
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

    fn dial(&mut self, n: usize) {
        let link = &mut self.links[n];
        if link.conn.is_some() || link.redial_at > self.now || self.core_back_at.is_some() {
            return;
        }
        let Some(core) = self.core.connect() else {
            return;
        };
        let mut bytes = Vec::new();
        let kept = !link.retained;
        Connect {
            version: link.version,
            clean_start: link.retained || !link.begun,
            client_id: &format!("edge-{}", link.name),
            session_expiry: kept.then_some(3600),
            receive_maximum: Some(u16::MAX),
            ..Connect::default()
        }
        .encode(&mut bytes);
        // As a process begins each link, with a session that it may keep.
        let clean_v3 = link.version < Version::V5 && !link.begun && kept;
        if clean_v3 {
            bytes.clear();
            Connect {
                version: link.version,
                clean_start: false,
                client_id: &format!("edge-{}", link.name),
                ..Connect::default()
            }
            .encode(&mut bytes);
        }
        let mut to_core = Pipe::default();
        to_core.put(bytes, self.now);
        link.conn = Some(Conn {
            core,
            to_core,
            to_us: Pipe::default(),
            input: Vec::new(),
            up: false,
            pings: VecDeque::new(),
        });
    }

    fn upward(&mut self, n: usize) {
        let (now, later) = (self.now, self.latency());
        let Some(conn) = &mut self.links[n].conn else {
            return;
        };
        let bytes = conn.to_core.take(now);
        let mut out = Vec::new();
        let ended = self.core.feed(&mut conn.core, &bytes, &mut out);
        conn.to_us.put(out, later);
        if let Err(ended) = ended {
            if let Ended::Refused(why) = &ended {
                self.oracle
                    .fault(format!("the core ended {}: {why}", self.links[n].name));
            }
            self.lose(n);
        }
    }

    fn downward(&mut self, n: usize) {
        let (now, later) = (self.now, self.latency());
        let mut out = Vec::new();
        let link = &mut self.links[n];
        let Some(conn) = &mut link.conn else {
            return;
        };
        conn.input.extend(conn.to_us.take(now));
        let decoder = Decoder {
            version: link.version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut used = 0;
        let mut some = false;
        while let Ok(Some((packet, size))) = decoder.next(&conn.input[used..]) {
            used += size;
            some = true;
            match packet {
                Packet::Connack(c) => {
                    assert!(!c.reason.is_error(), "{:?}", c.reason);
                    conn.up = true;
                    link.begun = true;
                    let up = Up {
                        version: link.version,
                        session_present: c.session_present && !link.retained,
                        doubtful: std::mem::take(&mut link.unanswered) && c.session_present,
                        receive_maximum: match link.version {
                            Version::V5 => c.receive_maximum.unwrap_or(u16::MAX),
                            _ => 20,
                        },
                        packet_max: u32::MAX,
                        identifiers: self.named,
                        keeps_retain: self.facts.keeps_retain,
                    };
                    self.router.core_facts(&self.facts, now);
                    if link.data && up.doubtful {
                        self.oracle.in_doubt(now);
                    }
                    link.machine.up(&up, now, &mut out);
                }
                Packet::Pingresp => {
                    if conn.pings.pop_front() == Some(true) {
                        link.machine.ping_answered(now);
                    }
                }
                Packet::Disconnect(d) => {
                    self.oracle
                        .fault(format!("DISCONNECT {:?} on {}", d.reason, link.name));
                }
                other => {
                    if let Err(end) = link.machine.packet(&other, now, &mut out) {
                        self.oracle
                            .fault(format!("{} ends: {}", link.name, end.why));
                    }
                }
            }
        }
        conn.input.drain(..used);
        if conn.up {
            if some {
                link.machine.batch_ended(now, &mut out);
            }
            link.machine.poll(now, &mut out);
            if link.machine.wants_ping() {
                encode_pingreq(&mut out);
                conn.pings.push_back(true);
            }
        }
        conn.to_core.put(out, later);
    }

    /// The connection of a link is lost, with what was on its way.
    fn lose(&mut self, n: usize) {
        let again = self.now + self.rng.between(20, 400);
        let link = &mut self.links[n];
        let Some(conn) = link.conn.take() else {
            return;
        };
        link.redial_at = again;
        link.unanswered |= !conn.up;
        self.core.drop_conn(&conn.core);
        if conn.up {
            // A network's doing, not the core's: no publish is to blame.
            let end = LinkEnd {
                reason: LinkDownReason::KeepAlive,
                ..LinkEnd::closed()
            };
            link.machine.down(&end, self.now);
        }
        self.oracle.lost_link(self.now, link.data, link.publishes);
        tell!(self, "{} is lost", self.links[n].name);
    }

    fn restart_core(&mut self) {
        let keep = self.rng.chance(60);
        let back = self.now + self.rng.between(50, 800);
        tell!(self, "the core ends, and will keep its sessions: {keep}");
        self.core.stop();
        for n in 0..self.links.len() {
            self.lose(n);
        }
        self.core_back_at = Some((back, keep));
        self.oracle.restarted(self.now, keep);
    }

    fn connect(&mut self, n: usize) {
        let device = &mut self.devices[n];
        let connect = crate::router::Connect {
            client_id: device.id.as_str().into(),
            principal: "anonymous".into(),
            clean_start: false,
            expiry: u32::MAX,
            spec: ConnectionSpec {
                version: Version::V5,
                receive_maximum: u16::MAX,
                maximum_packet_size: u32::MAX,
                topic_alias_maximum: 0,
                problem_information: true,
                keep_alive: 0,
                scope: None,
            },
            will: None,
            wake: Arc::new(Wake::default()),
            origin: Arc::new(Place {
                listener: "test".into(),
                transport: "tcp",
                websocket: false,
                peer: ([127, 0, 0, 1], 1).into(),
            }),
        };
        let connected = self.router.connect(connect, self.now, |_, _| {});
        let connected = connected.expect("nobody else has the identifier");
        device.at = Some(connected);
        // Answers to what it asked on the last connection do not come any more.
        let asked = std::mem::take(&mut device.asked);
        let open = std::mem::take(&mut device.open);
        self.oracle.connected(n, asked, &open, self.now);
        tell!(self, "{n} connects");
        // What was not acknowledged is sent again [MQTT-4.4.0-1].
        for (id, number, qos) in open {
            self.devices[n].open.push((id, number, qos));
            let topic = self.oracle.topic_of(number);
            self.send_publish(n, id, number, qos, topic, true);
        }
    }

    fn cut(&mut self, n: usize) {
        if let Some(at) = self.devices[n].at.take() {
            self.router
                .disconnected(at.session, at.generation, false, self.now);
            self.oracle.cut(n, self.now);
            tell!(self, "{n} is cut");
        }
    }

    fn send(&mut self, n: usize, bytes: &[u8]) {
        let Some(at) = self.devices[n].at else {
            return;
        };
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Server,
            max: u32::MAX,
        };
        let (packet, _) = decoder.next(bytes).expect("legal").expect("whole");
        let (now, mut effects) = (self.now, Vec::new());
        self.router
            .feed(
                at.session,
                at.generation,
                &mut effects,
                |session, limits, effects| {
                    session
                        .packet(0, &packet, limits, &Open, now, effects)
                        .expect("it is allowed");
                },
            )
            .expect("it is connected");
        for effect in effects {
            match effect {
                Effect::Subscribe {
                    packet_id,
                    identifier,
                    wanted,
                } => self.router.subscribe(
                    at.session,
                    at.generation,
                    packet_id,
                    identifier,
                    &wanted,
                    now,
                ),
                Effect::Unsubscribe { filters } => {
                    self.router.unsubscribe(at.session, &filters, now);
                }
                Effect::Publish { .. } => {
                    self.router
                        .publish(at.session, at.publish_link, effect, now);
                }
            }
        }
    }

    fn next_id(&mut self, n: usize) -> u16 {
        let device = &mut self.devices[n];
        device.last_id = device.last_id.checked_add(1).unwrap_or(1);
        device.last_id
    }

    fn subscribe(&mut self, n: usize) {
        let id = self.next_id(n);
        let mut filters = Vec::new();
        for _ in 0..self.rng.between(1, 2) {
            let filter = self.rng.pick(&FILTERS);
            if filters.iter().any(|(f, _): &(String, _)| f == filter) {
                continue;
            }
            let shared = filter.starts_with("$share");
            let options = SubscribeOptions {
                qos: self
                    .rng
                    .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]),
                no_local: !shared && self.facts.properties && self.rng.chance(15),
                retain_as_published: false,
                retain_handling: 2,
            };
            filters.push((filter.to_owned(), options));
        }
        let mut bytes = Vec::new();
        let all = filters.iter().map(|(f, o)| (f.as_str(), *o));
        encode_subscribe(Version::V5, id, None, all, &mut bytes);
        tell!(
            self,
            "{n} subscribes {:?}",
            filters.iter().map(|(f, o)| (f, o.qos)).collect::<Vec<_>>()
        );
        self.oracle.asks(n, &filters, self.now);
        self.devices[n].asked.push((id, filters));
        self.send(n, &bytes);
    }

    fn unsubscribe(&mut self, n: usize) {
        let Some(filter) = self.oracle.any_filter(n, &mut self.rng) else {
            return;
        };
        // One that waits for its answer would be answered after it.
        if self.devices[n]
            .asked
            .iter()
            .any(|(_, f)| f.iter().any(|(f, _)| *f == filter))
        {
            return;
        }
        let id = self.next_id(n);
        let mut bytes = Vec::new();
        encode_unsubscribe(
            Version::V5,
            id,
            std::iter::once(filter.as_str()),
            &mut bytes,
        );
        tell!(self, "{n} unsubscribes {filter}");
        self.oracle.leaves(n, &filter, self.now);
        self.send(n, &bytes);
    }

    fn publish(&mut self, n: usize) {
        let topic = self.rng.pick(&TOPICS);
        let qos = self
            .rng
            .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]);
        self.number += 1;
        let number = self.number;
        let id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.next_id(n),
        };
        self.oracle.published(n, number, topic, qos, self.now);
        if qos > QoS::AtMostOnce {
            self.devices[n].open.push((id, number, qos));
        }
        tell!(self, "{n} publishes {number} on {topic} at {qos:?}");
        self.send_publish(n, id, number, qos, topic, false);
    }

    fn send_publish(&mut self, n: usize, id: u16, number: u32, qos: QoS, topic: &str, dup: bool) {
        let payload = number.to_string();
        let message = crate::mqtt::Message::new(&crate::mqtt::MessageSpec {
            topic,
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos,
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        });
        let mut bytes = Vec::new();
        crate::mqtt::Delivery {
            version: Version::V5,
            dup,
            qos,
            retain: false,
            packet_id: id,
            alias: crate::mqtt::Alias::None,
            message_expiry: None,
            subscription_ids: &[],
            user_property: None,
            hidden: 0,
        }
        .encode(&message, &mut bytes);
        self.send(n, &bytes);
    }

    /// What a device was written.
    fn read(&mut self, n: usize) {
        let Some(at) = self.devices[n].at else {
            return;
        };
        let mut out = Vec::new();
        self.router
            .take_output(at.session, at.generation, &mut out, self.now);
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut used = 0;
        let mut answers = Vec::new();
        while let Some((packet, size)) = decoder.next(&out[used..]).expect("legal") {
            used += size;
            match packet {
                Packet::Publish(p) => self.got(n, &p, &mut answers),
                Packet::Pubrel(a) => answers.push((AckKind::Pubcomp, a.packet_id)),
                Packet::Pubrec(a) => {
                    self.done(n, a.packet_id, a.reason);
                    if !a.reason.is_error() {
                        answers.push((AckKind::Pubrel, a.packet_id));
                    }
                }
                Packet::Puback(a) => self.done(n, a.packet_id, a.reason),
                Packet::Suback(s) => {
                    let asked = &mut self.devices[n].asked;
                    let Some(at) = asked.iter().position(|(id, _)| *id == s.packet_id) else {
                        continue;
                    };
                    let (_, filters) = asked.remove(at);
                    tell!(
                        self,
                        "{n} is granted {:?} {:?}",
                        filters.iter().map(|f| &f.0).collect::<Vec<_>>(),
                        s.codes
                    );
                    for ((filter, options), code) in filters.iter().zip(s.codes) {
                        self.oracle.granted(n, filter, options, *code, self.now);
                    }
                }
                _ => {}
            }
        }
        for (kind, id) in answers {
            let mut bytes = Vec::new();
            encode_ack(Version::V5, kind, id, ReasonCode::SUCCESS, None, &mut bytes);
            self.send(n, &bytes);
        }
    }

    fn got(&mut self, n: usize, p: &Publish<'_>, answers: &mut Vec<(AckKind, u16)>) {
        let text = String::from_utf8_lossy(p.payload);
        let number: u32 = text.parse().expect("a number of ours");
        tell!(
            self,
            "{n} gets {number} at {:?}{}",
            p.qos,
            if p.dup { " dup" } else { "" }
        );
        let got = Got {
            number,
            qos: p.qos,
            at: self.now,
        };
        self.oracle.got(n, p.topic, got);
        match p.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => answers.push((AckKind::Puback, p.packet_id)),
            QoS::ExactlyOnce => answers.push((AckKind::Pubrec, p.packet_id)),
        }
    }

    fn done(&mut self, n: usize, id: u16, reason: ReasonCode) {
        let open = &mut self.devices[n].open;
        let Some(at) = open.iter().position(|(known, _, _)| *known == id) else {
            return;
        };
        let (_, number, _) = open.remove(at);
        self.oracle.acknowledged(number, reason, self.now);
    }

    fn act(&mut self) {
        let n = self.rng.below(self.devices.len() as u64) as usize;
        let connected = self.devices[n].at.is_some();
        match self.rng.below(100) {
            0..=39 if !connected => self.connect(n),
            _ if !connected => {}
            0..=54 => self.publish(n),
            55..=74 => self.subscribe(n),
            75..=82 => self.unsubscribe(n),
            83..=90 => self.cut(n),
            91..=97 if self.stormy => {
                let link = self.rng.below(self.links.len() as u64) as usize;
                self.lose(link);
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
            if self.devices[n].at.is_none() {
                self.connect(n);
            }
        }
        for _ in 0..800 {
            self.step();
        }
        self.oracle.settle(self.now);
        self.at_core();
        match self.oracle.first_fault() {
            Some(fault) => Err(format!("at rest: {fault}")),
            None => Ok(()),
        }
    }

    /// I12, I13, I18: each filter that a client holds is at the core once, or its root is.
    fn at_core(&mut self) {
        let held = self.core.subscriptions();
        let roots = &[] as &[String];
        let _ = roots;
        for filter in self.oracle.filters() {
            let plain = crate::mqtt::split_shared(&filter).map_or(&*filter, |(_, f)| f);
            let covers = |name: &String| crate::mqtt::covers(name, plain) || *name == filter;
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
        if self.named {
            return;
        }
        for (link, names) in held.iter().filter(|(link, _)| !link.contains("-r")) {
            for (at, a) in names.iter().enumerate() {
                let plain = |f: &String| {
                    crate::mqtt::split_shared(f).map_or(f.clone(), |(_, f)| f.to_owned())
                };
                if let Some(b) = names[..at]
                    .iter()
                    .find(|b| crate::mqtt::overlaps(&plain(a), &plain(b)))
                {
                    self.oracle.fault(format!("{a} and {b} are both on {link}"));
                }
            }
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
