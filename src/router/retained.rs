//! Retained messages for new subscriptions: fetched once per filter, then served from a bounded
//! cache that live messages keep current.
//!
//! The mutex is held while a retained message is handed to its session, and a live one updates
//! the cache before it is fanned out: so a value older than one already delivered never follows it.

mod ahead;
mod cache;
mod kept;
mod missed;
mod newer;
mod release;
mod resync;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::budget::CacheAccounts;
use crate::mqtt::Message;
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::barrier::Barriers;
use crate::router::handle::TaskWaker;
use crate::router::sessions::Sessions;
use crate::router::types::{Arrived, PendingGrant, RetainedRequest};
use cache::{Buffered, Cache, Cached, Requests, State};

/// Fetched messages that wait for the data links; further ones are handed on at once.
const BUFFERED_MAX: usize = 10_000;

/// Bytes of the fetched messages that wait for the data links.
const BUFFERED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long a SUBACK waits for the retained messages. A client that has its SUBACK may publish, and
/// older messages must not follow its own.
const SUBACK_WAIT: Duration = Duration::from_millis(100);

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
    /// are fetched. `reply` follows them, but is not kept waiting for long. Returns the replies to
    /// send now.
    pub(super) fn request(
        &self,
        sessions: &Sessions,
        filter: FilterId,
        request: RetainedRequest,
        reply: PendingGrant,
        now: Millis,
    ) -> Vec<PendingGrant> {
        let mut cache = self.cache.lock();
        let deadline = now + SUBACK_WAIT;
        cache
            .replies
            .entry(filter)
            .or_default()
            .push((deadline, reply));
        cache.reply_by.push_back((deadline, filter));
        match cache.filters.get_mut(&filter) {
            Some(cached) if cached.state == State::Complete => {
                cache.complete.promote(&filter);
                let messages = cache.messages(filter, now);
                release::hand(sessions, &cache, filter, &messages, &request, now);
            }
            Some(cached) if cached.state == State::Queued => {
                cached.requests.insert(request.session, request);
                if cached.resync {
                    // It may be in the queue of fetches that nobody waits for.
                    cache.queue.push_back(filter);
                    self.waker.raise();
                }
            }
            Some(cached) if cached.overflow || cached.stale => {
                cached.late.insert(request.session, request);
            }
            Some(cached) => {
                cached.requests.insert(request.session, request);
                let messages = cache.messages(filter, now);
                release::hand(sessions, &cache, filter, &messages, &request, now);
            }
            None => {
                let queued = Cached::queued(Requests::from([(request.session, request)]));
                cache.filters.insert(filter, queued);
                cache.queue.push_back(filter);
                self.waker.raise();
            }
        }
        cache.replies_of(filter)
    }

    /// Takes the replies that have waited long enough, and releases fetched messages that have. Returns
    /// the replies to send now.
    pub(super) fn tick(
        &self,
        sessions: &Sessions,
        sources: &impl Sources,
        now: Millis,
    ) -> Vec<PendingGrant> {
        let mut replies = self.late_replies(now);
        replies.extend(self.release_late(sessions, sources, now));
        replies
    }

    fn late_replies(&self, now: Millis) -> Vec<PendingGrant> {
        let mut late = Vec::new();
        let mut cache = self.cache.lock();
        while let Some(&(deadline, filter)) = cache.reply_by.front()
            && deadline <= now
        {
            cache.reply_by.pop_front();
            let Some(waiting) = cache.replies.get_mut(&filter) else {
                continue;
            };
            late.extend(waiting.extract_if(.., |(at, _)| *at <= now).map(|(_, r)| r));
            if waiting.is_empty() {
                cache.replies.remove(&filter);
            }
        }
        late
    }

    /// The broker has answered a PINGREQ behind the fetch of these filters: the messages that it had
    /// are here. Returns the replies to send now.
    pub(super) fn fetch_answered(&self, filters: &[FilterId]) -> Vec<PendingGrant> {
        let mut cache = self.cache.lock();
        let mut replies = Vec::new();
        for filter in filters {
            if let Some(cached) = cache.filters.get_mut(filter) {
                cached.answered = cached.state == State::Fetching;
                replies.extend(cache.replies_of(*filter));
            }
        }
        replies
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
