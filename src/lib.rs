//! Tidegate.

pub mod mqtt;
