//! The log of a broker that is away: all links notice it, and one line is enough for all.

use std::time::Duration;

use parking_lot::Mutex;

use crate::telemetry::{Label, LinkDownReason};
use crate::time::Millis;

/// While the broker is away, this often a line says that it still is.
const REMIND_EVERY: Duration = Duration::from_secs(60);
/// Links that end within this span for the same reason end for the same cause.
const ENDS_TOGETHER: Duration = Duration::from_secs(1);

/// What all links have logged about the broker's absence.
#[derive(Debug, Default)]
pub(super) struct OutageLog {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Attempts since a link was last connected.
    attempts: u64,
    /// For each reason: when it was last given for an attempt that failed while no link was up.
    failed: Vec<(LinkDownReason, Millis)>,
    /// For each reason: when the first of the links that end together has ended.
    ended: Vec<(LinkDownReason, Millis)>,
    /// Ends that were not logged since the last that was.
    suppressed: u64,
}

impl OutageLog {
    /// An attempt failed while no link was connected. Returns the number of attempts so far if it is
    /// to be logged: the first of its reason, and one in a minute.
    pub(super) fn failed(&self, reason: LinkDownReason, now: Millis) -> Option<u64> {
        let mut state = self.state.lock();
        state.attempts += 1;
        let attempts = state.attempts;
        is_first(&mut state.failed, reason, REMIND_EVERY, now).then_some(attempts)
    }

    /// A link has connected: the broker is there.
    pub(super) fn connected(&self) {
        let mut state = self.state.lock();
        state.attempts = 0;
        state.failed.clear();
    }

    /// A link has ended. Returns the number of ends that were not logged if this one is to be.
    pub(super) fn ended(&self, reason: LinkDownReason, now: Millis) -> Option<u64> {
        let mut state = self.state.lock();
        if is_first(&mut state.ended, reason, ENDS_TOGETHER, now) {
            return Some(std::mem::take(&mut state.suppressed));
        }
        state.suppressed += 1;
        None
    }
}

/// Whether `reason` was not noted within `span`; if so, notes it. There are as many entries as reasons
/// at most.
fn is_first(
    noted: &mut Vec<(LinkDownReason, Millis)>,
    reason: LinkDownReason,
    span: Duration,
    now: Millis,
) -> bool {
    debug_assert!(noted.len() <= LinkDownReason::ALL.len());
    match noted.iter_mut().find(|(earlier, _)| *earlier == reason) {
        Some((_, at)) if now < *at + span => false,
        Some((_, at)) => {
            *at = now;
            true
        }
        None => {
            noted.push((reason, now));
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_broker_is_logged_once_for_all_links_and_once_a_minute() {
        let (log, at) = (OutageLog::default(), Millis::new);
        assert_eq!(log.failed(LinkDownReason::Connect, at(0)), Some(1));
        for n in 1..15 {
            assert_eq!(log.failed(LinkDownReason::Connect, at(n)), None);
        }
        // Another reason is news.
        assert_eq!(log.failed(LinkDownReason::Timeout, at(20)), Some(16));
        assert_eq!(log.failed(LinkDownReason::Connect, at(59_999)), None);
        assert_eq!(log.failed(LinkDownReason::Connect, at(60_000)), Some(18));
        log.connected();
        assert_eq!(log.failed(LinkDownReason::Connect, at(60_001)), Some(1));
    }

    #[test]
    fn links_that_end_together_are_logged_once_for_each_reason() {
        let (log, at) = (OutageLog::default(), Millis::new);
        assert_eq!(log.ended(LinkDownReason::Closed, at(0)), Some(0));
        assert_eq!(log.ended(LinkDownReason::Closed, at(1)), None);
        assert_eq!(log.ended(LinkDownReason::TakenOver, at(2)), Some(1));
        assert_eq!(log.ended(LinkDownReason::Closed, at(999)), None);
        assert_eq!(log.ended(LinkDownReason::Closed, at(1000)), Some(1));
    }
}
