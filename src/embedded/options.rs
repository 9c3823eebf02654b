//! The limits of an embedded broker.

use crate::mqtt::QoS;

use crate::embedded::quirks::Quirks;

/// Limits of an embedded broker. The default is a well-behaved MQTT 5 broker.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// How it departs from a plain broker.
    #[cfg(feature = "sim")]
    pub quirks: Quirks,
    /// Largest packet that is accepted, in bytes with its fixed header; CONNACK announces it.
    /// `None`: what the protocol allows, not announced.
    pub max_packet: Option<u32>,
    /// Maximum QoS; CONNACK announces it if it is below 2.
    pub max_qos: QoS,
    /// False: CONNACK says Retain Available 0, and a retained PUBLISH is answered with 0x9A.
    pub retain_available: bool,
    /// Topic Alias Maximum of CONNACK.
    pub topic_alias_max: u16,
    /// Bytes of all messages together, in queues, in flight and retained, and of the queues' entries. A
    /// message for several sessions counts once. Beyond it, the session with the most bytes in its
    /// queue loses the oldest of them.
    pub memory_max_bytes: u64,
    /// Messages in one session's queue. Beyond it, its oldest message is dropped.
    pub queue_max: usize,
    /// Bytes in one session's queue. Beyond it, its oldest messages are dropped.
    pub queue_bytes_max: usize,
    /// Bytes in the retained store. Beyond it, a new message is not kept.
    pub retained_bytes_max: usize,
    /// Sessions. Beyond it, CONNECT is answered with 0x97.
    pub sessions_max: usize,
    /// Connections. Beyond it, a new one is closed at once.
    pub connections_max: usize,
}

impl EmbeddedOptions {
    /// A broker whose messages may have so many bytes, half of them retained.
    #[must_use]
    pub fn within(self, memory_max_bytes: u64) -> Self {
        let half = usize::try_from(memory_max_bytes / 2).unwrap_or(usize::MAX);
        Self {
            memory_max_bytes,
            retained_bytes_max: self.retained_bytes_max.min(half),
            ..self
        }
    }

    /// A broker with these quirks.
    #[cfg(feature = "sim")]
    pub fn with_quirks(quirks: &[crate::config::Quirk]) -> Self {
        Self {
            quirks: quirks.into(),
            ..Self::default()
        }
    }

    /// The quirks; none in a production build.
    pub(super) fn quirks(&self) -> &Quirks {
        #[cfg(feature = "sim")]
        return &self.quirks;
        #[cfg(not(feature = "sim"))]
        return &Quirks::NONE;
    }
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        EmbeddedOptions {
            #[cfg(feature = "sim")]
            quirks: Quirks::default(),
            max_packet: Some(16 * 1024 * 1024),
            max_qos: QoS::ExactlyOnce,
            retain_available: true,
            topic_alias_max: 10,
            memory_max_bytes: 512 * 1024 * 1024,
            queue_max: 1_000_000,
            queue_bytes_max: 512 * 1024 * 1024,
            retained_bytes_max: 512 * 1024 * 1024,
            sessions_max: 100_000,
            connections_max: 10_000,
        }
    }
}
