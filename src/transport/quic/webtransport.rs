//! WebTransport over HTTP/3 (draft-ietf-webtrans-http3) on a connection whose
//! ALPN is `h3`: SETTINGS, one request that is judged like a WebSocket's, and
//! then the session's streams are streams as those of ALPN `mqtt` are. There is
//! one session per connection, and HTTP is served no further than that.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt};
use tokio::time::timeout;
use web_transport_proto::http::{HeaderMap, StatusCode};
use web_transport_proto::{ConnectError, ConnectRequest, ConnectResponse, Settings, SettingsError};

use crate::transport::limits::HandshakeError;
use crate::transport::listen::Listener;
use crate::transport::quic::bidi::{Bidi, Layer, NO_ERROR};
use crate::transport::quic::capsules::{self, Capsules, Seen};
use crate::transport::quic::streams::{Quic, lost};
use crate::transport::quic::{CloseOnDrop, code, handshake_error};
use crate::transport::tcp::with_scratch;
use crate::transport::ws::stranger;
use crate::transport::{Closed, ListenSpec};

/// Unidirectional streams that a client may have: HTTP/3 control and QPACK's
/// two (RFC 9114 section 6.2). Only the first is read, as far as its SETTINGS.
pub(super) const UNI_STREAMS: u32 = 3;
/// Bytes of datagrams, with what the library adds to each, that may lie unread;
/// none are ever read. Browsers insist that they could be sent.
pub(super) const DATAGRAM_BYTES: usize = 2048;
/// The most bytes of SETTINGS and of a request; browsers send cookies along.
const SETTINGS_MAX: usize = 4 * 1024;
const REQUEST_MAX: usize = 16 * 1024;
/// What is read at once.
const CHUNK: usize = 4 * 1024;
/// How long a refused client is given to take its answer.
const LINGER: Duration = Duration::from_secs(1);
/// The subprotocol, as of WebSocket [MQTT-6.0.0-3].
const SUBPROTOCOL: &str = "mqtt";

/// Codes of HTTP/3 (RFC 9114 section 8.1).
mod h3 {
    pub(super) const FRAME_UNEXPECTED: u32 = 0x0105;
    pub(super) const SETTINGS_ERROR: u32 = 0x0109;
    pub(super) const MISSING_SETTINGS: u32 = 0x010a;
    pub(super) const REQUEST_INCOMPLETE: u32 = 0x010d;
}

/// What a session needs beside its streams.
pub(super) struct Session {
    send: Option<SendStream>,
    recv: RecvStream,
    capsules: Capsules,
    /// Found in the bytes behind the request.
    seen: Seen,
    /// HTTP/3 ends the connection when one of these is given up.
    _http: Http,
}

struct Http {
    _ours: SendStream,
    _theirs: RecvStream,
    _others: Vec<RecvStream>,
}

/// From the end of the TLS handshake to the session's first stream. The caller
/// has a deadline; nothing is kept for a client beyond what it has sent.
pub(super) async fn accept(
    connection: Connection,
    listener: &Listener,
) -> Result<Quic, HandshakeError> {
    let mut guard = CloseOnDrop {
        connection: &connection,
        code: VarInt::from_u32(h3::MISSING_SETTINGS),
        why: "no SETTINGS",
    };
    let http = settings(&connection).await?;
    (guard.code, guard.why) = (VarInt::from_u32(h3::REQUEST_INCOMPLETE), "no request");
    let (mut send, recv, request, rest) = request(&connection).await?;
    let answer = match judge(
        request.url.path(),
        &request.headers,
        &request.protocols,
        &listener.spec,
    ) {
        Ok(answer) => answer,
        Err(refusal) => return Err(refuse(&connection, send, refusal).await),
    };
    let mut bytes = Vec::new();
    // The answer is one of two, and both can be said.
    if answer.encode(&mut bytes).is_err() || send.write_all(&bytes).await.is_err() {
        return Err(HandshakeError::WebTransport("the answer cannot be sent"));
    }
    let layer = Layer::WebTransport {
        session: VarInt::from(send.id()).into_inner(),
    };
    let mut capsules = Capsules::default();
    let mut session = Session {
        send: Some(send),
        recv,
        seen: capsules.feed(&rest),
        capsules,
        _http: http,
    };
    (guard.code, guard.why) = (layer.code(code::CONTROL_GONE), "no control stream");
    let control = tokio::select! {
        biased;
        control = first(&connection, layer) => control?,
        closed = poll_fn(|cx| session.poll_over(cx, layer)) => {
            tracing::debug!(%closed, "WebTransport session without a stream");
            return Err(HandshakeError::WebTransport("session ended before its first stream"));
        }
    };
    std::mem::forget(guard);
    Ok(Quic::new(
        connection,
        layer,
        control,
        Some(Box::new(session)),
        listener,
    ))
}

