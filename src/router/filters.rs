//! The filters that clients subscribe to, and their state at the broker.
//!
//! [`Filters`] owns them. Each of its methods takes the table's lock once and returns the actions
//! that are left to the router; none of them calls a module beside this one.

pub(super) mod actions;
mod announce;
mod copies;
pub(super) mod counts;
pub(super) mod filter;
mod holders;
mod inner;
pub(super) mod journal;
mod linger;
pub(super) mod links;
mod local;
mod moves;
pub(super) mod persist;
mod place;
mod poison;
mod release;
pub(super) mod restore;
mod roots;
mod sources;
mod suback;
pub(super) mod subscribe;
mod suspects;
pub(super) mod table;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::hashing::HashSeed;
use crate::router::account::SessionAccount;
use crate::router::lost::Lost;
use crate::store::Identifiers;
use actions::LinkSet;
use counts::{LinkCounts, UsedLinks};
use table::Table;

/// Repeats of a log line are counted, and not written, for this long.
pub(super) const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Filters that are known at once at most, in use or lingering.
pub(super) const FILTERS_MAX: usize = 1_000_000;

/// The configuration of the filters.
#[derive(Clone, Debug)]
pub(super) struct FiltersConfig {
    /// How many links there are.
    pub links: LinkCounts,
    /// Messages of shared subscriptions are distributed at this node.
    pub local_groups: bool,
    /// How long a filter without subscribers stays subscribed.
    pub linger: Duration,
    /// How long a busy or surplus filter without subscribers stays subscribed at least.
    pub linger_busy_min: Duration,
    /// Filters that may linger.
    pub lingering_max: usize,
    /// Filters that may linger on one client's account, and bytes of their names.
    pub client_lingering_max: usize,
    pub client_lingering_bytes_max: usize,
    /// Spreads filters over links, so that nobody can aim at one.
    pub hash_seed: HashSeed,
}

/// All filters, and the state of the links that carry them.
#[derive(Debug)]
pub(super) struct Filters {
    config: FiltersConfig,
    table: RwLock<Table>,
    /// Filters that the broker has lost; shared with the shards, which ask for every delivery to
    /// overlapping subscriptions.
    lost: Arc<Lost>,
    /// The links that filters were placed on.
    used: Arc<UsedLinks>,
    /// For each data and shared link, whether it is connected; shared with the table.
    up: Arc<[AtomicBool]>,
    /// How often a link was lost.
    losses: AtomicU64,
    /// How often a link of any role was lost on which no packet was unanswered: not for a packet.
    unprovoked: AtomicU64,
}

impl Filters {
    /// The filters that `numbers` knows, which linger, and the `roots`.
    pub(super) fn new(
        config: FiltersConfig,
        roots: &[String],
        numbers: Box<dyn Identifiers>,
        account: &Arc<SessionAccount>,
    ) -> Self {
        let mut table = Table::new(numbers, config.links, account.clone());
        table.local_groups = config.local_groups;
        for root in roots {
            table.add_root(root);
        }
        let used = table.used.clone();
        Self {
            lost: table.lost.clone(),
            up: table.up.clone(),
            table: RwLock::new(table),
            used,
            losses: AtomicU64::new(0),
            unprovoked: AtomicU64::new(0),
            config,
        }
    }

    /// The data links that are in use.
    pub(super) fn data_links_used(&self) -> LinkSet {
        self.used.below(self.config.links.data_max)
    }

    /// Data links that are to be connected, whether filters are on them or not: the first ones.
    pub(super) fn data_links_wanted(&self) -> usize {
        self.used.data_wanted()
    }

    /// The filters that the broker has lost.
    pub(super) fn lost(&self) -> &Arc<Lost> {
        &self.lost
    }

    /// Locks the table for reading.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Table> {
        #[cfg(test)]
        crate::router::locks::count(crate::router::locks::Lock::Table);
        self.table.read()
    }

    /// Locks the table for writing.
    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        #[cfg(test)]
        crate::router::locks::count(crate::router::locks::Lock::Table);
        self.table.write()
    }

    /// The table with its lock.
    #[cfg(test)]
    pub(super) fn table(&self) -> &RwLock<Table> {
        &self.table
    }

    fn hash(&self, name: &str) -> u64 {
        self.config.hash_seed.hash_one(name)
    }
}
