//! The bytes of a packet whose rest has not arrived.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::Account;
use crate::time::{Deadline, Millis};

/// Up to this size an incomplete packet is taken even when the account is full, and an empty buffer
/// keeps its allocation.
pub(in crate::client) const KEEP_BYTES: usize = 4096;

/// The rate at which the bytes of a packet must arrive once its first deadline has passed: it has a second
/// more for each so many bytes.
pub(super) const SLOWEST_BYTES_PER_SECOND: usize = 8 * 1024;

/// The bytes of an incomplete packet, charged to the account of all such bytes.
#[derive(Debug, Default)]
pub(in crate::client) struct ReadBuffer {
    pub bytes: Vec<u8>,
    /// When the packet must be complete if no more of it arrives than its first bytes. `None`: something
    /// else limits its time. While the buffer is empty, it is the deadline of an earlier packet.
    first_deadline: Option<Deadline>,
    charged_bytes: usize,
    account: Option<Arc<Account>>,
}

impl ReadBuffer {
    /// Charges the bytes that a read left. A packet that begins with them has to be complete at
    /// `deadline`, or later if it is large; `progress` says that the read completed the packet before
    /// it.
    pub(crate) fn settle(
        &mut self,
        account: &Arc<Account>,
        progress: bool,
        deadline: Option<Deadline>,
    ) {
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP_BYTES {
            self.bytes = Vec::new();
        }
        if progress || self.charged_bytes == 0 {
            self.first_deadline = deadline;
        }
        if self.bytes.len() != self.charged_bytes {
            account.charge(self.bytes.len());
            account.release(self.charged_bytes);
            self.charged_bytes = self.bytes.len();
            self.account.get_or_insert_with(|| account.clone());
        }
    }

    /// The time of the packet begins anew, since its bytes were not read.
    pub(super) fn restart(&mut self, deadline: Deadline) {
        self.first_deadline = Some(deadline);
    }

    /// When the packet, with the bytes that have arrived, must be complete.
    pub(super) fn due_at(&self) -> Option<Millis> {
        let more = Duration::from_secs((self.bytes.len() / SLOWEST_BYTES_PER_SECOND) as u64);
        self.first_deadline.map(|first| first.time() + more)
    }

    /// Whether the packet is incomplete at its deadline.
    pub(super) fn is_late(&self, now: Millis) -> bool {
        !self.bytes.is_empty() && self.due_at().is_some_and(|at| at <= now)
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.release(self.charged_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incomplete_packet_is_charged_until_it_is_complete() {
        let account = Arc::new(Account::new());
        let mut buffer = ReadBuffer::default();
        buffer.bytes.extend([1; 5]);
        buffer.settle(&account, false, Some(Deadline::at(Millis::new(100))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(99))),
            (5, false)
        );
        // More of the same packet moves no deadline.
        buffer.bytes.extend([1; 5]);
        buffer.settle(&account, false, Some(Deadline::at(Millis::new(200))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(100))),
            (10, true)
        );
        // The next packet has its own.
        buffer.bytes.truncate(1);
        buffer.settle(&account, true, Some(Deadline::at(Millis::new(300))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(299))),
            (1, false)
        );
        buffer.bytes.clear();
        buffer.settle(&account, true, Some(Deadline::at(Millis::new(400))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(500))),
            (0, false)
        );
        buffer.bytes.push(1);
        buffer.settle(&account, false, Some(Deadline::at(Millis::new(500))));
        drop(buffer);
        assert_eq!(account.used(), 0);
    }
}
