//! The bytes that producers may have reserved or waiting.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::format::{BODY_BYTES_MAX, RECORD_HEAD_BYTES};

/// The size of the largest record.
const LARGEST_BYTES: usize = RECORD_HEAD_BYTES as usize + BODY_BYTES_MAX;

/// All room of a log.
#[derive(Debug)]
pub(super) struct Rooms {
    /// A permit is a byte.
    free: Arc<Semaphore>,
    all: u32,
}

impl Rooms {
    pub(super) fn new(bytes: u32) -> Self {
        Self {
            free: Arc::new(Semaphore::new(bytes as usize)),
            all: bytes,
        }
    }

    /// The permits of a reservation: more than all there is means all there is.
    fn wanted(&self, bytes: usize) -> u32 {
        u32::try_from(bytes).unwrap_or(u32::MAX).min(self.all)
    }

    fn room(&self, permit: OwnedSemaphorePermit, bytes: usize) -> Room {
        Room {
            permit,
            bytes: bytes.min(LARGEST_BYTES.max(self.all as usize)),
        }
    }

    pub(super) async fn reserve(&self, bytes: usize) -> Room {
        let wanted = self.wanted(bytes);
        let permit = self.free.clone().acquire_many_owned(wanted).await;
        self.room(permit.expect("the semaphore is never closed"), bytes)
    }

    pub(super) fn try_reserve(&self, bytes: usize) -> Option<Room> {
        let wanted = self.wanted(bytes);
        let permit = self.free.clone().try_acquire_many_owned(wanted).ok()?;
        Some(self.room(permit, bytes))
    }

    /// Gives back bytes that records have taken.
    pub(super) fn give_back(&self, bytes: usize) {
        self.free.add_permits(bytes);
    }

    #[cfg(test)]
    pub(super) fn free_bytes(&self) -> usize {
        self.free.available_permits()
    }
}

/// Bytes that a producer has reserved. Dropping it gives the rest back.
#[derive(Debug)]
pub struct Room {
    permit: OwnedSemaphorePermit,
    /// The bytes that records may have. More than the permits if it was all room that there is.
    bytes: usize,
}

impl Room {
    /// The bytes that were not used yet.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many permits a record of `needed` bytes takes; `None`: it does not fit.
    pub(super) fn share_of(&self, needed: usize) -> Option<usize> {
        (needed <= self.bytes).then(|| needed.min(self.permit.num_permits()))
    }

    /// Leaves permits to a record of `needed` bytes, which gives them back later.
    pub(super) fn leave(&mut self, needed: usize, permits: usize) {
        self.bytes -= needed.min(self.bytes);
        if let Some(permit) = self.permit.split(permits) {
            permit.forget();
        }
    }
}
