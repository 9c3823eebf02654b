//! Retained messages for new subscriptions: fetched once per filter, then served from a bounded
//! cache that live messages keep current.
//!
//! The mutex is held while a retained message is handed to its session, and a live one updates
//! the cache before it is fanned out: so a value older than one already delivered never follows it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use lru::LruCache;
use smallvec::SmallVec;

use crate::limits::Account;
use crate::mqtt::{Message, QoS, ReasonCode};
use crate::telemetry::metrics;

use super::fanout::{Arrived, Tally};
use super::trie::FilterTrie;
use super::{Router, SessionRef};

/// Bytes charged for a cached topic beside topic and message.
const TOPIC_OVERHEAD: usize = 96;

/// Fetched messages that wait for the data links at most; more are handed on at once.
const HELD_MAX: usize = 10_000;

/// Topics on which other filters are ahead of a filter in the cache, at most.
const AHEAD_MAX: usize = 10_000;

/// For how long, milliseconds: longer than the data links are apart. A link that is away has its
/// filters' caches emptied.
const AHEAD_FOR: u64 = 5000;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the queue for the R link.
    Queued,
    /// SUBSCRIBE sent on R.
    Fetching,
    /// All there is.
    Complete,
}

#[derive(Debug)]
struct Cached {
    state: State,
    /// Its name among the known ones, once it is there.
    name: Option<Arc<str>>,
    topics: HashMap<Box<str>, Message, RandomState>,
    /// Topics with a live RETAIN=1 message since the fetch began: the fetched one is older.
    live: HashSet<Box<str>, RandomState>,
    /// What came live by another filter and not by this one since, by topic: until when it counts,
    /// and a digest. Who has both filters is not to get what is older.
    ahead: HashMap<Box<str>, (u64, u64), RandomState>,
    wants: Vec<Wants>,
    /// Fetched, until the data link has brought what came before: which link, which moment. A
    /// live message of the same topic may be on its way.
    held: Vec<(usize, u64, Message)>,
    /// Came while the fetch was under way and what it brought is no longer there: next fetch.
    late: Vec<Wants>,
    bytes: usize,
    /// The core has answered behind what it sent: few have more to come.
    through: bool,
    /// Larger than the cache: handed on, not kept.
    overflow: bool,
    /// D lost messages since the fetch began: not to be kept.
    stale: bool,
}

impl Cached {
    fn queued(wants: Vec<Wants>) -> Self {
        Self {
            state: State::Queued,
            name: None,
            topics: HashMap::default(),
            live: HashSet::default(),
            ahead: HashMap::default(),
            wants,
            held: Vec::new(),
            late: Vec::new(),
            bytes: 0,
            through: false,
            overflow: false,
            stale: false,
        }
    }
}

/// The cache and the queue of fetches.
#[derive(Debug)]
pub(super) struct Retained {
    filters: HashMap<u32, Cached, RandomState>,
    /// Filters with messages that are held, and how many those are.
    holding: HashSet<u32, RandomState>,
    held: usize,
    /// The filters that are fetched, or were.
    known: FilterTrie<u32>,
    /// Replies that wait, by filter, each until its deadline; and the deadlines in order.
    replies: HashMap<u32, Vec<(u64, Reply)>, RandomState>,
    reply_by: VecDeque<(u64, u32)>,
    complete: LruCache<u32, (), RandomState>,
    queue: VecDeque<u32>,
    bytes: usize,
    bytes_max: usize,
    pub account: Arc<Account>,
}

impl Retained {
    pub fn new(bytes_max: usize) -> Self {
        Self {
            filters: HashMap::default(),
            holding: HashSet::default(),
            held: 0,
            known: FilterTrie::new(),
            replies: HashMap::default(),
            reply_by: VecDeque::new(),
            complete: LruCache::unbounded_with_hasher(RandomState::default()),
            queue: VecDeque::new(),
            bytes: 0,
            bytes_max,
            account: Arc::new(Account::new()),
        }
    }

    fn drop_filter(&mut self, number: u32) {
        if let Some(cached) = self.filters.remove(&number) {
            self.bytes -= cached.bytes;
            self.held -= cached.held.len();
            if let Some(name) = &cached.name {
                self.known.remove(name);
            }
            self.holding.remove(&number);
        }
        self.complete.pop(&number);
    }

