//! The broker's profile: its capabilities, as CONNACK announces them, and its quirks, as a probe
//! shows them.

pub(in crate::upstream) mod advice;
pub(in crate::upstream) mod cache;
mod display;
pub(in crate::upstream) mod probe;

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::mqtt::{Connack, QoS, Version};
use crate::router::BrokerFeatures;

/// Receive Maximum that is assumed of a 3.1.1 broker, which cannot announce it. Brokers' defaults
/// are 10 to 65,535.
const RECEIVE_MAXIMUM_V3: u16 = 20;

/// Messages that a probe publishes to see how many the broker sends without an acknowledgement.
pub(crate) const WINDOW_PROBED: u16 = 64;

/// A retained fetch ends once its link has been quiet for a time between these two.
const FETCH_QUIET_MIN: Duration = Duration::from_millis(100);
const FETCH_QUIET_MAX: Duration = Duration::from_secs(4);
/// The quiet time where the probe saw no retained message.
const FETCH_QUIET_UNSEEN: Duration = Duration::from_millis(500);

/// Filters in one SUBSCRIBE or UNSUBSCRIBE to a broker that does not name itself. AWS IoT Core takes no
/// more.
const FILTERS_IN_PACKET: usize = 8;
/// Filters in one packet to a broker that names itself: none of these has such a limit.
const FILTERS_IN_PACKET_NAMED: usize = 64;

/// Gives each value of an enum the word that logs, metrics, the admin API and people read.
macro_rules! words {
    ($type:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        impl $type {
            /// The word in logs, metric labels and the admin API.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    };
}

/// How a profile came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The broker was probed.
    Probed,
    /// The broker refused a part of the probe or was too slow. Every quirk that the probe did not
    /// see is assumed to be at its worst.
    Partly,
    /// The probe is turned off, and CONNACK is believed.
    Connack,
}

words!(Source { Probed => "probed", Partly => "partly", Connack => "connack" });

/// The copies of one message for a client whose filters overlap (MQTT 5 §3.3.4 allows both).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    /// One copy for each filter.
    Many,
    /// One copy for all filters.
    One,
}

words!(Copies { Many => "many", One => "one" });

/// The state of Subscription Identifiers (MQTT 5 §3.8.2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identifiers {
    /// Each copy carries the identifiers of its filters.
    Working,
    /// CONNACK does not deny them, and no probe has seen them.
    Assumed,
    /// The broker has none: it speaks MQTT 3.1.1, or CONNACK denies them.
    None,
    /// The broker offers them, but they are missing or wrong.
    Broken,
}

words!(Identifiers {
    Working => "working",
    Assumed => "assumed",
    None => "none",
    Broken => "broken",
});

impl Identifiers {
    /// Whether an arriving message can be mapped to its filters by them.
    pub(crate) fn usable(self) -> bool {
        matches!(self, Self::Working | Self::Assumed)
    }
}

/// The state of shared subscriptions (MQTT 5 §4.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SharedSubscriptions {
    /// A message arrived through one.
    Alive,
    /// The broker granted one, and no message arrived.
    Dead,
    /// CONNACK or SUBACK refused them.
    Refused,
    /// CONNACK does not deny them, and no probe has tried one.
    Assumed,
}

words!(SharedSubscriptions {
    Alive => "alive",
    Dead => "dead",
    Refused => "refused",
    Assumed => "assumed",
});

/// The QoS of the copies for overlapping filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OverlapQos {
    /// Each copy has the QoS of its filter.
    Each,
    /// The one copy has the highest QoS, as [MQTT-3.3.4-2] demands.
    Highest,
    /// The one copy has less than the highest QoS, so QoS 1 messages may be lost.
    Lower,
}

words!(OverlapQos { Each => "each", Highest => "highest", Lower => "lower" });

/// How arriving messages are mapped to filters on the data links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// By the Subscription Identifiers that a message carries.
    Identifiers,
    /// By topic; no link has two filters that overlap.
    DisjointPlacement,
}

words!(Mapping {
    Identifiers => "identifiers",
    DisjointPlacement => "disjoint placement",
});

