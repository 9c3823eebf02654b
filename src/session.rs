//! One client's session: a state machine without I/O, clock or randomness.
//!
//! Packets, deliveries and the time come in; bytes for the client (in the connection's output),
//! [`Effect`]s for the router and deadlines come out. The router's shards own the sessions; the
//! connection tasks feed them.

mod close;
mod connection;
mod delivery;
mod entry;
mod inbound;
mod outbound;
mod overlap;
mod packets;
mod queue;
mod streams;
mod subscriptions;
mod will;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use foldhash::fast::RandomState;

use crate::budget::Account;
use crate::mqtt::{Message, QoS, ReasonCode, SubscribeOptions, Version};
use crate::time::Millis;
use crate::topics::FilterId;

pub use close::CloseReason;
pub use connection::{Connection, ConnectionSpec, Scope};
pub use entry::{Offer, Orphan};
pub use inbound::{Answer, Arrival, Inbound, Incoming, Token};
pub use outbound::{Delivered, ENTRY_BYTES, Outbound, Shed};
pub use overlap::{Senior, senior};
pub use subscriptions::{Subscription, hides};
pub use will::Will;

/// What to do when a session's queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum QueueFull {
    /// Drop the oldest waiting message.
    #[default]
    Oldest,
    /// Drop the one that arrives.
    Newest,
    /// End the session.
    EndSession,
}

/// Why a message was not kept for a client; the label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// `session.queue_messages_max`.
    QueueFull,
    /// `session.queue_bytes_max`.
    QueueBytes,
    /// QoS 0 for a client that is away.
    Qos0Offline,
    /// Larger than the client's Maximum Packet Size.
    TooLarge,
}

/// The limits of a session; the same for all.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    /// QoS 1 and 2 publishes of an MQTT 5 client that may be unanswered.
    pub receive_max: u16,
    /// Aliases a client may define.
    pub topic_alias_max: u16,
    /// Largest packet taken from a client, bytes.
    pub packet_max: u32,
    /// Messages in a session's queue.
    pub queue_messages_max: usize,
    /// Bytes in a session's queue, and in flight.
    pub queue_bytes_max: usize,
    /// Age in milliseconds at which a waiting message is dropped; `u64::MAX`: none.
    pub queue_age_max: u64,
    /// How long a session is away before others get its part of shared subscriptions,
    /// milliseconds.
    pub shared_redeliver_after: u64,
    /// How long a client may be away before its will goes out and its absence is told, milliseconds.
    pub will_grace: u64,
    /// Clients' coming and going is told.
    pub presence: bool,
    /// Policy when the queue is full.
    pub queue_full: QueueFull,
    /// Keep QoS 0 for clients that are away.
    pub queue_qos0: bool,
    /// Bytes of output that may wait for a connection's socket; less while all together are near
    /// their budget.
    pub output_buffer: Arc<AtomicUsize>,
    /// Subscriptions of one client.
    pub subscriptions_max: usize,
    /// Bytes of all filters of one client.
    pub filter_bytes_max: usize,
    /// Levels of a topic or filter.
    pub topic_levels_max: usize,
    /// Unanswered publishes of a 3.x client before its socket is left unread.
    pub v3_publishes_max: usize,
    /// Session Expiry Interval at most, seconds.
    pub expiry_max: u32,
    /// Charged for every message that a client brings in.
    pub publish_account: Arc<Account>,
    /// User properties with this key are ours alone [MQTT-3.3.2-17]: stripped from clients.
    pub reserved_key: &'static str,
    /// Keyed for the process: recognises copies of publishes.
    pub hasher: RandomState,
}

impl SessionLimits {
    /// Messages in flight toward one client, whatever its Receive Maximum.
    pub fn in_flight_max(&self) -> usize {
        self.queue_messages_max.clamp(64, 16_384)
    }
}

/// Who may publish and subscribe what; asked for one client.
pub trait Policy {
    /// Whether the client may publish to `topic`.
    fn may_publish(&self, topic: &str) -> bool;
    /// Whether the client may subscribe to `filter`.
    fn may_subscribe(&self, filter: &str) -> bool;
    /// The largest QoS that the core takes.
    fn maximum_qos(&self) -> QoS {
        QoS::ExactlyOnce
    }
    /// Whether the core keeps retained messages.
    fn retain_available(&self) -> bool {
        true
    }
}

