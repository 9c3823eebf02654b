//! The retained link's machine: it fetches the retained messages of filters.
//!
//! A fetch subscribes filters and unsubscribes them again. Retain As Published is off on this link,
//! so RETAIN is set on retained messages only. A fetch is over when a PINGREQ that was sent after
//! the SUBACKs is answered and the link has been quiet for a moment; no broker promises more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::budget::Account;
use crate::hashing::LookUp;
use crate::mqtt::{
    Message, MessageSpec, Oversized, Packet, Publish, QoS, SubscribeOptions, Version,
    encode_subscribe, encode_unsubscribe,
};
use crate::router::Router;
use crate::telemetry::clean;
use crate::time::{Deadline, Millis};
use crate::topics::{FilterId, matches};

use crate::upstream::link::common::{
    RESERVED_KEY, acknowledge, complete, count_skipped, in_packets, is_exact, is_probe, next_id,
    unsubscribe_bytes,
};
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::role::Role;

/// Fetches that run at once.
const FETCHES_MAX: usize = 8;
/// Filters of one fetch.
const FILTERS_MAX: usize = 500;
/// A fetch without an answer for this long is given up.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// A filter whose fetch is alone when the broker ends the link for this time is not fetched for a while.
const ENDS_MAX: u8 = 2;
/// How long it is not fetched, and a suspect is remembered.
const REMEMBERED: Duration = Duration::from_secs(60);

/// The retained link.
#[derive(Debug)]
pub(crate) struct RetainedLink {
    router: Arc<Router>,
    probes: Arc<str>,
    account: Arc<Account>,
    connected: bool,
    version: Version,
    identifiers: bool,
    /// The QoS of the subscriptions.
    qos: QoS,
    /// [`Handshake::filters_in_packet`].
    filters_in_packet: usize,
    /// How long the link has to be quiet before a fetch is over.
    quiet: Duration,
    last_id: u16,
    fetches: Vec<Fetch>,
    next_fetch: u64,
    /// SUBSCRIBE packets without an answer: packet identifier to fetch.
    requests: LookUp<u16, u64>,
    /// Fetches whose SUBACKs have all arrived, and that want a PINGREQ.
    to_ping: Vec<u64>,
    /// PINGREQs without an answer: the fetches that each was sent for.
    pings: VecDeque<Vec<u64>>,
    /// Packet identifiers of UNSUBSCRIBEs, whose answers nobody waits for.
    unsubscribes: Vec<u16>,
    /// Filters that were being fetched when the broker ended the link; nearly always none. While there
    /// are any that may be fetched, filters are fetched one by one.
    suspects: LookUp<FilterId, Suspect>,
    /// [`Router::unprovoked_losses`] when the link last connected.
    losses: u64,
}

/// A filter that the broker may end the link for.
#[derive(Clone, Copy, Debug, Default)]
struct Suspect {
    /// How often the link ended.
    ends: u8,
    /// It is forgotten then: nobody may want it any more.
    until: Millis,
}

impl Suspect {
    /// Whether the link ended for this filter, so that it is not fetched.
    fn is_found(&self) -> bool {
        self.ends >= ENDS_MAX
    }
}

/// A fetch that runs.
#[derive(Debug)]
struct Fetch {
    id: u64,
    /// Numbers and names of its filters.
    filters: Vec<(FilterId, Arc<str>)>,
    /// For each of them, the filter whose Subscription Identifier its messages have, and whether their
    /// topic has to be its name, because others share the identifier.
    named_by: Vec<(FilterId, bool)>,
    /// SUBSCRIBE packets without an answer.
    unanswered: usize,
    phase: Phase,
    /// When a message or an answer for it last arrived.
    last_data: Millis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// SUBACKs are missing.
    Subscribing,
    /// A PINGREQ is due, or has no answer yet.
    Pinging,
    /// The PINGREQ was answered: it is over after a quiet time.
    Answered,
}

impl Fetch {
    fn numbers(&self) -> Vec<FilterId> {
        self.filters.iter().map(|(number, _)| *number).collect()
    }
}

impl RetainedLink {
    /// The machine. Messages below the topic `probes` belong to probes, and reach no client.
    pub(crate) fn new(router: Arc<Router>, probes: Arc<str>) -> Self {
        Self {
            account: router.queue_account().clone(),
            router,
            probes,
            connected: false,
            version: Version::V5,
            identifiers: true,
            qos: QoS::AtMostOnce,
            filters_in_packet: 1,
            quiet: Duration::ZERO,
            last_id: 0,
            fetches: Vec::new(),
            next_fetch: 1,
            requests: LookUp::default(),
            to_ping: Vec::new(),
            pings: VecDeque::new(),
            unsubscribes: Vec::new(),
            suspects: LookUp::default(),
            losses: 0,
        }
    }

