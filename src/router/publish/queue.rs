//! Publishes that wait for one publish link: a queue for each client, served in deficit round robin.
//!
//! One client's publishes leave in order; a flooding neighbour takes no more than its share of
//! the link's window.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use crate::mqtt::Message;
use crate::session::{Incarnation, Token};
use crate::time::Millis;

use crate::router::publish::ClientPublish;
use crate::router::types::SessionRef;

/// Bytes that a queue may send in one turn.
const QUANTUM_BYTES: usize = 8 * 1024;

/// One publish on its way to the broker.
#[derive(Debug)]
pub struct Outgoing {
    /// The publisher.
    pub session: SessionRef,
    /// Names the publish in the answer; `None` if nobody waits for one.
    pub token: Option<Token>,
    /// The message to publish.
    pub message: Message,
    /// The origin mark that the message is to carry for No Local.
    pub origin_mark: Option<Incarnation>,
    /// When the client handed it over.
    pub since: Millis,
}

impl Outgoing {
    /// A publish that a client hands over now.
    pub(in crate::router) fn of_client(
        session: SessionRef,
        publish: ClientPublish,
        now: Millis,
    ) -> Self {
        Self {
            session,
            token: publish.token,
            message: publish.message,
            origin_mark: publish.origin_mark,
            since: now,
        }
    }
}

/// The publish queues of one publish link.
#[derive(Debug, Default)]
pub struct PublishQueues {
    /// By publisher; none is empty.
    queues: HashMap<SessionRef, PublishQueue, RandomState>,
    active: VecDeque<SessionRef>,
    messages: usize,
}

#[derive(Debug, Default)]
struct PublishQueue {
    publishes: VecDeque<Outgoing>,
    bytes: usize,
    deficit: usize,
}

impl PublishQueues {
    /// Publishes that wait.
    pub fn len(&self) -> usize {
        self.messages
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Bytes that wait for one client.
    pub fn bytes_of(&self, session: SessionRef) -> usize {
        self.queues.get(&session).map_or(0, |l| l.bytes)
    }

    /// Adds a publish at the end of its client's queue.
    pub fn push(&mut self, outgoing: Outgoing) {
        let queue = self.queues.entry(outgoing.session).or_default();
        if queue.publishes.is_empty() {
            self.active.push_back(outgoing.session);
        }
        queue.bytes += outgoing.message.size();
        queue.publishes.push_back(outgoing);
        self.messages += 1;
    }

    /// The publish whose turn it is.
    pub fn pop(&mut self) -> Option<Outgoing> {
        loop {
            let session = *self.active.front()?;
            let Some(queue) = self.queues.get_mut(&session) else {
                self.active.pop_front();
                continue;
            };
            let Some(cost) = queue.publishes.front().map(|o| o.message.size()) else {
                self.active.pop_front();
                self.queues.remove(&session);
                continue;
            };
            if queue.deficit < cost {
                queue.deficit += QUANTUM_BYTES;
                self.active.rotate_left(1);
                if self.active.len() > 1 || queue.deficit < cost {
                    continue;
                }
            }
            queue.deficit = queue.deficit.saturating_sub(cost);
            let outgoing = queue.publishes.pop_front()?;
            queue.bytes -= cost;
            self.messages -= 1;
            if queue.publishes.is_empty() {
                self.queues.remove(&session);
                if self.active.front() == Some(&session) {
                    self.active.pop_front();
                } else {
                    self.active.retain(|s| *s != session);
                }
            }
            return Some(outgoing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties, QoS};

    fn outgoing(slot: u32, payload: &[u8]) -> Outgoing {
        Outgoing {
            session: SessionRef {
                shard: 0,
                slot,
                slot_version: 1,
            },
            token: None,
            message: Message::new(&MessageSpec {
                topic: "t",
                properties: Properties::default(),
                payload,
                qos: QoS::AtMostOnce,
                retain: false,
                expires_at: None,
                strip_key: None,
                account: None,
            }),
            origin_mark: None,
            since: Millis::ZERO,
        }
    }

    #[test]
    fn a_publish_queue_is_first_in_first_out() {
        let mut queues = PublishQueues::default();
        for n in 0..10u8 {
            queues.push(outgoing(1, &[n]));
        }
        for n in 0..10u8 {
            assert_eq!(queues.pop().map(|o| o.message.payload()[0]), Some(n));
        }
        assert!(queues.pop().is_none() && queues.is_empty());
    }

    #[test]
    fn a_flood_leaves_its_neighbours_their_turn() {
        let mut queues = PublishQueues::default();
        let big = vec![0u8; 4096];
        for _ in 0..1000 {
            queues.push(outgoing(1, &big));
        }
        for _ in 0..10 {
            queues.push(outgoing(2, b"x"));
        }
        let mut before = 0;
        let mut small = 0;
        while small < 10 {
            match queues.pop() {
                Some(o) if o.session.slot == 2 => small += 1,
                Some(_) => before += 1,
                None => break,
            }
        }
        assert!(
            before <= 8,
            "{before} of the flood went before its neighbour"
        );
        assert_eq!(queues.len(), 1000 - before);
    }

    #[test]
    fn a_message_larger_than_the_quantum_still_leaves() {
        let mut queues = PublishQueues::default();
        let big = vec![0u8; 100 * 1024];
        queues.push(outgoing(1, &big));
        queues.push(outgoing(2, &big));
        assert!(queues.pop().is_some() && queues.pop().is_some() && queues.pop().is_none());
    }
}
