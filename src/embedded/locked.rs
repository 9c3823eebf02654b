//! The state of an embedded broker with a lock, a clock and timers.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::embedded::options::EmbeddedOptions;
use crate::embedded::state::{ConnectionHandle, State};
use crate::time::Millis;

/// The wait before timers that panicked go on.
const AFTER_A_PANIC: Duration = Duration::from_secs(1);

/// The state, shared by the tasks of all connections.
pub(super) struct LockedState {
    /// Zero of this broker's clock.
    start: Instant,
    state: Mutex<State>,
    /// Notified when a deadline is earlier than those before it, and when the broker ends.
    timer: Arc<Notify>,
}

impl LockedState {
    /// A new state, whose timers run as a task until the last reference is dropped.
    pub(super) fn start(options: EmbeddedOptions) -> Arc<Self> {
        let locked = Arc::new(Self {
            start: Instant::now(),
            state: Mutex::new(State::new(options)),
            timer: Arc::new(Notify::new()),
        });
        #[expect(clippy::disallowed_methods, reason = "it ends with the broker")]
        tokio::spawn(keep_timers(Arc::downgrade(&locked), locked.timer.clone()));
        locked
    }

    /// Runs one short section under the lock, at one moment of the clock, and then wakes the
    /// connections that have something to send. `to_wake` is a buffer to use again.
    pub(super) fn with<R>(
        &self,
        to_wake: &mut Vec<Arc<ConnectionHandle>>,
        f: impl FnOnce(&mut State) -> R,
    ) -> R {
        let (result, is_earlier) = {
            let mut state = self.state.lock();
            state.now = Millis::ZERO + self.start.elapsed();
            let before = state.next_deadline();
            std::mem::swap(&mut state.to_wake, to_wake);
            let result = f(&mut state);
            std::mem::swap(&mut state.to_wake, to_wake);
            let next = state.next_deadline();
            let is_earlier = next.is_some_and(|n| before.is_none_or(|b| n < b));
            (result, is_earlier)
        };
        for connection in to_wake.drain(..) {
            connection.wake.notify_one();
        }
        if is_earlier {
            self.timer.notify_one();
        }
        result
    }
}

impl Drop for LockedState {
    fn drop(&mut self) {
        self.timer.notify_one();
    }
}

/// Runs the timers until the broker ends. A panic must not end them all.
async fn keep_timers(locked: Weak<LockedState>, timer: Arc<Notify>) {
    loop {
        let timers = AssertUnwindSafe(run_timers(locked.clone(), timer.clone()));
        if timers.catch_unwind().await.is_ok() {
            return;
        }
        tokio::time::sleep(AFTER_A_PANIC).await;
    }
}

/// Runs the timers that are due: ends of sessions, delayed wills, late retained messages.
async fn run_timers(locked: Weak<LockedState>, timer: Arc<Notify>) {
    loop {
        let Some(broker) = locked.upgrade() else {
            return;
        };
        let next = broker.with(&mut Vec::new(), |state| {
            state.fire_due();
            state.next_deadline()
        });
        let at = next.map(|at| broker.start + at.since(Millis::ZERO));
        // A reference that is held while the task sleeps would keep the broker alive.
        drop(broker);
        match at {
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = timer.notified() => {}
            },
            None => timer.notified().await,
        }
    }
}
