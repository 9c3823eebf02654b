//! The log of panics. The standard library would write them to standard error itself, and wait for
//! its reader.

use std::any::Any;
use std::panic::{self, PanicHookInfo};
use std::time::Duration;

use crate::clock::Clock;
use crate::telemetry::{RateLimited, clean, metrics};

/// Characters of a panic's message in the log.
const MESSAGE_CHARS: usize = 512;

static PANICS: RateLimited = RateLimited::burst(10, Duration::from_secs(10));

/// Counts and logs every panic of the process from now on, instead of writing it to standard error.
pub fn log_panics() {
    let clock = Clock::default();
    panic::set_hook(Box::new(move |info| log(info, clock)));
}

fn log(info: &PanicHookInfo<'_>, clock: Clock) {
    metrics().panics.increment(1);
    if let Some(suppressed) = PANICS.permit(clock.now()) {
        let place = info.location();
        let place = place.map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name(),
            suppressed,
            "Tidegate panicked at {place}, which is a fault of its own; please report it: {}",
            message(info.payload())
        );
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => text,
        (None, Some(text)) => text.as_str(),
        (None, None) => "(no message)",
    };
    clean(text, MESSAGE_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_both_kinds_are_cut_and_cleaned() {
        assert_eq!(message(&"a\nb"), "a\\nb");
        let long = "x".repeat(MESSAGE_CHARS + 1);
        assert!(message(&long).ends_with("x…"));
        assert_eq!(message(&7), "(no message)");
    }
}
