//! The embedded core without tasks and clocks: bytes and time in, bytes out, for simulations.

use std::sync::Arc;

use crate::embedded::inbound::{End, Link, say_goodbye};
use crate::embedded::options::EmbeddedOptions;
use crate::embedded::state::{State, Wire};
use crate::time::Millis;

/// A core that does what it is told, when it is told.
pub(crate) struct SteppedBroker {
    state: State,
}

/// One connection to it.
pub(crate) struct SteppedConnection {
    wire: Arc<Wire>,
    link: Link,
    input: Vec<u8>,
}

/// How the core ended a connection.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The client asked for it, or another connection took its place.
    Quietly,
    /// The client broke the protocol, or was refused.
    Refused(String),
}

impl SteppedBroker {
    pub fn new(options: EmbeddedOptions) -> Self {
        Self {
            state: State::new(options),
        }
    }

    /// Time passes.
    pub fn at(&mut self, now: Millis) {
        self.state.now = now;
        self.state.fire_due();
        self.state.wakes.clear();
    }

    /// A new connection; none while it is stopped.
    pub fn connect(&mut self) -> Option<SteppedConnection> {
        Some(SteppedConnection {
            wire: self.state.open()?,
            link: Link::default(),
            input: Vec::new(),
        })
    }

    /// Takes what came, and appends what it answers and has to send.
    pub fn feed(
        &mut self,
        conn: &mut SteppedConnection,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Ended> {
        if let Some(reason) = conn.wire.ended() {
            return Err(match reason {
                Some(reason) => Ended::Refused(format!("{reason:?}")),
                None => Ended::Quietly,
            });
        }
        conn.input.extend_from_slice(bytes);
        let (used, end) = conn
            .link
            .feed(&mut self.state, &conn.wire, &conn.input, out);
        conn.input.drain(..used);
        if let Some(end) = end {
            if let (Some(up), End::Refused(reason)) = (&conn.link.up, &end) {
                say_goodbye(up.version, *reason, out);
            }
            return Err(match end {
                End::Disconnected { .. } | End::Superseded => Ended::Quietly,
                End::Refused(reason) => Ended::Refused(format!("{reason:?}")),
                End::NotConnected => Ended::Refused("CONNECT".into()),
            });
        }
        if let Some(up) = &conn.link.up
            && self.state.owns(up.session, &conn.wire)
        {
            while self.state.pump(up.session, out, 64 * 1024) {}
            conn.link.unseen_acks = 0;
        }
        Ok(())
    }

    /// The connection is lost, or over.
    pub fn drop_conn(&mut self, conn: &SteppedConnection) {
        if let Some(up) = &conn.link.up
            && self.state.owns(up.session, &conn.wire)
        {
            self.state.detach(up.session, true);
        }
        self.state.close(&conn.wire);
    }

    /// The connection is lost, and its session with it.
    pub fn forget(&mut self, conn: &SteppedConnection) {
        self.drop_conn(conn);
        if let Some(up) = &conn.link.up
            && self.state.sessions.contains(up.session as usize)
        {
            self.state.end_session(up.session);
        }
    }

    /// It ends, and begins again.
    pub fn stop(&mut self) {
        self.state.stop();
    }

    pub fn start(&mut self, keep_sessions: bool) {
        self.state.start(keep_sessions);
    }

    /// Topics and payloads of the retained messages.
    pub fn retained(&mut self) -> Vec<(String, Vec<u8>)> {
        let now = self.state.now;
        let all = self.state.retained.matching("#", now);
        let all = all.iter();
        all.map(|m| (m.topic().to_owned(), m.payload().to_vec()))
            .collect()
    }

    /// Sessions by client identifier, with their filters.
    pub fn subscriptions(&self) -> Vec<(String, Vec<String>)> {
        let sessions = self.state.sessions.iter();
        let of = |s: &crate::embedded::state::Session| {
            s.subscriptions.keys().map(|k| k.to_string()).collect()
        };
        sessions
            .map(|(_, s)| (s.client_id.to_string(), of(s)))
            .collect()
    }
}
