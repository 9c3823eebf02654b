//! One run: devices, lossy links, the real router, a model broker, a virtual clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tidegate::mqtt::{QoS, ReasonCode};
use tidegate::router::Router;
use tidegate::telemetry::{DisconnectReason, StreamReason};
use tidegate::time::Millis;
use tidegate::topics::FilterId;

use crate::broker::Broker;
use crate::device::{Device, Seen};
use crate::edge::{Edge, OWNER};
use crate::oracle::{Checked, Oracle};
use crate::pipe::Pipe;
use tidegate::streams::{StreamId, StreamSet};
use tidegate_kit::rng::Rng;

/// Steps in which a connection is read out.
const READ_OUT_TURNS: usize = 50;

/// A data stream between a device and the server.
#[derive(Default)]
pub(crate) struct Side {
    pub up: Pipe,
    pub down: Pipe,
    /// The device reads nothing of it.
    pub stalled: bool,
    /// The device has ended its direction; whether the server knows.
    pub ended: Option<bool>,
    /// The device has reset it: when the server learns of that.
    pub reset_at: Option<Millis>,
    /// The server has ended its direction too.
    pub finished: bool,
}

pub(crate) struct Link {
    /// The data streams.
    pub sides: BTreeMap<StreamId, Side>,
    pub up: Pipe,
    pub down: Pipe,
    pub edge: Edge,
    /// When the server's end learns that the link is cut.
    pub eof_at: Option<Millis>,
    /// The device reads nothing.
    pub stalled: bool,
}

pub(crate) struct Fetch {
    pub at: Millis,
    pub number: FilterId,
    pub filter: String,
    pub found: Option<VecDeque<(String, Vec<u8>, QoS)>>,
}

pub(crate) struct World {
    pub rng: Rng,
    pub now: Millis,
    pub router: Arc<Router>,
    pub broker: Broker,
    pub oracle: Oracle,
    pub devices: Vec<Device>,
    pub links: BTreeMap<u64, Box<Link>>,
    pub fetches: VecDeque<Fetch>,
    pub next_link: u64,
    pub sequence: Vec<u64>,
    pub events: u64,
    pub broker_back_at: Millis,
    pub trace: bool,
    pub quiet: bool,
    pub retained: bool,
    pub expiry_max: u32,
    pub forwarded: u64,
    pub ticked: Millis,
    /// Publish links that have come up.
    pub publish_links: usize,
    /// When the data link is back, and whether the broker kept its session.
    pub relinked_at: Millis,
    pub kept: bool,
    /// The filters that devices subscribe to.
    pub filters: &'static [&'static str],
    /// All sessions are in one shard.
    pub together: bool,
    /// Until then no device comes back.
    pub away_until: Millis,
    /// The most sessions that slept at a time.
    pub asleep: usize,
}

/// What a run saw, to show that runs are not empty.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub connects: u64,
    pub delivered: u64,
    pub forwarded: u64,
    /// The most sessions that slept at a time.
    pub asleep: u64,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, trace: bool) -> Result<Report, String> {
    let mut world = World::new(seed, trace);
    let steps = 50 + world.rng.below(250);
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
        forwarded: world.forwarded,
        asleep: world.asleep as u64,
    })
}

/// A line of the trace, if there is one.
macro_rules! trace {
    ($world:expr, $($what:tt)*) => {
        if $world.trace {
            crate::trace::line(format_args!("{:>8} {}", $world.now, format_args!($($what)*)));
        }
    };
}

pub(crate) use trace;

impl World {
    fn step(&mut self, act: bool) -> Checked {
        let forward = Duration::from_millis(match self.rng.below(20) {
            0..12 => self.rng.below(3),
            12..17 => self.rng.below(60),
            17..19 => self.rng.below(1000),
            _ if act => self.rng.below(20_000),
            _ => self.rng.below(1000),
        });
        let until = self.now + forward;
        // The devices' own timers, and the router's, do not wait for a long step's end.
        while self.now < until {
            self.now = until.min(self.now + Duration::from_millis(500));
            self.round()?;
        }
        if act {
            let device = self.rng.below(self.devices.len() as u64) as usize;
            self.act(device);
        }
        self.round()
    }

