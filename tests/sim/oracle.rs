//! What must be true of the router, seen only from its edges: packets in, packets out, what it
//! hands to the broker and takes from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate::mqtt::{QoS, Version};
use tidegate::router::Router;
use tidegate::time::Millis;
use tidegate::topics::FilterId;

use crate::broker::{Copy, covers, matching};
use crate::claim::Claim;
use crate::device::{Profile, Seen};
use crate::inbound::Inbound;
use crate::ledger::{Ledger, Owed, Window};
use tidegate::streams::StreamId;

/// How long the absence of the broker has effects.
pub(crate) const RECOVERY: Duration = Duration::from_secs(5);

pub(crate) type Checked = Result<(), String>;

/// Limits of the run that change what may happen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub grants: QoS,
    pub hold: Duration,
    pub expiry_max: u32,
    pub expiry_v3: u32,
    /// The queues' budget may evict.
    pub evicts: bool,
    /// No limit of a queue is reached.
    pub roomy: bool,
    pub ends_full: bool,
    /// The broker has no identifiers: a filter inside another needs no subscription of its own.
    pub nests: bool,
}

impl Rules {
    /// Whether a subscription of `held` at the broker brings the messages of `filter`.
    pub(crate) fn serves(self, held: &str, filter: &str) -> bool {
        held == filter || self.nests && covers(held, filter)
    }
}

/// One client as the oracle knows it.
pub(crate) struct Client {
    pub profile: Profile,
    pub exists: bool,
    pub attached: Option<u64>,
    pub expiry: u32,
    pub ends_at: Option<Millis>,
    pub ledger: Ledger,
    pub window: Window,
    /// Topics by stream and alias.
    pub aliases: BTreeMap<(StreamId, u16), String>,
    /// By packet identifier: the stream, whether it is a SUBSCRIBE, and the filters.
    pub requests: BTreeMap<u16, (StreamId, bool, Vec<String>)>,
    pub aliases_in: BTreeMap<(StreamId, u16), String>,
    /// Data streams on which filters were asked for.
    pub bound: BTreeSet<(StreamId, String)>,
    pub expected_present: bool,
    pub seen: BTreeMap<String, usize>,
    pub sessions: u64,
    /// Filters that it has asked for.
    pub asks: u64,
}

pub(crate) struct Oracle {
    pub rules: Rules,
    pub clients: Vec<Client>,
    pub inbound: Inbound,
    pub delivered: u64,
    pub trace: bool,
    pub asks: u64,
    /// Since when the broker was away last, and until when; `None`: it still is.
    pub away: (Millis, Option<Millis>),
    /// The filters that the broker has again since it lost all. `None`: it never did.
    pub regained: Option<BTreeSet<String>>,
    /// The latest event of the broker.
    pub latest: u64,
}

impl Oracle {
    pub(crate) fn new(rules: Rules, profiles: &[Profile]) -> Self {
        let client = |p: &Profile| Client {
            profile: p.clone(),
            exists: false,
            attached: None,
            expiry: 0,
            ends_at: None,
            ledger: Ledger::default(),
            window: Window::default(),
            aliases: BTreeMap::new(),
            requests: BTreeMap::new(),
            aliases_in: BTreeMap::new(),
            bound: BTreeSet::new(),
            expected_present: false,
            seen: BTreeMap::new(),
            sessions: 0,
            asks: 0,
        };
        Self {
            rules,
            clients: profiles.iter().map(client).collect(),
            inbound: Inbound::new(profiles.len()),
            delivered: 0,
            trace: false,
            asks: 0,
            latest: 0,
            away: (Millis::ZERO, Some(Millis::ZERO)),
            regained: None,
        }
    }

