//! How the router reaches a task that sleeps on its socket.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::session::Close;
use crate::time::Millis;

/// The router's handle on one task: wake it, or tell it to end.
#[derive(Debug, Default)]
pub struct Wake {
    waker: AtomicWaker,
    raised: AtomicBool,
    ping: AtomicBool,
    /// When something was last given to the task to be sent, milliseconds.
    sent_at: AtomicU64,
    /// When the transport last took a part of what it was offered, milliseconds.
    moved_at: AtomicU64,
    queued: AtomicBool,
    close: Mutex<Option<Close>>,
}

impl Wake {
    /// Something waits for the task.
    pub fn raise(&self) {
        if !self.raised.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// Tells the task to end its connection; the first reason stays.
    pub fn close(&self, close: Close) {
        self.close.lock().get_or_insert(close);
        self.raised.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Called by the task at each poll: registers it, and says whether something waits.
    pub fn take(&self, waker: &Waker) -> bool {
        self.waker.register(waker);
        self.raised.swap(false, Ordering::AcqRel)
    }

    /// For a list of tasks to be woken later: whether it is not in it yet.
    pub(super) fn queue_up(&self) -> bool {
        !self.queued.swap(true, Ordering::AcqRel)
    }

    /// Out of that list.
    pub(super) fn unqueue(&self) {
        self.queued.store(false, Ordering::Release);
        self.raise();
    }

    /// The transport is to be kept alive.
    pub fn ping(&self, now: Millis) {
        self.sent(now);
        self.ping.store(true, Ordering::Release);
        self.raise();
    }

    /// Whether a ping was asked for; asked for once.
    pub fn take_ping(&self) -> bool {
        self.ping.load(Ordering::Relaxed) && self.ping.swap(false, Ordering::AcqRel)
    }

    /// The task was given something to send.
    pub(super) fn sent(&self, now: Millis) {
        self.sent_at.store(now, Ordering::Relaxed);
    }

    /// When it was given something last, a ping included; milliseconds.
    pub(super) fn sent_at(&self) -> u64 {
        self.sent_at.load(Ordering::Relaxed)
    }

    /// The transport took a part of what it was offered.
    pub fn moved(&self, now: Millis) {
        self.moved_at.store(now, Ordering::Relaxed);
    }

    /// When it did last, milliseconds.
    pub(super) fn moved_at(&self) -> u64 {
        self.moved_at.load(Ordering::Relaxed)
    }

    /// Why the connection is to end, if it is.
    pub fn closing(&self) -> Option<Close> {
        *self.close.lock()
    }
}
