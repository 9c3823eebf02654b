//! Filters that the core held and has lost with a link's session, until it holds them again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use parking_lot::RwLock;

use crate::topics::FilterId;

/// How sure it is that a filter is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Loss {
    /// Its session is gone.
    Sure,
    /// The core may have it still, and messages for it: they are not to be dropped for another's.
    Doubtful,
}

/// The lost filters; nearly always none.
#[derive(Debug, Default)]
pub(in crate::router) struct Lost {
    count: AtomicUsize,
    /// By number.
    filters: RwLock<HashMap<FilterId, Loss, RandomState>>,
}

impl Lost {
    pub fn insert(&self, filter: FilterId, loss: Loss) {
        let mut filters = self.filters.write();
        filters.insert(filter, loss);
        self.count.store(filters.len(), Ordering::Release);
    }

    /// The core has it again, or nobody wants it any more. Whether it was lost.
    pub fn remove(&self, filter: FilterId) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut filters = self.filters.write();
        let lost = filters.remove(&filter).is_some();
        self.count.store(filters.len(), Ordering::Release);
        lost
    }

    /// The core has these all the same.
    pub fn remove_all(&self, all: &[FilterId]) {
        if self.is_empty() || all.is_empty() {
            return;
        }
        let mut filters = self.filters.write();
        for filter in all {
            filters.remove(filter);
        }
        self.count.store(filters.len(), Ordering::Release);
    }

    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Tells of each filter whether it is lost, as of now.
    pub fn look(&self) -> impl Fn(FilterId) -> Option<Loss> {
        let filters = (!self.is_empty()).then(|| self.filters.read());
        move |filter| filters.as_ref()?.get(&filter).copied()
    }
}
