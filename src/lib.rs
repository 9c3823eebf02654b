//! Tidegate.

pub mod mqtt;
pub mod router;
pub mod upstream;