    fn free_id(&mut self) -> u16 {
        let (requests, unsubscribes) = (&self.requests, &self.unsubscribes);
        next_id(&mut self.last_id, |id| {
            requests.contains_key(&id) || unsubscribes.contains(&id)
        })
    }

    fn start(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.suspects.retain(|_, suspect| now < suspect.until);
        let tries = self.suspects.any(|_, suspect| !suspect.is_found());
        // Without identifiers, messages of two filters could not be told apart.
        let (fetches_max, at_most) = match self.identifiers && !tries {
            true => (FETCHES_MAX, FILTERS_MAX),
            false => (1, 1),
        };
        while self.connected && self.fetches.len() < fetches_max {
            let mut filters = self.router.next_fetches(at_most);
            if !self.suspects.is_empty() {
                self.give_up_quarantined(&mut filters, now);
            }
            if filters.is_empty() {
                return;
            }
            let fetch = self.next_fetch;
            let options = self.options();
            self.next_fetch += 1;
            // Filters without wildcards share packets: the topic tells their messages apart.
            filters.sort_by_key(|(_, name)| !is_exact(name));
            let exact = filters.partition_point(|(_, name)| is_exact(name));
            let (exact, wild) = filters.split_at(exact);
            let in_packet = if self.identifiers { 1 } else { filters.len() };
            let packets = in_packets(exact, self.filters_in_packet, |(_, name)| name.len());
            let packets = packets.chain(wild.chunks(in_packet));
            let mut named_by = Vec::with_capacity(filters.len());
            let mut unanswered = 0;
            for these in packets {
                let id = next_id(&mut self.last_id, |id| {
                    self.requests.contains_key(&id) || self.unsubscribes.contains(&id)
                });
                let all = these.iter();
                named_by.extend(all.map(|(_, name)| (these[0].0, is_exact(name))));
                let identifier = self
                    .identifiers
                    .then(|| these[0].0.subscription_identifier());
                encode_subscribe(
                    self.version,
                    id,
                    identifier,
                    these.iter().map(|(_, name)| (&**name, options)),
                    out,
                );
                self.requests.insert(id, fetch);
                unanswered += 1;
            }
            self.fetches.push(Fetch {
                id: fetch,
                filters,
                named_by,
                unanswered,
                phase: Phase::Subscribing,
                last_data: now,
            });
        }
    }

    /// Gives up the filters that are not to be fetched now.
    fn give_up_quarantined(&mut self, filters: &mut Vec<(FilterId, Arc<str>)>, now: Millis) {
        let suspects = &self.suspects;
        let found = |number: FilterId| suspects.get(&number).is_some_and(Suspect::is_found);
        let given_up = filters.extract_if(.., |(number, _)| found(*number));
        let given_up: Vec<FilterId> = given_up.map(|(number, _)| number).collect();
        if !given_up.is_empty() {
            self.router.fetch_given_up(&given_up, now);
        }
    }

    /// The broker may have ended the link for one of these filters. Returns whether it has: the filter
    /// was alone, and not for the first time.
    fn suspect(&mut self, filters: &[(FilterId, Arc<str>)], now: Millis) -> bool {
        for (number, _) in filters {
            let suspect = self.suspects.entry(*number).or_default();
            suspect.ends = suspect.ends.saturating_add(1);
            suspect.until = now + REMEMBERED;
        }
        let [(number, name)] = filters else {
            return false;
        };
        let found = self.suspects.get(number).is_some_and(Suspect::is_found);
        if found {
            tracing::error!(
                filter = %clean(name, 256),
                "The retained messages of a filter are not fetched for a while: the broker closed the connection each time"
            );
        }
        found
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
        acknowledge(self.version, p, out);
        if !p.retain || is_probe(p.topic, &self.probes) {
            // A live message: a data link brings it to the clients that want it.
            return;
        }
        // A QoS 0 subscription does not show the stored QoS, so QoS 1 is promised.
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
            expires_at: (p.message_expiry).map(|s| Deadline::after_seconds(now, s)),
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
        for fetch in &mut self.fetches {
            for ((number, name), (named_by, exact)) in fetch.filters.iter().zip(&fetch.named_by) {
                let hit = match numbers.is_empty() {
                    true => matches(name, p.topic),
                    false => numbers.contains(named_by) && (!exact || **name == *p.topic),
                };
                if hit {
                    fetch.last_data = now;
                    self.router.fetched(*number, &message, now);
                }
            }
        }
    }

