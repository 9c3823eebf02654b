//! Times without a clock: the pure modules are given them.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::{Add, AddAssign, Sub};
use std::time::Duration;

/// A point in time on the process's clock: milliseconds since the clock was made. A span of time is
/// a [`Duration`], a time of day is a [`UnixMillis`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis(u64);

/// More than the times of two calls from different threads can be apart: each thread has a time of its own.
pub(crate) const CLOCKS_APART: Duration = Duration::from_secs(60);

impl Millis {
    /// The time at which the clock was made.
    pub const ZERO: Self = Self(0);
    /// The last point in time.
    pub const MAX: Self = Self(u64::MAX);

    /// The point `ms` milliseconds after the clock was made.
    pub const fn new(ms: u64) -> Self {
        Self(ms)
    }

    /// Milliseconds since the clock was made.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The low 32 bits of the milliseconds, for a time that takes 4 bytes and is at most 49 days old.
    pub(crate) const fn low_bits(self) -> u32 {
        self.0 as u32
    }

    /// The milliseconds since a time with these low 32 bits. 0 if it is later, by [`CLOCKS_APART`] at most.
    pub(crate) fn age_of(self, low_bits: u32) -> u32 {
        let age = (self + CLOCKS_APART).low_bits().wrapping_sub(low_bits);
        age.saturating_sub(whole_millis(CLOCKS_APART) as u32)
    }

    /// The span since `earlier`; none if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Saturates at the last point in time.
impl Add<Duration> for Millis {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(whole_millis(span)))
    }
}

impl AddAssign<Duration> for Millis {
    fn add_assign(&mut self, span: Duration) {
        *self = *self + span;
    }
}

/// Saturates at the time at which the clock was made.
impl Sub<Duration> for Millis {
    type Output = Self;

    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(whole_millis(span)))
    }
}

/// Milliseconds, as logs and counters show a time.
impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The whole milliseconds of a span, which must be shorter than 500 million years.
const fn whole_millis(span: Duration) -> u64 {
    span.as_millis() as u64
}

/// A time of day: milliseconds since 1970-01-01 00:00 UTC, without leap seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(u64);

impl UnixMillis {
    /// The time of day `ms` milliseconds after 1970-01-01 00:00 UTC.
    pub const fn new(ms: u64) -> Self {
        Self(ms)
    }

    /// Milliseconds since 1970-01-01 00:00 UTC.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// A millisecond later.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The time of day at `time` on a clock that was made at this time of day.
    pub const fn at(self, time: Millis) -> Self {
        Self(self.0.saturating_add(time.0))
    }
}

/// A time at which something is due. `Option<Deadline>` takes 8 bytes, which keeps a session small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(NonZeroU64);

const _: () = assert!(size_of::<Option<Deadline>>() == 8);

impl Deadline {
    /// Due at `at`.
    pub const fn at(at: Millis) -> Self {
        // One more, so that a deadline at time 0 is not zero.
        Self(NonZeroU64::MIN.saturating_add(at.0))
    }

    /// Due `seconds` after `start`, as the intervals of MQTT count.
    pub fn after_seconds(start: Millis, seconds: u32) -> Self {
        Self::at(start + Duration::from_secs(seconds.into()))
    }

    /// The time at which it is due.
    pub const fn time(self) -> Millis {
        Millis(self.0.get() - 1)
    }

    /// Whether the time has come.
    pub fn is_due(self, now: Millis) -> bool {
        self.time() <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_due_from_its_time_on() {
        for at in [0, 1, 1000, u64::MAX - 1].map(Millis::new) {
            let deadline = Deadline::at(at);
            assert_eq!(deadline.time(), at);
            assert!(deadline.is_due(at));
            assert!(at == Millis::ZERO || !deadline.is_due(at - Duration::from_millis(1)));
        }
        assert!(Deadline::at(Millis::new(3)) < Deadline::at(Millis::new(4)));
    }

    #[test]
    fn a_time_that_is_a_little_later_has_no_age() {
        for now in [5, 1 << 32, (1 << 32) + 5, (3 << 32) - 1].map(Millis::new) {
            let age = |at: Millis| now.age_of(at.low_bits());
            assert_eq!(age(now), 0);
            assert_eq!(age(now + Duration::from_millis(1)), 0);
            assert_eq!(age(now + CLOCKS_APART), 0);
            assert_eq!(age(Millis::new(now.as_u64().wrapping_sub(1))), 1);
            let days = 49 * 86_400_000;
            assert_eq!(
                age(Millis::new(now.as_u64().wrapping_sub(days))),
                days as u32
            );
        }
    }

    #[test]
    fn times_saturate() {
        let (early, late) = (Millis::new(5), Millis::new(7));
        assert_eq!(late.since(early), Duration::from_millis(2));
        assert_eq!(early.since(late), Duration::ZERO);
        assert_eq!(early + Duration::from_secs(1), Millis::new(1005));
        assert_eq!(Millis::MAX + Duration::from_secs(1), Millis::MAX);
        assert_eq!(early - Duration::from_secs(1), Millis::ZERO);
        assert_eq!(UnixMillis::new(1000).at(late).as_u64(), 1007);
    }
}
