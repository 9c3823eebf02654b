//! The links of the simulation: bytes that take their time, connections that are lost.

use crate::time::Millis;

use super::*;
use crate::mqtt::encode_disconnect;

/// Bytes on their way, in order.
#[derive(Default)]
pub(crate) struct Pipe(VecDeque<(Millis, Vec<u8>)>);

impl Pipe {
    pub(crate) fn put(&mut self, bytes: Vec<u8>, at: Millis) {
        if !bytes.is_empty() {
            let at = at.max(self.0.back().map_or(Millis::ZERO, |(last, _)| *last));
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

/// Where a poison publish begins, for which the broker closes the connection. Links write whole
/// packets.
pub(crate) fn poison_at(bytes: &[u8], version: Version, oracle: &Oracle) -> Option<usize> {
    let decoder = Decoder {
        version,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let mut at = 0;
    while let Ok(Some((packet, size))) = decoder.next(&bytes[at..]) {
        if let Packet::Publish(p) = packet
            && number_of(p.payload).is_some_and(|n| oracle.is_poison(n))
        {
            return Some(at);
        }
        at += size;
    }
    None
}

/// The packets of a first connection, which ends the session of an earlier process.
pub(crate) fn clearing(version: Version, client_id: &str, out: &mut Vec<u8>) {
    Connect {
        version,
        clean_start: true,
        client_id,
        ..Connect::default()
    }
    .encode(out);
    encode_disconnect(version, ReasonCode::SUCCESS, None, None, out);
}

/// One link and its connection.
pub(crate) struct SimLink {
    pub(crate) name: String,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) data: bool,
    pub(crate) retained: bool,
    pub(crate) publishes: bool,
    /// The router's number of a link that is dialled once it has filters.
    pub(crate) waits: Option<usize>,
    pub(crate) version: Version,
    /// The router's number of a link that has filters.
    pub(crate) number: Option<usize>,
    /// The broker has had a session of this link that the node knows.
    pub(crate) begun: bool,
    /// That was an earlier process, and this one has not connected it.
    pub(crate) restored: bool,
    /// The disk was asked to note that the link is about to connect.
    pub(crate) announced: bool,
    /// An earlier process may have left a session of this link at the broker, which is to end.
    pub(crate) clears: bool,
    /// A CONNECT has not been answered.
    pub(crate) unanswered: bool,
    pub(crate) redial_at: Millis,
    pub(crate) conn: Option<Conn>,
}

pub(crate) struct Conn {
    pub(crate) broker: SteppedConnection,
    pub(crate) to_broker: Pipe,
    pub(crate) to_link: Pipe,
    pub(crate) input: Vec<u8>,
    pub(crate) up: bool,
    pub(crate) pings: VecDeque<bool>,
}

impl World {
    pub(crate) fn dial(&mut self, n: usize) {
        let link = &mut self.links[n];
        if link.conn.is_some() || link.redial_at > self.now || self.broker_back_at.is_some() {
            return;
        }
        let waits = |n| !self.router.filter_link_wanted(n);
        if (!link.begun || link.restored) && link.waits.is_some_and(waits) {
            return;
        }
        if let Some(number) = link.number.filter(|_| self.store.is_some()) {
            if !std::mem::replace(&mut link.announced, true) {
                let client_id = format!("edge-{}", link.name);
                self.router
                    .link_connects(number, !link.begun, &client_id, "broker");
            }
            if !self.router.may_connect(number) {
                return;
            }
            link.announced = false;
        }
        let Some(broker) = self.broker.connect() else {
            return;
        };
        let mut bytes = Vec::new();
        if std::mem::take(&mut link.clears)
            && !link.begun
            && let Some(mut first) = self.broker.connect()
        {
            clearing(link.version, &format!("edge-{}", link.name), &mut bytes);
            // It ends, and with it the session.
            let _ = self.broker.feed(&mut first, &bytes, &mut Vec::new());
            self.broker.drop_connection(&first);
            bytes.clear();
        }
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
        // In 3.1.1 a session that is kept begins with Clean Session 0.
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
        let mut to_broker = Pipe::default();
        to_broker.put(bytes, self.now);
        link.conn = Some(Conn {
            broker,
            to_broker,
            to_link: Pipe::default(),
            input: Vec::new(),
            up: false,
            pings: VecDeque::new(),
        });
    }

    /// Bytes of a link reach the broker, and it answers.
    pub(crate) fn broker_reads(&mut self, n: usize) {
        let (now, later) = (self.now, self.arrival());
        let link = &mut self.links[n];
        let Some(conn) = &mut link.conn else {
            return;
        };
        let mut bytes = conn.to_broker.take(now);
        let poison = poison_at(&bytes, link.version, &self.oracle);
        bytes.truncate(poison.unwrap_or(bytes.len()));
        let mut out = Vec::new();
        let ended = self.broker.feed(&mut conn.broker, &bytes, &mut out);
        self.trace.bytes(now, "broker", &link.name, &out);
        conn.to_link.put(out, later);
        if poison.is_some() {
            return self.lose_for(n, &LinkEnd::Closed);
        }
        if let Err(ended) = ended {
            if let Ended::Refused(reason) = &ended {
                self.oracle.fault(format!(
                    "the broker ended {}: {reason:?}",
                    self.links[n].name
                ));
            }
            self.lose(n);
        }
    }

    /// Bytes of the broker reach a link, and its machine answers.
    pub(crate) fn link_reads(&mut self, n: usize) {
        let (now, later) = (self.now, self.arrival());
        let node_now = self.node_now;
        let mut out = Vec::new();
        let is_away = |l: &SimLink| l.begun && !l.conn.as_ref().is_some_and(|c| c.up);
        let mut data = self.links.iter().filter(|l| l.name.starts_with('d'));
        let others_away = data.any(|l| l.name != self.links[n].name && is_away(l));
        let link = &mut self.links[n];
        let Some(conn) = &mut link.conn else {
            return;
        };
        conn.input.extend(conn.to_link.take(now));
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
                    link.restored = false;
                    let present = c.session_present && !link.retained;
                    let in_doubt = std::mem::take(&mut link.unanswered);
                    let session = match (present, in_doubt) {
                        (false, _) => LinkSession::New,
                        (true, true) => LinkSession::Doubtful,
                        (true, false) => LinkSession::Resumed,
                    };
                    self.profile.capabilities = Capabilities::of(link.version, &c);
                    let handshake = Handshake::new(session, &self.profile);
                    trace!(
                        self,
                        "{} is connected, session kept {}", link.name, c.session_present
                    );
                    self.router
                        .set_broker_features(&self.profile.features(), node_now);
                    // The broker may have lost the other links' sessions as well.
                    let session_lost = link.data && !first && !present;
                    let doubts = session_lost && others_away;
                    self.session_lost |= session_lost;
                    if link.data && (session == LinkSession::Doubtful || doubts) {
                        self.oracle.in_doubt(now);
                    }
                    link.machine.connected(&handshake, node_now, &mut out);
                }
                Packet::Pingresp => {
                    if conn.pings.pop_front() == Some(true) {
                        link.machine.ping_answered(node_now);
                    }
                }
                Packet::Disconnect(d) => {
                    self.oracle
                        .fault(format!("DISCONNECT {:?} on {}", d.reason, link.name));
                }
                other => {
                    if let Packet::Publish(p) = &other {
                        trace!(
                            self,
                            "{} brings {} at {:?} for {:?}",
                            link.name,
                            number_of(p.payload).unwrap_or_default(),
                            p.qos,
                            p.subscription_ids().collect::<Vec<_>>()
                        );
                    }
                    if let Err(end) = link.machine.packet(&other, node_now, &mut out) {
                        self.oracle.fault(format!("{} ends: {end}", link.name));
                    }
                }
            }
        }
        conn.input.drain(..used);
        if conn.up {
            if some {
                link.machine.batch_ended(node_now, &mut out);
            }
            link.machine.poll(node_now, &mut out);
            if link.machine.wants_ping() {
                encode_pingreq(&mut out);
                conn.pings.push_back(true);
            }
        }
        self.trace.bytes(now, &link.name, "broker", &out);
        let traced = self.trace.is_on().then(|| out.clone());
        conn.to_broker.put(out, later);
        if let Some(sent) = traced {
            self.trace_sent(n, &sent);
        }
    }

