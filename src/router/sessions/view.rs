//! The sessions as the admin API and the metrics show them.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::mqtt::{SubscribeOptions, Version};
use crate::time::Millis;

use crate::router::sessions::Sessions;
use crate::router::sessions::shard::Slot;
use crate::router::types::{Peer, SessionRef};

/// One session, as it is now.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Client identifier.
    pub client_id: Arc<str>,
    /// Principal.
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
    /// The client's Subscription Identifier; 0: none.
    pub identifier: Option<NonZeroU32>,
}

/// Sums over all sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sessions with a connection.
    pub attached: usize,
    /// Sessions without.
    pub detached: usize,
    /// Messages in queues.
    pub queue_messages: usize,
}

impl Sessions {
    /// Up to `limit` sessions in the order of client identifiers, after `after`.
    pub(crate) fn list(&self, after: Option<&str>, limit: usize) -> Vec<SessionInfo> {
        let mut ids: Vec<Arc<str>> = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let live = |slot: &u32| !shard.slots[*slot as usize].session.is_closed();
            let later = |id: &Arc<str>| after.is_none_or(|after| **id > *after);
            let mut some: Vec<Arc<str>> = shard
                .by_id
                .iter()
                .filter(|(id, slot)| later(id) && live(slot))
                .map(|(id, _)| id.clone())
                .collect();
            some.sort_unstable();
            some.truncate(limit);
            ids.append(&mut some);
        }
        ids.sort_unstable();
        ids.truncate(limit);
        ids.iter().filter_map(|id| self.find(id)).collect()
    }

    /// The client identifier of a session.
    pub(crate) fn client_id(&self, session: SessionRef) -> Option<Arc<str>> {
        let mut shard = self.shard(session.shard);
        Some(shard.get(session)?.session.client_id.clone())
    }

    /// The session of a client identifier.
    pub(crate) fn find(&self, client_id: &str) -> Option<SessionInfo> {
        let shard = self.shard(self.shard_of(client_id));
        let slot = shard.by_id.get(client_id)?;
        let slot = &shard.slots[*slot as usize];
        (!slot.session.is_closed()).then(|| info(slot))
    }

    /// Whether a client is connected.
    pub(crate) fn is_attached(&self, client_id: &str) -> bool {
        let shard = self.shard(self.shard_of(client_id));
        let slot = shard.by_id.get(client_id);
        slot.is_some_and(|slot| shard.slots[*slot as usize].session.attached())
    }

    /// Sums over all sessions.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                if slot.session.is_closed() {
                    continue;
                }
                if slot.session.attached() {
                    totals.attached += 1;
                } else {
                    totals.detached += 1;
                }
                totals.queue_messages += slot.session.outbound().queued();
            }
        }
        totals
    }
}

fn info(slot: &Slot) -> SessionInfo {
    let session = &slot.session;
    SessionInfo {
        client_id: session.client_id.clone(),
        principal: session.principal.clone(),
        version: session.version(),
        attached: session.attached(),
        peer: slot.peer.clone(),
        since: session.since,
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
        queue_messages: session.outbound().queued(),
        queue_bytes: session.outbound().queued_bytes(),
        in_flight: session.outbound().in_flight(),
        publishes_waiting: session.publishes_waiting(),
        gaps: session.gaps,
    }
}
