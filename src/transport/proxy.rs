//! The client's address, as proxies tell it: whom to believe, and the header of
//! the PROXY protocol at the front of a connection.

mod header;

use std::io;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::config::{ProxyProtocol, RealIpHeader};
use crate::transport::forwarded;
use crate::transport::limits::HandshakeError;

pub(super) use header::{LINE, SIGNATURE};
use header::{Step, parse};

/// Which proxies stand before a listener, and how they tell of their clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    /// The networks that they are in.
    pub trusted: Vec<IpNet>,
    /// Whether connections begin with a PROXY protocol header.
    pub protocol: ProxyProtocol,
    /// The header of a WebSocket request that names the client.
    pub header: RealIpHeader,
}

impl Default for Proxies {
    /// No proxies.
    fn default() -> Self {
        Self {
            trusted: Vec::new(),
            protocol: ProxyProtocol::Off,
            header: RealIpHeader::XForwardedFor,
        }
    }
}

impl Proxies {
    /// Whether `ip` is a proxy's.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(&ip))
    }

    /// The client behind `peer`, by the lines of the header that was chosen:
    /// the nearest address that is no proxy's. What cannot be read ends the
    /// search, since what is before it may be the client's invention.
    pub(super) fn client<'a>(
        &self,
        peer: SocketAddr,
        lines: impl Iterator<Item = &'a [u8]>,
    ) -> SocketAddr {
        if !self.trusts(peer.ip()) {
            return peer;
        }
        let hops = match self.header {
            RealIpHeader::XForwardedFor => forwarded::x_forwarded_for(lines),
            RealIpHeader::Forwarded => forwarded::forwarded(lines),
            RealIpHeader::None => Vec::new(),
        };
        let mut client = peer;
        for hop in hops.into_iter().rev() {
            match hop {
                Some(address) if self.trusts(client.ip()) => client = canonical(address),
                _ => break,
            }
        }
        client
    }

    /// Reads the PROXY protocol header that a connection begins with, if one is
    /// required, and no byte behind it; `peer` becomes the client.
    pub(super) async fn read(
        &self,
        io: &mut TcpStream,
        peer: &mut SocketAddr,
    ) -> Result<(), HandshakeError> {
        if self.protocol == ProxyProtocol::Off {
            return Ok(());
        }
        if !self.trusts(peer.ip()) {
            return Err(HandshakeError::Proxy(
                "the peer is in none of trusted_proxies, and proxy_protocol is \"required\"",
            ));
        }
        let (mut header, mut have) = (vec![0; 256], 0);
        loop {
            // Looked at first: what is behind the header is not ours to take.
            let failed = match have {
                0 => HandshakeError::before_all,
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
                    // A health check of the proxy itself comes from the proxy.
                    *peer = client.map_or(*peer, canonical);
                    return Ok(());
                }
                Step::More(wanted) if header.len() < wanted => header.resize(wanted, 0),
                Step::More(_) => {}
            }
        }
    }
}

/// An IPv4 client of a dual-stack socket by its IPv4 address.
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

    fn behind(trusted: &[&str], header: RealIpHeader) -> Proxies {
        Proxies {
            trusted: trusted
                .iter()
                .map(|n| n.parse().expect("a network"))
                .collect(),
            protocol: ProxyProtocol::Off,
            header,
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
    fn the_nearest_that_is_no_proxy_is_the_client() {
        let proxies = behind(
            &["10.0.0.0/8", "2001:db8:1::/48"],
            RealIpHeader::XForwardedFor,
        );
        for (peer, lines, client) in [
            // Not a proxy: not believed.
            ("192.0.2.1:7", &["198.51.100.1"][..], "192.0.2.1:7"),
            ("10.0.0.1:7", &[], "10.0.0.1:7"),
            ("10.0.0.1:7", &["198.51.100.1"], "198.51.100.1:0"),
            // What the client itself sent is further left.
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
            // Behind what cannot be read nothing is believed.
            ("10.0.0.1:7", &["198.51.100.1, unknown"], "10.0.0.1:7"),
            ("10.0.0.1:7", &["198.51.100.1, x, 10.3.3.3"], "10.3.3.3:0"),
        ] {
            let peer = peer.parse().expect("an address");
            let found = proxies.client(peer, lines.iter().map(|l| l.as_bytes()));
            assert_eq!(found.to_string(), client, "{lines:?}");
        }
        let one = || [&b"198.51.100.1"[..]].into_iter();
        let peer = "10.0.0.1:7".parse().expect("an address");
        let none = behind(&["10.0.0.0/8"], RealIpHeader::None);
        assert_eq!(none.client(peer, one()), peer);
        assert_eq!(Proxies::default().client(peer, one()), peer);
    }
}
