//! The sessions of a shard that have subscribed to a filter, in the form that the fan-out needs.

use smallvec::SmallVec;
use std::num::{NonZeroU16, NonZeroU32};
use std::ops::Range;

use crate::mqtt::QoS;
use crate::router::sessions::backlog::Backlog;
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
    /// The broker will grant no more: the client has the QoS that it asked for.
    pub settled: bool,
    /// Its messages may have to wait for retained ones.
    pub waits: bool,
    /// See [`Subscription::wild_below`].
    pub wild_below: Option<NonZeroU16>,
}

const _: () = assert!(size_of::<Member>() == 16);

impl Member {
    /// The member for a subscription of the session in `slot`.
    pub(super) fn of(slot: u32, s: &Subscription) -> Self {
        Self {
            slot,
            identifier: s.identifier,
            qos: s.active.then_some(s.options.qos),
            no_local: s.options.no_local,
            retain_as_published: s.options.retain_as_published,
            overlaps: s.overlaps > 0,
            settled: s.active && s.options.qos == s.asked,
            waits: false,
            wild_below: s.wild_below,
        }
    }

    /// Brings the member in line with its subscription. Messages that wait for retained ones go on
    /// waiting.
    pub(super) fn update(&mut self, s: &Subscription) {
        let waits = self.waits;
        *self = Self::of(self.slot, s);
        self.waits = waits;
    }
}

/// The members of one filter: there may be tens of thousands.
#[derive(Debug, Default)]
pub(in crate::router) struct Members {
    /// The members that are visited for each message, by slot.
    awake: SmallVec<[Member; 2]>,
    /// The members that sleep, with their messages.
    pub(super) backlog: Option<Box<Backlog>>,
}

impl Members {
    /// Brings a member in line with its subscription. It must not sleep.
    pub(crate) fn join(&mut self, slot: u32, s: &Subscription) {
        match self.awake.binary_search_by_key(&slot, |m| m.slot) {
            Ok(at) => self.awake[at].update(s),
            Err(at) => self.awake.insert(at, Member::of(slot, s)),
        }
    }

    /// Notes whether a member's messages may have to wait for retained ones.
    pub(crate) fn set_waits(&mut self, slot: u32, waits: bool) {
        if let Ok(at) = self.awake.binary_search_by_key(&slot, |m| m.slot) {
            self.awake[at].waits = waits;
        }
    }

    /// Takes out a member that does not sleep.
    pub(crate) fn leave(&mut self, slot: u32) {
        if let Ok(at) = self.awake.binary_search_by_key(&slot, |m| m.slot) {
            self.awake.remove(at);
        }
    }

    /// Takes out members that do not sleep, whose slots are in order.
    pub(super) fn leave_all(&mut self, slots: impl IntoIterator<Item = u32>) {
        let mut slots = slots.into_iter().peekable();
        self.awake.retain(|m| slots.next_if_eq(&m.slot).is_none());
        if self.awake.len() < self.awake.capacity() / 4 {
            self.awake.shrink_to_fit();
        }
    }

    /// Whether all members have left, asleep or awake.
    pub(crate) fn is_empty(&self) -> bool {
        self.awake.is_empty() && self.backlog.is_none()
    }

    /// The members that do not sleep.
    pub(crate) fn awake(&self) -> &[Member] {
        &self.awake
    }

    /// The members in these slots that do not sleep, `max` at most, and the slot of the member behind
    /// them, if there are more.
    pub(crate) fn part(&self, slots: Range<u32>, max: usize) -> (&[Member], Option<u32>) {
        let mut rest = &self.awake[..];
        if slots.start > 0 {
            rest = &rest[rest.partition_point(|m| m.slot < slots.start)..];
        }
        if slots.end < u32::MAX {
            rest = &rest[..rest.partition_point(|m| m.slot < slots.end)];
        }
        match rest.get(max) {
            Some(next) => (&rest[..max], Some(next.slot)),
            None => (rest, None),
        }
    }

    /// The members that do not sleep; the caller must not change their slots.
    pub(crate) fn awake_mut(&mut self) -> &mut [Member] {
        &mut self.awake
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
                let all = members.awake().iter().map(|m| (m.slot, m.identifier));
                prop_assert!(all.eq(known.iter().map(|(slot, id)| (*slot, NonZeroU32::new(*id)))));
            }
        }
    }
}
