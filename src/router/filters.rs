//! The filters that clients subscribe to, and what the broker has been asked and has said of each.

pub(super) mod filter;
pub(super) mod linger;
pub(super) mod links;
pub(super) mod local;
pub(super) mod roots;
pub(super) mod suback;
pub(super) mod subscribe;
pub(super) mod table;
