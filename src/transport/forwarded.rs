//! The headers `X-Forwarded-For` and `Forwarded` (RFC 7239), in which each proxy states the address from
//! which it got a request. A line gives one hop for each proxy, the nearest last; `None` is a hop without
//! an address.

use std::net::{IpAddr, SocketAddr};

/// The hops of `X-Forwarded-For` lines.
pub(super) fn x_forwarded_for<'a>(
    lines: impl Iterator<Item = &'a [u8]>,
) -> Vec<Option<SocketAddr>> {
    let mut hops = Vec::new();
    for line in lines {
        for item in line.split(|byte| *byte == b',') {
            let item = item.trim_ascii();
            // Empty elements do not count (RFC 9110 section 5.6.1.2).
            if !item.is_empty() {
                hops.push(std::str::from_utf8(item).ok().and_then(node));
            }
        }
    }
    hops
}

/// The hops of `Forwarded` lines. There are none at all if a line is malformed, because a client may have
/// begun a quoted string that swallows the element of its proxy.
pub(super) fn forwarded<'a>(lines: impl Iterator<Item = &'a [u8]>) -> Vec<Option<SocketAddr>> {
    let mut hops = Vec::new();
    for line in lines {
        let Some(mut of_line) = std::str::from_utf8(line).ok().and_then(elements) else {
            return Vec::new();
        };
        hops.append(&mut of_line);
    }
    hops
}

/// The elements of one `Forwarded` line (RFC 7239 section 4).
fn elements(line: &str) -> Option<Vec<Option<SocketAddr>>> {
    let (mut hops, mut rest) = (Vec::new(), line);
    // The element that is being read: whether it has pairs, and the address of its `for`.
    let (mut pairs, mut whose) = (false, None);
    loop {
        rest = rest.trim_start_matches([' ', '\t']);
        if !rest.starts_with([',', ';']) && !rest.is_empty() {
            let (name, value, behind) = pair(rest)?;
            pairs = true;
            if name.eq_ignore_ascii_case("for") {
                whose = node(&value);
            }
            rest = behind.trim_start_matches([' ', '\t']);
        }
        let end = rest.chars().next();
        if end != Some(';') && std::mem::take(&mut pairs) {
            hops.push(whose.take());
        }
        match end {
            None => return Some(hops),
            Some(',' | ';') => rest = &rest[1..],
            Some(_) => return None,
        }
    }
}

