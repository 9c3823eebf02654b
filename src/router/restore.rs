//! Sessions that an earlier process has left in the log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{Message, MessageSpec, Properties, QoS, SubscribeOptions, Version};
use crate::session::{Incarnation, Restored, Session, SessionKey, Subscription, Will};
use crate::store::log::{Claim, Claims, Position};
use crate::store::records::{
    FoundFilters, FoundSessions, SessionRecord, SubscriptionRecord, WillRecord,
};
use crate::time::{Deadline, Millis};
use crate::topics::{FilterId, has_wildcard, overlaps, split_shared};

use crate::router::Router;
use crate::router::account::Holder;
use crate::router::replay::Replay;
use crate::router::sessions::journal::{JournalTimes, Progress, RestoredClient};

/// How long a session that is over is remembered after its will is due.
const REMEMBER_OVER: Duration = Duration::from_secs(10);

/// The packet identifiers of a restored session begin so far behind the last one. Its client may still use those
/// of earlier processes, whose records are not written at each start: by the golden ratio, the beginnings of many
/// processes lie far from each other.
const ID_STEP: u16 = 40_503;

/// The times of a restored session.
struct Times {
    since: Millis,
    over: bool,
    ends_at: Option<Deadline>,
    will_at: Deadline,
    absent_at: Option<Deadline>,
}

impl Router {
    /// Sessions are kept in the log from now on. After a start no session ends, and no will is published,
    /// before `restart_grace`. To be called before the first session begins.
    pub fn keep_sessions(&self, restart_grace: Duration) {
        self.sessions.keep_in_log(JournalTimes {
            started_at: self.config.started_at,
            restart_grace,
        });
    }

    /// Filters and the links' sessions are kept in the log from now on. To be called after
    /// [`keep_sessions`](Self::keep_sessions).
    pub fn keep_filters(&self) {
        let marks = self.sessions.marks().clone();
        self.filters.keep_in_log(marks, self.config.started_at);
    }

    /// Takes over the filters and the links' sessions of a log, whose records get their claims. To be called
    /// before [`restore_all`](Self::restore_all). `client_id` is the client identifier that a data link or
    /// shared link, by [its number](Self::shared_link), has now. Unless `is_trusted`, the log lacks its last
    /// records, and all links begin anew.
    pub fn restore_filters(
        &self,
        found: FoundFilters,
        client_id: impl Fn(usize) -> String,
        is_trusted: bool,
        claims: &Claims,
        now: Millis,
    ) {
        let filters = &self.filters;
        let mode = filters.restore_all(found, client_id, is_trusted, claims, now);
        if let Some(mode) = mode {
            self.broker.restore(mode.keeps_retain);
        }
    }

    /// Begins the sessions of a log with their messages, whose records get their claims. `stale`: the log lacks
    /// its last records, so that its messages are not to be trusted. Returns the number of sessions.
    pub fn restore_all(
        &self,
        found: &FoundSessions,
        claims: &Arc<Claims>,
        stale: bool,
        now: Millis,
    ) -> u64 {
        self.sessions.incarnations_from(found.largest_incarnation());
        self.sessions
            .keep_messages(claims, self.config.started_at, found.largest_sequence());
        let mut messages = Replay::new(self, found, claims, stale, now);
        let mut restored = 0;
        for session in found.sessions() {
            let (position, len) = (session.position, session.body.len());
            let Ok(record) = SessionRecord::decode(&session.body) else {
                continue;
            };
            if self.restore(
                &record,
                (position, len as u32),
                restored,
                &mut messages,
                now,
            ) {
                claims.claim(Claim::new(position, len));
                restored += 1;
            }
        }
        messages.restore_received();
        messages.replay();
        let missed = self.filters.place_restored(now);
        self.note_missed(missed);
        restored
    }

    /// The broker lacked these filters while no process was there: each session that has one gets one gap.
    fn note_missed(&self, filters: Vec<FilterId>) {
        self.sessions.note_gap(&filters);
        let mut members = self.groups.members(&filters);
        let filters: BTreeSet<FilterId> = filters.into_iter().collect();
        let has_gap = |session: &Session| {
            let mut plain = session.subscriptions().iter().filter(|s| !s.shared);
            plain.any(|s| filters.contains(&s.filter))
        };
        members.retain(|member| self.sessions.with(*member, |s, _| has_gap(s)) == Some(false));
        self.sessions.note_gap_of(&members);
    }

