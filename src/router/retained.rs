//! Retained messages for new subscriptions: fetched once per filter, then served from a bounded
//! cache that live messages keep current.
//!
//! The mutex is held while a retained message is handed to its session, and a live one updates
//! the cache before it is fanned out: so a value older than one already delivered never follows it.

mod cache;
mod release;
pub(super) mod resync;

use std::sync::Arc;

use crate::mqtt::{Message, ReasonCode};
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::types::SessionRef;
use crate::router::types::{Arrived, RetainedRequest};
pub(super) use cache::Retained;
use cache::{Cached, State, Wishes};

/// Fetched messages that wait for the data links at most, and their bytes; more are handed on at once.
const HELD_MAX: usize = 10_000;
const HELD_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long a SUBACK waits for the retained messages, milliseconds: a client that has it may
/// publish, and what is older must not come after what it publishes.
const SUBACK_WAIT: u64 = 100;

/// The outcome of one filter of a SUBSCRIBE, told behind its retained messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub session: SessionRef,
    pub connection_no: u64,
    pub packet_id: u16,
    pub index: u16,
    pub code: ReasonCode,
}

impl Router {
    /// Sends the retained messages of a filter to one subscription: from the cache, or once they
    /// are fetched. `reply` follows them, but is not kept waiting for long.
    pub(super) fn want_retained(
        &self,
        number: FilterId,
        wants: RetainedRequest,
        reply: Reply,
        now: Millis,
    ) {
        let mut retained = self.retained.lock();
        let deadline = now + SUBACK_WAIT;
        let waiting = retained.replies.entry(number).or_default();
        waiting.push((deadline, reply));
        retained.reply_by.push_back((deadline, number));
        match retained.filters.get_mut(&number) {
            Some(cached) if cached.state == State::Complete => {
                retained.complete.promote(&number);
                let messages: Vec<Message> = self.cached(&retained, number, now);
                self.hand_retained(&retained, number, &messages, &wants, now);
            }
            Some(cached) if cached.state == State::Queued => {
                cached.wants.insert(wants.session, wants);
                if cached.resync {
                    // It may have been for later.
                    retained.queue.push_back(number);
                    self.fetch.raise();
                }
            }
            Some(cached) if cached.overflow || cached.stale => {
                cached.late.insert(wants.session, wants);
            }
            Some(cached) => {
                cached.wants.insert(wants.session, wants);
                let messages = self.cached(&retained, number, now);
                self.hand_retained(&retained, number, &messages, &wants, now);
            }
            None => {
                let queued = Cached::queued(Wishes::from([(wants.session, wants)]));
                retained.filters.insert(number, queued);
                retained.queue.push_back(number);
                self.fetch.raise();
            }
        }
        let replies = retained.replies_of(number);
        drop(retained);
        self.reply(&replies);
    }

    fn reply(&self, replies: &[Reply]) {
        for r in replies {
            self.answer_subscribe(
                r.session,
                r.connection_no,
                r.packet_id,
                &[(r.index, r.code)],
            );
        }
    }

    /// Replies that have waited long enough.
    fn late_replies(&self, now: Millis) {
        let mut late = Vec::new();
        let mut retained = self.retained.lock();
        while let Some(&(deadline, number)) = retained.reply_by.front()
            && deadline <= now
        {
            retained.reply_by.pop_front();
            let Some(waiting) = retained.replies.get_mut(&number) else {
                continue;
            };
            late.extend(waiting.extract_if(.., |(at, _)| *at <= now).map(|(_, r)| r));
            if waiting.is_empty() {
                retained.replies.remove(&number);
            }
        }
        drop(retained);
        self.reply(&late);
    }

    /// Lets go what need not be kept any longer.
    pub(super) fn tick_retained(&self, now: Millis) {
        self.late_replies(now);
        self.late_fetches(now);
        self.forget_missed();
    }

    /// The core has answered a PINGREQ behind the fetch of these filters: what it had is here.
    pub fn fetch_answered(&self, numbers: &[FilterId]) {
        let mut retained = self.retained.lock();
        let mut replies = Vec::new();
        for &number in numbers {
            if let Some(cached) = retained.filters.get_mut(&number) {
                cached.through = cached.state == State::Fetching;
                replies.extend(retained.replies_of(number));
            }
        }
        drop(retained);
        self.reply(&replies);
    }

