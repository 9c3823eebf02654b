//! Retained messages for new subscriptions: fetched once per filter, then served from a bounded
//! cache that live messages keep current.
//!
//! The mutex is held while a retained message is handed to its session, and a live one updates
//! the cache before it is fanned out: so a value older than one already delivered never follows it.

mod ahead;
mod by_session;
mod cache;
mod kept;
mod missed;
mod newer;
mod release;
mod resync;

use std::sync::Arc;

use parking_lot::Mutex;

use crate::budget::CacheAccounts;
use crate::mqtt::Message;
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::barrier::Barriers;
use crate::router::handle::TaskWaker;
use crate::router::sessions::Sessions;
use crate::router::types::{Arrived, RetainedRequest, Served, SessionRef};
use cache::{Buffered, Cache, Cached, Requests, State};

/// Fetched messages that wait for the data links; further ones are handed on at once.
const BUFFERED_MAX: usize = 10_000;

/// Bytes of the fetched messages that wait for the data links.
const BUFFERED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The retained messages: the cache, and the fetches by which the retained link fills it.
#[derive(Debug)]
pub(super) struct RetainedMessages {
    cache: Mutex<Cache>,
    /// Wakes the task of the retained link.
    waker: Arc<TaskWaker>,
}

/// The filters, as far as their retained messages have to know them.
pub(super) trait Sources {
    /// The name of a filter that is known.
    fn name(&self, filter: FilterId) -> Option<Arc<str>>;
    /// The data link that brings a filter's live messages.
    fn data_link(&self, filter: FilterId) -> Option<usize>;
    /// Whether that link is away, so that live messages are not seen at once.
    fn is_away(&self, filter: FilterId) -> bool;
    /// Calls `f` for the filter, and for the filters below it that match the topic, each with the
    /// shards that may have members, as bits.
    fn receivers(&self, filter: FilterId, topic: &str, f: &mut dyn FnMut(FilterId, u64));
    /// Calls `f` for the filters below a root.
    fn below(&self, root: FilterId, f: &mut dyn FnMut(FilterId));
}

impl RetainedMessages {
    /// An empty cache of at most `bytes_max` bytes.
    pub(super) fn new(bytes_max: usize, accounts: &CacheAccounts) -> Self {
        Self {
            cache: Mutex::new(Cache::new(bytes_max, accounts.clone())),
            waker: Arc::default(),
        }
    }

    /// Wakes the task of the retained link.
    pub(super) fn waker(&self) -> &Arc<TaskWaker> {
        &self.waker
    }

    /// Sends the retained messages of a filter to one subscription: from the cache, or once they
    /// are fetched. Returns the subscription if they are sent, so that its live messages follow now.
    pub(super) fn request(
        &self,
        sessions: &Sessions,
        sources: &impl Sources,
        filter: FilterId,
        request: RetainedRequest,
        now: Millis,
    ) -> Option<Served> {
        // The session of a link that is away keeps messages which are older than retained ones that are
        // fetched meanwhile.
        let away = sources.is_away(filter);
        let mut cache = self.cache.lock();
        let session = request.session;
        let mut served = away;
        match cache.filters.get_mut(&filter) {
            Some(cached) if cached.state == State::Complete => {
                cache.complete.promote(&filter);
                let messages = cache.messages(filter, now);
                release::hand(sessions, &cache, filter, &messages, &request, now);
                served = true;
            }
            Some(cached) if cached.state == State::Queued => {
                cached.requests.insert(session, request);
                if cached.resync {
                    // It may be in the queue of fetches that nobody waits for.
                    cache.queue.push_back(filter);
                    self.waker.raise();
                }
            }
            Some(cached) if cached.overflow || cached.stale => {
                cached.late.insert(session, request);
            }
            Some(cached) => {
                cached.requests.insert(session, request);
                served |= !cached.is_awaited();
                let messages = cache.messages(filter, now);
                release::hand(sessions, &cache, filter, &messages, &request, now);
            }
            None => {
                let queued = Cached::queued(Requests::of(session, request));
                cache.filters.insert(filter, queued);
                cache.queue.push_back(filter);
                self.waker.raise();
            }
        }
        let wait = request.wait?;
        if served {
            return Some(Served {
                session,
                filter,
                wait,
            });
        }
        if let Some(cached) = cache.filters.get_mut(&filter) {
            cached.waiting.insert(session, wait);
        }
        None
    }

    /// A session no longer has the subscriptions on these filters. The messages that they asked for do not
    /// come any more: the client may subscribe again, and they must not come before its SUBACK.
    pub(super) fn cancel(&self, session: SessionRef, filters: impl Iterator<Item = FilterId>) {
        let mut cache = self.cache.lock();
        if cache.filters.len() == cache.complete.len() {
            return;
        }
        for filter in filters {
            if let Some(cached) = cache.filters.get_mut(&filter) {
                cached.requests.remove(session);
                cached.late.remove(session);
                cached.waiting.remove(session);
            }
        }
    }

    /// The link of these filters is away: the messages that its session keeps are older than retained
    /// messages that are fetched meanwhile. Returns the subscriptions that wait no longer.
    pub(super) fn stop_waiting(&self, filters: &[FilterId]) -> Vec<Served> {
        let mut served = Vec::new();
        let mut cache = self.cache.lock();
        for &filter in filters {
            if let Some(cached) = cache.filters.get_mut(&filter) {
                let waiting = std::mem::take(&mut cached.waiting);
                served.extend(waiting.iter().map(|(session, wait)| Served {
                    session,
                    filter,
                    wait,
                }));
            }
        }
        served
    }

