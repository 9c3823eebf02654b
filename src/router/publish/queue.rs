//! Publishes that wait for one publish link: a queue for each client, served in deficit round robin.
//!
//! One client's publishes leave in order; a flooding neighbour takes no more than its share of
//! the link's window.

use std::collections::VecDeque;

use crate::hashing::{Entry, LookUp, LookUpSet};
use crate::mqtt::{Message, QoS};
use crate::session::{Incarnation, Token};
use crate::time::Millis;

use crate::router::publish::ClientPublish;
use crate::router::publish::pings::Pings;
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
    /// The round of its link that had begun when it was handed over.
    round: u32,
}

impl Outgoing {
    /// A publish that a client hands over now.
    pub(in crate::router) fn new(session: SessionRef, publish: ClientPublish, now: Millis) -> Self {
        Self {
            session,
            token: publish.token,
            message: publish.message,
            origin_mark: publish.origin_mark,
            since: now,
            round: 0,
        }
    }
}

/// The publish queues of one publish link.
#[derive(Debug, Default)]
pub struct PublishQueues {
    /// By publisher; none is empty.
    queues: LookUp<SessionRef, PublishQueue>,
    active: VecDeque<SessionRef>,
    messages: usize,
    /// The round that began last.
    round: u32,
    /// Publishes that waited when it began, and wait still.
    waiting_for_round: usize,
    pub(super) pings: Pings,
    /// Clients whose publishes are sent one at a time; nearly always none.
    suspects: LookUpSet<SessionRef>,
    /// Those of them that have publishes, in turn.
    suspects_active: VecDeque<SessionRef>,
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

    /// Begins a round with the publishes that wait now; none waits for an earlier one. Returns its
    /// number.
    pub(super) fn begin_round(&mut self) -> u32 {
        debug_assert_eq!(self.waiting_for_round, 0, "one round at a time");
        self.round += 1;
        self.waiting_for_round = self.messages;
        self.round
    }

    /// The round that began last.
    pub(super) fn round(&self) -> u32 {
        self.round
    }

    /// Publishes that waited when the last round began, and wait still.
    pub(super) fn waiting_for_round(&self) -> usize {
        self.waiting_for_round
    }

    /// Adds a publish at the end of its client's queue.
    pub fn push(&mut self, mut outgoing: Outgoing) {
        outgoing.round = self.round;
        let queue = self.queues.entry(outgoing.session).or_default();
        if queue.publishes.is_empty() {
            let suspect = !self.suspects.is_empty() && self.suspects.contains(&outgoing.session);
            match suspect {
                true => self.suspects_active.push_back(outgoing.session),
                false => self.active.push_back(outgoing.session),
            }
        }
        queue.bytes += outgoing.message.size();
        queue.publishes.push_back(outgoing);
        self.messages += 1;
    }

    /// The publish whose turn it is, of a client that is not a suspect.
    pub fn pop(&mut self) -> Option<Outgoing> {
        loop {
            let session = *self.active.front()?;
            let Entry::Occupied(mut entry) = self.queues.entry(session) else {
                self.active.pop_front();
                continue;
            };
            let queue = entry.get_mut();
            let Some(cost) = queue.publishes.front().map(|o| o.message.size()) else {
                self.active.pop_front();
                entry.remove();
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
            self.waiting_for_round -= usize::from(outgoing.round != self.round);
            if queue.publishes.is_empty() {
                entry.remove();
                if self.active.front() == Some(&session) {
                    self.active.pop_front();
                } else {
                    self.active.retain(|s| *s != session);
                }
            }
            return Some(outgoing);
        }
    }

    /// [`PublishQueues::pop`], where each client sends one publish in its turn.
    pub fn pop_one_each(&mut self) -> Option<Outgoing> {
        let outgoing = self.pop()?;
        if self.active.front() == Some(&outgoing.session) {
            self.active.rotate_left(1);
        }
        Some(outgoing)
    }

    /// From now on, [`PublishQueues::pop_suspect`] alone gives this client's publishes.
    pub fn suspect(&mut self, session: SessionRef) {
        if self.suspects.insert(session) && self.queues.contains_key(&session) {
            self.active.retain(|s| *s != session);
            self.suspects_active.push_back(session);
        }
    }

    /// Lifts the suspicion of a client.
    pub fn trust(&mut self, session: SessionRef) {
        if self.suspects.remove(&session) && self.queues.contains_key(&session) {
            self.suspects_active.retain(|s| *s != session);
            self.active.push_back(session);
        }
    }

    /// Whether a suspect for which `may` is true has a publish.
    pub fn has_suspect(&self, mut may: impl FnMut(SessionRef) -> bool) -> bool {
        self.suspects_active.iter().any(|session| may(*session))
    }

    /// The next publish of a suspect for which `may` is true.
    pub fn pop_suspect(&mut self, mut may: impl FnMut(SessionRef) -> bool) -> Option<Outgoing> {
        let at = self.suspects_active.iter().position(|s| may(*s))?;
        let session = self.suspects_active.remove(at)?;
        let queue = self.queues.get_mut(&session)?;
        let outgoing = queue.publishes.pop_front()?;
        queue.bytes -= outgoing.message.size();
        self.messages -= 1;
        self.waiting_for_round -= usize::from(outgoing.round != self.round);
        match queue.publishes.is_empty() {
            true => drop(self.queues.remove(&session)),
            false => self.suspects_active.push_back(session),
        }
        Some(outgoing)
    }

    /// Drops a client's QoS 0 publishes. Returns how many there were.
    pub fn drop_qos0(&mut self, session: SessionRef) -> usize {
        let Some(queue) = self.queues.get_mut(&session) else {
            return 0;
        };
        let before = queue.publishes.len();
        let (round, waiting) = (self.round, &mut self.waiting_for_round);
        queue.publishes.retain(|o| {
            let kept = o.message.qos() > QoS::AtMostOnce || o.token.is_some();
            *waiting -= usize::from(!kept && o.round != round);
            kept
        });
        queue.bytes = queue.publishes.iter().map(|o| o.message.size()).sum();
        let dropped = before - queue.publishes.len();
        self.messages -= dropped;
        if queue.publishes.is_empty() {
            self.queues.remove(&session);
            self.active.retain(|s| *s != session);
            self.suspects_active.retain(|s| *s != session);
        }
        dropped
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
            round: 0,
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
    fn suspects_are_served_apart() {
        let mut queues = PublishQueues::default();
        for n in 0..4u8 {
            queues.push(outgoing(u32::from(n % 2), &[n]));
        }
        let session = outgoing(0, b"").session;
        queues.suspect(session);
        queues.push(outgoing(0, &[4]));
        let of = |o: Option<Outgoing>| o.map(|o| o.message.payload()[0]);
        assert_eq!([(); 3].map(|()| of(queues.pop())), [Some(1), Some(3), None]);
        assert!(!queues.has_suspect(|_| false) && queues.pop_suspect(|_| false).is_none());
        assert_eq!(of(queues.pop_suspect(|s| s == session)), Some(0));
        queues.trust(session);
        assert!(!queues.has_suspect(|_| true));
        assert_eq!(of(queues.pop()), Some(2));
        assert_eq!(queues.drop_qos0(session), 1);
        assert!(queues.is_empty() && queues.pop().is_none());
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
