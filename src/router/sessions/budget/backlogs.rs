//! The order in which backlogs are trimmed.

use std::collections::BinaryHeap;

use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::Sessions;
use crate::router::sessions::budget::SEARCH_INTERVAL;

/// A backlog that may be trimmed. The largest is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Candidate {
    /// Bytes for each sleeper.
    pub(super) each: usize,
    pub(super) shard: u16,
    pub(super) filter: FilterId,
}

/// The backlogs with messages, as they were found when the shards were last searched.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    heap: BinaryHeap<Candidate>,
    searched_at: Option<Millis>,
}

impl Candidates {
    /// Searches all shards for backlogs, unless they were searched a short time ago and some are left.
    pub(super) fn search(&mut self, sessions: &Sessions, now: Millis) {
        let recent = |at| now < at + SEARCH_INTERVAL;
        if self.searched_at.is_some_and(recent) && !self.heap.is_empty() {
            return;
        }
        self.searched_at = Some(now);
        self.heap.clear();
        for shard in sessions.shards() {
            let weighed = sessions.shard(shard).weigh_backlogs();
            self.heap
                .extend(weighed.into_iter().map(|(filter, each)| Candidate {
                    each,
                    shard,
                    filter,
                }));
        }
    }

    /// The backlog that is the first to be trimmed.
    pub(super) fn first(&mut self, sessions: &Sessions) -> Option<Candidate> {
        loop {
            let mut first = self.heap.peek_mut()?;
            let each = sessions.shard(first.shard).weigh_backlog(first.filter);
            match each {
                Some(each) if each >= first.each => return Some(Candidate { each, ..*first }),
                // It has become smaller: perhaps it is not the first any longer.
                Some(each) => first.each = each,
                None => {
                    std::collections::binary_heap::PeekMut::pop(first);
                }
            }
        }
    }
}
