//! The log on standard error, as text or JSON. Repeated lines are counted instead of written.

mod writer;

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, ParseError};

use crate::time::Millis;
use writer::{BUFFER_MAX_BYTES, LogWriter};

/// How long the end of the process waits for a reader that is slow to take the last lines.
const LAST_LINES_WAIT: Duration = Duration::from_secs(1);

/// Writes to standard error for the whole process.
static STDERR: OnceLock<LogWriter> = OnceLock::new();

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level is neither a level nor a list of filter directives.
    #[error(transparent)]
    Level(#[from] ParseError),
    /// The system has no room for another thread.
    #[error("the log's thread cannot be started: {0}")]
    Thread(#[from] io::Error),
}

/// Starts logging to standard error; later calls change nothing.
///
/// A level without a target is Tidegate's. Libraries log errors only, unless a directive names them:
/// their lines are about single connections, and nothing limits their number.
///
/// # Errors
/// See [`LogError`].
pub fn init(level: &str, json: bool) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(directives(level))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would report them on standard error, and panic where that is closed.
        .log_internal_errors(false)
        .with_writer(stderr()?);
    // An error means that a test or an embedding program has set up a logger, which stays.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init()
    };
    Ok(())
}

/// The filter directives of a configured level.
fn directives(level: &str) -> String {
    let bare = |directive: &str| directive.parse::<LevelFilter>().is_ok();
    if level.trim().eq_ignore_ascii_case("off") {
        return level.to_owned();
    }
    let mut all = vec!["error".to_owned()];
    all.extend(level.split(',').map(|directive| {
        let directive = directive.trim();
        match bare(directive) {
            true => format!("tidegate={directive}"),
            false => directive.to_owned(),
        }
    }));
    all.join(",")
}

/// Writes the last words of the process to standard error, after the log. A reader that takes
/// nothing delays the end for a second at most.
pub fn finish(last_words: &str) {
    // Without the thread a write could block for ever. The exit code alone tells the failure then.
    if let Ok(stderr) = stderr() {
        stderr.push(last_words.as_bytes());
        stderr.flush(LAST_LINES_WAIT);
    }
}

/// Waits until everything that was logged is written, for a second at most. Blocks the thread.
pub fn flush() {
    if let Some(writer) = STDERR.get() {
        writer.flush(LAST_LINES_WAIT);
    }
}

fn stderr() -> io::Result<LogWriter> {
    if let Some(writer) = STDERR.get() {
        return Ok(writer.clone());
    }
    let writer = LogWriter::start(io::stderr(), BUFFER_MAX_BYTES)?;
    Ok(STDERR.get_or_init(|| writer).clone())
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
    fn libraries_log_errors_unless_a_directive_names_them() {
        assert_eq!(directives("info"), "error,tidegate=info");
        assert_eq!(
            directives("warn, rustls=debug,tidegate::upstream=trace"),
            "error,tidegate=warn,rustls=debug,tidegate::upstream=trace"
        );
        assert_eq!(directives("off"), "off");
    }

    #[test]
    fn an_unknown_level_is_an_error() {
        assert!(init("tidegate=loud", false).is_err());
    }
}
