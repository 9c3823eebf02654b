//! The bytes that producers may have reserved or waiting.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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

    /// More than all there is means all there is.
    fn wanted(&self, bytes: usize) -> u32 {
        u32::try_from(bytes).unwrap_or(u32::MAX).min(self.all)
    }

    pub(super) async fn reserve(&self, bytes: usize) -> Room {
        let wanted = self.wanted(bytes);
        let permit = self.free.clone().acquire_many_owned(wanted).await;
        Room {
            permit: permit.expect("the semaphore is never closed"),
            is_all: wanted == self.all,
        }
    }

    pub(super) fn try_reserve(&self, bytes: usize) -> Option<Room> {
        let wanted = self.wanted(bytes);
        let permit = self.free.clone().try_acquire_many_owned(wanted).ok()?;
        Some(Room {
            permit,
            is_all: wanted == self.all,
        })
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
    /// It was all room that there is, so a record of any size fits.
    is_all: bool,
}

impl Room {
    /// The bytes that were not used yet.
    pub fn bytes(&self) -> usize {
        self.permit.num_permits()
    }

    /// How many bytes a record of `needed` bytes takes; `None`: it does not fit.
    pub(super) fn share_of(&self, needed: usize) -> Option<usize> {
        let taken = needed.min(self.bytes());
        (taken == needed || self.is_all).then_some(taken)
    }

    /// Leaves bytes to a record, which gives them back later.
    pub(super) fn leave(&mut self, bytes: usize) {
        if let Some(permit) = self.permit.split(bytes) {
            permit.forget();
        }
    }
}
