//! The subscriptions of a session that are in force.

use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use crate::mqtt::{QoS, SubscribeOptions};
use crate::streams::StreamId;
use crate::topics::{FilterId, overlaps, split_shared};

use crate::session::{Session, Unsubscribed};

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

/// [`Subscription::hides`] for a subscription with this [`Subscription::wild_below`].
pub fn hides(wild_below: Option<NonZeroU16>, topic: &str) -> bool {
    wild_below.is_some_and(|at| topic.as_bytes().get(usize::from(at.get())) == Some(&b'$'))
}

impl Session {
    /// Puts a subscription in force, or replaces the one on the same filter [MQTT-3.8.4-3].
    /// Returns the one that it replaced.
    pub fn add_subscription(&mut self, mut new: Subscription) -> Option<Subscription> {
        if let Some(connection) = self.phase.connection_mut() {
            connection.numbered(&new.name, new.filter);
        }
        let mut all = self.subscriptions.iter_mut();
        if let Some(old) = all.find(|s| s.filter == new.filter) {
            new.overlaps = old.overlaps;
            new.active = old.active;
            return Some(std::mem::replace(old, new));
        }
        for other in &mut self.subscriptions {
            if other.overlaps_with(&new) {
                other.overlaps += 1;
                new.overlaps += 1;
            }
        }
        // Most sessions have one: room for four would be the larger part of a session.
        if self.subscriptions.is_empty() {
            self.subscriptions.reserve_exact(1);
        }
        self.subscriptions.push(new);
        None
    }

    /// The broker granted a subscription, which takes its place behind the subscriptions granted
    /// before. False: it was granted already, or is unknown.
    pub fn activate_subscription(&mut self, filter: FilterId) -> bool {
        let all = &mut self.subscriptions;
        let Some(at) = all.iter().position(|s| s.filter == filter && !s.active) else {
            return false;
        };
        let behind = all.iter().position(|s| !s.active).unwrap_or(at);
        all[behind..=at].rotate_right(1);
        all[behind].active = true;
        true
    }

    /// The subscription on a filter.
    pub fn subscription(&mut self, filter: FilterId) -> Option<&mut Subscription> {
        self.subscriptions.iter_mut().find(|s| s.filter == filter)
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
    /// one after the other.
    pub(super) fn end_subscriptions(&mut self, places: &[usize]) -> Vec<Unsubscribed> {
        let all = &mut self.subscriptions;
        let mut is_ended = vec![false; all.len()];
        let mut gone = Vec::with_capacity(places.len());
        for &at in places {
            is_ended[at] = true;
            let overlapping: Vec<usize> = match all[at].overlaps {
                0 => Vec::new(),
                count => (0..all.len())
                    .filter(|i| !is_ended[*i] && all[*i].overlaps_with(&all[at]))
                    .take(count as usize)
                    .collect(),
            };
            // Those without a grant too: the broker may already send their copies.
            let later = overlapping.iter().filter(|i| **i > at);
            let primary_over = match all[at].active {
                true => later.map(|i| all[*i].filter).collect(),
                false => Vec::new(),
            };
            for i in overlapping {
                all[i].overlaps -= 1;
            }
            let ended = &all[at];
            gone.push(Unsubscribed {
                filter: ended.filter,
                name: ended.name.clone(),
                no_local: ended.options.no_local,
                primary_over,
            });
        }
        // At once: taken away one by one, each would move all that follow it.
        let mut ended = is_ended.into_iter();
        all.retain(|_| !ended.next().unwrap_or_default());
        if let Some(connection) = self.phase.connection_mut() {
            for ended in &gone {
                connection.bind(&ended.name, StreamId::CONTROL);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests;
