//! Filters that the broker lost with a link's session, until it has granted them again.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::hashing::LookUp;
use crate::topics::FilterId;

/// How sure it is that a filter is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Loss {
    /// The link's session is gone.
    Sure,
    /// The broker may still have the filter, and messages for it, whose copies must not be dropped.
    Doubtful,
}

/// The lost filters; nearly always none.
#[derive(Debug, Default)]
pub(in crate::router) struct Lost {
    count: AtomicUsize,
    filters: RwLock<LookUp<FilterId, Loss>>,
}

impl Lost {
    pub(super) fn insert(&self, filter: FilterId, loss: Loss) {
        let mut filters = self.filters.write();
        filters.insert(filter, loss);
        self.count.store(filters.len(), Ordering::Release);
    }

    /// The broker has a filter again, or nobody wants it any more. Returns whether it was lost.
    pub(super) fn remove(&self, filter: FilterId) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut filters = self.filters.write();
        let lost = filters.remove(&filter).is_some();
        self.count.store(filters.len(), Ordering::Release);
        lost
    }

    /// The broker has these filters after all.
    pub(super) fn remove_all(&self, all: &[FilterId]) {
        if self.is_empty() || all.is_empty() {
            return;
        }
        let mut filters = self.filters.write();
        for filter in all {
            filters.remove(filter);
        }
        self.count.store(filters.len(), Ordering::Release);
    }

    pub(super) fn contains(&self, filter: FilterId) -> bool {
        !self.is_empty() && self.filters.read().contains_key(&filter)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// A function that tells whether a filter is lost at this moment.
    pub(super) fn look(&self) -> impl Fn(FilterId) -> Option<Loss> {
        let filters = (!self.is_empty()).then(|| self.filters.read());
        move |filter| filters.as_ref()?.get(&filter).copied()
    }
}
