//! Overlapping subscriptions of one client: whose copy of a message it gets.

use crate::mqtt::QoS;
use crate::topics::{FilterId, matches, overlaps};

use crate::session::Subscription;

/// What a client gets of a message that several of its subscriptions may match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Primary {
    /// The filter whose copy it is.
    pub filter: FilterId,
    /// The highest QoS that a matching subscription was granted.
    pub qos: QoS,
    /// One of them wants RETAIN as published.
    pub retain: bool,
}

/// The primary of a client's subscriptions that match `topic`: the one that the core granted first.
/// Its copy is the one that the client gets, on any core, with all their identifiers. Granting
/// another changes nothing for the messages that are under way, on whichever links. `None`: none of
/// them is granted yet, so that which copies will come is not known.
/// `lost` tells filters that the core has lost and not taken again. For an `own` publish of the
/// client, those with No Local do not count.
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
            && !identifiers.contains(&identifier.get())
        {
            identifiers.push(identifier.get());
        }
        if !s.active {
            continue;
        }
        // Whichever copy it is, it counts for all of them.
        qos = qos.max(s.options.qos);
        // What the core has lost is primary only among its like.
        let held = !lost(s.filter);
        if best.is_none_or(|(known, _)| held && !known) {
            best = Some((held, s.filter));
        }
    }
    best.map(|(_, filter)| Primary {
        filter,
        qos,
        retain,
    })
}

/// Whether one message can be for both. Shared subscriptions are on their own.
pub(super) fn clash(a: &Subscription, b: &Subscription) -> bool {
    (a.wild || b.wild) && !a.shared && !b.shared && overlaps(&a.name, &b.name)
}
