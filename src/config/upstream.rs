//! How the core's addresses and links are written.

use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer};

use crate::config::builtin::{PUBLISH_LINKS_AUTO, WS_PATH};
use crate::config::choices::Quirk;
use crate::config::types::{PublishLinks, Server};
use crate::config::units::{Read, Written};

/// For `deserialize_with`: the list of servers.
pub(super) fn server_list<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Server>, D::Error> {
    Vec::<Server>::deserialize(d)
}

/// For `deserialize_with`: `"auto"` or a number.
pub(super) fn publish_links<'de, D: Deserializer<'de>>(d: D) -> Result<PublishLinks, D::Error> {
    struct Links;
    impl Written for Links {
        type Value = PublishLinks;
        const WHAT: &'static str = "\"auto\" or a number from 1 to 8";
        fn text(text: &str) -> Result<PublishLinks, String> {
            match text {
                "auto" => Ok(PUBLISH_LINKS_AUTO),
                _ => Err(format!("{text:?} is not {}", Self::WHAT)),
            }
        }
        fn number(number: i64) -> Result<PublishLinks, String> {
            match number {
                1..=8 => Ok(PublishLinks {
                    first: number as u8,
                    max: number as u8,
                }),
                _ => Err(format!("{number} is not {}", Self::WHAT)),
            }
        }
    }
    d.deserialize_any(Read::<Links>(PhantomData))
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
        if let Some(quirks) = text.strip_prefix("embedded:") {
            let words = quirks.split(',').filter(|_| !quirks.is_empty());
            let quirks: Result<Vec<Quirk>, String> = words.map(Quirk::text).collect();
            return quirks
                .map(Self::Embedded)
                .map_err(|e| format!("{text:?}: a quirk of the embedded broker: {e}"));
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
        assert_eq!(Server::text("embedded:"), Ok(Server::Embedded(Vec::new())));
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
            "embedded:one,no-rap",
            "ws://core:80/mqtt",
            "wss://[::1]:443/a/b",
        ];
        for text in texts {
            assert_eq!(Server::text(text).unwrap().to_string(), text);
        }
    }
}
