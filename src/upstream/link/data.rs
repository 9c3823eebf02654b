//! The data link's machine: it subscribes filters and takes messages.
//!
//! It never publishes, and reading never waits for a client: an arriving message is put into the
//! sessions at once, and messages are acknowledged in the order of arrival.

mod acknowledge;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::hashing::LookUp;
use crate::mqtt::{
    LinkOrigin, Message, MessageSpec, Oversized, Packet, Publish, QoS, ReasonCode,
    SubscribeOptions, Version, encode_subscribe, encode_unsubscribe,
};
use crate::router::{Arrived, LinkSession, Router, UpstreamSubscribe};
use crate::store::Store;
use crate::store::records::LinkReleased;
use crate::telemetry::metrics;
use crate::time::{Deadline, Millis};
use crate::topics::FilterId;

use crate::upstream::link::acks::Acks;
use crate::upstream::link::common::{
    RESERVED_KEY, complete, count_skipped, in_packets, is_exact, is_probe, next_id,
    unsubscribe_bytes,
};
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::exactly_once::ExactlyOnce;
use crate::upstream::link::lag::{LagMeter, Verdict};
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::link::origin::origin_mark;
use crate::upstream::link::redelivery::Redelivery;
use crate::upstream::role::Role;

/// SUBSCRIBE and UNSUBSCRIBE packets that may be unanswered.
const REQUESTS_MAX: usize = 1000;
/// Filters that are taken from the router at once.
const FILTERS_AT_ONCE: usize = 200;
/// Up to this number of identifiers of a message, each is compared with those before it.
const COMPARED_MAX: usize = 32;
/// The least time between two writes. Only the broker itself waits for acknowledgements.
const PACE: Duration = Duration::from_millis(2);
/// How often a PINGREQ asks whether the broker has the acknowledgements that were sent.
const CONFIRM_EVERY: Duration = Duration::from_secs(2);

/// A data link, or a shared link: the two differ in their filters only.
#[derive(Debug)]
pub(crate) struct DataLink {
    router: Arc<Router>,
    link: usize,
    /// Tells our origin marks from those of other processes.
    instance: u64,
    /// The topic that probes publish below.
    probes: Arc<str>,
    version: Version,
    identifiers: bool,
    keeps_retain: bool,
    /// [`Handshake::filters_in_packet`].
    filters_in_packet: usize,
    connected_before: bool,
    last_id: u16,
    /// SUBSCRIBE and UNSUBSCRIBE packets without an answer, by packet identifier.
    requests: LookUp<u16, Request>,
    exactly_once: ExactlyOnce,
    redelivery: Redelivery,
    /// The acknowledgements that wait for the log. `None`: they wait for nothing.
    acks: Option<Box<Acks>>,
    batch: Vec<Arrived>,
    lag: LagMeter,
    /// The time of the last call that brought one.
    now: Millis,
    /// When a PINGREQ last asked for the acknowledgements.
    confirmed_at: Millis,
    ping: bool,
    /// PINGREQs without an answer, in the order of sending.
    barriers: VecDeque<Barrier>,
    /// Filters are tried for which the broker may have ended the link: nothing else is asked.
    trying: bool,
    /// One filter goes into each UNSUBSCRIBE, because the broker may have ended the link for a long
    /// one.
    one_by_one: bool,
    /// How the last connection ended.
    last: Cut,
    /// [`Router::unprovoked_losses`] when the link last connected.
    losses: u64,
}

/// The requests that the end of a connection left without an answer, if the broker may have ended it
/// for one of them.
#[derive(Debug, Default)]
struct Cut {
    subscribes: Vec<FilterId>,
    unsubscribes: bool,
}

/// A PINGREQ without an answer. The answer shows that the broker has sent all earlier packets, and
/// read all earlier acknowledgements.
#[derive(Clone, Copy, Debug)]
struct Barrier {
    /// [`Redelivery::mark`] when it was sent.
    received: u64,
    /// [`ExactlyOnce::mark`] when it was sent.
    released: u64,
    /// The router's number for it.
    number: u64,
}

