//! The links of the simulation: bytes that take their time, connections that are lost.

use crate::time::Millis;
use std::collections::VecDeque;

use super::*;

/// Bytes on their way, in order.
#[derive(Default)]
pub(crate) struct Pipe(VecDeque<(u64, Vec<u8>)>);

impl Pipe {
    pub(crate) fn put(&mut self, bytes: Vec<u8>, at: u64) {
        if !bytes.is_empty() {
            let at = at.max(self.0.back().map_or(0, |(last, _)| *last));
            self.0.push_back((at, bytes));
        }
    }

    pub(crate) fn take(&mut self, now: Millis) -> Vec<u8> {
        let mut all = Vec::new();
        while self.0.front().is_some_and(|(at, _)| *at <= now) {
            all.extend(self.0.pop_front().into_iter().flat_map(|(_, bytes)| bytes));
        }
        all
    }
}

/// Where a publish begins that the core cannot bear. Links write whole packets.
fn poison_at(bytes: &[u8], version: Version, oracle: &Oracle) -> Option<usize> {
    let decoder = Decoder {
        version,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let mut at = 0;
    while let Ok(Some((packet, size))) = decoder.next(&bytes[at..]) {
        if let Packet::Publish(p) = packet {
            let number = String::from_utf8_lossy(p.payload).parse();
            if number.is_ok_and(|n| oracle.is_poison(n)) {
                return Some(at);
            }
        }
        at += size;
    }
    None
}

/// One link and its connection.
pub(crate) struct SimLink {
    pub(crate) name: String,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) data: bool,
    pub(crate) retained: bool,
    pub(crate) publishes: bool,
    pub(crate) version: Version,
    /// The core has a session of this process.
    pub(crate) begun: bool,
    /// A CONNECT was not answered.
    pub(crate) unanswered: bool,
    pub(crate) redial_at: u64,
    pub(crate) conn: Option<Conn>,
}

pub(crate) struct Conn {
    pub(crate) core: SteppedConnection,
    pub(crate) to_core: Pipe,
    pub(crate) to_us: Pipe,
    pub(crate) input: Vec<u8>,
    pub(crate) up: bool,
    pub(crate) pings: VecDeque<bool>,
}

impl World {
    pub(crate) fn dial(&mut self, n: usize) {
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

    pub(crate) fn upward(&mut self, n: usize) {
        let (now, later) = (self.now, self.latency());
        let Some(conn) = &mut self.links[n].conn else {
            return;
        };
        let mut bytes = conn.to_core.take(now);
        let poison = poison_at(&bytes, self.links[n].version, &self.oracle);
        bytes.truncate(poison.unwrap_or(bytes.len()));
        let Some(conn) = &mut self.links[n].conn else {
            return;
        };
        let mut out = Vec::new();
        let ended = self.core.feed(&mut conn.core, &bytes, &mut out);
        conn.to_us.put(out, later);
        if poison.is_some() {
            return self.lose_for(n, &LinkEnd::Closed);
        }
        if let Err(ended) = ended {
            if let Ended::Refused(reason) = &ended {
                self.oracle
                    .fault(format!("the core ended {}: {reason:?}", self.links[n].name));
            }
            self.lose(n);
        }
    }

    pub(crate) fn downward(&mut self, n: usize) {
        let (now, later) = (self.now, self.latency());
        let mut out = Vec::new();
        let is_away = |l: &SimLink| l.begun && !l.conn.as_ref().is_some_and(|c| c.up);
        let mut data = self.links.iter().filter(|l| l.name.starts_with('d'));
        let others_away = data.any(|l| l.name != self.links[n].name && is_away(l));
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
                    let first = !std::mem::replace(&mut link.begun, true);
                    let present = c.session_present && !link.retained;
                    let in_doubt = std::mem::take(&mut link.unanswered);
                    let session = match (present, in_doubt) {
                        (false, _) => LinkSession::New,
                        (true, true) => LinkSession::Doubtful,
                        (true, false) => LinkSession::Resumed,
                    };
                    self.profile.capabilities = Capabilities::of(link.version, &c);
                    let handshake = Handshake::new(session, &self.profile);
                    if self.tell {
                        eprintln!(
                            "{now:>7} {} is up, session kept {}",
                            link.name, c.session_present
                        );
                    }
                    self.router
                        .set_broker_features(&self.profile.features(), now);
                    // The core may have forgotten the others' sessions as well.
                    let forgotten = link.data && !first && !present;
                    let doubts = forgotten && others_away;
                    self.forgot |= forgotten;
                    if link.data && (session == LinkSession::Doubtful || doubts) {
                        self.oracle.in_doubt(now);
                    }
                    link.machine.connected(&handshake, now, &mut out);
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
                    if let (true, Packet::Publish(p)) = (self.tell, &other) {
                        let payload = String::from_utf8_lossy(p.payload);
                        let ids: Vec<u32> = p.subscription_ids().collect();
                        eprintln!(
                            "{now:>7} {} brings {payload} at {:?} for {ids:?}",
                            link.name, p.qos
                        );
                    }
                    if let Err(end) = link.machine.packet(&other, now, &mut out) {
                        self.oracle.fault(format!("{} ends: {end}", link.name));
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
    pub(crate) fn lose(&mut self, n: usize) {
        // A network's doing, not the core's: no publish is to blame.
        self.lose_for(n, &LinkEnd::KeepAlive);
    }

    /// The core ends a link's session, as an operator may have it do, or a short expiry.
    pub(crate) fn forget(&mut self, n: usize) {
        let Some(conn) = self.links[n].conn.as_ref().filter(|conn| conn.up) else {
            return;
        };
        self.core.forget(&conn.core);
        tell!(self, "{} is forgotten", self.links[n].name);
        self.oracle.forgets(self.now);
        self.lose(n);
    }

    fn lose_for(&mut self, n: usize, end: &LinkEnd) {
        let again = self.now + self.rng.between(20, 400);
        let link = &mut self.links[n];
        let Some(conn) = link.conn.take() else {
            return;
        };
        link.redial_at = again;
        link.unanswered |= !conn.up;
        self.core.drop_connection(&conn.core);
        if conn.up {
            link.machine.disconnected(end, self.now);
        }
        self.oracle.lost_link(self.now, link.publishes);
        if self.forgot && link.data {
            // It may have been dead already when the core forgot another.
            self.oracle.in_doubt(self.now);
        }
        tell!(self, "{} is lost", self.links[n].name);
    }

    pub(crate) fn restart_core(&mut self) {
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
}
