//! The handshake of WebTransport over HTTP/3 (draft-ietf-webtrans-http3) on a connection whose ALPN is
//! `h3`: SETTINGS, then one request, which is judged like a WebSocket's. The session's streams are then
//! used like those of ALPN `mqtt`. There is one session per connection, and no other HTTP is served.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt};
use tokio::time::timeout;
use web_transport_proto::http::{HeaderMap, StatusCode};
use web_transport_proto::{ConnectError, ConnectRequest, ConnectResponse, Settings, SettingsError};

use crate::config;
use crate::transport::error::{HandshakeError, RequestError, WebTransportError};
use crate::transport::listen::listener::Listener;
use crate::transport::quic::bidi::{Bidi, Layer, NO_ERROR};
use crate::transport::quic::close::{CloseOnDrop, Missing, h3, handshake_error};
use crate::transport::quic::session::{HttpStreams, Session};
use crate::transport::quic::streams::Quic;
use crate::transport::ws::request::{foreign_origin, shown};

/// The most bytes of SETTINGS.
const SETTINGS_MAX_BYTES: usize = 4 * 1024;
/// The most bytes of a request; browsers send cookies along.
const REQUEST_MAX_BYTES: usize = 16 * 1024;
/// The most bytes that one read takes.
const CHUNK_BYTES: usize = 4 * 1024;
/// How long a refused client is given to take its answer.
const LINGER: Duration = Duration::from_secs(1);
/// The subprotocol, as with WebSocket [MQTT-6.0.0-3].
const SUBPROTOCOL: &str = "mqtt";

/// The handshake from the end of TLS to the session's first stream. The caller has a deadline. Memory
/// is taken only for bytes that the client has sent.
pub(super) async fn accept(
    connection: Connection,
    listener: &Listener,
) -> Result<Quic, HandshakeError> {
    let mut guard = CloseOnDrop {
        connection: &connection,
        missing: Missing::Settings,
    };
    let http = settings(&connection).await?;
    guard.missing = Missing::Request;
    let (mut send, recv, request, rest) = request(&connection).await?;
    let path = request.url.path();
    let answer = match judge(path, &request.headers, &request.protocols, &listener.config) {
        Ok(answer) => answer,
        Err(error) => return Err(refuse(&connection, send, error).await),
    };
    let mut bytes = Vec::new();
    // Encoding does not fail for the two possible answers.
    if answer.encode(&mut bytes).is_err() || send.write_all(&bytes).await.is_err() {
        return Err(HandshakeError::WebTransport(
            WebTransportError::AnswerNotSent,
        ));
    }
    let layer = Layer::WebTransport {
        session: VarInt::from(send.id()).into_inner(),
    };
    let mut session = Session::new(send, recv, &rest, http);
    guard.missing = Missing::ControlStream(layer);
    let control = tokio::select! {
        biased;
        control = first_stream(&connection, layer) => control?,
        closed = poll_fn(|cx| session.poll_end(cx, layer)) => {
            tracing::debug!(%closed, "WebTransport session ended before its first stream");
            return Err(HandshakeError::WebTransport(WebTransportError::SessionEnded));
        }
    };
    std::mem::forget(guard);
    let events = Arc::clone(&listener.events);
    Ok(Quic::new(
        connection,
        layer,
        control,
        Some(Box::new(session)),
        events,
    ))
}

/// Sends our SETTINGS and reads the client's.
async fn settings(connection: &Connection) -> Result<HttpStreams, HandshakeError> {
    let mut bytes = Vec::new();
    let mut settings = Settings::default();
    settings.enable_webtransport(1);
    settings.encode(&mut bytes);
    let mut ours = connection.open_uni().await.map_err(handshake_error)?;
    if ours.write_all(&bytes).await.is_err() {
        return Err(HandshakeError::WebTransport(
            WebTransportError::SettingsNotSent,
        ));
    }
    let mut others = Vec::new();
    loop {
        let mut theirs = connection.accept_uni().await.map_err(handshake_error)?;
        let mut bytes = Vec::new();
        loop {
            match Settings::decode(&mut &bytes[..]) {
                // The values do not matter: a client that requests a session supports sessions.
                Ok(_) => {
                    return Ok(HttpStreams {
                        _ours: ours,
                        _theirs: theirs,
                        others,
                    });
                }
                Err(SettingsError::UnexpectedEnd) if bytes.len() < SETTINGS_MAX_BYTES => {
                    read_more(connection, &mut theirs, &mut bytes).await?;
                }
                // A stream of QPACK's or of an unknown type, which is not read.
                Err(SettingsError::UnexpectedStreamType(_)) => {
                    others.push(theirs);
                    break;
                }
                Err(_) => {
                    let error = WebTransportError::Settings;
                    return Err(fail(connection, h3::SETTINGS_ERROR, error));
                }
            }
        }
    }
}