    /// Adds the requests and publishes that a link sends to the trace.
    fn trace_sent(&mut self, n: usize, bytes: &[u8]) {
        let decoder = Decoder {
            version: self.links[n].version,
            receiver: Receiver::Server,
            max: u32::MAX,
        };
        let mut rest = bytes;
        while let Ok(Some((packet, size))) = decoder.next(rest) {
            rest = &rest[size..];
            let what = match packet {
                Packet::Publish(p) => {
                    let number = number_of(p.payload).unwrap_or_default();
                    let dup = if p.dup { ", dup" } else { "" };
                    format!("publishes {number}{dup}")
                }
                Packet::Subscribe(s) => {
                    let filters: Vec<_> = s.filters().map(|(f, o)| (f, o.qos)).collect();
                    format!("subscribes {filters:?}")
                }
                Packet::Unsubscribe(u) => {
                    format!("unsubscribes {:?}", u.filters().collect::<Vec<_>>())
                }
                _ => continue,
            };
            trace!(self, "{} {what}", self.links[n].name);
        }
    }

    /// The connection of a link is lost, with the bytes on their way.
    pub(crate) fn lose(&mut self, n: usize) {
        // The network ended it, and not the broker, so no publish is to blame.
        self.lose_for(n, &LinkEnd::KeepAlive);
    }

