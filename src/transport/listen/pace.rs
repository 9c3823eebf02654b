//! What to do when `accept` fails, and how often to speak of what fails.

use std::io;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;
use tokio::time::Instant;

/// A bounded name for why `accept` failed.
pub(super) fn accept_error_kind(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => "fd_limit",
        Some(Errno::NOBUFS | Errno::NOMEM) => "memory",
        // Errors of the connection that waited, not of the listener (accept(2)).
        Some(
            Errno::CONNABORTED
            | Errno::CONNRESET
            | Errno::INTR
            | Errno::PROTO
            | Errno::PERM
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::NOPROTOOPT
            | Errno::OPNOTSUPP,
        ) => "aborted",
        _ => "other",
    }
}

/// Waits between failed accepts: 50 ms, doubling to 1 s.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    last: Option<Duration>,
    pub(super) log: LogGate,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const MAX: Duration = Duration::from_secs(1);

    pub(super) fn next(&mut self) -> Duration {
        let wait = self
            .last
            .map_or(Self::FIRST, |last| (last * 2).min(Self::MAX));
        self.last = Some(wait);
        wait
    }

    pub(super) fn reset(&mut self) {
        self.last = None;
    }
}

/// Lets ten lines through in ten seconds, and counts the others.
#[derive(Debug, Default)]
pub(super) struct LogGate(Mutex<Gate>);

#[derive(Debug, Default)]
struct Gate {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogGate {
    const LINES: u32 = 10;
    const PERIOD: Duration = Duration::from_secs(10);

    /// How many lines were kept back before this one, if it may pass.
    pub(super) fn pass(&self, now: Instant) -> Option<u64> {
        let mut gate = self.0.lock();
        if gate.since.is_none_or(|since| now - since >= Self::PERIOD) {
            gate.since = Some(now);
            gate.lines = 0;
        }
        if gate.lines >= Self::LINES {
            gate.suppressed += 1;
            return None;
        }
        gate.lines += 1;
        Some(std::mem::take(&mut gate.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_a_second_and_starts_again() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..7).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next(), Duration::from_millis(50));
    }

    #[test]
    fn accept_errors_are_told_apart() {
        for (errno, kind) in [
            (Errno::MFILE, "fd_limit"),
            (Errno::NFILE, "fd_limit"),
            (Errno::NOMEM, "memory"),
            (Errno::CONNABORTED, "aborted"),
            (Errno::BADF, "other"),
        ] {
            assert_eq!(accept_error_kind(&errno.into()), kind);
        }
    }

    #[test]
    fn log_gate_counts_what_it_keeps_back() {
        let gate = LogGate::default();
        let start = Instant::now();
        assert_eq!((0..10).filter_map(|_| gate.pass(start)).sum::<u64>(), 0);
        assert_eq!(gate.pass(start), None);
        assert_eq!(gate.pass(start + Duration::from_secs(9)), None);
        assert_eq!(gate.pass(start + Duration::from_secs(10)), Some(2));
    }
}
