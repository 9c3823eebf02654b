//! What a process that keeps its state over a restart would have to find again: which number means
//! which filter, and what the core may send a second time. Records only; what follows from them is
//! the router's and the links' affair.
//!
//! Whoever works with records holds them alone and changes them by `&mut self`: no lock here.
//! No operation fails. What cannot be written must go on from memory, and be said by other means: a
//! client must not lose its SUBSCRIBE to a full disk.

mod identifiers;
mod redelivery;

use std::fmt::Debug;

pub use identifiers::Identifiers;
pub use redelivery::{Received, Ring};

/// Where records are kept.
pub trait Store: Debug + Send + Sync {
    /// The filters' numbers, with those of before; the router takes them once, at its start.
    fn identifiers(&self) -> Box<dyn Identifiers>;

    /// What was received on data link `link`, with what was before; the link takes it once, at its
    /// start.
    fn ring(&self, link: usize) -> Box<dyn Ring>;
}

/// Keeps records as long as their holder: each holder begins with none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory;

impl Store for Memory {
    fn identifiers(&self) -> Box<dyn Identifiers> {
        Box::<identifiers::InMemory>::default()
    }

    fn ring(&self, _link: usize) -> Box<dyn Ring> {
        Box::<redelivery::InMemory>::default()
    }
}
