//! The opening handshake of a WebSocket (RFC 6455 section 4.2), for MQTT:
//! path, Origin and subprotocol are checked, and every refusal is an HTTP
//! answer that says what was wrong.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::machine::TryParse;
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, header};

use crate::transport::limits::HandshakeError;

/// The most bytes of a request; browsers send cookies along.
const HEAD_MAX: usize = 16 * 1024;
/// The most bytes thrown away after a refusal, and for how long, so that it is
/// not overtaken by a reset.
const LINGER_MAX: usize = 64 * 1024;
const LINGER: Duration = Duration::from_secs(1);
/// Subprotocols, the preferred first. `mqtt` is [MQTT-6.0.0-3]; the other is
/// what MQTT 3.1 clients offer.
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// Serves one handshake; returns what the client sent behind its request.
pub(in crate::transport) async fn accept<S>(
    io: &mut S,
    path: &str,
    origins: &[String],
) -> Result<Vec<u8>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match negotiate(io, path, origins).await {
        Ok((response, rest)) => {
            io.write_all(&response).await.map_err(HandshakeError::Io)?;
            io.flush().await.map_err(HandshakeError::Io)?;
            Ok(rest)
        }
        Err(Refusal::Io(error)) => Err(HandshakeError::Io(error)),
        Err(Refusal::Http(status, reason)) => {
            // The refusal is what matters; the peer may be gone already.
            let _ = refuse(io, status, reason).await;
            Err(HandshakeError::Http { status, reason })
        }
    }
}

enum Refusal {
    Io(io::Error),
    Http(u16, &'static str),
}

async fn negotiate<S: AsyncRead + Unpin>(
    io: &mut S,
    path: &str,
    origins: &[String],
) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
    let (head, rest) = read_head(io).await?;
    let request = match Request::try_parse(&head) {
        Ok(Some((_, request))) => request,
        Ok(None) => return Err(Refusal::Http(400, "not an HTTP request")),
        Err(error) => return Err(explain(&error)),
    };
    if request.uri().path() != path {
        return Err(Refusal::Http(404, "wrong path"));
    }
    let mut response = create_response(&request).map_err(|error| explain(&error))?;
    if !origin_allowed(request.headers(), origins) {
        return Err(Refusal::Http(403, "Origin not allowed"));
    }
    let Some(subprotocol) = subprotocol(request.headers()) else {
        return Err(Refusal::Http(
            400,
            "Sec-WebSocket-Protocol must offer \"mqtt\"",
        ));
    };
    response.headers_mut().insert(
        header::SEC_WEBSOCKET_PROTOCOL,
        HeaderValue::from_static(subprotocol),
    );
    let mut bytes = Vec::with_capacity(256);
    write_response(&mut bytes, &response).map_err(|error| explain(&error))?;
    Ok((bytes, rest))
}

/// Reads up to the empty line; also returns what came behind it.
async fn read_head<S: AsyncRead + Unpin>(io: &mut S) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
    let mut head = Vec::with_capacity(1024);
    loop {
        // The end may straddle two reads; what was searched is not searched
        // again, so that a request in small pieces costs no more than others.
        let from = head.len().saturating_sub(3);
        match io.read_buf(&mut head).await {
            Ok(0) => return Err(Refusal::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Err(Refusal::Io(error)),
        }
        if let Some(end) = head[from..].windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = head.split_off(from + end + 4);
            return Ok((head, rest));
        }
        if head.len() >= HEAD_MAX {
            return Err(Refusal::Http(431, "request header too large"));
        }
        // Something else altogether, say MQTT without WebSocket.
        if !head[0].is_ascii_uppercase() {
            return Err(Refusal::Http(400, "not an HTTP request"));
        }
    }
}

/// A status for what tungstenite found wrong.
fn explain(error: &WsError) -> Refusal {
    use ProtocolError as P;
    let (status, reason) = match error {
        WsError::Capacity(CapacityError::TooManyHeaders) => (431, "too many header lines"),
        WsError::Protocol(P::WrongHttpMethod) => (405, "only GET is served"),
        WsError::Protocol(P::WrongHttpVersion) => (400, "HTTP/1.1 is needed"),
        WsError::Protocol(P::MissingConnectionUpgradeHeader | P::MissingUpgradeWebSocketHeader) => {
            (426, "this path serves MQTT over WebSocket only")
        }
        WsError::Protocol(P::MissingSecWebSocketVersionHeader) => {
            (426, "Sec-WebSocket-Version must be 13")
        }
        WsError::Protocol(P::MissingSecWebSocketKey | P::InvalidSecWebSocketKey) => {
            (400, "Sec-WebSocket-Key missing or malformed")
        }
        _ => (400, "malformed request"),
    };
    Refusal::Http(status, reason)
}

/// Whether a browser may come from where it says it does; others say nothing.
pub(in crate::transport) fn origin_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    origins.is_empty()
        || headers.get_all(header::ORIGIN).iter().all(|origin| {
            origin
                .to_str()
                .is_ok_and(|origin| origins.iter().any(|o| o.eq_ignore_ascii_case(origin)))
        })
}

/// The subprotocol to answer; the client may offer several, on several lines.
fn subprotocol(headers: &HeaderMap) -> Option<&'static str> {
    let offered = |name: &&str| {
        headers
            .get_all(header::SEC_WEBSOCKET_PROTOCOL)
            .iter()
            .filter_map(|line| line.to_str().ok())
            .flat_map(|line| line.split(','))
            .any(|offer| offer.trim() == *name)
    };
    SUBPROTOCOLS.into_iter().find(offered)
}

