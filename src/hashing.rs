//! Hash maps of the pure modules. A run of a simulation repeats from its seed, so no decision may
//! depend on an order that differs between processes:
//!
//! - `LookUp` and `LookUpSet` have random keys and cannot be iterated;
//! - `SeededMap` can be iterated, in an order that its [`HashSeed`] determines;
//! - any other map or set is ordered by its keys.

use std::borrow::Borrow;
use std::collections::HashMap;
pub(crate) use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hash};

use foldhash::SharedSeed;
use foldhash::fast::{FoldHasher, RandomState};

/// The hasher of [`LookUp`], whose keys are random for each process. It also makes digests that are
/// only compared with each other.
pub(crate) type LookUpHasher = RandomState;

/// A map that can be iterated, in an order that is the same for the same seed.
pub(crate) type SeededMap<K, V> = HashMap<K, V, HashSeed>;

/// A hash map that is only looked up.
#[derive(Clone, Debug)]
pub(crate) struct LookUp<K, V>(HashMap<K, V, LookUpHasher>);

/// A hash set that is only looked up.
#[derive(Clone, Debug)]
pub(crate) struct LookUpSet<K>(LookUp<K, ()>);

impl<K, V> Default for LookUp<K, V> {
    fn default() -> Self {
        Self(HashMap::default())
    }
}

impl<K, V> LookUp<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether a condition holds for an entry, which must not depend on the entries before it.
    pub(crate) fn any(&self, holds: impl Fn(&K, &V) -> bool) -> bool {
        self.0.iter().any(|(key, value)| holds(key, value))
    }

    /// Removes the entries for which a function returns false. It may change their values, and must
    /// not depend on the entries before.
    pub(crate) fn retain(&mut self, keeps: impl Fn(&K, &mut V) -> bool) {
        self.0.retain(|key, value| keeps(key, value));
    }

    /// The entries for which a condition holds, sorted by their keys.
    pub(crate) fn sorted(&self, holds: impl Fn(&K, &V) -> bool) -> Vec<(&K, &V)>
    where
        K: Ord,
    {
        let entries = self.0.iter().filter(|(key, value)| holds(key, value));
        let mut entries: Vec<_> = entries.collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries
    }

    /// The keys and values in any order, for a test that judges all of them.
    #[cfg(test)]
    pub(crate) fn all(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter()
    }
}

impl<K: Eq + Hash, V> LookUp<K, V> {
    pub(crate) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.get(key)
    }

    pub(crate) fn get_mut<Q>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.get_mut(key)
    }

    pub(crate) fn get_key_value<Q>(&self, key: &Q) -> Option<(&K, &V)>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.get_key_value(key)
    }

    pub(crate) fn contains_key<Q>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.contains_key(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.0.insert(key, value)
    }

    pub(crate) fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.remove(key)
    }

    pub(crate) fn entry(&mut self, key: K) -> Entry<'_, K, V> {
        self.0.entry(key)
    }

    /// The digest of a value, to be compared with digests of this map only.
    pub(crate) fn digest(&self, value: impl Hash) -> u64 {
        self.0.hasher().hash_one(value)
    }

    /// Gives memory back if less than an eighth of more than `floor` places is used.
    pub(crate) fn shrink(&mut self, floor: usize) {
        if self.0.capacity() > floor && self.0.len() < self.0.capacity() / 8 {
            self.0.shrink_to(self.0.len() * 2);
        }
    }
}

impl<K: Eq + Hash, V> FromIterator<(K, V)> for LookUp<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl<K> Default for LookUpSet<K> {
    fn default() -> Self {
        Self(LookUp::default())
    }
}

impl<K> LookUpSet<K> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<K: Eq + Hash> LookUpSet<K> {
    pub(crate) fn contains<Q>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.contains_key(key)
    }

    /// Returns whether the key is new.
    pub(crate) fn insert(&mut self, key: K) -> bool {
        self.0.insert(key, ()).is_none()
    }

    /// Returns whether the key was there.
    pub(crate) fn remove<Q>(&mut self, key: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.0.remove(key).is_some()
    }
}

impl<K: Eq + Hash> FromIterator<K> for LookUpSet<K> {
    fn from_iter<I: IntoIterator<Item = K>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| (key, ())).collect())
    }
}

/// The seed of all hashes on which an order or a place depends: the shard of a session, the link of a
/// filter, the order of a `SeededMap`. A process draws it once, so that nobody outside can choose
/// keys that collide; simulations use [`HashSeed::fixed`].
#[derive(Clone, Copy, Debug)]
pub struct HashSeed(&'static Keys);

#[derive(Debug)]
struct Keys {
    hasher: u64,
    shared: SharedSeed,
}

impl HashSeed {
    /// The seed made of random numbers. It lives to the end of the process: to be called once.
    pub(crate) fn from_random(numbers: [u64; 2]) -> Self {
        let [hasher, shared] = numbers;
        Self(Box::leak(Box::new(Keys {
            hasher,
            shared: SharedSeed::from_u64(shared),
        })))
    }

    /// The same seed in each process.
    pub fn fixed() -> Self {
        static KEYS: Keys = Keys {
            hasher: 1,
            shared: SharedSeed::from_u64(1),
        };
        Self(&KEYS)
    }
}

impl BuildHasher for HashSeed {
    type Hasher = FoldHasher<'static>;

    #[inline(always)]
    fn build_hasher(&self) -> Self::Hasher {
        FoldHasher::with_seed(self.0.hasher, &self.0.shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_the_hashes() {
        let (one, two) = (HashSeed::fixed(), HashSeed::from_random([1, 2]));
        assert_eq!(one.hash_one("a"), HashSeed::fixed().hash_one("a"));
        assert_ne!(one.hash_one("a"), two.hash_one("a"));
        let three = HashSeed::from_random([3, 2]);
        assert_ne!(two.hash_one("a"), three.hash_one("a"));
    }

    #[test]
    fn a_map_gives_memory_back() {
        let mut map: LookUp<u32, u32> = (0..1000).map(|n| (n, n)).collect();
        map.retain(|n, _| *n < 10);
        map.shrink(64);
        assert!(map.0.capacity() < 64 && map.len() == 10);
        assert!(map.any(|n, _| *n == 9) && !map.any(|n, _| *n == 10));
        assert_eq!(map.digest("a"), map.digest("a"));
    }
}
