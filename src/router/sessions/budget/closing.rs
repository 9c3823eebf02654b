//! Connections that were closed for their memory, until their tasks have given it back.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::time::Millis;

use crate::router::sessions::Sessions;
use crate::router::types::SessionRef;

/// The task of a closed connection gives its memory back long before this. After it, the memory counts
/// as in use again.
const CLOSING_MAX: Duration = Duration::from_secs(1);

/// The closed connections whose tasks have yet to end.
#[derive(Debug, Default)]
pub(super) struct Closing {
    connections: BTreeMap<SessionRef, Closed>,
    /// Bytes that they will give back.
    bytes: u64,
    /// When they were last looked at.
    looked_at: Option<Millis>,
}

/// A closed connection.
#[derive(Clone, Copy, Debug)]
struct Closed {
    connection_no: u64,
    bytes: u64,
    at: Millis,
}

impl Closing {
    /// Bytes that the tasks will give back.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A connection is closed now, or was closed before, and will give `bytes` back.
    pub(super) fn note(
        &mut self,
        session: SessionRef,
        connection_no: u64,
        bytes: u64,
        now: Millis,
    ) {
        let known = self.connections.get(&session);
        if known.is_some_and(|known| known.connection_no == connection_no) {
            return;
        }
        let closed = Closed {
            connection_no,
            bytes,
            at: now,
        };
        let before = self.connections.insert(session, closed);
        self.bytes += bytes;
        self.bytes -= before.map_or(0, |before| before.bytes);
    }

    /// Forgets the connections whose tasks have ended.
    pub(super) fn look(&mut self, sessions: &Sessions, now: Millis) {
        if self.connections.is_empty() || self.looked_at.is_some_and(|at| now <= at) {
            return;
        }
        self.looked_at = Some(now);
        let bytes = &mut self.bytes;
        self.connections.retain(|session, closed| {
            let waits = now < closed.at + CLOSING_MAX
                && (sessions.shard(session.shard))
                    .connected(*session, closed.connection_no)
                    .is_some();
            if !waits {
                *bytes -= closed.bytes;
            }
            waits
        });
    }
}
