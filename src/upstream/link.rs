//! The links as machines without I/O: one for each role, driven by the same task.

mod acks;
pub(crate) mod common;
pub(crate) mod data;
pub(crate) mod end;
mod exactly_once;
mod lag;
pub(crate) mod machine;
mod origin;
pub(crate) mod publish;
mod redelivery;
pub(crate) mod retained;
