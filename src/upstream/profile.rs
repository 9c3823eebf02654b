//! What a core does where the standard leaves room, or where it errs: the record of a probe.

pub(in crate::upstream) mod cache;
pub(crate) mod probe;

use std::fmt;

use serde::Serialize;

use crate::mqtt::QoS;

/// How the record came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The core was probed.
    Probed,
    /// The core refused a part of the probe, or was too slow: what was not seen is assumed to be
    /// at its worst.
    Partly,
    /// The probe is turned off: what CONNACK says is believed.
    Connack,
}

/// What a client gets whose filters overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Copies {
    /// One copy for each filter.
    Many,
    /// One copy.
    One,
}

/// Subscription Identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Identifiers {
    /// Each copy carries those of its filters.
    Working,
    /// Not seen, but CONNACK does not deny them.
    Assumed,
    /// None: MQTT 3.1.1, or CONNACK says so.
    None,
    /// Offered, but missing or wrong.
    Broken,
}

impl Identifiers {
    /// Whether arriving messages can be told apart by them.
    pub fn usable(self) -> bool {
        matches!(self, Self::Working | Self::Assumed)
    }
}

/// Shared subscriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedSubscriptions {
    /// A message came.
    Alive,
    /// Granted, and nothing came.
    Dead,
    /// Refused, by CONNACK or SUBACK.
    Refused,
    /// Not probed; CONNACK does not deny them.
    Assumed,
}

/// The QoS of copies for overlapping filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OverlapQos {
    /// Each copy has its filter's.
    Each,
    /// The one copy has the highest, as [MQTT-3.3.4-2] asks.
    Highest,
    /// The one copy has less: QoS 1 may be lost.
    Lower,
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerProfile {
    /// How it came about.
    pub source: Source,
    /// `5` or `3.1.1`.
    pub protocol: &'static str,
    /// What the core says it is, where it does (`$SYS/broker/version`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub software: Option<String>,
    /// Copies on overlap; `None`: not seen.
    pub copies: Option<Copies>,
    /// Their QoS; `None`: not seen.
    pub overlap_qos: Option<OverlapQos>,
    /// A second SUBSCRIBE for a filter, at another QoS, replaces the first; `None`: not seen.
    pub replaces: Option<bool>,
    /// Subscription Identifiers.
    pub identifiers: Identifiers,
    /// Retain Handling 2 keeps a subscription from bringing retained messages; `None`: not seen.
    pub retain_handling: Option<bool>,
    /// Live messages keep their RETAIN; `None`: not seen.
    pub retain_as_published: Option<bool>,
    /// Retained messages come for filters with wildcards; `None`: not seen.
    pub retained_wildcard: Option<bool>,
    /// A PINGREQ behind a SUBSCRIBE is answered behind its retained messages; `None`: not seen.
    pub retained_marker: Option<bool>,
    /// Milliseconds until all of the retained messages of a SUBSCRIBE had come; `None`: not seen.
    pub retained_within: Option<u32>,
    /// Shared subscriptions.
    pub shared: SharedSubscriptions,
    /// User properties arrive unchanged, in order; `None`: not seen.
    pub properties: Option<bool>,
    /// Messages that the core sends unacknowledged; `WINDOW_PROBED`: that many or more. `None`:
    /// not seen.
    pub window: Option<u16>,
    /// Receive Maximum of CONNACK: messages that it takes unacknowledged.
    pub receive_maximum: u16,
    /// Maximum QoS.
    pub maximum_qos: u8,
    /// Maximum Packet Size, bytes; `None`: not limited.
    pub maximum_packet_size: Option<u32>,
    /// Retain Available.
    pub retain_available: bool,
    /// What was refused or did not come in time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

/// Messages sent to see the core's window.
pub const WINDOW_PROBED: u16 = 64;

/// What CONNACK alone says, and the worst of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// MQTT 5.
    pub version_5: bool,
    /// Subscription Identifiers are not denied.
    pub identifiers: bool,
    /// Shared subscriptions are not denied.
    pub shared: bool,
    /// Receive Maximum.
    pub receive_maximum: u16,
    /// Maximum QoS.
    pub maximum_qos: u8,
    /// Maximum Packet Size.
    pub maximum_packet_size: Option<u32>,
    /// Retain Available.
    pub retain_available: bool,
}

