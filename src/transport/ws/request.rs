//! Judging the request on a WebSocket port: path, method, version, Origin and subprotocol (RFC 6455
//! section 4.2.1, RFC 9110, RFC 9112).

use httparse::{EMPTY_HEADER, Error as ParseError, Status};
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request as HttpRequest, Uri, Version, header,
};

use crate::config::{HEALTH_PATH, Listener, origin};
use crate::transport::detect::{Detected, detect};
use crate::transport::error::RequestError;

/// The most header lines of a request.
const LINES_MAX: usize = 100;
/// The most characters of a client's text in a log line.
const LOGGED_CHARS_MAX: usize = 100;
/// The subprotocols, the preferred first. `mqtt` is [MQTT-6.0.0-3]; MQTT 3.1 clients offer the other.
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// The answer to an acceptable request.
pub(super) enum Verdict {
    /// Upgrade with this answer.
    Upgrade(Vec<u8>),
    /// The listener is healthy.
    Healthy,
}

impl RequestError {
    /// The error for bytes that cannot be read as HTTP.
    pub(super) fn malformed(detected: Option<Detected>) -> Self {
        Self::Malformed(detected.filter(|what| *what != Detected::Http))
    }
}

/// The complete head of a request.
#[derive(Debug)]
pub(super) struct Head {
    method: Method,
    uri: Uri,
    version: Version,
    pub(super) headers: HeaderMap,
}

impl Head {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, RequestError> {
        let detected = detect(bytes);
        let malformed = || RequestError::malformed(detected);
        // A PROXY line would be read as a request of an odd version.
        if detected == Some(Detected::Proxy) {
            return Err(malformed());
        }
        let mut lines = [EMPTY_HEADER; LINES_MAX];
        let mut parsed = httparse::Request::new(&mut lines);
        match parsed.parse(bytes) {
            // A bare LF could end the request early and hide lines that a proxy added.
            Ok(Status::Complete(n)) if n == bytes.len() => {}
            Ok(_) => return Err(malformed()),
            Err(ParseError::TooManyHeaders) => return Err(RequestError::TooManyLines),
            Err(ParseError::Version) => {
                let http2 = detected.filter(|what| *what == Detected::Http2);
                return Err(RequestError::Version(http2));
            }
            Err(_) => return Err(malformed()),
        }
        let bad = || RequestError::Malformed(None);
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

    /// Whether the answer must have no body.
    pub(super) fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }

    pub(super) fn judge(&self, listener: &Listener) -> Result<Verdict, RequestError> {
        if self.uri.path() == HEALTH_PATH {
            return match self.method {
                Method::GET | Method::HEAD => Ok(Verdict::Healthy),
                _ => Err(RequestError::HealthMethod),
            };
        }
        self.upgrade(listener).map(Verdict::Upgrade)
    }

    fn upgrade(&self, listener: &Listener) -> Result<Vec<u8>, RequestError> {
        let path = self.uri.path();
        if !listener.paths.iter().any(|served| served == path) {
            return Err(RequestError::Path(shown(path)));
        }
        if self.method != Method::GET {
            return Err(RequestError::UpgradeMethod);
        }
        if self.version < Version::HTTP_11 {
            return Err(RequestError::Http10);
        }
        if self.headers.get_all(header::HOST).iter().count() != 1 {
            return Err(RequestError::Host);
        }
        if !self.lists(header::UPGRADE, "websocket") || !self.lists(header::CONNECTION, "upgrade") {
            return Err(RequestError::NotWebSocket);
        }
        if self.one(header::SEC_WEBSOCKET_VERSION) != Some("13") {
            return Err(RequestError::WebSocketVersion);
        }
        let key = self
            .headers
            .get(header::SEC_WEBSOCKET_KEY)
            .filter(|_| self.one(header::SEC_WEBSOCKET_KEY).is_some());
        let mut answer = key.and_then(accept).ok_or(RequestError::WebSocketKey)?;
        if let Some(origin) = foreign_origin(&self.headers, &listener.origins) {
            return Err(RequestError::Origin(origin));
        }
        let subprotocol = SUBPROTOCOLS
            .into_iter()
            .find(|name| self.offers(header::SEC_WEBSOCKET_PROTOCOL, |offer| offer == *name))
            .ok_or(RequestError::Subprotocol)?;
        // In place of the empty line. Extensions are never accepted.
        answer.truncate(answer.len() - 2);
        answer.extend_from_slice(b"sec-websocket-protocol: ");
        answer.extend_from_slice(subprotocol.as_bytes());
        answer.extend_from_slice(b"\r\n\r\n");
        Ok(answer)
    }

    /// The value of a header, if the request has it once.
    fn one(&self, name: HeaderName) -> Option<&str> {
        let mut values = self.headers.get_all(name).iter();
        let one = values.next()?.to_str().ok()?;
        values.next().is_none().then(|| one.trim())
    }

    /// Whether a list, which may span several lines, has such an element.
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

/// The browser's origin, for the log, if `origins` does not list it. A client that is not a browser
/// sends none.
pub(in crate::transport) fn foreign_origin(
    headers: &HeaderMap,
    origins: &[String],
) -> Option<String> {
    if origins.is_empty() {
        return None;
    }
    let given = headers.get_all(header::ORIGIN).into_iter();
    given
        .map(|origin| String::from_utf8_lossy(origin.as_bytes()))
        .find(|origin| !origin::lists(origins, origin))
        .map(|origin| shown(&origin))
}

/// The answer to a WebSocket key. Tungstenite computes it only from a whole request of this form.
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

/// A client's text for a log line: escaped and cut.
pub(in crate::transport) fn shown(text: &str) -> String {
    let escaped = text.chars().flat_map(char::escape_debug);
    escaped.take(LOGGED_CHARS_MAX).collect()
}