    /// The broker has answered a PINGREQ behind the fetch of these filters: the messages that it had
    /// are here. Returns the subscriptions that have theirs now.
    pub(super) fn fetch_answered(&self, filters: &[FilterId]) -> Vec<Served> {
        let mut cache = self.cache.lock();
        let mut served = Vec::new();
        for filter in filters {
            if let Some(cached) = cache.filters.get_mut(filter) {
                cached.answered = cached.state == State::Fetching;
                cache.served(*filter, &mut served);
            }
        }
        served
    }

    /// Up to `max` filters whose fetch begins now, with their names.
    pub(super) fn next_fetches(
        &self,
        sources: &impl Sources,
        max: usize,
    ) -> Vec<(FilterId, Arc<str>)> {
        let mut taken = Vec::new();
        let mut cache = self.cache.lock();
        while taken.len() < max
            && let Some(filter) = cache.next()
        {
            let known_since = cache.ahead.events;
            let name = sources.name(filter);
            let away = sources.is_away(filter);
            let (Some(name), Some(cached)) = (name, cache.filters.get_mut(&filter)) else {
                cache.drop_filter(filter);
                continue;
            };
            // Changes are not seen meanwhile.
            cached.stale |= away;
            cached.state = State::Fetching;
            cached.name = Some(name.clone());
            cached.known_since = known_since;
            cache.known.insert(&name, filter);
            taken.push((filter, name));
        }
        metrics().retained_fetches.increment(taken.len() as u64);
        taken
    }

    /// The retained link brought a message for a filter.
    pub(super) fn fetched(
        &self,
        sessions: &Sessions,
        barriers: &Barriers,
        sources: &impl Sources,
        filter: FilterId,
        message: &Message,
        now: Millis,
    ) {
        let mut cache = self.cache.lock();
        let Some(cached) = cache.filters.get(&filter) else {
            return;
        };
        if cached.state != State::Fetching || cached.live.contains(&cache.topic(message)) {
            return;
        }
        cache.outdate(filter, message, |link| barriers.ask(link));
        let room = cache.buffered < BUFFERED_MAX && cache.buffered_bytes < BUFFERED_BYTES_MAX;
        match sources.data_link(filter) {
            // While the link is away too: the messages that its session kept come first.
            Some(link) if room => {
                let buffered = Buffered {
                    link,
                    barrier: barriers.ask(link),
                    topic: cache.topic(message),
                    message: message.clone(),
                };
                cache.buffer(filter, buffered);
            }
            _ => {
                let messages = std::slice::from_ref(message);
                release::hand_fetched(sessions, sources, &mut cache, filter, messages, now);
            }
        }
    }

    /// A live message with RETAIN: the cache follows before anyone gets it.
    pub(super) fn live(&self, arrived: &Arrived, now: Millis) {
        let mut cache = self.cache.lock();
        cache.note_ahead(arrived, now);
        cache.learn(arrived);
        let topic = cache.topic(&arrived.message);
        for filter in &arrived.filters {
            let Some(cached) = cache.filters.get_mut(filter) else {
                continue;
            };
            match cached.state {
                State::Queued => continue,
                State::Fetching => cached.overtaken(topic),
                State::Complete => {}
            }
            cache.put(*filter, &arrived.message);
            let overflow = cache
                .filters
                .get(filter)
                .is_some_and(|c| c.state == State::Complete && c.overflow);
            if overflow {
                cache.drop_filter(*filter);
            }
        }
    }

    /// A live message of a broker that does not keep RETAIN on live messages (MQTT 3.1.1): the cache
    /// cannot follow it. The cached value of its topic is doubtful, and a fetched one must not follow.
    pub(super) fn doubtful(&self, arrived: &Arrived, now: Millis) {
        let mut cache = self.cache.lock();
        cache.note_ahead(arrived, now);
        cache.learn(arrived);
        let topic = cache.topic(&arrived.message);
        for filter in &arrived.filters {
            match cache.filters.get_mut(filter) {
                Some(cached) if cached.state == State::Fetching => {
                    cached.overtaken(topic);
                    cached.stale = true;
                }
                Some(cached) if cached.state == State::Complete => cache.drop_filter(*filter),
                _ => {}
            }
        }
    }

    /// A data link lost messages for these filters, or the broker no longer has them.
    pub(super) fn forget(&self, filters: impl Iterator<Item = FilterId>) {
        let mut cache = self.cache.lock();
        for filter in filters {
            match cache.filters.get_mut(&filter) {
                Some(cached) if cached.state == State::Complete => cache.drop_filter(filter),
                Some(cached) => cached.stale = true,
                None => {}
            }
        }
    }

    /// Filters whose retained messages are being fetched, or are to be.
    pub(super) fn pending(&self) -> u64 {
        let cache = self.cache.lock();
        (cache.filters.len() - cache.complete.len()) as u64
    }

    /// Bytes in the cache.
    pub(super) fn bytes(&self) -> u64 {
        self.cache.lock().bytes as u64
    }
}

#[cfg(test)]
mod tests;