    /// Every part takes the steps that are due now.
    fn round(&mut self) -> Checked {
        if self.now >= self.ticked + Duration::from_millis(100) {
            self.tick();
        }
        self.devices_work()?;
        self.with_packets(Self::links_work)?;
        self.broker_works()?;
        self.with_packets(Self::edges_work)?;
        if self.oracle.rules.ends_full || self.rng.chance(5) {
            self.oracle.look(&self.router, self.now)?;
        }
        Ok(())
    }

    fn tick(&mut self) {
        self.ticked = self.now;
        let before = self.other_gaps();
        self.router.tick(self.now);
        let (now, hold) = (self.now, self.oracle.rules.hold);
        let due = self.oracle.clients.iter_mut().map(|c| {
            let due = c.ledger.asked_at.extract_if(.., |at| *at + hold <= now);
            due.count() as u64
        });
        let due = due.collect();
        self.excuse_gaps(&before, due);
        self.oracle.ticked(self.now);
        self.asleep = self.asleep.max(self.router.totals().asleep);
    }

    pub(crate) fn flush(&mut self, n: usize, acks: bool) {
        let Some(link) = self.devices[n].link else {
            return;
        };
        let output = self.devices[n].take_output(self.now, acks);
        if let Some(l) = self.links.get_mut(&link) {
            for (stream, bytes) in output {
                let pipe = match stream {
                    StreamId::CONTROL => &mut l.up,
                    n => &mut l.sides.entry(n).or_default().up,
                };
                pipe.send(bytes, &mut self.rng, self.now);
            }
        }
    }

    fn devices_work(&mut self) -> Checked {
        for n in 0..self.devices.len() {
            let p = &self.devices[n].profile;
            let (lazy, keep_alive) = (p.lazy, Duration::from_secs(p.keep_alive.into()));
            if self.devices[n].connected
                && !keep_alive.is_zero()
                && self.now >= self.devices[n].last_sent + keep_alive - Duration::from_millis(600)
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
                && (link.down.chunks.is_empty() && link.edge.has_sent_all()
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
        if link.edge.ended.is_none() && !link.edge.is_paused() && link.edge.unread.is_empty() {
            let bytes = link.up.receive(&mut self.rng, self.now);
            if link.edge.completes(&bytes) {
                // So that a session whose time has come is not there any more.
                self.tick();
                // Else its task does nothing until the bound has passed.
                if self.rng.chance(80) {
                    self.read_out(n)?;
                }
                // What the connection that is taken over was written is lost with it.
                for other in self.links.values_mut().filter(|l| l.edge.device == n) {
                    other.edge.peek(&self.router, &mut self.oracle, self.now)?;
                }
            }
            link.edge.receive(
                StreamId::CONTROL,
                &bytes,
                &self.router,
                &mut self.oracle,
                self.now,
            )?;
            if link.up.is_read(self.now) {
                link.edge.expire(&self.router, &mut self.oracle, self.now)?;
            }
        }
        self.sides_work(n, link)?;
        if link.eof_at.is_some_and(|at| at <= self.now) && link.edge.ended.is_none() {
            trace!(self, "link {number} of {n} ends");
            link.edge.eof(&self.router, &mut self.oracle, self.now)?;
        }
        let current = self.devices[n].link == Some(number);
        if !current {
            link.down.chunks.clear();
            link.sides
                .values_mut()
                .for_each(|s| s.down = Pipe::default());
            link.edge.output.clear();
        } else if !link.stalled || self.quiet {
            let bytes = link.down.receive(&mut self.rng, self.now);
            let device = &mut self.devices[n];
            device
                .receive(StreamId::CONTROL, &bytes, &mut self.rng)
                .map_err(|e| format!("device {n}: {e}"))?;
            for (stream, side) in &mut link.sides {
                if device.connected && !side.stalled && side.reset_at.is_none() {
                    let bytes = side.down.receive(&mut self.rng, self.now);
                    device
                        .receive(*stream, &bytes, &mut self.rng)
                        .map_err(|e| format!("device {n}, stream {stream}: {e}"))?;
                }
            }
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
                    self.dismissed(n, reason, link.edge.ended)?;
                    self.devices[n].lost();
                    break;
                }
            }
        }
        Ok(())
    }

