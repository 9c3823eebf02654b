//! The cached retained messages of each filter, and the progress of each fetch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;

use lru::LruCache;
use smallvec::SmallVec;

use crate::budget::CacheAccounts;
use crate::hashing::{LookUp, LookUpHasher, LookUpSet};
use crate::mqtt::Message;
use crate::router::retained::ahead::Ahead;
use crate::router::retained::by_session::BySession;
use crate::router::retained::kept::Kept;
use crate::router::retained::missed::Missed;
use crate::router::types::{RetainedRequest, Served};
use crate::session::WaitNumber;
use crate::time::Millis;
use crate::topics::{FilterId, FilterTrie};

/// Bytes charged for a cached topic beside topic and message.
const TOPIC_OVERHEAD_BYTES: usize = 96;

/// Topics of live messages that are remembered while one filter is fetched.
const LIVE_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// In the queue for the retained link.
    Queued,
    /// The retained link has sent its SUBSCRIBE.
    Fetching,
    /// Everything is cached.
    Complete,
}

/// By session: a later request takes the place of an earlier one.
pub(super) type Requests = BySession<RetainedRequest>;

#[derive(Debug)]
pub(super) struct Cached {
    pub(super) state: State,
    /// The filter, once it is among the known ones.
    pub(super) name: Option<Arc<str>>,
    /// The last message of each topic; ordered, so that clients get them in the same order each time.
    pub(super) topics: BTreeMap<Box<str>, Kept>,
    /// Topics (hashed) with a live RETAIN=1 message since the fetch began: the fetched one is older.
    pub(super) live: LookUpSet<u64>,
    /// [`Ahead::events`] when the filter came among the known ones.
    pub(super) known_since: u64,
    pub(super) requests: Requests,
    /// The sessions whose live messages wait for the retained ones, with their waits.
    pub(super) waiting: BySession<WaitNumber>,
    /// Fetched messages that wait for the data link: a live message of the same topic may be on its
    /// way.
    pub(super) buffered: Vec<Buffered>,
    /// Callers that hand on fetched messages at the moment.
    pub(super) handing: u32,
    /// The fetch is over, but messages are still buffered or handed on. They may be buffered until then.
    pub(super) ending: Option<Millis>,
    /// Requests that came during the fetch, when its first messages were no longer there: they need
    /// the next fetch.
    pub(super) late: Requests,
    pub(super) bytes: usize,
    /// The broker has answered a PINGREQ behind the retained messages: few brokers send more.
    pub(super) answered: bool,
    /// Larger than the cache: handed on, not kept.
    pub(super) overflow: bool,
    /// A data link lost messages since the fetch began: not to be kept.
    pub(super) stale: bool,
    /// The broker had lost the filter: it is fetched for all its subscribers.
    pub(super) resync: bool,
    /// A resync needs another fetch, because this one may have begun before the loss.
    pub(super) early: bool,
}

/// A fetched message that waits for a data link.
#[derive(Debug)]
pub(super) struct Buffered {
    pub link: usize,
    /// The barrier of the link behind which no older live message follows.
    pub barrier: u64,
    /// The topic, hashed.
    pub topic: u64,
    pub message: Message,
}

// A million filters may be known at once, and many of them are fetched at once after a restart.
const _: () = assert!(size_of::<Cached>() <= 192);

impl Cached {
    pub(super) fn queued(requests: Requests) -> Box<Self> {
        Box::new(Self {
            state: State::Queued,
            name: None,
            topics: BTreeMap::new(),
            live: LookUpSet::default(),
            known_since: 0,
            requests,
            waiting: BySession::default(),
            buffered: Vec::new(),
            handing: 0,
            ending: None,
            late: Requests::default(),
            bytes: 0,
            answered: false,
            overflow: false,
            stale: false,
            resync: false,
            early: false,
        })
    }

    /// More messages may come by the fetch.
    pub(super) fn is_awaited(&self) -> bool {
        !(self.state == State::Complete || self.answered && self.buffered.is_empty())
    }

    /// All messages have come, and been handed on.
    pub(super) fn is_over(&self) -> bool {
        self.ending.is_some() && self.handing == 0 && self.buffered.is_empty()
    }

    /// A live message came during the fetch.
    pub(super) fn overtaken(&mut self, topic: u64) {
        if self.live.len() < LIVE_MAX {
            self.live.insert(topic);
        } else {
            self.stale = true;
        }
    }
}

/// The cache and the queue of fetches.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) filters: LookUp<FilterId, Box<Cached>>,
    /// Filters with buffered messages.
    pub(super) buffering: BTreeSet<FilterId>,
    /// Buffered messages of all filters.
    pub(super) buffered: usize,
    pub(super) buffered_bytes: usize,
    /// The filters that are fetched, or were.
    pub(super) known: FilterTrie<FilterId>,
    /// Topics on which some filter may be ahead of a known one.
    pub(super) ahead: Ahead,
    /// Hashes topics and payloads.
    pub(super) hasher: LookUpHasher,
    pub(super) complete: LruCache<FilterId, (), LookUpHasher>,
    /// Fetches that clients wait for.
    pub(super) queue: VecDeque<FilterId>,
    /// Fetches that nobody waits for, behind the others.
    pub(super) later: VecDeque<FilterId>,
    /// The values that subscribers of lost filters know.
    pub(super) missed: Missed,
    pub(super) bytes: usize,
    pub(super) bytes_max: usize,
    /// Charged for the cached messages.
    accounts: CacheAccounts,
}

