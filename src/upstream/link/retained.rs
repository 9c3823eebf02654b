//! The R link's machine: fetches retained messages for filters, and lets go of them again.
//!
//! Retain As Published is off here, so RETAIN is set on retained messages only. A fetch is over
//! when a PINGREQ sent behind the SUBACKs is answered and the link has been quiet for a moment;
//! no broker promises more.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::budget::Account;
use crate::mqtt::{
    AckKind, Message, MessageSpec, Packet, Publish, QoS, ReasonCode, SubscribeOptions, Version,
    encode_ack, encode_subscribe, encode_unsubscribe,
};
use crate::router::Router;
use crate::time::Millis;
use crate::topics::{FilterId, matches};

use crate::upstream::RESERVED_KEY;
use crate::upstream::link::machine::{LinkEnd, Machine, Up};

/// Fetches that run at once.
const JOBS_MAX: usize = 8;
/// Filters of one fetch.
const FILTERS_MAX: usize = 500;
/// A fetch that gets no answer for this long is given up, milliseconds.
const PATIENCE: u64 = 30_000;

/// The R link.
#[derive(Debug)]
pub struct Fetch {
    router: Arc<Router>,
    probes: Arc<str>,
    account: Arc<Account>,
    up: bool,
    version: Version,
    identifiers: bool,
    /// At which it subscribes.
    qos: QoS,
    /// Quiet time that ends a fetch, milliseconds.
    quiet: u64,
    last_id: u16,
    jobs: Vec<Job>,
    next_job: u64,
    /// SUBSCRIBEs under way: which job.
    requests: HashMap<u16, u64, RandomState>,
    /// Jobs that want a PINGREQ behind their SUBACKs.
    to_ping: Vec<u64>,
    /// PINGREQs under way: the jobs that each was sent for.
    pings: VecDeque<Vec<u64>>,
    /// Identifiers of UNSUBSCRIBEs, whose answers nobody waits for.
    leaving: Vec<u16>,
}

#[derive(Debug)]
struct Job {
    id: u64,
    filters: Vec<(FilterId, Arc<str>)>,
    unanswered: usize,
    /// The PINGREQ was sent, or answered.
    pinged: bool,
    answered: bool,
    last_data: u64,
}

impl Fetch {
    /// The machine.
    /// Messages below `probes` are of probes, and nobody's.
    pub fn new(router: Arc<Router>, probes: Arc<str>) -> Self {
        Self {
            account: router.queue_account().clone(),
            router,
            probes,
            up: false,
            version: Version::V5,
            identifiers: true,
            qos: QoS::AtMostOnce,
            quiet: 0,
            last_id: 0,
            jobs: Vec::new(),
            next_job: 1,
            requests: HashMap::default(),
            to_ping: Vec::new(),
            pings: VecDeque::new(),
            leaving: Vec::new(),
        }
    }

    fn start(&mut self, now: Millis, out: &mut Vec<u8>) {
        let jobs_max = if self.identifiers { JOBS_MAX } else { 1 };
        while self.up && self.jobs.len() < jobs_max {
            let at_most = if self.identifiers { FILTERS_MAX } else { 1 };
            let filters = self.router.next_fetches(at_most);
            if filters.is_empty() {
                return;
            }
            let job = self.next_job;
            self.next_job += 1;
            let in_packet = if self.identifiers { 1 } else { filters.len() };
            let mut unanswered = 0;
            for these in filters.chunks(in_packet) {
                let (requests, leaving) = (&self.requests, &self.leaving);
                let id = crate::upstream::next_id(&mut self.last_id, |id| {
                    requests.contains_key(&id) || leaving.contains(&id)
                });
                let identifier = self
                    .identifiers
                    .then(|| these[0].0.subscription_identifier());
                encode_subscribe(
                    self.version,
                    id,
                    identifier,
                    these.iter().map(|(_, name)| (&**name, self.options())),
                    out,
                );
                self.requests.insert(id, job);
                unanswered += 1;
            }
            self.jobs.push(Job {
                id: job,
                filters,
                unanswered,
                pinged: false,
                answered: false,
                last_data: now,
            });
        }
    }

    fn options(&self) -> SubscribeOptions {
        SubscribeOptions {
            qos: self.qos,
            no_local: false,
            retain_as_published: false,
            retain_handling: 0,
        }
    }

