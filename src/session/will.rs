//! The Will Message of a session.

use crate::mqtt::Message;
use crate::time::{Deadline, Millis};

/// A will and the time of its publication [MQTT-3.1.2-8].
#[derive(Clone, Debug)]
pub struct Will {
    /// The message.
    pub message: Message,
    /// Will Delay Interval in seconds.
    pub delay: u32,
    /// Message Expiry Interval in seconds, counted from the publication.
    pub message_expiry: Option<u32>,
    /// When it is due; `None` while the client is connected.
    pub(super) due_at: Option<Deadline>,
}

impl Will {
    /// A will for a connection that lasts.
    pub fn new(message: Message, delay: u32, message_expiry: Option<u32>) -> Self {
        Self {
            message,
            delay,
            message_expiry,
            due_at: None,
        }
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + self.message.size()
    }

    /// The message as it is published at `now`.
    pub fn publish(self, now: Millis) -> Message {
        match self.message_expiry {
            None => self.message,
            Some(seconds) => {
                (self.message).expiring_at(Some(Deadline::after_seconds(now, seconds)))
            }
        }
    }
}