    /// CONNECT of `link` is about to be handed over.
    pub(crate) fn connecting(
        &mut self,
        device: usize,
        link: u64,
        clean: bool,
        asked: Option<u32>,
        will: Option<(String, u32, QoS)>,
        now: Millis,
    ) {
        let rules = self.rules;
        let c = &mut self.clients[device];
        let taken_over = c.attached.is_some();
        let goes_on = c.exists && !clean && !(taken_over && c.expiry == 0);
        c.expected_present = goes_on;
        if c.exists && !goes_on {
            self.ended(device, now);
        }
        let c = &mut self.clients[device];
        if goes_on {
            self.inbound.resumed(device, now);
        }
        c.expiry = match c.profile.version {
            Version::V5 => asked.unwrap_or(0),
            _ if clean => 0,
            _ => rules.expiry_v3,
        }
        .min(rules.expiry_max);
        c.exists = true;
        c.attached = Some(link);
        c.ends_at = None;
        c.aliases.clear();
        c.aliases_in.clear();
        c.requests.clear();
        c.bound.clear();
        let receive_max = match c.profile.version {
            Version::V5 => c.profile.receive_max.map_or(65_535, usize::from),
            _ => 65_535,
        };
        c.window = c.ledger.window(receive_max);
        c.window.evicts = rules.evicts;
        self.inbound.connected(device, will);
    }

    /// The router gave the session.
    pub(crate) fn connected(&mut self, device: usize, present: bool) -> Checked {
        let expected = self.clients[device].expected_present;
        if expected != present {
            return Err(format!(
                "Session Present {present}, but it is {expected} [MQTT-3.2.2-3]"
            ));
        }
        Ok(())
    }

    /// A session is over.
    pub(crate) fn ended(&mut self, device: usize, now: Millis) {
        let c = &mut self.clients[device];
        c.exists = false;
        c.attached = None;
        c.ends_at = None;
        c.ledger = Ledger::default();
        c.sessions += 1;
        self.inbound.ended(device, now);
    }

    /// The router was told that `link` ended.
    pub(crate) fn closed(&mut self, device: usize, link: u64, normal: bool, now: Millis) {
        let c = &mut self.clients[device];
        if c.attached != Some(link) {
            return;
        }
        c.attached = None;
        let expiry = c.expiry;
        self.inbound.closed(device, normal, expiry, now);
        let c = &mut self.clients[device];
        if expiry == 0 {
            self.ended(device, now);
        } else if expiry != u32::MAX {
            c.ends_at = Some(now + Duration::from_secs(expiry.into()));
        }
    }

    /// A data stream of the current connection has ended, at least in the client's direction: what
    /// the client has not acknowledged there is sent again.
    pub(crate) fn stream_closed(&mut self, device: usize, link: u64, stream: StreamId) {
        let c = &mut self.clients[device];
        if c.attached == Some(link) {
            c.ledger.stream_closed(&mut c.window, stream);
        }
    }

    /// A data stream has ended in both directions.
    pub(crate) fn stream_ended(&mut self, device: usize, link: u64, stream: StreamId) {
        self.stream_closed(device, link, stream);
        let c = &mut self.clients[device];
        if c.attached == Some(link) {
            c.aliases.retain(|(on, _), _| *on != stream);
            c.aliases_in.retain(|(on, _), _| *on != stream);
            let unanswered = c.requests.extract_if(.., |_, (on, ..)| *on == stream);
            for (packet_id, _) in unanswered {
                c.ledger.unanswered(link, packet_id);
            }
            c.bound.retain(|(on, _)| *on != stream);
        }
    }

    /// The router had its tick.
    pub(crate) fn ticked(&mut self, now: Millis) {
        for device in 0..self.clients.len() {
            let c = &self.clients[device];
            if c.exists && c.attached.is_none() && c.ends_at.is_some_and(|at| at <= now) {
                self.ended(device, now);
            }
        }
    }

    /// With `queue_full = "end_session"` sessions end on their own.
    pub(crate) fn look(&mut self, router: &Router, now: Millis) -> Checked {
        for device in 0..self.clients.len() {
            let c = &self.clients[device];
            let there = router.session(&c.profile.id.as_str().into()).is_some();
            if c.exists && !there {
                if !self.rules.ends_full {
                    return Err(format!("the session of {} is gone", c.profile.id));
                }
                if c.attached.is_some() {
                    let id = &c.profile.id;
                    return Err(format!("{id} is connected, and its session is gone"));
                }
                self.inbound.closed(device, false, 0, now);
                self.inbound.answers_lost(device);
                self.ended(device, now);
            } else if !c.exists && there {
                return Err(format!("the session of {} did not end", c.profile.id));
            }
        }
        Ok(())
    }