/// What a message is to its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// It is for clients.
    New,
    /// It was received on an earlier connection.
    Again,
    /// It is for no client.
    Unwanted,
}

#[derive(Debug)]
enum Request {
    Subscribe(SmallVec<[FilterId; 1]>),
    Unsubscribe(SmallVec<[FilterId; 1]>),
}

impl DataLink {
    /// The machine of the router's link `link`. `store` has the packet identifiers that it received
    /// before. Messages below the topic `probes` belong to probes, and reach no client.
    pub(crate) fn new(
        router: Arc<Router>,
        link: usize,
        instance: u64,
        probes: Arc<str>,
        store: &dyn Store,
    ) -> Self {
        Self {
            router,
            link,
            instance,
            probes,
            version: Version::V5,
            identifiers: true,
            keeps_retain: true,
            filters_in_packet: 1,
            connected_before: false,
            last_id: 0,
            requests: LookUp::default(),
            exactly_once: ExactlyOnce::default(),
            redelivery: Redelivery::new(store.ring(link)),
            acks: None,
            batch: Vec::new(),
            lag: LagMeter::default(),
            now: Millis::ZERO,
            confirmed_at: Millis::ZERO,
            ping: false,
            barriers: VecDeque::new(),
            trying: false,
            one_by_one: false,
            last: Cut::default(),
            losses: 0,
        }
    }

    fn publish(&mut self, p: &Publish<'_>, now: Millis, out: &mut Vec<u8>) {
        metrics().upstream_received[p.qos].increment(1);
        let received = self.redelivery.mark();
        let arrival = match self.seen(p) {
            true => Arrival::Again,
            false if self.is_for_clients(p) => Arrival::New,
            false => Arrival::Unwanted,
        };
        self.acknowledge(p, arrival, received, now, out);
        match arrival {
            Arrival::Again => metrics().upstream_redeliveries_suppressed.increment(1),
            Arrival::New => self.arrived(p, false, now),
            Arrival::Unwanted => {}
        }
    }

    /// Whether a message was received before. If it was not, it is noted.
    fn seen(&mut self, p: &Publish<'_>) -> bool {
        match p.qos {
            QoS::AtMostOnce => false,
            QoS::AtLeastOnce => self.redelivery.seen(p),
            QoS::ExactlyOnce => {
                let digest = self.redelivery.digest(p);
                self.exactly_once.seen(p.packet_id, digest, p.dup)
            }
        }
    }

    fn is_for_clients(&self, p: &Publish<'_>) -> bool {
        // Without Retain Handling each SUBSCRIBE brings retained messages. They are fetched on the
        // retained link for the clients that want them.
        let replayed = !self.keeps_retain && p.retain;
        !replayed && !is_probe(p.topic, &self.probes)
    }

    /// Adds a message to the batch. `skipped`: its payload is missing.
    fn arrived(&mut self, p: &Publish<'_>, skipped: bool, now: Millis) {
        let mut filters: SmallVec<[FilterId; 2]> = SmallVec::new();
        if self.identifiers && p.has_subscription_ids {
            let numbers = p.subscription_ids();
            for number in numbers.filter_map(FilterId::from_subscription_identifier) {
                if filters.len() >= COMPARED_MAX || !filters.contains(&number) {
                    filters.push(number);
                }
            }
            if filters.len() > COMPARED_MAX {
                filters.sort_unstable();
                filters.dedup();
            }
        }
        let message = Message::new(&MessageSpec {
            topic: p.topic,
            properties: p.properties,
            payload: p.payload,
            qos: p.qos,
            retain: p.retain,
            expires_at: (p.message_expiry).map(|s| Deadline::after_seconds(now, s)),
            strip_key: Some(RESERVED_KEY),
            account: Some(self.router.queue_account().clone()),
        });
        self.batch.push(Arrived {
            message,
            filters,
            link: self.link,
            origin_mark: origin_mark(p, self.instance),
            link_origin: self.link_origin(p),
            skipped,
        });
    }

