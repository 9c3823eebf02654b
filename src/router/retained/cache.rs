//! What is known of filters' retained messages, and how far the fetch of each has come.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use lru::LruCache;
use smallvec::SmallVec;

use crate::budget::Account;
use crate::mqtt::Message;
use crate::router::retained::resync::Missed;
use crate::router::retained::{Reply, RetainedRequest};
use crate::router::types::Arrived;
use crate::router::types::SessionRef;
use crate::time::Millis;
use crate::topics::{FilterId, FilterTrie};

/// Bytes charged for a cached topic beside topic and message.
const TOPIC_OVERHEAD: usize = 96;

/// Topics on which other filters are ahead of one that is known, at most, all together.
const AHEAD_MAX: usize = 100_000;

/// Topics that live messages came on while a filter was fetched, at most.
const LIVE_MAX: usize = 100_000;

/// For how long, milliseconds: longer than the data links are apart. A link that is away has its
/// filters' caches emptied.
const AHEAD_FOR: u64 = 5000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// In the queue for the R link.
    Queued,
    /// SUBSCRIBE sent on R.
    Fetching,
    /// All there is.
    Complete,
}

/// By session: a later wish takes the place of an earlier one.
pub(super) type Wishes = BTreeMap<SessionRef, RetainedRequest>;

#[derive(Debug)]
pub(super) struct Cached {
    pub(super) state: State,
    /// Its name among the known ones, once it is there.
    pub(super) name: Option<Arc<str>>,
    pub(super) topics: HashMap<Box<str>, Message, RandomState>,
    /// Digests of topics with a live RETAIN=1 message since the fetch began: the fetched one is older.
    pub(super) live: HashSet<u64, RandomState>,
    /// What came live by another filter and not by this one since, by the topic's digest: until when
    /// it counts, and a digest of what it says. Who has both filters is not to get what is older.
    pub(super) ahead: HashMap<u64, (u64, u64), RandomState>,
    pub(super) wants: Wishes,
    /// Fetched, until the data link has brought what came before: which link, which moment. A
    /// live message of the same topic may be on its way.
    pub(super) held: Vec<(usize, u64, Message)>,
    /// Those that hand on what was fetched just now.
    pub(super) handing: u32,
    /// The fetch is over, but for what is held or handed on: until when it may be held.
    pub(super) ending: Option<u64>,
    /// Came while the fetch was under way and what it brought is no longer there: next fetch.
    pub(super) late: Wishes,
    pub(super) bytes: usize,
    /// The core has answered behind what it sent: few have more to come.
    pub(super) through: bool,
    /// Larger than the cache: handed on, not kept.
    pub(super) overflow: bool,
    /// D lost messages since the fetch began: not to be kept.
    pub(super) stale: bool,
    /// It is fetched for all who have it: the core had lost it.
    pub(super) resync: bool,
    /// And once more: it may have begun before the loss.
    pub(super) early: bool,
}

impl Cached {
    pub(super) fn queued(wants: Wishes) -> Box<Self> {
        Box::new(Self {
            state: State::Queued,
            name: None,
            topics: HashMap::default(),
            live: HashSet::default(),
            ahead: HashMap::default(),
            wants,
            held: Vec::new(),
            handing: 0,
            ending: None,
            late: Wishes::new(),
            bytes: 0,
            through: false,
            overflow: false,
            stale: false,
            resync: false,
            early: false,
        })
    }
}

impl Cached {
    /// More may come of it.
    fn is_awaited(&self) -> bool {
        !(self.state == State::Complete || self.through && self.held.is_empty())
    }

    /// All there is has come, and been handed on.
    pub(super) fn is_over(&self) -> bool {
        self.ending.is_some() && self.handing == 0 && self.held.is_empty()
    }

    /// A live message came while it is fetched.
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
pub(in crate::router) struct Retained {
    pub(super) filters: HashMap<FilterId, Box<Cached>, RandomState>,
    /// Filters with messages that are held, and how many those are.
    pub(super) holding: HashSet<FilterId, RandomState>,
    pub(super) held: usize,
    pub(super) held_bytes: usize,
    /// The filters that are fetched, or were.
    pub(super) known: FilterTrie<FilterId>,
    /// Topics on which others are ahead of them.
    pub(super) ahead: usize,
    pub(super) digests: RandomState,
    /// Replies that wait, by filter, each until its deadline; and the deadlines in order.
    pub(super) replies: HashMap<FilterId, Vec<(u64, Reply)>, RandomState>,
    pub(super) reply_by: VecDeque<(u64, FilterId)>,
    pub(super) complete: LruCache<FilterId, (), RandomState>,
    pub(super) queue: VecDeque<FilterId>,
    /// Fetches that nobody waits for: behind the others.
    pub(super) later: VecDeque<FilterId>,
    /// What those know who have filters that are lost.
    pub missed: Missed,
    pub(super) bytes: usize,
    pub(super) bytes_max: usize,
    /// What the cache holds is charged to it, apart from the queues.
    account: Arc<Account>,
}

impl Retained {
    pub fn new(bytes_max: usize) -> Self {
        Self {
            filters: HashMap::default(),
            holding: HashSet::default(),
            held: 0,
            held_bytes: 0,
            known: FilterTrie::new(),
            ahead: 0,
            digests: RandomState::default(),
            replies: HashMap::default(),
            reply_by: VecDeque::new(),
            complete: LruCache::unbounded_with_hasher(RandomState::default()),
            queue: VecDeque::new(),
            later: VecDeque::new(),
            missed: Missed::default(),
            bytes: 0,
            bytes_max,
            account: Arc::new(Account::new()),
        }
    }

