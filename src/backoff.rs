//! Waits between attempts that fail again and again.

use std::time::Duration;

/// A wait that doubles with each failure, from a first one to a longest one.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
    failures: u64,
}

impl Backoff {
    /// The first failure waits for `min`, and none waits for longer than `max`.
    pub(crate) const fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
            failures: 0,
        }
    }

    /// The waits between failed accepts of a listener: to try again at once would only keep a processor busy until
    /// descriptors or memory are free.
    pub(crate) const fn for_accept() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Counts a failure, and returns how long to wait before the next attempt.
    pub(crate) fn next_wait(&mut self) -> Duration {
        self.failures += 1;
        let wait = self.next;
        self.next = (wait * 2).min(self.max);
        wait
    }

    /// Begins again: an attempt has succeeded.
    pub(crate) const fn reset(&mut self) {
        self.next = self.min;
        self.failures = 0;
    }

    /// The next failure waits for the longest time.
    pub(crate) const fn set_longest(&mut self) {
        self.next = self.max;
    }

    /// Failures since the last reset.
    pub(crate) fn failures(&self) -> u64 {
        self.failures
    }
}

/// Whether to log the failure of this number: the first two are, and then ever fewer.
pub(crate) fn worth_logging(failures: u64) -> bool {
    failures <= 2 || failures.is_power_of_two() || failures.is_multiple_of(64)
}

/// A random time between a half of `wait` and the whole of it, so that tasks that wait for the same
/// event do not come back together.
pub(crate) fn jittered(wait: Duration, random: u32) -> Duration {
    wait / 2 + wait.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_longest_and_start_again() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let waits: Vec<_> = (0..7).map(|_| backoff.next_wait().as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.failures(), 7);
        backoff.reset();
        assert_eq!(backoff.next_wait(), Duration::from_millis(50));
        backoff.set_longest();
        assert_eq!(backoff.next_wait(), Duration::from_secs(1));
    }

    #[test]
    fn fewer_and_fewer_failures_are_logged() {
        let mut backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
        let logged: Vec<u64> = (0..200)
            .filter_map(|_| {
                backoff.next_wait();
                worth_logging(backoff.failures()).then_some(backoff.failures())
            })
            .collect();
        assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64, 128, 192]);
    }

    #[test]
    fn jitter_takes_at_most_a_half_off() {
        let wait = Duration::from_secs(2);
        assert_eq!(jittered(wait, 0), Duration::from_secs(1));
        assert_eq!(jittered(wait, u32::MAX), wait);
    }
}
