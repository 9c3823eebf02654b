//! What the link tasks ask of the router, and tell it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mqtt::{QoS, ReasonCode};
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::broker::BrokerFeatures;
use crate::router::filters::filter::{LinkSession, Phase, Resumed, Unsubacked};
use crate::router::filters::table::Table;
use crate::router::handle::TaskWaker;
use crate::router::lost::Loss;
use crate::router::types::PendingGrant;

/// A filter to be subscribed at the core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its number; its Subscription Identifier is one more.
    pub number: FilterId,
    /// The topic filter.
    pub name: Arc<str>,
    /// At this QoS.
    pub qos: QoS,
}

/// How long after the core forgot one link's session another's loss may have to do with it,
/// milliseconds: a dead connection is found by an unanswered PINGREQ.
const DOUBT: u64 = 30_000;

/// The broker may have forgotten the filters of a link.
fn doubt(link: usize, table: &Table) {
    let active = table.of_link(link).filter(|(_, f)| f.is_active());
    let mut ids: Vec<FilterId> = active.map(|(id, _)| id).collect();
    table.add_below(&mut ids);
    for id in ids {
        table.lost.insert(id, Loss::Doubtful);
    }
}

impl Router {
    /// Takes up what a CONNACK said. Filters that wait for it are placed. True: filters were
    /// placed before under other features, so all D links must begin anew.
    pub fn set_broker_features(&self, features: &BrokerFeatures, now: Millis) -> bool {
        let kept_retain = self.broker.set(features);
        let mut refused: Vec<(FilterId, Vec<PendingGrant>, ReasonCode)> = Vec::new();
        let mut table = self.table.write();
        table.floor = match features.replaces {
            true => QoS::AtMostOnce,
            false => features.maximum_qos,
        };
        if table.identifiers == Some(features.identifiers) && kept_retain == features.keeps_retain {
            return false;
        }
        let changed = table.identifiers.is_some();
        if changed {
            tracing::error!(
                identifiers = features.identifiers,
                retain_as_published = features.keeps_retain,
                "The core changed whether it has subscription identifiers, or whether live messages keep RETAIN; all filters are subscribed anew"
            );
        }
        table.identifiers = Some(features.identifiers);
        for id in table.unplace_all() {
            let Some(filter) = table.get_mut(id) else {
                continue;
            };
            // All links begin anew: there is nothing to unsubscribe.
            if filter.phase() == Phase::Unsubscribing && !filter.is_wanted() {
                table.remove(id, now);
                continue;
            }
            let name = filter.name().clone();
            let code = if filter.is_shared() && !features.shared && !self.config.local_groups {
                ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
            } else if let Err(other) = table.place(id, self.hash(&name), &[]) {
                tracing::error!(
                    filter = %crate::telemetry::clean(&name, 256),
                    overlaps = %crate::telemetry::clean(&other, 256),
                    "A filter cannot be served: the broker has no working subscription identifiers, and the filter overlaps another on every data link"
                );
                ReasonCode::QUOTA_EXCEEDED
            } else {
                table.queue_moved(id);
                continue;
            };
            if let Some(filter) = table.get_mut(id) {
                filter.unservable();
            }
            table.lost.remove(id);
            let grants = table.take_answered(id, QoS::ExactlyOnce);
            refused.push((id, grants, code));
        }
        drop(table);
        for (number, waiters, code) in refused {
            self.settle_waiters(number, &waiters, code, false, now);
        }
        for wake in &self.data {
            wake.raise();
        }
        changed
    }

    /// Wakes D link `link`'s task.
    pub fn data_waker(&self, link: usize) -> &Arc<TaskWaker> {
        &self.data[link]
    }

    /// The number among the D links of link `n` for shared subscriptions.
    pub fn shared_link(&self, n: usize) -> usize {
        self.config.data_links + n
    }

    /// Up to `max` filters whose SUBSCRIBE is to be sent on D link `link` now.
    pub fn next_subscribes(&self, link: usize, max: usize) -> Vec<Wanted> {
        let mut table = self.table.write();
        let floor = table.floor;
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(number) = table.subscribe_queue[link].pop_front()
        {
            let Some(filter) = table.get_mut(number) else {
                continue;
            };
            let Some(qos) = filter.subscribe_sent(floor) else {
                continue;
            };
            let name = filter.name().clone();
            taken.push(Wanted { number, name, qos });
        }
        metrics().upstream_subscribes.increment(taken.len() as u64);
        taken
    }

    /// Up to `max` filters whose UNSUBSCRIBE is to be sent on D link `link` now.
    pub fn next_unsubscribes(&self, link: usize, max: usize) -> Vec<(FilterId, Arc<str>)> {
        let mut table = self.table.write();
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(id) = table.unsubscribe_queue[link].pop_front()
        {
            if let Some(filter) = table.get(id)
                && filter.phase() == Phase::Unsubscribing
            {
                taken.push((id, filter.name().clone()));
            }
        }
        metrics()
            .upstream_unsubscribes
            .increment(taken.len() as u64);
        taken
    }

    /// The core's UNSUBACK for a filter. If somebody came back meanwhile it is subscribed again.
    pub fn unsuback(&self, number: FilterId, now: Millis) {
        let mut table = self.table.write();
        let Some(filter) = table.get_mut(number) else {
            return;
        };
        match filter.unsuback() {
            Unsubacked::Stray => {}
            Unsubacked::Again(qos) => {
                let link = filter.link();
                table.request(number, qos);
                drop(table);
                if let Some(link) = link {
                    self.data[link].raise();
                }
            }
            Unsubacked::Remove => {
                table.remove(number, now);
                drop(table);
                self.retained.forget(std::iter::once(number));
            }
        }
    }

