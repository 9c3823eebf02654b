//! The configuration: one TOML file, strictly read into plain typed values.
//!
//! What is wrong with a file is said with file, line, key and remedy; nothing
//! is accepted and ignored. Sizes are bytes, times are [`Duration`]s, paths are
//! resolved against the file.
//!
//! [`Duration`]: std::time::Duration

mod builtin;
mod check;
mod document;
mod error;
mod file;
mod machine;
mod types;
mod units;
mod upstream;

pub(crate) use check::is_loopback;
pub use error::{Error, Problem};
pub use types::{
    Ack, AclAllow, AclMode, AclRule, Admin, Auth, AuthMode, CertSource, ClientIdRule, Config,
    Drain, Durability, Limits, Listener, Log, LogFormat, Memory, Node, Probe, Protocol, QueueFull,
    Server, Session, Store, SubscribeWhileAway, Tls, Transport, Upstream, UpstreamTls,
};

#[cfg(test)]
mod tests;
