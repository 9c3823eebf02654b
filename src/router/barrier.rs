//! Whether a data link has brought all that the core had sent on it before some moment.
//!
//! A broker answers a PINGREQ behind what it sent before. So what the R link brought is older
//! than nothing that a data link still carries, once a PINGREQ that was sent after it is answered.

use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::router::Router;
use crate::router::types::SessionRef;
use crate::time::Millis;

/// Moments on one data link, as numbers of its PINGREQs.
#[derive(Debug, Default)]
pub(super) struct Fence {
    begun: AtomicU64,
    wanted: AtomicU64,
}

impl Router {
    /// Asks D link `link` for a PINGREQ; returns its number.
    pub(super) fn ask_fence(&self, link: usize) -> u64 {
        let fence = &self.fences[link];
        // The next one: a PINGREQ that is under way may have been answered already.
        let number = fence.begun.load(Ordering::SeqCst) + 1;
        if fence.wanted.fetch_max(number, Ordering::SeqCst) < number {
            self.data[link].raise();
        }
        number
    }

    /// Whether a PINGREQ is wanted on D link `link`.
    pub fn fence_wanted(&self, link: usize) -> bool {
        let fence = &self.fences[link];
        fence.wanted.load(Ordering::SeqCst) > fence.begun.load(Ordering::SeqCst)
    }

    /// A PINGREQ is about to be sent on D link `link`; its number.
    pub fn fence_begins(&self, link: usize) -> u64 {
        self.fences[link].begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// PINGREQ `number` of D link `link` was answered, and all that came before is fanned out.
    pub fn fence_passed(&self, link: usize, number: u64, now: Millis) {
        self.release_fetched(|of, fence| of == link && fence <= number, now);
        self.leavers_passed(link, number, now);
    }

    /// A session left filters that overlapping ones of it take over from, once every data link has
    /// brought what is under way.
    pub(super) fn await_leaving(&self, session: SessionRef) {
        self.leaving.fetch_or(1 << session.shard, Ordering::SeqCst);
        let fences: SmallVec<[u64; 4]> = self.all_fences();
        let mut shard = self.shards[usize::from(session.shard)].lock();
        if shard.get(session).is_some() {
            shard.leavers.wait(session.slot, &fences);
        }
    }

    /// Whether PINGREQs of a lost connection have to be sent again.
    pub(super) fn awaits_fences(&self) -> bool {
        self.holds_fetched() || self.leaving.load(Ordering::SeqCst) != 0
    }

    fn all_fences(&self) -> SmallVec<[u64; 4]> {
        (0..self.config.data_links)
            .map(|link| self.ask_fence(link))
            .collect()
    }

    fn leavers_passed(&self, link: usize, number: u64, now: Millis) {
        let mut mask = self.leaving.load(Ordering::SeqCst);
        while mask != 0 {
            let index = mask.trailing_zeros() as u16;
            mask &= mask - 1;
            let mut gone = Vec::new();
            let mut shard = self.shards[usize::from(index)].lock();
            let next = || self.all_fences();
            shard.leavers.passed(link, number, &mut gone, next);
            if shard.leavers.is_empty() {
                self.leaving.fetch_and(!(1 << index), Ordering::SeqCst);
            }
            let whose = |(slot, filter)| (shard.reference(slot), filter);
            let gone: Vec<_> = gone.into_iter().map(whose).collect();
            drop(shard);
            self.give_up(&gone, now);
        }
    }
}
