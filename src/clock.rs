//! The process's clock: milliseconds since it started, monotonic.

use std::time::Instant;

/// Tells the time to everything that must not look at a clock itself.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock {
    /// Milliseconds since the clock was made.
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}