/// One filter of a SUBSCRIBE that passed the session's checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its place in the SUBSCRIBE.
    pub index: u16,
    /// The topic filter.
    pub filter: Box<str>,
    /// What the client asked for.
    pub options: SubscribeOptions,
}

/// What a packet or the time asks of the router.
#[derive(Debug)]
pub enum Effect {
    /// Forward to the core. No token: QoS 0, nobody waits for an answer.
    Publish {
        /// Names the publish in the core's answer.
        token: Option<Token>,
        /// What to publish.
        message: Message,
        /// Not 0: the publisher has a No Local subscription that matches; the mark of its session.
        tag: u64,
    },
    /// Add subscriptions; each answer comes back through [`Session::subscribed`].
    Subscribe {
        /// Names the SUBSCRIBE in the answers: its packet identifier, or another number where two
        /// streams have the same in use.
        packet_id: u16,
        /// Its Subscription Identifier; 0: none.
        identifier: u32,
        /// The filters.
        wanted: Vec<Wanted>,
    },
    /// These filters lost their subscription.
    Unsubscribe {
        /// The filters.
        filters: Vec<Unsubscribed>,
    },
}

/// A subscription that its client gave up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsubscribed {
    /// Number of the filter.
    pub filter: FilterId,
    /// The filter.
    pub name: Arc<str>,
    /// It had No Local.
    pub no_local: bool,
    /// Filters of the client, granted later, that match some of the same messages: it was the
    /// copies of this one that the client got.
    pub senior_over: Vec<FilterId>,
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// The client identifier.
    pub client_id: Arc<str>,
    /// Who it belongs to.
    pub principal: Arc<str>,
    /// Marks this session's own publishes for No Local; unique in the process.
    pub tag: u64,
    /// Session Expiry Interval in seconds; `u32::MAX`: never.
    pub expiry: u32,
    /// When the current connection began, or the last one ended.
    pub since: u64,
    /// Messages lost by a named limit since the session began.
    pub gaps: u64,
    connection: Option<Box<Connection>>,
    connection_no: u64,
    version: Version,
    ends_at: u64,
    /// Then other members get what this one was to have of its groups.
    share_at: u64,
    subscriptions: Vec<Subscription>,
    outbound: Outbound,
    /// From the first publish of QoS 1 or 2 on: those who only listen have none.
    inbound: Option<Box<Inbound>>,
    will: Option<Box<Will>>,
    /// When its absence is to be told; `u64::MAX`: it is here; 0: there is nothing to tell.
    absent_at: u64,
    /// DISCONNECT 0x00 took the will away.
    will_discarded: bool,
    /// Publishes that were refused here; the caller takes and counts them.
    pub refused_publishes: u32,
    /// Ended; kept only to recognise publishes that are sent again.
    ghost: bool,
}

/// What is left to do when a connection or session ended.
#[derive(Debug, Default)]
pub struct Ended {
    /// Publish this will now.
    pub will: Option<Message>,
    /// A will is dropped unpublished.
    pub will_cancelled: bool,
    /// The session is over: release its subscriptions.
    pub session: bool,
    /// Messages that end with it.
    pub messages: usize,
    /// Deliveries of shared subscriptions that another member is to get.
    pub shared: Vec<Orphan>,
    /// Tell that the client is away.
    pub absent: bool,
}

impl Session {
    /// A new session without a connection.
    pub fn new(client_id: Arc<str>, principal: Arc<str>, tag: u64, now: Millis) -> Self {
        Self {
            client_id,
            principal,
            tag,
            expiry: 0,
            since: now,
            gaps: 0,
            connection: None,
            connection_no: 0,
            version: Version::V5,
            ends_at: u64::MAX,
            share_at: u64::MAX,
            subscriptions: Vec::new(),
            outbound: Outbound::default(),
            inbound: None,
            will: None,
            absent_at: 0,
            will_discarded: false,
            refused_publishes: 0,
            ghost: false,
        }
    }

    /// Starts the session anew on the same client identifier [MQTT-3.1.2-4]. What the core still
    /// has of its publishes is remembered, so that a copy sent again is not forwarded twice.
    /// A client that is back within `grace` was never away: its will is dropped.
    pub fn restart(&mut self, tag: u64, grace: u64, now: Millis) -> Ended {
        let back = grace > 0 && (self.connection.is_some() || now < self.since + grace);
        let mut ended = self.end();
        let will = self.will.take();
        // The will of the session that ends here is due [MQTT-3.1.3-9].
        match back {
            true => ended.will_cancelled = will.is_some(),
            false => ended.will = will.map(|w| w.publish(now)),
        }
        self.tag = tag;
        self.gaps = 0;
        ended
    }

