//! Connections, sessions and deadlines of an embedded core.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use foldhash::fast::RandomState;
use slab::Slab;
use tokio::sync::Notify;

use crate::embedded::EmbeddedStats;
use crate::embedded::options::EmbeddedOptions;
use crate::embedded::outbound::Outbound;
use crate::embedded::retained::Retained;
use crate::embedded::route::{Filter, LateReplay};
use crate::embedded::shared::SharedGroups;
use crate::mqtt::{Connect, Message, MessageSpec, Properties, ReasonCode, Version, Will};
use crate::time::Millis;
use crate::topics::FilterTrie;

/// Session Expiry Interval that never ends (MQTT 5 §3.1.2.11.2).
const NEVER: u32 = u32::MAX;

/// What the state and a connection's task share.
pub(crate) struct Wire {
    /// Something to send, or to end.
    pub(crate) wake: Notify,
    end: AtomicU8,
    /// Key in `State::wires`.
    at: usize,
}

impl Wire {
    const OPEN: u8 = 0;
    /// No reason code of a DISCONNECT by a server, so free for "no word".
    const ABRUPT: u8 = 1;

    fn end(&self, reason: Option<ReasonCode>) {
        self.end
            .store(reason.map_or(Self::ABRUPT, |r| r.0), Ordering::Release);
        self.wake.notify_one();
    }

    /// Whether the state has ended this connection, and with which reason for
    /// the client, if any.
    pub(crate) fn ended(&self) -> Option<Option<ReasonCode>> {
        match self.end.load(Ordering::Acquire) {
            Self::OPEN => None,
            Self::ABRUPT => Some(None),
            code => Some(Some(ReasonCode(code))),
        }
    }
}

/// Everything an embedded core holds, under one lock.
pub(crate) struct State {
    pub(crate) options: EmbeddedOptions,
    /// Milliseconds on the core's clock, as of this section under the lock.
    pub(crate) now: Millis,
    /// Connections that got something to send in this section.
    pub(crate) wakes: Vec<Arc<Wire>>,
    pub(crate) sessions: Slab<Session>,
    pub(crate) trie: FilterTrie<u32>,
    pub(crate) filters: Slab<Filter>,
    pub(crate) shared: SharedGroups,
    pub(crate) retained: Retained,
    pub(crate) late: BTreeMap<(u64, u64), LateReplay>,
    pub(crate) counts: EmbeddedStats,
    by_client_id: HashMap<Box<str>, u32, RandomState>,
    wires: Slab<Arc<Wire>>,
    /// When sessions end or their wills are due: (time, session).
    deadlines: BTreeSet<(u64, u32)>,
    serial: u64,
    stopped: bool,
}

/// A session (MQTT 5 §4.1).
pub(crate) struct Session {
    pub(crate) client_id: Box<str>,
    /// Never used twice, unlike the key of a session.
    pub(crate) serial: u64,
    pub(crate) version: Version,
    pub(crate) wire: Option<Arc<Wire>>,
    /// Whether the connection has been woken since it last sent.
    pub(crate) woken: bool,
    /// Filter to its key in `State::filters`.
    pub(crate) subscriptions: HashMap<Box<str>, u32, RandomState>,
    /// Packet ids of QoS 2 messages received and not yet released.
    pub(crate) received: HashSet<u16, RandomState>,
    pub(crate) out: Outbound,
    /// Seconds.
    pub(crate) expiry: u32,
    will: Option<StoredWill>,
    expires_at: Option<u64>,
    will_at: Option<u64>,
}

struct StoredWill {
    message: Message,
    /// Will Delay Interval, seconds.
    delay: u32,
    /// Message Expiry Interval, which begins with its publication, seconds.
    expiry: Option<u32>,
}

/// What an accepted CONNECT got.
pub(crate) struct Attached {
    pub(crate) session: u32,
    pub(crate) present: bool,
    /// The client identifier, if the client gave none.
    pub(crate) assigned: Option<Box<str>>,
}

impl State {
    pub(crate) fn new(options: EmbeddedOptions) -> State {
        State {
            options,
            now: 0,
            wakes: Vec::new(),
            sessions: Slab::new(),
            trie: FilterTrie::new(),
            filters: Slab::new(),
            shared: SharedGroups::default(),
            retained: Retained::default(),
            late: BTreeMap::new(),
            counts: EmbeddedStats::default(),
            by_client_id: HashMap::default(),
            wires: Slab::new(),
            deadlines: BTreeSet::new(),
            serial: 0,
            stopped: false,
        }
    }

