//! Counts the locks that a thread takes, for tests.

use std::cell::Cell;

/// A lock of the router.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) enum Lock {
    Shard,
    Table,
}

thread_local! {
    static TAKEN: [Cell<usize>; 2] = const { [Cell::new(0), Cell::new(0)] };
}

/// A lock is about to be taken.
pub(in crate::router) fn count(lock: Lock) {
    TAKEN.with(|taken| taken[lock as usize].update(|n| n + 1));
}

/// How often `f` takes the locks of shards, and that of the table.
pub(in crate::router) fn taken_by(f: impl FnOnce()) -> (usize, usize) {
    TAKEN.with(|taken| taken.iter().for_each(|n| n.set(0)));
    f();
    TAKEN.with(|taken| (taken[0].get(), taken[1].get()))
}
