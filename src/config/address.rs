//! Paths and addresses with a meaning of their own.

use std::net::{IpAddr, SocketAddr};

/// The request path of WebSocket and WebTransport where none is written.
pub(super) const WS_PATH: &str = "/mqtt";
/// The path of health checks on WebSocket listeners, beside the listener's own paths.
pub(crate) const HEALTH_PATH: &str = "/healthz";

/// Whether only this machine can reach an address.
pub(crate) fn is_loopback(addr: &SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    }
}
