//! The log: stderr, text or JSON, repeats counted instead of repeated.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

/// Starts logging to stderr; later calls change nothing.
///
/// # Errors
/// When `level` is not a level or a list of filter directives.
pub fn init(level: &str, json: bool) -> Result<(), tracing_subscriber::filter::ParseError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(level)?)
        .with_writer(std::io::stderr);
    // A logger that a test or an embedding program set up first stays.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init()
    };
    Ok(())
}

/// Lets one line through per interval and counts the others.
///
/// ```
/// # use tidegate::telemetry::RateLimited;
/// # use std::time::Duration;
/// static FULL: RateLimited = RateLimited::new(Duration::from_secs(10));
/// if let Some(suppressed) = FULL.permit() {
///     tracing::warn!(suppressed, "a queue is full");
/// }
/// ```
pub struct RateLimited {
    interval: Duration,
    state: Mutex<State>,
}

struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimited {
    /// One line per `interval`.
    pub const fn new(interval: Duration) -> Self {
        Self {
            interval,
            state: Mutex::new(State {
                last: None,
                suppressed: 0,
            }),
        }
    }

    /// `Some(n)` when the line may be written: `n` were held back since the
    /// last one.
    pub fn permit(&self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        if state.last.is_some_and(|last| now < last + self.interval) {
            state.suppressed += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// A client's text fit for a log line: escaped, and cut to `max` characters.
pub fn clean(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for (n, c) in text.chars().enumerate() {
        if n == max {
            out.push('…');
            break;
        }
        // Bidi and zero-width marks can make a line read as another.
        if c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted() {
        let limited = RateLimited::new(Duration::from_secs(10));
        let start = Instant::now();
        assert_eq!(limited.permit_at(start), Some(0));
        assert_eq!(limited.permit_at(start + Duration::from_secs(1)), None);
        assert_eq!(limited.permit_at(start + Duration::from_secs(9)), None);
        assert_eq!(limited.permit_at(start + Duration::from_secs(10)), Some(2));
        assert_eq!(limited.permit_at(start + Duration::from_secs(20)), Some(0));
    }

    #[test]
    fn client_text_is_escaped_and_cut() {
        assert_eq!(clean("a\nb\u{202e}c", 80), "a\\nb\\u{202e}c");
        assert_eq!(clean("abcdef", 3), "abc…");
        assert_eq!(clean("Größe", 5), "Größe");
    }

    #[test]
    fn a_level_that_is_none_is_an_error() {
        assert!(init("tidegate=loud", false).is_err());
    }
}
