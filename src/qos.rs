//! Quality of service: of packets, and a label of metrics.

/// Quality of service (MQTT 5 §4.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum QoS {
    /// No acknowledgement.
    #[default]
    AtMostOnce = 0,
    /// PUBACK.
    AtLeastOnce = 1,
    /// PUBREC, PUBREL, PUBCOMP.
    ExactlyOnce = 2,
}

impl QoS {
    /// None above 2.
    pub const fn from_u8(value: u8) -> Option<QoS> {
        match value {
            0 => Some(QoS::AtMostOnce),
            1 => Some(QoS::AtLeastOnce),
            2 => Some(QoS::ExactlyOnce),
            _ => None,
        }
    }
}
