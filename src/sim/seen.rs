//! What the oracle has seen of clients: what they asked for, sent and got.

use crate::mqtt::QoS;
use crate::topics::{matches, split_shared};

/// How many copies a client may get by plain subscriptions: one, however many overlap; one more for
/// each that it asked for after it had left those before.
pub fn chances<'a>(subs: impl Iterator<Item = &'a Sub>, message: &Message) -> usize {
    let mut spans: Vec<(u64, u64)> = subs
        .filter(|s| s.ended_at >= message.at)
        .map(|s| (s.ended_at, s.asked_at))
        .collect();
    spans.sort_unstable();
    let mut last_end = None;
    let mut chances = 0;
    for (ended_at, asked_at) in spans {
        if last_end.is_none_or(|end| asked_at >= end) {
            chances += 1;
            last_end = Some(ended_at);
        }
    }
    chances
}

/// A delivery.
#[derive(Clone, Copy, Debug)]
pub struct Got {
    pub number: u32,
    pub qos: QoS,
    pub retain: bool,
    pub at: u64,
}

#[derive(Debug)]
pub struct Sub {
    pub filter: String,
    pub qos: QoS,
    pub no_local: bool,
    pub handling: u8,
    pub asked_at: u64,
    pub granted_at: Option<u64>,
    pub ended_at: u64,
}

impl Sub {
    pub fn shared(&self) -> bool {
        split_shared(&self.filter).is_some()
    }

    /// A publish that was before the subscription is not marked as its client's own.
    pub fn hides(&self, n: usize, message: &Message) -> bool {
        self.no_local && message.from == n && self.asked_at < message.at
    }

    pub fn matches(&self, topic: &str) -> bool {
        let plain = split_shared(&self.filter).map_or(&*self.filter, |(_, f)| f);
        matches(plain, topic)
    }
}

#[derive(Debug)]
pub struct Message {
    pub from: usize,
    pub topic: String,
    pub qos: QoS,
    pub retain: bool,
    pub will: bool,
    /// The core closes the connection for it: it reaches nobody, and its sender is told.
    pub poison: bool,
    pub at: u64,
    pub acknowledged_at: u64,
}

#[derive(Debug, Default)]
pub struct Client {
    pub subs: Vec<Sub>,
    pub got: Vec<(String, Got)>,
    /// Retained messages, handed over for a subscription.
    pub handed: Vec<(String, Got)>,
    pub cuts: Vec<u64>,
}

impl Client {
    /// A subscription on the same filter is under way, that may be less.
    pub fn replaces(&self, sub: &Sub) -> bool {
        let pending = |o: &Sub| o.granted_at.is_none() && o.ended_at == u64::MAX;
        self.subs
            .iter()
            .any(|o| o.filter == sub.filter && pending(o))
    }
}