    /// Begins a connection; returns its connection_no. Unacknowledged messages of an earlier one are
    /// sent again by [`Session::pump`].
    pub fn attach(
        &mut self,
        spec: &ConnectionSpec,
        expiry: u32,
        will: Option<Will>,
        limits: &SessionLimits,
        now: Millis,
    ) -> Attached {
        let will_cancelled = self.will.take().is_some();
        self.ghost = false;
        let news = limits.presence && self.absent_at == 0;
        if limits.presence {
            self.absent_at = u64::MAX;
        }
        self.connection_no += 1;
        self.expiry = expiry;
        self.version = spec.version;
        self.since = now;
        self.ends_at = u64::MAX;
        self.share_at = u64::MAX;
        self.will = will.map(Box::new);
        self.connection = Some(Box::new(Connection::new(self.connection_no, spec, now)));
        Attached {
            connection_no: self.connection_no,
            will_cancelled,
            news,
        }
    }

    /// Ends the connection. `normal`: DISCONNECT 0x00, which discards the will [MQTT-3.14.4-3].
    pub fn detach(&mut self, limits: &SessionLimits, normal: bool, now: Millis) -> Ended {
        self.connection = None;
        self.since = now;
        self.outbound.detached(limits);
        self.inbound_detached();
        let mut ended = Ended::default();
        if normal {
            ended.will_cancelled =
                self.will.take().is_some() | std::mem::take(&mut self.will_discarded);
        }
        let grace = limits.will_grace;
        if self.absent_at == u64::MAX {
            // Who says goodbye does not flap.
            ended.absent = normal || grace == 0;
            self.absent_at = if ended.absent { 0 } else { now + grace };
        }
        if self.expiry == 0 {
            match self.will.as_deref_mut() {
                Some(will) if grace > 0 => will.due_at = now + grace,
                _ => ended.will = self.will.take().map(|w| w.publish(now)),
            }
            let over = self.end();
            ended.session = true;
            ended.messages = over.messages;
            ended.shared = over.shared;
            return ended;
        }
        if self.outbound.has_shared() {
            self.share_at = now.saturating_add(limits.shared_redeliver_after);
        }
        if self.expiry != u32::MAX {
            self.ends_at = now + u64::from(self.expiry) * 1000;
        }
        match self.will.as_deref_mut() {
            Some(will) if will.delay == 0 && grace == 0 => {
                ended.will = self.will.take().map(|w| w.publish(now))
            }
            Some(will) => {
                // Whichever comes first: the delay or the session's end.
                let delay = u64::from(will.delay.min(self.expiry)) * 1000;
                will.due_at = now + delay.max(grace);
            }
            None => {}
        }
        ended
    }

    /// The connection is taken away by the next one, and the session goes on: no will.
    pub fn detach_for_takeover(&mut self, limits: &SessionLimits) {
        self.connection = None;
        self.outbound.detached(limits);
        self.inbound_detached();
    }

    fn inbound_detached(&mut self) {
        if let Some(inbound) = &mut self.inbound {
            inbound.detached();
        }
    }

    /// Ends the session's state; the will is the caller's to settle.
    fn end(&mut self) -> Ended {
        let shared = self.outbound.take_shared();
        let messages = self.outbound.queued() + self.outbound.in_flight();
        self.outbound = Outbound::default();
        if let Some(inbound) = &mut self.inbound {
            inbound.restart();
        }
        if let Some(connection) = &mut self.connection {
            connection.pending = Vec::new();
        }
        self.ends_at = u64::MAX;
        self.ghost = true;
        Ended {
            session: true,
            messages,
            shared,
            ..Ended::default()
        }
    }

    /// Takes the subscriptions out; the caller releases them.
    pub fn take_subscriptions(&mut self) -> Vec<Subscription> {
        std::mem::take(&mut self.subscriptions)
    }

