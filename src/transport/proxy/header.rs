//! The header of the PROXY protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`).

use std::net::SocketAddr;

use proxy_header::{ParseConfig, Protocol, ProxyHeader};

/// The most bytes of a version 2 header. Addresses take at most 216; the others are TLVs, and a client's
/// certificate is the largest of them.
const HEADER_MAX_BYTES: usize = 4096;
/// The most bytes of a version 1 header (section 2.1).
const LINE_MAX_BYTES: usize = 107;
/// The first bytes of a version 2 header (section 2.2).
pub(in crate::transport) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The first bytes of a version 1 header (section 2.1).
pub(in crate::transport) const LINE: &[u8] = b"PROXY ";

/// A fault at the front of a connection that must begin with a PROXY protocol header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// The peer may not state its client's address.
    #[error("the peer is in none of trusted_proxies, and proxy_protocol is \"required\"")]
    UntrustedPeer,
    /// The bytes are not a header.
    #[error("no PROXY protocol header, and proxy_protocol is \"required\"")]
    Missing,
    /// A version 1 header that is too long.
    #[error("PROXY line longer than 107 bytes")]
    LineTooLong,
    /// A version other than 1 and 2, or a command other than LOCAL and PROXY.
    #[error("PROXY protocol header of an unknown version or command")]
    UnknownVersion,
    /// A version 2 header that is too large.
    #[error("PROXY protocol header larger than 4 KiB")]
    TooLarge,
    /// The addresses or TLVs cannot be read.
    #[error("malformed PROXY protocol header")]
    Malformed,
    /// The header is of UDP, and the connection is TCP.
    #[error("PROXY protocol header of a datagram on a stream")]
    Datagram,
}

/// How much of a header there is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// All bytes so far belong to the header, which has at least this many.
    More(usize),
    /// The header is complete.
    Done {
        /// The header's bytes.
        length: usize,
        /// The client, where the header names one; a health check names none.
        client: Option<SocketAddr>,
    },
}

/// Looks for a header at the front of `input`. An error is found at the first byte that cannot belong
/// to a header.
pub(super) fn parse(input: &[u8]) -> Result<Step, ProxyError> {
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
        return Err(ProxyError::Missing);
    }
    let line = &input[..input.len().min(LINE_MAX_BYTES)];
    match line.windows(2).position(|two| two == b"\r\n") {
        Some(end) => address(&input[..end + 2]),
        None if line.len() == LINE_MAX_BYTES => Err(ProxyError::LineTooLong),
        None => Ok(Step::More(LINE_MAX_BYTES)),
    }
}

fn binary(input: &[u8]) -> Result<Step, ProxyError> {
    let Some(command) = input.get(SIGNATURE.len()) else {
        return Ok(Step::More(16));
    };
    if !matches!(command, 0x20 | 0x21) {
        return Err(ProxyError::UnknownVersion);
    }
    let Some([high, low]) = input.get(14..16) else {
        return Ok(Step::More(16));
    };
    let length = 16 + usize::from(u16::from_be_bytes([*high, *low]));
    if length > HEADER_MAX_BYTES {
        return Err(ProxyError::TooLarge);
    }
    if input.len() < length {
        return Ok(Step::More(length));
    }
    // LOCAL: the addresses must be ignored (section 2.2).
    if *command == 0x20 {
        return Ok(Step::Done {
            length,
            client: None,
        });
    }
    address(&input[..length])
}

/// The address in a complete header.
fn address(header: &[u8]) -> Result<Step, ProxyError> {
    let Ok((parsed, length)) = ProxyHeader::parse(header, ParseConfig::default()) else {
        return Err(ProxyError::Malformed);
    };
    if length != header.len() {
        return Err(ProxyError::Malformed);
    }
    let client = match parsed.proxied_address() {
        Some(of) if of.protocol == Protocol::Datagram => {
            return Err(ProxyError::Datagram);
        }
        other => other.map(|of| of.source),
    };
    Ok(Step::Done { length, client })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;
    use proxy_header::{ProxiedAddress, Tlv};

    use super::*;

    /// A version 2 header with the given body.
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

    /// Parses every prefix of a header, the header, and the header with more bytes behind it.
    fn parse_all(header: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
        for n in 0..header.len() {
            match parse(&header[..n])? {
                Step::More(wanted) => {
                    assert!(wanted > n && wanted <= HEADER_MAX_BYTES, "{n} of it");
                }
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
    fn good_headers_are_read() {
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
            // The addresses of a LOCAL header are ignored.
            (v2(0x20, 0x11, V4), None),
            (v2(0x20, 0x11, b"x"), None),
            (v2(0x20, 0xff, b"x"), None),
        ] {
            assert_eq!(parse_all(&header), Ok(client), "{header:02x?}");
        }
    }

    #[test]
    fn bad_headers_are_refused() {
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
            let why = parse(&header).expect_err("refused").to_string();
            assert!(why.contains(part), "{why} for {header:.40x?}");
        }
    }

    proptest! {
        #[test]
        fn headers_of_another_implementation_are_read(
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
            prop_assert_eq!(parse_all(&bytes), Ok(Some(source)));
        }

        #[test]
        fn more_bytes_never_change_a_verdict(
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
            // More bytes never change a verdict.
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
}