    /// The connection that a device's CONNECT is about to take over reads everything that has arrived.
    fn read_out(&mut self, n: usize) -> Checked {
        let key = self.devices[n].profile.id.as_str().into();
        if self.router.predecessor(&key, OWNER, None).is_none() {
            return Ok(());
        }
        let mut links = self.links.iter();
        let asked = links.find(|(_, l)| l.edge.device == n && l.edge.is_to_be_read_out());
        let number = asked.map(|(number, _)| *number);
        let number = number.ok_or("no connection is asked to read what has arrived")?;
        let mut link = self.links.remove(&number).ok_or("it was found")?;
        trace!(self, "link {number} of {n} is read out");
        self.sides_work(n, &mut link)?;
        for _ in 0..READ_OUT_TURNS {
            if link.edge.is_paused() {
                // Perhaps only until the next turn.
                let room = StreamSet::EMPTY;
                link.edge
                    .poll(room, &self.router, &mut self.oracle, self.now)?;
            } else if link.edge.is_open() && !link.up.is_read(self.now) {
                let bytes = link.up.receive(&mut self.rng, self.now);
                link.edge.receive(
                    StreamId::CONTROL,
                    &bytes,
                    &self.router,
                    &mut self.oracle,
                    self.now,
                )?;
            }
        }
        if link.eof_at.is_some_and(|at| at <= self.now) && !link.edge.is_paused() {
            link.edge.eof(&self.router, &mut self.oracle, self.now)?;
        }
        self.links.insert(number, link);
        Ok(())
    }

    /// The data streams of a connection, which keep no order with each other.
    fn sides_work(&mut self, n: usize, link: &mut Link) -> Checked {
        let current = self.devices[n].link == Some(link.edge.link);
        let numbers: Vec<StreamId> = link.sides.keys().copied().collect();
        for number in numbers {
            let Some(side) = link.sides.get_mut(&number) else {
                continue;
            };
            let readable = link.edge.is_open()
                && !link.edge.is_paused()
                && !link.edge.unread.contains(number)
                && side.reset_at.is_none();
            if readable && side.ended != Some(true) {
                let bytes = side.up.receive(&mut self.rng, self.now);
                link.edge
                    .receive(number, &bytes, &self.router, &mut self.oracle, self.now)?;
                if side.ended == Some(false) && side.up.chunks.is_empty() && link.edge.is_open() {
                    side.ended = Some(true);
                    link.edge
                        .stream_closed(number, &self.router, &mut self.oracle, self.now)?;
                }
            }
            let gone = side.reset_at.is_some_and(|at| at <= self.now);
            if gone {
                link.edge
                    .stream_ended(number, &self.router, &mut self.oracle, self.now)?;
            }
            let finished = side.finished && side.down.chunks.is_empty();
            if gone || finished {
                link.sides.remove(&number);
                if current {
                    trace!(self, "stream {number} of {n} is gone");
                    self.devices[n].stream_gone(number, &mut self.rng);
                }
            }
        }
        for number in std::mem::take(&mut link.edge.finished) {
            link.sides.entry(number).or_default().finished = true;
        }
        for reset in std::mem::take(&mut link.edge.resets) {
            let stream = reset.stream;
            if reset.reason != StreamReason::WriteStall {
                return Err(format!("a stream is reset: {reset:?}"));
            }
            trace!(self, "the server resets stream {stream} of {n}");
            link.sides.remove(&stream);
            if current {
                self.devices[n].stream_gone(stream, &mut self.rng);
            }
        }
        Ok(())
    }

    /// A DISCONNECT of the server is for a reason that this run has.
    fn dismissed(&self, n: usize, reason: ReasonCode, ended: Option<DisconnectReason>) -> Checked {
        let fine = match reason {
            ReasonCode::QUOTA_EXCEEDED => {
                let late = ended == Some(DisconnectReason::PacketDeadline);
                late || self.oracle.rules.ends_full || self.oracle.rules.evicts
            }
            // Its own earlier CONNECT came late, and took the session away.
            ReasonCode::SESSION_TAKEN_OVER => {
                self.oracle.clients[n].attached != self.devices[n].link
            }
            // Its end of the link judges whether it was time.
            ReasonCode::KEEP_ALIVE_TIMEOUT => self.devices[n].profile.keep_alive > 0,
            _ => false,
        };
        match fine {
            true => Ok(()),
            false => Err(format!("device {n} is sent away: {reason:?}")),
        }
    }

