//! Knows what clients asked for, what they were told, and what befell the links; judges what each
//! client got.

use std::collections::BTreeMap;

use crate::mqtt::{QoS, ReasonCode, SubscribeOptions};
use crate::time::Millis;

use crate::sim::seen::{Client, Got, Message, Sub, chances};
use tidegate_kit::rng::Rng;

/// How long a message may be on its way through a core that forgets it, milliseconds.
const TRANSIT: u64 = 1500;

pub struct Oracle {
    clients: Vec<Client>,
    messages: BTreeMap<u32, Message>,
    /// By client: an MQTT 5 one is told reasons.
    tells: Vec<bool>,
    stormy: bool,
    data_links: usize,
    lowers: bool,
    windowed: bool,
    publish_lost: Vec<u64>,
    forgot: Vec<u64>,
    /// When the core forgot one link's session.
    forgets: Vec<u64>,
    doubts: Vec<u64>,
    faults: Vec<String>,
}

impl Oracle {
    /// `lowers`: the core's one copy for overlapping filters has the lowest QoS, and what waits for
    /// nobody at QoS 0 is lost: nothing can be promised of it. `windowed`: messages wait at the core
    /// behind a small window, while it answers PINGREQs at once.
    pub fn new(
        tells: Vec<bool>,
        stormy: bool,
        data_links: usize,
        lowers: bool,
        windowed: bool,
    ) -> Self {
        Self {
            clients: tells.iter().map(|_| Client::default()).collect(),
            tells,
            messages: BTreeMap::new(),
            stormy,
            data_links,
            lowers,
            windowed,
            publish_lost: Vec::new(),
            forgot: Vec::new(),
            forgets: Vec::new(),
            doubts: Vec::new(),
            faults: Vec::new(),
        }
    }

    pub fn fault(&mut self, what: String) {
        self.faults.push(what);
    }

    pub fn first_fault(&mut self) -> Option<String> {
        self.faults.first().cloned()
    }

