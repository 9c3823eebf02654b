//! Filters that brought a newer value of a topic than others that match it.

use std::cell::Cell;
use std::time::Duration;

use smallvec::SmallVec;

use crate::hashing::LookUp;
use crate::time::Millis;
use crate::topics::FilterId;

/// Topics on which some filter is ahead of a known one, at most, each counted with every filter that
/// brought its message.
pub(super) const AHEAD_MAX: usize = 100_000;

/// How long a filter counts as ahead of another: longer than the data links are apart. The caches of
/// a link's filters are emptied when it is lost.
pub(super) const AHEAD_FOR: Duration = Duration::from_secs(5);

/// The last live messages of topics with a known filter that did not bring them.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// By topic, hashed.
    pub(super) topics: LookUp<u64, Last>,
    /// The filters of all topics, added up.
    filters: usize,
    /// When the topics whose time has passed were last forgotten.
    swept_at: Millis,
    /// Messages that were noted.
    pub(super) events: u64,
}

/// The last live message of a topic. Until the filters that did not bring it bring theirs, a client with
/// both kinds must not get an older value by one of them.
#[derive(Debug)]
pub(super) struct Last {
    /// Until when it counts.
    pub(super) until: Millis,
    /// The payload, hashed.
    pub(super) payload: u64,
    /// The filters that brought it, sorted.
    pub(super) by: SmallVec<[FilterId; 2]>,
    /// [`Ahead::events`] when it came.
    pub(super) event: u64,
}

impl Ahead {
    pub(super) fn forget(&mut self, topic: u64) {
        if let Some(last) = self.topics.remove(&topic) {
            self.filters -= last.by.len();
        }
    }

    /// Whether a message that `filters` brought can be noted.
    pub(super) fn has_room(&mut self, filters: usize, now: Millis) -> bool {
        if self.filters + filters > AHEAD_MAX && self.swept_at + AHEAD_FOR <= now {
            self.swept_at = now;
            let remaining = Cell::new(0);
            self.topics.retain(|_, last| {
                let keeps = last.until > now;
                remaining.update(|n| n + if keeps { last.by.len() } else { 0 });
                keeps
            });
            self.filters = remaining.get();
        }
        self.filters + filters <= AHEAD_MAX
    }

    pub(super) fn note(
        &mut self,
        topic: u64,
        payload: u64,
        by: SmallVec<[FilterId; 2]>,
        now: Millis,
    ) {
        self.filters += by.len();
        self.events += 1;
        let last = Last {
            until: now + AHEAD_FOR,
            payload,
            by,
            event: self.events,
        };
        self.topics.insert(topic, last);
    }
}
