//! The order in which the clients of a shard went away.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::time::Millis;

/// The detached sessions of a shard, least recently connected first. They are kept in order only where
/// `session.evict_after` may end them.
#[derive(Debug, Default)]
pub(super) struct Absences(Option<BTreeSet<(Millis, u32)>>);

impl Absences {
    /// No detached sessions; they will be kept in order.
    pub(super) fn ordered() -> Self {
        Self(Some(BTreeSet::new()))
    }

    /// The client of the session in slot `at` went away at `since`.
    pub(super) fn begin(&mut self, since: Millis, at: u32) {
        if let Some(order) = &mut self.0 {
            order.insert((since, at));
        }
    }

    /// The client of the session in slot `at`, which went away at `since`, is back, or its session has
    /// ended. Of a session that was not detached nothing is known, and nothing changes.
    pub(super) fn end(&mut self, since: Millis, at: u32) {
        if let Some(order) = &mut self.0 {
            order.remove(&(since, at));
        }
    }

    /// The slots of the sessions whose clients have been away for `after`, least recently connected
    /// first, each with the time at which its client went away.
    pub(super) fn longest(
        &self,
        after: Duration,
        now: Millis,
    ) -> impl Iterator<Item = (Millis, u32)> {
        let order = self.0.iter().flat_map(|order| order.iter().copied());
        order.take_while(move |(since, _)| *since + after <= now)
    }
}
