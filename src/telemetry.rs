//! What the process says about itself: log lines and metrics.

pub mod log;
pub(crate) mod metrics;

pub use log::{RateLimited, clean};
pub use metrics::*;
