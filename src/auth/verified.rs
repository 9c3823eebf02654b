//! A cache of recently verified credentials, which it keeps as keyed digests.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use blake2::Blake2bMac;
use blake2::digest::consts::U32;
use blake2::digest::{KeyInit, Mac};
use lru::LruCache;
use tokio::time::Instant;

/// How long a valid credential is remembered.
const RIGHT_FOR: Duration = Duration::from_secs(3600);
/// How long an invalid credential is remembered: a client with an old password keeps trying it.
const WRONG_FOR: Duration = Duration::from_secs(10);
/// Valid credentials that are remembered, about 150 bytes each.
const RIGHT_MAX: NonZeroUsize = NonZeroUsize::new(100_000).expect("not zero");
/// Invalid credentials that are remembered. They have a cache of their own, so that guesses evict no valid
/// credential.
const WRONG_MAX: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// The keyed digest of a credential. Without the process's key it reveals nothing.
pub(super) type Digest = [u8; 32];

/// The remembered result of a verification.
pub(super) enum Recalled {
    Right(Arc<str>),
    Wrong,
    Unknown,
}

/// The cache of verified credentials. It evicts the least recently used.
pub(super) struct Verified {
    key: [u8; 32],
    right: LruCache<Digest, (Arc<str>, Instant)>,
    wrong: LruCache<Digest, Instant>,
}

impl Verified {
    /// An empty cache with a random key.
    pub(super) fn new() -> Self {
        Self {
            key: random(),
            // `LruCache::new` would allocate the whole table at once.
            right: LruCache::unbounded(),
            wrong: LruCache::unbounded(),
        }
    }

    pub(super) fn digest(&self, parts: &[&[u8]]) -> Digest {
        let mut mac = <Blake2bMac<U32> as KeyInit>::new_from_slice(&self.key)
            .expect("BLAKE2b takes keys of up to 64 bytes");
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    pub(super) fn recall(&mut self, digest: &Digest, now: Instant) -> Recalled {
        match self.right.get(digest) {
            Some((principal, until)) if now < *until => {
                return Recalled::Right(Arc::clone(principal));
            }
            Some(_) => {
                self.right.pop(digest);
            }
            None => {}
        }
        match self.wrong.get(digest) {
            Some(until) if now < *until => Recalled::Wrong,
            _ => Recalled::Unknown,
        }
    }

    /// Remembers the principal of a credential, or that the credential is invalid.
    pub(super) fn remember(&mut self, digest: Digest, principal: Option<Arc<str>>, now: Instant) {
        match principal {
            Some(principal) => {
                self.right.put(digest, (principal, now + RIGHT_FOR));
                if self.right.len() > RIGHT_MAX.get() {
                    self.right.pop_lru();
                }
            }
            None => {
                self.wrong.put(digest, now + WRONG_FOR);
                if self.wrong.len() > WRONG_MAX.get() {
                    self.wrong.pop_lru();
                }
            }
        }
    }

    pub(super) fn forget(&mut self) {
        self.right.clear();
        self.wrong.clear();
        // The result of a verification that began before the change must not be found.
        self.key = random();
    }
}

/// Random bytes from the system.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("Linux has had a random source since 3.17");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_ends() {
        let mut verified = Verified::new();
        let now = Instant::now();
        let digest = verified.digest(&[b"a", b"b"]);
        verified.remember(digest, Some("a".into()), now);
        let just_before = now + RIGHT_FOR - Duration::from_millis(1);
        assert!(matches!(
            verified.recall(&digest, just_before),
            Recalled::Right(_)
        ));
        assert!(matches!(
            verified.recall(&digest, now + RIGHT_FOR),
            Recalled::Unknown
        ));
        verified.remember(digest, None, now);
        assert!(matches!(verified.recall(&digest, now), Recalled::Wrong));
        assert!(matches!(
            verified.recall(&digest, now + WRONG_FOR),
            Recalled::Unknown
        ));
    }

    #[test]
    fn memory_is_bounded_and_wrong_ones_push_out_no_right_one() {
        let mut verified = Verified::new();
        let now = Instant::now();
        let digest = verified.digest(&[b"a"]);
        verified.remember(digest, Some("a".into()), now);
        for i in 0..=WRONG_MAX.get() {
            let mut wrong = [0; 32];
            wrong[..8].copy_from_slice(&(i as u64).to_le_bytes());
            verified.remember(wrong, None, now);
        }
        assert_eq!(verified.wrong.len(), WRONG_MAX.get());
        assert!(matches!(verified.recall(&digest, now), Recalled::Right(_)));
    }

    #[test]
    fn digests_tell_parts_and_processes_apart() {
        let (a, b) = (Verified::new(), Verified::new());
        assert_ne!(a.digest(&[b"ab", b"c"]), a.digest(&[b"a", b"bc"]));
        assert_ne!(a.digest(&[b"a"]), b.digest(&[b"a"]));
        assert_eq!(a.digest(&[b"a"]), a.digest(&[b"a"]));
    }
}
