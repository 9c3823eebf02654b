//! The copies of messages that two links bring while a filter moves from one to the other (`moves`).

use std::collections::{BTreeMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::hashing::{LookUp, LookUpHasher};
use crate::router::types::Arrived;
use crate::time::Millis;
use crate::topics::FilterId;

/// Copies that are counted or kept back, of all moves together.
const COPIES_MAX: usize = 100_000;

/// Bytes of the copies that are kept back, of all moves together.
const COPIES_BYTES_MAX: usize = 16 * 1024 * 1024;

/// An outer filter that is to be unsubscribed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Leaving {
    /// When its inner filters are looked at next.
    pub(super) look_at: Millis,
    /// The inner filter that was looked at last.
    pub(super) last: Option<FilterId>,
}

/// All moves.
#[derive(Debug, Default)]
pub(in crate::router) struct Moves {
    pub(super) all: BTreeMap<FilterId, Move>,
    /// Copies of all moves.
    pub(super) copies: AtomicUsize,
    /// Bytes of the copies that are kept back.
    pub(super) bytes: AtomicUsize,
    hasher: LookUpHasher,
}

/// One filter that moves.
#[derive(Debug)]
pub(super) struct Move {
    /// The filter that brings its messages at first.
    pub(super) outer: FilterId,
    /// Its own link.
    pub(super) to: u8,
    pub(super) step: Step,
    pub(super) copies: Mutex<Copies>,
    /// There were too many copies.
    pub(super) overflow: AtomicBool,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Its SUBACK is awaited.
    Subscribing,
    /// A barrier on its own link is to be asked for, or has not passed yet.
    OwnBarrier(Option<u64>),
    /// Until then at least, the outer link brings the messages.
    Overlapping { until: Millis },
    /// A barrier on the outer link has not passed yet.
    OuterBarrier(u64),
    /// The copies that were kept back are delivered.
    Draining,
    /// Its own link serves it. Copies are compared until then, and until a barrier has passed.
    Comparing { until: Millis, barrier: Option<u64> },
    /// It is given up, and its UNSUBSCRIBE is not answered yet.
    GivingUp,
}

/// The copies of one move that have no counterpart yet.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// The number of copies that the outer link brought, by content.
    given: LookUp<u64, u32>,
    /// The copies that the own link brought, with the hashes of their contents.
    pub(super) kept: VecDeque<(u64, Arrived)>,
}

impl Moves {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The link that a filter moves to, while the outer one still brings its messages.
    pub(super) fn target(&self, id: FilterId) -> Option<usize> {
        let step = |m: &&Move| !matches!(m.step, Step::Draining | Step::Comparing { .. });
        self.all.get(&id).filter(step).map(|m| usize::from(m.to))
    }

    /// Filters that move to a link.
    pub(super) fn count_to(&self, link: usize) -> usize {
        self.all
            .keys()
            .filter(|id| self.target(**id) == Some(link))
            .count()
    }

    /// Forgets a move. Returns its link.
    pub(super) fn forget(&mut self, id: FilterId) -> Option<u8> {
        let gone = self.all.remove(&id)?;
        self.reset(&gone);
        Some(gone.to)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Drops the copies of a move.
    pub(super) fn reset(&self, of: &Move) {
        let copies = std::mem::take(&mut *of.copies.lock());
        let count = copies.given.len() + copies.kept.len();
        let bytes: usize = copies.kept.iter().map(|(_, a)| a.message.size()).sum();
        self.copies.fetch_sub(count, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn has_room(&self) -> bool {
        self.copies.load(Ordering::Relaxed) < COPIES_MAX
            && self.bytes.load(Ordering::Relaxed) < COPIES_BYTES_MAX
    }

    /// A filter's own link brought a message. Whether it is to be delivered now.
    pub(super) fn own_copy(&self, id: FilterId, arrived: &Arrived) -> bool {
        let Some(moving) = self.all.get(&id) else {
            return true;
        };
        let keep = match moving.step {
            Step::Subscribing | Step::OwnBarrier(_) | Step::GivingUp => return false,
            Step::Overlapping { .. } | Step::OuterBarrier(_) | Step::Draining => true,
            Step::Comparing { .. } => false,
        };
        let digest = self.digest(arrived);
        let mut copies = moving.copies.lock();
        if let Some(count) = copies.given.get_mut(&digest) {
            *count -= 1;
            if *count == 0 {
                copies.given.remove(&digest);
                self.copies.fetch_sub(1, Ordering::Relaxed);
            }
            return false;
        }
        if !keep {
            return true;
        }
        if !self.has_room() && moving.step != Step::Draining {
            moving.overflow.store(true, Ordering::Relaxed);
            return false;
        }
        let mut filters = smallvec::SmallVec::new();
        filters.push(id);
        let kept = Arrived {
            message: arrived.message.clone(),
            filters,
            link: arrived.link,
            origin_mark: arrived.origin_mark,
            link_origin: arrived.link_origin,
            skipped: arrived.skipped,
        };
        self.copies.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(kept.message.size(), Ordering::Relaxed);
        copies.kept.push_back((digest, kept));
        false
    }

    /// The outer link brought a message for a filter, which is delivered.
    pub(super) fn outer_copy(&self, id: FilterId, arrived: &Arrived) {
        let Some(moving) = self.all.get(&id) else {
            return;
        };
        match moving.step {
            Step::OwnBarrier(_) | Step::Overlapping { .. } | Step::OuterBarrier(_) => {}
            Step::Subscribing | Step::Draining | Step::Comparing { .. } | Step::GivingUp => return,
        }
        let digest = self.digest(arrived);
        let mut copies = moving.copies.lock();
        if let Some(at) = copies.kept.iter().position(|(of, _)| *of == digest) {
            if let Some((_, kept)) = copies.kept.remove(at) {
                self.copies.fetch_sub(1, Ordering::Relaxed);
                self.bytes.fetch_sub(kept.message.size(), Ordering::Relaxed);
            }
            return;
        }
        if !self.has_room() {
            moving.overflow.store(true, Ordering::Relaxed);
            return;
        }
        let count = copies.given.entry(digest).or_insert(0);
        *count += 1;
        if *count == 1 {
            self.copies.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn digest(&self, arrived: &Arrived) -> u64 {
        let message = &arrived.message;
        self.hasher.hash_one((message.topic(), message.payload()))
    }
}