/// Our SETTINGS out, the client's in.
async fn settings(connection: &Connection) -> Result<Http, HandshakeError> {
    let mut bytes = Vec::new();
    let mut settings = Settings::default();
    settings.enable_webtransport(1);
    settings.encode(&mut bytes);
    let mut ours = connection.open_uni().await.map_err(handshake_error)?;
    if ours.write_all(&bytes).await.is_err() {
        return Err(HandshakeError::WebTransport("SETTINGS cannot be sent"));
    }
    let mut others = Vec::new();
    loop {
        let mut theirs = connection.accept_uni().await.map_err(handshake_error)?;
        let mut bytes = Vec::new();
        loop {
            match Settings::decode(&mut &bytes[..]) {
                // What they are does not matter: a client that asks for a
                // session has what it needs for one.
                Ok(_) => {
                    return Ok(Http {
                        _ours: ours,
                        _theirs: theirs,
                        _others: others,
                    });
                }
                Err(SettingsError::UnexpectedEnd) if bytes.len() < SETTINGS_MAX => {
                    more(connection, &mut theirs, &mut bytes).await?;
                }
                // QPACK's, or one that we do not know. None is read.
                Err(SettingsError::UnexpectedStreamType(_)) => {
                    others.push(theirs);
                    break;
                }
                Err(_) => {
                    let why = "SETTINGS malformed or too large";
                    return Err(fail(connection, h3::SETTINGS_ERROR, why));
                }
            }
        }
    }
}

/// The request with its stream, and what came behind it.
async fn request(
    connection: &Connection,
) -> Result<(SendStream, RecvStream, ConnectRequest, Vec<u8>), HandshakeError> {
    let (send, mut recv) = connection.accept_bi().await.map_err(handshake_error)?;
    let mut bytes = Vec::new();
    loop {
        let mut rest = &bytes[..];
        match ConnectRequest::decode(&mut rest) {
            Ok(request) => {
                let rest = rest.to_vec();
                return Ok((send, recv, request, rest));
            }
            Err(ConnectError::UnexpectedEnd) if bytes.len() <= REQUEST_MAX => {
                more(connection, &mut recv, &mut bytes).await?;
            }
            Err(error) => {
                let Some(refusal) = explain(&error) else {
                    let why = "a frame that is no request";
                    return Err(fail(connection, h3::FRAME_UNEXPECTED, why));
                };
                // What else it may send is of no interest.
                let _ = recv.stop(NO_ERROR);
                return Err(refuse(connection, send, refusal).await);
            }
        }
    }
}

/// Appends what comes next.
async fn more(
    connection: &Connection,
    recv: &mut RecvStream,
    bytes: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    match recv.read_chunk(CHUNK, true).await {
        Ok(Some(chunk)) => {
            bytes.extend_from_slice(&chunk.bytes);
            Ok(())
        }
        Err(ReadError::ConnectionLost(error)) => Err(handshake_error(error)),
        _ => {
            let why = "a stream of HTTP/3 ended too early";
            Err(fail(connection, h3::REQUEST_INCOMPLETE, why))
        }
    }
}

/// A status for what is wrong with a request; none if it is none.
fn explain(error: &ConnectError) -> Option<(StatusCode, &'static str)> {
    use ConnectError as E;
    Some(match error {
        E::UnexpectedFrame(_) | E::FrameTooLarge => return None,
        E::FieldSectionTooLarge | E::UnexpectedEnd => (
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "request header too large",
        ),
        E::WrongMethod(_) => (
            StatusCode::NOT_FOUND,
            "not a WebTransport request: nothing else is served over HTTP/3",
        ),
        // RFC 9220 section 3.
        E::WrongProtocol(_) => (
            StatusCode::NOT_IMPLEMENTED,
            "CONNECT with a :protocol other than webtransport",
        ),
        _ => (StatusCode::BAD_REQUEST, "malformed request"),
    })
}

/// What to answer to a well-formed request.
fn judge(
    path: &str,
    headers: &HeaderMap,
    protocols: &[String],
    spec: &ListenSpec,
) -> Result<ConnectResponse, (StatusCode, &'static str)> {
    if !spec.paths.iter().any(|served| served == path) {
        return Err((StatusCode::NOT_FOUND, "wrong path"));
    }
    if stranger(headers, &spec.origins).is_some() {
        return Err((StatusCode::FORBIDDEN, "Origin not allowed"));
    }
    if protocols.is_empty() {
        return Ok(ConnectResponse::OK);
    }
    if !protocols.iter().any(|p| p == SUBPROTOCOL) {
        return Err((
            StatusCode::BAD_REQUEST,
            "WT-Available-Protocols must offer \"mqtt\"",
        ));
    }
    Ok(ConnectResponse::OK.with_protocol(SUBPROTOCOL))
}

