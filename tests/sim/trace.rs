//! Where the lines of a run's trace go: to the terminal, or into a text that two runs are compared by.

use std::cell::RefCell;
use std::fmt::{Arguments, Write};

thread_local! {
    // A run stays on one thread.
    static RECORD: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Adds a line: to the recording if there is one, else to the terminal.
pub(crate) fn line(text: Arguments<'_>) {
    RECORD.with_borrow_mut(|record| match record {
        // Writing to a string does not fail.
        Some(record) => drop(writeln!(record, "{text}")),
        None => eprintln!("{text}"),
    });
}

/// Records the lines of a run on this thread.
pub(crate) fn recorded(run: impl FnOnce()) -> String {
    RECORD.set(Some(String::new()));
    run();
    RECORD.take().unwrap_or_default()
}