    /// Begins a session from its record, which is at `place` in the log and has a body of so many bytes.
    /// It is the `nth` one: wills and ends of sessions whose time has passed come one after the other.
    /// False: nothing of the session is of use any more.
    fn restore(
        &self,
        record: &SessionRecord<'_>,
        place: (Position, u32),
        nth: u64,
        messages: &mut Replay<'_>,
        now: Millis,
    ) -> bool {
        let Some(incarnation) = Incarnation::new(record.incarnation) else {
            return false;
        };
        let times = self.times_of(record, nth, now);
        if times.over && record.will.is_none() {
            return false;
        }
        let principal = (!record.anonymous).then_some(record.principal);
        let holder = self.account.holder(principal, record.address);
        let key = SessionKey::from(record.key);
        let shard = self.sessions.shard_of(key.client_id());
        let mut session = Session::restore(Restored {
            key,
            principal: record.principal.into(),
            incarnation,
            version: version_of(record.level),
            bridge: record.bridge,
            over: times.over,
            expiry: record.expiry,
            since: times.since,
            gaps: record.gaps + u64::from(!times.over && messages.is_stale()),
            last_id: match messages.is_stale() {
                // Far from the identifiers that its client may still use.
                true => record.last_id.wrapping_add(ID_STEP),
                false => record.last_id,
            },
            will: record.will.as_ref().map(|w| (will_of(w), times.will_at)),
            ends_at: times.ends_at,
            absent_at: times.absent_at,
        });
        if !times.over {
            for subscription in &record.subscriptions {
                self.restore_subscription(&mut session, subscription, shard, holder);
            }
        }
        let client = RestoredClient {
            detached_at: record.detached_at,
            address: record.address,
        };
        let progress = match times.over {
            false => messages.begin(&mut session, record, place.0),
            true => Progress::default(),
        };
        let groups = session.subscriptions().iter().filter(|s| s.shared);
        let groups: Vec<FilterId> = groups.map(|s| s.filter).collect();
        let session = self
            .sessions
            .restore(session, holder, (client, progress), place, |r| {
                self.publishing.link_of(r)
            });
        if !groups.is_empty() {
            messages.member(incarnation, session);
        }
        for group in groups {
            self.groups
                .join(&self.sessions, group, session, incarnation);
        }
        true
    }

    fn restore_subscription(
        &self,
        session: &mut Session,
        record: &SubscriptionRecord<'_>,
        shard: u16,
        holder: Holder,
    ) {
        let options = options_of(record.options);
        let asked = QoS::from_u8(record.asked).unwrap_or_default();
        let qos = asked.max(options.qos);
        let (filter, name) = self.filters.restore(record.name, qos, shard, holder);
        let shared = split_shared(record.name).is_some();
        let wild = has_wildcard(record.name);
        let others = session.subscriptions().iter();
        let others = others.filter(|s| !shared && !s.shared && (s.wild || wild));
        let overlapping: Vec<FilterId> = others
            .filter(|s| overlaps(&s.name, record.name))
            .map(|s| s.filter)
            .collect();
        // The copy of the oldest one is delivered, so the broker is to send it at this QoS too.
        let (_, wake) = self.filters.raise(&overlapping, qos, None);
        self.wake_links(wake);
        let subscription = Subscription {
            filter,
            name,
            options,
            asked,
            identifier: record.identifier,
            // Until the broker has it again, it is among the lost filters.
            active: true,
            overlaps: 0,
            shared,
            wild,
            wild_below: record.wild_below,
        };
        session.add_subscription(subscription, &overlapping);
    }

    /// The wall clock may have been set back since: then no time has passed.
    fn times_of(&self, record: &SessionRecord<'_>, nth: u64, now: Millis) -> Times {
        let today = self.config.started_at.at(now).as_u64();
        let away_ms = record
            .detached_at
            .map(|at| today.saturating_sub(at.as_u64()));
        let away = Duration::from_millis(away_ms.unwrap_or(0));
        let grace = self.sessions.restart_grace() + Duration::from_millis(nth);
        let rest = |seconds: u32| {
            let rest = Duration::from_secs(seconds.into()).saturating_sub(away);
            Deadline::at(now + rest.max(grace))
        };
        let over = record.over || record.expiry == 0;
        let delay = match (over, record.will) {
            (false, Some(will)) => will.delay.min(record.expiry),
            _ => 0,
        };
        let ends_at = match over {
            true => Some(Deadline::at(now + grace + REMEMBER_OVER)),
            false => (record.expiry != u32::MAX).then(|| rest(record.expiry)),
        };
        let announced = self.presence.is_some() && record.detached_at.is_none();
        Times {
            since: now - away,
            over,
            ends_at,
            will_at: rest(delay),
            absent_at: announced.then(|| Deadline::at(now + grace)),
        }
    }
}

fn version_of(level: u8) -> Version {
    match level {
        3 => Version::V31,
        4 => Version::V311,
        _ => Version::V5,
    }
}

fn options_of(byte: u8) -> SubscribeOptions {
    SubscribeOptions {
        qos: QoS::from_u8(byte & 3).unwrap_or_default(),
        no_local: byte & 4 != 0,
        retain_as_published: byte & 8 != 0,
        retain_handling: byte >> 4 & 3,
    }
}

fn will_of(record: &WillRecord<'_>) -> Will {
    let message = Message::new(&MessageSpec {
        topic: record.topic,
        properties: Properties(record.properties),
        payload: record.payload,
        qos: QoS::from_u8(record.qos).unwrap_or_default(),
        retain: record.retain,
        expires_at: None,
        strip_key: None,
        account: None,
    });
    Will::new(message, record.delay, record.message_expiry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packet_identifiers_of_many_processes_lie_far_from_each_other() {
        let begins = |n: u16| n.wrapping_mul(ID_STEP);
        for (a, b) in (0..20).flat_map(|a| (0..a).map(move |b| (begins(a), begins(b)))) {
            let apart = a.wrapping_sub(b).min(b.wrapping_sub(a));
            assert!(apart > 1000, "{a} and {b}");
        }
    }
}
