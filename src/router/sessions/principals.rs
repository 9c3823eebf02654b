//! The principals' use of the queues: the one that uses most is evicted first.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use slab::Slab;

use crate::hashing::LookUp;

/// A shard reports a principal's use when it has changed by this much, so that the common table is not
/// touched for each message.
const STEP_BYTES: i64 = 64 * 1024;

/// The number of a principal, while it has sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PrincipalId(u32);

/// How much a principal uses: each level is twice the one below it. Principals of one level count as
/// equals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Level(u8);

impl Level {
    /// The bits of a level.
    pub(super) const BITS: u32 = 6;
    /// A level that no principal exceeds.
    pub(super) const MAX: Self = Self((1 << Self::BITS) - 1);

    /// The number of the level: 0 is the lowest one.
    pub(super) fn number(self) -> u8 {
        self.0
    }

    /// The level so many below this one.
    pub(super) fn below(self, levels: u8) -> Self {
        Self(self.0.saturating_sub(levels))
    }

    fn of_steps(steps: i64) -> Self {
        // At most 63.
        Self((i64::BITS - steps.max(0).leading_zeros()) as u8)
    }

    /// The level of a principal that uses `bytes`.
    pub(super) fn of(bytes: u64) -> Self {
        Self::of_steps((bytes / STEP_BYTES as u64) as i64)
    }
}

/// One principal's use of a shard.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) id: PrincipalId,
    /// Its level, as the shard knows it.
    pub(super) level: Level,
    /// Its sessions in the shard.
    pub(super) sessions: u32,
    bytes: i64,
    reported: i64,
}

impl Share {
    /// The principal uses `bytes` more, or fewer if below 0. Returns the steps to report.
    pub(super) fn change(&mut self, bytes: i64) -> Option<i64> {
        self.bytes += bytes;
        let change = self.bytes - self.reported * STEP_BYTES;
        if change.abs() < STEP_BYTES {
            return None;
        }
        let steps = self.bytes / STEP_BYTES;
        Some(steps - std::mem::replace(&mut self.reported, steps))
    }

    /// The steps that were reported, below 0, for a share that ends.
    pub(super) fn end(&self) -> i64 {
        -self.reported
    }
}

/// A principal whose level has changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) id: PrincipalId,
    pub(super) level: Level,
    /// The shards with its sessions, which are bits.
    pub(super) shards: u64,
}

/// All principals with sessions.
#[derive(Debug, Default)]
pub(super) struct Principals(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    ids: LookUp<Arc<str>, u32>,
    all: Slab<Principal>,
    /// By use; the numbers are those in `all`.
    order: BTreeSet<(Level, u32)>,
    moved: Vec<u32>,
}

#[derive(Debug)]
struct Principal {
    name: Arc<str>,
    steps: i64,
    level: Level,
    shards: u64,
    /// It is in the list of principals whose level has changed.
    moved: bool,
}

impl Principals {
    /// A principal has its first session in a shard.
    pub(super) fn join(&self, name: &Arc<str>, shard: u16) -> Share {
        let mut table = self.0.lock();
        let table = &mut *table;
        let at = match table.ids.get(name) {
            Some(at) => *at,
            None => {
                let at = table.all.insert(Principal {
                    name: name.clone(),
                    steps: 0,
                    level: Level::default(),
                    shards: 0,
                    moved: false,
                }) as u32;
                table.ids.insert(name.clone(), at);
                table.order.insert((Level::default(), at));
                at
            }
        };
        let principal = &mut table.all[at as usize];
        principal.shards |= 1 << shard;
        Share {
            id: PrincipalId(at),
            level: principal.level,
            sessions: 0,
            bytes: 0,
            reported: 0,
        }
    }

    /// A principal has no session in a shard any more, and its use there is reported to be 0.
    pub(super) fn leave(&self, id: PrincipalId, shard: u16) {
        let mut table = self.0.lock();
        let table = &mut *table;
        let Some(principal) = table.all.get_mut(id.0 as usize) else {
            return;
        };
        principal.shards &= !(1 << shard);
        if principal.shards == 0 {
            let gone = table.all.remove(id.0 as usize);
            table.ids.remove(&gone.name);
            table.order.remove(&(gone.level, id.0));
        }
    }

    /// A principal uses so many steps more, or fewer if below 0.
    pub(super) fn report(&self, id: PrincipalId, steps: i64) {
        let mut table = self.0.lock();
        let table = &mut *table;
        let Some(principal) = table.all.get_mut(id.0 as usize) else {
            return;
        };
        principal.steps += steps;
        let level = Level::of_steps(principal.steps);
        if level == principal.level {
            return;
        }
        table.order.remove(&(principal.level, id.0));
        table.order.insert((level, id.0));
        principal.level = level;
        if !std::mem::replace(&mut principal.moved, true) {
            table.moved.push(id.0);
        }
    }

    /// Takes out the principals whose level has changed. The shards are to be told.
    pub(super) fn take_moved(&self) -> Vec<Moved> {
        let mut table = self.0.lock();
        let moved = std::mem::take(&mut table.moved);
        let mut tell = |at: u32| {
            // Another one may have the number of one that has left.
            let principal = table.all.get_mut(at as usize)?;
            std::mem::take(&mut principal.moved).then_some(Moved {
                id: PrincipalId(at),
                level: principal.level,
                shards: principal.shards,
            })
        };
        moved.into_iter().filter_map(&mut tell).collect()
    }

    /// The bytes of a principal's queues.
    pub(super) fn bytes(&self, id: PrincipalId) -> u64 {
        let table = self.0.lock();
        let steps = table.all.get(id.0 as usize).map_or(0, |p| p.steps);
        (steps.max(0) * STEP_BYTES) as u64
    }

    /// The principal that uses most, or the next one after `last`.
    pub(super) fn heaviest(&self, last: Option<Moved>) -> Option<Moved> {
        let table = self.0.lock();
        let found = match last {
            None => table.order.last(),
            Some(last) => table.order.range(..(last.level, last.id.0)).next_back(),
        };
        found.map(|(level, at)| Moved {
            id: PrincipalId(*at),
            level: *level,
            shards: table.all[*at as usize].shards,
        })
    }
}
