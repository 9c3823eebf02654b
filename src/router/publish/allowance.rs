//! The publishes that may go to the broker while data links lag behind it.
//!
//! Each data link that lags allows a number of publishes in each of its rounds, and each publish link may
//! take an equal part of it. What a link takes counts for all data links, because nobody knows where the
//! broker will send it.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// The allowances of all data links and shared links.
#[derive(Debug)]
pub(super) struct Allowances {
    /// Links that lag: mostly none, so that nothing else is looked at.
    lagging: AtomicUsize,
    links: Mutex<Box<[Option<Allowance>]>>,
    publish_links: usize,
}

/// The publishes of one round of a data link.
#[derive(Debug)]
struct Allowance {
    /// The most that each publish link may take.
    each: u32,
    /// Publishes taken, by publish link.
    taken: Box<[u32]>,
}

impl Allowances {
    /// Without limits, for so many data and shared links, and publish links.
    pub(super) fn new(links: usize, publish_links: usize) -> Self {
        Self {
            lagging: AtomicUsize::new(0),
            links: Mutex::new((0..links).map(|_| None).collect()),
            publish_links,
        }
    }

    /// Whether a data link lags.
    pub(super) fn is_limited(&self) -> bool {
        self.lagging.load(Ordering::Relaxed) > 0
    }

    /// Whether a publish link has taken all that data link `link` allowed it in this round.
    pub(super) fn is_used_up(&self, link: usize) -> bool {
        let links = self.links.lock();
        links[link]
            .as_ref()
            .is_some_and(|a| a.taken.iter().any(|taken| *taken >= a.each))
    }

    /// A round of data link `link` begins, in which `used` publish links may take `window` publishes
    /// together. `None`: any number. Returns whether publishes may wait for this.
    pub(super) fn begin_round(&self, link: usize, window: Option<u32>, used: u8) -> bool {
        let mut links = self.links.lock();
        let limited = links[link].is_some();
        links[link] = window.map(|window| Allowance {
            each: window.div_ceil(u32::from(used.max(1))),
            taken: vec![0; self.publish_links].into(),
        });
        let lagging = links.iter().flatten().count();
        self.lagging.store(lagging, Ordering::Relaxed);
        limited
    }

    /// Takes up to `wanted` publishes for a publish link. Returns how many it may send.
    pub(super) fn take(&self, publish_link: usize, wanted: usize) -> usize {
        let mut links = self.links.lock();
        let room = links.iter().flatten();
        let room = room.map(|a| a.each.saturating_sub(a.taken[publish_link]) as usize);
        let granted = room.fold(wanted, usize::min);
        for allowance in links.iter_mut().flatten() {
            // No more than the window.
            allowance.taken[publish_link] += granted as u32;
        }
        granted
    }

    /// Gives back publishes that a publish link took and did not have.
    pub(super) fn give_back(&self, publish_link: usize, unused: usize) {
        for allowance in self.links.lock().iter_mut().flatten() {
            let taken = &mut allowance.taken[publish_link];
            // A round may have begun in between.
            *taken = taken.saturating_sub(unused as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_links_share_the_window_of_each_round() {
        let allowances = Allowances::new(3, 2);
        assert!(!allowances.is_limited());
        assert_eq!(allowances.take(0, 16), 16);
        allowances.begin_round(1, Some(20), 2);
        assert!(allowances.is_limited() && !allowances.is_used_up(1));
        assert_eq!(allowances.take(0, 16), 10);
        assert_eq!(allowances.take(0, 16), 0);
        assert!(allowances.is_used_up(1));
        assert_eq!(allowances.take(1, 4), 4, "the other link has its own part");
        allowances.give_back(0, 3);
        assert!(!allowances.is_used_up(1));
        assert_eq!(allowances.take(0, 16), 3);
        allowances.begin_round(1, Some(20), 2);
        assert_eq!(allowances.take(0, 16), 10);
    }

    #[test]
    fn the_link_that_lags_most_decides() {
        let allowances = Allowances::new(3, 1);
        allowances.begin_round(0, Some(100), 1);
        allowances.begin_round(2, Some(5), 1);
        assert_eq!(allowances.take(0, 16), 5);
        allowances.begin_round(2, None, 1);
        assert!(allowances.is_limited());
        assert_eq!(allowances.take(0, 200), 95);
        allowances.begin_round(0, None, 1);
        assert!(!allowances.is_limited());
        assert_eq!(allowances.take(0, 200), 200);
    }
}
