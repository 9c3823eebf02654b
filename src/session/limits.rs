//! The limits and rules that the router hands to every session.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crate::budget::{Account, QueueFull};
use crate::hashing::HashSeed;
use crate::mqtt::QoS;

/// The usual [`SessionLimits::sleep_after`].
pub const SLEEP_AFTER: Duration = Duration::from_secs(2);

/// Why a message was not kept for a client.
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

/// The limits of a session. All sessions have the same.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    /// Our Receive Maximum: QoS 1 and 2 publishes of an MQTT 5 client that may be unanswered.
    pub receive_max: u16,
    /// Publishes of an MQTT 5 client that may be unanswered before its connection is ended.
    /// [`SessionLimits::receive_max_hard`] is the limit in force.
    pub receive_max_hard: u16,
    /// Our Topic Alias Maximum: aliases that a client may define.
    pub topic_alias_max: u16,
    /// The largest packet taken from a client, in bytes.
    pub packet_max: u32,
    /// Messages that may wait for a client while it is away.
    pub queue_messages_max: usize,
    /// Bytes that may wait for a client while it is away, and that may be in flight to it.
    pub queue_bytes_max: usize,
    /// Age at which a message that waits for a client that is away is dropped. `None`: at none.
    pub queue_age_max: Option<Duration>,
    /// How long a client must be away before its messages are kept with those of other clients that are
    /// away. Flaps are shorter.
    pub sleep_after: Duration,
    /// How long a session may be away before other members of its groups get its share.
    pub shared_redeliver_after: Duration,
    /// How long a client may be away before its will and its absence are published.
    pub will_grace: Duration,
    /// Publish the presence and absence of clients.
    pub presence: bool,
    /// Policy when the queue is full.
    pub queue_full: QueueFull,
    /// Keep QoS 0 messages for clients that are away.
    pub queue_qos0: bool,
    /// Bytes of output that may wait for a connection's socket. The router lowers it while the output
    /// of all connections is near its budget.
    pub output_buffer: Arc<AtomicUsize>,
    /// Subscriptions of one client.
    pub subscriptions_max: usize,
    /// Bytes of all filters of one client.
    pub filter_bytes_max: usize,
    /// Levels of a topic or filter at the broker. See `SessionLimits::allows_levels`.
    pub topic_levels_max: usize,
    /// Unanswered publishes of an MQTT 3 client before its socket is left unread.
    pub v3_publishes_max: usize,
    /// The longest Session Expiry Interval, in seconds.
    pub expiry_max: u32,
    /// Charged for every message that a client publishes.
    pub publish_account: Arc<Account>,
    /// Our own user property, which is stripped from clients' publishes: a client must not set an
    /// origin mark.
    pub reserved_key: &'static str,
    /// Hashes contents and packet identifiers, and spreads sessions over shards and filters over links.
    pub hash_seed: HashSeed,
}

impl SessionLimits {
    /// Publishes of an MQTT 5 client that may be unanswered before its connection is ended: never
    /// fewer than were announced.
    pub fn receive_max_hard(&self) -> usize {
        self.receive_max_hard.max(self.receive_max).into()
    }

    /// Whether a client's topic or filter has few enough levels, together with the levels of `mount`.
    pub(crate) fn allows_levels(&self, mount: &str, topic: &str) -> bool {
        let separators = |text: &str| text.bytes().filter(|byte| *byte == b'/').count();
        separators(mount) + separators(topic) < self.topic_levels_max
    }

    /// Messages in flight toward one client, whatever its Receive Maximum.
    pub fn in_flight_max(&self) -> usize {
        self.queue_messages_max.clamp(64, 16_384)
    }
}

/// The fate of a Response Topic (MQTT 5 §3.3.2.3.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseTopic {
    /// It is passed on, with the client's mount before it.
    Mounted,
    /// The publish is passed on without it.
    Removed,
    /// The publish is refused.
    Refused,
}

/// The permissions of one client, and what the broker supports. `mount` is the prefix of the client's
/// topics at the broker, which topics and filters here do not have.
pub trait Policy {
    /// Whether the client may publish to `topic`.
    fn may_publish(&self, mount: &str, topic: &str) -> bool;
    /// Whether the client may subscribe to `filter`.
    fn may_subscribe(&self, mount: &str, filter: &str) -> bool;
    /// Whether the answers may be others than when the client subscribed.
    fn may_have_changed(&self) -> bool {
        false
    }
    /// What becomes of a Response Topic. A response to it would be a publish that the client has asked
    /// another one for, so the client needs the right to publish there.
    fn response_topic(&self, mount: &str, topic: &str) -> ResponseTopic {
        match self.may_publish(mount, topic) {
            true => ResponseTopic::Mounted,
            false => ResponseTopic::Removed,
        }
    }
    /// The largest QoS that the broker accepts.
    fn maximum_qos(&self) -> QoS {
        QoS::ExactlyOnce
    }
    /// Whether the broker keeps retained messages.
    fn retain_available(&self) -> bool {
        true
    }
}
