//! Operations on files that failed.

use std::fmt;
use std::io;

/// An operation on a file that failed.
#[derive(Debug)]
pub struct Failure {
    /// The operation.
    pub operation: &'static str,
    /// The file's name, or `.` for the directory.
    pub file: String,
    /// The system's error.
    pub error: io::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.operation, self.file, self.error)
    }
}

/// Names an operation in its error.
pub(super) fn tried<T>(
    operation: &'static str,
    file: &str,
    result: io::Result<T>,
) -> Result<T, Failure> {
    result.map_err(|error| Failure {
        operation,
        file: file.to_owned(),
        error,
    })
}