    fn publish(&mut self, p: &Publish<'_>, now: Millis, out: &mut Vec<u8>) {
        let kind = match p.qos {
            QoS::AtMostOnce => None,
            QoS::AtLeastOnce => Some(AckKind::Puback),
            QoS::ExactlyOnce => Some(AckKind::Pubrec),
        };
        if let Some(kind) = kind {
            let (version, id) = (self.version, p.packet_id);
            encode_ack(version, kind, id, ReasonCode::SUCCESS, None, out);
        }
        if !p.retain || crate::upstream::is_probe(p.topic, &self.probes) {
            // Live; D brings it to those who want it.
            return;
        }
        // The stored QoS cannot be seen through a QoS 0 subscription: at least once is promised.
        let qos = match self.qos {
            QoS::AtMostOnce => QoS::AtLeastOnce,
            _ => p.qos,
        };
        let message = Message::new(&MessageSpec {
            topic: p.topic,
            properties: p.properties,
            payload: p.payload,
            qos,
            retain: true,
            expires_at: crate::upstream::expires_at(p.message_expiry, now),
            strip_key: Some(RESERVED_KEY),
            account: Some(self.account.clone()),
        });
        let mut numbers: Vec<FilterId> = Vec::new();
        if self.identifiers {
            numbers.extend(
                p.subscription_ids()
                    .filter_map(FilterId::from_subscription_identifier),
            );
        }
        for job in &mut self.jobs {
            for (number, name) in &job.filters {
                let hit = match numbers.is_empty() {
                    true => matches(name, p.topic),
                    false => numbers.contains(number),
                };
                if hit {
                    job.last_data = now;
                    self.router.fetched(*number, &message, now);
                }
            }
        }
    }

    fn finish(&mut self, now: Millis, out: &mut Vec<u8>) {
        let mut at = 0;
        while at < self.jobs.len() {
            let job = &self.jobs[at];
            let quiet = job.last_data + self.quiet <= now;
            let late = job.last_data + PATIENCE <= now;
            if !(job.answered && quiet || late) {
                at += 1;
                continue;
            }
            let job = self.jobs.swap_remove(at);
            self.requests.retain(|_, of| *of != job.id);
            for these in crate::upstream::by_bytes(&job.filters, |(_, name)| name.len()) {
                let (requests, leaving) = (&self.requests, &self.leaving);
                let id = crate::upstream::next_id(&mut self.last_id, |id| {
                    requests.contains_key(&id) || leaving.contains(&id)
                });
                let names = these.iter().map(|(_, name)| &**name);
                encode_unsubscribe(self.version, id, names, out);
                self.leaving.push(id);
            }
            let numbers: Vec<FilterId> = job.filters.iter().map(|(n, _)| *n).collect();
            self.router
                .fetch_ended(&numbers, !late || job.answered, now);
        }
    }
}

impl Machine for Fetch {
    fn up(&mut self, up: &Up, now: Millis, out: &mut Vec<u8>) {
        self.up = true;
        self.version = up.version;
        self.identifiers = up.identifiers;
        self.qos = up.fetch_qos;
        self.quiet = up.fetch_quiet;
        self.start(now, out);
    }

    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        match packet {
            Packet::Publish(p) => self.publish(p, now, out),
            Packet::Pubrel(a) => {
                let (version, id) = (self.version, a.packet_id);
                encode_ack(
                    version,
                    AckKind::Pubcomp,
                    id,
                    ReasonCode::SUCCESS,
                    None,
                    out,
                );
            }
            Packet::Suback(s) => {
                let Some(job) = self.requests.remove(&s.packet_id) else {
                    return Ok(());
                };
                if let Some(job) = self.jobs.iter_mut().find(|j| j.id == job) {
                    job.unanswered -= 1;
                    job.last_data = now;
                    if job.unanswered == 0 && !job.pinged {
                        job.pinged = true;
                        self.to_ping.push(job.id);
                    }
                }
            }
            Packet::Unsuback(u) => self.leaving.retain(|id| *id != u.packet_id),
            _ => {
                return Err(LinkEnd::protocol(
                    "a packet that the retained link does not expect",
                ));
            }
        }
        Ok(())
    }

    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.poll(now, out);
    }

    fn poll(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.finish(now, out);
        self.start(now, out);
    }

    fn wants_ping(&mut self) -> bool {
        let wanted = !self.to_ping.is_empty();
        if wanted {
            self.pings.push_back(std::mem::take(&mut self.to_ping));
        }
        wanted
    }

    fn ping_answered(&mut self, now: Millis) {
        for id in self.pings.pop_front().unwrap_or_default() {
            if let Some(job) = self.jobs.iter_mut().find(|j| j.id == id) {
                job.answered = true;
                job.last_data = now;
                let numbers: Vec<FilterId> = job.filters.iter().map(|(n, _)| *n).collect();
                self.router.fetch_answered(&numbers);
            }
        }
    }

    fn down(&mut self, _end: &LinkEnd, now: Millis) {
        self.up = false;
        self.requests.clear();
        self.pings.clear();
        self.leaving.clear();
        self.to_ping.clear();
        for job in std::mem::take(&mut self.jobs) {
            let numbers: Vec<FilterId> = job.filters.iter().map(|(n, _)| *n).collect();
            self.router.fetch_ended(&numbers, false, now);
        }
    }
}
