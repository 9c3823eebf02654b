//! Judges what each client received. The oracle knows only what clients asked for and were told, and
//! what happened to links and broker.

mod crashes;
mod settle;
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::mqtt::{QoS, ReasonCode, SubscribeOptions};
use crate::streams::StreamId;
use crate::time::Millis;

use crashes::Crash;

use crate::sim::seen::{Client, Conditions, Got, Message, Sub, TRANSIT};
use tidegate_kit::rng::Rng;

/// Live messages of a subscription wait for its retained ones at least this long after the SUBACK.
const RETAINED_WITHIN: Duration = Duration::from_millis(900);

pub(super) struct Oracle {
    clients: Vec<Client>,
    messages: BTreeMap<u32, Message>,
    conditions: Conditions,
    /// When the connection of a publish link was lost.
    publish_links_lost: Vec<Millis>,
    /// When the broker lost sessions: all of them at a restart, or one link's.
    sessions_lost: Vec<Millis>,
    /// When the broker lost one link's session.
    link_sessions_lost: Vec<Millis>,
    /// When it was not known whether a link's session had begun anew.
    doubts: Vec<Millis>,
    crashes: Vec<Crash>,
    faults: Vec<String>,
}

impl Oracle {
    pub(super) fn new(conditions: Conditions) -> Self {
        let clients = conditions.clients_v5.iter();
        Self {
            // The last one is outside of the node.
            clients: clients.chain([&true]).map(|_| Client::default()).collect(),
            conditions,
            messages: BTreeMap::new(),
            publish_links_lost: Vec::new(),
            sessions_lost: Vec::new(),
            link_sessions_lost: Vec::new(),
            doubts: Vec::new(),
            crashes: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Notes that a promise was broken.
    pub(super) fn fault(&mut self, what: String) {
        self.faults.push(what);
    }

    pub(super) fn first_fault(&mut self) -> Option<String> {
        self.faults.first().cloned()
    }

    /// All promises that were broken so far.
    pub(super) fn faults(&self) -> &[String] {
        &self.faults
    }

    /// The topic of one of our messages.
    pub(super) fn topic_of(&self, number: u32) -> &'static str {
        let topic = &self.messages[&number].topic;
        crate::sim::TOPICS
            .iter()
            .find(|t| *t == topic)
            .expect("one of ours")
    }

    /// A publish link has lost its connection.
    pub(super) fn publish_link_lost(&mut self, now: Millis) {
        self.publish_links_lost.push(now);
    }

    /// The broker has stopped, and keeps its sessions or not.
    pub(super) fn restarted(&mut self, now: Millis, keep: bool) {
        if !keep {
            self.sessions_lost.push(now);
            if self.awaits_filters() {
                self.links_lost_meanwhile();
            }
        }
    }

    /// The broker has lost one link's session. Until that link connects again nobody knows it, and
    /// clients go on publishing. Copies through filters of links that are away are in doubt then.
    pub(super) fn link_session_lost(&mut self, now: Millis) {
        self.sessions_lost.push(now);
        self.link_sessions_lost.push(now);
    }

    /// Whether the broker had lost a link's session when the message was published, and the link had
    /// not connected again.
    fn unseen(&self, message: &Message) -> bool {
        let about = |t: &Millis| *t <= message.at && message.at <= *t + TRANSIT;
        self.link_sessions_lost.iter().any(about)
    }

    /// It is not known whether a link's session has begun anew. A client whose overlapping filters are
    /// on several links may lose a copy.
    pub(super) fn in_doubt(&mut self, now: Millis) {
        self.doubts.push(now);
    }

    /// A client has lost its connection or a data stream, perhaps with output that it had left unread.
    pub(super) fn lost(&mut self, n: usize, unread: bool, now: Millis) {
        self.clients[n].losses.push(now);
        if unread {
            self.clients[n].losses_unread.push(now);
        }
    }

    /// A client has ended or reset a data stream, or has left it unread.
    pub(super) fn reordered(&mut self, n: usize) {
        self.clients[n].reordered = true;
    }

    /// A client has sent SUBSCRIBE with this packet identifier.
    pub(super) fn subscribes(
        &mut self,
        n: usize,
        (packet_id, stream): (u16, StreamId),
        filters: &[(String, SubscribeOptions)],
        now: Millis,
    ) {
        for (filter, options) in filters {
            self.clients[n].subs.push(Sub {
                packet_id,
                filter: filter.clone(),
                qos: options.qos,
                no_local: options.no_local,
                handling: options.retain_handling,
                stream,
                asked_at: now,
                suback_at: None,
                granted_at: None,
                ended_at: None,
                end_on_disk: false,
            });
        }
    }

    /// A client has received the answer to one filter of the SUBSCRIBE with this packet identifier. The
    /// answers may come in another order than the requests, which take effect in the order of sending.
    pub(super) fn granted(
        &mut self,
        n: usize,
        packet_id: u16,
        filter: &str,
        code: u8,
        now: Millis,
    ) {
        let subs = &mut self.clients[n].subs;
        let same = |s: &Sub| s.filter == filter && s.ended_at.is_none();
        let asked = |s: &Sub| s.packet_id == packet_id && s.filter == filter;
        let Some(at) = subs.iter().position(asked) else {
            return;
        };
        if code >= 0x80 && !self.conditions.refuses && !subs[at].shared() {
            self.faults
                .push(format!("{n} is refused {filter}: {code:#x}"));
        }
        if code < 0x80 {
            subs[at].suback_at = Some(now);
        }
        // A later request for the filter has replaced this one.
        if !same(&subs[at]) {
            return;
        }
        if code >= 0x80 {
            // A refusal ends the subscription that the client had on this filter.
            for s in subs[..=at].iter_mut().filter(|s| same(s)) {
                s.ended_at = Some(now);
                s.end_on_disk = true;
            }
            return;
        }
        for s in subs[..at].iter_mut().filter(|s| same(s)) {
            s.ended_at = Some(now);
            s.end_on_disk = true;
        }
        subs[at].granted_at = Some(now);
        subs[at].qos = subs[at].qos.min(QoS::from_u8(code).unwrap_or_default());
    }

    /// A client has sent UNSUBSCRIBE.
    pub(super) fn unsubscribes(&mut self, n: usize, filter: &str, now: Millis) {
        for s in &mut self.clients[n].subs {
            if s.filter == filter && s.ended_at.is_none() {
                s.ended_at = Some(now);
            }
        }
    }

    /// One of the filters that a client subscribes to.
    pub(super) fn any_filter(&self, n: usize, rng: &mut Rng) -> Option<String> {
        let live = self.clients[n].subs.iter().filter(|s| s.ended_at.is_none());
        let filters: Vec<&str> = live.map(|s| &*s.filter).collect();
        (!filters.is_empty()).then(|| rng.pick(&filters).to_owned())
    }

    /// Whether some client may have a filter: it has asked for it, and may not have seen the answer.
    pub(super) fn may_want(&self, filter: &str) -> bool {
        let mut all = self.clients.iter().flat_map(|c| &c.subs);
        all.any(|s| s.filter == filter && s.ended_at.is_none())
    }

    /// The filters that clients were granted and still subscribe to, in order.
    pub(super) fn filters(&self) -> Vec<String> {
        let all = self.clients.iter().flat_map(|c| &c.subs);
        let live = all.filter(|s| s.ended_at.is_none() && s.granted_at.is_some());
        let mut filters: Vec<String> = live.map(|s| s.filter.clone()).collect();
        filters.sort();
        filters.dedup();
        filters
    }

    /// A client has published a message.
    pub(super) fn published(
        &mut self,
        from: usize,
        number: u32,
        topic: &str,
        qos: QoS,
        retain: bool,
        at: Millis,
    ) {
        let message = Message {
            from,
            topic: topic.to_owned(),
            qos,
            retain,
            will: false,
            poison: false,
            uncertain: false,
            repeats: false,
            given_up: false,
            at,
            acknowledged_at: None,
        };
        self.messages.insert(number, message);
    }

    /// A will has been published. Nobody is told when the broker has it. I16: it is published once, and
    /// not earlier.
    pub(super) fn will_published(
        &mut self,
        from: usize,
        number: u32,
        topic: &str,
        qos: QoS,
        at: Millis,
    ) {
        self.published(from, number, topic, qos, false, at);
        if let Some(message) = self.messages.get_mut(&number) {
            message.will = true;
        }
    }

    /// Marks a message for which the broker closes the connection.
    pub(super) fn set_poison(&mut self, number: u32) {
        if let Some(message) = self.messages.get_mut(&number) {
            message.poison = true;
        }
    }

    pub(super) fn is_poison(&self, number: u32) -> bool {
        self.messages.get(&number).is_some_and(|m| m.poison)
    }

    pub(super) fn is_retained(&self, number: u32) -> bool {
        self.messages[&number].retain
    }

    /// The broker has this retained message: a client that has subscribed since then must have
    /// received it.
    pub(super) fn has_retained(
        &mut self,
        n: usize,
        topic: &str,
        number: Option<u32>,
        since: Millis,
    ) {
        let client = &self.clients[n];
        let asks = |s: &&Sub| !s.shared() && s.granted_at.is_some_and(|at| at >= since);
        if !client.subs.iter().filter(asks).any(|s| s.matches(topic)) {
            return;
        }
        let handed = client
            .handed
            .iter()
            .filter(|(t, g)| t == topic && g.at >= since);
        let last = handed.map(|(_, g)| g.number).next_back();
        if last != number {
            self.fault(format!(
                "{n} was handed {last:?} of {topic}, and the broker has {number:?}"
            ));
        }
    }

    /// I6: the client asked for retained messages, and has received no newer one.
    fn judge_retained(&self, n: usize, message: &Message, got: Got) -> Option<String> {
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
        if let Some(why) = self.overtakes(n, message, got) {
            return Some(why);
        }
        // The copies of a shared subscription keep no order with others.
        let shared = |s: &Sub| s.shared() && s.matches(&message.topic);
        if client.subs.iter().any(shared) {
            return None;
        }
        if client.reordered {
            return None;
        }
        // Behind a small window, the broker answers a PINGREQ before it has sent earlier messages.
        if self.conditions.small_window {
            return None;
        }
        let before = client.got.iter().chain(&client.handed);
        // The streams of a client keep no order with each other.
        let before = before.filter(|(_, g)| g.stream == got.stream);
        let before = before.filter(|(t, g)| *t == message.topic && self.is_retained(g.number));
        let newest = before.map(|(_, g)| g.number).max();
        newest
            .filter(|newest| *newest > got.number && !self.twice(message))
            .map(|newest| format!("retained, behind {newest}"))
    }

    /// First comes SUBACK, then the retained messages of a subscription, then its live ones.
    fn overtakes(&self, n: usize, message: &Message, got: Got) -> Option<String> {
        let client = &self.clients[n];
        // Packets that were sent on different streams keep no order, and a client that loses its connection
        // may miss the SUBACK.
        if client.reordered || !client.losses.is_empty() {
            return None;
        }
        let asks = |s: &&Sub| s.handling < 2 && !s.shared() && s.matches(&message.topic);
        let mut asked = client.subs.iter().filter(asks);
        // The SUBACK may still be on its way on another stream.
        if !asked.any(|s| s.suback_at.is_some_and(|at| at <= got.at) || s.stream != got.stream) {
            return Some("retained, before the SUBACK".to_owned());
        }
        // Behind a small window, and while a link is away, the broker may send live messages first.
        if self.conditions.small_window || self.conditions.stormy {
            return None;
        }
        let mut subs = client.subs.iter().filter(|s| s.matches(&message.topic));
        let (Some(sub), None) = (subs.next(), subs.next()) else {
            return None;
        };
        let granted_at = sub.granted_at?;
        if got.at >= granted_at + RETAINED_WITHIN {
            return None;
        }
        let by_it_alone = |topic: &str| {
            let mut subs = client.subs.iter().filter(|s| s.matches(topic));
            subs.all(|s| s.filter == sub.filter)
        };
        let mut live = client.got.iter().filter(|(topic, g)| {
            let same =
                (g.stream, g.qos > QoS::AtMostOnce) == (got.stream, got.qos > QoS::AtMostOnce);
            same && g.at >= granted_at && sub.matches(topic) && by_it_alone(topic)
        });
        let first = live.next();
        first.map(|(_, live)| format!("retained, behind the live {}", live.number))
    }

    /// A client has received the acknowledgement of its publish.
    pub(super) fn acknowledged(
        &mut self,
        from: usize,
        number: u32,
        reason: ReasonCode,
        now: Millis,
    ) {
        let told = self.is_poison(number) && self.conditions.clients_v5[from];
        if reason.is_error() != told {
            self.fault(format!(
                "publish {number} of {from} is answered: {reason:?}"
            ));
        }
        if let Some(message) = self.messages.get_mut(&number) {
            message.acknowledged_at.get_or_insert(now);
        }
    }

    /// A client has received a message.
    pub(super) fn received(&mut self, n: usize, topic: &str, got: Got) {
        let Some(message) = self.messages.get(&got.number) else {
            return self.fault(format!("{n} got {}, which nobody sent", got.number));
        };
        let mut why = None;
        if message.poison {
            why = Some("and the broker cannot have taken it".to_owned());
        } else if message.topic != topic {
            why = Some(format!("on {topic}, and it was sent on {}", message.topic));
        } else if got.qos > message.qos && !message.retain {
            why = Some(format!(
                "at {:?}, and it was sent at {:?}",
                got.qos, message.qos
            ));
        } else if got.retain {
            why = self.judge_retained(n, message, got);
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

    /// Whether the client was subscribed to the message's topic at some time between the publication
    /// and `then` (I1, I5, I14). After a loss, the retained messages of a filter are fetched again for
    /// all its subscribers and come like live ones, however late a client subscribed.
    fn may(&self, n: usize, message: &Message, then: Millis) -> bool {
        let mut losses = self.sessions_lost.iter().chain(&self.doubts);
        let fetched = message.retain && losses.any(|t| message.at <= *t && *t <= then);
        let until = message.acknowledged_by(4 * TRANSIT);
        let waited = self.waited_until(message).map(|at| at + 4 * TRANSIT);
        let until = waited.map_or(until, |at| until.max(at));
        self.clients[n].subs.iter().any(|s| {
            s.matches(&message.topic)
                && s.asked_at <= then
                && (fetched || s.asked_at <= until)
                && s.lives_at(message.at)
                && !s.hides(n, message)
        })
    }

    /// Whether a client got the message at QoS 1.
    fn got_at_least_once(&self, message: &Message) -> bool {
        let mut all = self.clients.iter().flat_map(|client| &client.got);
        all.any(|(_, got)| {
            let found = self.messages.get(&got.number);
            found.is_some_and(|m| std::ptr::eq(m, message)) && got.qos < QoS::ExactlyOnce
        })
    }

    /// Whether a client may receive the message twice.
    fn twice(&self, message: &Message) -> bool {
        // Messages that were retained before a loss are fetched again.
        let lost = |t: &Millis| message.at <= *t || message.open_at(*t);
        if message.retain && (self.sessions_lost.iter().any(lost) || self.doubts.iter().any(lost)) {
            return true;
        }
        let within = |t: &Millis| message.at <= *t && message.open_at(*t);
        // In doubt, every copy is delivered until all links have connected again.
        let doubted = |t: &Millis| message.at <= *t + TRANSIT && *t <= message.at + 2 * TRANSIT;
        if self.doubts.iter().any(doubted) || self.unseen(message) {
            return true;
        }
        let at_least_once = || self.got_at_least_once(message);
        if message.repeats || self.twice_by_crash(message, at_least_once) {
            return true;
        }
        let again = self.publish_links_lost.iter().any(within)
            || self.clients[message.from].losses.iter().any(within);
        match message.qos {
            QoS::AtMostOnce => false,
            QoS::AtLeastOnce => again,
            QoS::ExactlyOnce => again && self.sessions_lost.iter().any(within),
        }
    }
}