    /// The replies of a filter, once nothing that it waits for is missing.
    fn replies_of(&mut self, number: u32) -> Vec<Reply> {
        let waits = |c: &Cached| !(c.state == State::Complete || c.through && c.held.is_empty());
        if self.replies.is_empty() || self.filters.get(&number).is_some_and(waits) {
            return Vec::new();
        }
        let replies = self.replies.remove(&number).unwrap_or_default();
        replies.into_iter().map(|(_, reply)| reply).collect()
    }

    fn hold(&mut self, number: u32, held: (usize, u64, Message)) {
        if let Some(cached) = self.filters.get_mut(&number) {
            cached.held.push(held);
            self.holding.insert(number);
            self.held += 1;
        }
    }

    fn release(&mut self, number: u32, passed: impl Fn(usize, u64) -> bool) -> Vec<Message> {
        let Some(cached) = self.filters.get_mut(&number) else {
            return Vec::new();
        };
        let held = cached
            .held
            .extract_if(.., |(link, fence, _)| passed(*link, *fence));
        let released: Vec<Message> = held.map(|(_, _, message)| message).collect();
        self.held -= released.len();
        if cached.held.is_empty() {
            self.holding.remove(&number);
        }
        released
    }

    /// A live message is ahead of those filters that it did not come by.
    fn ahead(&mut self, arrived: &Arrived, now: u64) {
        if self.known.is_empty() {
            return;
        }
        let topic = arrived.message.topic();
        let mut others: SmallVec<[u32; 8]> = SmallVec::new();
        self.known.for_each_match(topic, |n| others.push(n));
        for number in others.iter().filter(|n| !arrived.filters.contains(n)) {
            let Some(cached) = self.filters.get_mut(number) else {
                continue;
            };
            let digest = cached.ahead.hasher().hash_one(arrived.message.payload());
            cached.ahead.insert(topic.into(), (now + AHEAD_FOR, digest));
            if cached.ahead.len() > AHEAD_MAX && cached.state == State::Complete {
                self.drop_filter(*number);
            }
        }
    }

    /// Whether something newer may have reached a session that has other subscriptions on the topic.
    fn is_ahead(&self, number: u32, message: &Message, now: u64) -> bool {
        let ahead = self.filters.get(&number).map(|c| &c.ahead);
        ahead.is_some_and(|ahead| {
            let of_topic = ahead.get(message.topic());
            let digest = || ahead.hasher().hash_one(message.payload());
            of_topic.is_some_and(|(until, other)| *until > now && *other != digest())
        })
    }

    fn put(&mut self, number: u32, message: &Message) {
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
            cached.overflow = true;
            self.bytes -= cached.bytes;
            cached.bytes = 0;
            cached.topics = HashMap::default();
            return;
        }
        cached.bytes += added;
        self.bytes += added;
        cached
            .topics
            .insert(message.topic().into(), message.charged_to(&account));
        while self.bytes > bytes_max {
            let Some((oldest, ())) = self.complete.pop_lru() else {
                break;
            };
            self.drop_filter(oldest);
        }
    }
}

/// Adds a wish; one of the same session takes the place of its earlier one.
fn want(wants: &mut Vec<Wants>, new: Wants) {
    match wants.iter_mut().find(|w| w.session == new.session) {
        Some(known) => *known = new,
        None => wants.push(new),
    }
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
            Some(cached) if cached.state == State::Queued => want(&mut cached.wants, wants),
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
            && let Some(number) = retained.queue.pop_front()
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
        if cached.state != State::Fetching || cached.live.contains(message.topic()) {
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
        let older = |m: &&Message| !cached.live.contains(m.topic());
        let messages: Vec<Message> = messages.iter().filter(older).cloned().collect();
        let wants = cached.wants.clone();
        for message in &messages {
            retained.put(number, message);
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
            if complete && !cached.overflow && !cached.stale {
                cached.state = State::Complete;
                retained.complete.put(number, ());
                continue;
            }
            let mut wants = std::mem::take(&mut cached.wants);
            wants.extend(late);
            retained.drop_filter(number);
            if !wants.is_empty() {
                again = true;
                retained.filters.insert(number, Cached::queued(wants));
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
        for &number in &arrived.filters {
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            cached.ahead.remove(arrived.message.topic());
            match cached.state {
                State::Queued => continue,
                State::Fetching => {
                    cached.live.insert(arrived.message.topic().into());
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
        for &number in &arrived.filters {
            match retained.filters.get_mut(&number) {
                Some(cached) if cached.state == State::Fetching => {
                    cached.live.insert(arrived.message.topic().into());
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
