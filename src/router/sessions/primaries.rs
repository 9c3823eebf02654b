//! The primary subscriptions of sessions with many overlapping subscriptions, found once for each
//! message. Of K overlapping subscriptions the broker may send K copies of a message, and each copy asks
//! which of them is the primary one.

use crate::hashing::LookUp;
use crate::session::{Primary, Subscription, primary, primary_filter};
use crate::topics::FilterId;

use crate::router::lost::Loss;

/// Up to this number of subscriptions, a session's are compared with the topic at each copy.
const COMPARED_MAX: usize = 16;

/// Comparisons with a topic that take about as long as one delivery.
const COMPARISONS_IN_A_DELIVERY: usize = 8;

/// A message that may be for several subscriptions of one session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sought<'a> {
    pub slot: u32,
    pub subscriptions: &'a [Subscription],
    pub topic: &'a str,
    /// The session's own client published it.
    pub own: bool,
}

/// The primary subscriptions that were found since the lock of the shard was taken. Nothing that decides
/// them changes before it is given back.
#[derive(Debug, Default)]
pub(super) struct Primaries {
    /// By slot, topic (hashed), whether the message is the client's own, and whether filters in doubt
    /// count as lost.
    found: LookUp<(u32, u64, bool, bool), Option<FilterId>>,
    comparisons: usize,
}

impl Primaries {
    /// The filter of the primary subscription.
    pub(super) fn filter(
        &mut self,
        sought: Sought<'_>,
        doubted: bool,
        loss_of: impl Fn(FilterId) -> Option<Loss>,
    ) -> Option<FilterId> {
        let Sought {
            slot,
            subscriptions,
            topic,
            own,
        } = sought;
        let is_lost = |filter| counts_as_lost(loss_of(filter), doubted);
        if subscriptions.len() <= COMPARED_MAX {
            return primary_filter(subscriptions, topic, own, is_lost);
        }
        let key = (slot, self.found.digest(topic), own, doubted);
        if let Some(found) = self.found.get(&key) {
            return *found;
        }
        self.comparisons += subscriptions.len();
        let found = primary_filter(subscriptions, topic, own, is_lost);
        self.found.insert(key, found);
        found
    }

    /// The primary subscription with all its properties. `identifiers` becomes the Subscription
    /// Identifiers of all subscriptions that match.
    pub(super) fn whole(
        &mut self,
        sought: Sought<'_>,
        doubted: bool,
        loss_of: impl Fn(FilterId) -> Option<Loss>,
        identifiers: &mut Vec<u32>,
    ) -> Option<Primary> {
        let Sought {
            subscriptions,
            topic,
            own,
            ..
        } = sought;
        self.comparisons += subscriptions.len();
        let is_lost = |filter| counts_as_lost(loss_of(filter), doubted);
        primary(subscriptions, topic, own, is_lost, identifiers)
    }

    /// The comparisons since the last call, in deliveries that would have taken as long.
    pub(super) fn take_work(&mut self) -> usize {
        let work = self.comparisons / COMPARISONS_IN_A_DELIVERY;
        self.comparisons %= COMPARISONS_IN_A_DELIVERY;
        work
    }

    /// The lock of the shard is given back.
    pub(super) fn clear(&mut self) {
        self.found.clear();
    }
}

/// Whether a filter counts as lost; filters in doubt do if `doubted`.
fn counts_as_lost(loss: Option<Loss>, doubted: bool) -> bool {
    match loss {
        None => false,
        Some(Loss::Sure) => true,
        Some(Loss::Doubtful) => doubted,
    }
}
