//! The PINGREQs that a publish link sends to learn what has arrived at the broker.

use std::time::Duration;

use crate::time::Millis;

/// The least time between the beginnings of two rounds: a client that never pauses asks for one
/// after the other.
const ROUND_INTERVAL: Duration = Duration::from_secs(1);

/// The PINGREQs of a publish link, which its rounds and a new publish link wait for.
#[derive(Debug, Default)]
pub(super) struct Pings {
    /// PINGREQs that were sent, but for PINGREQs that a lost connection left without an answer.
    sent: u32,
    /// PINGREQs that were answered.
    answered: u32,
    /// A PINGREQ is to be sent at once.
    due: bool,
    /// The round that is under way.
    round: Option<Round>,
    /// When the last round began.
    begun_at: Option<Millis>,
    /// The PINGREQ whose answer a new publish link waits for.
    awaited: Option<u32>,
}

/// A round that has begun and not passed.
#[derive(Debug, Default)]
struct Round {
    /// The PINGREQ behind its publishes, once it is sent.
    ends_with: Option<u32>,
}

/// The outcome of an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// The round has passed.
    pub passed: bool,
    /// A new publish link waited for this answer.
    pub awaited: bool,
}

impl Pings {
    /// Whether a round may begin now.
    pub(super) fn may_begin(&self, now: Millis) -> bool {
        let rested = |at: Millis| now >= at + ROUND_INTERVAL;
        self.round.is_none() && self.begun_at.is_none_or(rested)
    }

    /// A round begins.
    pub(super) fn begin(&mut self, now: Millis) {
        self.round = Some(Round::default());
        self.begun_at = Some(now);
    }

    /// Whether a PINGREQ is to be sent now. If so, it counts as sent. `taken`: the link has taken all
    /// publishes of the round from its queues.
    pub(super) fn send(&mut self, taken: bool) -> bool {
        let ending = self.round.as_mut();
        let ending = ending.filter(|r| taken && r.ends_with.is_none());
        let due = std::mem::take(&mut self.due) || ending.is_some();
        if due {
            self.sent += 1;
            if let Some(round) = ending {
                round.ends_with = Some(self.sent);
            }
        }
        due
    }

    /// The broker answered the PINGREQ that was sent first of those without an answer.
    pub(super) fn answered(&mut self) -> Answer {
        self.answered += 1;
        let answered = self.answered;
        let is_over = |r: &mut Round| r.ends_with.is_some_and(|last| last <= answered);
        Answer {
            passed: self.round.take_if(is_over).is_some(),
            awaited: self.awaited.take_if(|ping| *ping <= answered).is_some(),
        }
    }

    /// A new publish link waits for a PINGREQ that is sent from now on.
    pub(super) fn await_next(&mut self) {
        self.due = true;
        self.awaited = Some(self.sent + 1);
    }

    /// Whether a new publish link waits for an answer.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// The link's connection is lost: PINGREQs without an answer are to be sent again on the next
    /// one, behind the publishes that are sent again.
    pub(super) fn connection_lost(&mut self) {
        self.sent = self.answered;
        if let Some(round) = &mut self.round {
            round.ends_with = None;
        }
        if self.awaited.is_some() {
            self.await_next();
        }
    }

    /// Whether [`Pings::send`] may have something to do.
    pub(super) fn is_busy(&self) -> bool {
        self.due || self.round.is_some()
    }
}
