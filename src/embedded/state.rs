//! Everything that an embedded broker holds: connections, sessions, subscriptions, retained messages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use slab::Slab;
use tokio::sync::Notify;

use crate::budget::Account;
use crate::embedded::options::EmbeddedOptions;
use crate::embedded::outbound::Outbound;
use crate::embedded::retained::Retained;
use crate::embedded::shared::SharedGroups;
use crate::embedded::stats::EmbeddedStats;
use crate::embedded::subscription::{Filter, LateReplay, Place};
use crate::hashing::LookUpSet;
use crate::mqtt::{Message, ReasonCode, Version};
use crate::time::Millis;
use crate::topics::FilterTrie;

/// What the state and a connection's task share.
pub(crate) struct ConnectionHandle {
    /// Tells the task that there is something to send, or that the connection has ended.
    pub(crate) wake: Notify,
    /// `OPEN`, `ABRUPT`, or the reason code for the client.
    end: AtomicU8,
    /// Key in `State::connections`.
    key: usize,
}

impl ConnectionHandle {
    const OPEN: u8 = 0;
    /// The connection is closed without a DISCONNECT. A server's DISCONNECT has no such reason code.
    const ABRUPT: u8 = 1;

    /// Ends the connection, with this reason for the client or without a word.
    pub(super) fn end(&self, reason: Option<ReasonCode>) {
        self.end
            .store(reason.map_or(Self::ABRUPT, |r| r.0), Ordering::Release);
        self.wake.notify_one();
    }

    /// Whether the state has ended this connection, and with which reason for the client, if any.
    pub(crate) fn ended(&self) -> Option<Option<ReasonCode>> {
        match self.end.load(Ordering::Acquire) {
            Self::OPEN => None,
            Self::ABRUPT => Some(None),
            code => Some(Some(ReasonCode(code))),
        }
    }
}

/// Everything that an embedded broker holds, under one lock.
pub(crate) struct State {
    pub(crate) options: EmbeddedOptions,
    /// Bytes of all messages and of the entries of the queues.
    pub(crate) account: Arc<Account>,
    /// The time of this section under the lock.
    pub(crate) now: Millis,
    /// Connections that have something to send since this section.
    pub(crate) to_wake: Vec<Arc<ConnectionHandle>>,
    pub(crate) sessions: Slab<Session>,
    pub(crate) trie: FilterTrie<u32>,
    pub(crate) filters: Slab<Filter>,
    pub(crate) shared: SharedGroups,
    pub(crate) retained: Retained,
    /// Delayed replays, by their time and a serial number.
    pub(crate) late: BTreeMap<(Millis, u64), LateReplay>,
    pub(crate) counts: EmbeddedStats,
    pub(super) by_client_id: BTreeMap<Box<str>, u32>,
    pub(super) connections: Slab<Arc<ConnectionHandle>>,
    /// When sessions end or their wills are due: (time, session).
    pub(super) deadlines: BTreeSet<(Millis, u32)>,
    serial: u64,
    pub(super) stopped: bool,
}

/// A session (MQTT 5 §4.1).
pub(crate) struct Session {
    pub(crate) client_id: Box<str>,
    /// Never used twice, unlike the key of a session.
    pub(crate) serial: u64,
    pub(crate) version: Version,
    pub(crate) connection: Option<Arc<ConnectionHandle>>,
    /// Whether the connection has been woken since it last sent.
    pub(crate) woken: bool,
    /// By filter, with the share name of a shared subscription.
    pub(crate) subscriptions: BTreeMap<Box<str>, Place>,
    /// Packet ids of QoS 2 messages received and not yet released.
    pub(crate) received: LookUpSet<u16>,
    pub(crate) out: Outbound,
    /// Session Expiry Interval, seconds.
    pub(crate) expiry: u32,
    pub(super) will: Option<StoredWill>,
    pub(super) expires_at: Option<Millis>,
    pub(super) will_at: Option<Millis>,
}

pub(super) struct StoredWill {
    pub message: Message,
    /// Will Delay Interval, seconds.
    pub delay: u32,
    /// Message Expiry Interval, seconds; it begins when the will is published.
    pub expiry: Option<u32>,
}

impl State {
    pub(crate) fn new(options: EmbeddedOptions) -> State {
        State {
            options,
            account: Arc::default(),
            now: Millis::ZERO,
            to_wake: Vec::new(),
            sessions: Slab::new(),
            trie: FilterTrie::new(),
            filters: Slab::new(),
            shared: SharedGroups::default(),
            retained: Retained::default(),
            late: BTreeMap::new(),
            counts: EmbeddedStats::default(),
            by_client_id: BTreeMap::new(),
            connections: Slab::new(),
            deadlines: BTreeSet::new(),
            serial: 0,
            stopped: false,
        }
    }

    /// A new connection; `None` while the broker is stopped or full.
    pub(crate) fn open(&mut self) -> Option<Arc<ConnectionHandle>> {
        if self.stopped || self.connections.len() >= self.options.connections_max {
            return None;
        }
        let slot = self.connections.vacant_entry();
        let handle = Arc::new(ConnectionHandle {
            wake: Notify::new(),
            end: AtomicU8::new(ConnectionHandle::OPEN),
            key: slot.key(),
        });
        slot.insert(handle.clone());
        Some(handle)
    }

    /// Forgets a connection whose task ends.
    pub(crate) fn close(&mut self, handle: &Arc<ConnectionHandle>) {
        // After `stop`, the key may belong to another connection.
        let known = self.connections.get(handle.key);
        if known.is_some_and(|known| Arc::ptr_eq(known, handle)) {
            self.connections.remove(handle.key);
        }
    }

    /// Whether `handle` is still the connection of session `key`.
    pub(crate) fn owns(&self, key: u32, handle: &Arc<ConnectionHandle>) -> bool {
        self.sessions
            .get(key as usize)
            .and_then(|s| s.connection.as_ref())
            .is_some_and(|c| Arc::ptr_eq(c, handle))
    }

    /// Appends the packets that session `key` may send now, up to `limit` bytes. Returns whether there
    /// are more.
    pub(crate) fn pump(&mut self, key: u32, out: &mut Vec<u8>, limit: usize) -> bool {
        let session = &mut self.sessions[key as usize];
        session.woken = false;
        let dup0 = self.options.quirks().dup0;
        session
            .out
            .pump(out, limit, self.now, dup0, &mut self.counts)
    }

    /// When [`State::fire_due`] has something to do next.
    pub(crate) fn next_deadline(&self) -> Option<Millis> {
        let session = self.deadlines.first().map(|&(at, _)| at);
        let late = self.late.first_key_value().map(|(&(at, _), _)| at);
        session.into_iter().chain(late).min()
    }

    /// The present counts.
    pub(crate) fn stats(&self) -> EmbeddedStats {
        EmbeddedStats {
            connections: self.connections.len(),
            sessions: self.sessions.len(),
            subscriptions: self
                .sessions
                .iter()
                .map(|(_, s)| s.subscriptions.len())
                .sum(),
            retained: self.retained.len(),
            bytes: self.account.used(),
            queued: self.sessions.iter().map(|(_, s)| s.out.len()).sum(),
            ..self.counts
        }
    }

    /// A number that was not used before.
    pub(crate) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }
}
