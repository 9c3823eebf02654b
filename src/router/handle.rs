//! How the router reaches a task that sleeps on its socket.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::session::CloseReason;
use crate::time::Millis;

/// Wakes one task, once for any number of reasons until it looks.
#[derive(Debug, Default)]
pub struct TaskWaker {
    waker: AtomicWaker,
    raised: AtomicBool,
}

impl TaskWaker {
    /// Something waits for the task.
    pub fn raise(&self) {
        if !self.raised.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Registers the task, which calls this at each poll. Returns whether something waits for it.
    pub fn take(&self, waker: &Waker) -> bool {
        self.waker.register(waker);
        self.raised.swap(false, Ordering::AcqRel)
    }

    /// Wakes the task even if it has not looked since the last wake-up.
    fn raise_again(&self) {
        self.raised.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// CONNECTs that wait until the bytes that their client sent on an older connection are read. They go
/// on when this is dropped.
#[derive(Debug, Default)]
pub struct Successors(Vec<Arc<TaskWaker>>);

impl Successors {
    fn add(&mut self, successor: Arc<TaskWaker>) {
        // Nobody holds the other end of one that has given up.
        self.0.retain(|s| Arc::strong_count(s) > 1);
        self.0.push(successor);
    }

    /// Makes `others` wait for the same moment.
    pub(crate) fn append(&mut self, mut others: Self) {
        self.0.append(&mut others.0);
    }
}

impl Drop for Successors {
    fn drop(&mut self) {
        for successor in &self.0 {
            successor.raise();
        }
    }
}

/// What a connection's task is asked to do, beside waking up.
#[derive(Debug, Default)]
struct Requests {
    close: Option<CloseReason>,
    /// Boxed, because few connections have any.
    successors: Option<Box<Successors>>,
}

/// The router's handle on the task of one client's connection: wakes it, asks it for a ping, to read
/// what has arrived or to end, and hears from it when its socket makes progress.
#[derive(Debug, Default)]
pub struct ConnectionHandle {
    waker: TaskWaker,
    ping: AtomicBool,
    /// There are successors.
    awaited: AtomicBool,
    queued: AtomicBool,
    /// When the task was last given output.
    sent_at: AtomicU64,
    /// When the transport last took a part of the output.
    moved_at: AtomicU64,
    requests: Mutex<Requests>,
    /// Milliseconds of silence after which the connection's WebSocket is pinged; `None`: it is never
    /// pinged.
    ping_after_ms: Option<NonZeroU32>,
}

impl ConnectionHandle {
    /// The handle of a connection whose WebSocket is pinged after silence of `ping_after`, which is whole
    /// milliseconds and at most 49 days. `None`: it is never pinged.
    pub fn new(ping_after: Option<Duration>) -> Self {
        let whole_ms = |after: Duration| u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
        Self {
            ping_after_ms: ping_after.and_then(|after| NonZeroU32::new(whole_ms(after))),
            ..Self::default()
        }
    }

    /// Something waits for the task.
    pub fn raise(&self) {
        self.waker.raise();
    }

    /// Registers the task, which calls this at each poll. Returns whether something waits for it.
    pub fn take(&self, waker: &Waker) -> bool {
        self.waker.take(waker)
    }

    /// Tells the task to end its connection; the first reason stays.
    pub fn close(&self, reason: CloseReason) {
        self.requests.lock().close.get_or_insert(reason);
        self.waker.raise_again();
    }

    /// Why the connection is to end, if it is.
    pub fn closing(&self) -> Option<CloseReason> {
        self.requests.lock().close
    }

    /// Asks the task to read everything that has arrived, and then to let `successor` go on.
    pub(super) fn await_read_out(&self, successor: Arc<TaskWaker>) {
        let mut requests = self.requests.lock();
        requests.successors.get_or_insert_default().add(successor);
        drop(requests);
        self.awaited.store(true, Ordering::Release);
        self.waker.raise_again();
    }

    /// The CONNECTs that wait until everything that has arrived is read, if there are any. Each is
    /// returned once.
    pub fn take_successors(&self) -> Option<Successors> {
        let awaited =
            self.awaited.load(Ordering::Relaxed) && self.awaited.swap(false, Ordering::AcqRel);
        match awaited {
            true => self.requests.lock().successors.take().map(|s| *s),
            false => None,
        }
    }

    /// Asks for a ping that keeps the transport alive.
    pub fn ping(&self, now: Millis) {
        self.sent(now);
        self.ping.store(true, Ordering::Release);
        self.raise();
    }

    /// The silence after which the connection's WebSocket is pinged, if it is.
    pub(super) fn ping_after(&self) -> Option<Duration> {
        let ms = self.ping_after_ms?.get();
        Some(Duration::from_millis(ms.into()))
    }

    /// Whether a ping was asked for. Each request is returned once.
    pub fn take_ping(&self) -> bool {
        self.ping.load(Ordering::Relaxed) && self.ping.swap(false, Ordering::AcqRel)
    }

    /// Reports that the transport took a part of the output.
    pub fn moved(&self, now: Millis) {
        self.moved_at.store(now.as_u64(), Ordering::Relaxed);
    }

    /// When the transport last took a part of the output.
    pub(super) fn moved_at(&self) -> Millis {
        Millis::new(self.moved_at.load(Ordering::Relaxed))
    }

    /// The task was given output.
    pub(super) fn sent(&self, now: Millis) {
        self.sent_at.store(now.as_u64(), Ordering::Relaxed);
    }

    /// When the task was last given output, or asked for a ping.
    pub(super) fn sent_at(&self) -> Millis {
        Millis::new(self.sent_at.load(Ordering::Relaxed))
    }

    /// Marks the task as a member of the list of tasks to wake at the next tick. False: it was one.
    pub(super) fn queue_up(&self) -> bool {
        !self.queued.swap(true, Ordering::AcqRel)
    }

    /// Wakes the task, which the list of tasks to wake no longer holds.
    pub(super) fn unqueue(&self) {
        self.queued.store(false, Ordering::Release);
        self.raise();
    }
}
