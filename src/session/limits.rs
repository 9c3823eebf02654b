//! The limits and rules that the router hands to every session.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use foldhash::fast::RandomState;

use crate::budget::Account;
use crate::mqtt::QoS;

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
