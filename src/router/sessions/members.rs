//! The sessions of a shard that have subscribed to a filter, in the form that the fan-out needs.

use smallvec::SmallVec;
use std::num::{NonZeroU16, NonZeroU32};

use crate::mqtt::QoS;
use crate::session::Subscription;

/// One subscription, in the form that the fan-out needs.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct Member {
    pub slot: u32,
    pub identifier: Option<NonZeroU32>,
    /// The granted QoS; `None` if nothing is delivered, because the filter is not granted yet.
    pub qos: Option<QoS>,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub overlaps: bool,
    /// See [`Subscription::wild_below`].
    pub wild_below: Option<NonZeroU16>,
}

/// The members of one filter, by slot: there may be tens of thousands.
#[derive(Debug, Default)]
pub(in crate::router) struct Members(SmallVec<[Member; 2]>);

impl Members {
    /// Brings a member in line with its subscription.
    pub(crate) fn join(&mut self, slot: u32, s: &Subscription) {
        let member = Member {
            slot,
            identifier: s.identifier,
            qos: s.active.then_some(s.options.qos),
            no_local: s.options.no_local,
            retain_as_published: s.options.retain_as_published,
            overlaps: s.overlaps > 0,
            wild_below: s.wild_below,
        };
        match self.0.binary_search_by_key(&slot, |m| m.slot) {
            Ok(at) => self.0[at] = member,
            Err(at) => self.0.insert(at, member),
        }
    }

    pub(crate) fn leave(&mut self, slot: u32) {
        if let Ok(at) = self.0.binary_search_by_key(&slot, |m| m.slot) {
            self.0.remove(at);
        }
    }

    pub(crate) fn all(&self) -> &[Member] {
        &self.0
    }

    /// The members from slot `from` on, `max` at most, and the slot of the member behind them.
    pub(crate) fn part(&self, from: u32, max: usize) -> (&[Member], Option<u32>) {
        let rest = &self.0[self.0.partition_point(|m| m.slot < from)..];
        match rest.get(max) {
            Some(next) => (&rest[..max], Some(next.slot)),
            None => (rest, None),
        }
    }

    /// All members; the caller must not change their slots.
    pub(crate) fn all_mut(&mut self) -> &mut [Member] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::mqtt::SubscribeOptions;
    use crate::topics::FilterId;

    proptest! {
        #[test]
        fn members_are_in_order_whoever_comes_and_goes(
            steps in prop::collection::vec((0..20u32, any::<bool>(), any::<u32>()), 0..80),
        ) {
            let mut members = Members::default();
            let mut known = BTreeMap::new();
            for (slot, joins, identifier) in steps {
                if joins {
                    let subscription = Subscription {
                        filter: FilterId(1),
                        name: "a".into(),
                        options: SubscribeOptions::default(),
                        asked: QoS::AtMostOnce,
                        identifier: NonZeroU32::new(identifier),
                        active: true,
                        overlaps: 0,
                        shared: false,
                        wild: false,
                        wild_below: None,
                    };
                    members.join(slot, &subscription);
                    known.insert(slot, identifier);
                } else {
                    members.leave(slot);
                    known.remove(&slot);
                }
                let all = members.all().iter().map(|m| (m.slot, m.identifier));
                prop_assert!(all.eq(known.iter().map(|(slot, id)| (*slot, NonZeroU32::new(*id)))));
            }
        }
    }
}
