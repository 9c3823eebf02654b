//! Sessions of an embedded broker: their connections, ends and wills.

use std::sync::Arc;
use std::time::Duration;

use crate::embedded::outbound::Outbound;
use crate::embedded::state::{ConnectionHandle, Session, State, StoredWill};
use crate::mqtt::{Connect, Message, MessageSpec, Properties, ReasonCode, Version, Will};
use crate::time::{Deadline, Millis};

/// Session Expiry Interval of a session that never ends (MQTT 5 §3.1.2.11.2).
const EXPIRY_NEVER: u32 = u32::MAX;

/// The answer to an accepted CONNECT.
pub(crate) struct Attached {
    pub(crate) session: u32,
    pub(crate) present: bool,
    /// The client identifier, if the client gave none.
    pub(crate) assigned: Option<Box<str>>,
}

impl State {
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        for handle in self.connections.drain() {
            handle.end(None);
        }
        self.late.clear();
        let keys: Vec<u32> = self.sessions.iter().map(|(k, _)| k as u32).collect();
        for key in keys {
            let session = &mut self.sessions[key as usize];
            session.will = None;
            if session.connection.is_some() {
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
        handle: &Arc<ConnectionHandle>,
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
            let serial = self.next_serial();
            client_id = assigned.insert(format!("embedded-{serial}").into_boxed_str());
        }
        let mut known = self.by_client_id.get(client_id).copied();
        if let Some(key) = known
            && let Some(old) = self.sessions[key as usize].connection.clone()
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
        let limit = self
            .options
            .quirks()
            .small_window
            .unwrap_or(u16::MAX)
            .max(1);
        let window = connect.receive_maximum.unwrap_or(u16::MAX).min(limit);
        let will = connect.will.as_ref().map(store_will);
        self.set_deadlines(key, None, None);
        let session = &mut self.sessions[key as usize];
        session.will = will;
        session.version = connect.version;
        session.connection = Some(handle.clone());
        session.expiry = match connect.version {
            Version::V5 => connect.session_expiry.unwrap_or(0),
            _ if connect.clean_start => 0,
            _ => EXPIRY_NEVER,
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

    /// The session lost its connection; `will` tells whether its will is due.
    pub(crate) fn detach(&mut self, key: u32, will: bool) {
        let session = &mut self.sessions[key as usize];
        session.connection = None;
        session.woken = false;
        if !will {
            session.will = None;
        }
        let expiry = session.expiry;
        if expiry == 0 {
            return self.end_session(key);
        }
        let delay = session.will.as_ref().map(|w| w.delay);
        let after = |seconds: u32| self.now + Duration::from_secs(seconds.into());
        let expires_at = (expiry != EXPIRY_NEVER).then(|| after(expiry));
        let will_at = delay.filter(|&d| d > 0).map(after);
        self.set_deadlines(key, expires_at, will_at);
        if delay == Some(0) {
            self.publish_will(key);
        }
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

    fn new_session(&mut self, client_id: &str) -> Result<u32, ReasonCode> {
        if self.sessions.len() >= self.options.sessions_max {
            return Err(ReasonCode::QUOTA_EXCEEDED);
        }
        let serial = self.next_serial();
        let key = self.sessions.insert(Session {
            client_id: client_id.into(),
            serial,
            version: Version::V5,
            connection: None,
            woken: false,
            subscriptions: Default::default(),
            received: Default::default(),
            out: Outbound::new(self.account.clone()),
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
                expires_at: Some(Deadline::after_seconds(self.now, seconds)),
                strip_key: None,
                account: Some(self.account.clone()),
            }),
        };
        self.publish(key, &message);
    }

    fn set_deadlines(&mut self, key: u32, expires_at: Option<Millis>, will_at: Option<Millis>) {
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
            expires_at: None,
            strip_key: None,
            account: None,
        }),
        delay: will.delay,
        expiry: will.message_expiry,
    }
}
