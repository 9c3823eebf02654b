//! The client's address, as proxies tell it: whom to believe, and the PROXY
//! protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`).

use std::io;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_header::{ParseConfig, Protocol, ProxyHeader};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::forwarded;
use super::limits::HandshakeError;
use crate::config::{ProxyProtocol, RealIpHeader};

/// The most bytes of a version 2 header: addresses take 216 at most, the rest
/// are TLVs, a client's certificate the largest of them.
const HEADER_MAX: usize = 4096;
/// The most bytes of a version 1 header (section 2.1).
const LINE_MAX: usize = 107;
/// What version 2 begins with (section 2.2).
pub(super) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// What version 1 begins with (section 2.1).
pub(super) const LINE: &[u8] = b"PROXY ";

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

/// How far a header is.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// All bytes so far belong to it, and it has so many at least.
    More(usize),
    /// It is whole.
    Done {
        /// Its bytes.
        length: usize,
        /// The client; `None`: it says nothing of one, as in a health check.
        client: Option<SocketAddr>,
    },
}

/// Looks for a header at the front of `input`. What cannot become one is told
/// with the first byte that says so.
fn parse(input: &[u8]) -> Result<Step, &'static str> {
    let begins = |with: &[u8]| {
        let n = input.len().min(with.len());
        input[..n] == with[..n]
    };
    if input.is_empty() {
        return Ok(Step::More(1));
    }
    if begins(&SIGNATURE) {
        return binary(input);
    }
    if !begins(LINE) {
        return Err("no PROXY protocol header, and proxy_protocol is \"required\"");
    }
    let line = &input[..input.len().min(LINE_MAX)];
    match line.windows(2).position(|two| two == b"\r\n") {
        Some(end) => address(&input[..end + 2]),
        None if line.len() == LINE_MAX => Err("PROXY line longer than 107 bytes"),
        None => Ok(Step::More(LINE_MAX)),
    }
}

fn binary(input: &[u8]) -> Result<Step, &'static str> {
    let Some(command) = input.get(SIGNATURE.len()) else {
        return Ok(Step::More(16));
    };
    if !matches!(command, 0x20 | 0x21) {
        return Err("PROXY protocol header of an unknown version or command");
    }
    let Some([high, low]) = input.get(14..16) else {
        return Ok(Step::More(16));
    };
    let length = 16 + usize::from(u16::from_be_bytes([*high, *low]));
    if length > HEADER_MAX {
        return Err("PROXY protocol header larger than 4 KiB");
    }
    if input.len() < length {
        return Ok(Step::More(length));
    }
    // LOCAL: the rest is to be ignored whatever it says (section 2.2).
    if *command == 0x20 {
        return Ok(Step::Done {
            length,
            client: None,
        });
    }
    address(&input[..length])
}

