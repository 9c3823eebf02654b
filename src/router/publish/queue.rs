//! Publishes that wait for one P link: a lane for each client, served in deficit round robin.
//!
//! One client's publishes leave in order; a flooding neighbour takes no more than its share of
//! the link's window.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use crate::mqtt::Message;
use crate::session::{Incarnation, Token};

use crate::router::types::SessionRef;

/// Bytes a lane may send in one turn.
const QUANTUM: usize = 8 * 1024;

/// One publish on its way to the core.
#[derive(Debug)]
pub struct Outgoing {
    /// Whose it is.
    pub session: SessionRef,
    /// Names it in the answer; none: nobody waits.
    pub token: Option<Token>,
    /// What to publish.
    pub message: Message,
    /// The origin mark that it carries to the broker, for No Local.
    pub origin_mark: Option<Incarnation>,
    /// When it was handed over, milliseconds.
    pub since: u64,
}

/// The lanes of one P link.
#[derive(Debug, Default)]
pub struct Lanes {
    lanes: HashMap<SessionRef, Lane, RandomState>,
    active: VecDeque<SessionRef>,
    messages: usize,
}

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Outgoing>,
    bytes: usize,
    deficit: usize,
}

impl Lanes {
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
        self.lanes.get(&session).map_or(0, |l| l.bytes)
    }

    /// Adds a publish at the end of its client's lane.
    pub fn push(&mut self, outgoing: Outgoing) {
        let lane = self.lanes.entry(outgoing.session).or_default();
        if lane.queue.is_empty() {
            self.active.push_back(outgoing.session);
        }
        lane.bytes += outgoing.message.size();
        lane.queue.push_back(outgoing);
        self.messages += 1;
    }

    /// The publish whose turn it is.
    pub fn pop(&mut self) -> Option<Outgoing> {
        loop {
            let session = *self.active.front()?;
            let Some(lane) = self.lanes.get_mut(&session) else {
                self.active.pop_front();
                continue;
            };
            let Some(cost) = lane.queue.front().map(|o| o.message.size()) else {
                self.active.pop_front();
                self.lanes.remove(&session);
                continue;
            };
            if lane.deficit < cost {
                lane.deficit += QUANTUM;
                self.active.rotate_left(1);
                if self.active.len() > 1 || lane.deficit < cost {
                    continue;
                }
            }
            lane.deficit = lane.deficit.saturating_sub(cost);
            let outgoing = lane.queue.pop_front()?;
            lane.bytes -= cost;
            self.messages -= 1;
            if lane.queue.is_empty() {
                self.lanes.remove(&session);
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
                expires_at: u64::MAX,
                strip_key: None,
                account: None,
            }),
            origin_mark: None,
            since: 0,
        }
    }

    #[test]
    fn a_lane_is_first_in_first_out() {
        let mut lanes = Lanes::default();
        for n in 0..10u8 {
            lanes.push(outgoing(1, &[n]));
        }
        for n in 0..10u8 {
            assert_eq!(lanes.pop().map(|o| o.message.payload()[0]), Some(n));
        }
        assert!(lanes.pop().is_none() && lanes.is_empty());
    }

    #[test]
    fn a_flood_leaves_its_neighbours_their_turn() {
        let mut lanes = Lanes::default();
        let big = vec![0u8; 4096];
        for _ in 0..1000 {
            lanes.push(outgoing(1, &big));
        }
        for _ in 0..10 {
            lanes.push(outgoing(2, b"x"));
        }
        let mut before = 0;
        let mut small = 0;
        while small < 10 {
            match lanes.pop() {
                Some(o) if o.session.slot == 2 => small += 1,
                Some(_) => before += 1,
                None => break,
            }
        }
        assert!(
            before <= 8,
            "{before} of the flood went before its neighbour"
        );
        assert_eq!(lanes.len(), 1000 - before);
    }

    #[test]
    fn a_message_larger_than_the_quantum_still_leaves() {
        let mut lanes = Lanes::default();
        let big = vec![0u8; 100 * 1024];
        lanes.push(outgoing(1, &big));
        lanes.push(outgoing(2, &big));
        assert!(lanes.pop().is_some() && lanes.pop().is_some() && lanes.pop().is_none());
    }
}
