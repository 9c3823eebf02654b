//! The log on standard error, as text or JSON. Repeated lines are counted instead of written.

use std::time::Duration;

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

use crate::time::Millis;

/// Starts logging to stderr; later calls change nothing.
///
/// # Errors
/// When `level` is neither a level nor a list of filter directives.
pub fn init(level: &str, json: bool) -> Result<(), tracing_subscriber::filter::ParseError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(level)?)
        .with_writer(std::io::stderr);
    // An error means that a test or an embedding program has set up a logger, which stays.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init()
    };
    Ok(())
}

/// Permits one log line, or a burst of lines, per interval and counts the others:
///
/// ```text
/// static FULL: RateLimited = RateLimited::new(Duration::from_secs(10));
/// if let Some(suppressed) = FULL.permit(now) {
///     tracing::warn!(suppressed, "A queue is full");
/// }
/// ```
pub struct RateLimited {
    lines_max: u32,
    interval: Duration,
    state: Mutex<State>,
}

struct State {
    /// When the first line of the interval was written.
    since: Option<Millis>,
    lines: u32,
    suppressed: u64,
}

impl RateLimited {
    /// Permits one line per `interval`.
    pub const fn new(interval: Duration) -> Self {
        Self::burst(1, interval)
    }

    /// Permits `lines_max` lines per `interval`, which begins with the first of them.
    pub const fn burst(lines_max: u32, interval: Duration) -> Self {
        Self {
            lines_max,
            interval,
            state: Mutex::new(State {
                since: None,
                lines: 0,
                suppressed: 0,
            }),
        }
    }

    /// `Some(n)` when the line may be written; `n` lines were suppressed since the last one.
    pub fn permit(&self, now: Millis) -> Option<u64> {
        let mut state = self.state.lock();
        // Tests have several clocks, so `now` may be earlier than the first line.
        let in_interval = state
            .since
            .is_some_and(|since| (since..since + self.interval).contains(&now));
        if !in_interval {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= self.lines_max {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// Makes a client's text fit for a log line: escapes control characters, and cuts the text to `max`
/// characters.
pub fn clean(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for (n, c) in text.chars().enumerate() {
        if n == max {
            out.push('…');
            break;
        }
        // Bidirectional and zero-width marks can make one line look like another.
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
        assert_eq!(limited.permit(Millis::new(500)), Some(0));
        assert_eq!(limited.permit(Millis::new(1_500)), None);
        assert_eq!(limited.permit(Millis::new(10_499)), None);
        assert_eq!(limited.permit(Millis::new(10_500)), Some(2));
        assert_eq!(limited.permit(Millis::new(20_500)), Some(0));
        // A clock that started later.
        assert_eq!(limited.permit(Millis::ZERO), Some(0));
    }

    #[test]
    fn a_burst_is_permitted_and_the_rest_counted() {
        let limited = RateLimited::burst(10, Duration::from_secs(10));
        let permitted: Vec<_> = (0..10)
            .filter_map(|_| limited.permit(Millis::new(500)))
            .collect();
        assert_eq!(permitted, [0; 10]);
        assert_eq!(limited.permit(Millis::new(500)), None);
        assert_eq!(limited.permit(Millis::new(10_499)), None);
        assert_eq!(limited.permit(Millis::new(10_500)), Some(2));
    }

    #[test]
    fn client_text_is_escaped_and_cut() {
        assert_eq!(clean("a\nb\u{202e}c", 80), "a\\nb\\u{202e}c");
        assert_eq!(clean("abcdef", 3), "abc…");
        assert_eq!(clean("Größe", 5), "Größe");
    }

    #[test]
    fn an_unknown_level_is_an_error() {
        assert!(init("tidegate=loud", false).is_err());
    }
}