    fn edges_work(&mut self) -> Checked {
        for link in self.links.values_mut() {
            // A socket takes only so much.
            let full = |pipe: &Pipe| pipe.bytes >= 2000 && !self.quiet;
            let mut room = StreamSet::ALL;
            if full(&link.down) {
                room = room.without(StreamId::CONTROL);
            }
            for (stream, _) in link.sides.iter().filter(|(_, side)| full(&side.down)) {
                room = room.without(*stream);
            }
            link.edge
                .poll(room, &self.router, &mut self.oracle, self.now)?;
            for (stream, bytes) in std::mem::take(&mut link.edge.output) {
                let pipe = match stream {
                    StreamId::CONTROL => &mut link.down,
                    n => &mut link.sides.entry(n).or_default().down,
                };
                pipe.send(bytes, &mut self.rng, self.now);
            }
        }
        Ok(())
    }

    /// Nothing new happens; who keeps a session comes back, and all comes to rest.
    fn settle(&mut self) -> Checked {
        trace!(self, "settles");
        self.quiet = true;
        self.broker_back_at = Millis::ZERO;
        self.relinked_at = Millis::ZERO;
        for link in self.links.values_mut() {
            link.stalled = false;
            link.sides.values_mut().for_each(|s| s.stalled = false);
        }
        // A device that has stopped in the middle of a packet sends nothing more.
        for n in 0..self.devices.len() {
            let link = self.devices[n].link.and_then(|l| self.links.get(&l));
            if link.is_some_and(|l| l.up.stopped) {
                self.cut(n);
            }
        }
        let mut calm = 0;
        for _ in 0..5000 {
            self.step(false)?;
            let still = self.broker.idle()
                && self.fetches.is_empty()
                && self.router.publishes_waiting() == 0
                && self
                    .devices
                    .iter()
                    .all(|d| d.link.is_none() || d.connected && d.idle() && d.requests() == 0)
                && self.links.values().all(|l| {
                    let mut sides = l.sides.values();
                    let empty = |s: &Side| s.up.chunks.is_empty() && s.down.chunks.is_empty();
                    l.up.chunks.is_empty()
                        && l.down.chunks.is_empty()
                        && l.edge.has_sent_all()
                        && sides.all(empty)
                })
                && (0..self.devices.len())
                    .all(|n| self.devices[n].link.is_some() || !self.wants_back(n));
            calm = if still { calm + 1 } else { 0 };
            if calm > 30 {
                self.oracle.look(&self.router, self.now)?;
                let links: Vec<Option<u64>> = self.devices.iter().map(|d| d.link).collect();
                self.oracle.settled(&self.router, &links, self.now)?;
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
                self.abandon(link, Duration::ZERO);
            }
            self.devices[n].profile.clean = true;
        }
        // Past expiry, will delay, linger and the memory of ended sessions.
        let until = self.now + Duration::from_secs(u64::from(self.expiry_max) + 300);
        while self.now < until {
            self.now += Duration::from_secs(5);
            self.round()?;
        }
        for _ in 0..2000 {
            self.now += Duration::from_millis(50);
            self.round()?;
            if self.broker.idle() && self.fetches.is_empty() && self.router.filters_on(0) == 0 {
                break;
            }
        }
        self.oracle.look(&self.router, self.now)?;
        self.oracle.inbound.wills_settled(self.now)?;
        let router = &self.router;
        let left = [
            (
                "sessions",
                router.totals().attached + router.totals().detached,
            ),
            ("bytes in queues", router.queue_used() as usize),
            (
                "bytes of sessions and filters",
                router.session_bytes() as usize,
            ),
            ("bytes of output", router.output_used() as usize),
            ("publishes that wait", router.publishes_waiting()),
            (
                "bytes of publishes",
                router.limits().publish_account.used() as usize,
            ),
            ("filters", router.filters_on(0)),
            ("filters at the broker", self.broker.held.len()),
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
