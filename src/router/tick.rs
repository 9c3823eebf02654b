//! What the time brings: expiry, wills, keepalive, stalled sockets, lingering filters, waiting
//! SUBSCRIBEs.

use parking_lot::RwLockWriteGuard;

use crate::mqtt::{QoS, ReasonCode};
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::filters::filter::{Filter, Release};
use crate::router::filters::linger::{Idle, Overdue};
use crate::router::filters::subscribe::FILTERS_MAX;
use crate::router::filters::table::Table;

/// Unread messages on a lingering filter that make it busy.
const BUSY: u32 = 100;

/// Known filters beyond which those that linger make room whatever their age.
const FILTERS_CROWDED: usize = FILTERS_MAX / 10 * 9;

/// Bytes of the names of lingering filters; past it the oldest leave whatever their age.
const LINGERING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Lingering filters that are looked at, or let go of, before the table's lock is given back.
const CHUNK: usize = 4096;

impl Router {
    /// SUBSCRIBEs that have waited long enough for the core.
    pub(super) fn tick_waiters(&self, now: Millis) {
        loop {
            let mut table = self.table.write();
            let Some(&(deadline, number)) = table.deadlines.first() else {
                return;
            };
            if deadline > now {
                return;
            }
            table.deadlines.remove(&(deadline, number));
            let source = table.source(number);
            let active = table.get(source).filter(|f| f.is_active());
            let active = active.map(Filter::granted);
            let confirmed = active.is_some();
            let granted = active.unwrap_or(QoS::ExactlyOnce);
            let granted = ReasonCode(granted as u8);
            let mut late = Vec::new();
            if let Some(filter) = table.get_mut(number) {
                late = filter.take_late(now);
                if !confirmed && self.config.subscribe_accept {
                    filter.presume();
                    if source != number {
                        table.awaiting_root.insert(number);
                    }
                }
            }
            drop(table);
            if late.is_empty() {
                continue;
            }
            let code = if confirmed {
                granted
            } else if self.config.subscribe_accept {
                metrics().upstream_gaps.increment(1);
                tracing::warn!(
                    clients = late.len(),
                    "The core did not answer a SUBSCRIBE in time; it is granted, and messages until the core holds the filter are missed"
                );
                granted
            } else {
                ReasonCode::UNSPECIFIED_ERROR
            };
            self.settle_waiters(number, &late, code, confirmed, now);
        }
    }

    /// Shared filters whose members are all gone.
    pub(super) fn tick_unsubscribed(&self, now: Millis) {
        let mut table = self.table.write();
        if table.release_soon.is_empty() {
            return;
        }
        let mut due = std::mem::take(&mut table.release_soon);
        // A filter that was used and unsubscribed again is there for each time.
        due.sort_unstable();
        due.dedup();
        let (mut idle, mut gone): (Vec<Idle>, Vec<FilterId>) = Default::default();
        for id in due {
            match table.get(id).map(Filter::idle_since) {
                None => gone.push(id),
                Some(None) => {}
                Some(Some(since)) => idle.push((since, id)),
            }
        }
        self.groups.forget(&gone);
        let awaited = self.leave(table, &idle, now);
        // Answered soon, and then due at a later tick.
        self.table.write().release_soon.extend(awaited);
    }

    /// Filters that nobody came back for.
    pub(super) fn tick_linger(&self, now: Millis) {
        let mut overdue = {
            let table = self.table.read();
            let lingering = &table.lingering;
            // Those that are on their way out make room soon.
            let leaving: usize = table
                .unsubscribe_queue
                .iter()
                .map(|queue| queue.len())
                .sum();
            Overdue {
                idle_before: now.saturating_sub(self.config.linger),
                busy_before: now.saturating_sub(self.config.linger_busy_min),
                surplus: (lingering.len()).saturating_sub(self.config.filters_lingering_max),
                urgent: table.len().saturating_sub(FILTERS_CROWDED + leaving),
                urgent_bytes: lingering.bytes().saturating_sub(LINGERING_BYTES_MAX),
            }
        };
        let mut leaving = Vec::new();
        let mut last = None;
        let mut more = true;
        while more {
            // Others have their turn in between.
            let table = self.table.read();
            more = false;
            for ((since, number), bytes) in table.lingering.behind(last).take(CHUNK) {
                let filter = table.get(number);
                let busy = || filter.is_some_and(|f| f.unread() > BUSY);
                let leaves = overdue.next(since, bytes, busy);
                more = leaves.is_some();
                if leaves == Some(true) {
                    leaving.push((since, number));
                }
                if !more {
                    break;
                }
                last = Some((since, number));
            }
        }
        for some in leaving.chunks(CHUNK) {
            // Those that are awaited still linger, and are found again.
            self.leave(self.table.write(), some, now);
        }
    }

    /// Lets go of filters that are idle since a moment; returns those for which an answer is awaited.
    fn leave(
        &self,
        mut table: RwLockWriteGuard<'_, Table>,
        leaving: &[Idle],
        now: Millis,
    ) -> Vec<FilterId> {
        let mut wake = 0u64;
        let mut forget = Vec::new();
        let mut awaited = Vec::new();
        for &(since, number) in leaving {
            let Some(filter) = table.get_mut(number) else {
                table.lingering.remove((since, number));
                continue;
            };
            // It is in use again.
            if filter.idle_since() != Some(since) {
                continue;
            }
            match filter.release() {
                Release::Unsubscribe(link) => {
                    table.lingering.remove((since, number));
                    table.unsubscribe_queue[usize::from(link)].push_back(number);
                    wake |= 1 << link;
                    forget.push(number);
                }
                Release::Remove => {
                    table.remove(number, now);
                    forget.push(number);
                }
                Release::Later => awaited.push(number),
            }
        }
        self.groups.forget(&forget);
        drop(table);
        self.retained.forget(forget.into_iter());
        for (link, data) in self.data.iter().enumerate() {
            if wake & (1 << link) != 0 {
                data.raise();
            }
        }
        awaited
    }
}
