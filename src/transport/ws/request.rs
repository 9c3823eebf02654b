//! What a request on a WebSocket port asks for, judged: path, method, version,
//! Origin and subprotocol (RFC 6455 section 4.2.1, RFC 9110, RFC 9112).

use std::borrow::Cow;

use httparse::{EMPTY_HEADER, Error as ParseError, Status};
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request as HttpRequest, Uri, Version, header,
};

use crate::config::HEALTH_PATH;
use crate::transport::{Detected, ListenSpec, detect};

/// The most header lines of a request.
const LINES_MAX: usize = 100;
/// The most characters of a client's text in a log line.
const SHOWN: usize = 100;
/// Subprotocols, the preferred first. `mqtt` is [MQTT-6.0.0-3]; the other is
/// what MQTT 3.1 clients offer.
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// What a request gets.
pub(super) enum Verdict {
    /// The answer that upgrades.
    Upgrade(Vec<u8>),
    /// All is well; the body is left out for HEAD.
    Healthy { body: bool },
    /// No.
    Refused(Refusal),
}

/// An error status, what the client is told and what the log says.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: u16,
    pub told: &'static str,
    pub logged: Cow<'static, str>,
    /// The methods that the path has, with 405.
    pub allow: &'static str,
    /// The answer has a body.
    pub body: bool,
    /// It offered no subprotocol of ours.
    pub subprotocol: bool,
}

impl Refusal {
    pub(super) fn new(status: u16, told: &'static str) -> Self {
        Self {
            status,
            told,
            logged: Cow::Borrowed(told),
            allow: "",
            body: true,
            subprotocol: false,
        }
    }

    fn logged(mut self, what: String) -> Self {
        self.logged = Cow::Owned(what);
        self
    }
}

/// A request's head, which is whole.
#[derive(Debug)]
pub(super) struct Head {
    method: Method,
    uri: Uri,
    version: Version,
    pub(super) headers: HeaderMap,
}

