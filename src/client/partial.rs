//! The bytes of a packet whose rest has not come.

use crate::budget::Account;
use crate::time::Millis;

/// A partly received packet larger than this keeps its own buffer's capacity.
pub(super) const KEEP: usize = 4096;

/// The bytes of a packet that is not complete, charged to the account of all such.
#[derive(Default)]
pub(super) struct Partial<'a> {
    pub bytes: Vec<u8>,
    /// When the packet began, milliseconds.
    pub since: u64,
    charged: usize,
    account: Option<&'a Account>,
}

impl<'a> Partial<'a> {
    /// Charges what is left after a read; `progress`: a packet was completed by it.
    pub(super) fn settle(&mut self, account: &'a Account, progress: bool, now: Millis) {
        if self.bytes.is_empty() && self.bytes.capacity() > KEEP {
            self.bytes = Vec::new();
        }
        if progress || self.charged == 0 {
            self.since = now;
        }
        account.charge(self.bytes.len());
        account.release(self.charged);
        self.charged = self.bytes.len();
        self.account = Some(account);
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        if let Some(account) = self.account {
            account.release(self.charged);
        }
    }
}
