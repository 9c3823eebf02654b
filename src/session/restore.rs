//! A session that begins from its record, after a restart of the process.

use std::sync::Arc;

use crate::mqtt::Version;
use crate::time::{Deadline, Millis};

use crate::session::outbound::Outbound;
use crate::session::owed::RestoredDelivery;
use crate::session::phase::Phase;
use crate::session::{Incarnation, Session, SessionKey, Will};

/// The state of a session whose client is away since an earlier process, without its subscriptions.
#[derive(Debug)]
pub struct Restored {
    /// The client identifier, and the mount that it is below.
    pub key: SessionKey,
    /// Who it belongs to.
    pub principal: Arc<str>,
    /// Which of the client identifier's sessions it is.
    pub incarnation: Incarnation,
    /// Protocol version of the last connection.
    pub version: Version,
    /// The last connection was that of a bridge.
    pub bridge: bool,
    /// The session is over, and only its will is still to be published.
    pub over: bool,
    /// Session Expiry Interval in seconds; 0xFFFF_FFFF: the session never ends.
    pub expiry: u32,
    /// When its client went away; the start of the process, if that was before.
    pub since: Millis,
    /// Messages lost by a named limit since it began.
    pub gaps: u64,
    /// The packet identifier behind which its messages get theirs.
    pub last_id: u16,
    /// Its will, and when it is due.
    pub will: Option<(Will, Deadline)>,
    /// When it ends; a session that is over is forgotten then. `None`: never.
    pub ends_at: Option<Deadline>,
    /// When its client's absence is to be published.
    pub absent_at: Option<Deadline>,
}

impl Session {
    /// The session that a record describes.
    pub fn restore(restored: Restored) -> Self {
        let Restored {
            key,
            principal,
            incarnation,
            since,
            ..
        } = restored;
        let will = restored.will.map(|(will, due_at)| {
            Box::new(Will {
                due_at: Some(due_at),
                ..will
            })
        });
        Self {
            version: restored.version,
            bridge: restored.bridge,
            expiry: restored.expiry,
            gaps: restored.gaps,
            last_id: restored.last_id,
            phase: Phase::restored(restored.over, restored.ends_at, restored.absent_at),
            will,
            ..Self::new(key, principal, incarnation, since)
        }
    }

    /// Whether the session begins from its record, and its client has not been back since.
    pub fn is_restored(&self) -> bool {
        self.connection_no == 0 && !self.attached()
    }

    /// The will, if there is one.
    pub fn will(&self) -> Option<&Will> {
        self.will.as_deref()
    }

    /// The deliveries that it is owed, in the order of sending. It gave the packet identifier `last_id` last.
    pub fn restore_deliveries(&mut self, last_id: u16, deliveries: Vec<RestoredDelivery>) {
        if !deliveries.is_empty() {
            self.idle = Some(Box::new(Outbound::restored(last_id, deliveries)));
        }
    }

    /// Its client stays away: the limits do not count the messages that wait now.
    pub fn client_stays_away(&mut self) {
        if let Some(idle) = &mut self.idle {
            idle.client_left();
        }
    }

    /// Whether the last connection was that of a bridge.
    pub fn is_bridge(&self) -> bool {
        self.bridge
    }

    /// The packet identifier that was given last.
    pub fn last_id(&self) -> u16 {
        match self.phase.online() {
            Some(online) => online.outbound.last_id(),
            None => self.idle.as_deref().map_or(self.last_id, Outbound::last_id),
        }
    }
}
