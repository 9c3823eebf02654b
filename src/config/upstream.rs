//! How the broker's addresses and the numbers of links are written.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer};

use crate::config::address::WS_PATH;
#[cfg(feature = "sim")]
use crate::config::choices::Quirk;
use crate::config::units::{Read, Written};

/// How many links there are of one role. `AUTO` is the number from the start that `"auto"` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkCount<const AUTO: u8> {
    /// Links from the start.
    pub first: u8,
    /// Most links, opened one by one as they are needed.
    pub max: u8,
}

/// Most links of one role.
const LINKS_MAX: u8 = 8;

impl<const AUTO: u8> LinkCount<AUTO> {
    /// The meaning of `"auto"`.
    pub(super) const AUTO: Self = Self {
        first: AUTO,
        max: LINKS_MAX,
    };
}

impl<'de, const AUTO: u8> Deserialize<'de> for LinkCount<AUTO> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Read::<Self>(PhantomData))
    }
}

impl<const AUTO: u8> Written for LinkCount<AUTO> {
    type Value = Self;
    const WHAT: &'static str = "\"auto\" or a number from 1 to 8";

    fn text(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::AUTO),
            _ => Err(format!("{text:?} is not {}", Self::WHAT)),
        }
    }

    fn number(number: i64) -> Result<Self, String> {
        match u8::try_from(number) {
            Ok(count @ 1..=LINKS_MAX) => Ok(Self {
                first: count,
                max: count,
            }),
            _ => Err(format!("{number} is not {}", Self::WHAT)),
        }
    }
}

/// One address of the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// `embedded:`, the in-process broker.
    Embedded {
        /// Limits and faults of real brokers to imitate, in tests: `embedded:no-ids,dup0`.
        #[cfg(feature = "sim")]
        quirks: Vec<Quirk>,
    },
    /// `mqtt://`, `mqtts://`, `ws://` or `wss://`.
    Remote {
        /// Whether TLS is spoken.
        tls: bool,
        /// Host name or address (IPv6 without brackets).
        host: String,
        /// TCP port.
        port: u16,
        /// The WebSocket's path; `None`: no WebSocket.
        path: Option<String>,
    },
}

impl Server {
    /// The embedded broker without quirks.
    pub fn embedded() -> Self {
        Self::Embedded {
            #[cfg(feature = "sim")]
            quirks: Vec::new(),
        }
    }

    #[cfg(feature = "sim")]
    fn embedded_with(words: &str) -> Result<Self, String> {
        let quirks: Result<Vec<Quirk>, String> = words.split(',').map(Quirk::text).collect();
        quirks
            .map(|quirks| Self::Embedded { quirks })
            .map_err(|e| format!("\"embedded:{words}\": {e}"))
    }

    #[cfg(not(feature = "sim"))]
    fn embedded_with(words: &str) -> Result<Self, String> {
        Err(format!(
            "\"embedded:{words}\": only builds with the feature \"sim\" can give the embedded \
             broker faults; write \"embedded:\""
        ))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "sim")]
            Self::Embedded { quirks } => {
                let names: Vec<&str> = quirks.iter().map(|q| q.name()).collect();
                write!(f, "embedded:{}", names.join(","))
            }
            #[cfg(not(feature = "sim"))]
            Self::Embedded {} => f.write_str("embedded:"),
            Self::Remote {
                tls,
                host,
                port,
                path,
            } => {
                let scheme = match (path, tls) {
                    (None, false) => "mqtt",
                    (None, true) => "mqtts",
                    (Some(_), false) => "ws",
                    (Some(_), true) => "wss",
                };
                let path = path.as_deref().unwrap_or("");
                if host.contains(':') {
                    write!(f, "{scheme}://[{host}]:{port}{path}")
                } else {
                    write!(f, "{scheme}://{host}:{port}{path}")
                }
            }
        }
    }
}

impl<'de> Deserialize<'de> for Server {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Read::<Self>(PhantomData))
    }
}

impl std::str::FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::text(text)
    }
}

impl Written for Server {
    type Value = Self;
    const WHAT: &'static str = "\"mqtt://host:port\", \"mqtts://host:port\", \"ws://host:port/path\", \"wss://host:port/path\" or \"embedded:\"";

