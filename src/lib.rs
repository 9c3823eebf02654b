//! Tidegate.

pub mod transport;
