//! The records that a process needs again after a restart: the numbers of filters, and the messages
//! that the broker may send a second time. The router and the links decide what follows from them.
//! [`log`] keeps records of any kind on a disk.
//!
//! Each kind of record has one owner, which changes it through `&mut self`, so no lock is needed here.
//! No operation fails: if a record cannot be written, work goes on from memory and the failure is
//! reported by other means, because a full disk must not cost a client its SUBSCRIBE.

mod identifiers;
pub mod log;
pub mod records;
mod redelivery;

use std::fmt::Debug;

use crate::hashing::{HashSeed, LookUpHasher};

pub use identifiers::Identifiers;
pub use redelivery::{Received, Ring};

/// Where records are kept.
pub trait Store: Debug + Send + Sync {
    /// The numbers of filters, with those of earlier processes. The router takes them once, at its start.
    fn identifiers(&self) -> Box<dyn Identifiers>;

    /// The messages received on data link `link`, with those of earlier processes. The link takes them
    /// once, at its start.
    fn ring(&self, link: usize) -> Box<dyn Ring>;
}

/// Keeps records in memory: each owner begins without any.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory;

/// Keeps records in memory, with digests that another process of the node would make as well.
#[derive(Clone, Copy, Debug)]
pub struct OfNode {
    /// The key of the digests.
    pub digests: HashSeed,
}

impl Store for OfNode {
    fn identifiers(&self) -> Box<dyn Identifiers> {
        Memory.identifiers()
    }

    fn ring(&self, _link: usize) -> Box<dyn Ring> {
        Box::new(redelivery::InMemory::with_hasher(self.digests))
    }
}

impl Store for Memory {
    fn identifiers(&self) -> Box<dyn Identifiers> {
        Box::<identifiers::InMemory>::default()
    }

    fn ring(&self, _link: usize) -> Box<dyn Ring> {
        Box::<redelivery::InMemory<LookUpHasher>>::default()
    }
}
