//! What must be true of the router, seen only from its edges: packets in, packets out, what it
//! hands to the core and takes from it.

use std::collections::{BTreeMap, HashMap};

use tidegate::mqtt::{Decoder, Packet, QoS, ReasonCode, Receiver, SubscribeOptions, Version};
use tidegate::router::Router;

use crate::core::{Copy, matching};
use crate::device::{Profile, Seen};
use crate::inbound::Inbound;
use crate::ledger::{Ask, Ledger, Owed, Sub, Want, Window};

pub type Checked = Result<(), String>;

/// Limits of the run that change what may happen.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub grants: QoS,
    pub hold: u64,
    pub expiry_max: u32,
    pub expiry_v3: u32,
    /// The queues' budget may evict.
    pub evicts: bool,
    pub ends_full: bool,
}

/// One client as the oracle knows it.
pub struct Client {
    pub profile: Profile,
    pub exists: bool,
    pub attached: Option<u64>,
    pub expiry: u32,
    pub ends_at: u64,
    pub ledger: Ledger,
    window: Window,
    aliases: HashMap<u16, String>,
    requests: HashMap<u16, (bool, Vec<String>)>,
    aliases_in: HashMap<u16, String>,
    expected_present: bool,
    seen: HashMap<String, usize>,
    pub sessions: u64,
}

pub struct Oracle {
    pub rules: Rules,
    pub clients: Vec<Client>,
    pub inbound: Inbound,
    pub delivered: u64,
    pub trace: bool,
    asks: u64,
    /// Since when the core was away last, and until when.
    pub away: (u64, u64),
    /// The latest event of the core.
    pub latest: u64,
}

impl Oracle {
    pub fn new(rules: Rules, profiles: &[Profile]) -> Self {
        let client = |p: &Profile| Client {
            profile: p.clone(),
            exists: false,
            attached: None,
            expiry: 0,
            ends_at: u64::MAX,
            ledger: Ledger::default(),
            window: Window::default(),
            aliases: HashMap::new(),
            requests: HashMap::new(),
            aliases_in: HashMap::new(),
            expected_present: false,
            seen: HashMap::new(),
            sessions: 0,
        };
        Self {
            rules,
            clients: profiles.iter().map(client).collect(),
            inbound: Inbound::new(profiles.len()),
            delivered: 0,
            trace: false,
            asks: 0,
            latest: 0,
            away: (0, 0),
        }
    }

    /// CONNECT of `link` is about to be handed over.
    pub fn connecting(
        &mut self,
        device: usize,
        link: u64,
        clean: bool,
        asked: Option<u32>,
        will: Option<(String, u32, QoS)>,
        now: u64,
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
        c.ends_at = u64::MAX;
        c.aliases.clear();
        c.aliases_in.clear();
        c.requests.clear();
        let receive_max = match c.profile.version {
            Version::V5 => c.profile.receive_max.map_or(65_535, usize::from),
            _ => 65_535,
        };
        c.window = c.ledger.window(receive_max);
        c.window.evicts = rules.evicts;
        self.inbound.connected(device, will);
    }

    /// The router gave the session.
    pub fn connected(&mut self, device: usize, present: bool) -> Checked {
        let expected = self.clients[device].expected_present;
        if expected != present {
            return Err(format!(
                "Session Present {present}, but it is {expected} [MQTT-3.2.2-3]"
            ));
        }
        Ok(())
    }

    /// A session is over.
    pub fn ended(&mut self, device: usize, now: u64) {
        let c = &mut self.clients[device];
        c.exists = false;
        c.attached = None;
        c.ends_at = u64::MAX;
        c.ledger = Ledger::default();
        c.sessions += 1;
        self.inbound.ended(device, now);
    }

