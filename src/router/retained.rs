//! Retained messages for new subscriptions: fetched once per filter, then served from a bounded
//! cache that live messages keep current.
//!
//! The mutex is held while a retained message is handed to its session, and a live one updates
//! the cache before it is fanned out: so a value older than one already delivered never follows it.

mod cache;

use std::collections::HashSet;
use std::sync::Arc;

use crate::mqtt::{Message, QoS, ReasonCode};
use crate::telemetry::metrics;

use super::fanout::{Arrived, Tally};
use super::{Router, SessionRef};
pub(super) use cache::Retained;
use cache::{Cached, State, want};

/// Fetched messages that wait for the data links at most; more are handed on at once.
const HELD_MAX: usize = 10_000;

/// How long a SUBACK waits for the retained messages, milliseconds: a client that has it may
/// publish, and what is older must not come after what it publishes.
const SUBACK_WAIT: u64 = 100;

/// A subscription that retained messages are wanted for.
#[derive(Clone, Copy, Debug)]
pub struct Wants {
    /// Whose it is.
    pub session: SessionRef,
    /// The session's own mark.
    pub tag: u64,
    /// Granted QoS.
    pub qos: QoS,
    /// The client's Subscription Identifier; 0: none.
    pub identifier: u32,
}

/// The outcome of one filter of a SUBSCRIBE, told behind its retained messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub session: SessionRef,
    pub generation: u64,
    pub packet_id: u16,
    pub index: u16,
    pub code: ReasonCode,
}