/// How long the R link is quiet before a fetch ends, milliseconds: at least, where no retained message
/// was seen, and at most.
const FETCH_QUIET: u64 = 100;
const FETCH_QUIET_UNSEEN: u64 = 500;
const FETCH_QUIET_MAX: u64 = 4000;

impl BrokerProfile {
    /// The QoS at which retained messages are fetched. What does not fit into a small window of the
    /// core may be cut off; at QoS 0 nothing is, but the stored QoS is not seen.
    pub fn fetch_qos(&self) -> QoS {
        match self.window {
            Some(window) if window >= WINDOW_PROBED => {
                QoS::from_u8(self.maximum_qos).unwrap_or_default()
            }
            _ => QoS::AtMostOnce,
        }
    }

    /// How long to wait, in milliseconds, before a fetch that brings nothing more is over: four times
    /// what the probe saw, for the core has more to look through than then.
    pub fn fetch_quiet(&self) -> u64 {
        match self.retained_within {
            Some(ms) => (u64::from(ms) * 4).clamp(FETCH_QUIET, FETCH_QUIET_MAX),
            None => FETCH_QUIET_UNSEEN,
        }
    }

    /// Nothing seen yet.
    pub fn unseen(capabilities: &Capabilities, source: Source) -> Self {
        Self {
            source,
            protocol: if capabilities.version_5 { "5" } else { "3.1.1" },
            software: None,
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
            window: None,
            receive_maximum: capabilities.receive_maximum,
            maximum_qos: capabilities.maximum_qos,
            maximum_packet_size: capabilities.maximum_packet_size,
            retain_available: capabilities.retain_available,
            missing: Vec::new(),
        }
    }

    /// Whether clients are granted shared subscriptions.
    pub fn shares(&self) -> bool {
        match self.shared {
            SharedSubscriptions::Alive => true,
            SharedSubscriptions::Assumed => self.source == Source::Connack,
            SharedSubscriptions::Dead | SharedSubscriptions::Refused => false,
        }
    }

    /// Whether live messages can be trusted to keep their RETAIN.
    pub fn keeps_retain(&self) -> bool {
        let v5 = self.protocol == "5";
        match self.source {
            Source::Connack => v5,
            // A broker whose replays cannot be kept off would mix them with live messages.
            _ => {
                v5 && self.retain_as_published == Some(true) && self.retain_handling != Some(false)
            }
        }
    }

    /// Whether the QoS of a filter that is held can be raised. Identifiers tell the copies of one
    /// that was not replaced; without them they would reach clients twice.
    pub fn replaces(&self) -> bool {
        match self.replaces {
            Some(replaces) => replaces,
            None => self.source == Source::Connack || self.identifiers.usable(),
        }
    }

    /// Whether user properties reach the core's subscribers.
    pub fn keeps_properties(&self) -> bool {
        self.protocol == "5" && self.properties != Some(false)
    }

