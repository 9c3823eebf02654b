//! Filters that nobody uses leave the broker.

use crate::router::filters::actions::Released;
use crate::router::filters::filter::{Filter, Release};
use crate::router::filters::holders::FILTER_BYTES;
use crate::router::filters::linger::{Idle, Overdue};
use crate::router::filters::table::Table;
use crate::router::filters::{FILTERS_MAX, Filters};
use crate::time::Millis;
use crate::topics::FilterId;

/// Unread messages on a lingering filter that make it busy.
const BUSY: u32 = 100;

/// Known filters beyond which lingering ones make room whatever their age.
const FILTERS_CROWDED: usize = FILTERS_MAX / 10 * 9;

/// Bytes of the names of lingering filters; beyond them the oldest are released whatever their age.
const LINGERING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Lingering filters that are looked at, or released, before the table's lock is given back.
const CHUNK: usize = 4096;

impl Filters {
    /// Releases the filters that do not linger: shared ones without members, and those beyond a
    /// client's share. Filters that are gone since the last tick are forgotten with them.
    /// `forget_groups` is called with all these filters while nobody can subscribe to them anew:
    /// whoever subscribes later is in a new group.
    pub(crate) fn release_due(
        &self,
        now: Millis,
        forget_groups: impl FnOnce(&[FilterId]),
    ) -> Released {
        let mut table = self.write();
        if table.release_soon.is_empty() {
            return Released::default();
        }
        let mut due = std::mem::take(&mut table.release_soon);
        // A filter that was used and given up several times is there for each time.
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
        let forget = |released: &[FilterId]| {
            gone.extend_from_slice(released);
            forget_groups(&gone);
        };
        // A filter whose answer is awaited is due at a later tick.
        let mut released = table.release_all(&idle, now, forget, true);
        released.forget_retained = gone;
        released
    }

    /// Bytes that are charged for filters that nobody uses.
    pub(crate) fn lingering_bytes(&self) -> u64 {
        let lingering = &self.read().lingering;
        (lingering.len() * FILTER_BYTES + lingering.bytes()) as u64
    }

    /// Releases the lingering filters whose time is over, or which are too many.
    pub(crate) fn release_overdue(
        &self,
        now: Millis,
        forget_groups: impl Fn(&[FilterId]),
    ) -> Vec<Released> {
        let mut released = Vec::new();
        for some in self.overdue(now).chunks(CHUNK) {
            // A filter whose answer is awaited still lingers, and is found again.
            let mut table = self.write();
            released.push(table.release_all(some, now, &forget_groups, false));
        }
        released
    }

    /// The lingering filters whose time is over, longest idle first.
    fn overdue(&self, now: Millis) -> Vec<Idle> {
        let mut overdue = {
            let table = self.read();
            let lingering = &table.lingering;
            // Filters that are being unsubscribed make room soon.
            let leaving: usize = table.unsubscribe_queue.iter().map(|q| q.len()).sum();
            let account = &table.account.bytes;
            let bytes_over = account.used().saturating_sub(account.lingering_max());
            // Each gives back that many at least.
            let filters_over = bytes_over.div_ceil(FILTER_BYTES as u64) as usize;
            let crowded = table.len().saturating_sub(FILTERS_CROWDED);
            Overdue {
                now,
                linger: self.config.linger,
                busy_min: self.config.linger_busy_min,
                surplus: (lingering.len()).saturating_sub(self.config.lingering_max),
                urgent: crowded.max(filters_over).saturating_sub(leaving),
                urgent_bytes: lingering.bytes().saturating_sub(LINGERING_BYTES_MAX),
            }
        };
        let mut found = Vec::new();
        let mut last = None;
        loop {
            // Others have their turn in between.
            let table = self.read();
            let before = last;
            for ((since, id), bytes) in table.lingering.behind(last).take(CHUNK) {
                let filter = table.get(id);
                let busy = |f: &Filter| f.unread() > BUSY || table.is_over_share(f);
                let busy = || filter.is_some_and(busy);
                match overdue.next(since, bytes, busy) {
                    None => return found,
                    Some(true) => found.push((since, id)),
                    Some(false) => {}
                }
                last = Some((since, id));
            }
            if last == before {
                return found;
            }
        }
    }
}

impl Table {
    /// Releases filters that are idle since a moment. If an answer is awaited on one, it is left for
    /// later, and with `retry` for the next tick.
    fn release_all(
        &mut self,
        idle: &[Idle],
        now: Millis,
        forget_groups: impl FnOnce(&[FilterId]),
        retry: bool,
    ) -> Released {
        let mut released = Released::default();
        for &(since, id) in idle {
            let Some(filter) = self.get_mut(id) else {
                self.lingering.remove((since, id));
                continue;
            };
            // It is in use again.
            if filter.idle_since() != Some(since) {
                continue;
            }
            if self.has_inner(id) {
                self.leave(id, now, &mut released);
            }
            // Its own move is not complete, or filters still lie inside it.
            if self.has_inner(id) || self.moves.target(id).is_some() {
                if retry {
                    self.release_soon.push(id);
                }
                continue;
            }
            let Some(filter) = self.get_mut(id) else {
                continue;
            };
            match filter.release() {
                Release::Unsubscribe(link) => {
                    let link = usize::from(link);
                    self.lingering.remove((since, id));
                    self.queue_unsubscribe(link, id);
                    released.wake.insert(link);
                }
                Release::Remove => self.remove(id, now),
                Release::Later => {
                    if retry {
                        self.release_soon.push(id);
                    }
                    continue;
                }
            }
            released.forget_retained.push(id);
        }
        forget_groups(&released.forget_retained);
        released
    }
}
