//! The last retained message of each topic.

use slab::Slab;

use crate::mqtt::Message;
use crate::time::Millis;
use crate::topics::FilterTrie;

/// Retained messages by topic (MQTT 5 §3.3.1.3).
#[derive(Default)]
pub(crate) struct Retained {
    /// Topics, stored as filters without wildcards: a filter overlaps them
    /// exactly if it matches them.
    topics: FilterTrie<u32>,
    messages: Slab<Message>,
    bytes: usize,
}

impl Retained {
    /// Keeps `message` in place of its topic's last one, or only removes that
    /// if the payload is empty [MQTT-3.3.1-6]. Whether there was room in
    /// `max` bytes; without room the old one goes too, because it is stale.
    pub(crate) fn set(&mut self, message: &Message, max: usize) -> bool {
        self.remove(message.topic());
        if message.payload().is_empty() {
            return true;
        }
        if self.bytes + message.size() > max {
            return false;
        }
        self.bytes += message.size();
        let at = self.messages.insert(message.clone());
        self.topics.insert(message.topic(), at as u32);
        true
    }

    /// The messages whose topics `filter` matches. Expired ones are removed
    /// on the way.
    pub(crate) fn matching(&mut self, filter: &str, now: Millis) -> Vec<Message> {
        let mut found = Vec::new();
        let mut expired = Vec::new();
        self.topics.overlaps_any(filter, |at| {
            let message = &self.messages[at as usize];
            if message.has_expired(now) {
                expired.push(message.clone());
            } else {
                found.push(message.clone());
            }
            false
        });
        for message in expired {
            self.remove(message.topic());
        }
        found
    }

    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(crate) fn clear(&mut self) {
        *self = Retained::default();
    }

    fn remove(&mut self, topic: &str) {
        if let Some(at) = self.topics.remove(topic) {
            let message = self.messages.remove(at as usize);
            self.bytes -= message.size();
        }
    }
}
