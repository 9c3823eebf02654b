//! The subscriptions of a session that are in force.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use smallvec::SmallVec;

use crate::mqtt::{QoS, SubscribeOptions};
use crate::streams::StreamId;
use crate::topics::{FilterId, overlaps, split_shared};

use crate::session::{GrantOrder, PrimaryOver, Session, Unsubscribed};

/// Comparisons of filters that an UNSUBSCRIBE may take for each subscription of the session.
const COMPARED_EACH: usize = 16;

/// Comparisons of filters that an UNSUBSCRIBE may always take.
const COMPARED_ALWAYS: usize = 16 * 1024;

/// Bytes of a subscription beside its filter, as measured: here, where the list may have as many places
/// again, and among the filter's members.
pub const SUBSCRIPTION_BYTES: usize = 2 * size_of::<Subscription>() + 24;

/// A subscription of this session.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The router's number of the filter.
    pub filter: FilterId,
    /// The topic filter; shared with the router's table.
    pub name: Arc<str>,
    /// Granted QoS and options.
    pub options: SubscribeOptions,
    /// The QoS that the client asked for.
    pub asked: QoS,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// The broker granted it; until then it cannot be the primary one of overlapping subscriptions.
    pub active: bool,
    /// How many other subscriptions of this session may match the same topic; kept by the session.
    pub overlaps: u32,
    /// `$share/group/filter`: the router hands each message to one member.
    pub shared: bool,
    /// The filter has a wildcard. Two filters without wildcards overlap only if they are equal.
    pub wild: bool,
    /// The length of the client's mount in bytes, where the filter begins with a wildcard below it.
    pub wild_below: Option<NonZeroU16>,
}

impl Subscription {
    /// The value of [`Subscription::wild_below`] for a filter below a mount of `mount` bytes.
    pub fn wild_below(name: &str, mount: usize) -> Option<NonZeroU16> {
        let plain = split_shared(name).map_or(name, |(_, plain)| plain);
        match plain.as_bytes().get(mount) {
            // A filter is no longer than 65,535 bytes.
            Some(b'+' | b'#') => NonZeroU16::new(mount as u16),
            _ => None,
        }
    }

    /// Whether the subscription does not match `topic` although the broker says so. In the client's
    /// view the topic begins with `$` and the filter with a wildcard [MQTT-4.7.2-1], but the broker
    /// sees the mount before both.
    pub fn hides(&self, topic: &str) -> bool {
        hides(self.wild_below, topic)
    }

    /// Whether one message can be for both subscriptions of a client. Shared subscriptions get their
    /// messages apart from the others.
    fn overlaps_with(&self, other: &Self) -> bool {
        let wild = self.wild || other.wild;
        wild && !self.shared && !other.shared && overlaps(&self.name, &other.name)
    }
}

/// The outcome of [`Session::add_subscription`].
#[derive(Debug, Default)]
pub struct Added {
    /// The subscription replaced one on the same filter.
    pub replaced: bool,
    /// The other subscriptions that overlapped none before.
    pub newly_overlapping: Vec<FilterId>,
}

/// Some filters of a session, to be looked up.
struct Filters(SmallVec<[FilterId; 16]>);

impl Filters {
    fn new(filters: &[FilterId]) -> Self {
        let mut filters = SmallVec::from_slice(filters);
        filters.sort_unstable();
        Self(filters)
    }

    fn contains(&self, filter: FilterId) -> bool {
        self.0.binary_search(&filter).is_ok()
    }
}

/// The options of a subscription to `filter` by a client of MQTT 3, which cannot ask for any. A bridge gets
/// No Local and Retain As Published. No Local is illegal for a shared subscription [MQTT-3.8.3-4].
pub(super) fn v3_options(
    options: SubscribeOptions,
    filter: &str,
    bridge: bool,
) -> SubscribeOptions {
    SubscribeOptions {
        no_local: bridge && split_shared(filter).is_none(),
        retain_as_published: bridge,
        ..options
    }
}

/// [`Subscription::hides`] for a subscription with this [`Subscription::wild_below`].
pub fn hides(wild_below: Option<NonZeroU16>, topic: &str) -> bool {
    wild_below.is_some_and(|at| topic.as_bytes().get(usize::from(at.get())) == Some(&b'$'))
}

