//! The clients' SUBSCRIBEs that wait for the broker's answer on a filter.

use crate::mqtt::QoS;
use crate::router::filters::filter::Filter;
use crate::router::types::PendingGrant;
use crate::time::Millis;

impl Filter {
    /// A client's SUBSCRIBE waits for the broker's answer on this filter.
    pub(crate) fn await_suback(&mut self, grant: PendingGrant) {
        // Most filters have one, once: room for four would be the larger part of a filter.
        if self.awaiting_suback.is_empty() {
            self.awaiting_suback.reserve_exact(1);
        }
        self.awaiting_suback.push(grant);
    }

    /// Takes the grants that wait for this QoS or less.
    pub(crate) fn take_answered(&mut self, qos: QoS) -> Vec<PendingGrant> {
        self.take_grants(|g| g.qos <= qos)
    }

    /// Takes the grants that have waited long enough.
    pub(crate) fn take_late(&mut self, now: Millis) -> Vec<PendingGrant> {
        self.take_grants(|g| g.deadline <= now)
    }

    /// Takes the grants that `f` names. No room is kept for others, once none waits.
    fn take_grants(&mut self, f: impl Fn(&PendingGrant) -> bool) -> Vec<PendingGrant> {
        if self.awaiting_suback.iter().all(&f) {
            return std::mem::take(&mut self.awaiting_suback);
        }
        self.awaiting_suback.extract_if(.., |g| f(g)).collect()
    }

    /// The deadlines of the grants that wait.
    pub(crate) fn deadlines(&self) -> impl Iterator<Item = Millis> {
        self.awaiting_suback.iter().map(|g| g.deadline)
    }
}