    /// The broker does not know a message of QoS 2 any more, or none. Nothing waits for the record of that.
    fn forget(&self, packet_id: Option<u16>) {
        if self.acks.is_some() {
            let link = self.link as u16;
            let _ = self.router.link_released(LinkReleased { link, packet_id });
        }
    }

    /// The identity of a message of QoS 2 on this link, for the log.
    fn link_origin(&self, p: &Publish<'_>) -> Option<LinkOrigin> {
        let kept = self.acks.is_some() && p.qos == QoS::ExactlyOnce;
        kept.then(|| LinkOrigin {
            link: self.link as u16,
            packet_id: p.packet_id,
            digest: self.redelivery.digest(p),
        })
    }

    fn answered(&mut self, packet_id: u16, codes: &[u8], now: Millis) -> Result<(), LinkEnd> {
        // Messages that arrived before the answer belong to the time before the request.
        self.flush(now);
        match self.requests.remove(&packet_id) {
            Some(Request::Subscribe(numbers)) => {
                for (i, number) in numbers.iter().enumerate() {
                    let code = codes.get(i).or(codes.last()).copied().unwrap_or(0x80);
                    self.router.suback(*number, ReasonCode(code), now);
                }
                Ok(())
            }
            Some(Request::Unsubscribe(numbers)) => {
                for number in numbers {
                    self.router.unsuback(number, now);
                }
                Ok(())
            }
            None => Err(LinkEnd::UnknownRequest(packet_id)),
        }
    }

    fn flush(&mut self, now: Millis) {
        if !self.batch.is_empty() {
            self.router.fan_out(&mut self.batch, now);
            self.lag.arrived(self.batch.len(), now);
            if let Some(acks) = &mut self.acks {
                // A message that was skipped has its acknowledgement already.
                let arrived = self.batch.iter().filter(|arrived| !arrived.skipped);
                let arrived = arrived.map(|arrived| &arrived.message);
                let messages = acks.flushed(arrived);
                if !messages.is_empty() {
                    self.router.write_messages(messages);
                }
            }
            self.batch.clear();
        }
    }

    /// Limits the publishes that go to the broker, or ends the limit.
    fn follow(&self, verdict: Verdict) {
        match verdict {
            Verdict::Keep => {}
            Verdict::Limit(window) => self.router.limit_publishes(self.link, Some(window)),
            Verdict::Lift => self.router.limit_publishes(self.link, None),
        }
    }

    /// Tells the router for which SUBSCRIBEs the broker may have ended the link, before they are sent
    /// again.
    fn find_poison(&mut self, now: Millis) {
        let losses = self.router.unprovoked_losses();
        let only_ours = std::mem::replace(&mut self.losses, losses) == losses;
        let Cut {
            subscribes,
            unsubscribes,
        } = std::mem::take(&mut self.last);
        self.trying = false;
        self.one_by_one = unsubscribes;
        if only_ours && !subscribes.is_empty() {
            self.router.subscribes_ended_link(&subscribes, now);
        }
    }

    fn free_id(&mut self) -> u16 {
        next_id(&mut self.last_id, |id| self.requests.contains_key(&id))
    }

    /// Sends the requests that wait for the link.
    fn send_requests(&mut self, out: &mut Vec<u8>) {
        while !self.trying && self.requests.len() < REQUESTS_MAX {
            let room = (REQUESTS_MAX - self.requests.len()).min(FILTERS_AT_ONCE);
            let answered = self.requests.is_empty();
            let next = self.router.next_requests(self.link, room, answered);
            if next.is_empty() {
                return;
            }
            // A filter may be subscribed in the place of one that it overlaps.
            self.send_unsubscribes(&next.unsubscribes, out);
            // In their order: the answer for one filter stands for the answers before it.
            let all = next.subscribes.as_slice();
            for run in all.chunk_by(|a, b| is_exact(&a.name) == is_exact(&b.name)) {
                // The identifier of a filter with wildcards names that one, so it has a packet of its own.
                let in_packet = match self.identifiers && !is_exact(&run[0].name) {
                    true => 1,
                    false => self.filters_in_packet,
                };
                self.send_subscribes(run, in_packet, out);
            }
            self.trying = !next.suspects.is_empty();
            self.send_subscribes(&next.suspects, 1, out);
        }
    }