    /// The broker ends a link's session, as on an operator's command or after a short expiry.
    pub(crate) fn forget(&mut self, n: usize) {
        let Some(conn) = self.links[n].conn.as_ref().filter(|conn| conn.up) else {
            return;
        };
        self.broker.forget(&conn.broker);
        trace!(self, "{}'s session is lost", self.links[n].name);
        self.oracle.link_session_lost(self.now);
        self.lose(n);
    }

    fn lose_for(&mut self, n: usize, end: &LinkEnd) {
        let again = self.now + Duration::from_millis(self.rng.between(20, 400));
        let link = &mut self.links[n];
        let Some(conn) = link.conn.take() else {
            return;
        };
        link.redial_at = again;
        link.unanswered |= !conn.up;
        self.broker.drop_connection(&conn.broker);
        if conn.up {
            link.machine.disconnected(end, self.node_now);
        }
        if link.publishes {
            self.oracle.publish_link_lost(self.now);
        }
        if self.session_lost && link.data {
            // The connection may have been dead already when the broker lost another link's session.
            self.oracle.in_doubt(self.now);
        }
        trace!(self, "{} is lost", self.links[n].name);
    }

    pub(crate) fn restart_broker(&mut self) {
        let keep = self.rng.chance(60);
        let back = self.now + Duration::from_millis(self.rng.between(50, 800));
        trace!(self, "the broker stops, and will keep its sessions: {keep}");
        self.broker.stop();
        for n in 0..self.links.len() {
            self.lose(n);
        }
        self.broker_back_at = Some((back, keep));
        self.oracle.restarted(self.now, keep);
    }

    /// The subscriptions of the links of this process at the broker. A link that is not needed is not
    /// connected, and leaves an earlier process's session to its end.
    pub(crate) fn subscriptions_of_links(&self) -> Vec<(String, Vec<String>)> {
        let mut held = self.broker.subscriptions();
        let is_ours = |id: &String| {
            let mut links = self.links.iter().filter(|link| link.begun);
            links.any(|link| id.strip_prefix("edge-") == Some(&link.name))
        };
        held.retain(|(id, _)| is_ours(id));
        held
    }

    /// With enough links, a filter that no client has does not stay at the broker for those inside it.
    fn check_unwanted(&mut self, held: &[(String, Vec<String>)]) {
        if !self.links_suffice {
            return;
        }
        let on_data_links = held.iter().filter(|(link, _)| link.contains("-d"));
        for name in on_data_links.flat_map(|(_, names)| names) {
            if !self.oracle.may_want(name) && !ROOTS.concat().contains(&name.as_str()) {
                self.oracle
                    .fault(format!("{name} is at the broker for nobody: {held:?}"));
            }
        }
    }

    /// I12, I13, I18: each filter of a client is subscribed at the broker once, or its root is.
    pub(crate) fn check_filters(&mut self) {
        let held = self.subscriptions_of_links();
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
                    .fault(format!("{filter} is at the broker {times} times: {held:?}"));
            }
        }
        if self.profile.mapping() == Mapping::Identifiers {
            return;
        }
        self.check_unwanted(&held);
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
