//! What the link tasks ask of the router, and tell it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mqtt::{QoS, ReasonCode};
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::filters::lost::Loss;
use crate::router::filters::table::{State, Table, UNPLACED, Waiter};
use crate::router::handle::TaskWaker;

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

/// The part of the broker's profile that the router acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerFeatures {
    /// Subscription Identifiers are available.
    pub identifiers: bool,
    /// User properties reach the core's subscribers.
    pub properties: bool,
    /// Live messages keep RETAIN.
    pub keeps_retain: bool,
    /// Shared subscriptions work.
    pub shared: bool,
    /// A second SUBSCRIBE for a filter replaces the first [MQTT-3.8.4-3]. Where it does not, filters
    /// are held at the Maximum QoS from the start.
    pub replaces: bool,
    /// Maximum QoS.
    pub maximum_qos: QoS,
    /// Retain Available.
    pub retain_available: bool,
    /// Maximum Packet Size, bytes; `None`: not limited.
    pub packet_max: Option<u32>,
}

/// What the broker has of a link's session when the link has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkSession {
    /// The session is new and has no filters.
    New,
    /// An earlier CONNECT, whose answer was lost, may have begun the session: it may have no filters.
    Doubtful,
    /// The broker kept the session with all its filters.
    Resumed,
}

/// How long after the core forgot one link's session another's loss may have to do with it,
/// milliseconds: a dead connection is found by an unanswered PINGREQ.
const DOUBT: u64 = 30_000;

/// Adds the filters that are below those which are roots.
fn add_below(table: &Table, numbers: &mut Vec<FilterId>) {
    for at in 0..numbers.len() {
        numbers.extend(table.below(numbers[at]));
    }
}

/// The core may have forgotten what it had on a link.
fn doubt(link: usize, table: &Table) {
    let held = table.of_link(link as u8);
    let held = held.filter(|(_, filter)| filter.state == State::Active);
    let mut numbers: Vec<FilterId> = held.map(|(number, _)| number).collect();
    add_below(table, &mut numbers);
    for number in numbers {
        table.lost.insert(number, Loss::Doubtful);
    }
}

