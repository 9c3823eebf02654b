//! Filters that the core held and has lost with a link's session, until it holds them again.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use parking_lot::{RwLock, RwLockReadGuard};

/// The numbers of lost filters; nearly always none.
#[derive(Debug, Default)]
pub(super) struct Lost {
    count: AtomicUsize,
    filters: RwLock<HashSet<u32, RandomState>>,
}

impl Lost {
    pub fn insert(&self, filter: u32) {
        let mut filters = self.filters.write();
        filters.insert(filter);
        self.count.store(filters.len(), Ordering::Release);
    }

    /// The core has it again, or nobody wants it any more.
    pub fn remove(&self, filter: u32) {
        if self.is_empty() {
            return;
        }
        let mut filters = self.filters.write();
        filters.remove(&filter);
        self.count.store(filters.len(), Ordering::Release);
    }

    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// All of them, if there are any.
    pub fn look(&self) -> Option<RwLockReadGuard<'_, HashSet<u32, RandomState>>> {
        (!self.is_empty()).then(|| self.filters.read())
    }
}