impl Session {
    /// The session's connection is that of a bridge, or not. Returns whether the options of its
    /// subscriptions have changed, because the last connection was of the other kind.
    pub(super) fn set_bridge(&mut self, bridge: bool) -> bool {
        if std::mem::replace(&mut self.bridge, bridge) == bridge {
            return false;
        }
        for s in &mut self.subscriptions {
            s.options = v3_options(s.options, &s.name, bridge);
        }
        !self.subscriptions.is_empty()
    }

    /// Puts a subscription in force, or replaces the one on the same filter [MQTT-3.8.4-3].
    /// `overlapping` are the filters of the others that overlap it.
    pub fn add_subscription(&mut self, mut new: Subscription, overlapping: &[FilterId]) -> Added {
        if let Some(connection) = self.phase.connection_mut() {
            connection.numbered(&new.name, new.filter);
        }
        let mut added = Added::default();
        let mut all = self.subscriptions.iter_mut();
        if let Some(old) = all.find(|s| s.filter == new.filter) {
            new.overlaps = old.overlaps;
            new.active = old.active;
            *old = new;
            added.replaced = true;
            return added;
        }
        if !overlapping.is_empty() {
            let overlapping = Filters::new(overlapping);
            for other in &mut self.subscriptions {
                if overlapping.contains(other.filter) {
                    other.overlaps += 1;
                    new.overlaps += 1;
                    if other.overlaps == 1 {
                        added.newly_overlapping.push(other.filter);
                    }
                }
            }
        }
        // Most sessions have one: room for four would be the larger part of a session.
        if self.subscriptions.is_empty() {
            self.subscriptions.reserve_exact(1);
        }
        self.subscriptions.push(new);
        added
    }

    /// The broker granted a subscription, which takes its place behind the subscriptions granted
    /// before. False: it was granted already, or is unknown.
    pub fn activate_subscription(&mut self, filter: FilterId) -> bool {
        let all = &mut self.subscriptions;
        // From the end, where the subscriptions without a grant are.
        let mut from_end = all.iter().enumerate().rev();
        let Some((at, _)) = from_end.find(|(_, s)| s.filter == filter) else {
            return false;
        };
        if all[at].active {
            return false;
        }
        let granted = all[..at].iter().rposition(|s| s.active);
        let behind = granted.map_or(0, |granted| granted + 1);
        all[behind..=at].rotate_right(1);
        all[behind].active = true;
        true
    }

    /// Which of these filters the broker has granted.
    pub fn active_of(&self, filters: &[FilterId]) -> Vec<FilterId> {
        if filters.is_empty() {
            return Vec::new();
        }
        let filters = Filters::new(filters);
        let active = self.subscriptions.iter().filter(|s| s.active);
        let found = active.filter(|s| filters.contains(s.filter));
        found.map(|s| s.filter).collect()
    }

    /// The subscription on a filter.
    pub fn subscription(&mut self, filter: FilterId) -> Option<&mut Subscription> {
        // From the end: the latest are looked for most.
        let mut all = self.subscriptions.iter_mut().rev();
        all.find(|s| s.filter == filter)
    }

    /// Takes a subscription away.
    pub fn remove_subscription(&mut self, filter: FilterId) -> Option<Subscription> {
        let at = self.subscriptions.iter().position(|s| s.filter == filter)?;
        let removed = self.subscriptions.remove(at);
        if let Some(connection) = self.phase.connection_mut() {
            connection.bind(&removed.name, StreamId::CONTROL);
        }
        let mut remaining = removed.overlaps;
        for other in &mut self.subscriptions {
            if remaining == 0 {
                break;
            }
            if other.overlaps_with(&removed) {
                other.overlaps -= 1;
                remaining -= 1;
            }
        }
        Some(removed)
    }

    /// Takes away the subscriptions at `places`, each named once, as if their client unsubscribed from
    /// one after the other. Of many, not every pair is compared: two filters that are not compared
    /// count as overlapping, which costs time and changes no delivery.
    pub(super) fn end_subscriptions(&mut self, places: &[usize]) -> Vec<Unsubscribed> {
        self.end_compared(places, COMPARED_EACH * self.subscriptions.len())
    }

