//! Messages from the broker to the sessions that they are for.

pub(super) mod fanout;
pub(super) mod shared;
