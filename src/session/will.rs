//! The Will Message of a session.

use crate::mqtt::Message;

/// A will and when it goes out [MQTT-3.1.2-8].
#[derive(Clone, Debug)]
pub struct Will {
    /// What to publish.
    pub message: Message,
    /// Will Delay Interval in seconds.
    pub delay: u32,
    /// When it is due; `u64::MAX` while the client is connected.
    pub due_at: u64,
}

impl Will {
    /// A will that waits for its connection's end.
    pub fn new(message: Message, delay: u32) -> Self {
        Self {
            message,
            delay,
            due_at: u64::MAX,
        }
    }
}