/// The capabilities that a broker announces in CONNACK (MQTT 5 §3.2.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Capabilities {
    /// The protocol version of the connection.
    #[serde(rename = "protocol", serialize_with = "version_name")]
    pub version: Version,
    /// Subscription Identifiers are not denied.
    #[serde(skip)]
    pub identifiers: bool,
    /// Shared subscriptions are not denied.
    #[serde(skip)]
    pub shared: bool,
    /// Receive Maximum: publishes that the broker takes without having acknowledged them.
    pub receive_maximum: u16,
    /// Maximum QoS.
    #[serde(serialize_with = "qos_number")]
    pub maximum_qos: QoS,
    /// Maximum Packet Size, bytes; `None`: not limited.
    pub maximum_packet_size: Option<u32>,
    /// Retain Available.
    pub retain_available: bool,
}

impl Capabilities {
    /// The capabilities that this CONNACK announces on a connection of this version.
    pub(crate) fn of(version: Version, connack: &Connack<'_>) -> Self {
        let v5 = version == Version::V5;
        Self {
            version,
            identifiers: v5 && connack.subscription_ids_available.unwrap_or(true),
            shared: connack.shared_subscription_available.unwrap_or(true),
            receive_maximum: match v5 {
                true => connack.receive_maximum.unwrap_or(u16::MAX),
                false => RECEIVE_MAXIMUM_V3,
            },
            maximum_qos: connack.maximum_qos.unwrap_or(QoS::ExactlyOnce),
            maximum_packet_size: connack.maximum_packet_size,
            retain_available: connack.retain_available.unwrap_or(true),
        }
    }
}

/// The quirks of a broker: what it does where the standard leaves room, or where it errs. `None`
/// means that no probe has seen it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Quirks {
    /// Copies for overlapping filters.
    pub copies: Option<Copies>,
    /// The QoS of these copies.
    pub overlap_qos: Option<OverlapQos>,
    /// A second SUBSCRIBE for a filter, at another QoS, replaces the first [MQTT-3.8.4-3].
    pub replaces: Option<bool>,
    /// Subscription Identifiers.
    pub identifiers: Identifiers,
    /// Retain Handling 2 keeps a SUBSCRIBE from bringing retained messages.
    pub retain_handling: Option<bool>,
    /// Live messages keep their RETAIN flag.
    pub retain_as_published: Option<bool>,
    /// Filters with wildcards bring retained messages.
    pub retained_wildcard: Option<bool>,
    /// A PINGREQ that follows a SUBSCRIBE is answered after its retained messages.
    pub retained_marker: Option<bool>,
    /// Milliseconds until all retained messages of a SUBSCRIBE had arrived.
    pub retained_within: Option<u32>,
    /// Shared subscriptions.
    pub shared: SharedSubscriptions,
    /// User properties arrive unchanged and in order.
    pub properties: Option<bool>,
    /// The broker sends small packets at once (TCP_NODELAY). If not, each waits for the acknowledgement
    /// of the one before.
    pub nodelay: Option<bool>,
    /// Messages that the broker sends without an acknowledgement; `WINDOW_PROBED` stands for
    /// itself and everything above.
    pub window: Option<u16>,
}

/// The profile of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct BrokerProfile {
    /// How the profile came about.
    pub source: Source,
    /// The name and version that the broker publishes (`$SYS/broker/version`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub software: Option<String>,
    /// What CONNACK announced.
    #[serde(flatten)]
    pub capabilities: Capabilities,
    /// What the probe saw.
    #[serde(flatten)]
    pub quirks: Quirks,
    /// The steps of the probe that the broker refused or did not answer in time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

impl BrokerProfile {
    /// A profile made of CONNACK alone.
    pub(crate) fn unseen(capabilities: &Capabilities, source: Source) -> Self {
        Self {
            source,
            software: None,
            capabilities: *capabilities,
            quirks: Quirks {
                copies: None,
                overlap_qos: None,
                replaces: None,
                identifiers: match capabilities.identifiers {
                    true => Identifiers::Assumed,
                    false => Identifiers::None,
                },
                retain_handling: None,
                retain_as_published: None,
                retained_wildcard: None,
                retained_marker: None,
                retained_within: None,
                shared: match capabilities.shared {
                    true => SharedSubscriptions::Assumed,
                    false => SharedSubscriptions::Refused,
                },
                properties: None,
                nodelay: None,
                window: None,
            },
            missing: Vec::new(),
        }
    }

