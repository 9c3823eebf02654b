//! Live messages of subscriptions whose retained messages are still to come.
//!
//! A broker answers SUBSCRIBE with SUBACK, then come the retained messages, then live ones. Retained
//! messages may have to be fetched first; until they are there, the live messages of the subscription wait
//! here. They wait for a bounded time and in a bounded number; past either bound the subscription waits no
//! longer, and nothing is lost.
//!
//! All messages of a topic wait for the same subscription, so that they keep their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use crate::hashing::LookUp;
use crate::mqtt::{Message, QoS};
use crate::session::entry::Offer;
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::FilterId;

/// Messages of one subscription that may wait.
const SUBSCRIPTION_MAX: usize = 256;

/// Of the messages that may wait in a shard, one session has this part at most.
const SESSION_DIVISOR: usize = 4;

/// The messages that wait in the sessions of one shard.
#[derive(Debug, Default)]
pub struct WaitingTotal {
    messages: AtomicUsize,
    bytes: AtomicUsize,
}

/// A bound for the messages that wait in the sessions of one shard. One session may have a quarter of them.
#[derive(Clone, Copy, Debug)]
pub struct WaitingMax {
    /// Messages.
    pub messages: usize,
    /// Bytes of the messages, each counted in full.
    pub bytes: usize,
}

/// Names a wait among all waits of a shard. A subscription that is made again waits anew, under another
/// number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitNumber(u64);

impl WaitNumber {
    /// The number of the next wait.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The subscriptions of a connection whose live messages wait.
#[derive(Debug)]
pub(super) struct Waiting {
    subscriptions: BTreeMap<FilterId, Wait>,
    /// The topics (hashed) of the messages that wait.
    topics: LookUp<u64, Topic>,
    /// Messages that wait in this session.
    messages: usize,
    /// Their bytes, each counted in full.
    bytes: usize,
    /// Messages that have waited, for their order.
    order: u64,
    /// The messages of all sessions of the shard.
    total: Arc<WaitingTotal>,
}

/// A subscription whose live messages wait.
#[derive(Debug)]
struct Wait {
    number: WaitNumber,
    /// When it waits no longer.
    until: Millis,
    messages: Vec<Deferred>,
}

/// The messages of one topic that wait.
#[derive(Debug)]
struct Topic {
    /// The subscription for whose retained messages they wait.
    behind: FilterId,
    messages: usize,
    /// Those of them that the broker retains.
    retained: usize,
}

/// A message as its client is to get it.
#[derive(Debug)]
pub(super) struct Deferred {
    /// In the order of arrival.
    order: u64,
    /// The topic, hashed.
    topic: u64,
    /// The subscription that it is for.
    pub(super) filter: FilterId,
    pub(super) message: Message,
    pub(super) qos: QoS,
    pub(super) retain: bool,
    pub(super) ids: SmallVec<[u32; 1]>,
    pub(super) fetched: bool,
    /// See [`Offer::position`].
    pub(super) position: u64,
}

impl Deferred {
    /// The message for its client, on a stream of the connection.
    pub(super) fn offer(&self, stream: StreamId) -> Offer<'_> {
        Offer {
            message: &self.message,
            qos: self.qos,
            retain: self.retain,
            ids: &self.ids,
            group: None,
            stream,
            fetched: self.fetched,
            position: self.position,
        }
    }
}

/// What becomes of a message for a subscription that may have to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferral {
    /// It is to be delivered now.
    Due,
    /// It waits.
    Waits,
    /// Too many messages wait to add one for this filter: its wait is to be ended first.
    Full(FilterId),
}

impl Waiting {
    pub(super) fn new(total: &Arc<WaitingTotal>) -> Box<Self> {
        Box::new(Self {
            subscriptions: BTreeMap::new(),
            topics: LookUp::default(),
            messages: 0,
            bytes: 0,
            order: 0,
            total: total.clone(),
        })
    }