    /// [`Session::end_subscriptions`] with at most about this number of comparisons of two filters.
    fn end_compared(&mut self, places: &[usize], comparisons: usize) -> Vec<Unsubscribed> {
        let all = &mut self.subscriptions;
        let mut is_ended = vec![false; all.len()];
        let exact = places.len() * all.len() <= comparisons;
        // The filters among which the ended ones have their places.
        let mut concerned = vec![false; all.len()];
        let mut hands_over = Vec::with_capacity(places.len());
        let mut budget = comparisons;
        for &at in places {
            is_ended[at] = true;
            let later = match exact {
                true => uncount(all, at, &is_ended, &mut concerned),
                false => {
                    concerned[at] = true;
                    overlaps_later(all, at, &is_ended, &mut budget)
                }
            };
            // Filters without a grant too: the broker may already send their copies.
            hands_over.push(later && all[at].active);
        }
        if !exact {
            for (s, concerned) in all.iter().zip(&mut concerned) {
                *concerned |= s.overlaps > 0;
            }
        }
        let order = hands_over.contains(&true).then(|| {
            let filters = all.iter().zip(&concerned).filter(|(_, c)| **c);
            Arc::new(GrantOrder::new(filters.map(|(s, _)| s.filter)))
        });
        let gone = places.iter().zip(hands_over).map(|(&at, hands_over)| {
            let ended = &all[at];
            let order = order.as_ref().filter(|_| hands_over);
            let place = order.and_then(|order| Some((order, order.place(ended.filter)?)));
            Unsubscribed {
                filter: ended.filter,
                name: ended.name.clone(),
                no_local: ended.options.no_local,
                primary_over: place.map(|(order, place)| PrimaryOver::new(order, place)),
            }
        });
        let gone: Vec<Unsubscribed> = gone.collect();
        // At once: taken away one by one, each would move all that follow it.
        let mut ended = is_ended.into_iter();
        all.retain(|_| !ended.next().unwrap_or_default());
        if !exact {
            count_anew(all, comparisons.max(COMPARED_ALWAYS));
        }
        if let Some(connection) = self.phase.connection_mut() {
            for ended in &gone {
                connection.bind(&ended.name, StreamId::CONTROL);
            }
        }
        gone
    }
}

/// The subscription at `at` ends: the others that overlap it count it no longer. It and the later ones
/// among them become `concerned`. Returns whether there are later ones.
fn uncount(all: &mut [Subscription], at: usize, is_ended: &[bool], concerned: &mut [bool]) -> bool {
    let overlapping: Vec<usize> = match all[at].overlaps {
        0 => Vec::new(),
        count => (0..all.len())
            .filter(|i| !is_ended[*i] && all[*i].overlaps_with(&all[at]))
            .take(count as usize)
            .collect(),
    };
    concerned[at] = true;
    let mut later = false;
    for i in overlapping {
        all[i].overlaps = all[i].overlaps.saturating_sub(1);
        if i > at {
            later = true;
            concerned[i] = true;
        }
    }
    later
}

/// Whether a later subscription overlaps the one at `at`. `budget` are the comparisons that may be made.
fn overlaps_later(all: &[Subscription], at: usize, is_ended: &[bool], budget: &mut usize) -> bool {
    if all[at].overlaps == 0 {
        return false;
    }
    let later = (at + 1..all.len()).filter(|i| !is_ended[*i] && all[*i].overlaps > 0);
    for i in later {
        let Some(rest) = budget.checked_sub(1) else {
            return true;
        };
        *budget = rest;
        if all[i].overlaps_with(&all[at]) {
            return true;
        }
    }
    false
}

/// Counts the overlaps of the remaining subscriptions after others were taken away. If that takes more
/// than `comparisons`, the counts stay too high.
fn count_anew(all: &mut [Subscription], comparisons: usize) {
    let remaining = all.iter().filter(|s| s.overlaps > 0).count();
    if remaining * remaining > comparisons {
        return;
    }
    let counts: Vec<u32> = (all.iter())
        .map(|s| match s.overlaps {
            0 => 0,
            _ => {
                let others = all.iter().filter(|o| o.overlaps > 0);
                let others = others.filter(|o| o.filter != s.filter && s.overlaps_with(o));
                others.count() as u32
            }
        })
        .collect();
    for (s, count) in all.iter_mut().zip(counts) {
        s.overlaps = count;
    }
}

#[cfg(test)]
mod tests;
