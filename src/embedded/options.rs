//! What an embedded core is told to be.

use std::time::Duration;

#[cfg(feature = "sim")]
use crate::config::Quirk;
use crate::mqtt::QoS;

/// What a client gets whose own subscriptions overlap on a message. The
/// standard allows the first two (MQTT 5 §3.3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overlap {
    /// One copy for each matching filter, each with its own QoS, RETAIN and
    /// Subscription Identifier.
    #[default]
    Many,
    /// One copy at the highest granted QoS with all Subscription Identifiers.
    One,
    /// One copy with all Subscription Identifiers, but at the lowest granted
    /// QoS: a fault that [MQTT-3.3.4-2] forbids.
    LowestQos,
    /// One copy from a queue for QoS 0 and one from a queue for the rest, and a second SUBSCRIBE
    /// at another QoS leaves the filter in both: a fault that [MQTT-3.8.4-3] forbids.
    TwoQueues,
}

/// How MQTT 5 is refused by a core that does not speak it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RefuseV5 {
    /// It is spoken.
    #[default]
    No,
    /// As a 3.1.1 server does: `20 02 00 01`, return code 1, then close.
    ReturnCode,
    /// As an MQTT 5 server does that has it turned off: a CONNACK of MQTT 5
    /// with 0x84, then close.
    ReasonCode,
}

/// What becomes of shared subscriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shared {
    /// One member of the group gets the message, in turn.
    #[default]
    Working,
    /// They are granted, and nothing ever comes: a fault of some brokers.
    Dead,
    /// CONNACK says Shared Subscription Available 0, and they are refused.
    Refused,
}

/// Limits and quirks of an embedded core; the default is a well-behaved MQTT 5
/// broker.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// Overlapping subscriptions of one client.
    pub overlap: Overlap,
    /// CONNACK says Subscription Identifiers Available 0, and identifiers are
    /// ignored.
    pub no_ids: bool,
    /// Shared subscriptions.
    pub shared: Shared,
    /// Retained messages are sent this long after the SUBACK.
    pub late_retained: Duration,
    /// A fault: RETAIN is 0 on every live message, against [MQTT-3.3.1-13].
    pub no_rap: bool,
    /// A fault: a resumed session's PUBLISH packets are sent again with DUP 0,
    /// against [MQTT-3.3.1-1].
    pub dup0: bool,
    /// The Receive Maximum that CONNACK announces, and the limit of our own
    /// unacknowledged PUBLISH packets toward the client. None: 65,535 both
    /// ways, or the client's own Receive Maximum where that is smaller.
    pub small_window: Option<u16>,
    /// Largest packet taken, in bytes with its fixed header; CONNACK announces
    /// it. None: what the protocol allows, not capabilities.
    pub max_packet: Option<u32>,
    /// Maximum QoS; CONNACK announces it if below 2.
    pub max_qos: QoS,
    /// False: CONNACK says Retain Available 0, and a retained PUBLISH is
    /// answered by 0x9A.
    pub retain_available: bool,
    /// Whether and how MQTT 5 is refused.
    pub refuse_v5: RefuseV5,
    /// Topic Alias Maximum of CONNACK.
    pub topic_alias_max: u16,
    /// Messages in one session's queue; past it the new one is dropped.
    pub queue_max: usize,
    /// Bytes in one session's queue; past it the new one is dropped.
    pub queue_bytes_max: usize,
    /// Bytes in the retained store; past it a new one is not kept.
    pub retained_bytes_max: usize,
    /// Sessions; past it CONNECT is answered by 0x97.
    pub sessions_max: usize,
    /// Connections; past it a new one is closed at once.
    pub connections_max: usize,
}

impl EmbeddedOptions {
    /// An embedded broker with these quirks.
    #[cfg(feature = "sim")]
    pub fn with_quirks(quirks: &[Quirk]) -> Self {
        let mut options = Self::default();
        for quirk in quirks {
            match quirk {
                Quirk::Many => options.overlap = Overlap::Many,
                Quirk::One => options.overlap = Overlap::One,
                Quirk::NoIds => options.no_ids = true,
                Quirk::LowestQos => options.overlap = Overlap::LowestQos,
                Quirk::TwoQueues => options.overlap = Overlap::TwoQueues,
                Quirk::LateRetained => options.late_retained = Duration::from_millis(300),
                Quirk::Dup0 => options.dup0 = true,
                Quirk::SmallWindow => options.small_window = Some(10),
                Quirk::DeadShared => options.shared = Shared::Dead,
                Quirk::NoShared => options.shared = Shared::Refused,
                Quirk::NoRap => options.no_rap = true,
                Quirk::V311 => options.refuse_v5 = RefuseV5::ReturnCode,
            }
        }
        options
    }
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        EmbeddedOptions {
            overlap: Overlap::Many,
            no_ids: false,
            shared: Shared::Working,
            late_retained: Duration::ZERO,
            no_rap: false,
            dup0: false,
            small_window: None,
            max_packet: Some(16 * 1024 * 1024),
            max_qos: QoS::ExactlyOnce,
            retain_available: true,
            refuse_v5: RefuseV5::No,
            topic_alias_max: 10,
            queue_max: 1_000_000,
            queue_bytes_max: 512 * 1024 * 1024,
            retained_bytes_max: 512 * 1024 * 1024,
            sessions_max: 100_000,
            connections_max: 10_000,
        }
    }
}