impl Cache {
    pub(super) fn new(bytes_max: usize, accounts: CacheAccounts) -> Self {
        Self {
            filters: LookUp::default(),
            buffering: BTreeSet::new(),
            buffered: 0,
            buffered_bytes: 0,
            known: FilterTrie::new(),
            ahead: Ahead::default(),
            hasher: LookUpHasher::default(),
            complete: LruCache::unbounded_with_hasher(LookUpHasher::default()),
            queue: VecDeque::new(),
            later: VecDeque::new(),
            missed: Missed::default(),
            bytes: 0,
            bytes_max,
            accounts,
        }
    }

    /// A message's topic, hashed.
    pub(super) fn topic(&self, message: &Message) -> u64 {
        self.hasher.hash_one(message.topic())
    }

    pub(super) fn drop_filter(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.remove(&number) {
            self.bytes -= cached.bytes;
            self.buffered -= cached.buffered.len();
            let bytes = cached.buffered.iter().map(|b| b.message.size());
            self.buffered_bytes -= bytes.sum::<usize>();
            // A number that came after it may mean the same filter.
            if let Some(name) = &cached.name
                && self.known.get(name) == Some(number)
            {
                self.known.remove(name);
            }
            self.buffering.remove(&number);
        }
        self.complete.pop(&number);
    }

    /// The link of a filter is away: its subscribers know the values in the cache.
    pub(super) fn miss(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.get(&number) {
            self.missed
                .begin(number, cached.topics.values().map(|kept| &**kept));
        }
    }

    /// Queues a filter to be fetched for all its subscribers. The messages of a root are not kept.
    pub(super) fn resync(&mut self, number: FilterId, root: bool) {
        if let Some(cached) = self.filters.get(&number)
            && cached.state == State::Complete
        {
            self.drop_filter(number);
        }
        match self.filters.get_mut(&number) {
            Some(cached) => {
                cached.early |= cached.state == State::Fetching;
                cached.resync = true;
            }
            None => {
                let mut queued = Cached::queued(Requests::default());
                queued.resync = true;
                queued.overflow = root;
                self.filters.insert(number, queued);
                self.later.push_back(number);
            }
        }
    }

    /// Whether some filter is to be fetched for all its subscribers.
    pub(super) fn resyncs(&self) -> bool {
        self.filters.any(|_, c| c.resync)
    }

    /// The cached messages of a filter that have not expired.
    pub(super) fn messages(&self, number: FilterId, now: Millis) -> Vec<Message> {
        let Some(cached) = self.filters.get(&number) else {
            return Vec::new();
        };
        let alive = cached
            .topics
            .values()
            .map(|kept| &**kept)
            .filter(|m| !m.has_expired(now));
        alive.cloned().collect()
    }

    /// The next filter to be fetched.
    pub(super) fn next(&mut self) -> Option<FilterId> {
        loop {
            let number = self.queue.pop_front().or_else(|| self.later.pop_front())?;
            // A filter is in both queues if a client came to wait for it.
            let cached = self.filters.get(&number);
            if cached.is_some_and(|c| c.state == State::Queued) {
                return Some(number);
            }
        }
    }

    /// Adds the subscriptions on a filter that have their retained messages, if no more are awaited.
    pub(super) fn served(&mut self, number: FilterId, served: &mut Vec<Served>) {
        let Some(cached) = self.filters.get_mut(&number) else {
            return;
        };
        if cached.is_awaited() || cached.waiting.is_empty() {
            return;
        }
        let late = &cached.late;
        let done = cached.waiting.take_where(|session| !late.contains(session));
        served.extend(done.into_iter().map(|(session, wait)| Served {
            session,
            filter: number,
            wait,
        }));
    }

    /// Buffers a fetched message.
    pub(super) fn buffer(&mut self, number: FilterId, buffered: Buffered) {
        if let Some(cached) = self.filters.get_mut(&number) {
            self.buffered += 1;
            self.buffered_bytes += buffered.message.size();
            cached.buffered.push(buffered);
            self.buffering.insert(number);
        }
    }

