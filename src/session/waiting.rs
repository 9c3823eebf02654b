//! Live messages of subscriptions whose retained messages are still to come.
//!
//! A broker answers SUBSCRIBE with SUBACK, then come the retained messages, then live ones. Retained
//! messages may have to be fetched first; until they are there, the live messages of the subscription wait
//! here. They wait for a bounded time and in a bounded number; past either bound the subscription waits no
//! longer, and nothing is lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use crate::mqtt::{Message, QoS};
use crate::time::Millis;
use crate::topics::FilterId;

/// Messages of one subscription that may wait.
pub(super) const WAITING_MAX: usize = 256;

/// The messages that wait in the sessions of one shard.
#[derive(Debug, Default)]
pub struct WaitingTotal {
    messages: AtomicUsize,
    bytes: AtomicUsize,
}

/// A bound for the messages that wait in the sessions of one shard.
#[derive(Clone, Copy, Debug)]
pub struct WaitingMax {
    /// Messages.
    pub messages: usize,
    /// Bytes of the messages, each counted in full.
    pub bytes: usize,
}

impl WaitingTotal {
    pub(super) fn has_room(&self, bytes: usize, max: WaitingMax) -> bool {
        self.messages.load(Ordering::Relaxed) < max.messages
            && self.bytes.load(Ordering::Relaxed) + bytes <= max.bytes
    }

    pub(super) fn add(&self, message: &Message) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(message.size(), Ordering::Relaxed);
    }

    fn remove(&self, messages: &[Deferred]) {
        let bytes = messages.iter().map(|d| d.message.size()).sum();
        self.messages.fetch_sub(messages.len(), Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The subscriptions of a connection whose live messages wait.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) subscriptions: BTreeMap<FilterId, Subscription>,
    /// Messages that wait in this session.
    pub(super) messages: usize,
    /// Their bytes, each counted in full.
    pub(super) bytes: usize,
    /// The number of the next message.
    pub(super) next: u64,
    /// The messages of all sessions of the shard.
    pub(super) total: Arc<WaitingTotal>,
}

/// A subscription whose live messages wait.
#[derive(Debug)]
pub(super) struct Subscription {
    /// When it waits no longer.
    pub(super) until: Millis,
    pub(super) messages: Vec<Deferred>,
}

/// A message as its client is to get it.
#[derive(Debug)]
pub(super) struct Deferred {
    /// In the order of arrival.
    pub(super) number: u64,
    pub(super) message: Message,
    pub(super) qos: QoS,
    pub(super) retain: bool,
    pub(super) ids: SmallVec<[u32; 1]>,
    pub(super) fetched: bool,
}

/// What becomes of a message for a subscription that may have to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferral {
    /// It is to be delivered now.
    Due,
    /// It waits.
    Waits,
    /// Too many messages wait for the retained messages of this filter: its wait is to be ended, and the
    /// message delivered behind the others.
    Full(FilterId),
}

impl Waiting {
    pub(super) fn new(total: &Arc<WaitingTotal>) -> Box<Self> {
        Box::new(Self {
            subscriptions: BTreeMap::new(),
            messages: 0,
            bytes: 0,
            next: 0,
            total: total.clone(),
        })
    }

    /// Ends the wait of one subscription.
    pub(super) fn take(&mut self, filter: FilterId) -> Vec<Deferred> {
        let taken = self.subscriptions.remove(&filter);
        let messages = taken.map_or_else(Vec::new, |s| s.messages);
        self.messages -= messages.len();
        self.bytes -= messages.iter().map(|d| d.message.size()).sum::<usize>();
        self.total.remove(&messages);
        messages
    }

    /// The messages of all subscriptions, in the order of their arrival.
    pub(super) fn take_all(&mut self) -> Vec<Deferred> {
        let subscriptions = std::mem::take(&mut self.subscriptions).into_values();
        let mut all: Vec<Deferred> = subscriptions.flat_map(|s| s.messages).collect();
        all.sort_unstable_by_key(|deferred| deferred.number);
        self.total.remove(&all);
        (self.messages, self.bytes) = (0, 0);
        all
    }

    pub(super) fn messages(&self) -> usize {
        self.messages
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.take_all();
    }
}
