//! Times without a clock: the pure modules are given them.

/// A time, or a span of time, in milliseconds. As a time it counts from the start of the
/// process's [`Clock`](crate::clock::Clock).
pub type Millis = u64;