    /// D link `link` is connected, and the core still has its filters, or not. Returns whether
    /// messages may have been missed.
    pub fn data_link_up(
        &self,
        link: usize,
        session: LinkSession,
        first: bool,
        now: Millis,
    ) -> bool {
        let session_present = session == LinkSession::Resumed;
        self.data_up[link].store(true, Ordering::Release);
        self.doubted_until[link].store(0, Ordering::Release);
        let (mut numbers, mut lost, mut had) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut table = self.table.write();
            if session == LinkSession::New && !first {
                self.doubt_others(link, &table, now);
            }
            let all: Vec<FilterId> = table.of_link(link).map(|(id, _)| id).collect();
            table.subscribe_queue[link].clear();
            table.unsubscribe_queue[link].clear();
            for id in all {
                let Some(filter) = table.get_mut(id) else {
                    continue;
                };
                let resumed = filter.resume(session);
                if session_present && filter.is_active() {
                    had.push(id);
                }
                match resumed {
                    Resumed::Rests => {}
                    Resumed::Subscribe => table.subscribe_queue[link].push_back(id),
                    Resumed::Regain => {
                        lost.push(id);
                        table.subscribe_queue[link].push_back(id);
                    }
                    Resumed::Unsubscribe => table.unsubscribe_queue[link].push_back(id),
                    Resumed::Remove => table.remove(id, now),
                }
                numbers.push(id);
            }
            // The filters below a root are lost with it.
            table.add_below(&mut lost);
            table.add_below(&mut had);
            let loss = match session {
                LinkSession::Doubtful => Loss::Doubtful,
                _ => Loss::Sure,
            };
            lost.iter().for_each(|n| table.lost.insert(*n, loss));
            // The doubt of the time when it was away.
            table.lost.remove_all(&had);
        }
        // A PINGREQ of the lost connection is never answered.
        if self.awaits_barriers() {
            self.barriers.ask(link);
        }
        self.data[link].raise();
        // Even with the session kept, QoS 0 of the gap is gone, retained or not.
        let gap = !first && !session_present && !numbers.is_empty();
        self.table.read().add_below(&mut numbers);
        if session_present {
            self.retained.nothing_missed(&had);
        } else if self.resyncs() {
            self.retained.filters_lost(&lost);
        }
        self.retained.forget(numbers.into_iter());
        if gap {
            metrics().upstream_gaps.increment(1);
        }
        gap
    }

    /// The core has forgotten a link's session: those of links that are away it may have forgotten
    /// too, and copies that come meanwhile by others' filters are not to be dropped for theirs. One
    /// that seems to be there may be dead, and go away soon.
    fn doubt_others(&self, link: usize, table: &Table, now: Millis) {
        for other in (0..self.config.data_links).filter(|n| *n != link) {
            if self.data_up[other].load(Ordering::Acquire) {
                self.doubted_until[other].store(now + DOUBT, Ordering::Release);
            } else {
                doubt(other, table);
            }
        }
    }

    /// Whether every data link is up and has its filters again: what is published now is seen.
    pub fn data_settled(&self) -> bool {
        let data = &self.data_up[..self.config.data_links];
        data.iter().all(|up| up.load(Ordering::Acquire)) && self.table.read().lost.is_empty()
    }

    /// How often a data link was lost: the same number before and after means that the core was
    /// there all the time.
    pub fn data_losses(&self) -> u64 {
        self.data_lost.load(Ordering::Acquire)
    }

    /// D link `link` is lost.
    pub fn data_link_down(&self, link: usize, now: Millis) {
        self.data_up[link].store(false, Ordering::Release);
        self.data_lost.fetch_add(1, Ordering::AcqRel);
        let mut numbers: Vec<FilterId> = {
            let table = self.table.write();
            if now < self.doubted_until[link].load(Ordering::Acquire) {
                doubt(link, &table);
            }
            table.of_link(link).map(|(id, _)| id).collect()
        };
        self.table.read().add_below(&mut numbers);
        if self.resyncs() {
            self.retained.link_lost(&numbers);
        }
        self.retained.forget(numbers.into_iter());
    }

    /// Whether retained messages of lost filters are fetched again, for all subscribers.
    pub(in crate::router) fn resyncs(&self) -> bool {
        self.config.retained_resync && self.broker.retain_available()
    }

    /// The broker has a filter again that it had lost: its retained messages are fetched for all its
    /// subscribers.
    pub(in crate::router) fn resync_retained(&self, number: FilterId) {
        let (read, root) = {
            let table = self.table.read();
            // A group gets none, and a fetch for it would become a member of it.
            let read = |n: FilterId| {
                let filter = table.get(n);
                filter.is_some_and(|f| f.mask() != 0 && !f.is_shared())
            };
            let root = table.get(number).is_some_and(|f| f.is_root());
            (read(number) || table.below(number).any(read), root)
        };
        if read && self.resyncs() {
            self.retained.resync(number, root);
        } else {
            self.retained.skip_resync(self, number);
        }
    }

    /// Filters on D link `link`.
    pub fn filters_on(&self, link: usize) -> usize {
        let table = self.table.read();
        table
            .of_link(link)
            .filter(|(_, f)| f.phase() != Phase::Absent)
            .count()
    }
}
