//! The sessions: where each one is kept, and how connections come to them and leave them.

pub(super) mod budget;
pub(super) mod connect;
pub(super) mod handover;
pub(super) mod members;
pub(super) mod presence;
pub(super) mod shard;
pub(super) mod view;
