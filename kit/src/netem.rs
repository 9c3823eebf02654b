//! How the relays treat packets: delay, loss, duplicates, reordering. Like Linux' netem, in user space.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::rng::Rng;

/// The treatment of each packet, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Netem {
    /// The time that a packet takes.
    pub delay: Duration,
    /// The fraction of packets that is lost, 0 to 1.
    pub loss: f64,
    /// The fraction of packets that arrives twice.
    pub duplicate: f64,
    /// The fraction of packets that arrives after its successors.
    pub late: f64,
    /// The longest extra delay of a reordered packet.
    pub by: Duration,
    /// The seed: equal seeds treat equal packets in the same way.
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

/// The random generator of a relay, shared by its tasks.
#[derive(Debug)]
pub(crate) struct Chance(Mutex<Rng>);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Mutex::new(Rng::new(seed)))
    }

    /// A random number from 0 to 1.
    pub(crate) fn next(&self) -> f64 {
        let mut rng = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        rng.fraction()
    }
}