    fn send_subscribes(
        &mut self,
        wanted: &[UpstreamSubscribe],
        in_packet: usize,
        out: &mut Vec<u8>,
    ) {
        for these in in_packets(wanted, in_packet, |w| w.name.len()) {
            let id = self.free_id();
            let named_by = match is_exact(&these[0].name) {
                true => FilterId::EXACT,
                false => these[0].filter,
            };
            let identifier = self.identifiers.then(|| named_by.subscription_identifier());
            let filters = these
                .iter()
                .map(|w| (&*w.name, options(w.qos, self.keeps_retain)));
            encode_subscribe(self.version, id, identifier, filters, out);
            let numbers = these.iter().map(|w| w.filter).collect();
            self.requests.insert(id, Request::Subscribe(numbers));
        }
    }

    fn send_unsubscribes(&mut self, filters: &[(FilterId, Arc<str>)], out: &mut Vec<u8>) {
        let in_packet = match self.one_by_one {
            true => 1,
            false => self.filters_in_packet,
        };
        for these in in_packets(filters, in_packet, unsubscribe_bytes) {
            let id = self.free_id();
            encode_unsubscribe(self.version, id, these.iter().map(|(_, n)| &**n), out);
            let numbers = these.iter().map(|(n, _)| *n).collect();
            self.requests.insert(id, Request::Unsubscribe(numbers));
        }
    }
}

