//! Crashes of the node. Sessions on the disk survive them; the exceptions each have a name here.

use super::*;
use crate::sim::kept::{Survival, is_written};
use crate::sim::wills::SimWill;

/// Messages that wait for a client, or are in flight to it, end with the process.
const MESSAGES_END: bool = false;

/// The states of QoS 2 end with the process: whether a client's publish was taken, and whether a link has taken
/// a message of the broker.
const QOS2_STATES_END: bool = true;

/// A will that was published and has not reached the broker ends with the process.
const PUBLISHED_WILLS_END: bool = true;

/// A crash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crash {
    at: Millis,
    /// The disk was degraded, so the log may be an old one.
    stale: bool,
    /// The links begin new sessions at the broker: the log is an old one, or the broker has lost them.
    links_begin_anew: bool,
    /// When the node started again.
    back_at: Option<Millis>,
    /// When the broker had all filters of clients again.
    regained_at: Option<Millis>,
}

impl Oracle {
    /// The node is killed. `durable_since`: the disk has had everything but the latest changes since then.
    /// `survival`: whether each client's session is on the disk.
    pub(crate) fn crashed(
        &mut self,
        durable_since: Option<Millis>,
        survival: &[Survival],
        now: Millis,
    ) {
        self.crashes.push(Crash {
            at: now,
            stale: durable_since.is_none(),
            links_begin_anew: durable_since.is_none(),
            back_at: None,
            regained_at: None,
        });
        self.publish_link_lost(now);
        self.filters_lost(now);
        let is_written = |at| durable_since.is_some_and(|since| is_written(at, since, now));
        for (n, survival) in survival.iter().enumerate() {
            if *survival == Survival::Ends {
                self.session_ended(n, now);
                self.ends_on_disk(n);
                continue;
            }
            for sub in &mut self.clients[n].subs {
                let may_be_back = match sub.ended_at {
                    Some(at) => !sub.end_on_disk && !is_written(at),
                    None => *survival == Survival::Unknown,
                };
                if may_be_back || durable_since.is_none() {
                    sub.granted_at = None;
                    sub.ended_at = None;
                }
            }
        }
    }

    /// The broker has lost the links' sessions while it may lack filters.
    pub(crate) fn links_lost_meanwhile(&mut self) {
        if let Some(crash) = self.crashes.last_mut() {
            crash.links_begin_anew = true;
        }
    }

    /// The node has started again.
    pub(crate) fn started(&mut self, now: Millis) {
        if let Some(crash) = self.crashes.last_mut() {
            crash.back_at = Some(now);
        }
        self.filters_lost(now);
    }

    /// After the last crash, the links begin new sessions, so retained messages are fetched again.
    fn filters_lost(&mut self, now: Millis) {
        if self.crashes.last().is_some_and(|c| c.links_begin_anew) {
            self.sessions_lost.push(now);
        }
    }

    /// A publisher at the broker.
    pub(crate) fn outside(&self) -> usize {
        self.clients.len() - 1
    }

    /// Whether the broker may lack filters since a crash.
    pub(crate) fn awaits_filters(&self) -> bool {
        let last = self.crashes.last();
        last.is_some_and(|crash| crash.regained_at.is_none())
    }

    /// The broker has all filters of clients again.
    pub(crate) fn has_filters(&mut self, now: Millis) {
        for crash in &mut self.crashes {
            crash.regained_at.get_or_insert(now);
        }
        self.filters_lost(now);
    }

    /// When the node crashed last.
    pub(crate) fn last_crash(&self) -> Option<Millis> {
        self.crashes.last().map(|crash| crash.at)
    }

    /// Judges a restored session: its existence, and its filters with their QoS.
    pub(crate) fn judge_restored(
        &mut self,
        n: usize,
        survival: Survival,
        found: Option<&[(String, QoS)]>,
    ) {
        match (survival, found) {
            (Survival::Survives, None) => return self.fault(format!("{n} has lost its session")),
            (Survival::Ends, Some(_)) => {
                return self.fault(format!("the session of {n} has come back"));
            }
            _ => {}
        }
        let found = found.unwrap_or_default();
        let subs = &self.clients[n].subs;
        let mut faults = Vec::new();
        for (filter, _) in found {
            if !subs
                .iter()
                .any(|s| s.filter == *filter && s.ended_at.is_none())
            {
                faults.push(format!("{n} has {filter} after a crash"));
            }
        }
        for sub in subs.iter().filter(|s| s.ended_at.is_none()) {
            // It may have been replaced by one whose answer did not come.
            let others = subs.iter().filter(|s| s.filter == sub.filter);
            let sure =
                sub.granted_at.is_some() && others.filter(|s| s.ended_at.is_none()).count() == 1;
            let has = found.contains(&(sub.filter.clone(), sub.qos));
            if sure && survival == Survival::Survives && !has {
                let (filter, qos) = (&sub.filter, sub.qos);
                faults.push(format!(
                    "{n} lacks {filter} at {qos:?} after a crash: {found:?}"
                ));
            }
        }
        self.faults.extend(faults);
    }