    fn cached(&self, retained: &Retained, number: FilterId, now: Millis) -> Vec<Message> {
        let Some(cached) = retained.filters.get(&number) else {
            return Vec::new();
        };
        let alive = cached.topics.values().filter(|m| m.expires_at() > now);
        alive.cloned().collect()
    }

    /// Up to `max` filters whose fetch begins now, with their names.
    pub fn next_fetches(&self, max: usize) -> Vec<(FilterId, Arc<str>)> {
        let mut taken = Vec::new();
        let mut retained = self.retained.lock();
        while taken.len() < max
            && let Some(number) = retained.next()
        {
            let name = self.table.read().get(number).map(|f| f.name().clone());
            let away = self.source_is_away(number);
            let (Some(name), Some(cached)) = (name, retained.filters.get_mut(&number)) else {
                retained.drop_filter(number);
                continue;
            };
            // What changes meanwhile is not seen.
            cached.stale |= away;
            cached.state = State::Fetching;
            cached.name = Some(name.clone());
            retained.known.insert(&name, number);
            taken.push((number, name));
        }
        metrics().retained_fetches.increment(taken.len() as u64);
        taken
    }

    /// A retained message that the R link brought for a filter.
    pub fn fetched(&self, number: FilterId, message: &Message, now: Millis) {
        let mut retained = self.retained.lock();
        let Some(cached) = retained.filters.get(&number) else {
            return;
        };
        if cached.state != State::Fetching || cached.live.contains(&retained.topic(message)) {
            return;
        }
        let room = retained.held < HELD_MAX && retained.held_bytes < HELD_BYTES_MAX;
        match self.source_link(number) {
            // While the link is away too: what its session kept comes first.
            Some(link) if room => {
                let fence = self.ask_fence(link);
                retained.hold(number, (link, fence, message.clone()));
            }
            _ => self.hand_fetched(&mut retained, number, std::slice::from_ref(message), now),
        }
    }

    /// A live message with RETAIN: the cache follows before anyone gets it.
    pub(super) fn retained_live(&self, arrived: &Arrived, now: Millis) {
        let mut retained = self.retained.lock();
        retained.ahead(arrived, now);
        retained.learn(arrived);
        let topic = retained.topic(&arrived.message);
        for &number in &arrived.filters {
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            match cached.state {
                State::Queued => continue,
                State::Fetching => {
                    cached.overtaken(topic);
                }
                State::Complete => {}
            }
            retained.put(number, &arrived.message);
            let overflow = retained
                .filters
                .get(&number)
                .is_some_and(|c| c.state == State::Complete && c.overflow);
            if overflow {
                retained.drop_filter(number);
            }
        }
    }

    /// Without RETAIN on live messages (a 3.1.1 core) the cache cannot follow them: what is known
    /// of a topic that got a message is doubtful, and a fetched value must not follow it.
    pub(super) fn retained_doubtful(&self, arrived: &Arrived, now: Millis) {
        let mut retained = self.retained.lock();
        retained.ahead(arrived, now);
        retained.learn(arrived);
        let topic = retained.topic(&arrived.message);
        for &number in &arrived.filters {
            match retained.filters.get_mut(&number) {
                Some(cached) if cached.state == State::Fetching => {
                    cached.overtaken(topic);
                    cached.stale = true;
                }
                Some(cached) if cached.state == State::Complete => retained.drop_filter(number),
                _ => {}
            }
        }
    }

    /// D lost messages for these filters, or no longer holds them.
    pub(super) fn forget_retained(&self, numbers: impl Iterator<Item = FilterId>) {
        let mut retained = self.retained.lock();
        for number in numbers {
            match retained.filters.get_mut(&number) {
                Some(cached) if cached.state == State::Complete => retained.drop_filter(number),
                Some(cached) => cached.stale = true,
                None => {}
            }
        }
    }

    /// Filters whose retained messages are being fetched, or are to be.
    pub fn retained_pending(&self) -> u64 {
        let retained = self.retained.lock();
        (retained.filters.len() - retained.complete.len()) as u64
    }

    /// Bytes in the retained cache.
    pub fn retained_bytes(&self) -> u64 {
        self.retained.lock().bytes as u64
    }
}
