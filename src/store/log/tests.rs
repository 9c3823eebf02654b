//! The log over a simulated disk: crashes at each operation and byte, faults, damage.

mod crashes;
mod damage;
mod faults;
mod handles;
mod world;

use super::disk::Disk as _;
use super::disk::sim::SimDisk;
use super::*;
use crate::time::Millis;
use tidegate_kit::rng::Rng;
use world::World;

/// Sizes that make rotations, rewriting and several commits out of some dozen records.
fn small() -> Options {
    Options {
        segment_bytes: HEADER_BYTES + 220,
        commit_records_max: 4,
        commit_bytes_max: 200,
        waiting_bytes_max: 10_000,
        piece_bytes_max: 100,
        salt: 0x5EED_5A17,
    }
}

/// An owner without records.
struct Nobody;

impl Owner for Nobody {
    fn begin(&mut self, _pass: Pass) {}

    fn write(&mut self, _piece: &mut Piece<'_>) -> Progress {
        Progress::Done
    }
}

fn is_full() -> bool {
    std::env::var_os("TIDEGATE_FULL").is_some()
}
