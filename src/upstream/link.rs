//! The links as machines without I/O: one for each role, driven by the same task.

pub(crate) mod data;
pub(crate) mod machine;
pub(crate) mod publish;
pub(in crate::upstream) mod redelivery;
pub(crate) mod retained;
