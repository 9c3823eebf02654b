//! The core side.

pub mod embedded;