impl Router {
    /// Sends the retained messages of a filter to one subscription: from the cache, or once they
    /// are fetched. `reply` follows them, but is not kept waiting for long.
    pub(super) fn want_retained(&self, number: u32, wants: Wants, reply: Reply, now: u64) {
        let mut retained = self.retained.lock();
        let deadline = now + SUBACK_WAIT;
        let waiting = retained.replies.entry(number).or_default();
        waiting.push((deadline, reply));
        retained.reply_by.push_back((deadline, number));
        match retained.filters.get_mut(&number) {
            Some(cached) if cached.state == State::Complete => {
                retained.complete.promote(&number);
                let messages: Vec<Message> = self.cached(&retained, number, now);
                self.hand_retained(&retained, number, &messages, &[wants], now);
            }
            Some(cached) if cached.state == State::Queued => {
                want(&mut cached.wants, wants);
                if cached.resync {
                    // It may have been for later.
                    retained.queue.push_back(number);
                    self.fetch.raise();
                }
            }
            Some(cached) if cached.overflow || cached.stale => want(&mut cached.late, wants),
            Some(cached) => {
                want(&mut cached.wants, wants);
                let messages = self.cached(&retained, number, now);
                self.hand_retained(&retained, number, &messages, &[wants], now);
            }
            None => {
                let queued = Cached::queued(vec![wants]);
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
            self.answer_subscribe(r.session, r.generation, r.packet_id, &[(r.index, r.code)]);
        }
    }

    /// Replies that have waited long enough.
    pub(super) fn late_replies(&self, now: u64) {
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

    /// The core has answered a PINGREQ behind the fetch of these filters: what it had is here.
    pub fn fetch_answered(&self, numbers: &[u32]) {
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

    fn cached(&self, retained: &Retained, number: u32, now: u64) -> Vec<Message> {
        let Some(cached) = retained.filters.get(&number) else {
            return Vec::new();
        };
        let alive = cached.topics.values().filter(|m| m.expires_at() > now);
        alive.cloned().collect()
    }

    /// Up to `max` filters whose fetch begins now, with their names.
    pub fn next_fetches(&self, max: usize) -> Vec<(u32, Arc<str>)> {
        let mut taken = Vec::new();
        let mut retained = self.retained.lock();
        while taken.len() < max
            && let Some(number) = retained.next()
        {
            let name = self.table.read().get(number).map(|f| f.name.clone());
            let (Some(name), Some(cached)) = (name, retained.filters.get_mut(&number)) else {
                retained.drop_filter(number);
                continue;
            };
            cached.state = State::Fetching;
            cached.name = Some(name.clone());
            retained.known.insert(&name, number);
            taken.push((number, name));
        }
        metrics().retained_fetches.increment(taken.len() as u64);
        taken
    }

    /// A retained message that the R link brought for a filter.
    pub fn fetched(&self, number: u32, message: &Message, now: u64) {
        let mut retained = self.retained.lock();
        let Some(cached) = retained.filters.get(&number) else {
            return;
        };
        if cached.state != State::Fetching || cached.live.contains(&retained.topic(message)) {
            return;
        }
        let link = {
            let table = self.table.read();
            let filter = table.get(table.source(number));
            filter.map(|f| usize::from(f.link))
        };
        match link {
            // While the link is away too: what its session kept comes first.
            Some(link) if link < self.config.data_links && retained.held < HELD_MAX => {
                let fence = self.ask_fence(link);
                retained.hold(number, (link, fence, message.clone()));
            }
            _ => self.hand_fetched(&mut retained, number, std::slice::from_ref(message), now),
        }
    }

    /// Whether fetched messages wait for a data link.
    pub(super) fn holds_fetched(&self) -> bool {
        self.retained.lock().held > 0
    }

    /// Hands on what is held for a link and moment that `passed`.
    pub(super) fn release_fetched(&self, passed: impl Fn(usize, u64) -> bool, now: u64) {
        let mut retained = self.retained.lock();
        if retained.held == 0 {
            return;
        }
        let holding: Vec<u32> = retained.holding.iter().copied().collect();
        let mut replies = Vec::new();
        for number in holding {
            let messages = retained.release(number, &passed);
            self.hand_fetched(&mut retained, number, &messages, now);
            replies.extend(retained.replies_of(number));
        }
        drop(retained);
        self.reply(&replies);
    }

    /// Fetched messages reach cache and subscribers, but for topics that a live one reached since.
    fn hand_fetched(&self, retained: &mut Retained, number: u32, messages: &[Message], now: u64) {
        let Some(cached) = retained.filters.get(&number) else {
            return;
        };
        let older = |m: &&Message| !cached.live.contains(&retained.topic(m));
        let messages: Vec<Message> = messages.iter().filter(older).cloned().collect();
        let (wants, resync) = (cached.wants.clone(), cached.resync);
        for message in &messages {
            retained.put(number, message);
        }
        if resync {
            self.hand_missed(retained, number, &messages, now);
        }
        self.hand_retained(retained, number, &messages, &wants, now);
    }

    /// The fetch of these filters is over. Not `complete`: it failed and is to be tried again.
    pub fn fetch_ended(&self, numbers: &[u32], complete: bool, now: u64) {
        let mut retained = self.retained.lock();
        let mut again = false;
        let mut replies = Vec::new();
        for &number in numbers {
            let held = retained.release(number, |_, _| true);
            if complete {
                self.hand_fetched(&mut retained, number, &held, now);
            }
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            if cached.state != State::Fetching {
                continue;
            }
            cached.live = HashSet::default();
            cached.through = true;
            replies.extend(retained.replies_of(number));
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            if complete {
                cached.wants = Vec::new();
            }
            let late = std::mem::take(&mut cached.late);
            let resync = cached.resync && (!complete || cached.early);
            if cached.resync && !resync {
                cached.resync = false;
                self.resynced(&mut retained, number);
            }
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            if complete && !cached.overflow && !cached.stale {
                cached.state = State::Complete;
                retained.complete.put(number, ());
                continue;
            }
            let mut wants = std::mem::take(&mut cached.wants);
            wants.extend(late);
            retained.drop_filter(number);
            if !wants.is_empty() || resync {
                again = true;
                let mut queued = Cached::queued(wants);
                queued.resync = resync;
                retained.filters.insert(number, queued);
                retained.queue.push_back(number);
            }
        }
        drop(retained);
        self.reply(&replies);
        if again {
            self.fetch.raise();
        }
    }

    /// A live message with RETAIN: the cache follows before anyone gets it.
    pub(super) fn retained_live(&self, arrived: &Arrived, now: u64) {
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
    pub(super) fn retained_doubtful(&self, arrived: &Arrived, now: u64) {
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
    pub(super) fn forget_retained(&self, numbers: impl Iterator<Item = u32>) {
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

    fn hand_retained(
        &self,
        retained: &Retained,
        number: u32,
        messages: &[Message],
        wants: &[Wants],
        now: u64,
    ) {
        let mut tally = Tally::default();
        for want in wants {
            let Some(shard) = self.shards.get(usize::from(want.session.shard)) else {
                continue;
            };
            let mut shard = shard.lock();
            for message in messages {
                if message.payload().is_empty() {
                    continue;
                }
                if retained.is_ahead(number, message, now)
                    && shard.has_another(want.session, number, message.topic())
                {
                    continue;
                }
                shard.hand(
                    &self.retained_limits,
                    now,
                    message,
                    number,
                    want,
                    &mut tally,
                );
            }
            self.charge_entries(&mut shard);
        }
        tally.wake();
        tally.flush();
    }
}