    fn finish(&mut self, now: Millis, out: &mut Vec<u8>) {
        let mut at = 0;
        while at < self.fetches.len() {
            let fetch = &self.fetches[at];
            let answered = fetch.phase == Phase::Answered;
            let quiet = fetch.last_data + self.quiet <= now;
            let late = fetch.last_data + FETCH_TIMEOUT <= now;
            if !(answered && quiet || late) {
                at += 1;
                continue;
            }
            let fetch = self.fetches.swap_remove(at);
            for (number, _) in &fetch.filters {
                self.suspects.remove(number);
            }
            self.requests.retain(|_, of| *of != fetch.id);
            for these in in_packets(&fetch.filters, FILTERS_MAX, unsubscribe_bytes) {
                let id = self.free_id();
                let names = these.iter().map(|(_, name)| &**name);
                encode_unsubscribe(self.version, id, names, out);
                self.unsubscribes.push(id);
            }
            self.router
                .fetch_ended(&fetch.numbers(), !late || answered, now);
        }
    }
}

impl Machine for RetainedLink {
    fn connected(&mut self, handshake: &Handshake, now: Millis, out: &mut Vec<u8>) {
        self.connected = true;
        self.losses = self.router.unprovoked_losses();
        self.version = handshake.version;
        self.identifiers = handshake.identifiers;
        self.qos = handshake.fetch_qos;
        self.filters_in_packet = handshake.filters_in_packet;
        self.quiet = handshake.fetch_quiet;
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
            Packet::Pubrel(a) => complete(self.version, a.packet_id, out),
            Packet::Suback(s) => {
                let Some(of) = self.requests.remove(&s.packet_id) else {
                    return Ok(());
                };
                if let Some(fetch) = self.fetches.iter_mut().find(|fetch| fetch.id == of) {
                    fetch.unanswered -= 1;
                    fetch.last_data = now;
                    if fetch.unanswered == 0 {
                        fetch.phase = Phase::Pinging;
                        self.to_ping.push(fetch.id);
                    }
                }
            }
            Packet::Unsuback(u) => self.unsubscribes.retain(|id| *id != u.packet_id),
            _ => {
                return Err(LinkEnd::Unexpected(Role::Retained));
            }
        }
        Ok(())
    }

    fn oversized(
        &mut self,
        packet: &Oversized,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        let p = packet.publish();
        acknowledge(self.version, &p, out);
        // A data link counts a live message.
        if p.retain {
            count_skipped(packet, "retained", now);
        }
        self.skipping(packet, now);
        Ok(())
    }

    fn skipping(&mut self, packet: &Oversized, now: Millis) {
        // Other messages of a fetch may follow, so the link is not quiet.
        if packet.publish().retain {
            for fetch in &mut self.fetches {
                fetch.last_data = now;
            }
        }
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
            if let Some(fetch) = self.fetches.iter_mut().find(|fetch| fetch.id == id) {
                fetch.phase = Phase::Answered;
                fetch.last_data = now;
                self.router.fetch_answered(&fetch.numbers(), now);
            }
        }
    }

    fn has_sent(&self) -> bool {
        !self.fetches.is_empty()
    }

    fn disconnected(&mut self, end: &LinkEnd, now: Millis) {
        self.connected = false;
        if self.fetches.is_empty() {
            self.router.link_lost_unprovoked();
        }
        let only_ours = self.losses == self.router.unprovoked_losses();
        if only_ours && end.may_be_for_a_packet() {
            let fetches = std::mem::take(&mut self.fetches);
            let filters: Vec<_> = fetches.iter().flat_map(|f| f.filters.clone()).collect();
            if self.suspect(&filters, now) {
                let numbers: Vec<FilterId> = filters.iter().map(|(number, _)| *number).collect();
                self.router.fetch_given_up(&numbers, now);
            } else {
                self.fetches = fetches;
            }
        }
        self.requests.clear();
        self.pings.clear();
        self.unsubscribes.clear();
        self.to_ping.clear();
        for fetch in std::mem::take(&mut self.fetches) {
            self.router.fetch_ended(&fetch.numbers(), false, now);
        }
    }
}

#[cfg(test)]
mod tests;