impl Router {
    /// Takes up what a CONNACK said. Filters that wait for it are placed. True: filters were
    /// placed before under other features, so all D links must begin anew.
    pub fn set_broker_features(&self, features: &BrokerFeatures, now: Millis) -> bool {
        let core = &self.core;
        core.maximum_qos
            .store(features.maximum_qos as u8, Ordering::Relaxed);
        core.retain_available
            .store(features.retain_available, Ordering::Relaxed);
        let packet_max = features.packet_max.unwrap_or(u32::MAX);
        core.packet_max.store(packet_max, Ordering::Relaxed);
        let kept_retain = core
            .retain_as_published
            .swap(features.keeps_retain, Ordering::Relaxed);
        core.properties
            .store(features.properties, Ordering::Relaxed);
        core.shared.store(features.shared, Ordering::Relaxed);
        let mut refused: Vec<(FilterId, Vec<Waiter>, ReasonCode)> = Vec::new();
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
        let links = table.pending.len();
        for trie in &mut table.tries {
            *trie = crate::topics::FilterTrie::new();
        }
        let mut all: Vec<FilterId> = Vec::new();
        for link in (0..links as u8).chain([UNPLACED]) {
            all.extend(table.of_link(link).map(|(n, _)| n));
        }
        all.sort_unstable();
        for queue in &mut table.pending {
            queue.clear();
        }
        for number in all {
            let Some(filter) = table.get_mut(number) else {
                continue;
            };
            // All links begin anew: the core has nothing that is to be left.
            if filter.state == State::Unsubscribing && !filter.is_wanted() {
                table.bury(number, now);
                continue;
            }
            filter.link = UNPLACED;
            if filter.shared && !features.shared && !self.config.local_groups {
                filter.state = State::Absent;
                filter.held = false;
                table.lost.remove(number);
                let waiters = table.take_waiters(number, QoS::ExactlyOnce);
                let code = ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED;
                refused.push((number, waiters, code));
                continue;
            }
            let name = filter.name.clone();
            let wanted = filter.state != State::Absent;
            let placed = table.place(number, self.hash(&name), &[]);
            if let Err(other) = placed {
                tracing::error!(
                    filter = %crate::telemetry::clean(&name, 256),
                    overlaps = %crate::telemetry::clean(&other, 256),
                    "A filter cannot be served: the core has no working subscription identifiers, and it overlaps another on every data link"
                );
                if let Some(filter) = table.get_mut(number) {
                    filter.state = State::Absent;
                    filter.held = false;
                    filter.upgrading = false;
                }
                table.lost.remove(number);
                let waiters = table.take_waiters(number, QoS::ExactlyOnce);
                refused.push((number, waiters, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            if wanted && let Some(filter) = table.get_mut(number) {
                filter.state = State::Pending;
                let link = usize::from(filter.link);
                table.pending[link].push_back(number);
            }
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

    /// Whether No Local can be marked.
    pub(in crate::router) fn properties_reach_core(&self) -> bool {
        self.core.properties.load(Ordering::Relaxed)
    }

    /// Whether live messages keep their RETAIN.
    pub fn retain_as_published(&self) -> bool {
        self.core.retain_as_published.load(Ordering::Relaxed)
    }

    /// Wakes D link `link`'s task.
    pub fn data_wake(&self, link: usize) -> &Arc<TaskWaker> {
        &self.data[link]
    }

    /// The number among the D links of link `n` for shared subscriptions.
    pub fn shared_link(&self, n: usize) -> usize {
        self.config.data_links + n
    }

    /// Wakes the R link's task.
    pub fn fetch_wake(&self) -> &Arc<TaskWaker> {
        &self.fetch
    }

    /// Up to `max` filters whose SUBSCRIBE is to be sent on D link `link` now.
    pub fn next_subscribes(&self, link: usize, max: usize) -> Vec<Wanted> {
        let mut table = self.table.write();
        let floor = table.floor;
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(number) = table.pending[link].pop_front()
        {
            let Some(filter) = table.get_mut(number) else {
                continue;
            };
            let upgrade = filter.upgrading && filter.state == State::Active;
            if filter.state != State::Pending && !upgrade {
                continue;
            }
            if !upgrade {
                filter.state = State::Subscribing;
                filter.upgrading = false;
            }
            filter.wanted = filter.wanted.max(floor);
            filter.asked = filter.wanted;
            filter.sent = true;
            taken.push(Wanted {
                number,
                name: filter.name.clone(),
                qos: filter.wanted,
            });
        }
        metrics().upstream_subscribes.increment(taken.len() as u64);
        taken
    }

    /// Up to `max` filters whose UNSUBSCRIBE is to be sent on D link `link` now.
    pub fn next_unsubscribes(&self, link: usize, max: usize) -> Vec<(FilterId, Arc<str>)> {
        let mut table = self.table.write();
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(number) = table.leaving[link].pop_front()
        {
            if let Some(filter) = table.get(number)
                && filter.state == State::Unsubscribing
            {
                taken.push((number, filter.name.clone()));
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
        if filter.state != State::Unsubscribing {
            return;
        }
        filter.state = State::Absent;
        filter.held = false;
        if filter.is_wanted() {
            let (qos, link) = (filter.wanted, filter.link);
            table.ask(number, qos);
            drop(table);
            if link != UNPLACED {
                self.data[usize::from(link)].raise();
            }
        } else {
            table.bury(number, now);
            drop(table);
            self.forget_retained(std::iter::once(number));
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
            let all: Vec<FilterId> = table.of_link(link as u8).map(|(n, _)| n).collect();
            table.pending[link].clear();
            table.leaving[link].clear();
            for number in all {
                let Some(filter) = table.get_mut(number) else {
                    continue;
                };
                filter.sent &= session != LinkSession::New;
                let again = match filter.state {
                    State::Absent => false,
                    State::Active => !session_present || filter.upgrading,
                    // What was under way when the link was lost: in doubt, and harmless to repeat.
                    State::Pending | State::Subscribing => true,
                    State::Unsubscribing => filter.is_wanted(),
                };
                let gone = filter.state == State::Unsubscribing && !again;
                if session_present && filter.state == State::Active {
                    had.push(number);
                }
                if again {
                    let is_lost = filter.state == State::Active && !session_present;
                    if filter.state != State::Active || is_lost {
                        filter.state = State::Pending;
                        filter.upgrading = false;
                    }
                    if is_lost {
                        lost.push(number);
                    }
                    table.pending[link].push_back(number);
                } else if gone {
                    if session != LinkSession::New {
                        table.leaving[link].push_back(number);
                    } else {
                        table.bury(number, now);
                    }
                }
                numbers.push(number);
            }
            // What is below a root is lost with it.
            add_below(&table, &mut lost);
            add_below(&table, &mut had);
            let loss = match session {
                LinkSession::Doubtful => Loss::Doubtful,
                _ => Loss::Sure,
            };
            lost.iter().for_each(|n| table.lost.insert(*n, loss));
            // The doubt of the time when it was away.
            table.lost.remove_all(&had);
        }
        // A PINGREQ of the lost connection is never answered.
        if self.awaits_fences() {
            self.ask_fence(link);
        }
        self.data[link].raise();
        // Even with the session kept, QoS 0 of the gap is gone, retained or not.
        let gap = !first && !session_present && !numbers.is_empty();
        add_below(&self.table.read(), &mut numbers);
        if session_present {
            self.nothing_missed(&had);
        } else {
            self.retained_lost(&lost);
        }
        self.forget_retained(numbers.into_iter());
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
            table.of_link(link as u8).map(|(n, _)| n).collect()
        };
        add_below(&self.table.read(), &mut numbers);
        self.retained_missed(&numbers);
        self.forget_retained(numbers.into_iter());
    }

    /// Filters on D link `link`.
    pub fn filters_on(&self, link: usize) -> usize {
        let table = self.table.read();
        table
            .of_link(link as u8)
            .filter(|(_, f)| f.state != State::Absent)
            .count()
    }
}
