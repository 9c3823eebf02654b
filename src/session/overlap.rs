//! Overlapping subscriptions of one client: which of them is the primary one, whose copy of a message
//! the client gets.

use crate::hashing::LookUpSet;
use crate::mqtt::QoS;
use crate::topics::{FilterId, matches};

use crate::session::Subscription;

/// Up to this number of Subscription Identifiers, each is compared with those before it.
const COMPARED_MAX: usize = 32;

/// The delivery to a client of a message that several of its subscriptions may match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Primary {
    /// The filter whose copy is delivered.
    pub filter: FilterId,
    /// The highest QoS that a matching subscription was granted.
    pub qos: QoS,
    /// A matching subscription wants RETAIN as published.
    pub retain: bool,
}

/// The primary of a client's subscriptions that match `topic`: the one that the broker granted first.
/// The client gets its copy, with the identifiers of all of them, whatever the broker. A later grant
/// changes nothing for the messages that are under way, on whichever links. `None`: no matching
/// subscription is granted yet, so it is not known which copies will come.
/// `lost` tells whether the broker has lost a filter and not granted it again. Subscriptions with No
/// Local do not count for an `own` publish of the client.
///
/// [`primary_filter`] costs less where most copies are not the primary one.
pub fn primary(
    subscriptions: &[Subscription],
    topic: &str,
    own: bool,
    lost: impl Fn(FilterId) -> bool,
    identifiers: &mut Vec<u32>,
) -> Option<Primary> {
    let mut best: Option<(bool, FilterId)> = None;
    let (mut qos, mut retain) = (QoS::AtMostOnce, false);
    identifiers.clear();
    for s in subscriptions {
        let hidden = (own && s.options.no_local) || s.hides(topic);
        if s.shared || hidden || !matches(&s.name, topic) {
            continue;
        }
        retain |= s.options.retain_as_published;
        if let Some(identifier) = s.identifier
            && (identifiers.len() >= COMPARED_MAX || !identifiers.contains(&identifier.get()))
        {
            identifiers.push(identifier.get());
        }
        if !s.active {
            continue;
        }
        // The copy stands for all matching subscriptions, whichever it is.
        qos = qos.max(s.options.qos);
        // A lost filter is primary only if all the others are lost too.
        let working = !lost(s.filter);
        if best.is_none_or(|(known, _)| working && !known) {
            best = Some((working, s.filter));
        }
    }
    if identifiers.len() > COMPARED_MAX {
        let mut seen = LookUpSet::default();
        identifiers.retain(|identifier| seen.insert(*identifier));
    }
    best.map(|(_, filter)| Primary {
        filter,
        qos,
        retain,
    })
}

/// The filter of the [`primary`] subscription alone.
pub fn primary_filter(
    subscriptions: &[Subscription],
    topic: &str,
    own: bool,
    lost: impl Fn(FilterId) -> bool,
) -> Option<FilterId> {
    let mut best = None;
    for s in subscriptions.iter().filter(|s| s.active && !s.shared) {
        let hidden = (own && s.options.no_local) || s.hides(topic);
        if hidden || !matches(&s.name, topic) {
            continue;
        }
        if !lost(s.filter) {
            return Some(s.filter);
        }
        best = best.or(Some(s.filter));
    }
    best
}
