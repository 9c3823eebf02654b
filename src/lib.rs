//! Tidegate.

pub mod config;
pub mod telemetry;
