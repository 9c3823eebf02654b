//! Byte accounts, which say how much a bounded part of the process has in use, and the policy of a full queue.

use std::sync::Arc;
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

    /// Adds `bytes` if they fit into a budget of `max_bytes`.
    fn try_charge(&self, bytes: i64, max_bytes: u64) -> bool {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = (before + bytes).max(0) as u64 <= max_bytes;
        if !fits {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// Bytes in use now.
    pub fn used(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed).max(0) as u64
    }
}

/// The accounts of messages that a cache keeps, and that queues may refer to as well and longer.
#[derive(Clone, Debug, Default)]
pub struct CacheAccounts {
    /// All of these messages, while they are in memory.
    pub messages: Arc<Account>,
    /// The messages that the cache still has.
    pub kept: Arc<Account>,
}

impl CacheAccounts {
    /// Bytes of messages that are not in the cache any more, and in queues still.
    pub fn queued_only(&self) -> u64 {
        self.messages.used().saturating_sub(self.kept.used())
    }
}

/// The most bytes that an owner takes from a budget ahead of their use.
const AHEAD_MAX_BYTES: u64 = 64 * 1024;

/// One owner's part of a budget that several owners share. It takes bytes ahead of their use, so that
/// the common account is not touched for each message.
#[derive(Debug)]
pub struct Allowance {
    account: Arc<Account>,
    max_bytes: u64,
    ahead_bytes: i64,
    /// Bytes taken from the budget and not in use; below 0, bytes in use that nobody asked for.
    spare: i64,
    /// Bytes of `spare` that were asked for.
    asked: i64,
}

impl Allowance {
    /// One of `owners` parts of a budget of `max_bytes`.
    pub fn new(account: Arc<Account>, max_bytes: u64, owners: u64) -> Self {
        let ahead = max_bytes / owners.max(1) / 32;
        Self {
            account,
            max_bytes,
            ahead_bytes: ahead.min(AHEAD_MAX_BYTES) as i64,
            spare: 0,
            asked: 0,
        }
    }

    /// Whether the budget has room for `bytes` more. If it has, they are set aside until
    /// [`Allowance::change`].
    pub fn ask(&mut self, bytes: usize) -> bool {
        let asked = self.asked + bytes as i64;
        let lacking = asked - self.spare;
        if lacking > 0 {
            let taken = [lacking + self.ahead_bytes, lacking]
                .into_iter()
                .find(|taken| self.account.try_charge(*taken, self.max_bytes));
            let Some(taken) = taken else {
                return false;
            };
            self.spare += taken;
        }
        self.asked = asked;
        true
    }

    /// The owner has `bytes` more in use, or fewer if below 0. Nothing is set aside any more.
    pub fn change(&mut self, bytes: i64) {
        self.spare -= bytes;
        self.asked = 0;
    }

    /// Gives back the bytes that are not likely to be used soon, and charges bytes that nobody asked for.
    pub fn settle(&mut self) {
        if (0..=2 * self.ahead_bytes).contains(&self.spare) {
            return;
        }
        let keep = self.spare.clamp(0, self.ahead_bytes);
        let more = keep - self.spare;
        self.account.bytes.fetch_add(more, Ordering::Relaxed);
        self.spare = keep;
    }

    /// Bytes taken from the budget and not in use.
    pub fn spare(&self) -> i64 {
        self.spare
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_share_a_budget() {
        let account = Arc::new(Account::new());
        let owner = || Allowance::new(account.clone(), 10_000, 2);
        let (mut one, mut other) = (owner(), owner());
        assert!(one.ask(6000));
        assert!(!one.ask(6000) && !other.ask(6000));
        one.change(6000);
        one.settle();
        // The rest of the budget is there for both of them.
        assert!(other.ask(3000) && other.ask(800) && !other.ask(800));
        other.change(3800);
        other.settle();
        assert_eq!(account.used() as i64 - one.spare() - other.spare(), 9800);
        one.change(-6000);
        one.settle();
        assert!(other.ask(5000));
        // Bytes that nobody asked for are charged all the same.
        one.change(20_000);
        one.settle();
        other.change(-3800);
        other.settle();
        assert_eq!(account.used() as i64 - one.spare() - other.spare(), 20_000);
        assert!(!one.ask(1));
    }

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
