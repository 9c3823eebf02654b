//! Actions that a change of filters leaves to the router to take, once the table's lock is given back.

use crate::mqtt::{QoS, ReasonCode};
use crate::router::types::PendingGrant;
use crate::topics::FilterId;

/// A set of data and shared links, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::router) struct LinkSet(u32);

impl LinkSet {
    pub(crate) fn insert(&mut self, link: usize) {
        // There are at most 16 links.
        self.0 |= 1 << link;
    }

    /// How many links there are.
    pub(crate) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The links, in the order of their numbers.
    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..u32::BITS as usize).filter(move |link| self.0 & (1 << link) != 0)
    }
}

impl std::ops::BitOrAssign for LinkSet {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl Extend<usize> for LinkSet {
    fn extend<T: IntoIterator<Item = usize>>(&mut self, links: T) {
        links.into_iter().for_each(|link| self.insert(link));
    }
}

impl FromIterator<usize> for LinkSet {
    fn from_iter<T: IntoIterator<Item = usize>>(links: T) -> Self {
        let mut set = Self::default();
        set.extend(links);
        set
    }
}

/// SUBSCRIBEs of clients that have an answer.
#[derive(Debug)]
#[must_use]
pub(in crate::router) struct Answered {
    pub grants: Vec<PendingGrant>,
    pub code: ReasonCode,
    /// The answer is the broker's, and not one of our own in its place.
    pub confirmed: bool,
}

/// Subscriptions that were granted without the broker's answer, and count from now on.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(in crate::router) struct Confirmed {
    pub filter: FilterId,
    /// Shards with sessions that have the filter, as bits.
    pub mask: u64,
    pub granted: QoS,
}

/// A filter that the broker has again after it had lost it.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(in crate::router) struct Regained {
    pub filter: FilterId,
    /// Other filters get their messages through it.
    pub has_inner: bool,
    /// Sessions get its messages, and could have missed retained ones.
    pub has_readers: bool,
}

/// Actions after an answer of the broker.
#[derive(Debug, Default)]
#[must_use]
pub(in crate::router) struct Actions {
    /// Links that have something to send.
    pub wake: LinkSet,
    /// Filters whose cached retained messages may be older than messages that were missed.
    pub forget_retained: Vec<FilterId>,
    pub regained: Option<Regained>,
    /// In this order.
    pub outcomes: Vec<Outcome>,
}

/// The outcome of an answer for one filter: its own, or that of the filter in which it lies.
#[derive(Debug)]
pub(in crate::router) struct Outcome {
    pub confirmed: Option<Confirmed>,
    pub answered: Answered,
}

/// A group of filters that leaves the broker, with what the rest of the router forgets about it.
#[derive(Debug, Default)]
#[must_use]
pub(in crate::router) struct Released {
    /// Links that have an UNSUBSCRIBE to send.
    pub wake: LinkSet,
    /// Filters whose retained messages are forgotten.
    pub forget_retained: Vec<FilterId>,
}
