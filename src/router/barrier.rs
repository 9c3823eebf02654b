//! Barriers: whether a data link has brought everything that the broker sent on it before some moment.
//!
//! A broker answers a PINGREQ behind everything that it sent before. Once a PINGREQ that was sent on a
//! data link after a retained fetch is answered, that link has delivered everything older than the
//! fetched messages, so they can be released.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::router::handle::TaskWaker;
use crate::router::types::BarrierNumbers;

/// The barriers of all data links and shared links.
#[derive(Debug)]
pub(super) struct Barriers {
    links: Box<[Barrier]>,
}

/// The barriers of one link, by the numbers of its PINGREQs.
#[derive(Debug)]
struct Barrier {
    /// The PINGREQ that was sent last.
    begun: AtomicU64,
    /// The highest PINGREQ that somebody waits for.
    wanted: AtomicU64,
    /// Wakes the link's task.
    waker: Arc<TaskWaker>,
}

impl Barriers {
    /// Barriers on the links of these tasks, data links first.
    pub(super) fn new(wakers: &[Arc<TaskWaker>]) -> Self {
        let barrier = |waker: &Arc<TaskWaker>| Barrier {
            begun: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            waker: waker.clone(),
        };
        Self {
            links: wakers.iter().map(barrier).collect(),
        }
    }

    /// Asks for a PINGREQ on a link. Returns its number.
    pub(super) fn ask(&self, link: usize) -> u64 {
        let barrier = &self.links[link];
        // The next one: a PINGREQ that is under way may have been answered already.
        let number = barrier.begun.load(Ordering::SeqCst) + 1;
        if barrier.wanted.fetch_max(number, Ordering::SeqCst) < number {
            barrier.waker.raise();
        }
        number
    }

    /// Asks for a PINGREQ on each of these links. Returns their numbers, by link.
    pub(super) fn ask_all(&self, links: impl Iterator<Item = usize>) -> BarrierNumbers {
        let mut numbers = BarrierNumbers::new();
        for link in links {
            numbers.resize(link + 1, None);
            numbers[link] = Some(self.ask(link));
        }
        numbers
    }

    /// Whether a PINGREQ is wanted on a link.
    pub(super) fn wanted(&self, link: usize) -> bool {
        let barrier = &self.links[link];
        barrier.wanted.load(Ordering::SeqCst) > barrier.begun.load(Ordering::SeqCst)
    }

    /// A PINGREQ is about to be sent on a link. Returns its number.
    pub(super) fn begin(&self, link: usize) -> u64 {
        self.links[link].begun.fetch_add(1, Ordering::SeqCst) + 1
    }
}
