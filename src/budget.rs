//! Byte accounts, which say how much a bounded part of the process has in use, and the policy of a full queue.

use std::sync::atomic::{AtomicI64, Ordering};

/// What to do when a session's queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum QueueFull {
    /// Drop the oldest waiting message.
    #[default]
    Oldest,
    /// Drop the message that arrives.
    Newest,
    /// End the session.
    EndSession,
}

/// A named amount of bytes in use. Cheap to share; charging never blocks.
#[derive(Debug, Default)]
pub struct Account {
    bytes: AtomicI64,
}

impl Account {
    /// An account with no bytes in use.
    pub const fn new() -> Self {
        Self {
            bytes: AtomicI64::new(0),
        }
    }

    /// Adds `bytes`.
    pub fn charge(&self, bytes: usize) {
        // An object of more than i64::MAX bytes cannot exist.
        self.bytes.fetch_add(bytes as i64, Ordering::Relaxed);
    }

    /// Gives `bytes` back.
    pub fn release(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes as i64, Ordering::Relaxed);
    }

    /// Bytes in use now.
    pub fn used(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed).max(0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_and_released_is_gone() {
        let account = Account::new();
        account.charge(70);
        account.release(30);
        assert_eq!(account.used(), 40);
        account.release(40);
        assert_eq!(account.used(), 0);
    }
}
