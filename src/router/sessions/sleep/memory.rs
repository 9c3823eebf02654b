//! The memory of a shard's backlogs: their messages, counted and dropped.

use crate::session::SessionLimits;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::backlog::Backlog;
use crate::router::sessions::shard::Shard;

impl Shard {
    /// The messages in backlogs, counted for each member that sleeps.
    pub(in crate::router::sessions) fn backlogged_of_all(&self) -> usize {
        let backlogs = self.backlogs.filters.iter();
        let backlogs = backlogs.filter_map(|f| self.members.get(f)?.backlog.as_ref());
        let count = |backlog: &Backlog| -> usize {
            let keeping = backlog.sleepers().iter().filter(|s| s.keeps);
            keeping.map(|s| backlog.count_since(s.cursor())).sum()
        };
        backlogs.map(|b| count(b)).sum()
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
                accounts.entry_bytes -= backlog.entry_bytes() as i64;
                backlog.purge(limits, now);
                accounts.entry_bytes += backlog.entry_bytes() as i64;
            }
        }
    }

    /// The filters of the backlogs with messages, and the bytes for each sleeper.
    pub(in crate::router::sessions) fn weigh_backlogs(&self) -> Vec<(FilterId, usize)> {
        let filters = self.backlogs.filters.iter();
        let weighed = filters.filter_map(|filter| Some((*filter, self.weigh_backlog(*filter)?)));
        weighed.collect()
    }

    /// The bytes of a backlog for each sleeper. `None`: it has no messages.
    pub(in crate::router::sessions) fn weigh_backlog(&self, filter: FilterId) -> Option<usize> {
        let backlog = self.members.get(&filter)?.backlog.as_ref()?;
        let bytes = backlog.bytes();
        (bytes > 0).then(|| bytes.div_ceil(backlog.sleepers().len().max(1)))
    }

    /// Drops the older half of a backlog's messages.
    pub(in crate::router::sessions) fn trim_backlog(&mut self, filter: FilterId) {
        let members = self.members.get_mut(&filter);
        if let Some(backlog) = members.and_then(|m| m.backlog.as_mut()) {
            self.accounts.entry_bytes -= backlog.entry_bytes() as i64;
            backlog.trim();
            self.accounts.entry_bytes += backlog.entry_bytes() as i64;
        }
    }
}
