//! The trace of a run: a line for each event.

use std::fmt::Write as _;

use crate::time::Millis;

/// Where the events of a run go.
#[derive(Debug)]
pub(crate) enum Trace {
    /// Nowhere.
    Off,
    /// To standard error, for a person.
    Print,
    /// Into a text, with all bytes that were sent.
    Record(String),
}

impl Trace {
    /// Whether anybody reads the events.
    pub(crate) fn is_on(&self) -> bool {
        !matches!(self, Self::Off)
    }

    /// Writes an event.
    pub(crate) fn line(&mut self, now: Millis, what: &str) {
        match self {
            Self::Off => {}
            Self::Print => eprintln!("{now:>7} {what}"),
            // Writing to a String does not fail.
            Self::Record(text) => {
                let _ = writeln!(text, "{now:>7} {what}");
            }
        }
    }

    /// Records bytes that somebody sent.
    pub(crate) fn bytes(&mut self, now: Millis, from: &str, to: &str, bytes: &[u8]) {
        if let Self::Record(text) = self
            && !bytes.is_empty()
        {
            let hex = |b: &u8| format!("{b:02x}");
            let hex: String = bytes.iter().map(hex).collect();
            // Writing to a String does not fail.
            let _ = writeln!(text, "{now:>7} {from} to {to}: {hex}");
        }
    }
}
