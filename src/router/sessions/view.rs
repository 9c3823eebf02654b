//! The sessions as the admin API and the metrics show them.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::mqtt::{SubscribeOptions, Version};
use crate::session::SessionKey;
use crate::time::Millis;

use crate::router::sessions::Sessions;
use crate::router::sessions::sleep::Backlogged;
use crate::router::sessions::slot::Slot;
use crate::router::types::{Peer, SessionRef};

/// One session, as it is now.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Client identifier and mount.
    pub key: SessionKey,
    /// Who the session belongs to.
    pub principal: Arc<str>,
    /// Protocol version of the latest connection.
    pub version: Version,
    /// A client is connected.
    pub attached: bool,
    /// The client's end of the latest connection.
    pub peer: Option<Arc<Peer>>,
    /// Start of the connection, or of the absence, by the process's clock.
    pub since: Millis,
    /// Session Expiry Interval, seconds.
    pub expiry: u32,
    /// Subscriptions.
    pub subscriptions: Vec<SubscriptionInfo>,
    /// Messages in the queue.
    pub queue_messages: usize,
    /// Bytes in the queue.
    pub queue_bytes: usize,
    /// Unacknowledged messages toward the client.
    pub in_flight: usize,
    /// Publishes of the client that wait for the broker.
    pub publishes_waiting: usize,
    /// Bytes of the session, its will and its subscriptions that are charged to the account of sessions.
    pub session_bytes: u32,
    /// Messages lost by a named limit.
    pub gaps: u64,
}

/// One subscription.
#[derive(Clone, Debug)]
pub struct SubscriptionInfo {
    /// The topic filter.
    pub filter: Arc<str>,
    /// Its options, with the granted QoS.
    pub options: SubscribeOptions,
    /// The client's Subscription Identifier, if it gave one.
    pub identifier: Option<NonZeroU32>,
}

/// Sums over all sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sessions with a connection.
    pub attached: usize,
    /// Sessions without.
    pub detached: usize,
    /// Sessions without a connection whose messages are kept with those of others, in some filter.
    pub asleep: usize,
    /// Messages that wait in queues, counted for each session.
    pub queue_messages: usize,
}

impl Sessions {
    /// Up to `limit` sessions in the order of their keys, after `after`.
    pub(crate) fn list(&self, after: Option<&str>, limit: usize) -> Vec<SessionInfo> {
        let mut keys: Vec<SessionKey> = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let later = |key: &SessionKey| after.is_none_or(|after| key.as_str() > after);
            keys.extend(shard.keys(later).into_iter().take(limit).cloned());
        }
        keys.sort_unstable();
        keys.truncate(limit);
        keys.iter().filter_map(|key| self.find(key)).collect()
    }

    /// The key of a session.
    pub(crate) fn key(&self, session: SessionRef) -> Option<SessionKey> {
        let mut shard = self.shard(session.shard);
        Some(shard.get(session)?.session.key.clone())
    }

    /// The keys of a client identifier's sessions, one for each mount.
    pub(crate) fn keys_of(&self, client_id: &str) -> Vec<SessionKey> {
        let shard = self.shard(self.shard_of(client_id));
        let own = shard.keys(|key| key.client_id() == client_id);
        own.into_iter().cloned().collect()
    }

    /// The session of a key.
    pub(crate) fn find(&self, key: &SessionKey) -> Option<SessionInfo> {
        let shard = self.shard(self.shard_of(key.client_id()));
        let at = shard.find(key)?;
        let slot = &shard.slots[at as usize];
        let session = &slot.session;
        (!session.is_closed()).then(|| info(slot, shard.backlogged(at, slot, &self.limits)))
    }

    /// Whether a client is connected.
    pub(crate) fn is_attached(&self, key: &SessionKey) -> bool {
        let shard = self.shard(self.shard_of(key.client_id()));
        let slot = shard.find(key);
        slot.is_some_and(|slot| shard.slots[slot as usize].session.attached())
    }

    /// Sums over all sessions.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for shard in &self.shards {
            let shard = shard.lock();
            totals.queue_messages += shard.backlogged_of_all();
            for (_, slot) in &shard.slots {
                if slot.session.is_closed() {
                    continue;
                }
                if slot.session.attached() {
                    totals.attached += 1;
                } else {
                    totals.detached += 1;
                }
                totals.asleep += usize::from(slot.asleep > 0);
                totals.queue_messages += slot.session.queued();
            }
        }
        totals
    }
}

fn info(slot: &Slot, backlogged: Backlogged) -> SessionInfo {
    let session = &slot.session;
    SessionInfo {
        key: session.key.clone(),
        principal: session.principal.clone(),
        version: session.version(),
        attached: session.attached(),
        peer: slot.peer.clone(),
        since: session.since(),
        expiry: session.expiry,
        subscriptions: session
            .subscriptions()
            .iter()
            .map(|s| SubscriptionInfo {
                filter: s.name.clone(),
                options: s.options,
                identifier: s.identifier,
            })
            .collect(),
        queue_messages: session.queued() + backlogged.messages,
        queue_bytes: session.outbound().queued_bytes() + backlogged.bytes,
        in_flight: session.outbound().in_flight(),
        publishes_waiting: session.publishes_waiting(),
        session_bytes: slot.charged_bytes,
        gaps: session.gaps + backlogged.gaps,
    }
}
