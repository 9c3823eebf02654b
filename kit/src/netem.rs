//! How a network in user space treats packets, and the choice of which.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What befalls each packet, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Netem {
    /// How long it is on its way.
    pub delay: Duration,
    /// The part of them that is lost.
    pub loss: f64,
    /// The part that comes twice.
    pub duplicate: f64,
    /// The part that comes later than those behind it.
    pub late: f64,
    /// How much later, at most.
    pub by: Duration,
    /// Repeats a run's choices, as far as the packets are the same.
    pub seed: u64,
}

impl Netem {
    /// Every packet passes at once.
    pub const FAIR: Self = Self {
        delay: Duration::ZERO,
        loss: 0.0,
        duplicate: 0.0,
        late: 0.0,
        by: Duration::ZERO,
        seed: 1,
    };
}

/// The only source of chance of a relay.
#[derive(Debug)]
pub(crate) struct Chance(AtomicU64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// From 0 to 1 (SplitMix64).
    pub(crate) fn next(&self) -> f64 {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
