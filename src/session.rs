//! One client's session: a state machine without I/O, clock or randomness.
//!
//! Packets, deliveries and the time go in. Bytes for the client (in the connection's output),
//! [`Effect`]s for the router and deadlines come out. The router's shards own the sessions, and the
//! connections' tasks drive them: [`Session`] states the contract between the two.

mod aliases;
mod close;
mod connection;
mod defer;
mod delivery;
mod effect;
mod entry;
mod inbound;
mod incarnation;
mod key;
mod lifecycle;
mod limits;
mod outbound;
mod overlap;
mod owed;
mod packets;
mod phase;
mod queue;
mod restore;
mod streams;
mod subscribe;
mod subscriptions;
mod waiting;
mod will;

use std::sync::Arc;

use crate::budget::Allowance;
use crate::mqtt::{QoS, ReasonCode, Version};
use crate::time::Millis;

use crate::session::outbound::{IDLE_BYTES, NOTHING};
use crate::session::phase::{Online, Phase};

pub use crate::budget::QueueFull;
pub use close::CloseReason;
pub use connection::{Connection, ConnectionSpec, Scope, TakenOutput};
pub use effect::{Effect, GrantOrder, PrimaryOver, RetainedDue, SubscribeRequest, Unsubscribed};
pub use entry::{Kept, Offer, Redelivery};
pub use inbound::{Answer, Arrival, Inbound, Incoming, OpenMax, Token};
pub use incarnation::Incarnation;
pub use key::SessionKey;
pub use lifecycle::{Attached, Ended};
pub use limits::{DropReason, Policy, ResponseTopic, SLEEP_AFTER, SessionLimits};
pub use outbound::{Delivered, ENTRY_BYTES, Outbound, Shed};
pub use overlap::{Primary, primary, primary_filter};
pub use owed::{Owed, OwedStage, RestoredDelivery};
pub(crate) use packets::keep_response_topic;
pub use restore::Restored;
pub use subscriptions::{Added, SUBSCRIPTION_BYTES, Subscription, hides};
pub use waiting::{Deferral, WaitNumber, WaitingMax, WaitingTotal};
pub use will::Will;

/// One client's session, with or without a connection.
///
/// It does nothing by itself. Its driver calls it, under the lock of its shard, in these ways:
///
/// - **Connections.** [`Session::attach`] begins a connection and takes over from the one that is
///   there. The driver writes CONNACK into [`Connection::control`], then calls [`Session::pump`].
///   [`Session::detach`] ends the connection. To begin the session anew, [`Session::restart`] is
///   called before [`Session::attach`]. All but `attach` return an [`Ended`], which names the steps left
///   to do: wills, redeliveries, presence, and whether the session is over.
/// - **Packets.** [`Session::packet`] takes one packet at a time, in the order of its stream, and
///   appends [`Effect`]s. The driver carries them out in order, without the lock of the shard, before
///   it hands over further packets: always after a SUBSCRIBE, else at the end of a batch. While
///   [`Session::subscribing`] it hands over no PUBLISH, which would overtake the SUBSCRIBE on the way
///   to the broker, and while [`Session::is_withheld`] no packet at all. An error means that the connection must end for that reason; the effects so far
///   are still carried out.
/// - **Answers.** Each [`Effect::Publish`] with a token is answered once through
///   [`Session::answered`], and each request of an [`Effect::Subscribe`] through
///   [`Session::subscribed`].
/// - **Deliveries.** [`Session::deliver`] offers one message; it is written, queued or dropped. While the
///   retained messages of a subscription are still to come, between [`Session::begin_wait`] and
///   [`Session::end_wait`], the driver calls [`Session::defer`] first.
/// - **Output.** After packets, and after output was sent, [`Session::pump`] writes what the client's
///   window and the buffers now allow. [`Connection::take_output`] then gives the bytes of the streams
///   that can send. They are sent in this order, and exactly once: a session does not know when they
///   leave, and a new connection gets unacknowledged messages anew. [`Connection::streams_free`] says
///   that all bytes taken for a data stream are sent.
/// - **Time.** At [`Session::deadline`] the driver calls [`Session::expire`] if no client is
///   connected; if one is, its Keep Alive has run out. The deadline may move with every call.
/// - **Streams.** [`Session::stream_blocked`], [`Session::stream_closed`] and
///   [`Session::stream_ended`] say what became of a data stream.
/// - **Counters.** The driver takes and counts [`Session::refused_publishes`] and
///   [`Outbound::shed`].
#[derive(Debug)]
pub struct Session {
    /// The client identifier, and the mount that it is below.
    pub key: SessionKey,
    /// The authenticated identity that the session belongs to.
    pub principal: Arc<str>,
    /// Which of the client identifier's sessions this is.
    pub incarnation: Incarnation,
    /// Session Expiry Interval in seconds; 0xFFFF_FFFF as in the protocol: the session never ends.
    pub expiry: u32,
    /// When the current connection began, or the last one ended.
    since: Millis,
    /// Messages lost by a named limit since the session began.
    pub gaps: u64,
    phase: Phase,
    connection_no: u64,
    version: Version,
    /// The last connection was that of a bridge; see [`ConnectionSpec::bridge`].
    bridge: bool,
    /// In the order of their grants; those without a grant come last.
    subscriptions: Vec<Subscription>,
    /// The packet identifier that was given last. It counts without a sending half.
    last_id: u16,
    /// The sending half while no client is connected, if there is something to send. That of a connected
    /// client is with the connection.
    idle: Option<Box<Outbound>>,
    /// Set from the first publish of QoS 1 or 2 on, since many clients never send one.
    inbound: Option<Box<Inbound>>,
    will: Option<Box<Will>>,
    /// Publishes that were refused and not forwarded. The driver takes and counts them.
    pub refused_publishes: RefusedPublishes,
}

