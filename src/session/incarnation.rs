//! Which of the sessions that a client identifier has had one after the other.

use std::num::NonZeroU64;

/// The version number of a session: a clean start begins another incarnation. It is unique among
/// all sessions of the process, so it also serves as the origin mark that tells a session's own
/// publishes when they come back from the broker, for No Local [MQTT-3.8.3-3].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(NonZeroU64);

impl Incarnation {
    /// The incarnation of a number. `None`: 0, which no session has.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// The `n`th incarnation, counted from 0.
    pub fn nth(n: u64) -> Self {
        Self(NonZeroU64::MIN.saturating_add(n))
    }

    /// Its number.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}