    pub fn topic_of(&self, number: u32) -> &'static str {
        let topic = &self.messages[&number].topic;
        crate::sim::TOPICS
            .iter()
            .find(|t| *t == topic)
            .expect("one of ours")
    }

    pub fn lost_link(&mut self, now: Millis, publishes: bool) {
        if publishes {
            self.publish_lost.push(now);
        }
    }

    pub fn restarted(&mut self, now: Millis, keep: bool) {
        if !keep {
            self.forgot.push(now);
        }
    }

    /// Until that link is back nobody knows, and others go on publishing. Then copies by filters on
    /// links that are away just now are in doubt.
    pub fn forgets(&mut self, now: Millis) {
        self.forgot.push(now);
        self.forgets.push(now);
    }

    /// Whether the core had forgotten a link's session when a message came, and the link was away.
    fn unseen(&self, message: &Message) -> bool {
        let about = |t: &u64| *t <= message.at && message.at <= *t + TRANSIT;
        self.forgets.iter().any(about)
    }

    /// Whether a link's session was begun anew is not known: overlapping filters of several links may
    /// lose a copy.
    pub fn in_doubt(&mut self, now: Millis) {
        self.doubts.push(now);
    }

    pub fn cut(&mut self, n: usize, now: Millis) {
        self.clients[n].cuts.push(now);
    }

    pub fn asks(&mut self, n: usize, filters: &[(String, SubscribeOptions)], now: Millis) {
        for (filter, options) in filters {
            self.clients[n].subs.push(Sub {
                filter: filter.clone(),
                qos: options.qos,
                no_local: options.no_local,
                handling: options.retain_handling,
                asked_at: now,
                granted_at: None,
                ended_at: u64::MAX,
            });
        }
    }

    pub fn granted(
        &mut self,
        n: usize,
        filter: &str,
        options: &SubscribeOptions,
        code: u8,
        now: Millis,
    ) {
        let subs = &mut self.clients[n].subs;
        let same = |s: &Sub| s.filter == filter && s.ended_at == u64::MAX;
        let Some(at) = subs.iter().position(|s| {
            same(s)
                && s.granted_at.is_none()
                && (s.qos, s.no_local) == (options.qos, options.no_local)
        }) else {
            return;
        };
        if code >= 0x80 {
            // A refusal ends what there was on that filter.
            for s in subs[..=at].iter_mut().filter(|s| same(s)) {
                s.ended_at = now;
            }
            return;
        }
        for s in subs[..at].iter_mut().filter(|s| same(s)) {
            s.ended_at = now;
        }
        subs[at].granted_at = Some(now);
        subs[at].qos = subs[at].qos.min(QoS::from_u8(code).unwrap_or_default());
    }

    pub fn leaves(&mut self, n: usize, filter: &str, now: Millis) {
        for s in &mut self.clients[n].subs {
            if s.filter == filter && s.ended_at == u64::MAX {
                s.ended_at = now;
            }
        }
    }

    pub fn any_filter(&self, n: usize, rng: &mut Rng) -> Option<String> {
        let held = self.clients[n]
            .subs
            .iter()
            .filter(|s| s.ended_at == u64::MAX);
        let held: Vec<&str> = held.map(|s| &*s.filter).collect();
        (!held.is_empty()).then(|| rng.pick(&held).to_owned())
    }

    /// Filters that some client was granted and still holds.
    pub fn filters(&self) -> Vec<String> {
        let all = self.clients.iter().flat_map(|c| &c.subs);
        let held = all.filter(|s| s.ended_at == u64::MAX && s.granted_at.is_some());
        let mut filters: Vec<String> = held.map(|s| s.filter.clone()).collect();
        filters.sort();
        filters.dedup();
        filters
    }

    pub fn published(
        &mut self,
        from: usize,
        number: u32,
        topic: &str,
        qos: QoS,
        retain: bool,
        at: u64,
    ) {
        let message = Message {
            from,
            topic: topic.to_owned(),
            qos,
            retain,
            will: false,
            poison: false,
            at,
            acknowledged_at: u64::MAX,
        };
        self.messages.insert(number, message);
    }

    /// A will is published; nobody is told when the core has it. I16: not before, and once.
    pub fn bids(&mut self, from: usize, number: u32, topic: &str, qos: QoS, at: u64) {
        self.published(from, number, topic, qos, false, at);
        if let Some(message) = self.messages.get_mut(&number) {
            message.will = true;
        }
    }

    /// A message that the core cannot bear.
    pub fn poisons(&mut self, number: u32) {
        if let Some(message) = self.messages.get_mut(&number) {
            message.poison = true;
        }
    }

    pub fn is_poison(&self, number: u32) -> bool {
        self.messages.get(&number).is_some_and(|m| m.poison)
    }

    pub fn is_retained(&self, number: u32) -> bool {
        self.messages[&number].retain
    }

    /// A retained message that the core has: a client that asked at `since` has it.
    pub fn has(&mut self, n: usize, topic: &str, payload: &str, since: u64) {
        let client = &self.clients[n];
        let asks = |s: &&Sub| !s.shared() && s.granted_at.is_some_and(|at| at >= since);
        if !client.subs.iter().filter(asks).any(|s| s.matches(topic)) {
            return;
        }
        let handed = client
            .handed
            .iter()
            .filter(|(t, g)| t == topic && g.at >= since);
        let last = handed.map(|(_, g)| g.number.to_string()).next_back();
        if last.as_deref() != Some(payload) {
            self.fault(format!(
                "{n} was handed {last:?} of {topic}, and the core has {payload}"
            ));
        }
    }

    /// I6: it asked for retained messages, and has had none that is newer.
    fn judge_handed(&self, n: usize, message: &Message, got: Got) -> Option<String> {
        let client = &self.clients[n];
        let asks = |s: &&Sub| s.handling < 2 && !s.shared() && s.matches(&message.topic);
        if !message.retain {
            return Some("as a retained one".to_owned());
        }
        if !client
            .subs
            .iter()
            .filter(asks)
            .any(|s| s.asked_at <= got.at)
        {
            return Some("retained, and asked for none".to_owned());
        }
        // A group's copies keep no order with others.
        let shared = |s: &Sub| s.shared() && s.matches(&message.topic);
        if client.subs.iter().any(shared) {
            return None;
        }
        // Behind a small window the core answers PINGREQs before it has sent what came earlier.
        if self.windowed {
            return None;
        }
        let before = client.got.iter().chain(&client.handed);
        let before = before.filter(|(t, g)| *t == message.topic && self.is_retained(g.number));
        let newest = before.map(|(_, g)| g.number).max();
        newest
            .filter(|newest| *newest > got.number && !self.twice(message))
            .map(|newest| format!("retained, behind {newest}"))
    }

    pub fn acknowledged(&mut self, from: usize, number: u32, reason: ReasonCode, now: Millis) {
        let told = self.is_poison(number) && self.tells[from];
        if reason.is_error() != told {
            self.fault(format!(
                "publish {number} of {from} is answered: {reason:?}"
            ));
        }
        if let Some(message) = self.messages.get_mut(&number) {
            message.acknowledged_at = message.acknowledged_at.min(now);
        }
    }

    pub fn got(&mut self, n: usize, topic: &str, got: Got) {
        let Some(message) = self.messages.get(&got.number) else {
            return self.fault(format!("{n} got {}, which nobody sent", got.number));
        };
        let mut why = None;
        if message.poison {
            why = Some("and the core cannot have had it".to_owned());
        } else if message.topic != topic {
            why = Some(format!("on {topic}, and it was sent on {}", message.topic));
        } else if got.qos > message.qos && !message.retain {
            why = Some(format!(
                "at {:?}, and it was sent at {:?}",
                got.qos, message.qos
            ));
        } else if got.retain {
            why = self.judge_handed(n, message, got);
        } else if !self.may(n, message, got.at) {
            why = Some("and asked for nothing like it, or not for its own".to_owned());
        }
        let client = &mut self.clients[n];
        match got.retain {
            true => client.handed.push((topic.to_owned(), got)),
            false => client.got.push((topic.to_owned(), got)),
        }
        if let Some(why) = why {
            self.fault(format!("{n} got {} {why}", got.number));
        }
    }

    /// Whether it asked for such a message between its publication and then (I1, I5, I14).
    fn may(&self, n: usize, message: &Message, then: u64) -> bool {
        self.clients[n].subs.iter().any(|s| {
            s.matches(&message.topic)
                && s.asked_at <= then
                && s.asked_at <= message.acknowledged_at.saturating_add(4 * TRANSIT)
                && s.ended_at >= message.at
                && !s.hides(n, message)
        })
    }

    /// Whether plain subscriptions on one filter bring it for sure: granted before, and held, or
    /// replaced by each other, until it must have come.
    fn must(&self, n: usize, message: &Message) -> bool {
        let client = &self.clients[n];
        let until = message.acknowledged_at.saturating_add(2 * TRANSIT);
        let sure = |s: &&Sub| {
            let brings = s.qos > QoS::AtMostOnce && !(s.no_local && message.from == n);
            !s.shared() && s.matches(&message.topic) && s.granted_at.is_some() && brings
        };
        let covered = client.subs.iter().filter(sure).any(|first| {
            let mut held = match first.granted_at {
                Some(at) if at < message.at => first.ended_at,
                _ => return false,
            };
            // One that is less, or whose answer was lost, may hold from when it was asked for.
            let less = |o: &Sub| {
                o.filter == first.filter
                    && !sure(&o)
                    && o.asked_at <= until
                    && o.ended_at >= message.at
            };
            if client.subs.iter().any(less) {
                return false;
            }
            // Ascending in the time of their grant, each ends when the next is granted.
            for next in client.subs.iter().filter(sure) {
                if next.filter == first.filter && next.granted_at == Some(held) {
                    held = next.ended_at;
                }
            }
            held > until
        });
        covered
            && !message.poison
            && message.qos > QoS::AtMostOnce
            && message.acknowledged_at < u64::MAX
    }

    fn excused(&self, n: usize, message: &Message) -> bool {
        // At QoS 0 nothing waits for who is away.
        if self.lowers && (self.stormy || !self.clients[n].cuts.is_empty()) {
            return true;
        }
        let forgot = |t: &u64| {
            message.at <= *t && (*t <= message.at + TRANSIT || message.acknowledged_at >= *t)
        };
        self.forgot.iter().any(forgot) || self.unseen(message)
    }

    /// Subscriptions whose change is not seen as one moment: those left while messages waited at the
    /// core behind a window, and, for a client's own, those whose No Local changed.
    fn changing(&self, n: usize, message: &Message) -> usize {
        let all = || {
            let subs = self.clients[n].subs.iter();
            subs.filter(|s| !s.shared() && s.matches(&message.topic))
        };
        let left = |s: &&Sub| {
            let about = s.ended_at < u64::MAX && s.ended_at + 2 * TRANSIT >= message.at;
            self.windowed && about
        };
        let toggled = |s: &&Sub| {
            message.from == n && all().any(|o| o.filter == s.filter && o.no_local != s.no_local)
        };
        all().filter(|s| left(s) || toggled(s)).count()
    }

    /// What is fetched again is kept from subscriptions with No Local.
    fn hides_any(&self, n: usize, message: &Message) -> bool {
        let subs = self.clients[n].subs.iter();
        let mut live = subs.filter(|s| s.ended_at == u64::MAX && s.matches(&message.topic));
        live.any(|s| s.no_local)
    }

    /// The copy of a filter that was just left was the one that counted, and its link was forgotten.
    fn leaving(&self, n: usize, message: &Message) -> bool {
        let just = |s: &Sub| s.ended_at < u64::MAX && s.ended_at + 2 * TRANSIT >= message.at;
        let mut subs = self.clients[n].subs.iter();
        self.unseen(message) && subs.any(|s| s.matches(&message.topic) && just(s))
    }

    /// Whether the core may have been sent it twice.
    fn twice(&self, message: &Message) -> bool {
        // What was retained before a loss is fetched again.
        let lost = |t: &u64| message.at <= *t || message.acknowledged_at >= *t;
        if message.retain && (self.forgot.iter().any(lost) || self.doubts.iter().any(lost)) {
            return true;
        }
        let within = |t: &u64| message.at <= *t && *t <= message.acknowledged_at;
        // In doubt each copy counts, until all links are back.
        let doubted = |t: &u64| message.at <= *t + TRANSIT && *t <= message.at + 2 * TRANSIT;
        if self.doubts.iter().any(doubted) || self.unseen(message) {
            return true;
        }
        let again = self.publish_lost.iter().any(within)
            || self.clients[message.from].cuts.iter().any(within);
        match message.qos {
            QoS::AtMostOnce => false,
            QoS::AtLeastOnce => again,
            QoS::ExactlyOnce => again && self.forgot.iter().any(within),
        }
    }

    /// All links and clients are back, and nothing is on its way any more.
    /// `retained`: the numbers of those that the core has retained: after a loss they are fetched
    /// again, and whoever subscribed has them.
    pub fn settle(&mut self, now: Millis, retained: &[u32]) {
        let mut faults = Vec::new();
        for will in self.messages.values_mut().filter(|m| m.will) {
            will.acknowledged_at = now;
        }
        for (number, message) in &self.messages {
            if message.qos > QoS::AtMostOnce && message.acknowledged_at == u64::MAX {
                faults.push(format!("publish {number} was never acknowledged"));
            }
            let (mut least, mut most, mut all) = (0, 0, 0);
            let mut sure = true;
            for (n, client) in self.clients.iter().enumerate() {
                let copies = client
                    .got
                    .iter()
                    .filter(|(_, g)| g.number == *number)
                    .count();
                all += copies;
                let plain = |s: &&Sub| !s.shared() && s.matches(&message.topic);
                let may = client
                    .subs
                    .iter()
                    .filter(plain)
                    .any(|s| s.ended_at >= message.at && !s.hides(n, message));
                let groups = client
                    .subs
                    .iter()
                    .filter(|s| s.shared() && s.matches(&message.topic));
                let mut names: Vec<&str> = groups
                    .filter(|s| s.ended_at >= message.at)
                    .map(|s| &*s.filter)
                    .collect();
                names.sort_unstable();
                names.dedup();
                let changing = self.changing(n, message);
                let chances = chances(client.subs.iter().filter(plain), message) + changing;
                most += chances;

                let fetched = retained.contains(number) && !self.lowers;
                let must = self.must(n, message)
                    && (!self.excused(n, message)
                        || fetched && !self.hides_any(n, message) && !self.leaving(n, message))
                    && changing == 0;
                sure &= must == may;
                least += usize::from(must);
                let handed = client.handed.iter().any(|(_, g)| g.number == *number);
                if must && copies == 0 && !handed {
                    faults.push(format!("{n} misses {number}"));
                }
                if copies > chances + names.len() && !self.twice(message) {
                    faults.push(format!("{n} got {number} {copies} times"));
                }
            }
            // I15: one copy for each group.
            let (stable, possible) = self.groups(message);
            if all > most + possible && !self.twice(message) {
                faults.push(format!(
                    "{number} was delivered {all} times, to {most} and {possible} groups"
                ));
            }
            if sure
                && !self.stormy
                && !self.lowers
                && !message.poison
                && message.qos > QoS::AtMostOnce
                && all < least + stable
            {
                faults.push(format!(
                    "{number} was delivered {all} times, not to {least} and {stable} groups"
                ));
            }
        }
        for n in 0..self.clients.len() {
            faults.extend(self.disorder(n));
        }
        self.faults.extend(faults);
    }

    /// Groups that have a member for sure, and that may have one.
    fn groups(&self, message: &Message) -> (usize, usize) {
        let mut groups: BTreeMap<&str, bool> = BTreeMap::new();
        for client in &self.clients {
            for sub in &client.subs {
                if !sub.shared() || !sub.matches(&message.topic) || sub.ended_at < message.at {
                    continue;
                }
                let stable = sub.granted_at.is_some_and(|at| at < message.at)
                    && sub.ended_at == u64::MAX
                    && sub.qos > QoS::AtMostOnce
                    && !client.replaces(sub);
                *groups.entry(&sub.filter).or_default() |= stable;
            }
        }
        let stable = groups.values().filter(|s| **s).count();
        // A member that left while it was to get one: another may have got it as well.
        let others = self.clients.iter().flat_map(|c| &c.subs);
        let left = others.filter(|s| s.shared() && s.matches(&message.topic));
        let left = left
            .filter(|s| s.ended_at >= message.at && s.ended_at < u64::MAX)
            .count();
        (stable, groups.len() + left)
    }

    /// I3, I19: one publisher's messages on one topic at one QoS come in their order.
    fn disorder(&self, n: usize) -> Option<String> {
        let client = &self.clients[n];
        // A group's copies keep no order with others, nor do those of filters on other links that came
        // and went.
        let ordered = |topic: &str| {
            let mut subs = client.subs.iter().filter(|s| s.matches(topic));
            !subs.any(|s| s.shared() || s.ended_at < u64::MAX && self.data_links > 1)
        };
        let mut last: BTreeMap<(usize, &str, u8, u8), u32> = BTreeMap::new();
        for (topic, got) in &client.got {
            let message = &self.messages[&got.number];
            // Its own ones come by other filters, from the moment that one of them has No Local.
            let own =
                message.from == n && client.subs.iter().any(|s| s.no_local && s.matches(topic));
            if self.twice(message) || message.will || own || !ordered(topic) {
                continue;
            }
            let key = (
                message.from,
                topic.as_str(),
                message.qos as u8,
                got.qos as u8,
            );
            let before = last.insert(key, got.number).unwrap_or(0);
            if before > got.number {
                return Some(format!("{n} got {} behind {before} on {topic}", got.number));
            }
        }
        None
    }
}
