//! The client's address behind proxies: which peers are believed, and the header of the PROXY
//! protocol at the front of a connection.

pub(super) mod header;

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::config::{Listener, ProxyProtocol, RealIpHeader};
use crate::transport::error::HandshakeError;
use crate::transport::forwarded;

pub use header::ProxyError;
use header::{Step, parse};

/// The size of the buffer for a PROXY header at first; it grows to the length that the header states.
const HEADER_BUFFER_BYTES: usize = 256;

/// Whether `ip` is a proxy's.
pub(super) fn trusts(listener: &Listener, ip: IpAddr) -> bool {
    let mut trusted = listener.trusted_proxies.iter();
    trusted.any(|network| network.contains(&ip))
}

/// The client behind `peer` by the lines of the listener's `real_ip_header`: the nearest address that
/// is not a proxy's. An element that does not name an address ends the search, since the client may
/// have written everything before it.
pub(super) fn client<'a>(
    listener: &Listener,
    peer: SocketAddr,
    lines: impl Iterator<Item = &'a [u8]>,
) -> SocketAddr {
    if !trusts(listener, peer.ip()) {
        return peer;
    }
    let hops = match listener.real_ip_header {
        RealIpHeader::XForwardedFor => forwarded::x_forwarded_for(lines),
        RealIpHeader::Forwarded => forwarded::forwarded(lines),
        RealIpHeader::None => Vec::new(),
    };
    let mut client = peer;
    for hop in hops.into_iter().rev() {
        match hop {
            Some(address) if trusts(listener, client.ip()) => client = canonical(address),
            _ => break,
        }
    }
    client
}

/// Reads the PROXY protocol header with which a connection begins, if the listener requires one, and
/// no byte behind it. `peer` becomes the client's address.
pub(super) async fn read_header(
    listener: &Listener,
    io: &mut TcpStream,
    peer: &mut SocketAddr,
) -> Result<(), HandshakeError> {
    if listener.proxy_protocol == ProxyProtocol::Off {
        return Ok(());
    }
    if !trusts(listener, peer.ip()) {
        return Err(HandshakeError::Proxy(ProxyError::UntrustedPeer));
    }
    let (mut header, mut have) = (vec![0; HEADER_BUFFER_BYTES], 0);
    loop {
        // Peeked at first: the bytes behind the header belong to the next layer.
        let failed = match have {
            0 => HandshakeError::before_first_byte,
            _ => HandshakeError::Io,
        };
        let seen = io.peek(&mut header[have..]).await.map_err(failed)?;
        if seen == 0 {
            return Err(match have {
                0 => HandshakeError::Silent,
                _ => HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()),
            });
        }
        let step = parse(&header[..have + seen]).map_err(HandshakeError::Proxy)?;
        let take = match &step {
            Step::Done { length, .. } => length - have,
            Step::More(_) => seen,
        };
        io.read_exact(&mut header[have..have + take])
            .await
            .map_err(HandshakeError::Io)?;
        have += take;
        match step {
            Step::Done { client, .. } => {
                // A health check of the proxy itself names no client.
                *peer = client.map_or(*peer, canonical);
                return Ok(());
            }
            Step::More(wanted) if header.len() < wanted => header.resize(wanted, 0),
            Step::More(_) => {}
        }
    }
}

/// The IPv4 address of an IPv4 peer of a dual-stack socket.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, addr.port()),
        // Unchanged, with its scope.
        IpAddr::V6(_) => addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Transport;

    fn behind(trusted: &[&str], header: RealIpHeader) -> Listener {
        let networks = trusted.iter().map(|n| n.parse().expect("a network"));
        Listener {
            trusted_proxies: networks.collect(),
            real_ip_header: header,
            ..Listener::new(Transport::Ws, ([127, 0, 0, 1], 0).into())
        }
    }

    #[test]
    fn mapped_addresses_are_shown_as_ipv4() {
        for (addr, shown) in [
            ("[::ffff:192.0.2.7]:80", "192.0.2.7:80"),
            ("192.0.2.7:80", "192.0.2.7:80"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ] {
            let addr: SocketAddr = addr.parse().expect("an address");
            assert_eq!(canonical(addr).to_string(), shown);
        }
    }

    #[test]
    fn the_nearest_address_that_is_not_a_proxy_is_the_client() {
        let trusted = ["10.0.0.0/8", "2001:db8:1::/48"];
        let listener = behind(&trusted, RealIpHeader::XForwardedFor);
        for (peer, lines, expected) in [
            // Not a proxy: not believed.
            ("192.0.2.1:7", &["198.51.100.1"][..], "192.0.2.1:7"),
            ("10.0.0.1:7", &[], "10.0.0.1:7"),
            ("10.0.0.1:7", &["198.51.100.1"], "198.51.100.1:0"),
            // The elements that the client wrote are further left.
            (
                "10.0.0.1:7",
                &["203.0.113.9, 198.51.100.1"],
                "198.51.100.1:0",
            ),
            (
                "10.0.0.1:7",
                &["203.0.113.9", "198.51.100.1"],
                "198.51.100.1:0",
            ),
            // A chain of proxies.
            (
                "10.0.0.1:7",
                &["198.51.100.1, 10.9.9.9, 2001:db8:1::5"],
                "198.51.100.1:0",
            ),
            ("10.0.0.1:7", &["10.1.1.1, 10.2.2.2"], "10.1.1.1:0"),
            (
                "[2001:db8:1::1]:7",
                &["[2001:db8:2::1]:99"],
                "[2001:db8:2::1]:99",
            ),
            ("10.0.0.1:7", &["::ffff:198.51.100.1"], "198.51.100.1:0"),
            // Nothing is believed beyond an element that names no address.
            ("10.0.0.1:7", &["198.51.100.1, unknown"], "10.0.0.1:7"),
            ("10.0.0.1:7", &["198.51.100.1, x, 10.3.3.3"], "10.3.3.3:0"),
        ] {
            let peer = peer.parse().expect("an address");
            let found = client(&listener, peer, lines.iter().map(|l| l.as_bytes()));
            assert_eq!(found.to_string(), expected, "{lines:?}");
        }
        let one = || [&b"198.51.100.1"[..]].into_iter();
        let peer = "10.0.0.1:7".parse().expect("an address");
        let none = behind(&["10.0.0.0/8"], RealIpHeader::None);
        assert_eq!(client(&none, peer, one()), peer);
        let untrusted = behind(&[], RealIpHeader::XForwardedFor);
        assert_eq!(client(&untrusted, peer, one()), peer);
    }
}