    /// A batch of messages was delivered, before which the sessions showed the gaps `before`: no
    /// connected client may have lost one, unless it takes no packet of that size.
    pub(crate) fn delivered_all(&self, before: &[u64], after: &[u64]) -> Checked {
        for ((c, before), after) in self.clients.iter().zip(before).zip(after) {
            let kept = c.attached.is_some() && c.profile.packet_max.is_none();
            if kept && !self.rules.evicts && after > before {
                let id = &c.profile.id;
                return Err(format!("{id} is connected and lost {}", after - before));
            }
        }
        Ok(())
    }

    /// The broker is to send a message: whoever was granted a matching filter must have it held.
    pub(crate) fn routed(&self, topic: &str, held: &BTreeMap<String, (FilterId, QoS)>) -> Checked {
        for c in &self.clients {
            for sub in &c.ledger.subs {
                if sub.granted.is_some()
                    && !sub.in_doubt
                    && matching(&sub.filter, topic)
                    && !held.keys().any(|h| self.rules.serves(h, &sub.filter))
                {
                    return Err(format!(
                        "{} was granted {sub:?}, which the broker does not hold (I4)",
                        c.profile.id
                    ));
                }
            }
        }
        Ok(())
    }

    /// The broker has the filter: from now on it is not in doubt, and neither are those inside it.
    pub(crate) fn holds(&mut self, filter: &str) {
        if let Some(regained) = &mut self.regained {
            regained.insert(filter.to_owned());
        }
        let rules = self.rules;
        for c in &mut self.clients {
            for sub in &mut c.ledger.subs {
                if sub.filter == filter || rules.serves(filter, &sub.filter) {
                    sub.in_doubt = false;
                }
            }
        }
    }

    /// The broker has unsubscribed a filter that it was last asked for at `since`. A subscription that
    /// the router granted without an answer since then was granted while the filter was leaving: it is
    /// in doubt until the broker has the filter again.
    pub(crate) fn unsubscribed(&mut self, filter: &str, since: Millis) {
        let rules = self.rules;
        let subs = self.clients.iter_mut().flat_map(|c| &mut c.ledger.subs);
        for sub in subs.filter(|s| rules.serves(filter, &s.filter) && s.guessed) {
            sub.in_doubt |= sub.granted_at.is_some_and(|at| at > since);
        }
    }

    /// The broker, or the data link, is away from now on, if it is not yet.
    pub(crate) fn gone(&mut self, now: Millis) {
        let (since, until) = self.away;
        let again = until.is_none_or(|until| now < until + RECOVERY);
        self.away = (if again { since } else { now }, None);
        // The messages that the broker keeps for the link are older than retained ones.
        for want in self.clients.iter_mut().flat_map(|c| &mut c.ledger.wants) {
            want.in_order = false;
        }
    }

    /// The broker lost its filters: until it has them again, messages are missed.
    pub(crate) fn forgotten(&mut self) {
        for sub in self.clients.iter_mut().flat_map(|c| &mut c.ledger.subs) {
            sub.in_doubt = true;
            sub.guessed = true;
        }
        self.away = (Millis::ZERO, None);
        self.regained = Some(BTreeSet::new());
    }

    /// A fetch of retained messages failed, and is made anew. `answered`: the broker had answered it, so
    /// that live messages follow the first copies of the retained ones, and may come before the second.
    pub(crate) fn fetched_anew(&mut self, filter: &str, answered: bool) {
        for want in self.clients.iter_mut().flat_map(|c| &mut c.ledger.wants) {
            if want.filter == filter {
                want.failed += 1;
                want.in_order &= !answered;
            }
        }
    }

