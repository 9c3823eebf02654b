//! Times without a clock: the pure modules are given them.

use std::num::NonZeroU64;

/// A time, or a span of time, in milliseconds. As a time it counts from the start of the
/// process's clock.
pub type Millis = u64;

/// A time at which something is due. `Option<Deadline>` takes 8 bytes, of which a session has
/// several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(NonZeroU64);

const _: () = assert!(size_of::<Option<Deadline>>() == 8);

impl Deadline {
    /// Due at `at`.
    pub fn at(at: Millis) -> Self {
        // One more, so that a deadline at time 0 is not zero.
        Self(NonZeroU64::MIN.saturating_add(at))
    }

    /// The time at which it is due.
    pub fn millis(self) -> Millis {
        self.0.get() - 1
    }

    /// Whether the time has come.
    pub fn is_due(self, now: Millis) -> bool {
        self.millis() <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_due_from_its_time_on() {
        for at in [0, 1, 1000, u64::MAX - 1] {
            let deadline = Deadline::at(at);
            assert_eq!(deadline.millis(), at);
            assert!(deadline.is_due(at));
            assert!(at == 0 || !deadline.is_due(at - 1));
        }
        assert!(Deadline::at(3) < Deadline::at(4));
    }
}