    /// The router was told that `link` ended.
    pub fn closed(&mut self, device: usize, link: u64, normal: bool, now: u64) {
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
            c.ends_at = now + u64::from(expiry) * 1000;
        }
    }

    /// The router had its tick.
    pub fn ticked(&mut self, now: u64) {
        for device in 0..self.clients.len() {
            let c = &self.clients[device];
            if c.exists && c.attached.is_none() && c.ends_at <= now {
                self.ended(device, now);
            }
        }
    }

    /// With `queue_full = "end_session"` sessions end on their own.
    pub fn look(&mut self, router: &Router, now: u64) -> Checked {
        for device in 0..self.clients.len() {
            let c = &self.clients[device];
            let there = router.session(&c.profile.id).is_some();
            if c.exists && !there {
                if !self.rules.ends_full {
                    return Err(format!("the session of {} is gone", c.profile.id));
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

    /// A packet of the client was taken by its session.
    pub fn took(&mut self, device: usize, packet: &Packet<'_>, now: u64) {
        let (grants, expiry_max) = (self.rules.grants, self.rules.expiry_max);
        let latest = self.latest;
        self.asks += 1;
        let number = self.asks;
        let c = &mut self.clients[device];
        let Some(link) = c.attached else {
            return;
        };
        match packet {
            Packet::Publish(p) => {
                let topic = match p.topic_alias {
                    Some(alias) if p.topic.is_empty() => c.aliases_in[&alias].clone(),
                    Some(alias) => {
                        c.aliases_in.insert(alias, p.topic.to_owned());
                        p.topic.to_owned()
                    }
                    None => p.topic.to_owned(),
                };
                self.inbound.publish(device, &topic, p, now);
            }
            Packet::Puback(a) => {
                c.ledger
                    .acknowledged(&mut c.window, a.packet_id, QoS::AtLeastOnce)
            }
            Packet::Pubcomp(a) => {
                c.ledger
                    .acknowledged(&mut c.window, a.packet_id, QoS::ExactlyOnce)
            }
            Packet::Pubrec(a) => c.ledger.received(a.packet_id),
            Packet::Subscribe(s) => {
                let mut names = Vec::new();
                for (index, (filter, options)) in s.filters().enumerate() {
                    names.push(filter.to_owned());
                    let options = SubscribeOptions {
                        qos: options.qos.min(grants),
                        ..options
                    };
                    let known = c.ledger.subs.iter().position(|s| s.filter == filter);
                    let ask = Ask {
                        link,
                        packet_id: s.packet_id,
                        index,
                        options,
                        identifier: s.subscription_id.unwrap_or(0),
                        fresh: known.is_none(),
                        at: now,
                        number,
                    };
                    if options.retain_handling == 0 || (options.retain_handling == 1 && ask.fresh) {
                        c.ledger.wants.push(Want {
                            filter: filter.to_owned(),
                            got: Default::default(),
                            failed: 0,
                            until: u64::MAX,
                        });
                    }
                    if let Some(at) = known {
                        let sub = &mut c.ledger.subs[at];
                        let before = sub.asked.last().map(|a| a.options);
                        let before = before.or(sub.granted.map(|(_, o, _)| o));
                        if before.is_none_or(|o| !o.no_local) {
                            sub.no_local_since = now;
                        }
                    }
                    match known {
                        Some(at) => c.ledger.subs[at].asked.push(ask),
                        None => c.ledger.subs.push(Sub {
                            filter: filter.to_owned(),
                            granted: None,
                            asked: vec![ask],
                            no_local_since: now,
                            in_doubt: false,
                        }),
                    }
                }
                c.requests.insert(s.packet_id, (true, names));
            }
            Packet::Unsubscribe(u) => {
                let names: Vec<String> = u.filters().map(str::to_owned).collect();
                c.ledger.subs.retain(|s| !names.contains(&s.filter));
                let ended = c.ledger.wants.iter_mut();
                for want in ended.filter(|w| names.contains(&w.filter)) {
                    want.until = want.until.min(latest);
                }
                c.requests.insert(u.packet_id, (false, names));
            }
            Packet::Disconnect(d) => {
                if let Some(expiry) = d.session_expiry {
                    c.expiry = expiry.min(expiry_max);
                }
            }
            _ => {}
        }
    }

    /// Bytes that the router wrote for the connection.
    pub fn wrote(&mut self, device: usize, link: u64, bytes: &[u8], now: u64) -> Checked {
        let c = &self.clients[device];
        if c.attached != Some(link) {
            return Ok(());
        }
        let version = c.profile.version;
        let decoder = Decoder {
            version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut at = 0;
        while let Some((packet, size)) = decoder
            .next(&bytes[at..])
            .map_err(|e| format!("what was written does not decode: {e}"))?
        {
            at += size;
            let c = &self.clients[device];
            if version == Version::V5
                && c.profile.packet_max.is_some_and(|max| size > max as usize)
                && !matches!(packet, Packet::Connack(_))
            {
                return Err(format!(
                    "{size} bytes, Maximum Packet Size is less [MQTT-3.1.2-24]: {packet:?}"
                ));
            }
            self.packet(device, link, version, &packet, now)
                .map_err(|e| {
                    format!(
                        "to {}: {}: {e}",
                        self.clients[device].profile.id,
                        short(&packet)
                    )
                })?;
        }
        if at != bytes.len() {
            return Err("half a packet was written".into());
        }
        Ok(())
    }

    fn packet(
        &mut self,
        device: usize,
        link: u64,
        version: Version,
        packet: &Packet<'_>,
        now: u64,
    ) -> Checked {
        let hold = self.rules.hold;
        let evicts = self.rules.evicts;
        // While the core is away a filter is granted as it was asked for.
        let guessed = self.inbound.core_was_away;
        // Long enough away, it may have been granted to somebody who did not hear of it.
        let long = now >= self.away.0 + hold && now < self.away.1.saturating_add(5000);
        let doubtful: Vec<String> = match packet {
            Packet::Suback(_) => {
                let subs = self.clients.iter().flat_map(|c| &c.ledger.subs);
                let subs = subs.filter(|s| s.in_doubt);
                subs.map(|s| s.filter.clone()).collect()
            }
            _ => Vec::new(),
        };
        let c = &mut self.clients[device];
        match packet {
            Packet::Publish(p) => {
                let topic = match p.topic_alias {
                    Some(alias) if p.topic.is_empty() => c.aliases.get(&alias).cloned(),
                    Some(alias) => {
                        c.aliases.insert(alias, p.topic.to_owned());
                        Some(p.topic.to_owned())
                    }
                    None => Some(p.topic.to_owned()),
                };
                let topic = topic.ok_or("an undefined alias")?;
                let key = key(p.payload);
                c.ledger
                    .wrote(&mut c.window, version, &topic, &key, p, now)?;
                self.delivered += 1;
                Ok(())
            }
            Packet::Pubrel(a) if a.reason == ReasonCode::SUCCESS && !evicts => {
                c.ledger.released(a.packet_id)
            }
            Packet::Puback(a) => {
                self.inbound
                    .answered(device, a.packet_id, QoS::AtLeastOnce, a.reason)
            }
            Packet::Pubrec(a) => {
                self.inbound
                    .answered(device, a.packet_id, QoS::ExactlyOnce, a.reason)
            }
            Packet::Suback(s) => {
                if self.trace {
                    eprintln!("         {} is written {packet:?}", c.profile.id);
                }
                let Some((true, names)) = c.requests.remove(&s.packet_id) else {
                    return Err("SUBACK without a SUBSCRIBE [MQTT-3.8.4-2]".into());
                };
                if names.len() != s.codes.len() {
                    return Err("SUBACK has another number of codes [MQTT-3.8.4-6]".into());
                }
                // What one was granted without the core, another is too.
                let doubted = |name: &String| long || doubtful.contains(name);
                for (index, (name, code)) in names.iter().zip(s.codes).enumerate() {
                    granted(
                        &mut c.ledger,
                        link,
                        s.packet_id,
                        index,
                        name,
                        *code,
                        hold,
                        guessed,
                        doubted(name),
                        now,
                    )?;
                }
                Ok(())
            }
            Packet::Unsuback(u) => match c.requests.remove(&u.packet_id) {
                Some((false, _)) => Ok(()),
                _ => Err("UNSUBACK without an UNSUBSCRIBE [MQTT-3.10.4-5]".into()),
            },
            _ => Ok(()),
        }
    }

    /// The core is to send a message: whoever was granted a matching filter must have it held.
    pub fn routed(&self, topic: &str, held: &BTreeMap<String, (u32, QoS)>) -> Checked {
        for c in &self.clients {
            for sub in &c.ledger.subs {
                if sub.granted.is_some()
                    && !sub.in_doubt
                    && matching(&sub.filter, topic)
                    && !held.contains_key(&sub.filter)
                {
                    return Err(format!(
                        "{} was granted {sub:?}, which the core does not hold (I4)",
                        c.profile.id
                    ));
                }
            }
        }
        Ok(())
    }

    /// The core has the filter: from now on it is not in doubt.
    pub fn holds(&mut self, filter: &str) {
        for c in &mut self.clients {
            for sub in &mut c.ledger.subs {
                if sub.filter == filter {
                    sub.in_doubt = false;
                }
            }
        }
    }

    /// A fetch of retained messages failed, and is made anew.
    pub fn fetched_anew(&mut self, filter: &str) {
        for want in self.clients.iter_mut().flat_map(|c| &mut c.ledger.wants) {
            if want.filter == filter {
                want.failed += 1;
            }
        }
    }

    /// Copies of one message come in on the data link, all at once.
    pub fn arrives(&mut self, copies: &[Copy], now: u64) {
        let Some(first) = copies.first() else {
            return;
        };
        let key = key(&first.payload);
        let publisher = self.inbound.publisher(&key);
        for (device, c) in self.clients.iter_mut().enumerate() {
            if !c.exists {
                continue;
            }
            let own = publisher.is_some_and(|(d, _)| d == device);
            let published_at = publisher.map_or(0, |(_, at)| at);
            let mut must = false;
            let mut qos = Vec::new();
            let mut best: Option<(QoS, QoS)> = None;
            let (mut needed, mut allowed) = (Vec::new(), Vec::new());
            let (mut retain_must, mut retain_may) = (false, false);
            let mut any = false;
            let mut settled = true;
            for sub in &c.ledger.subs {
                let copy = copies
                    .iter()
                    .find(|copy| copy.filters.iter().any(|(_, f)| *f == sub.filter));
                let Some(copy) = copy else {
                    // Not yet there at the core; its identifier may be sent already.
                    if matching(&sub.filter, &first.topic) {
                        let asked = sub.asked.iter().map(|a| (a.options, a.identifier));
                        let granted = sub.granted.iter().map(|(_, o, i)| (*o, *i));
                        for (options, id) in asked.chain(granted) {
                            allowed.push(id);
                            retain_may |= options.retain_as_published && first.retain;
                        }
                    }
                    continue;
                };
                let hides = |o: &SubscribeOptions| own && o.no_local;
                // A publish that was before the subscription is not marked.
                let unmarked = own && published_at <= sub.no_local_since;
                let candidates = sub.granted.iter().copied().map(|(q, o, i)| (true, q, o, i));
                let asked = sub
                    .asked
                    .iter()
                    .map(|a| (false, a.options.qos, a.options, a.identifier));
                for (granted, q, options, id) in candidates.chain(asked) {
                    if hides(&options) && !unmarked {
                        continue;
                    }
                    any = true;
                    qos.push(q.min(copy.qos));
                    if !granted {
                        // It may be granted less.
                        qos.extend(
                            crate::edge::QOS
                                .into_iter()
                                .filter(|l| *l < q.min(copy.qos)),
                        );
                    }
                    allowed.push(id);
                    retain_may |= options.retain_as_published && copy.retain;
                    if !granted || !sub.asked.is_empty() || hides(&options) {
                        settled = false;
                        continue;
                    }
                    must = true;
                    if id != 0 {
                        needed.push(id);
                    }
                    retain_must |= options.retain_as_published && copy.retain;
                    if best.is_none_or(|(b, _)| q > b) {
                        best = Some((q, q.min(copy.qos)));
                    }
                }
                // A replacement that is under way: there is a subscription all along.
                must |= sub.granted.is_some_and(|(_, o, _)| !hides(&o))
                    && sub.asked.iter().all(|a| !hides(&a.options));
            }
            if !any {
                continue;
            }
            if settled && let Some((_, exact)) = best {
                qos = vec![exact];
            }
            if self.trace {
                eprintln!(
                    "         {} is owed {key} at {qos:?}: {:?}",
                    c.profile.id, c.ledger.subs
                );
            }
            c.ledger.owed.push(Owed {
                event: event(&key),
                key: key.clone(),
                topic: first.topic.clone(),
                must,
                qos,
                ids_needed: needed,
                ids_allowed: allowed,
                retain_must,
                retain_may,
                retained: first.retain,
                expires_at: first.expires_at,
                written: false,
            });
        }
        let _ = now;
    }

    /// What a device saw.
    pub fn seen(&mut self, device: usize, seen: &Seen) -> Checked {
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
    pub fn settled(&self, router: &Router, now: u64) -> Checked {
        for c in &self.clients {
            if !c.exists {
                continue;
            }
            let id = &c.profile.id;
            let Some(info) = router.session(id) else {
                return Err(format!("the session of {id} is gone"));
            };
            let (must, alive, all) = c.ledger.missing(now);
            let gaps = info.gaps as usize;
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
            if !self.rules.evicts && c.ledger.wants.is_empty() && gaps > all {
                return Err(format!(
                    "{id} misses {must} to {all} messages, and {gaps} are said to be lost"
                ));
            }
            if c.attached.is_some() && info.queue_messages > 0 {
                return Err(format!(
                    "{id} is connected, and {} messages still wait",
                    info.queue_messages
                ));
            }
            if c.attached.is_some() && info.in_flight > 0 {
                return Err(format!(
                    "{id} is connected, and {} are unacknowledged",
                    info.in_flight
                ));
            }
        }
        Ok(())
    }
}

#[allow(clippy::too_many_arguments)]
fn granted(
    ledger: &mut Ledger,
    link: u64,
    packet_id: u16,
    index: usize,
    name: &str,
    code: u8,
    hold: u64,
    guessed: bool,
    doubted: bool,
    now: u64,
) -> Checked {
    let Some(at) = ledger.subs.iter().position(|s| s.filter == name) else {
        return Ok(());
    };
    let sub = &mut ledger.subs[at];
    let ask = sub
        .asked
        .iter()
        .position(|a| a.link == link && a.packet_id == packet_id && a.index == index);
    let Some(ask) = ask.map(|i| sub.asked.remove(i)) else {
        return Ok(());
    };
    // What was asked before it, on an earlier connection too, is replaced.
    sub.asked.retain(|a| a.number > ask.number);
    let Some(granted) = QoS::from_u8(code) else {
        if sub.granted.is_none() && sub.asked.is_empty() {
            ledger.subs.remove(at);
        }
        return Ok(());
    };
    let late = now >= ask.at + hold;
    if granted > ask.options.qos && !late && !guessed {
        return Err(format!(
            "{name} is granted {granted:?}, asked was {:?}",
            ask.options.qos
        ));
    }
    sub.in_doubt |= late || doubted;
    sub.granted = Some((granted, ask.options, ask.identifier));
    Ok(())
}

/// A message's name: its payload up to the colon.
pub fn key(payload: &[u8]) -> String {
    let text = String::from_utf8_lossy(payload);
    text.split(':').next().unwrap_or_default().to_owned()
}

pub fn event(key: &str) -> u64 {
    key.rsplit('#')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

pub fn short(packet: &Packet<'_>) -> String {
    match packet {
        Packet::Publish(p) => format!(
            "PUBLISH {} id {} on {:?} {:?} dup {} retain {}",
            key(p.payload),
            p.packet_id,
            p.topic,
            p.qos,
            p.dup,
            p.retain
        ),
        other => format!("{other:?}"),
    }
}
