//! The retained messages that one session asked for: they follow the SUBACK, and live messages follow them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate::mqtt::{Publish, QoS};
use tidegate::streams::StreamId;
use tidegate::time::Millis;

use crate::ledger::{Ledger, Live, Sub};

/// A wish for the retained messages of a filter.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub filter: String,
    pub got: BTreeMap<String, usize>,
    /// Fetches of it that failed, and were made anew.
    pub failed: usize,
    /// Unsubscribed when this event was the latest: what waits may still come, nothing newer.
    pub until: u64,
    /// The SUBSCRIBE that has no SUBACK yet: connection and packet identifier.
    pub asked: Option<(u64, u16)>,
    /// The stream of that SUBSCRIBE, and of its SUBACK.
    pub stream: StreamId,
    pub asked_at: Millis,
    /// Its stream ended before the SUBACK was written.
    pub suback_lost: bool,
    /// When the SUBACK was written. `None` too if its connection ended before.
    pub suback_at: Option<Millis>,
    /// Nothing came in between that lets live messages of the subscription overtake the retained ones.
    pub in_order: bool,
    /// Where live messages of the subscription were written before the retained ones: whether above
    /// QoS 0, and the stream.
    pub live: BTreeSet<(bool, StreamId)>,
}

/// Live messages of a subscription wait this long for the retained ones, at least.
const WAIT: Duration = Duration::from_millis(900);

/// And this long at most: until the tick behind the end of the wait.
const WAIT_MAX: Duration = Duration::from_millis(2000);

impl Want {
    /// Whether live messages that arrive now may wait for these retained ones.
    pub(crate) fn may_defer(&self, now: Millis) -> bool {
        let no_suback = self.asked.is_some() || self.suback_lost;
        no_suback || self.suback_at.is_some_and(|at| now <= at + WAIT_MAX)
    }
}

/// The newest of the retained messages that were sent on a topic.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Replayed {
    event: u64,
    connection: u64,
}

impl Ledger {
    /// A live value that the broker retains does not come behind a newer one which was sent as a retained
    /// message.
    pub(super) fn is_newer(
        &self,
        at: usize,
        topic: &str,
        way: (bool, StreamId),
    ) -> Result<(), String> {
        let owed = &self.owed[at];
        // Of a message that was published twice, nobody can tell which one this is.
        let twice = self.owed.iter().filter(|o| o.key == owed.key).count() > 1;
        if !owed.retained || twice || self.ambiguous > 0 {
            return Ok(());
        }
        let (on, to) = way;
        let Some(replayed) = self.replayed.get(&(on, to, topic.to_owned())) else {
            return Ok(());
        };
        if replayed.connection == self.connections && replayed.event > owed.event {
            let newest = replayed.event;
            return Err(format!(
                "it is older than {newest}, a retained message before it"
            ));
        }
        Ok(())
    }

    /// A live message is written: notes the wants of its subscription, if there is one alone.
    pub(super) fn goes_live(&mut self, topic: &str, way: (bool, StreamId), now: Millis) {
        let matching = |filter: &str| crate::broker::matching(filter, topic);
        let alone = self.subs.iter().filter(|s| matching(&s.filter)).count() == 1;
        let left = self.left.iter().any(|filter| matching(filter));
        if !alone || left {
            return;
        }
        // An earlier SUBSCRIBE may be in force, although its SUBACK was lost with its connection.
        let mut subs = self.subs.iter().filter(|s| matching(&s.filter));
        let in_force = |now: (u64, u16)| {
            let earlier = |s: &Sub| s.asked.iter().any(|a| (a.link, a.packet_id) != now);
            subs.any(|s| s.granted.is_some() || earlier(s))
        };
        let mut wants = self.wants.iter_mut().filter(|w| matching(&w.filter));
        if let (Some(want), None) = (wants.next(), wants.next())
            && want.in_order
            // Before the SUBACK it is a message of the subscription that the SUBSCRIBE repeats.
            && !want.asked.is_some_and(in_force)
            && now < want.asked_at + WAIT
        {
            want.live.insert(way);
        }
    }

