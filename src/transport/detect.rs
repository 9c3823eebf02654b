//! Detecting the protocol of unexpected bytes, so that the log can name it.

use std::fmt;

use crate::transport::proxy::header::{LINE, SIGNATURE};

/// The protocol of a connection's first bytes. `Display` names it for a log line, with the setting
/// that would accept it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// A PROXY protocol header.
    Proxy,
    /// A TLS record.
    Tls,
    /// The preface of HTTP/2 (RFC 9113 section 3.4).
    Http2,
    /// A request of HTTP/1.
    Http,
    /// An MQTT CONNECT.
    Mqtt,
}

impl fmt::Display for Detected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Proxy => {
                "a PROXY protocol header, which this listener takes with \
                 proxy_protocol = \"required\""
            }
            Self::Tls => "TLS, which transports tls and wss speak",
            Self::Http2 => "HTTP/2 without TLS",
            Self::Http => "plain HTTP, which transport ws speaks, and wss inside TLS",
            Self::Mqtt => "MQTT alone, which transport tcp speaks, and tls inside TLS",
        })
    }
}

/// Detects the protocol of a connection's first bytes; `None` where it is unknown.
pub fn detect(bytes: &[u8]) -> Option<Detected> {
    const METHODS: [&[u8]; 7] = [
        b"GET ",
        b"HEAD ",
        b"POST ",
        b"PUT ",
        b"DELETE ",
        b"OPTIONS ",
        b"CONNECT ",
    ];
    let begins = |with: &[u8]| bytes.starts_with(with);
    // The protocol name follows the Remaining Length of one to four bytes and its own length of two.
    let named = || {
        let names = (4..=7).filter_map(|at| bytes.get(at..));
        names
            .into_iter()
            .any(|b| b.starts_with(b"MQTT") || b.starts_with(b"MQIs"))
    };
    if begins(LINE) || begins(&SIGNATURE) {
        Some(Detected::Proxy)
    } else if begins(b"\x16\x03") {
        Some(Detected::Tls)
    } else if begins(b"PRI * HTTP/2.0") {
        Some(Detected::Http2)
    } else if METHODS.into_iter().any(begins) {
        Some(Detected::Http)
    } else {
        (bytes.first() == Some(&0x10) && named()).then_some(Detected::Mqtt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_are_detected() {
        for (bytes, detected) in [
            (&b"PROXY TCP4 1.2.3.4"[..], Detected::Proxy),
            (b"\r\n\r\n\0\r\nQUIT\n\x21", Detected::Proxy),
            (b"\x16\x03\x01\x02\x00\x01", Detected::Tls),
            (b"PRI * HTTP/2.0\r\n\r\nSM", Detected::Http2),
            (b"GET /mqtt HTTP/1.1\r\n", Detected::Http),
            (b"\x10\x0c\0\x04MQTT\x04", Detected::Mqtt),
            (b"\x10\x80\x01\0\x06MQIsdp", Detected::Mqtt),
        ] {
            assert_eq!(detect(bytes), Some(detected), "{bytes:02x?}");
        }
        for bytes in [
            &b""[..],
            b"\x10",
            b"\xc0\0",
            b"GETX",
            b"\x17\x03\x03",
            b"\r\n",
        ] {
            assert_eq!(detect(bytes), None, "{bytes:02x?}");
        }
    }
}