    /// In which way arriving messages are mapped to filters: `ids` or `colour`.
    pub fn mapping(&self) -> &'static str {
        match self.identifiers.usable() {
            true => "ids",
            false => "colour",
        }
    }

    /// Settings of the core that are worth raising, and what is lost without.
    pub fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let software = self.software.as_deref().unwrap_or("").to_lowercase();
        let mosquitto = software.contains("mosquitto");
        let mut add = |text: &str| advice.push(text.to_owned());
        if self.window.is_some_and(|w| w < WINDOW_PROBED) {
            match (mosquitto, self.protocol) {
                (true, _) => add(
                    "max_inflight_messages 65535 (mosquitto.conf): the core sends few messages at a time, and drops what does not fit its queue",
                ),
                _ => add(
                    "the core's send window is small; raise it: mosquitto max_inflight_messages 65535, EMQX mqtt.max_inflight 65535, RabbitMQ mqtt.prefetch 1000, VerneMQ max_inflight_messages 0",
                ),
            }
        }
        if mosquitto || self.software.is_none() {
            add(
                "mosquitto: max_queued_messages 0 and max_queued_bytes 0 (or ample): what does not fit the queue of a link is dropped though its publisher was acknowledged",
            );
            add(
                "mosquitto: persistence true, and persistent_client_expiration at least 1h: a restart then keeps the links' sessions",
            );
            add("mosquitto: set_tcp_nodelay true: lower latency under light load");
        }
        if self.software.is_none() {
            add("EMQX: mqtt.max_mqueue_len infinity, mqtt.session_expiry_interval at least 1h");
            add(
                "HiveMQ: mqtt.queued-messages above 1000; VerneMQ: max_online_messages -1, max_offline_messages -1, topic_max_depth",
            );
            add(
                "RabbitMQ: mqtt.prefetch 1000; no shared subscriptions, no retained messages for wildcards, QoS 2 becomes 1",
            );
            add("AWS IoT Core: upstream.roots, for 50 filters a connection; QoS 2 does not exist");
        }
        if self.receive_maximum < 100 {
            add(&format!(
                "the core takes {} unacknowledged publishes a connection; upstream.publish_links multiplies it",
                self.receive_maximum
            ));
        }
        if self.identifiers == Identifiers::None || self.identifiers == Identifiers::Broken {
            add(
                "without working Subscription Identifiers overlapping filters need links of their own: upstream.data_links 4 to 8, or upstream.roots",
            );
        }
        advice
    }
}

fn seen(value: Option<bool>) -> &'static str {
    match value {
        Some(true) => "yes",
        Some(false) => "no",
        None => "not seen",
    }
}

impl fmt::Display for BrokerProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &str| writeln!(f, "{name:<24} {value}");
        let word = |v: &dyn fmt::Debug| format!("{v:?}").to_lowercase();
        line("software", self.software.as_deref().unwrap_or("not said"))?;
        line("protocol", self.protocol)?;
        line("identifiers", &word(&self.identifiers))?;
        line("mapping", self.mapping())?;
        match self.copies {
            Some(copies) => line("copies on overlap", &word(&copies))?,
            None => line("copies on overlap", "not seen")?,
        }
        match self.overlap_qos {
            Some(qos) => line("QoS on overlap", &word(&qos))?,
            None => line("QoS on overlap", "not seen")?,
        }
        line("resubscribe replaces", seen(self.replaces))?;
        line("retain handling", seen(self.retain_handling))?;
        line("retain as published", seen(self.retain_as_published))?;
        line("retained for wildcards", seen(self.retained_wildcard))?;
        line("retained end marker", seen(self.retained_marker))?;
        match self.retained_within {
            Some(ms) => line("retained came within", &format!("{ms} ms"))?,
            None => line("retained came within", "not seen")?,
        }
        line("shared subscriptions", &word(&self.shared))?;
        line("user properties", seen(self.properties))?;
        match self.window {
            Some(w) if w >= WINDOW_PROBED => line("send window", &format!("{w} or more"))?,
            Some(w) => line("send window", &w.to_string())?,
            None => line("send window", "not seen")?,
        }
        line("receive maximum", &self.receive_maximum.to_string())?;
        line("maximum QoS", &self.maximum_qos.to_string())?;
        match self.maximum_packet_size {
            Some(size) => line("maximum packet", &format!("{size} bytes"))?,
            None => line("maximum packet", "not limited")?,
        }
        line("retained messages", seen(Some(self.retain_available)))?;
        for missing in &self.missing {
            line("missing", missing)?;
        }
        Ok(())
    }
}