    /// The SUBACK of a SUBSCRIBE is written.
    pub(crate) fn answered(&mut self, link: u64, packet_id: u16, now: Millis) {
        for want in &mut self.wants {
            if want.asked == Some((link, packet_id)) {
                want.asked = None;
                want.suback_at = Some(now);
            }
        }
    }

    /// The stream of a SUBSCRIBE has ended, and its SUBACK does not come. The subscription stays, and its
    /// messages come on the control stream.
    pub(crate) fn unanswered(&mut self, link: u64, packet_id: u16) {
        for want in &mut self.wants {
            if want.asked == Some((link, packet_id)) {
                want.asked = None;
                want.suback_lost = true;
                want.in_order = false;
            }
        }
    }

    pub(super) fn replay(
        &mut self,
        stream: StreamId,
        topic: &str,
        key: &str,
        p: &Publish<'_>,
    ) -> Result<(), String> {
        if !p.retain {
            // One before it may have been a live one that was taken for a replay, or the reverse.
            let passed = self.owed.iter_mut().find(|o| !o.written && o.key == key);
            if let Some(owed) = passed
                && self.mistaken < self.ambiguous
            {
                owed.written = true;
                self.mistaken += 1;
                return Ok(());
            }
            let known = self.owed.iter().filter(|o| o.key == key).map(|o| o.written);
            let known: Vec<bool> = known.collect();
            return Err(format!(
                "not owed, or out of order, or twice (owed and written: {known:?}) [MQTT-4.6.0-5]"
            ));
        }
        let way = (p.qos > QoS::AtMostOnce, stream);
        let fit = |w: &&mut Want| wants(w, topic, key);
        let behind = |w: &Want| w.in_order && w.live.contains(&way);
        // Streams keep no order with each other: SUBACK comes on that of the SUBSCRIBE, and the messages on
        // that of the client's latest SUBSCRIBE for the filter.
        let answered = |w: &&mut Want| w.asked.is_none() || w.stream != stream;
        let in_turn = |w: &&mut Want| answered(w) && !behind(w);
        if self.ambiguous == 0 && !self.wants.iter_mut().filter(fit).any(|w| in_turn(&w)) {
            if self.wants.iter_mut().filter(fit).any(|w| answered(&w)) {
                return Err("a retained message behind a live one of its subscription".into());
            }
            if self.wants.iter_mut().any(|w| fit(&w)) {
                return Err("a retained message before the SUBACK".into());
            }
        }
        let found = self.wants.iter_mut().filter(fit).position(|w| in_turn(&w));
        let want = self.wants.iter_mut().filter(fit).nth(found.unwrap_or(0));
        let Some(want) = want else {
            if self.mistaken < self.ambiguous {
                // An earlier one was taken for this.
                self.mistaken += 1;
                return Ok(());
            }
            return Err("a retained message that nobody asked for [MQTT-3.3.1-11]".into());
        };
        *want.got.entry(key.to_owned()).or_default() += 1;
        let event = crate::oracle::event(key);
        // The messages that the broker keeps for a lost link are older than retained ones.
        if want.in_order {
            let way = (p.qos > QoS::AtMostOnce, stream, topic.to_owned());
            let newest = self.replayed.entry(way).or_default();
            newest.event = newest.event.max(event);
            newest.connection = self.connections;
        }
        let way = (topic.to_owned(), p.qos > QoS::AtMostOnce);
        let mut live = self.live.get(&way).into_iter().flatten();
        let newer = |l: &Live| l.event > event && l.is_before(self.connections, stream, p);
        if live.any(newer) && self.ambiguous == 0 {
            return Err("a retained value older than one delivered before it".into());
        }
        Ok(())
    }
}

pub(super) fn wants(want: &Want, topic: &str, key: &str) -> bool {
    crate::broker::matching(&want.filter, topic)
        && want.got.get(key).copied().unwrap_or(0) <= want.failed
        && crate::oracle::event(key) <= want.until
}
