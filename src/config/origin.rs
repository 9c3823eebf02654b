//! The origins of web pages, as browsers write them (RFC 6454 section 6.2).

/// The origin of pages without one, such as local files and sandboxed frames.
const OPAQUE: &str = "null";
/// Stands for one label at the beginning of a host.
const WILDCARD: &str = "*.";

/// The normal form of an origin: lower case, without the scheme's default port.
fn normal(origin: &str) -> String {
    let origin = origin.to_ascii_lowercase();
    let default = match origin.split_once("://") {
        Some(("http" | "ws", _)) => ":80",
        Some(("https" | "wss", _)) => ":443",
        _ => return origin,
    };
    match origin.strip_suffix(default) {
        Some(rest) => rest.to_owned(),
        None => origin,
    }
}

/// A listed origin in its normal form: `null`, or scheme, host and port; the host may begin with `*.`
/// for one label.
///
/// # Errors
/// Why no browser sends such an origin.
pub(super) fn parse(written: &str) -> Result<String, &'static str> {
    const HOW: &str = "write it as \"https://app.example.com\"";
    if written.eq_ignore_ascii_case(OPAQUE) {
        return Ok(OPAQUE.to_owned());
    }
    let Some((scheme, authority)) = written.split_once("://") else {
        return Err(HOW);
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    if scheme.is_empty() || !scheme.chars().all(legal) || authority.is_empty() {
        return Err(HOW);
    }
    if authority.contains(['/', '?', '#', '@', ' ']) {
        return Err("an origin ends with the host or the port: write no path");
    }
    if !authority.is_ascii() {
        return Err("browsers send such a host in ASCII: write it as \"xn--...\"");
    }
    let host = authority.strip_prefix(WILDCARD).unwrap_or(authority);
    if host.is_empty() || host.contains('*') {
        return Err("a * stands for one label: write it as \"https://*.example.com\"");
    }
    let port = match host.rsplit_once(':') {
        // The colons of an IPv6 address are in brackets.
        Some((_, port)) if !port.ends_with(']') => port,
        _ => "1",
    };
    if port.parse::<u16>().is_err() {
        return Err("its port is not a number up to 65535");
    }
    Ok(normal(written))
}

/// Whether a list of parsed origins has the origin that a browser sent.
pub(crate) fn lists(listed: &[String], origin: &str) -> bool {
    let origin = normal(origin);
    listed.iter().any(|listed| fits(listed, &origin))
}

fn fits(listed: &str, origin: &str) -> bool {
    let wild = listed.split_once("://*.");
    let Some((scheme, domain)) = wild else {
        return listed == origin;
    };
    let host = origin
        .strip_prefix(scheme)
        .and_then(|rest| rest.strip_prefix("://"));
    let label = host
        .and_then(|host| host.strip_suffix(domain))
        .and_then(|rest| rest.strip_suffix('.'));
    label.is_some_and(|label| !label.is_empty() && !label.contains(['.', ':', '/', '@']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_origins_that_a_browser_sends_can_be_listed() {
        for (written, expected) in [
            ("null", "null"),
            ("https://App.Example.com", "https://app.example.com"),
            ("https://x:443", "https://x"),
            ("http://x:80", "http://x"),
            ("http://x:443", "http://x:443"),
            ("https://x:8443", "https://x:8443"),
            ("https://*.example.com:443", "https://*.example.com"),
            ("http://[::1]:80", "http://[::1]"),
            ("http://[::1]", "http://[::1]"),
            ("capacitor://localhost", "capacitor://localhost"),
        ] {
            assert_eq!(parse(written).as_deref(), Ok(expected), "{written}");
        }
        for written in [
            "",
            "*",
            "app.example.com",
            "https://",
            "https://x/",
            "https://x/app",
            "https://*",
            "https://*.",
            "https://a.*.example.com",
            "https://a*.example.com",
            "https://*.*.example.com",
            "https://x:port",
            "https://x:70000",
            "https://bücher.example",
        ] {
            assert!(parse(written).is_err(), "{written}");
        }
    }

    #[test]
    fn an_origin_is_looked_up_in_its_normal_form() {
        let parsed = |all: &[&str]| -> Vec<String> {
            all.iter().map(|o| parse(o).expect("an origin")).collect()
        };
        let listed = parsed(&[
            "null",
            "https://x:443",
            "https://*.example.com",
            "http://y:8080",
        ]);
        for (origin, expected) in [
            ("null", true),
            ("https://x", true),
            ("https://x:443", true),
            ("HTTPS://X", true),
            ("https://x:8443", false),
            ("http://x", false),
            ("https://a.example.com", true),
            ("https://A.example.com:443", true),
            ("https://a.b.example.com", false),
            ("https://example.com", false),
            ("https://.example.com", false),
            ("https://a.example.com:8443", false),
            ("https://evil.com/.example.com", false),
            ("https://aexample.com", false),
            ("http://a.example.com", false),
            ("http://y:8080", true),
            ("http://y", false),
        ] {
            assert_eq!(lists(&listed, origin), expected, "{origin}");
        }
    }
}