    /// A new connection, or None while stopped or full.
    pub(crate) fn open(&mut self) -> Option<Arc<Wire>> {
        if self.stopped || self.wires.len() >= self.options.connections_max {
            return None;
        }
        let slot = self.wires.vacant_entry();
        let wire = Arc::new(Wire {
            wake: Notify::new(),
            end: AtomicU8::new(Wire::OPEN),
            at: slot.key(),
        });
        slot.insert(wire.clone());
        Some(wire)
    }

    /// The connection's task is ending.
    pub(crate) fn close(&mut self, wire: &Arc<Wire>) {
        // After `stop` the key may be another's.
        if self
            .wires
            .get(wire.at)
            .is_some_and(|w| Arc::ptr_eq(w, wire))
        {
            self.wires.remove(wire.at);
        }
    }

    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        for wire in self.wires.drain() {
            wire.end(None);
        }
        self.late.clear();
        let keys: Vec<u32> = self.sessions.iter().map(|(k, _)| k as u32).collect();
        for key in keys {
            let session = &mut self.sessions[key as usize];
            session.will = None;
            if session.wire.is_some() {
                self.detach(key, false);
            }
        }
    }

    pub(crate) fn start(&mut self, keep_sessions: bool) {
        self.stopped = false;
        if !keep_sessions {
            let keys: Vec<u32> = self.sessions.iter().map(|(k, _)| k as u32).collect();
            for key in keys {
                self.end_session(key);
            }
        }
    }

    /// Gives the connection its session, taking it over from an older
    /// connection or beginning it anew (MQTT 5 §3.1.4).
    pub(crate) fn attach(
        &mut self,
        connect: &Connect<'_>,
        wire: &Arc<Wire>,
    ) -> Result<Attached, ReasonCode> {
        let mut assigned = None;
        let mut client_id = connect.client_id;
        if client_id.is_empty() {
            let refused = match connect.version {
                Version::V31 => true,
                Version::V311 => !connect.clean_start,
                Version::V5 => false,
            };
            if refused {
                return Err(ReasonCode::CLIENT_IDENTIFIER_NOT_VALID);
            }
            self.serial += 1;
            client_id = assigned.insert(format!("embedded-{}", self.serial).into_boxed_str());
        }
        let mut known = self.by_client_id.get(client_id).copied();
        if let Some(key) = known
            && let Some(old) = self.sessions[key as usize].wire.clone()
        {
            old.end(Some(ReasonCode::SESSION_TAKEN_OVER));
            self.detach(key, true);
            // Gone, if it was to end with its connection.
            known = self.by_client_id.get(client_id).copied();
        }
        if let Some(key) = known
            && connect.clean_start
        {
            self.end_session(key);
            known = None;
        }
        let key = match known {
            Some(key) => key,
            None => self.new_session(client_id)?,
        };
        let limit = self.options.small_window.unwrap_or(u16::MAX).max(1);
        let window = connect.receive_maximum.unwrap_or(u16::MAX).min(limit);
        let will = connect.will.as_ref().map(store_will);
        self.set_deadlines(key, None, None);
        let session = &mut self.sessions[key as usize];
        session.will = will;
        session.version = connect.version;
        session.wire = Some(wire.clone());
        session.expiry = match connect.version {
            Version::V5 => connect.session_expiry.unwrap_or(0),
            _ if connect.clean_start => 0,
            _ => NEVER,
        };
        session
            .out
            .attach(connect.version, window, connect.maximum_packet_size);
        self.counts.connects += 1;
        Ok(Attached {
            session: key,
            present: known.is_some(),
            assigned,
        })
    }

    /// Whether `wire` is still the connection of session `key`.
    pub(crate) fn owns(&self, key: u32, wire: &Arc<Wire>) -> bool {
        self.sessions
            .get(key as usize)
            .and_then(|s| s.wire.as_ref())
            .is_some_and(|w| Arc::ptr_eq(w, wire))
    }

    /// The session lost its connection; `will` tells whether its will is due.
    pub(crate) fn detach(&mut self, key: u32, will: bool) {
        let session = &mut self.sessions[key as usize];
        session.wire = None;
        session.woken = false;
        if !will {
            session.will = None;
        }
        let expiry = session.expiry;
        if expiry == 0 {
            return self.end_session(key);
        }
        let delay = session.will.as_ref().map(|w| w.delay);
        let after = |seconds: u32| self.now + u64::from(seconds) * 1000;
        let expires_at = (expiry != NEVER).then(|| after(expiry));
        let will_at = delay.filter(|&d| d > 0).map(after);
        self.set_deadlines(key, expires_at, will_at);
        if delay == Some(0) {
            self.publish_will(key);
        }
    }

    /// Appends what session `key` may send now; true if there is more.
    pub(crate) fn pump(&mut self, key: u32, out: &mut Vec<u8>, limit: usize) -> bool {
        let session = &mut self.sessions[key as usize];
        session.woken = false;
        let dup0 = self.options.dup0;
        session
            .out
            .pump(out, limit, self.now, dup0, &mut self.counts)
    }

    pub(crate) fn next_deadline(&self) -> Option<u64> {
        let session = self.deadlines.first().map(|&(at, _)| at);
        let late = self.late.first_key_value().map(|(&(at, _), _)| at);
        session.into_iter().chain(late).min()
    }

    pub(crate) fn fire_due(&mut self) {
        while let Some(&(at, key)) = self.deadlines.first()
            && at <= self.now
        {
            let session = &self.sessions[key as usize];
            if session.expires_at.is_some_and(|t| t <= self.now) {
                self.end_session(key);
            } else {
                let expires_at = session.expires_at;
                self.set_deadlines(key, expires_at, None);
                self.publish_will(key);
            }
        }
        while let Some(entry) = self.late.first_entry()
            && entry.key().0 <= self.now
        {
            let late = entry.remove();
            self.replay_late(&late);
        }
    }

    pub(crate) fn stats(&self) -> EmbeddedStats {
        EmbeddedStats {
            connections: self.wires.len(),
            sessions: self.sessions.len(),
            subscriptions: self
                .sessions
                .iter()
                .map(|(_, s)| s.subscriptions.len())
                .sum(),
            retained: self.retained.len(),
            queued: self.sessions.iter().map(|(_, s)| s.out.len()).sum(),
            ..self.counts
        }
    }

    pub(crate) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn new_session(&mut self, client_id: &str) -> Result<u32, ReasonCode> {
        if self.sessions.len() >= self.options.sessions_max {
            return Err(ReasonCode::QUOTA_EXCEEDED);
        }
        let serial = self.next_serial();
        let key = self.sessions.insert(Session {
            client_id: client_id.into(),
            serial,
            version: Version::V5,
            wire: None,
            woken: false,
            subscriptions: HashMap::default(),
            received: HashSet::default(),
            out: Outbound::default(),
            expiry: 0,
            will: None,
            expires_at: None,
            will_at: None,
        }) as u32;
        self.by_client_id.insert(client_id.into(), key);
        Ok(key)
    }

    /// Removes the session; a will that still waits is due at its end
    /// [MQTT-3.1.2-8].
    pub(crate) fn end_session(&mut self, key: u32) {
        self.set_deadlines(key, None, None);
        self.unsubscribe_all(key);
        self.publish_will(key);
        let session = self.sessions.remove(key as usize);
        self.by_client_id.remove(&session.client_id);
    }

    fn publish_will(&mut self, key: u32) {
        let Some(will) = self.sessions[key as usize].will.take() else {
            return;
        };
        let m = will.message;
        let message = match will.expiry {
            None => m,
            // The interval begins with the publication, not with the CONNECT.
            Some(seconds) => Message::new(&MessageSpec {
                topic: m.topic(),
                properties: Properties(m.properties()),
                payload: m.payload(),
                qos: m.qos(),
                retain: m.retain(),
                expires_at: self.now + u64::from(seconds) * 1000,
                strip_key: None,
                account: None,
            }),
        };
        self.publish(key, &message);
    }

    fn set_deadlines(&mut self, key: u32, expires_at: Option<u64>, will_at: Option<u64>) {
        let session = &mut self.sessions[key as usize];
        for at in [session.expires_at, session.will_at].into_iter().flatten() {
            self.deadlines.remove(&(at, key));
        }
        session.expires_at = expires_at;
        session.will_at = will_at;
        for at in [expires_at, will_at].into_iter().flatten() {
            self.deadlines.insert((at, key));
        }
    }
}

fn store_will(will: &Will<'_>) -> StoredWill {
    StoredWill {
        message: Message::new(&MessageSpec {
            topic: will.topic,
            properties: will.properties,
            payload: will.payload,
            qos: will.qos,
            retain: will.retain,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        }),
        delay: will.delay,
        expiry: will.message_expiry,
    }
}
