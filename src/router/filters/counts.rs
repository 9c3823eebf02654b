//! How many data links and shared links there are, may be, and are in use.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::router::filters::actions::LinkSet;

/// The numbers of data links and of links for shared subscriptions. Data links come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) struct LinkCounts {
    /// Data links from the start.
    pub data: usize,
    /// Data links at most. Further ones are opened where the broker has no Subscription Identifiers, for
    /// filters that overlap others, and elsewhere for many filters.
    pub data_max: usize,
    /// Where the broker has Subscription Identifiers, another data link is opened when there are more
    /// filters than this for each.
    pub filters_each: usize,
    /// Shared links that are used where the broker has Subscription Identifiers.
    pub shared: usize,
    /// Shared links at most.
    pub shared_max: usize,
}

impl LinkCounts {
    /// Exactly so many links.
    #[cfg(test)]
    pub(crate) fn fixed(data: usize, shared: usize) -> Self {
        Self {
            data,
            data_max: data,
            filters_each: usize::MAX,
            shared,
            shared_max: shared,
        }
    }

    /// All links.
    pub(crate) fn all(self) -> usize {
        self.data_max + self.shared_max
    }

    /// The data links that filters may be placed on where the broker has no Subscription Identifiers.
    pub(crate) fn of_data(self) -> Range<usize> {
        0..self.catch_all().unwrap_or(self.data_max)
    }

    /// How many data links there are to be for so many filters where the broker has Subscription
    /// Identifiers.
    pub(crate) fn data_for(self, filters: usize) -> usize {
        let links = filters.div_ceil(self.filters_each);
        links.clamp(self.data, self.data_max)
    }

    /// The links that shared subscriptions may be placed on.
    pub(crate) fn of_shared(self, identifiers: bool) -> Range<usize> {
        let count = match identifiers {
            true => self.shared,
            false => self.shared_max,
        };
        self.data_max..self.data_max + count
    }

    /// The data link that is kept free for the filter inside which everything lies, if links can be
    /// added.
    pub(crate) fn catch_all(self) -> Option<usize> {
        (self.data_max > self.data).then(|| self.data_max - 1)
    }
}

/// The links that filters have been placed on. A link stays in use once it was needed.
#[derive(Debug)]
pub(in crate::router) struct UsedLinks {
    /// As bits.
    links: AtomicU32,
    /// The first so many data links are to be connected, whether filters are on them or not.
    data_wanted: AtomicUsize,
}

impl UsedLinks {
    /// The first so many links are in use from the start.
    pub(crate) fn new(first: usize) -> Self {
        Self {
            links: AtomicU32::new((1 << first) - 1),
            data_wanted: AtomicUsize::new(first),
        }
    }

    /// Returns whether the link was not in use before.
    pub(super) fn insert(&self, link: usize) -> bool {
        let bit = 1 << link;
        self.links.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Data links that are to be connected, whether filters are on them or not: the first ones.
    pub(crate) fn data_wanted(&self) -> usize {
        self.data_wanted.load(Ordering::Acquire)
    }

    /// The first `count` data links are to be connected. Returns how many were before.
    pub(super) fn want_data(&self, count: usize) -> usize {
        self.data_wanted.fetch_max(count, Ordering::AcqRel)
    }

    pub(crate) fn contains(&self, link: usize) -> bool {
        self.links.load(Ordering::Acquire) & (1 << link) != 0
    }

    /// Those among the first `count` links.
    pub(crate) fn below(&self, count: usize) -> LinkSet {
        (0..count).filter(|link| self.contains(*link)).collect()
    }
}
