//! The slots of a shard's sessions by their keys. The sessions themselves have the keys, so that an entry takes
//! five bytes, and half as many again for free places.

use std::hash::BuildHasher;

use hashbrown::HashTable;

use crate::hashing::LookUpHasher;
use crate::session::SessionKey;

/// The slots of sessions, to be found by the sessions' keys. It cannot be iterated: its order is random.
#[derive(Debug, Default)]
pub(super) struct ByKey {
    slots: HashTable<u32>,
    hasher: LookUpHasher,
}

impl ByKey {
    /// The slot of the session with a key. `is` says whether the session in a slot has it.
    pub(super) fn get(&self, key: &SessionKey, is: impl Fn(u32) -> bool) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        self.slots.find(hash, |slot| is(*slot)).copied()
    }

    /// Adds the slot of a session whose key no other session has. `key_of` tells the keys of the others.
    pub(super) fn insert<'a>(
        &mut self,
        key: &SessionKey,
        slot: u32,
        key_of: impl Fn(u32) -> &'a SessionKey,
    ) {
        let hash = self.hasher.hash_one(key);
        let rehash = |slot: &u32| self.hasher.hash_one(key_of(*slot));
        self.slots.insert_unique(hash, slot, rehash);
    }

    /// Removes the slot of a session that had a key.
    pub(super) fn remove(&mut self, key: &SessionKey, slot: u32) {
        let hash = self.hasher.hash_one(key);
        if let Ok(found) = self.slots.find_entry(hash, |known| *known == slot) {
            found.remove();
        }
    }
}