    pub(super) fn topic(&self, message: &Message) -> u64 {
        self.digests.hash_one(message.topic())
    }

    pub(super) fn drop_filter(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.remove(&number) {
            self.bytes -= cached.bytes;
            self.held -= cached.held.len();
            self.held_bytes -= cached.held.iter().map(|(_, _, m)| m.size()).sum::<usize>();
            self.ahead -= cached.ahead.len();
            // A number that came after it may mean the same filter.
            if let Some(name) = &cached.name
                && self.known.get(name) == Some(number)
            {
                self.known.remove(name);
            }
            self.holding.remove(&number);
        }
        self.complete.pop(&number);
    }

    /// The link of a filter is away: who has it knows what the cache knows.
    pub(in crate::router) fn miss(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.get(&number) {
            self.missed.begin(number, cached.topics.values());
        }
    }

    /// A filter is fetched for all who have it. All that is below a root is not kept.
    pub(in crate::router) fn resync(&mut self, number: FilterId, root: bool) {
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
                let mut queued = Cached::queued(Wishes::new());
                queued.resync = true;
                queued.overflow = root;
                self.filters.insert(number, queued);
                self.later.push_back(number);
            }
        }
    }

    /// Whether a filter is to be fetched for all who have it.
    pub(in crate::router) fn resyncs(&self) -> bool {
        self.filters.values().any(|c| c.resync)
    }

    /// The next filter to be fetched.
    pub(super) fn next(&mut self) -> Option<FilterId> {
        loop {
            let number = self.queue.pop_front().or_else(|| self.later.pop_front())?;
            // One for which somebody came to wait is in both.
            let cached = self.filters.get(&number);
            if cached.is_some_and(|c| c.state == State::Queued) {
                return Some(number);
            }
        }
    }

    /// The replies of a filter, once nothing that it waits for is missing.
    pub(super) fn replies_of(&mut self, number: FilterId) -> Vec<Reply> {
        if self.replies.is_empty() || self.filters.get(&number).is_some_and(|c| c.is_awaited()) {
            return Vec::new();
        }
        let replies = self.replies.remove(&number).unwrap_or_default();
        replies.into_iter().map(|(_, reply)| reply).collect()
    }

    pub(super) fn hold(&mut self, number: FilterId, held: (usize, u64, Message)) {
        if let Some(cached) = self.filters.get_mut(&number) {
            self.held += 1;
            self.held_bytes += held.2.size();
            cached.held.push(held);
            self.holding.insert(number);
        }
    }

    pub(super) fn release(
        &mut self,
        number: FilterId,
        passed: impl Fn(usize, u64) -> bool,
    ) -> Vec<Message> {
        let Some(cached) = self.filters.get_mut(&number) else {
            return Vec::new();
        };
        let held = cached
            .held
            .extract_if(.., |(link, fence, _)| passed(*link, *fence));
        let released: Vec<Message> = held.map(|(_, _, message)| message).collect();
        self.held -= released.len();
        self.held_bytes -= released.iter().map(Message::size).sum::<usize>();
        if cached.held.is_empty() {
            self.holding.remove(&number);
        }
        released
    }

    /// A live message is ahead of those filters that it did not come by, and not of the others.
    pub(super) fn ahead(&mut self, arrived: &Arrived, now: Millis) {
        if self.known.is_empty() {
            return;
        }
        let topic = arrived.message.topic();
        let mut others: SmallVec<[FilterId; 8]> = SmallVec::new();
        self.known.for_each_match(topic, |n| others.push(n));
        let topic = self.digests.hash_one(topic);
        let says = self.digests.hash_one(arrived.message.payload());
        for number in others {
            let Some(cached) = self.filters.get_mut(&number) else {
                continue;
            };
            if arrived.filters.contains(&number) {
                self.ahead -= usize::from(cached.ahead.remove(&topic).is_some());
            } else if self.ahead < AHEAD_MAX {
                let new = cached
                    .ahead
                    .insert(topic, (now + AHEAD_FOR, says))
                    .is_none();
                self.ahead += usize::from(new);
            } else {
                // Not to be told any more: what is known of it goes, and is fetched when asked for.
                self.ahead -= cached.ahead.len();
                cached.ahead = HashMap::default();
                cached.stale = true;
                if cached.state == State::Complete {
                    self.drop_filter(number);
                }
            }
        }
    }

    /// Whether something newer may have reached a session that has other subscriptions on the topic.
    pub(in crate::router) fn is_ahead(
        &self,
        number: FilterId,
        message: &Message,
        now: Millis,
    ) -> bool {
        let ahead = self.filters.get(&number).map(|c| &c.ahead);
        let Some(ahead) = ahead.filter(|ahead| !ahead.is_empty()) else {
            return false;
        };
        let of_topic = ahead.get(&self.digests.hash_one(message.topic()));
        of_topic.is_some_and(|(until, says)| {
            *until > now && *says != self.digests.hash_one(message.payload())
        })
    }

    pub(super) fn put(&mut self, number: FilterId, message: &Message) {
        let (bytes_max, account) = (self.bytes_max, self.account.clone());
        let Some(cached) = self.filters.get_mut(&number) else {
            return;
        };
        let cost = |m: &Message| m.size() + m.topic().len() + TOPIC_OVERHEAD;
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
            .insert(message.topic().into(), message.charged_to(&account));
        while self.bytes > bytes_max {
            match self.complete.pop_lru() {
                Some((oldest, ())) => self.drop_filter(oldest),
                // All the others are being fetched too.
                None => return self.spill(number),
            }
        }
    }

    /// A filter is handed on and not kept: there is no room for it.
    fn spill(&mut self, number: FilterId) {
        if let Some(cached) = self.filters.get_mut(&number) {
            cached.overflow = true;
            self.bytes -= std::mem::take(&mut cached.bytes);
            cached.topics = HashMap::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties, QoS};

    fn arrived(topic: &str, filters: &[FilterId]) -> Arrived {
        Arrived {
            message: Message::new(&MessageSpec {
                topic,
                properties: Properties::default(),
                payload: b"x",
                qos: QoS::AtLeastOnce,
                retain: true,
                expires_at: u64::MAX,
                strip_key: None,
                account: None,
            }),
            filters: filters.into(),
            link: 0,
            origin_mark: None,
        }
    }

    /// Filter 7, `a/#`, is complete in the cache.
    fn cache() -> Retained {
        let mut retained = Retained::new(1000);
        let mut cached = Cached::queued(Wishes::new());
        cached.state = State::Complete;
        cached.name = Some("a/#".into());
        retained.known.insert("a/#", FilterId(7));
        retained.filters.insert(FilterId(7), cached);
        retained.complete.put(FilterId(7), ());
        retained
    }

    #[test]
    fn another_filter_is_ahead_until_its_own_copy_comes_or_time_passes() {
        let mut retained = cache();
        let older = arrived("a/b", &[FilterId(7)]).message.clone();
        retained.ahead(&arrived("a/b", &[FilterId(9)]), 0);
        assert!(
            !retained.is_ahead(FilterId(7), &older, 0),
            "it says the same"
        );
        let mut newer = arrived("a/b", &[FilterId(9)]);
        newer.message = Message::new(&MessageSpec {
            topic: "a/b",
            properties: Properties::default(),
            payload: b"y",
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        });
        retained.ahead(&newer, 0);
        assert!(retained.is_ahead(FilterId(7), &older, 0));
        assert!(!retained.is_ahead(FilterId(7), &older, AHEAD_FOR));
        newer.filters = [FilterId(7)].as_slice().into();
        retained.ahead(&newer, 0);
        assert!(!retained.is_ahead(FilterId(7), &older, 0));
        assert_eq!(retained.ahead, 0);
    }

    #[test]
    fn a_filter_that_others_are_too_far_ahead_of_is_forgotten() {
        let mut retained = cache();
        for n in 0..AHEAD_MAX {
            retained.ahead(&arrived(&format!("a/{n}"), &[FilterId(9)]), 0);
        }
        assert_eq!(retained.ahead, AHEAD_MAX);
        assert!(retained.filters.contains_key(&FilterId(7)));
        retained.ahead(&arrived("a/more", &[FilterId(9)]), 0);
        assert!(retained.filters.is_empty() && retained.known.is_empty());
        assert_eq!(retained.ahead, 0);
    }

    #[test]
    fn filters_that_are_fetched_at_once_share_one_bound() {
        let mut retained = Retained::new(1000);
        for number in 0..10 {
            let mut cached = Cached::queued(Wishes::new());
            cached.state = State::Fetching;
            retained.filters.insert(FilterId(number), cached);
            for n in 0..3 {
                retained.put(FilterId(number), &arrived(&format!("a/{n}"), &[]).message);
                assert!(retained.bytes <= 1000, "{}", retained.bytes);
            }
        }
        let kept = retained.filters.values().filter(|c| !c.overflow).count();
        assert!((1..10).contains(&kept), "{kept}");
        let bytes: usize = retained.filters.values().map(|c| c.bytes).sum();
        assert_eq!(bytes, retained.bytes);
    }

    #[test]
    fn a_forgotten_number_leaves_its_filter_to_the_next() {
        let mut retained = cache();
        retained.known.insert("a/#", FilterId(8));
        retained.drop_filter(FilterId(7));
        assert_eq!(retained.known.get("a/#"), Some(FilterId(8)));
    }
}
