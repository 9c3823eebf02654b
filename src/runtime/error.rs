//! Why a start fails.

/// Why the process does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Something that the configuration names is missing or wrong.
    #[error("{0}")]
    Config(String),
    /// An address is taken, or the broker cannot be reached: a later attempt may succeed.
    #[error("{0}")]
    Temporary(String),
    /// Anything else.
    #[error("{0}")]
    Internal(String),
}
