//! TLS: certificates and keys from files, and the configurations of servers (TCP, WebSocket, QUIC) and
//! of links to a broker.
//!
//! A [`Material`] holds the files of one `[[tls]]`. A listener's [`ServerTls`] is made of one or several
//! materials, and can be given new ones while it serves.

pub(super) mod accept;
pub(super) mod client;
pub(super) mod clients;
mod early;
pub(super) mod error;
mod key_log;
mod material;
mod pem;
mod provider;
mod resolver;
pub(super) mod server;
mod x509;

pub use client::ClientTls;
pub use clients::ClientCertificate;
pub use error::TlsError;
pub use material::Material;
pub(super) use server::{ALPN_H3, ALPN_HTTP, ALPN_MQTT};
pub use server::{Configs, ServerTls};
pub use x509::{NameError, Validity};

#[cfg(test)]
mod tests;