    /// A subscription waits from now on. Messages that wait already keep their time: those of a client that
    /// subscribes again and again must not wait for ever.
    pub(super) fn begin(&mut self, filter: FilterId, number: WaitNumber, until: Millis) {
        let wait = self.subscriptions.entry(filter).or_insert_with(|| Wait {
            number,
            until,
            messages: Vec::new(),
        });
        wait.number = number;
        if wait.messages.is_empty() {
            wait.until = until;
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.subscriptions.is_empty()
    }

    /// The number of a subscription's wait, and when it ends at the latest.
    pub(super) fn of(&self, filter: FilterId) -> Option<(WaitNumber, Millis)> {
        let wait = self.subscriptions.get(&filter)?;
        Some((wait.number, wait.until))
    }

    /// Keeps a message back: behind others on its topic, or else for its own subscription, if that waits.
    pub(super) fn defer(
        &mut self,
        filter: FilterId,
        offer: &Offer<'_>,
        max: WaitingMax,
    ) -> Deferral {
        if self.messages == 0 && !self.subscriptions.contains_key(&filter) {
            return Deferral::Due;
        }
        let message = offer.message;
        let hash = self.topics.digest(message.topic());
        let topic = self.topics.get(&hash);
        let behind = topic.map_or(filter, |topic| topic.behind);
        let has_room = self.has_room(message.size(), max);
        let Some(wait) = self.subscriptions.get_mut(&behind) else {
            return Deferral::Due;
        };
        if !has_room || wait.messages.len() >= SUBSCRIPTION_MAX {
            return Deferral::Full(behind);
        }
        wait.messages.push(Deferred {
            order: self.order,
            topic: hash,
            filter,
            message: message.clone(),
            qos: offer.qos,
            retain: offer.retain,
            ids: offer.ids.into(),
            fetched: offer.fetched,
            position: offer.position,
        });
        let topic = self.topics.entry(hash).or_insert(Topic {
            behind,
            messages: 0,
            retained: 0,
        });
        topic.messages += 1;
        topic.retained += usize::from(message.retain());
        self.order += 1;
        self.messages += 1;
        self.bytes += message.size();
        self.total.messages.fetch_add(1, Ordering::Relaxed);
        (self.total.bytes).fetch_add(message.size(), Ordering::Relaxed);
        Deferral::Waits
    }

    fn has_room(&self, bytes: usize, max: WaitingMax) -> bool {
        self.messages < max.messages / SESSION_DIVISOR
            && self.bytes + bytes <= max.bytes / SESSION_DIVISOR
            && self.total.messages.load(Ordering::Relaxed) < max.messages
            && self.total.bytes.load(Ordering::Relaxed) + bytes <= max.bytes
    }

    /// Whether a message waits on this topic that the broker retains.
    pub(super) fn has_retained(&self, topic: &str) -> bool {
        let topic = self.topics.get(&self.topics.digest(topic));
        topic.is_some_and(|topic| topic.retained > 0)
    }

    /// Ends the wait of one subscription.
    pub(super) fn take(&mut self, filter: FilterId) -> Vec<Deferred> {
        let wait = self.subscriptions.remove(&filter);
        let messages = wait.map_or_else(Vec::new, |wait| wait.messages);
        for deferred in &messages {
            self.leaves(deferred);
        }
        messages
    }

    /// Drops all messages; returns how many. The subscriptions go on waiting.
    pub(super) fn drop_messages(&mut self) -> usize {
        let waits = self.subscriptions.values_mut();
        let all: Vec<Deferred> = waits
            .flat_map(|w| std::mem::take(&mut w.messages))
            .collect();
        for deferred in &all {
            self.leaves(deferred);
        }
        all.len()
    }

    /// The messages of all subscriptions, in the order of their arrival.
    pub(super) fn take_all(&mut self) -> Vec<Deferred> {
        let waits = std::mem::take(&mut self.subscriptions).into_values();
        let mut all: Vec<Deferred> = waits.flat_map(|wait| wait.messages).collect();
        all.sort_unstable_by_key(|deferred| deferred.order);
        for deferred in &all {
            self.leaves(deferred);
        }
        all
    }

    /// All messages, in the order of their arrival.
    pub(super) fn all(&self) -> impl Iterator<Item = &Deferred> {
        let waits = self.subscriptions.values();
        let mut all: Vec<&Deferred> = waits.flat_map(|wait| &wait.messages).collect();
        all.sort_unstable_by_key(|deferred| deferred.order);
        all.into_iter()
    }

    fn leaves(&mut self, deferred: &Deferred) {
        let bytes = deferred.message.size();
        self.messages -= 1;
        self.bytes -= bytes;
        self.total.messages.fetch_sub(1, Ordering::Relaxed);
        self.total.bytes.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(topic) = self.topics.get_mut(&deferred.topic) {
            topic.messages -= 1;
            topic.retained -= usize::from(deferred.message.retain());
            if topic.messages == 0 {
                self.topics.remove(&deferred.topic);
            }
        }
    }

    pub(super) fn messages(&self) -> usize {
        self.messages
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.take_all();
    }
}
