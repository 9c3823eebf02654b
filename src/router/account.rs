//! The account of sessions and filters. Each principal and each network has a share of it.
//!
//! A session is charged for its state, its client identifier, its will and its subscriptions; a filter
//! is charged once, to the session that brought it. The rule of the shares: while less than half of
//! the account is used, anybody may use it; of the second half one principal, and one network, may
//! have an eighth of the account. Charges that replace others, such as the will of a client that
//! comes back, are never refused unless they grow.
//!
//! A new session that is kept while its client is away is judged as if the account had nine tenths of its
//! size: the last tenth is for clients that come back, for subscriptions, and for sessions that end with
//! their connection. Filters that linger make room from seven eighths on, before anybody is refused.
//! A session that ended to make room may be remembered for a while, and its bytes are still in use then;
//! they are counted apart, so that no further session ends for the same room.
//!
//! Principals and networks are counted by their hashes, so that a share costs a session four bytes and
//! no lock. Two that meet by chance have one share together.

use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hashing::HashSeed;
use crate::shares::{SHARE_DIVISOR, network};

/// Counts of principals, and as many of networks: 8,192. At most eight can have more than an eighth, so
/// a principal meets one of these with a probability of one in a thousand.
const BUCKETS: usize = 1 << BUCKET_BITS;
const BUCKET_BITS: u32 = 13;

/// The part of the account, and of a share, in which sessions that ended for others count as free: half of
/// the last tenth.
const ENDING_DIVISOR: u64 = 20;

/// 2^64 divided by the golden ratio: a product with it spreads its factor over the high bits.
const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;

/// Who a session or a filter is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) struct Holder {
    /// The number of the principal's count and one. `None`: all anonymous clients are one principal,
    /// whose share would be a limit for everybody.
    principal: Option<NonZeroU16>,
    /// The number of the network's count.
    network: u16,
}

impl Holder {
    /// Whether the client is one of the anonymous ones.
    pub(crate) fn is_anonymous(self) -> bool {
        self.principal.is_none()
    }

    /// Whether `other` can use the room that this holder gives back, where `full` is used up.
    pub(crate) fn makes_room_for(self, other: Self, full: Full) -> bool {
        match full {
            Full::All => true,
            Full::Principal => self.principal == other.principal,
            Full::Network => self.network == other.network,
        }
    }
}

/// Whose part of an account is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// Everybody's.
    All,
    /// The principal's share.
    Principal,
    /// The share of the client's network.
    Network,
}

impl fmt::Display for Full {
    /// The part that is used up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all of it",
            Self::Principal => "the share of the client's principal",
            Self::Network => "the share of the client's network",
        })
    }
}

/// How the amount counts that sessions have which ended for others and are still remembered.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// As used.
    Used,
    /// As free, up to half of the last tenth of the account and of each share: the other half is always
    /// there for clients that come back.
    FreeInPart,
    /// As free.
    Free,
}

/// An amount, and the parts of it by principal and by network.
#[derive(Debug)]
struct Counts {
    all: AtomicU64,
    principals: Box<[AtomicU64]>,
    networks: Box<[AtomicU64]>,
}

impl Counts {
    fn new() -> Self {
        let counts = || (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self {
            all: AtomicU64::new(0),
            principals: counts(),
            networks: counts(),
        }
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        let shares = self.principals.iter().chain(&self.networks);
        let mut counts = std::iter::once(&self.all).chain(shares);
        counts.all(|count| count.load(Ordering::Relaxed) == 0)
    }

    fn principal(&self, holder: Holder) -> Option<&AtomicU64> {
        let number = usize::from(holder.principal?.get());
        Some(&self.principals[number - 1])
    }

    fn network(&self, holder: Holder) -> &AtomicU64 {
        &self.networks[usize::from(holder.network)]
    }

    fn add(&self, holder: Holder, more: u64) {
        self.all.fetch_add(more, Ordering::Relaxed);
        self.network(holder).fetch_add(more, Ordering::Relaxed);
        if let Some(principal) = self.principal(holder) {
            principal.fetch_add(more, Ordering::Relaxed);
        }
    }

    fn subtract(&self, holder: Holder, less: u64) {
        self.all.fetch_sub(less, Ordering::Relaxed);
        self.network(holder).fetch_sub(less, Ordering::Relaxed);
        if let Some(principal) = self.principal(holder) {
            principal.fetch_sub(less, Ordering::Relaxed);
        }
    }
}

/// An amount in use, and the shares in it.
#[derive(Debug)]
pub(in crate::router) struct Shared {
    max: u64,
    used: Counts,
    /// The part in use by sessions that ended for others and are still remembered, from the first of
    /// them on.
    ending: OnceLock<Counts>,
}

impl Shared {
    fn new(max: u64) -> Self {
        Self {
            max,
            used: Counts::new(),
            ending: OnceLock::new(),
        }
    }

    /// The amount in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.all.load(Ordering::Relaxed)
    }

