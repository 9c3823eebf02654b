//! The order in which backlogs are trimmed.
//!
//! The bytes of a backlog are charged to its sleepers in equal parts, and by them to their principals. That
//! is done only while the budget is exceeded, and with some sleepers of each backlog: a message costs the
//! same however many members sleep. A backlog takes its turn with the lightest of its principals, so that a
//! client that uses much cannot spend the messages of others by subscribing to their filters.

use std::collections::BTreeMap;
use std::collections::binary_heap::{BinaryHeap, PeekMut};

use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::Sessions;
use crate::router::sessions::budget::{GROWTH_DIVISOR, SEARCH_INTERVAL};
use crate::router::sessions::principals::{Level, PrincipalId};
use crate::router::sessions::sleep::memory::Weighed;

/// A backlog that may be trimmed. The largest is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Candidate {
    /// The level of its lightest principal, with that principal's part of all backlogs.
    pub(super) level: Level,
    /// The fewest bytes that one of its sleepers has in all backlogs.
    pub(super) least: u64,
    /// Bytes for each sleeper.
    each: u64,
    pub(super) shard: u16,
    pub(super) filter: FilterId,
    /// The lightest principal.
    pub(super) principal: PrincipalId,
}

/// The part of the queues' bytes that one detached session has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    /// The level of its principal.
    pub(super) level: Level,
    pub(super) principal: PrincipalId,
    pub(super) bytes: u64,
}

impl Candidate {
    /// Whether the backlog is trimmed before this queue is evicted, the first one of all. Sessions of one
    /// principal are compared by their bytes.
    pub(super) fn goes_before(&self, queue: Option<Waiting>) -> bool {
        queue.is_none_or(|queue| match self.principal == queue.principal {
            true => self.least >= queue.bytes,
            false => (self.level, self.least) >= (queue.level, queue.bytes),
        })
    }

    /// The level to compare with that of another principal, or of other sessions of the same principal.
    pub(super) fn level_against(&self, principal: PrincipalId) -> Level {
        match self.principal == principal {
            true => Level::of(self.least),
            false => self.level,
        }
    }
}

/// The backlogs with messages, as they were found when the shards were last searched.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    heap: BinaryHeap<Candidate>,
    searched_at: Option<Millis>,
}

impl Candidates {
    /// Searches all shards for backlogs, unless they were searched a short time ago and some are left, or
    /// few messages have come since.
    pub(super) fn search(&mut self, sessions: &Sessions, now: Millis) {
        if self
            .searched_at
            .is_some_and(|at| now < at + SEARCH_INTERVAL)
        {
            let bytes = |shard| sessions.shard(shard).accounts.backlog_bytes as u64;
            let few = sessions.budgets.queue_bytes / GROWTH_DIVISOR;
            if !self.heap.is_empty() || sessions.shards().map(bytes).sum::<u64>() < few {
                return;
            }
        }
        self.searched_at = Some(now);
        self.heap.clear();
        let mut all: Vec<(u16, Weighed)> = Vec::new();
        let mut used: BTreeMap<PrincipalId, u64> = BTreeMap::new();
        for shard in sessions.shards() {
            let weighed = sessions.shard(shard).weigh_backlogs();
            all.extend(weighed.into_iter().map(|weighed| (shard, weighed)));
        }
        for (_, weighed) in &all {
            let part = weighed.bytes / weighed.principals.len().max(1) as u64;
            for principal in &weighed.principals {
                *used.entry(*principal).or_default() += part;
            }
        }
        for (principal, bytes) in &mut used {
            *bytes += sessions.principals.bytes(*principal);
        }
        let candidate = |(shard, weighed): (u16, Weighed)| {
            let principals = weighed.principals.iter();
            let levels =
                principals.map(|p| (used.get(p).map_or(Level::of(0), |b| Level::of(*b)), *p));
            let (level, principal) = levels.min()?;
            Some(Candidate {
                level,
                least: weighed.least,
                each: weighed.each,
                shard,
                filter: weighed.filter,
                principal,
            })
        };
        self.heap.extend(all.into_iter().filter_map(candidate));
    }

    /// The backlog that is the first to be trimmed.
    pub(super) fn first(&mut self, sessions: &Sessions) -> Option<Candidate> {
        loop {
            let mut first = self.heap.peek_mut()?;
            match sessions.shard(first.shard).weigh_backlog(first.filter) {
                Some(each) if each >= first.each => return Some(*first),
                // It has become smaller: perhaps it is not the first any longer.
                Some(each) => {
                    first.least = first.least.saturating_sub(first.each - each).max(each);
                    first.each = each;
                }
                None => {
                    PeekMut::pop(first);
                }
            }
        }
    }
}