    /// A client's session has ended, and with it everything that waited for the client.
    pub(crate) fn session_ended(&mut self, n: usize, now: Millis) {
        let client = &mut self.clients[n];
        client.sessions_ended.push(now);
        for sub in client.subs.iter_mut().filter(|s| s.ended_at.is_none()) {
            sub.ended_at = Some(now);
        }
    }

    /// A client was told that the disk has its session as it is: subscriptions that have ended stay ended.
    pub(crate) fn ends_on_disk(&mut self, n: usize) {
        for sub in &mut self.clients[n].subs {
            sub.end_on_disk |= sub.ended_at.is_some();
        }
    }

    /// A client has received UNSUBACK.
    pub(crate) fn unsubscribed(&mut self, n: usize, filter: &str) {
        let subs = self.clients[n].subs.iter_mut();
        for sub in subs.filter(|s| s.filter == filter) {
            sub.end_on_disk |= sub.ended_at.is_some();
        }
    }

    /// A client will not send a publish again, whatever has become of it.
    pub(crate) fn given_up(&mut self, number: u32) {
        if let Some(message) = self.messages.get_mut(&number) {
            message.given_up = true;
        }
    }

    /// A crash has left a will that may be over, so it may be published after `now`, perhaps again.
    pub(crate) fn will_may_come(&mut self, from: usize, will: &SimWill, now: Millis) {
        let number = will.number;
        if let Some(message) = self.messages.get_mut(&number) {
            message.repeats = true;
            return;
        }
        self.will_published(from, number, will.topic, will.qos, now);
        if let Some(message) = self.messages.get_mut(&number) {
            message.uncertain = true;
        }
    }

    /// Until when the message may have waited at the broker because the node was away.
    pub(super) fn waited_until(&self, message: &Message) -> Option<Millis> {
        let mut crashes = self.crashes.iter().rev();
        let waited = |c: &&Crash| c.at <= message.acknowledged_by(TRANSIT);
        crashes.find(waited)?.back_at
    }

    /// Whether a crash may have taken the message from a client that should have it.
    pub(super) fn lost_in_crash(&self, message: &Message) -> bool {
        self.crashes.iter().any(|crash| {
            // A publish that was not acknowledged is sent again.
            let is_done = message.will || !message.open_at(crash.at);
            let was_taken = message.at <= crash.at && is_done;
            let regained_at = crash.regained_at.unwrap_or(Millis::MAX);
            let at_broker =
                message.at <= regained_at && crash.at <= message.acknowledged_by(TRANSIT);
            let is_young_will =
                message.will && message.at <= crash.at && crash.at <= message.at + TRANSIT;
            (MESSAGES_END || crash.stale) && was_taken
                || crash.links_begin_anew && at_broker
                || PUBLISHED_WILLS_END && is_young_will
        })
    }

    /// Whether a message may come twice because of a crash. `at_least_once`: whether it was delivered at QoS 1.
    pub(super) fn twice_by_crash(
        &self,
        message: &Message,
        at_least_once: impl Fn() -> bool,
    ) -> bool {
        self.crashes.iter().any(|crash| {
            let before = message.at <= crash.at;
            // A filter whose SUBACK did not come before the crash is subscribed again, and its retained
            // messages are fetched again.
            let fetched_by = crash.back_at.map(|at| at + TRANSIT);
            let is_fetched = message.retain && fetched_by.is_some_and(|by| message.at <= by);
            is_fetched
                || before
                    && match message.qos {
                        QoS::AtMostOnce => false,
                        QoS::AtLeastOnce => true,
                        QoS::ExactlyOnce => {
                            let under_way = crash.at <= message.acknowledged_by(TRANSIT);
                            (crash.stale || QOS2_STATES_END) && under_way || at_least_once()
                        }
                    }
        })
    }
}
