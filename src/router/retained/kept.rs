//! Messages that the cache keeps. Clients' queues may refer to them as well, and longer.

use std::ops::Deref;

use crate::budget::CacheAccounts;
use crate::mqtt::Message;

/// A message in the cache. It is charged to the cache while it is there, and afterwards to the queues
/// that still refer to it.
#[derive(Debug)]
pub(super) struct Kept {
    message: Message,
    accounts: CacheAccounts,
}

impl Kept {
    /// A copy of `message` for the cache.
    pub(super) fn new(message: &Message, accounts: &CacheAccounts) -> Self {
        let message = message.charged_to(&accounts.messages);
        accounts.kept.charge(message.size());
        Self {
            message,
            accounts: accounts.clone(),
        }
    }
}

impl Deref for Kept {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.message
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.accounts.kept.release(self.message.size());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::retained::cache::tests::arrived;
    use crate::topics::FilterId;

    #[test]
    fn a_message_that_only_queues_refer_to_is_charged_to_them() {
        let accounts = CacheAccounts::default();
        let message = arrived("a/b", &[FilterId(7)]).message;
        let kept = Kept::new(&message, &accounts);
        let queued = Message::clone(&kept);
        assert_eq!(accounts.queued_only(), 0);
        drop(kept);
        assert_eq!(accounts.queued_only(), message.size() as u64);
        drop(queued);
        assert_eq!(accounts.queued_only(), 0);
    }
}