/// Answers and closes, once the client has the answer.
async fn refuse(
    connection: &Connection,
    mut send: SendStream,
    (status, reason): (StatusCode, &'static str),
) -> HandshakeError {
    let mut bytes = Vec::new();
    let answer = ConnectResponse::new(status);
    if answer.encode(&mut bytes).is_ok() && send.write_all(&bytes).await.is_ok() {
        // Fails only if the client wants no answer.
        let _ = send.finish();
        let _ = timeout(LINGER, send.stopped()).await;
    }
    connection.close(NO_ERROR, b"");
    HandshakeError::Http {
        status: status.as_u16(),
        reason: reason.into(),
    }
}

fn fail(connection: &Connection, code: u32, why: &'static str) -> HandshakeError {
    connection.close(VarInt::from_u32(code), why.as_bytes());
    HandshakeError::WebTransport(why)
}

/// The session's first stream.
async fn first(connection: &Connection, layer: Layer) -> Result<Bidi, HandshakeError> {
    loop {
        let (send, recv) = connection.accept_bi().await.map_err(handshake_error)?;
        let mut control = Bidi::new(send, recv, layer);
        match poll_fn(|cx| control.poll_head(cx)).await {
            Ok(()) => return Ok(control),
            Err(ReadError::ConnectionLost(error)) => return Err(handshake_error(error)),
            // None of the session's, and answered so.
            Err(_) => {}
        }
    }
}

impl Session {
    /// Resolves when the peer has ended the session.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>, layer: Layer) -> Poll<Closed> {
        loop {
            match std::mem::replace(&mut self.seen, Seen::Nothing) {
                Seen::Nothing => {}
                Seen::Closed(0) => return Poll::Ready(Closed::Eof),
                Seen::Closed(code) => {
                    let reason = format!("session closed by the peer with code {code}");
                    return Poll::Ready(Closed::Reset(reason.into()));
                }
                Seen::Broken(reason) => {
                    return Poll::Ready(Closed::Violation { reason, ws_code: 0 });
                }
            }
            let Self { recv, capsules, .. } = self;
            let read = with_scratch(|scratch| {
                recv.poll_read(cx, scratch)
                    .map_ok(|n| (n, capsules.feed(&scratch[..n])))
            });
            match ready!(read) {
                // Without a capsule it means the same as code 0.
                Ok((0, _)) => return Poll::Ready(Closed::Eof),
                Ok((_, seen)) => self.seen = seen,
                Err(ReadError::ConnectionLost(error)) => {
                    return Poll::Ready(lost(&error, layer));
                }
                Err(ReadError::Reset(code)) => {
                    let reason = format!("session reset by the peer with {}", layer.shown(code));
                    return Poll::Ready(Closed::Reset(reason.into()));
                }
                Err(_) => return Poll::Ready(Closed::Reset("session closed".into())),
            }
        }
    }

    /// Ends the session with `code`; resolves when the peer knows, or cannot
    /// any more.
    pub(super) fn end(&mut self, code: u32) -> impl Future<Output = ()> + Send + Sync + use<> {
        let send = self.send.take();
        async move {
            let Some(mut send) = send else {
                return;
            };
            if send.write_all(&capsules::close(code)).await.is_ok() {
                // Fails only if the client has stopped it, and so knows.
                let _ = send.finish();
                let _ = send.stopped().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use web_transport_proto::http::HeaderValue;

    use super::*;

    fn ask(path: &str, protocols: &[&str], origin: Option<&'static str>) -> Result<bool, u16> {
        let mut headers = HeaderMap::new();
        if let Some(origin) = origin {
            headers.append("origin", HeaderValue::from_static(origin));
        }
        let protocols: Vec<_> = protocols.iter().map(|p| (*p).to_owned()).collect();
        let spec = ListenSpec {
            name: "x".into(),
            transport: crate::transport::Kind::Quic,
            bind: ([127, 0, 0, 1], 0).into(),
            paths: vec!["/mqtt".into()],
            proxies: crate::transport::Proxies::default(),
            origins: vec!["https://good.example".into()],
            tls: None,
            webtransport: true,
        };
        judge(path, &headers, &protocols, &spec)
            .map(|answer| answer.protocol.is_some())
            .map_err(|(status, _)| status.as_u16())
    }

    #[test]
    fn requests_are_judged() {
        assert_eq!(ask("/mqtt", &[], None), Ok(false));
        assert_eq!(ask("/mqtt", &["x", "mqtt"], None), Ok(true));
        assert_eq!(ask("/mqtt", &["x"], None), Err(400));
        assert_eq!(ask("/", &[], None), Err(404));
        assert_eq!(ask("/mqtt", &[], Some("https://good.example")), Ok(false));
        assert_eq!(ask("/mqtt", &[], Some("https://evil.example")), Err(403));
        assert_eq!(ask("/mqtt", &[], Some("null")), Err(403));
    }
}