impl Head {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let guess = detect(bytes);
        // Read as a request it would have an odd version.
        if guess == Some(Detected::Proxy) {
            return Err(malformed(bytes));
        }
        let mut lines = [EMPTY_HEADER; LINES_MAX];
        let mut parsed = httparse::Request::new(&mut lines);
        match parsed.parse(bytes) {
            // Behind a bare LF nothing must be left that a proxy has added.
            Ok(Status::Complete(n)) if n == bytes.len() => {}
            Ok(_) => return Err(malformed(bytes)),
            Err(ParseError::TooManyHeaders) => {
                return Err(Refusal::new(431, "too many header lines"));
            }
            Err(ParseError::Version) => {
                let refusal = Refusal::new(505, "HTTP/1.1 is needed");
                return Err(match guess {
                    Some(Detected::Http2) => {
                        refusal.logged(format!("not HTTP/1.1 but {}", Detected::Http2))
                    }
                    _ => refusal,
                });
            }
            Err(_) => return Err(malformed(bytes)),
        }
        let bad = || Refusal::new(400, "malformed request");
        let mut headers = HeaderMap::with_capacity(parsed.headers.len());
        for line in parsed.headers.iter() {
            let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| bad())?;
            let value = HeaderValue::from_bytes(line.value).map_err(|_| bad())?;
            headers.append(name, value);
        }
        Ok(Self {
            method: parsed.method.and_then(|m| m.parse().ok()).ok_or_else(bad)?,
            uri: parsed.path.and_then(|p| p.parse().ok()).ok_or_else(bad)?,
            version: match parsed.version {
                Some(0) => Version::HTTP_10,
                _ => Version::HTTP_11,
            },
            headers,
        })
    }

    pub(super) fn judge(&self, spec: &ListenSpec) -> Verdict {
        let head = self.method == Method::HEAD;
        if self.uri.path() == HEALTH_PATH {
            return match self.method {
                Method::GET | Method::HEAD => Verdict::Healthy { body: !head },
                _ => Verdict::Refused(Refusal {
                    allow: "GET, HEAD",
                    ..Refusal::new(405, "only GET and HEAD are served here")
                }),
            };
        }
        match self.upgrade(spec) {
            Ok(answer) => Verdict::Upgrade(answer),
            Err(refusal) => Verdict::Refused(Refusal {
                body: !head,
                ..refusal
            }),
        }
    }

    fn upgrade(&self, spec: &ListenSpec) -> Result<Vec<u8>, Refusal> {
        let path = self.uri.path();
        if !spec.paths.iter().any(|served| served == path) {
            return Err(Refusal::new(404, "no such path")
                .logged(format!("path \"{}\" is not served", shown(path))));
        }
        if self.method != Method::GET {
            return Err(Refusal {
                allow: "GET",
                ..Refusal::new(405, "only GET is served here")
            });
        }
        if self.version < Version::HTTP_11 {
            return Err(Refusal::new(
                426,
                "HTTP/1.1 is needed (nginx: proxy_http_version 1.1)",
            ));
        }
        // RFC 9112 section 3.2.
        if self.headers.get_all(header::HOST).iter().count() != 1 {
            return Err(Refusal::new(400, "one Host header is needed"));
        }
        if !self.lists(header::UPGRADE, "websocket") || !self.lists(header::CONNECTION, "upgrade") {
            return Err(Refusal::new(
                426,
                "this path serves MQTT over WebSocket only; a proxy before it must pass on \
                 Upgrade and Connection",
            ));
        }
        if self.one(header::SEC_WEBSOCKET_VERSION) != Some("13") {
            return Err(Refusal::new(426, "Sec-WebSocket-Version must be 13"));
        }
        let key = self
            .headers
            .get(header::SEC_WEBSOCKET_KEY)
            .filter(|_| self.one(header::SEC_WEBSOCKET_KEY).is_some());
        let mut answer = key
            .and_then(accept)
            .ok_or_else(|| Refusal::new(400, "Sec-WebSocket-Key missing or malformed"))?;
        if let Some(origin) = stranger(&self.headers, &spec.origins) {
            return Err(Refusal::new(403, "Origin not allowed")
                .logged(format!("Origin \"{}\" is not in origins", shown(&origin))));
        }
        let Some(subprotocol) = SUBPROTOCOLS
            .into_iter()
            .find(|name| self.offers(header::SEC_WEBSOCKET_PROTOCOL, |offer| offer == *name))
        else {
            return Err(Refusal {
                subprotocol: true,
                ..Refusal::new(400, "Sec-WebSocket-Protocol must offer \"mqtt\"")
            });
        };
        // Instead of the empty line; extensions are never accepted.
        answer.truncate(answer.len() - 2);
        answer.extend_from_slice(b"sec-websocket-protocol: ");
        answer.extend_from_slice(subprotocol.as_bytes());
        answer.extend_from_slice(b"\r\n\r\n");
        Ok(answer)
    }

    /// The value of a header that comes once.
    fn one(&self, name: HeaderName) -> Option<&str> {
        let mut values = self.headers.get_all(name).iter();
        let one = values.next()?.to_str().ok()?;
        values.next().is_none().then(|| one.trim())
    }

    /// Whether a list, perhaps on several lines, has an element.
    fn offers(&self, name: HeaderName, is: impl Fn(&str) -> bool) -> bool {
        let lines = self.headers.get_all(name).into_iter();
        lines
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| line.split(','))
            .any(|element| is(element.trim()))
    }

    fn lists(&self, name: HeaderName, wanted: &str) -> bool {
        self.offers(name, |element| element.eq_ignore_ascii_case(wanted))
    }
}

/// An origin that a browser came from and is not allowed, if there is one; what is
/// no browser says nothing.
pub(in crate::transport) fn stranger(headers: &HeaderMap, origins: &[String]) -> Option<String> {
    if origins.is_empty() {
        return None;
    }
    let given = headers.get_all(header::ORIGIN).into_iter();
    given
        .map(|origin| String::from_utf8_lossy(origin.as_bytes()))
        .find(|origin| !origins.iter().any(|o| o.eq_ignore_ascii_case(origin)))
        .map(Cow::into_owned)
}

/// The answer to a key, by tungstenite, which wants the rest of the request in
/// the one form that it knows.
fn accept(key: &HeaderValue) -> Option<Vec<u8>> {
    let request: Request = HttpRequest::builder()
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, key)
        .body(())
        .ok()?;
    let mut answer = Vec::with_capacity(256);
    write_response(&mut answer, &create_response(&request).ok()?).ok()?;
    Some(answer)
}

/// For what cannot be read as HTTP.
pub(super) fn malformed(bytes: &[u8]) -> Refusal {
    let refusal = Refusal::new(400, "malformed request");
    match detect(bytes) {
        Some(Detected::Http) | None => refusal,
        Some(what) => refusal.logged(format!("no WebSocket request but {what}")),
    }
}

/// A client's text for a log line.
fn shown(text: &str) -> String {
    let escaped = text.chars().flat_map(char::escape_debug);
    escaped.take(SHOWN).collect()
}
