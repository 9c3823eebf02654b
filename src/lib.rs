//! Tidegate.

pub mod router;
pub mod upstream;
