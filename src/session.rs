//! One client's session: a state machine without I/O, clock or randomness.
//!
//! Packets, deliveries and the time come in; bytes for the client (in the connection's output),
//! [`Effect`]s for the router and deadlines come out. The router's shards own the sessions; the
//! connection tasks feed them.

mod aliases;
mod close;
mod connection;
mod delivery;
mod effect;
mod entry;
mod inbound;
mod incarnation;
mod lifecycle;
mod limits;
mod outbound;
mod overlap;
mod packets;
mod phase;
mod queue;
mod streams;
mod subscribe;
mod subscriptions;
mod will;

use std::sync::Arc;

use crate::mqtt::{ReasonCode, Version};
use crate::time::Millis;

use crate::session::phase::Phase;

pub use close::CloseReason;
pub use connection::{Connection, ConnectionSpec, Scope};
pub use effect::{Effect, SubscribeRequest, Unsubscribed};
pub use entry::{Offer, Redelivery};
pub use inbound::{Answer, Arrival, Inbound, Incoming, Token};
pub use incarnation::Incarnation;
pub use lifecycle::{Attached, Ended};
pub use limits::{DropReason, Policy, QueueFull, SessionLimits};
pub use outbound::{Delivered, ENTRY_BYTES, Outbound, Shed};
pub use overlap::{Primary, primary};
pub use subscriptions::{Subscription, hides};
pub use will::Will;

/// A session.
#[derive(Debug)]
pub struct Session {
    /// The client identifier.
    pub client_id: Arc<str>,
    /// Who it belongs to.
    pub principal: Arc<str>,
    /// Which of the client identifier's sessions this is.
    pub incarnation: Incarnation,
    /// Session Expiry Interval in seconds; `u32::MAX`: never.
    pub expiry: u32,
    /// When the current connection began, or the last one ended.
    pub since: u64,
    /// Messages lost by a named limit since the session began.
    pub gaps: u64,
    phase: Phase,
    connection_no: u64,
    version: Version,
    subscriptions: Vec<Subscription>,
    outbound: Outbound,
    /// From the first publish of QoS 1 or 2 on: those who only listen have none.
    inbound: Option<Box<Inbound>>,
    will: Option<Box<Will>>,
    /// Publishes that were refused here; the caller takes and counts them.
    pub refused_publishes: u32,
}

// Beside its connection, this is what an idle or detached session costs.
const _: () = assert!(size_of::<Session>() <= 152 + size_of::<Outbound>());

impl Session {
    /// A new session without a connection.
    pub fn new(
        client_id: Arc<str>,
        principal: Arc<str>,
        incarnation: Incarnation,
        now: Millis,
    ) -> Self {
        Self {
            client_id,
            principal,
            incarnation,
            expiry: 0,
            since: now,
            gaps: 0,
            phase: Phase::default(),
            connection_no: 0,
            version: Version::V5,
            subscriptions: Vec::new(),
            outbound: Outbound::default(),
            inbound: None,
            will: None,
            refused_publishes: 0,
        }
    }

    /// Takes the subscriptions out; the caller releases them.
    pub fn take_subscriptions(&mut self) -> Vec<Subscription> {
        std::mem::take(&mut self.subscriptions)
    }

    /// The core's answer to a publish of this client.
    pub fn answered(&mut self, token: Token, reason: ReasonCode) {
        let attached = self.phase.is_attached();
        let inbound = self.inbound.as_mut();
        let Some(answer) = inbound.and_then(|i| i.answer(token, reason, attached)) else {
            return;
        };
        if let Some(connection) = self.phase.connection_mut() {
            packets::write_answer(connection, &answer, reason);
        }
    }

    /// Offers a message. See [`Outbound::deliver`].
    pub fn deliver(&mut self, limits: &SessionLimits, now: Millis, offer: &Offer<'_>) -> Delivered {
        let connection = self.phase.connection_mut();
        self.outbound.deliver(connection, limits, now, offer)
    }

    /// Writes what has become possible to write.
    pub fn pump(&mut self, limits: &SessionLimits, now: Millis) {
        if let Some(connection) = self.phase.connection_mut() {
            self.outbound.pump(connection, limits, now);
        }
    }

    /// The connection, if there is one.
    pub fn connection(&mut self) -> Option<&mut Connection> {
        self.phase.connection_mut()
    }

    /// The connection, if there is one.
    pub fn connection_ref(&self) -> Option<&Connection> {
        self.phase.connection()
    }

    /// Whether a message of QoS 1 or 2 would be written at once.
    pub fn window_free(&self, limits: &SessionLimits) -> bool {
        let connection = self.phase.connection();
        connection.is_some_and(|c| self.outbound.window_free(c, limits))
    }

    /// The sending half.
    pub fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    /// The sending half, to drop from.
    pub fn outbound_mut(&mut self) -> &mut Outbound {
        &mut self.outbound
    }

    /// The subscriptions: first those that the core granted, in that order.
    pub fn subscriptions(&self) -> &[Subscription] {
        &self.subscriptions
    }

    /// A SUBSCRIBE waits for the core: a publish behind it would overtake it there.
    pub fn subscribing(&self) -> bool {
        self.phase
            .connection()
            .is_some_and(|c| !c.pending.is_empty())
    }

    /// Publishes of this client that wait for the core.
    pub fn publishes_waiting(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.waiting())
    }
}