    fn text(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not {}", Self::WHAT);
        match text.strip_prefix("embedded:") {
            Some("") => return Ok(Self::embedded()),
            Some(words) => return Self::embedded_with(words),
            None => {}
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let (tls, websocket, usual) = match scheme {
            "mqtt" => (false, false, 1883),
            "mqtts" => (true, false, 8883),
            "ws" => (false, true, 80),
            "wss" => (true, true, 443),
            _ => return Err(wrong()),
        };
        if rest.contains('@') {
            return Err(format!(
                "{scheme}:// takes no credentials; use upstream.username and upstream.password_file"
            ));
        }
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let path = match (websocket, path) {
            (false, "" | "/") => None,
            (false, _) => return Err(wrong()),
            (true, "") => Some(WS_PATH.to_owned()),
            (true, path) if path.bytes().all(|b| b.is_ascii_graphic() && b != b'#') => {
                Some(path.to_owned())
            }
            (true, _) => return Err(wrong()),
        };
        let (host, port) = split_port(authority, usual).ok_or_else(wrong)?;
        Ok(Self::Remote {
            tls,
            host: host.to_owned(),
            port,
            path,
        })
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn split_port(authority: &str, default: u16) -> Option<(&str, u16)> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        host.parse::<std::net::Ipv6Addr>().ok()?;
        (
            host,
            if rest.is_empty() {
                None
            } else {
                Some(rest.strip_prefix(':')?)
            },
        )
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let legal = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '%');
    if host.is_empty() || !host.chars().all(legal) {
        return None;
    }
    match port {
        None => Some((host, default)),
        Some(port) => match port.parse() {
            Ok(0) | Err(_) => None,
            Ok(port) => Some((host, port)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let remote = |tls, host: &str, port| {
            let host = host.to_owned();
            Ok(Server::Remote {
                tls,
                host,
                port,
                path: None,
            })
        };
        assert_eq!(
            Server::text("mqtt://127.0.0.1:1883"),
            remote(false, "127.0.0.1", 1883)
        );
        assert_eq!(
            Server::text("mqtts://core.example"),
            remote(true, "core.example", 8883)
        );
        assert_eq!(Server::text("mqtts://[::1]:7/"), remote(true, "::1", 7));
        assert_eq!(Server::text("mqtt://[::1]"), remote(false, "::1", 1883));
        assert_eq!(Server::text("embedded:"), Ok(Server::embedded()));
        for wrong in [
            "core:1883",
            "http://core",
            "mqtt://",
            "mqtt://:1883",
            "mqtt://a:b",
            "mqtt://a:0",
            "mqtt://a:70000",
            "mqtt://a/b",
            "mqtt://[::1",
            "mqtt://[x]:1",
            "mqtt://a b",
            "ws://a/b c",
            "wss://a/#b",
            "embedded",
            "embedded:manny",
            "embedded:many,",
        ] {
            assert!(Server::text(wrong).is_err(), "{wrong}");
        }
        let paths = [
            ("ws://a", 80, "/mqtt"),
            ("wss://a:8084", 8084, "/mqtt"),
            ("wss://a/x?y=1", 443, "/x?y=1"),
            ("ws://a:1/", 1, "/"),
        ];
        for (text, wanted_port, wanted_path) in paths {
            let Ok(Server::Remote { port, path, .. }) = Server::text(text) else {
                panic!("{text}");
            };
            assert_eq!((port, path.as_deref()), (wanted_port, Some(wanted_path)));
        }
        assert!(
            Server::text("mqtt://u:p@a")
                .unwrap_err()
                .contains("password_file")
        );
    }

    #[test]
    fn an_address_reads_as_it_is_written() {
        let texts = [
            "mqtt://core:1883",
            "mqtts://[::1]:8883",
            "embedded:",
            #[cfg(feature = "sim")]
            "embedded:one,no-rap",
            "ws://core:80/mqtt",
            "wss://[::1]:443/a/b",
        ];
        for text in texts {
            assert_eq!(Server::text(text).unwrap().to_string(), text);
        }
    }
}