/// The address in a header that is whole.
fn address(header: &[u8]) -> Result<Step, &'static str> {
    let Ok((parsed, length)) = ProxyHeader::parse(header, ParseConfig::default()) else {
        return Err("malformed PROXY protocol header");
    };
    if length != header.len() {
        return Err("malformed PROXY protocol header");
    }
    let client = match parsed.proxied_address() {
        Some(of) if of.protocol == Protocol::Datagram => {
            return Err("PROXY protocol header of a datagram on a stream");
        }
        other => other.map(|of| of.source),
    };
    Ok(Step::Done { length, client })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proxy_header::{ProxiedAddress, Tlv};

    use super::*;

    /// Version 2 with a body of one's own.
    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut header = SIGNATURE.to_vec();
        header.extend([command, family]);
        header.extend((body.len() as u16).to_be_bytes());
        header.extend(body);
        header
    }

    const V4: &[u8] = &[192, 0, 2, 7, 10, 0, 0, 1, 0x12, 0x34, 0, 80];

    fn v6() -> Vec<u8> {
        let mut body = vec![0; 36];
        body[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
        body[15] = 1;
        body[32..34].copy_from_slice(&[0x12, 0x34]);
        body
    }

    fn with_tlvs(mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
        body.extend([0xee, (bytes >> 8) as u8, bytes as u8]);
        body.resize(body.len() + bytes, 7);
        body
    }

    /// At every place where it may be cut, whole, and with more behind it.
    fn whole(header: &[u8]) -> Result<Option<SocketAddr>, &'static str> {
        for n in 0..header.len() {
            match parse(&header[..n])? {
                Step::More(wanted) => assert!(wanted > n && wanted <= HEADER_MAX, "{n} of it"),
                done => panic!("{done:?} after {n} bytes of {}", header.len()),
            }
        }
        let mut more = header.to_vec();
        more.extend(b"\x16\x03\x01PROXY \r\n");
        for input in [header, &more] {
            match parse(input)? {
                Step::Done { length, client } if length == header.len() => {
                    if input.len() > length {
                        return Ok(client);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        unreachable!()
    }

    #[test]
    fn headers_that_are_good() {
        let four = Some("192.0.2.7:4660".parse().expect("an address"));
        let six = Some("[2001:db8::1]:4660".parse().expect("an address"));
        let unix = [1; 216];
        for (header, client) in [
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4660 80\r\n".to_vec(), four),
            (b"PROXY TCP6 2001:db8::1 ::1 4660 80\r\n".to_vec(), six),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(), None),
            (v2(0x21, 0x11, V4), four),
            (v2(0x21, 0x21, &v6()), six),
            (v2(0x21, 0x11, &with_tlvs(V4.to_vec(), 4096 - 31)), four),
            (v2(0x21, 0x21, &with_tlvs(v6(), 100)), six),
            (v2(0x21, 0x00, b""), None),
            (v2(0x21, 0x00, b"whatever"), None),
            (v2(0x21, 0x31, &unix), None),
            (v2(0x20, 0x00, b""), None),
            // What a LOCAL header says of addresses is not looked at.
            (v2(0x20, 0x11, V4), None),
            (v2(0x20, 0x11, b"x"), None),
            (v2(0x20, 0xff, b"x"), None),
        ] {
            assert_eq!(whole(&header), Ok(client), "{header:02x?}");
        }
    }

    #[test]
    fn headers_that_are_not() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        for (header, part) in [
            (b"GET / HTTP/1.1\r\n".to_vec(), "no PROXY"),
            (b"\x10".to_vec(), "no PROXY"),
            (b"PROXX".to_vec(), "no PROXY"),
            (b"\r\n\r\nx".to_vec(), "no PROXY"),
            (long.into_bytes(), "longer than 107"),
            (
                b"PROXY TCP4 192.0.2.7 10.0.0.1 4660\r\n".to_vec(),
                "malformed",
            ),
            (b"PROXY TCP4 ::1 ::1 1 1\r\n".to_vec(), "malformed"),
            (
                b"PROXY TCP4 1.2.3.4 1.2.3.4 1 70000\r\n".to_vec(),
                "malformed",
            ),
            (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n".to_vec(), "malformed"),
            (b"PROXY \r\n".to_vec(), "malformed"),
            (v2(0x11, 0x11, V4), "unknown version"),
            (v2(0x22, 0x11, V4), "unknown version"),
            (v2(0x21, 0x41, V4), "malformed"),
            (v2(0x21, 0x11, &V4[..11]), "malformed"),
            (v2(0x21, 0x31, &[0; 215]), "malformed"),
            (v2(0x21, 0x12, V4), "datagram"),
            (v2(0x21, 0x11, &with_tlvs(V4.to_vec(), 4096 - 30)), "larger"),
            (v2(0x20, 0x00, &[0; 60_000]), "larger"),
        ] {
            let why = parse(&header).expect_err("refused");
            assert!(why.contains(part), "{why} for {header:.40x?}");
        }
    }

    proptest! {
        #[test]
        fn what_its_crate_writes_is_read(
            a in any::<[u8; 16]>(), four in any::<bool>(), port in any::<u16>(), line in any::<bool>(),
            id in prop::collection::vec(any::<u8>(), 0..128),
        ) {
            let ip: IpAddr = match four {
                true => IpAddr::from([a[0], a[1], a[2], a[3]]),
                false => IpAddr::from(a),
            };
            let source = SocketAddr::new(ip, port);
            let mut header = ProxyHeader::with_address(ProxiedAddress::stream(source, source));
            let mut bytes = Vec::new();
            if line {
                header.encode_v1(&mut bytes).expect("it fits");
            } else {
                header.append_tlv(Tlv::UniqueId(id.as_slice().into()));
                header.encode_v2(&mut bytes).expect("it fits");
            }
            prop_assert_eq!(whole(&bytes), Ok(Some(source)));
        }

        #[test]
        fn any_bytes_are_survived(
            good in prop_oneof![
                Just(b"PROXY TCP4 192.0.2.7 10.0.0.1 4660 80\r\n".to_vec()),
                Just(v2(0x21, 0x11, &with_tlvs(V4.to_vec(), 5))),
                Just(Vec::new()),
            ],
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            tail in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut input = good;
            input.extend(tail);
            for (at, byte) in changes {
                if !input.is_empty() {
                    let at = at.index(input.len());
                    input[at] = byte;
                }
            }
            // Whatever it is, more bytes change no verdict.
            let last = parse(&input);
            for n in 0..input.len() {
                match parse(&input[..n]) {
                    Ok(Step::More(wanted)) => prop_assert!(wanted > n),
                    verdict => {
                        prop_assert_eq!(&verdict, &last);
                        break;
                    }
                }
            }
        }
    }

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