    /// The retained link brought a message for one filter. Other filters that match its topic may still
    /// have an older value, which must not follow this one: a buffered value is replaced and waits for
    /// the next barrier of its link, and a cached one is forgotten.
    pub(super) fn outdate(
        &mut self,
        number: FilterId,
        message: &Message,
        barrier: impl Fn(usize) -> u64,
    ) {
        let mut matching: SmallVec<[FilterId; 8]> = SmallVec::new();
        let topic = message.topic();
        self.known.for_each_match(topic, |n| matching.push(n));
        let hash = self.topic(message);
        for other in matching.into_iter().filter(|n| *n != number) {
            let Some(cached) = self.filters.get_mut(&other) else {
                continue;
            };
            let is_older = |m: &Message| m.topic() == topic && m.payload() != message.payload();
            let buffered = cached.buffered.iter_mut();
            for old in buffered.filter(|b| b.topic == hash && is_older(&b.message)) {
                self.buffered_bytes += message.size();
                self.buffered_bytes -= old.message.size();
                old.message = message.clone();
                old.barrier = barrier(old.link);
            }
            if cached.topics.get(topic).is_some_and(|kept| is_older(kept)) {
                match cached.state {
                    State::Complete => self.drop_filter(other),
                    State::Queued | State::Fetching => cached.stale = true,
                }
            }
        }
    }

    /// Takes the buffered messages of a filter for whose link and barrier `passed` is true.
    pub(super) fn release(
        &mut self,
        number: FilterId,
        passed: impl Fn(usize, u64) -> bool,
    ) -> Vec<Message> {
        let Some(cached) = self.filters.get_mut(&number) else {
            return Vec::new();
        };
        let buffered = &mut cached.buffered;
        let released = buffered.extract_if(.., |b| passed(b.link, b.barrier));
        let released: Vec<Message> = released.map(|b| b.message).collect();
        self.buffered -= released.len();
        self.buffered_bytes -= released.iter().map(Message::size).sum::<usize>();
        if cached.buffered.is_empty() {
            self.buffering.remove(&number);
        }
        released
    }

    /// Caches a message, or removes its topic if the payload is empty. Older filters make room.
    pub(super) fn put(&mut self, number: FilterId, message: &Message) {
        let bytes_max = self.bytes_max;
        let Some(cached) = self.filters.get_mut(&number) else {
            return;
        };
        let cost = |m: &Message| m.size() + m.topic().len() + TOPIC_OVERHEAD_BYTES;
        if let Some(old) = cached.topics.remove(message.topic()) {
            let freed = cost(&old);
            cached.bytes -= freed;
            self.bytes -= freed;
        }
        if message.payload().is_empty() || cached.overflow {
            return;
        }
        let added = cost(message);
        if cached.bytes + added > bytes_max {
            self.spill(number);
            return;
        }
        cached.bytes += added;
        self.bytes += added;
        cached
            .topics
            .insert(message.topic().into(), Kept::new(message, &self.accounts));
        while self.bytes > bytes_max {
            match self.complete.pop_lru() {
                Some((oldest, ())) => self.drop_filter(oldest),
                // All other filters are being fetched too.
                None => return self.spill(number),
            }
        }
    }

    /// Gives up caching a filter whose messages do not fit; they are only handed on.
    fn spill(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.get_mut(&number) {
            cached.overflow = true;
            self.bytes -= std::mem::take(&mut cached.bytes);
            cached.topics = BTreeMap::new();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties, QoS};
    use crate::router::types::Arrived;

    pub(in crate::router::retained) fn arrived(topic: &str, filters: &[FilterId]) -> Arrived {
        Arrived {
            message: Message::new(&MessageSpec {
                topic,
                properties: Properties::default(),
                payload: b"x",
                qos: QoS::AtLeastOnce,
                retain: true,
                expires_at: None,
                strip_key: None,
                account: None,
            }),
            filters: filters.into(),
            link: 0,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }
    }

    /// Filter 7, `a/#`, is complete in the cache.
    pub(in crate::router::retained) fn complete() -> Cache {
        let mut cache = Cache::new(1000, CacheAccounts::default());
        let mut cached = Cached::queued(Requests::default());
        cached.state = State::Complete;
        cached.name = Some("a/#".into());
        cache.known.insert("a/#", FilterId(7));
        cache.filters.insert(FilterId(7), cached);
        cache.complete.put(FilterId(7), ());
        cache
    }

    #[test]
    fn filters_that_are_fetched_at_once_share_one_bound() {
        let mut cache = Cache::new(1000, CacheAccounts::default());
        for number in 0..10 {
            let mut cached = Cached::queued(Requests::default());
            cached.state = State::Fetching;
            cache.filters.insert(FilterId(number), cached);
            for n in 0..3 {
                cache.put(FilterId(number), &arrived(&format!("a/{n}"), &[]).message);
                assert!(cache.bytes <= 1000, "{}", cache.bytes);
            }
        }
        let kept = cache.filters.all().filter(|(_, c)| !c.overflow).count();
        assert!((1..10).contains(&kept), "{kept}");
        let bytes: usize = cache.filters.all().map(|(_, c)| c.bytes).sum();
        assert_eq!(bytes, cache.bytes);
    }

    #[test]
    fn a_forgotten_number_leaves_its_filter_to_the_next() {
        let mut cache = complete();
        cache.known.insert("a/#", FilterId(8));
        cache.drop_filter(FilterId(7));
        assert_eq!(cache.known.get("a/#"), Some(FilterId(8)));
    }
}
