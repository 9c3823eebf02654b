//! Whether the publishes of one publish link have arrived at the broker.
//!
//! Nobody acknowledges a publish of QoS 0, and a client's publishes are acknowledged to sessions that
//! may have ended since. But a broker answers a PINGREQ behind everything that the link wrote before
//! it. When a client wants to know, a *round* begins: the publishes that wait at this moment are
//! counted, and once none of them waits any more, the link sends a PINGREQ. With its answer the round
//! has passed: every publish that was handed over before the round has arrived.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::time::Millis;

use crate::router::publish::queue::PublishQueues;

/// The rounds of one publish link. Their PINGREQs are with the link's queues, under the same lock.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// The round that began last.
    begun: AtomicU32,
    /// The round that passed last.
    passed: AtomicU32,
    /// A client waits for the next round.
    asked: AtomicBool,
    /// A round is under way, or a PINGREQ is to be sent.
    busy: AtomicBool,
}

impl Arrivals {
    /// The round with which everything that was handed over until now has arrived.
    pub(super) fn next_round(&self) -> u32 {
        self.begun.load(Ordering::Acquire) + 1
    }

    /// Whether a round has passed.
    pub(super) fn has_passed(&self, round: u32) -> bool {
        self.passed.load(Ordering::Acquire) >= round
    }

    /// Asks for the next round.
    pub(super) fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Whether [`Arrivals::ping_due`] has anything to look at.
    pub(super) fn is_open(&self) -> bool {
        self.asked.load(Ordering::Relaxed) || self.busy.load(Ordering::Relaxed)
    }

    /// Whether the link is to send a PINGREQ now, behind everything that it took from its queues. If
    /// so, it counts as sent.
    pub(super) fn ping_due(&self, queues: &mut PublishQueues, now: Millis) -> bool {
        if queues.pings.may_begin(now) && self.asked.swap(false, Ordering::Relaxed) {
            queues.pings.begin(now);
            self.begun.store(queues.begin_round(), Ordering::Release);
        }
        let taken = queues.waiting_for_round() == 0;
        let due = queues.pings.send(taken);
        self.note(queues);
        due
    }

    /// The broker answered a PINGREQ of [`Arrivals::ping_due`]. Returns whether a new publish link
    /// waited for it.
    pub(super) fn ping_answered(&self, queues: &mut PublishQueues) -> bool {
        let answer = queues.pings.answered();
        if answer.passed {
            self.passed.store(queues.round(), Ordering::Release);
        }
        self.note(queues);
        answer.awaited
    }

    /// A new publish link waits until everything that this link took from its queues has arrived.
    pub(super) fn await_ping(&self, queues: &mut PublishQueues) {
        queues.pings.await_next();
        self.note(queues);
    }

    /// The link's connection is lost, and answers with it.
    pub(super) fn connection_lost(&self, queues: &mut PublishQueues) {
        queues.pings.connection_lost();
        self.note(queues);
    }

    fn note(&self, queues: &PublishQueues) {
        self.busy.store(queues.pings.is_busy(), Ordering::Relaxed);
    }
}
