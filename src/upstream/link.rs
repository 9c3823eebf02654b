//! The links as machines without I/O: one for each role, driven by the same task.

pub(crate) mod common;
pub(crate) mod data;
pub(crate) mod end;
mod exactly_once;
mod lag;
pub(crate) mod machine;
pub(crate) mod publish;
mod redelivery;
pub(crate) mod retained;
