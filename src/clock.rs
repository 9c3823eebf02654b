//! The process's monotonic clock, in milliseconds since it started.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::time::{Millis, UnixMillis};

/// The source of all times that pure code is given.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Default for Clock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock {
    /// Milliseconds since the clock was made.
    pub fn now(&self) -> Millis {
        Millis::new(self.start.elapsed().as_millis() as u64)
    }

    /// The time of day when the clock was made, as the system has it now.
    pub fn started_at(&self) -> UnixMillis {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix = unix.map_or(0, |d| d.as_millis() as u64);
        UnixMillis::new(unix.saturating_sub(self.now().as_u64()))
    }
}
