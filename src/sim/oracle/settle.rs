//! Judges a whole run, once all links and clients are connected and nothing is in flight.

use std::collections::{BTreeMap, BTreeSet};

use crate::mqtt::QoS;
use crate::streams::StreamId;
use crate::time::Millis;

use crate::sim::oracle::Oracle;
use crate::sim::seen::{Message, Sub, TRANSIT, chances};

impl Oracle {
    /// Judges the whole run, once all links and clients are connected and nothing is in flight.
    /// `retained`: the numbers of the messages that the broker has retained. After a loss they are
    /// fetched again, so that all subscribers have them.
    pub(crate) fn settle(&mut self, now: Millis, retained: &[u32]) {
        let mut faults = Vec::new();
        for will in self.messages.values_mut().filter(|m| m.will) {
            will.acknowledged_at = Some(now);
        }
        for (number, message) in &self.messages {
            let awaited = message.qos > QoS::AtMostOnce && !message.given_up;
            if awaited && message.acknowledged_at.is_none() {
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
                    .any(|s| s.lives_at(message.at) && !s.hides(n, message));
                let groups = client
                    .subs
                    .iter()
                    .filter(|s| s.shared() && s.matches(&message.topic));
                let mut names: Vec<&str> = groups
                    .filter(|s| s.lives_at(message.at))
                    .map(|s| &*s.filter)
                    .collect();
                names.sort_unstable();
                names.dedup();
                let changing = self.changing(n, message);
                let chances = chances(client.subs.iter().filter(plain), message) + changing;
                most += chances;

                let fetched = retained.contains(number) && !self.conditions.lowest_qos;
                let must = self.must(n, message)
                    && !self.lost_in_crash(message)
                    && (!self.excused(n, message)
                        || fetched && !self.hides_any(n, message) && !self.just_ended(n, message))
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
                && !self.conditions.stormy
                && !self.conditions.lowest_qos
                && !message.poison
                && !message.uncertain
                && !self.lost_in_crash(message)
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

    /// How many groups certainly deliver the message, and how many may deliver it.
    fn groups(&self, message: &Message) -> (usize, usize) {
        let mut groups: BTreeMap<&str, bool> = BTreeMap::new();
        let mut lossy: BTreeSet<&str> = BTreeSet::new();
        for client in &self.clients {
            for sub in &client.subs {
                if !sub.shared() || !sub.matches(&message.topic) || !sub.lives_at(message.at) {
                    continue;
                }
                let stable = sub.granted_at.is_some_and(|at| at < message.at)
                    && sub.ended_at.is_none()
                    && sub.qos > QoS::AtMostOnce
                    && !client.replaces(sub);
                *groups.entry(&sub.filter).or_default() |= stable;
                // The group's one copy goes to a member at the QoS of that member [MQTT-4.8.2-3]. At
                // QoS 0 it is lost with output that the member has not read.
                let unread = client.losses_unread.iter().any(|lost| *lost >= message.at);
                if unread && sub.qos == QoS::AtMostOnce {
                    lossy.insert(&sub.filter);
                }
            }
        }
        let stable = groups.iter().filter(|(g, s)| **s && !lossy.contains(*g));
        let stable = stable.count();
        // If a member left while the message was on its way to it, another one may have received it too.
        let others = self.clients.iter().flat_map(|c| &c.subs);
        let left = others.filter(|s| s.shared() && s.matches(&message.topic));
        let left = left
            .filter(|s| s.ended_at.is_some_and(|end| end >= message.at))
            .count();
        (stable, groups.len() + left)
    }

    /// I3, I19: one publisher's messages on one topic at one QoS arrive in their order.
    fn disorder(&self, n: usize) -> Option<String> {
        let client = &self.clients[n];
        // The copies of a shared subscription keep no order with others, nor do the copies of filters on
        // several links while subscriptions end.
        let ordered = |topic: &str| {
            let mut subs = client.subs.iter().filter(|s| s.matches(topic));
            !subs.any(|s| s.shared() || s.ended_at.is_some() && self.conditions.data_links > 1)
        };
        let mut last: BTreeMap<(usize, &str, u8, u8, StreamId), u32> = BTreeMap::new();
        for (topic, got) in &client.got {
            let message = &self.messages[&got.number];
            // The client's own messages come through other filters once one of them has No Local.
            let own =
                message.from == n && client.subs.iter().any(|s| s.no_local && s.matches(topic));
            // A message that was sent on a stream that is gone comes again behind later ones.
            let again = client.reordered && got.dup;
            if self.twice(message) || message.will || own || again || !ordered(topic) {
                continue;
            }
            let key = (
                message.from,
                topic.as_str(),
                message.qos as u8,
                got.qos as u8,
                got.stream,
            );
            let before = last.insert(key, got.number).unwrap_or(0);
            if before > got.number {
                return Some(format!(
                    "{n} received {} after {before} on {topic}",
                    got.number
                ));
            }
        }
        None
    }

    /// Whether plain subscriptions to one filter must bring the message: one was granted before it, and
    /// that one or its replacements lasted until the message must have arrived.
    fn must(&self, n: usize, message: &Message) -> bool {
        let client = &self.clients[n];
        let until = message.acknowledged_by(2 * TRANSIT);
        let sure = |s: &&Sub| {
            let brings = s.qos > QoS::AtMostOnce && !(s.no_local && message.from == n);
            !s.shared() && s.matches(&message.topic) && s.granted_at.is_some() && brings
        };
        let covered = client.subs.iter().filter(sure).any(|first| {
            let mut lasts = match first.granted_at {
                Some(at) if at < message.at => first.ended_at,
                _ => return false,
            };
            // A lesser subscription, or one whose answer was lost, may count from its SUBSCRIBE on.
            let less = |o: &Sub| {
                o.filter == first.filter
                    && !sure(&o)
                    && o.asked_at <= until
                    && o.lives_at(message.at)
            };
            if client.subs.iter().any(less) {
                return false;
            }
            // They ascend in the time of their grant, and each ends when the next one is granted.
            for next in client.subs.iter().filter(sure) {
                if next.filter == first.filter && lasts.is_some() && next.granted_at == lasts {
                    lasts = next.ended_at;
                }
            }
            lasts.is_none_or(|end| end > until)
        });
        // The messages that wait for a client end with its session.
        let discarded = client.sessions_ended.iter().any(|at| message.at <= *at);
        covered
            && !discarded
            && !message.uncertain
            && !message.poison
            && message.qos > QoS::AtMostOnce
            && message.acknowledged_at.is_some()
    }

    /// Whether the message may be missing, because the broker lost it.
    fn excused(&self, n: usize, message: &Message) -> bool {
        // At QoS 0 the broker keeps nothing for a link that is away, nor do we for a client.
        if self.conditions.lowest_qos
            && (self.conditions.stormy || !self.clients[n].losses.is_empty())
        {
            return true;
        }
        // It may wait at the broker, in the session of a link that is away.
        let lost = |t: &Millis| message.at <= *t && *t <= message.acknowledged_by(TRANSIT);
        self.sessions_lost.iter().any(lost) || self.unseen(message)
    }

    /// How many subscriptions changed without a definite moment: they ended while messages waited at the
    /// broker behind a window, or, for a client's own messages, their No Local changed.
    fn changing(&self, n: usize, message: &Message) -> usize {
        let all = || {
            let subs = self.clients[n].subs.iter();
            subs.filter(|s| !s.shared() && s.matches(&message.topic))
        };
        let ended = |s: &&Sub| self.conditions.small_window && s.ended_about(message.at);
        let toggled = |s: &&Sub| {
            message.from == n && all().any(|o| o.filter == s.filter && o.no_local != s.no_local)
        };
        all().filter(|s| ended(s) || toggled(s)).count()
    }

    /// Whether a subscription with No Local keeps the message away when it is fetched again.
    fn hides_any(&self, n: usize, message: &Message) -> bool {
        let subs = self.clients[n].subs.iter();
        let mut live = subs.filter(|s| s.ended_at.is_none() && s.matches(&message.topic));
        live.any(|s| s.no_local)
    }

    /// Whether the copy that counted may have been that of a subscription that had just ended, on a link
    /// whose session was lost.
    fn just_ended(&self, n: usize, message: &Message) -> bool {
        let just = |s: &Sub| s.ended_about(message.at);
        let mut subs = self.clients[n].subs.iter();
        self.unseen(message) && subs.any(|s| s.matches(&message.topic) && just(s))
    }
}
