//! The memory of a shard's backlogs: their messages, counted and dropped.

use smallvec::SmallVec;

use crate::hashing::LookUp;
use crate::session::SessionLimits;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::backlog::Backlog;
use crate::router::sessions::principals::PrincipalId;
use crate::router::sessions::shard::Shard;

/// The most sleepers of a backlog that are looked at to weigh it: there may be a million.
const SAMPLE: usize = 8;

type Sample<T> = SmallVec<[T; SAMPLE]>;

/// A backlog with messages, for the budget.
#[derive(Debug)]
pub(in crate::router::sessions) struct Weighed {
    pub(in crate::router::sessions) filter: FilterId,
    /// Bytes of its messages and their entries.
    pub(in crate::router::sessions) bytes: u64,
    /// Bytes for each sleeper.
    pub(in crate::router::sessions) each: u64,
    /// The fewest bytes that one of the sample has in all backlogs.
    pub(in crate::router::sessions) least: u64,
    /// The principals of the sample, one for each session.
    pub(in crate::router::sessions) principals: Sample<PrincipalId>,
}

fn weigh(backlog: &Backlog) -> Option<u64> {
    let bytes = backlog.held().bytes();
    (bytes > 0).then(|| bytes.div_ceil(backlog.keeping().max(1)) as u64)
}

impl Shard {
    /// The messages in backlogs, counted for each member that sleeps.
    pub(in crate::router::sessions) fn backlogged_of_all(&self) -> usize {
        let backlogs = self.backlogs.filters.iter();
        let backlogs = backlogs.filter_map(|f| self.members.get(f)?.backlog.as_ref());
        backlogs.map(|b| b.owed()).sum()
    }

    /// Drops messages from backlogs that are past their expiry or too old, and QoS 0.
    pub(in crate::router::sessions) fn purge_backlogs(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
    ) {
        let Self {
            backlogs,
            members,
            accounts,
            ..
        } = self;
        for filter in &backlogs.filters {
            let backlog = members.get_mut(filter).and_then(|m| m.backlog.as_mut());
            if let Some(backlog) = backlog {
                let before = backlog.held();
                backlog.purge(limits, now);
                accounts.backlog_changed(before, backlog.held());
            }
        }
    }

    /// The backlogs with messages, each with some of the sessions that are to get them.
    pub(in crate::router::sessions) fn weigh_backlogs(&self) -> Vec<Weighed> {
        let mut owed: LookUp<u32, u64> = LookUp::default();
        let mut found = Vec::new();
        if self.accounts.backlog_bytes == 0 {
            return Vec::new();
        }
        for filter in &self.backlogs.filters {
            let members = self.members.get(filter);
            let backlog = members.and_then(|m| m.backlog.as_ref());
            let Some((backlog, each)) = backlog.and_then(|b| Some((b, weigh(b)?))) else {
                continue;
            };
            let slots: Sample<u32> = backlog.sample(SAMPLE).map(|s| s.slot).collect();
            for slot in &slots {
                *owed.entry(*slot).or_default() += each;
            }
            let bytes = backlog.held().bytes() as u64;
            found.push((*filter, (bytes, each), slots));
        }
        let weighed = |(filter, (bytes, each), slots): (FilterId, (u64, u64), Sample<u32>)| {
            let least = slots.iter().filter_map(|slot| owed.get(slot)).min();
            let slots = slots.iter().filter_map(|s| self.slots.get(*s as usize));
            Weighed {
                filter,
                bytes,
                each,
                least: least.copied().unwrap_or(each),
                principals: slots.map(|s| self.accounts.principal_of(s)).collect(),
            }
        };
        found.into_iter().map(weighed).collect()
    }

    /// The bytes of a backlog for each sleeper. `None`: it has no messages.
    pub(in crate::router::sessions) fn weigh_backlog(&self, filter: FilterId) -> Option<u64> {
        weigh(self.members.get(&filter)?.backlog.as_ref()?)
    }

    /// Drops the older half of a backlog's messages.
    pub(in crate::router::sessions) fn trim_backlog(&mut self, filter: FilterId) {
        let members = self.members.get_mut(&filter);
        if let Some(backlog) = members.and_then(|m| m.backlog.as_mut()) {
            let before = backlog.held();
            backlog.trim();
            self.accounts.backlog_changed(before, backlog.held());
        }
    }
}