    /// The part that the router acts on.
    pub(crate) fn features(&self) -> BrokerFeatures {
        BrokerFeatures {
            identifiers: self.quirks.identifiers.usable(),
            properties: self.keeps_properties(),
            keeps_retain: self.keeps_retain(),
            shared: self.grants_shared(),
            replaces: self.replaces(),
            maximum_qos: self.capabilities.maximum_qos,
            retain_available: self.capabilities.retain_available,
            packet_max: self.capabilities.maximum_packet_size,
        }
    }

    /// The QoS at which retained messages are fetched. A broker with a small send window may cut
    /// off messages that do not fit into it; at QoS 0 it sends all of them, but their stored QoS
    /// cannot be seen.
    pub(crate) fn fetch_qos(&self) -> QoS {
        match self.quirks.window {
            Some(window) if window >= WINDOW_PROBED => self.capabilities.maximum_qos,
            _ => QoS::AtMostOnce,
        }
    }

    /// How long the retained link has to be quiet before a fetch is over: four times
    /// as long as the probe's took, because the broker may have more retained messages to search
    /// than it had then.
    pub(crate) fn fetch_quiet(&self) -> Duration {
        match self.quirks.retained_within {
            Some(ms) => {
                (Duration::from_millis(ms.into()) * 4).clamp(FETCH_QUIET_MIN, FETCH_QUIET_MAX)
            }
            None => FETCH_QUIET_UNSEEN,
        }
    }

    /// Whether clients are granted shared subscriptions.
    pub(crate) fn grants_shared(&self) -> bool {
        match self.quirks.shared {
            SharedSubscriptions::Alive => true,
            SharedSubscriptions::Assumed => self.source == Source::Connack,
            SharedSubscriptions::Dead | SharedSubscriptions::Refused => false,
        }
    }

    /// Whether live messages can be trusted to keep their RETAIN flag.
    pub(crate) fn keeps_retain(&self) -> bool {
        let v5 = self.capabilities.version == Version::V5;
        let quirks = &self.quirks;
        match self.source {
            Source::Connack => v5,
            // A broker that replays retained messages in spite of Retain Handling 2 would mix
            // them with live ones.
            _ => {
                v5 && quirks.retain_as_published == Some(true)
                    && quirks.retain_handling != Some(false)
            }
        }
    }

    /// Whether a second SUBSCRIBE can raise the QoS of a filter. If the broker keeps the old
    /// subscription too, identifiers tell the copies apart; without them, clients would get both.
    pub(crate) fn replaces(&self) -> bool {
        match self.quirks.replaces {
            Some(replaces) => replaces,
            None => self.source == Source::Connack || self.quirks.identifiers.usable(),
        }
    }

    /// Whether user properties reach the broker's subscribers.
    pub(crate) fn keeps_properties(&self) -> bool {
        self.capabilities.version == Version::V5 && self.quirks.properties != Some(false)
    }

    /// Filters in one SUBSCRIBE or UNSUBSCRIBE.
    pub(crate) fn filters_in_packet(&self) -> usize {
        match self.software {
            Some(_) => FILTERS_IN_PACKET_NAMED,
            None => FILTERS_IN_PACKET,
        }
    }

    /// How arriving messages are mapped to filters.
    pub(crate) fn mapping(&self) -> Mapping {
        match self.quirks.identifiers.usable() {
            true => Mapping::Identifiers,
            false => Mapping::DisjointPlacement,
        }
    }
}

fn version_name<S: Serializer>(version: &Version, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(version.name())
}

fn qos_number<S: Serializer>(qos: &QoS, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u8(*qos as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_does_not_name_itself_gets_few_filters_in_a_packet() {
        let capabilities = Capabilities::of(Version::V5, &Connack::default());
        let mut profile = BrokerProfile::unseen(&capabilities, Source::Probed);
        assert_eq!(profile.filters_in_packet(), 8, "AWS IoT Core takes no more");
        profile.software = Some("mosquitto version 2.0.11".to_owned());
        assert_eq!(profile.filters_in_packet(), 64);
    }
}