/// A name, its value without quotes, and the text after them.
fn pair(text: &str) -> Option<(&str, String, &str)> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let name = &text[..text.find(|c| !is_token(c)).unwrap_or(text.len())];
    let value = text[name.len()..].strip_prefix('=')?;
    if name.is_empty() {
        return None;
    }
    let Some(quoted) = value.strip_prefix('"') else {
        // Colons and brackets need quotes, but not every proxy writes them.
        let end = value.find(|c| !is_token(c) && !":[]".contains(c));
        let (value, rest) = value.split_at(end.unwrap_or(value.len()));
        return (!value.is_empty()).then(|| (name, value.to_owned(), rest));
    };
    let (mut value, mut chars) = (String::new(), quoted.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((name, value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

/// An address with or without a port; without one, the port is 0. `unknown` and obfuscated names (RFC
/// 7239 section 6) are not addresses.
fn node(text: &str) -> Option<SocketAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, 0));
    }
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let (ip, port) = match text.strip_prefix('[') {
        Some(inside) => {
            let (ip, port) = inside.split_once(']')?;
            (IpAddr::V6(ip.parse().ok()?), port)
        }
        None => {
            let at = text.find(':')?;
            (IpAddr::V4(text[..at].parse().ok()?), &text[at..])
        }
    };
    // A port may be obfuscated as well.
    (port.is_empty() || port.starts_with(":_")).then(|| SocketAddr::new(ip, 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(hops: Vec<Option<SocketAddr>>) -> Vec<String> {
        let name = |hop: Option<SocketAddr>| hop.map_or("-".to_owned(), |a| a.to_string());
        hops.into_iter().map(name).collect()
    }

    #[test]
    fn x_forwarded_for_is_read_as_proxies_write_it() {
        for (line, hops) in [
            ("192.0.2.1", &["192.0.2.1:0"][..]),
            (
                "192.0.2.1:99 ,\t2001:db8::1",
                &["192.0.2.1:99", "[2001:db8::1]:0"],
            ),
            (
                "[2001:db8::1], [2001:db8::1]:5",
                &["[2001:db8::1]:0", "[2001:db8::1]:5"],
            ),
            (", ,192.0.2.1,", &["192.0.2.1:0"]),
            ("unknown, 192.0.2", &["-", "-"]),
            ("fe80::1%eth0, 1.2.3.4:", &["-", "-"]),
            ("", &[]),
        ] {
            assert_eq!(
                text(x_forwarded_for([line.as_bytes()].into_iter())),
                hops,
                "{line}"
            );
        }
        assert_eq!(text(x_forwarded_for([&b"\xff"[..]].into_iter())), ["-"]);
    }

    #[test]
    fn forwarded_is_read_by_rfc_7239() {
        for (line, hops) in [
            ("for=\"_gazonk\"", &["-"][..]),
            (
                "For=\"[2001:db8:cafe::17]:4711\"",
                &["[2001:db8:cafe::17]:4711"],
            ),
            (
                "for=192.0.2.60;proto=http;by=203.0.113.43",
                &["192.0.2.60:0"],
            ),
            (
                "for=192.0.2.43, for=198.51.100.17",
                &["192.0.2.43:0", "198.51.100.17:0"],
            ),
            (
                "for=192.0.2.43,for=\"[2001:db8:cafe::17]\",for=unknown",
                &["192.0.2.43:0", "[2001:db8:cafe::17]:0", "-"],
            ),
            (
                "proto=https;by=10.0.0.1 , host=\"a,b;c\";for=\"192.0.2.1:_x\"",
                &["-", "192.0.2.1:0"],
            ),
            ("for=\"192.0.2\\.1\"", &["192.0.2.1:0"]),
            ("for=192.0.2.1:80", &["192.0.2.1:80"]),
            (", ;for=192.0.2.1;,", &["192.0.2.1:0"]),
            ("", &[]),
            // The proxy quotes a Host that its client chose.
            (
                "for=192.0.2.60;host=\"x,for=198.51.100.1\"",
                &["192.0.2.60:0"],
            ),
            // A malformed line has no hops.
            ("for=\", for=192.0.2.1", &[]),
            ("for=\"x, for=\"[2001:db8::1]\"", &[]),
            ("for, for=192.0.2.1", &[]),
            ("=x;for=192.0.2.1", &[]),
            ("for=192.0.2.1 x", &[]),
            ("for=;by=x", &[]),
            ("for=\"a\\", &[]),
        ] {
            assert_eq!(
                text(forwarded([line.as_bytes()].into_iter())),
                hops,
                "{line}"
            );
        }
        let lines = [&b"for=192.0.2.1"[..], b"for=\"", b"for=192.0.2.2"];
        assert_eq!(text(forwarded(lines.into_iter())), [""; 0]);
    }

    proptest! {
        #[test]
        fn any_line_can_be_read(line in prop::collection::vec(
            prop_oneof![prop::sample::select(b"for=\"\\,;:[]. _1a\t".to_vec()), any::<u8>()], 0..60,
        )) {
            forwarded([line.as_slice()].into_iter());
            x_forwarded_for([line.as_slice()].into_iter());
        }

        #[test]
        fn a_client_does_not_change_the_hop_of_its_proxy(
            sent in prop::collection::vec(
                prop::sample::select(b"for=\"\\,;:[]. _1a\t".to_vec()), 0..40,
            ),
            a in any::<[u8; 16]>(),
        ) {
            // The last hop is the one that the proxy wrote, or there is none.
            let ip = IpAddr::from(a);
            let hop = Some(SocketAddr::new(ip, 0));
            let added = format!("for=\"[{ip}]\"");
            let before = [&*sent, b", ", added.as_bytes()].concat();
            let last = forwarded([before.as_slice()].into_iter()).pop();
            prop_assert!(last.is_none_or(|last| last == hop), "{last:?}");
            let quoted = String::from_utf8_lossy(&sent).replace('\\', "\\\\").replace('"', "\\\"");
            let quoted = format!("{added};host=\"{quoted}\"");
            let last = forwarded([quoted.as_bytes()].into_iter()).pop();
            prop_assert_eq!(last, Some(hop));
        }
    }
}
