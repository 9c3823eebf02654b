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

/// The bytes of an incomplete packet, charged to the account of all such bytes. Boxed, because an idle
/// connection has none.
#[derive(Debug, Default)]
pub(in crate::client) struct ReadBuffer(Option<Box<Incomplete>>);

#[derive(Debug)]
struct Incomplete {
    bytes: Vec<u8>,
    /// When the packet must be complete if no more of it arrives than its first bytes. `None`: something
    /// else limits its time. While the buffer is empty, it is the deadline of an earlier packet.
    first_deadline: Option<Deadline>,
    charged_bytes: usize,
    account: Arc<Account>,
}

impl ReadBuffer {
    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |incomplete| &incomplete.bytes)
    }

    /// Whether it is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// Adds bytes, which [`ReadBuffer::settle`] charges.
    pub(crate) fn extend(&mut self, account: &Arc<Account>, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let new = || {
            Box::new(Incomplete {
                bytes: Vec::new(),
                first_deadline: None,
                charged_bytes: 0,
                account: account.clone(),
            })
        };
        self.0
            .get_or_insert_with(new)
            .bytes
            .extend_from_slice(bytes);
    }

    /// Takes all bytes out. They stay charged until the buffer is dropped.
    pub(in crate::client) fn take_bytes(&mut self) -> Vec<u8> {
        let incomplete = self.0.as_mut();
        incomplete.map_or_else(Vec::new, |i| std::mem::take(&mut i.bytes))
    }

    /// Takes the first `used` bytes away: they were complete packets.
    pub(crate) fn consume(&mut self, used: usize) {
        if let Some(incomplete) = &mut self.0 {
            incomplete.bytes.drain(..used);
        }
    }

    /// Charges the bytes that a read left. A packet that begins with them has to be complete at
    /// `deadline`, or later if it is large; `progress` says that the read completed the packet before
    /// it.
    pub(crate) fn settle(&mut self, progress: bool, deadline: Option<Deadline>) {
        let Some(incomplete) = &mut self.0 else {
            return;
        };
        if incomplete.bytes.is_empty() && incomplete.bytes.capacity() > KEEP_BYTES {
            self.0 = None;
            return;
        }
        if progress || incomplete.charged_bytes == 0 {
            incomplete.first_deadline = deadline;
        }
        if incomplete.bytes.len() != incomplete.charged_bytes {
            incomplete.account.charge(incomplete.bytes.len());
            incomplete.account.release(incomplete.charged_bytes);
            incomplete.charged_bytes = incomplete.bytes.len();
        }
    }

    /// The time of the packet begins anew, since its bytes were not read.
    pub(super) fn restart(&mut self, deadline: Deadline) {
        if let Some(incomplete) = &mut self.0 {
            incomplete.first_deadline = Some(deadline);
        }
    }

    /// When the packet, with the bytes that have arrived, must be complete.
    pub(super) fn due_at(&self) -> Option<Millis> {
        let incomplete = self.0.as_ref()?;
        let seconds = incomplete.bytes.len() / SLOWEST_BYTES_PER_SECOND;
        let more = Duration::from_secs(seconds as u64);
        (incomplete.first_deadline).map(|first| first.time() + more)
    }

    /// Whether the packet is incomplete at its deadline.
    pub(super) fn is_late(&self, now: Millis) -> bool {
        !self.is_empty() && self.due_at().is_some_and(|at| at <= now)
    }
}

impl Drop for Incomplete {
    fn drop(&mut self) {
        self.account.release(self.charged_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incomplete_packet_is_charged_until_it_is_complete() {
        let account = Arc::new(Account::new());
        let mut buffer = ReadBuffer::default();
        buffer.extend(&account, &[1; 5]);
        buffer.settle(false, Some(Deadline::at(Millis::new(100))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(99))),
            (5, false)
        );
        // More of the same packet moves no deadline.
        buffer.extend(&account, &[1; 5]);
        buffer.settle(false, Some(Deadline::at(Millis::new(200))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(100))),
            (10, true)
        );
        // The next packet has its own.
        buffer.consume(9);
        buffer.settle(true, Some(Deadline::at(Millis::new(300))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(299))),
            (1, false)
        );
        buffer.consume(1);
        buffer.settle(true, Some(Deadline::at(Millis::new(400))));
        assert_eq!(
            (account.used(), buffer.is_late(Millis::new(500))),
            (0, false)
        );
        buffer.extend(&account, &[1]);
        buffer.settle(false, Some(Deadline::at(Millis::new(500))));
        drop(buffer);
        assert_eq!(account.used(), 0);
    }
}