    /// All copies of one message arrive on the data link at once: notes what each session is owed.
    pub(crate) fn arrives(&mut self, copies: &[Copy], now: Millis) {
        let Some(first) = copies.first() else {
            return;
        };
        let key = key(&first.payload);
        let publisher = self.inbound.publisher(&key);
        for (device, c) in self.clients.iter_mut().enumerate() {
            if !c.exists {
                continue;
            }
            let own_at = publisher.and_then(|(by, at)| (by == device).then_some(at));
            let Some(claim) = Claim::of(self.rules, &c.ledger, copies, first, own_at) else {
                continue;
            };
            if self.trace {
                crate::trace::line(format_args!(
                    "         {} is owed {key} at {:?}: {:?}",
                    c.profile.id, claim.qos, c.ledger.subs
                ));
            }
            let mut wants = c.ledger.wants.iter();
            let deferred = wants.any(|w| matching(&w.filter, &first.topic) && w.may_defer(now));
            c.ledger.owed.push(claim.owed(&key, first, deferred));
        }
    }

    /// What a device saw.
    pub(crate) fn seen(&mut self, device: usize, seen: &Seen) -> Checked {
        let c = &mut self.clients[device];
        let Seen::Message {
            topic,
            payload,
            qos,
            dup,
            retain,
            fresh,
        } = seen
        else {
            return Ok(());
        };
        if *retain || !fresh {
            return Ok(());
        }
        let key = key(payload);
        let copies = c.seen.entry(key.clone()).or_default();
        *copies += usize::from(!dup || *qos == QoS::ExactlyOnce);
        // A publisher may have sent it twice, where the protocol makes that two messages.
        let published = self.inbound.forwards(&key);
        if *copies > published {
            return Err(format!(
                "{key} on {topic} reached {} {copies} times at {qos:?}, it was published {published} times",
                c.profile.id
            ));
        }
        Ok(())
    }

    /// Everybody is connected and everything at rest: nothing may be missing but by a limit.
    pub(crate) fn settled(&self, router: &Router, links: &[Option<u64>], now: Millis) -> Checked {
        for (c, link) in self.clients.iter().zip(links) {
            if !c.exists {
                continue;
            }
            // A connection that nobody is behind takes nothing.
            let there = c.attached.is_some() && c.attached == *link;
            let id = &c.profile.id;
            let Some(info) = router.session(&(&**id).into()) else {
                return Err(format!("the session of {id} is gone"));
            };
            let (must, alive, all) = c.ledger.missing(now);
            let gaps = (info.gaps - c.ledger.link_gaps) as usize;
            let excused = gaps + info.queue_messages + c.ledger.ambiguous;
            if alive > excused {
                let lost: Vec<&Owed> = c
                    .ledger
                    .owed
                    .iter()
                    .filter(|o| !o.written && o.must)
                    .collect();
                return Err(format!(
                    "{id} misses {alive} messages, and {gaps} are said to be lost: {lost:?}"
                ));
            }
            let lost = c.ledger.lost_for_no_limit(now);
            let kept = there && c.profile.packet_max.is_none();
            if self.rules.roomy && kept && lost > c.ledger.ambiguous {
                return Err(format!(
                    "{id} misses {lost} messages that no limit concerns"
                ));
            }
            if !self.rules.evicts
                && c.ledger.wants.is_empty()
                && gaps > all + c.ledger.late_gaps as usize
            {
                return Err(format!(
                    "{id} misses {must} to {all} messages, and {gaps} are said to be lost"
                ));
            }
            if there && info.queue_messages > 0 {
                return Err(format!(
                    "{id} is connected, and {} messages still wait",
                    info.queue_messages
                ));
            }
            if there && info.in_flight > 0 {
                return Err(format!(
                    "{id} is connected, and {} are unacknowledged",
                    info.in_flight
                ));
            }
        }
        Ok(())
    }
}

/// A message's name: its payload up to the colon.
pub(crate) fn key(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(payload);
    text.split(':').next().unwrap_or_default().to_owned()
}

pub(crate) fn event(key: &str) -> u64 {
    key.rsplit('#')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}
