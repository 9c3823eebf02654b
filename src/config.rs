//! The configuration: one TOML file, strictly read into plain typed values.
//!
//! A mistake in a file is reported with file, line, key and remedy, and no key is ignored. Sizes are
//! bytes, times are [`Duration`]s, and paths are resolved against the file's directory.
//!
//! [`Duration`]: std::time::Duration

mod address;
mod builtin;
mod check;
mod choices;
mod document;
mod error;
mod file;
pub(crate) mod files;
mod host;
pub(crate) mod origin;
mod types;
mod units;
mod upstream;

pub(crate) use address::{HEALTH_PATH, is_loopback};
#[cfg(feature = "sim")]
pub use choices::Quirk;
pub use choices::{
    Ack, AclMode, AuthMode, CertificateIdentity, ClientAuth, ClientIdRule, Durability, LogFormat,
    Probe, Protocol, ProxyProtocol, RealIpHeader, ResponseTopicRule, SenderProperty, SharedAt,
    SubscribeWhileAway, Transport,
};
pub use error::{Error, Problem};
pub use types::{
    AclAllow, AclRule, Admin, Auth, CertSource, ClientCertificates, Config, Drain, Limits,
    Listener, Log, Memory, Node, Session, Setting, Store, Tls, Upstream, UpstreamTls,
};
pub use upstream::{LinkCount, Server};

#[cfg(test)]
mod tests;