/// Publishes that were refused and not forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusedPublishes {
    /// The client may not publish to the topic.
    pub denied: u32,
    /// The topic has too many levels, or the topic or a property cannot be passed on.
    pub invalid: u32,
}

// Beside its connection, this is what an idle or detached session costs.
const _: () = assert!(size_of::<Session>() <= 168);

impl Session {
    /// A new session without a connection.
    pub fn new(
        key: SessionKey,
        principal: Arc<str>,
        incarnation: Incarnation,
        now: Millis,
    ) -> Self {
        Self {
            key,
            principal,
            incarnation,
            expiry: 0,
            since: now,
            gaps: 0,
            phase: Phase::default(),
            connection_no: 0,
            version: Version::V5,
            bridge: false,
            subscriptions: Vec::new(),
            last_id: 0,
            idle: None,
            inbound: None,
            will: None,
            refused_publishes: RefusedPublishes::default(),
        }
    }

    /// When the current connection began, or the last one ended.
    pub fn since(&self) -> Millis {
        self.since
    }

    /// Bytes of the session's names and of its subscriptions, without the names of their filters, which
    /// the router's table has.
    pub fn held_bytes(&self) -> usize {
        let names = self.key.as_str().len() + self.principal.len();
        names + self.subscriptions.len() * SUBSCRIPTION_BYTES
    }

    /// Bytes of the will.
    pub fn will_bytes(&self) -> usize {
        self.will.as_deref().map_or(0, Will::bytes)
    }

    /// Takes the subscriptions out. The caller releases them.
    pub fn take_subscriptions(&mut self) -> Vec<Subscription> {
        std::mem::take(&mut self.subscriptions)
    }

    /// The broker's answer to a publish of this client. It is written if the client can use it on its
    /// current connection, and else kept until the client sends the publish again.
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

    /// Offers a message: it is written, queued or dropped. See [`Outbound::deliver`].
    pub fn deliver(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        offer: &Offer<'_>,
        output: &mut Allowance,
    ) -> Delivered {
        if let Some(Online {
            connection,
            outbound,
        }) = self.phase.online_mut()
        {
            return outbound.deliver(Some(connection), limits, now, offer, output);
        }
        if self.idle.is_none() && offer.qos == QoS::AtMostOnce && !limits.queue_qos0 {
            return Delivered::Dropped(DropReason::Qos0Offline);
        }
        self.outbound_mut()
            .deliver(None, limits, now, offer, output)
    }

    /// Writes the messages that the window, the output buffers and the budget of all output allow now.
    pub fn pump(&mut self, limits: &SessionLimits, now: Millis, output: &mut Allowance) {
        if let Some(online) = self.phase.online_mut() {
            let Online {
                connection,
                outbound,
            } = online;
            outbound.pump(connection, limits, now, output);
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
        let online = self.phase.online();
        online.is_some_and(|o| o.outbound.window_free(&o.connection, limits))
    }

    /// The sending half.
    pub fn outbound(&self) -> &Outbound {
        match self.phase.online() {
            Some(online) => &online.outbound,
            None => self.idle.as_deref().unwrap_or(&NOTHING),
        }
    }

    /// The sending half, to drop from.
    pub fn outbound_mut(&mut self) -> &mut Outbound {
        let last_id = self.last_id;
        match self.phase.online_mut() {
            Some(online) => &mut online.outbound,
            None => self
                .idle
                .get_or_insert_with(|| Box::new(Outbound::after(last_id))),
        }
    }

    /// The subscriptions: first the granted ones, in the order of the grants.
    pub fn subscriptions(&self) -> &[Subscription] {
        &self.subscriptions
    }

    /// Whether a SUBSCRIBE waits for the broker. A publish behind it would overtake it there.
    pub fn subscribing(&self) -> bool {
        self.phase
            .connection()
            .is_some_and(|c| !c.pending.is_empty())
    }

    /// Whether the output of the connection waits until a change of the session is on the disk. Meanwhile no
    /// packet is handed over.
    pub fn is_withheld(&self) -> bool {
        (self.phase.connection()).is_some_and(|connection| connection.is_withheld())
    }

    /// SUBSCRIBEs that are not answered yet.
    pub fn subscribes_unanswered(&self) -> usize {
        self.phase.connection().map_or(0, |c| c.pending.len())
    }

    /// Publishes of this client that wait for the broker's answer.
    pub fn publishes_waiting(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.waiting())
    }

    /// Publishes of QoS 1 and 2 that the client may count as unanswered, and QoS 2 not released.
    pub fn publishes_open(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.open())
    }

    /// Bytes that the session keeps to recognise publishes of its client.
    pub fn inbound_bytes(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.bytes())
    }

    /// Bytes of the sending half that the session keeps because messages wait for its client, beside their
    /// entries.
    pub fn idle_bytes(&self) -> usize {
        self.idle.as_ref().map_or(0, |_| IDLE_BYTES)
    }

    /// Publishes of QoS 1 and 2 that the broker has yet to answer, of the client's earlier sessions
    /// too.
    pub fn publishes_under_way(&self) -> u32 {
        self.inbound.as_ref().map_or(0, |i| i.under_way())
    }
}