/// Reads the request; returns it with its stream and the bytes behind it.
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
            Err(ConnectError::UnexpectedEnd) if bytes.len() <= REQUEST_MAX_BYTES => {
                read_more(connection, &mut recv, &mut bytes).await?;
            }
            Err(error) => {
                let Some(error) = request_error(&error) else {
                    let error = WebTransportError::NotARequest;
                    return Err(fail(connection, h3::FRAME_UNEXPECTED, error));
                };
                // The rest of the stream is not read.
                let _ = recv.stop(NO_ERROR);
                return Err(refuse(connection, send, error).await);
            }
        }
    }
}

/// Appends the next bytes of a stream.
async fn read_more(
    connection: &Connection,
    recv: &mut RecvStream,
    bytes: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    match recv.read_chunk(CHUNK_BYTES, true).await {
        Ok(Some(chunk)) => {
            bytes.extend_from_slice(&chunk.bytes);
            Ok(())
        }
        Err(ReadError::ConnectionLost(error)) => Err(handshake_error(error)),
        _ => {
            let error = WebTransportError::StreamEnded;
            Err(fail(connection, h3::REQUEST_INCOMPLETE, error))
        }
    }
}

/// The fault of a request, or nothing where the frame is not a request.
fn request_error(error: &ConnectError) -> Option<RequestError> {
    use ConnectError as E;
    Some(match error {
        E::UnexpectedFrame(_) | E::FrameTooLarge => return None,
        E::FieldSectionTooLarge | E::UnexpectedEnd => RequestError::HeaderTooLarge,
        E::WrongMethod(_) => RequestError::NotWebTransport,
        E::WrongProtocol(_) => RequestError::ConnectProtocol,
        _ => RequestError::Malformed(None),
    })
}

/// The answer to a well-formed request.
fn judge(
    path: &str,
    headers: &HeaderMap,
    protocols: &[String],
    listener: &config::Listener,
) -> Result<ConnectResponse, RequestError> {
    if !listener.paths.iter().any(|served| served == path) {
        return Err(RequestError::Path(shown(path)));
    }
    if let Some(origin) = foreign_origin(headers, &listener.origins) {
        return Err(RequestError::Origin(origin));
    }
    if protocols.is_empty() {
        return Ok(ConnectResponse::OK);
    }
    if !protocols.iter().any(|p| p == SUBPROTOCOL) {
        return Err(RequestError::WebTransportProtocol);
    }
    Ok(ConnectResponse::OK.with_protocol(SUBPROTOCOL))
}

/// Answers, and closes the connection once the client has the answer.
async fn refuse(
    connection: &Connection,
    mut send: SendStream,
    error: RequestError,
) -> HandshakeError {
    let mut bytes = Vec::new();
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::BAD_REQUEST);
    let answer = ConnectResponse::new(status);
    if answer.encode(&mut bytes).is_ok() && send.write_all(&bytes).await.is_ok() {
        // Fails only if the client wants no answer.
        let _ = send.finish();
        let _ = timeout(LINGER, send.stopped()).await;
    }
    connection.close(NO_ERROR, b"");
    HandshakeError::Request(error)
}

/// Closes the connection with a code of HTTP/3.
fn fail(connection: &Connection, code: u32, error: WebTransportError) -> HandshakeError {
    connection.close(VarInt::from_u32(code), error.to_string().as_bytes());
    HandshakeError::WebTransport(error)
}

/// Waits for the session's first stream.
async fn first_stream(connection: &Connection, layer: Layer) -> Result<Bidi, HandshakeError> {
    loop {
        let (send, recv) = connection.accept_bi().await.map_err(handshake_error)?;
        let mut control = Bidi::new(send, recv, layer);
        match poll_fn(|cx| control.poll_head(cx)).await {
            Ok(()) => return Ok(control),
            Err(ReadError::ConnectionLost(error)) => return Err(handshake_error(error)),
            // The stream does not belong to the session, and was rejected.
            Err(_) => {}
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
        let listener = config::Listener {
            paths: vec!["/mqtt".into()],
            origins: vec!["https://good.example".into()],
            webtransport: true,
            ..config::Listener::new(config::Transport::Quic, ([127, 0, 0, 1], 0).into())
        };
        judge(path, &headers, &protocols, &listener)
            .map(|answer| answer.protocol.is_some())
            .map_err(|error| error.status())
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