    /// What has come due: a will, or the session's end.
    pub fn expire(&mut self, now: Millis) -> Ended {
        let mut ended = Ended::default();
        if self.connection.is_some() {
            return ended;
        }
        if self.absent_at <= now && self.absent_at != 0 {
            self.absent_at = 0;
            ended.absent = true;
        }
        if self.will.as_ref().is_some_and(|w| w.due_at <= now) {
            ended.will = self.will.take().map(|w| w.publish(now));
        }
        if self.ghost {
            return ended;
        }
        if self.share_at <= now {
            self.share_at = u64::MAX;
            ended.shared = self.outbound.take_shared();
        }
        if self.ends_at <= now {
            let shared = std::mem::take(&mut ended.shared);
            // A will that a grace holds back waits beyond the session's end.
            let (will, absent) = (ended.will, ended.absent);
            ended = self.end();
            (ended.will, ended.absent) = (will, absent);
            ended.shared.extend(shared);
        }
        ended
    }

    /// What a grace holds back of a session that another takes the place of.
    pub fn give_up_grace(&mut self, now: Millis) -> Ended {
        Ended {
            will: self.will.take().map(|w| w.publish(now)),
            absent: std::mem::take(&mut self.absent_at) != 0,
            ..Ended::default()
        }
    }

    /// When [`Session::expire`] or the keepalive next has something to do; `u64::MAX`: never.
    pub fn deadline(&self) -> Millis {
        match &self.connection {
            Some(c) if c.keep_alive > 0 => c.last_seen + c.keep_alive,
            Some(_) => u64::MAX,
            None => {
                let will = self.will.as_ref().map_or(u64::MAX, |w| w.due_at);
                let absent = match self.absent_at {
                    0 => u64::MAX,
                    at => at,
                };
                let share_at = if self.ghost { u64::MAX } else { self.share_at };
                will.min(self.ends_at).min(share_at).min(absent)
            }
        }
    }

    /// The core's answer to a publish of this client.
    pub fn answered(&mut self, token: Token, reason: ReasonCode) {
        let attached = self.connection.is_some();
        let inbound = self.inbound.as_mut();
        let Some(answer) = inbound.and_then(|i| i.answer(token, reason, attached)) else {
            return;
        };
        if let Some(connection) = &mut self.connection {
            packets::write_answer(connection, &answer, reason);
        }
    }

    /// Offers a message. See [`Outbound::deliver`].
    pub fn deliver(&mut self, limits: &SessionLimits, now: Millis, offer: &Offer<'_>) -> Delivered {
        let connection = self.connection.as_deref_mut();
        self.outbound.deliver(connection, limits, now, offer)
    }

    /// Writes what has become possible to write.
    pub fn pump(&mut self, limits: &SessionLimits, now: Millis) {
        if let Some(connection) = &mut self.connection {
            self.outbound.pump(connection, limits, now);
        }
    }

    /// The connection, if there is one.
    pub fn connection(&mut self) -> Option<&mut Connection> {
        self.connection.as_deref_mut()
    }

    /// The connection, if there is one.
    pub fn connection_ref(&self) -> Option<&Connection> {
        self.connection.as_deref()
    }

    /// Whether a client is connected.
    pub fn attached(&self) -> bool {
        self.connection.is_some()
    }

    /// Number of the latest connection.
    pub fn connection_no(&self) -> u64 {
        self.connection_no
    }

    /// Protocol version of the latest connection.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The session is over; only its publishes under way are remembered.
    pub fn is_ghost(&self) -> bool {
        self.ghost
    }

    /// How long the ended session is remembered.
    pub fn remember_until(&mut self, at: u64) {
        self.ends_at = at;
    }

    /// A ghost that is still of use.
    pub fn worth_keeping(&self) -> bool {
        let publishes = self.inbound.as_ref().is_some_and(|i| i.has_orphans());
        publishes || self.will.is_some() || self.absent_at != 0
    }

    /// Whether a message of QoS 1 or 2 would be written at once.
    pub fn window_free(&self, limits: &SessionLimits) -> bool {
        let connection = self.connection.as_deref();
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
        self.connection
            .as_ref()
            .is_some_and(|c| !c.pending.is_empty())
    }

    /// Publishes of this client that wait for the core.
    pub fn publishes_waiting(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.waiting())
    }

    /// When the session ends if nobody comes back; `u64::MAX`: not by time, or not now.
    pub fn ends_at(&self) -> u64 {
        self.ends_at
    }
}

/// The outcome of [`Session::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Number of the connection.
    pub connection_no: u64,
    /// A delayed will was cancelled by this resume [MQTT-3.1.3-9].
    pub will_cancelled: bool,
    /// Tell that the client is here.
    pub news: bool,
}