async fn refuse<S>(io: &mut S, status: u16, reason: &str) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (phrase, extra) = match status {
        403 => ("Forbidden", ""),
        404 => ("Not Found", ""),
        405 => ("Method Not Allowed", "Allow: GET\r\n"),
        426 => (
            "Upgrade Required",
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        ),
        431 => ("Request Header Fields Too Large", ""),
        _ => ("Bad Request", ""),
    };
    // 426 lists Upgrade in Connection (RFC 9110 section 7.8).
    let connection = if status == 426 {
        "close, Upgrade"
    } else {
        "close"
    };
    let answer = format!(
        "HTTP/1.1 {status} {phrase}\r\n{extra}Connection: {connection}\r\n\
         Content-Type: text/plain\r\nContent-Length: {}\r\n\r\n{reason}\n",
        reason.len() + 1
    );
    io.write_all(answer.as_bytes()).await?;
    io.shutdown().await?;
    let drain = async {
        let (mut sink, mut total) = ([0; 512], 0);
        while total < LINGER_MAX {
            match io.read(&mut sink).await? {
                0 => break,
                n => total += n,
            }
        }
        Ok(())
    };
    timeout(LINGER, drain).await.unwrap_or(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(request: &str, origins: &[&str]) -> (String, Result<Vec<u8>, HandshakeError>) {
        let (mut client, mut server) = tokio::io::duplex(128 * 1024);
        client.write_all(request.as_bytes()).await.expect("room");
        client.shutdown().await.expect("half-close");
        let origins: Vec<String> = origins.iter().map(|o| (*o).to_owned()).collect();
        let result = accept(&mut server, "/mqtt", &origins).await;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("answer");
        (answer, result)
    }

    fn request(path: &str, extra: &str) -> String {
        format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extra}\r\n"
        )
    }

    const OFFER: &str = "Sec-WebSocket-Protocol: mqtt\r\n";

    #[tokio::test]
    async fn a_good_request_is_answered() {
        let (answer, result) = ask(&request("/mqtt?token=1", OFFER), &[]).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
        assert!(answer.contains("sec-websocket-protocol: mqtt\r\n"));
        assert_eq!(result.expect("accepted"), b"");
    }

    #[tokio::test]
    async fn bytes_behind_the_request_are_kept() {
        let (_, result) = ask(&(request("/mqtt", OFFER) + "early"), &[]).await;
        assert_eq!(result.expect("accepted"), b"early");
    }

    #[tokio::test]
    async fn mqtt_is_preferred_and_31_accepted() {
        let both = "Sec-WebSocket-Protocol: mqttv3.1, foo\r\nSec-WebSocket-Protocol: mqtt\r\n";
        let (answer, _) = ask(&request("/mqtt", both), &[]).await;
        assert!(answer.contains("sec-websocket-protocol: mqtt\r\n"));
        let old = "Sec-WebSocket-Protocol: mqttv3.1\r\n";
        let (answer, _) = ask(&request("/mqtt", old), &[]).await;
        assert!(answer.contains("sec-websocket-protocol: mqttv3.1\r\n"));
    }

    #[tokio::test]
    async fn refusals_say_why() {
        let good = request("/mqtt", OFFER);
        let origin = format!("{OFFER}Origin: https://evil.example\r\n");
        for (request, status) in [
            (request("/other", OFFER), 404),
            (request("/mqtt", ""), 400),
            (request("/mqtt", "Sec-WebSocket-Protocol: amqp\r\n"), 400),
            (request("/mqtt", &origin), 403),
            (good.replace("GET", "POST"), 405),
            (good.replace("Upgrade: websocket\r\n", ""), 426),
            (good.replace("Version: 13", "Version: 8"), 426),
            (good.replace("dGhlIH", "!!"), 400),
            (good.replace("HTTP/1.1", "HTTP/1.0"), 400),
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), 404),
            ("GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), 426),
            ("\x10\x0c\0\x04MQTT".to_owned(), 400),
            (
                format!("GET /mqtt{} HTTP/1.1\r\n", "x".repeat(HEAD_MAX)),
                431,
            ),
            (request("/mqtt", &"A: b\r\n".repeat(200)), 431),
        ] {
            let (answer, result) = ask(&request, &["https://good.example"]).await;
            let line = format!("HTTP/1.1 {status} ");
            assert!(answer.starts_with(&line), "{answer} for {request:.80}");
            assert!(
                matches!(result, Err(HandshakeError::Http { status: s, .. }) if s == status),
                "{result:?}"
            );
        }
    }

    #[tokio::test]
    async fn origins() {
        let list = ["https://good.example"];
        let good = format!("{OFFER}Origin: HTTPS://good.example\r\n");
        assert!(ask(&request("/mqtt", &good), &list).await.1.is_ok());
        // No browser, no Origin.
        assert!(ask(&request("/mqtt", OFFER), &list).await.1.is_ok());
        let two = format!("{good}Origin: https://evil.example\r\n");
        assert!(ask(&request("/mqtt", &two), &list).await.1.is_err());
    }

    #[tokio::test]
    async fn hanging_up_is_an_io_error() {
        let (_, result) = ask("GET /mqtt HT", &[]).await;
        assert!(matches!(result, Err(HandshakeError::Io(_))));
    }
}
