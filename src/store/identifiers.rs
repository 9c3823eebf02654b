//! The numbers of filters. A number rests after its release before another filter gets it, since
//! messages with it may still be on their way.

use crate::hashing::LookUp;
use crate::time::Millis;
use crate::topics::FilterId;
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Debug;
use std::sync::Arc;

/// The numbers of filters. Times are of the process's clock, which begins anew with each process; an implementation that outlives the process must keep the remaining time of a rest.
pub trait Identifiers: Debug + Send + Sync {
    /// Every number that was ever given, in order: its name, or `None` when it rests or is free.
    fn load(&self) -> Vec<Option<Arc<str>>>;

    /// Takes over the numbers of an earlier process instead of its own: the names' numbers, and the numbers that rest,
    /// by the ends of their rests. All others are free. Returns how many numbers there are, free ones included.
    fn take_over(
        &mut self,
        names: Vec<(FilterId, Arc<str>)>,
        rests: Vec<(Millis, FilterId)>,
    ) -> usize;

    /// The number of a name, a known or a new one. It is recorded when this returns, because it may be
    /// sent to the broker next.
    fn number(&mut self, name: &str) -> (FilterId, Arc<str>);

    /// Forgets a name. Its number rests until `until`; numbers whose rest has ended at `now` become free.
    /// An unknown name has no effect.
    fn release(&mut self, name: &str, now: Millis, until: Millis);

    /// The number of a known name.
    fn known(&self, name: &str) -> Option<FilterId>;

    /// How many names have a number.
    fn count(&self) -> usize;
}

/// Numbers that end with the process.
#[derive(Debug, Default)]
pub(super) struct InMemory {
    by_name: LookUp<Arc<str>, FilterId>,
    /// The number after the largest that was given.
    next: u32,
    free: Vec<FilterId>,
    /// Numbers that rest, with the time until which they do.
    tombstones: VecDeque<(Millis, FilterId)>,
}

impl Identifiers for InMemory {
    fn load(&self) -> Vec<Option<Arc<str>>> {
        let mut names = vec![None; self.next as usize];
        for (name, number) in self.by_name.sorted(|_, _| true) {
            names[number.index()] = Some(name.clone());
        }
        names
    }

    fn take_over(
        &mut self,
        names: Vec<(FilterId, Arc<str>)>,
        rests: Vec<(Millis, FilterId)>,
    ) -> usize {
        let taken = names.iter().map(|(number, _)| *number);
        let taken: BTreeSet<FilterId> = taken.chain(rests.iter().map(|(_, n)| *n)).collect();
        self.next = taken.last().map_or(0, |number| number.0 + 1);
        // The lowest are given first.
        let free = (0..self.next).rev().map(FilterId);
        self.free = free.filter(|number| !taken.contains(number)).collect();
        self.by_name = names
            .into_iter()
            .map(|(number, name)| (name, number))
            .collect();
        self.tombstones = rests.into();
        self.next as usize
    }

    fn number(&mut self, name: &str) -> (FilterId, Arc<str>) {
        if let Some((name, number)) = self.by_name.get_key_value(name) {
            return (*number, name.clone());
        }
        let name: Arc<str> = name.into();
        let number = self.free.pop().unwrap_or(FilterId(self.next));
        self.next = self.next.max(number.0 + 1);
        self.by_name.insert(name.clone(), number);
        (number, name)
    }

    fn release(&mut self, name: &str, now: Millis, until: Millis) {
        let Some(number) = self.by_name.remove(name) else {
            return;
        };
        self.tombstones.push_back((until, number));
        while let Some(&(at, rested)) = self.tombstones.front()
            && at <= now
        {
            self.tombstones.pop_front();
            self.free.push(rested);
        }
    }

    fn known(&self, name: &str) -> Option<FilterId> {
        self.by_name.get(name).copied()
    }

    fn count(&self) -> usize {
        self.by_name.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number() {
        let mut names = InMemory::default();
        assert_eq!(names.number("a").0, FilterId(0));
        assert_eq!(names.number("b").0, FilterId(1));
        assert_eq!(names.number("a"), (FilterId(0), "a".into()));
        assert_eq!(names.count(), 2);
        assert!(names.known("b").is_some() && names.known("c").is_none());
    }

    #[test]
    fn a_number_rests_before_it_means_another_name() {
        let mut names = InMemory::default();
        for name in ["a", "b", "c", "d"] {
            names.number(name);
        }
        names.release("a", Millis::new(100), Millis::new(200));
        assert!(names.known("a").is_none());
        // Not even for the same name.
        assert_eq!(names.number("a").0, FilterId(4));
        names.release("b", Millis::new(199), Millis::new(299));
        assert_eq!(names.number("e").0, FilterId(5));
        names.release("c", Millis::new(200), Millis::new(300));
        assert_eq!(names.number("f").0, FilterId(0), "its rest has ended");
        assert_eq!(names.number("g").0, FilterId(6));
    }

    #[test]
    fn an_unknown_name_leaves_everything_as_it_is() {
        let mut names = InMemory::default();
        names.number("a");
        names.release("a", Millis::ZERO, Millis::new(10));
        names.release("a", Millis::new(20), Millis::new(30));
        assert_eq!(names.number("b").0, FilterId(1));
    }

    #[test]
    fn load_tells_names_and_numbers_that_mean_none() {
        let mut names = InMemory::default();
        assert!(names.load().is_empty());
        for name in ["a", "b", "c"] {
            names.number(name);
        }
        names.release("b", Millis::ZERO, Millis::new(10));
        names.release("c", Millis::ZERO, Millis::new(10));
        assert_eq!(names.load(), [Some("a".into()), None, None]);
    }
}