impl Machine for DataLink {
    fn connected(&mut self, handshake: &Handshake, now: Millis, out: &mut Vec<u8>) {
        self.version = handshake.version;
        self.identifiers = handshake.identifiers;
        self.keeps_retain = handshake.keeps_retain;
        self.filters_in_packet = handshake.filters_in_packet;
        self.requests.clear();
        if self.router.keeps_messages() {
            let acks = self.acks.get_or_insert_with(|| Box::new(Acks::new()));
            acks.connected(handshake.window);
        }
        self.lag.connected(handshake.fetch_quiet);
        self.find_poison(now);
        let session = handshake.session;
        if !self.connected_before {
            let restored = self.router.received_on(self.link);
            self.exactly_once.restore(&restored);
        }
        self.exactly_once.connected(session);
        if session == LinkSession::New {
            self.forget(None);
        }
        match session {
            LinkSession::New => self.redelivery.began_anew(),
            LinkSession::Doubtful | LinkSession::Resumed => self.redelivery.resumed(),
        }
        // Behind everything that the broker sends again.
        self.ping |= self.exactly_once.wants_confirmation();
        let first = !std::mem::replace(&mut self.connected_before, true);
        let gap = self.router.data_link_up(self.link, session, first, now);
        if gap {
            tracing::warn!(
                link = self.link,
                "The broker lost this data link's session: its filters are subscribed again, and messages of the gap are missed"
            );
        }
        self.poll(now, out);
    }

    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        match packet {
            Packet::Publish(p) => {
                self.publish(p, now, out);
                Ok(())
            }
            Packet::Pubrel(a) => {
                match &mut self.acks {
                    Some(acks) => {
                        let received = self.redelivery.mark();
                        let committed = self.router.link_released(LinkReleased {
                            link: self.link as u16,
                            packet_id: Some(a.packet_id),
                        });
                        acks.push_release(a.packet_id, committed, received, now);
                    }
                    None => {
                        self.exactly_once.release(a.packet_id);
                        complete(self.version, a.packet_id, out);
                    }
                }
                Ok(())
            }
            Packet::Suback(s) => self.answered(s.packet_id, s.codes, now),
            Packet::Unsuback(u) => self.answered(u.packet_id, u.codes, now),
            _ => Err(LinkEnd::Unexpected(Role::Data)),
        }
    }

    fn oversized(
        &mut self,
        packet: &Oversized,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        let p = packet.publish();
        let received = self.redelivery.mark();
        let is_new = !self.seen(&p);
        // Nobody gets it, so it has no record.
        self.acknowledge(&p, Arrival::Unwanted, received, now, out);
        if is_new && self.is_for_clients(&p) {
            count_skipped(packet, "data", now);
            self.arrived(&p, true, now);
        }
        Ok(())
    }

    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.flush(now);
        self.poll(now, out);
    }

    fn poll(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.now = now;
        self.trying &= !self.requests.is_empty();
        if self.router.has_requests(self.link) {
            self.send_requests(out);
        }
        if !self.barriers.is_empty() {
            let verdict = self.lag.waiting(now);
            self.let_go(false, now, out);
            return self.follow(verdict);
        }
        let unconfirmed = !self.redelivery.is_empty() || self.exactly_once.wants_confirmation();
        if unconfirmed && self.confirmed_at + CONFIRM_EVERY <= now {
            self.confirmed_at = now;
            self.ping = true;
        }
        self.ping |= self.router.barrier_wanted(self.link) || self.lag.is_due(now);
        self.let_go(self.ping, now, out);
    }

    fn pace(&self) -> Option<Duration> {
        // A broker without identifiers may have a small window: it gets acknowledgements at once.
        let paced = self.identifiers && self.requests.is_empty() && self.barriers.is_empty();
        paced.then_some(PACE)
    }

    fn wants_ping(&mut self) -> bool {
        let wanted = std::mem::take(&mut self.ping);
        if wanted {
            self.lag.pinged(self.now);
            let number = self.router.barrier_begins(self.link);
            let received = self.redelivery.mark();
            let acks = self.acks.as_ref();
            self.barriers.push_back(Barrier {
                // It vouches for acknowledgements that were sent, and for no others.
                received: acks.map_or(received, |acks| acks.acknowledged(received)),
                released: self.exactly_once.mark(),
                number,
            });
        }
        wanted
    }

    fn ping_answered(&mut self, now: Millis) {
        // The broker read the acknowledgements before it read the PINGREQ that followed them.
        if let Some(barrier) = self.barriers.pop_front() {
            let Barrier {
                received,
                released,
                number,
            } = barrier;
            self.redelivery.confirmed(received);
            for packet_id in self.exactly_once.confirmed(released) {
                self.forget(Some(packet_id));
            }
            self.flush(now);
            let used_up = self.router.publishes_used_up(self.link);
            let verdict = self.lag.answered(used_up, now);
            self.follow(verdict);
            self.router.barrier_passed(self.link, number, now);
        }
    }

    fn lag(&self) -> Option<Duration> {
        Some(self.lag.last())
    }

    fn has_sent(&self) -> bool {
        !self.requests.is_empty()
    }

    fn disconnected(&mut self, end: &LinkEnd, now: Millis) {
        if matches!(end, LinkEnd::Panicked) {
            // The broker sends the messages again that the panic may have kept from some clients. A
            // message is rather delivered twice than lost.
            self.batch.clear();
            self.exactly_once.connected(LinkSession::New);
            self.redelivery.began_anew();
        }
        self.flush(now);
        if let Some(acks) = &mut self.acks {
            self.router.write_messages(acks.disconnected());
        }
        if !self.has_sent() {
            self.router.link_lost_unprovoked();
        }
        self.last = Cut::default();
        let for_a_packet = end.may_be_for_a_packet();
        for (_, request) in self.requests.sorted(|_, _| for_a_packet) {
            match request {
                Request::Subscribe(filters) => self.last.subscribes.extend(filters),
                Request::Unsubscribe(_) => self.last.unsubscribes = true,
            }
        }
        self.last.subscribes.sort_unstable();
        self.requests.clear();
        self.barriers.clear();
        self.ping = false;
        self.lag = LagMeter::default();
        self.follow(Verdict::Lift);
        self.router.data_link_down(self.link, now);
    }
}

/// Retain Handling 2 and Retain As Published hold from the first SUBSCRIBE on. No Local is never
/// set, because it would hide every client's publishes from every other client.
fn options(qos: QoS, retain_as_published: bool) -> SubscribeOptions {
    SubscribeOptions {
        qos,
        no_local: false,
        retain_as_published,
        retain_handling: 2,
    }
}

#[cfg(test)]
mod tests;
