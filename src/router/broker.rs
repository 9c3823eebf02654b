//! The properties of the broker that the router acts on, and holds clients to.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::mqtt::QoS;

/// The part of the broker's profile that the router acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerFeatures {
    /// Subscription Identifiers are available.
    pub identifiers: bool,
    /// User properties reach the broker's subscribers.
    pub properties: bool,
    /// Live messages keep RETAIN.
    pub keeps_retain: bool,
    /// Shared subscriptions work.
    pub shared: bool,
    /// A second SUBSCRIBE for a filter replaces the first [MQTT-3.8.4-3]. Where it does not, filters
    /// are subscribed at the Maximum QoS from the start.
    pub replaces: bool,
    /// Maximum QoS.
    pub maximum_qos: QoS,
    /// Retain Available.
    pub retain_available: bool,
    /// Maximum Packet Size, bytes; `None` if the broker has none.
    pub packet_max: Option<u32>,
}

/// The topics of the probes of this process that run now. A client that names such a topic is this
/// process itself: one of `upstream.servers` leads back to a listener.
#[derive(Debug, Default)]
pub(super) struct OwnProbes(Mutex<Vec<OwnProbe>>);

#[derive(Debug)]
struct OwnProbe {
    topic: Box<str>,
    /// It came back.
    returned: bool,
}

impl OwnProbes {
    /// A probe below `topic` begins; nobody else can know the topic.
    pub(super) fn begin(&self, topic: &str) {
        self.0.lock().push(OwnProbe {
            topic: topic.into(),
            returned: false,
        });
    }

    /// A client names `topic`. Returns whether it is a probe of this process, and notes it.
    pub(super) fn came(&self, topic: &str) -> bool {
        let mut probes = self.0.lock();
        let own = |probe: &&mut OwnProbe| topic.contains(&*probe.topic);
        let Some(probe) = probes.iter_mut().find(own) else {
            return false;
        };
        probe.returned = true;
        true
    }

    /// The probe below `topic` is over. Returns whether it came back to this process.
    pub(super) fn end(&self, topic: &str) -> bool {
        let mut probes = self.0.lock();
        let Some(at) = probes.iter().position(|probe| *probe.topic == *topic) else {
            return false;
        };
        probes.swap_remove(at).returned
    }
}

/// The limits that clients are held to, as the broker's last CONNACK has them.
#[derive(Debug)]
pub(super) struct BrokerLimits {
    maximum_qos: AtomicU8,
    retain_available: AtomicBool,
    /// Bytes; `u32::MAX`, more than the largest packet, stands for unlimited.
    packet_max: AtomicU32,
    keeps_retain: AtomicBool,
    properties: AtomicBool,
    shared: AtomicBool,
}

impl BrokerLimits {
    /// No limits, until the broker has been connected to.
    pub(super) fn new() -> Self {
        Self {
            maximum_qos: AtomicU8::new(QoS::ExactlyOnce as u8),
            retain_available: AtomicBool::new(true),
            packet_max: AtomicU32::new(u32::MAX),
            keeps_retain: AtomicBool::new(true),
            properties: AtomicBool::new(true),
            shared: AtomicBool::new(true),
        }
    }

    /// Takes over the properties of the broker. Returns whether live messages kept RETAIN before.
    pub(super) fn set(&self, features: &BrokerFeatures) -> bool {
        let order = Ordering::Relaxed;
        self.maximum_qos.store(features.maximum_qos as u8, order);
        self.retain_available
            .store(features.retain_available, order);
        let packet_max = features.packet_max.unwrap_or(u32::MAX);
        self.packet_max.store(packet_max, order);
        self.properties.store(features.properties, order);
        self.shared.store(features.shared, order);
        self.keeps_retain.swap(features.keeps_retain, order)
    }

    /// Whether live messages kept RETAIN when an earlier process ended.
    pub(super) fn restore(&self, keeps_retain: bool) {
        self.keeps_retain.store(keeps_retain, Ordering::Relaxed);
    }

    /// The largest QoS that the broker accepts.
    pub(super) fn maximum_qos(&self) -> QoS {
        QoS::from_u8(self.maximum_qos.load(Ordering::Relaxed)).unwrap_or(QoS::ExactlyOnce)
    }

    /// Whether the broker keeps retained messages.
    pub(super) fn retain_available(&self) -> bool {
        self.retain_available.load(Ordering::Relaxed)
    }

    /// The largest packet that the broker accepts, bytes.
    pub(super) fn packet_max(&self) -> u32 {
        self.packet_max.load(Ordering::Relaxed)
    }

    /// Whether live messages keep their RETAIN (MQTT 5 with Retain As Published).
    pub(super) fn keeps_retain(&self) -> bool {
        self.keeps_retain.load(Ordering::Relaxed)
    }

    /// Whether user properties reach the broker's subscribers, so that No Local can be marked.
    pub(super) fn properties(&self) -> bool {
        self.properties.load(Ordering::Relaxed)
    }

    /// Whether the broker's shared subscriptions work.
    pub(super) fn shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }
}