    /// Whether nothing is in use, nor any share of it.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let mut all = std::iter::once(&self.used).chain(self.ending.get());
        all.all(Counts::is_empty)
    }

    /// The amount beyond which no new session is kept.
    pub(crate) fn keeping_max(&self) -> u64 {
        self.max / 10 * 9
    }

    /// The amount beyond which filters that nobody uses make room.
    pub(crate) fn lingering_max(&self) -> u64 {
        self.max / 8 * 7
    }

    /// Whether there is room for `more`. Concurrent callers may exceed the limit together, each by its
    /// own amount.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn has_room(&self, holder: Holder, more: u64) -> Result<(), Full> {
        self.has_room_below(self.max, Ending::Used, holder, more)
    }

    /// Whether there is room for a new session of `more` bytes that is kept while its client is away.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn has_room_to_keep(&self, holder: Holder, more: u64) -> Result<(), Full> {
        self.has_room_below(self.keeping_max(), Ending::FreeInPart, holder, more)
    }

    /// Whether there will be room for such a session once the sessions that ended for others are
    /// forgotten.
    pub(crate) fn will_have_room_to_keep(&self, holder: Holder, more: u64) -> bool {
        let room = self.has_room_below(self.keeping_max(), Ending::Free, holder, more);
        room.is_ok()
    }

    /// Whether there will be room for `more` in the first nine tenths without `lingering`, and without the
    /// sessions that ended for others.
    pub(crate) fn comes_back(&self, more: u64, lingering: u64) -> bool {
        let used = self.amount(Ending::Free, 1, |counts| Some(&counts.all));
        let used = used.unwrap_or_default().saturating_sub(lingering);
        used.saturating_add(more) <= self.keeping_max()
    }

    /// Whether there is room for `more` in an account of the size `max`. The shares are judged first: a
    /// holder that has used up its share is not helped by the end of others' sessions.
    fn has_room_below(
        &self,
        max: u64,
        ending: Ending,
        holder: Holder,
        more: u64,
    ) -> Result<(), Full> {
        let used = self.amount(ending, 1, |counts| Some(&counts.all));
        let used = used.unwrap_or_default();
        let share = |of: &dyn Fn(&Counts) -> Option<&AtomicU64>| {
            let own = self.amount(ending, SHARE_DIVISOR as u64, of);
            own.is_some_and(|own| {
                own.saturating_add(more) > allowance(max, used.saturating_sub(own))
            })
        };
        if share(&|counts| counts.principal(holder)) {
            return Err(Full::Principal);
        }
        if share(&|counts| Some(counts.network(holder))) {
            return Err(Full::Network);
        }
        match used.saturating_add(more) > max {
            true => Err(Full::All),
            false => Ok(()),
        }
    }

    /// The amount of the account (`divisor` 1), or of a share, which may have a part `1 / divisor` of it.
    fn amount(
        &self,
        ending: Ending,
        divisor: u64,
        of: impl Fn(&Counts) -> Option<&AtomicU64>,
    ) -> Option<u64> {
        let read = |counts: &Counts| of(counts).map(|count| count.load(Ordering::Relaxed));
        let used = read(&self.used)?;
        let ended = self.ending.get().and_then(read).unwrap_or(0);
        let free = match ending {
            Ending::Used => 0,
            Ending::FreeInPart => ended.min(self.max / ENDING_DIVISOR / divisor),
            Ending::Free => ended,
        };
        Some(used.saturating_sub(free))
    }

    /// Whether the principal or the network has so much that filters that nobody uses make room.
    pub(crate) fn is_over(&self, holder: Holder) -> bool {
        let room = self.has_room_below(self.lingering_max(), Ending::Used, holder, 0);
        room.is_err()
    }

    /// Whether an amount can move from one holder to another of the same principal: the network must
    /// have room for it.
    pub(crate) fn has_room_to_move(&self, from: Holder, to: Holder, amount: u64) -> bool {
        let own = self.used.network(to).load(Ordering::Relaxed);
        let others = self.used().saturating_sub(own + amount);
        from.principal == to.principal && own + amount <= allowance(self.max, others)
    }

    /// Adds an amount, whether there is room or not.
    pub(crate) fn charge(&self, holder: Holder, more: u64) {
        self.used.add(holder, more);
    }

    /// Gives an amount back that was charged to the same holder.
    pub(crate) fn release(&self, holder: Holder, less: u64) {
        self.used.subtract(holder, less);
    }

    /// A session that ended for others has `now` of the amount; until now it had `before`.
    pub(crate) fn note_ending(&self, holder: Holder, before: u64, now: u64) {
        if now == before {
            return;
        }
        let ending = self.ending.get_or_init(Counts::new);
        match now.checked_sub(before) {
            Some(more) => ending.add(holder, more),
            None => ending.subtract(holder, before - now),
        }
    }
}

/// The most that one principal or network may have of `max` while the others have `others`: its eighth,
/// and the part of the first half that they leave.
fn allowance(max: u64, others: u64) -> u64 {
    max / SHARE_DIVISOR as u64 + (max / 2).saturating_sub(others)
}

/// The account of sessions and filters.
#[derive(Debug)]
pub(in crate::router) struct SessionAccount {
    hash_seed: HashSeed,
    /// Bytes of sessions and filters.
    pub bytes: Shared,
    /// Filters in the table.
    pub filters: Shared,
}

impl SessionAccount {
    /// An account of so many bytes and filters.
    pub(crate) fn new(bytes: u64, filters: usize, hash_seed: HashSeed) -> Self {
        Self {
            hash_seed,
            bytes: Shared::new(bytes),
            filters: Shared::new(filters as u64),
        }
    }

    /// The holder of the sessions of a principal, whose client is connected from `address`.
    pub(crate) fn holder(&self, principal: Option<&str>, address: IpAddr) -> Holder {
        Holder {
            principal: principal.and_then(|name| NonZeroU16::new(self.bucket(name) + 1)),
            network: self.bucket(network(address)),
        }
    }

    /// The number of a count, below [`BUCKETS`].
    fn bucket(&self, value: impl Hash) -> u16 {
        // The low bits of this hash are not spread evenly.
        let spread = self.hash_seed.hash_one(value).wrapping_mul(GOLDEN_RATIO);
        (spread >> (u64::BITS - BUCKET_BITS)) as u16
    }
}

#[cfg(test)]
mod tests;
