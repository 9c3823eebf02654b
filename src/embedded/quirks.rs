//! How an embedded broker departs from a plain one. Production builds have no such broker: only
//! the cargo feature `sim` makes it possible.

use std::time::Duration;

/// The copies for a client whose own subscriptions overlap. The standard allows the first two (MQTT
/// 5 §3.3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overlap {
    /// One copy for each matching filter, with its own QoS, RETAIN and Subscription Identifier.
    #[default]
    Many,
    /// One copy at the highest granted QoS, with all Subscription Identifiers.
    One,
    /// One copy with all Subscription Identifiers, but at the lowest granted QoS: a fault that
    /// [MQTT-3.3.4-2] forbids.
    LowestQos,
    /// One copy from a queue for QoS 0 and one from a queue for QoS 1 and 2, and a second SUBSCRIBE
    /// at another QoS leaves the filter in both: a fault that [MQTT-3.8.4-3] forbids.
    TwoQueues,
}

/// How a broker that does not speak MQTT 5 refuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RefuseV5 {
    /// It speaks MQTT 5.
    #[default]
    No,
    /// As a 3.1.1 server: `20 02 00 01`, return code 1, then close.
    ReturnCode,
    /// As an MQTT 5 server with MQTT 5 turned off: a CONNACK of MQTT 5 with 0x84, then close.
    ReasonCode,
}

/// The state of shared subscriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shared {
    /// The members of a group get messages in turn.
    #[default]
    Working,
    /// They are granted, and no message is ever sent: a fault of some brokers.
    Dead,
    /// CONNACK says Shared Subscription Available 0, and they are refused.
    Refused,
}

/// The quirks of an embedded broker. The default is a broker without any.
#[derive(Debug, Clone, Default)]
pub struct Quirks {
    /// Overlapping subscriptions of one client.
    pub overlap: Overlap,
    /// CONNACK says Subscription Identifiers Available 0, and identifiers are ignored.
    pub no_ids: bool,
    /// Shared subscriptions.
    pub shared: Shared,
    /// Retained messages are sent this long after the SUBACK.
    pub late_retained: Option<Duration>,
    /// RETAIN is 0 on every live message: a fault that [MQTT-3.3.1-13] forbids.
    pub no_rap: bool,
    /// The PUBLISH packets of a resumed session are sent again with DUP 0: a fault that
    /// [MQTT-3.3.1-1] forbids.
    pub dup0: bool,
    /// The Receive Maximum that CONNACK announces, which also limits the broker's own
    /// unacknowledged PUBLISH packets. `None`: 65,535, or the client's own Receive Maximum if that
    /// is smaller.
    pub small_window: Option<u16>,
    /// Whether and how MQTT 5 is refused.
    pub refuse_v5: RefuseV5,
}

impl Quirks {
    /// A broker without quirks.
    #[cfg(not(feature = "sim"))]
    pub(super) const NONE: Self = Self {
        overlap: Overlap::Many,
        no_ids: false,
        shared: Shared::Working,
        late_retained: None,
        no_rap: false,
        dup0: false,
        small_window: None,
        refuse_v5: RefuseV5::No,
    };
}

#[cfg(feature = "sim")]
impl From<&[crate::config::Quirk]> for Quirks {
    fn from(words: &[crate::config::Quirk]) -> Self {
        use crate::config::Quirk;
        let mut quirks = Self::default();
        for word in words {
            match word {
                Quirk::Many => quirks.overlap = Overlap::Many,
                Quirk::One => quirks.overlap = Overlap::One,
                Quirk::NoIds => quirks.no_ids = true,
                Quirk::LowestQos => quirks.overlap = Overlap::LowestQos,
                Quirk::TwoQueues => quirks.overlap = Overlap::TwoQueues,
                Quirk::LateRetained => quirks.late_retained = Some(Duration::from_millis(300)),
                Quirk::Dup0 => quirks.dup0 = true,
                Quirk::SmallWindow => quirks.small_window = Some(10),
                Quirk::DeadShared => quirks.shared = Shared::Dead,
                Quirk::NoShared => quirks.shared = Shared::Refused,
                Quirk::NoRap => quirks.no_rap = true,
                Quirk::V311 => quirks.refuse_v5 = RefuseV5::ReturnCode,
            }
        }
        quirks
    }
}
