//! The opening handshake of a WebSocket (RFC 6455 section 4.2): the request is read, judged and
//! answered. Any other request gets an HTTP answer that names its fault, and the connection ends.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::config::{Listener, RealIpHeader};
use crate::transport::detect::detect;
use crate::transport::error::{HandshakeError, RequestError};
use crate::transport::proxy;
use crate::transport::ws::request::{Head, Verdict};

/// The most bytes of a request; browsers send cookies along.
const HEAD_MAX_BYTES: usize = 16 * 1024;
/// The most bytes that are discarded after an answer, so that a reset does not destroy the answer.
const LINGER_MAX_BYTES: usize = 64 * 1024;
/// How long bytes are discarded after an answer.
const LINGER: Duration = Duration::from_secs(1);

/// The answer to an accepted request.
#[derive(Debug)]
pub(in crate::transport) enum Answer {
    /// The connection is a WebSocket now.
    Upgraded {
        /// The bytes that the client sent behind its request.
        early: Vec<u8>,
    },
    /// A load balancer asked for the listener's health.
    HealthCheck,
}

/// Serves one handshake. `peer` becomes the client's address where a trusted proxy names it.
pub(in crate::transport) async fn accept<S>(
    io: &mut S,
    listener: &Listener,
    peer: &mut SocketAddr,
) -> Result<Answer, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (head, early) = match read_head(io).await? {
        Ok((bytes, early)) => (Head::parse(&bytes), early),
        Err(error) => (Err(error), Vec::new()),
    };
    let (verdict, body) = match head {
        Ok(head) => {
            *peer = client(&head, listener, *peer);
            (head.judge(listener), !head.is_head())
        }
        Err(error) => (Err(error), true),
    };
    match verdict {
        Ok(Verdict::Upgrade(answer)) => {
            io.write_all(&answer).await.map_err(HandshakeError::Io)?;
            io.flush().await.map_err(HandshakeError::Io)?;
            Ok(Answer::Upgraded { early })
        }
        // The peer may be gone already, which does not change the result.
        Ok(Verdict::Healthy) => {
            let _ = answer(io, 200, "", if body { "ok" } else { "" }).await;
            Ok(Answer::HealthCheck)
        }
        Err(error) => {
            let extra = match error {
                RequestError::UpgradeMethod => "Allow: GET\r\n",
                RequestError::HealthMethod => "Allow: GET, HEAD\r\n",
                // RFC 9110 section 15.5.22, RFC 6455 section 4.2.2.
                _ if error.status() == 426 => "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
                _ => "",
            };
            let text = if body { error.answer() } else { "" };
            let _ = answer(io, error.status(), extra, text).await;
            Err(HandshakeError::Request(error))
        }
    }
}

fn client(head: &Head, listener: &Listener, peer: SocketAddr) -> SocketAddr {
    let name = match listener.real_ip_header {
        RealIpHeader::XForwardedFor => "x-forwarded-for",
        RealIpHeader::Forwarded => "forwarded",
        RealIpHeader::None => return peer,
    };
    let lines = head.headers.get_all(name).into_iter();
    proxy::client(listener, peer, lines.map(|line| line.as_bytes()))
}

/// Reads up to the empty line; returns the request, and the bytes behind it.
async fn read_head<S: AsyncRead + Unpin>(
    io: &mut S,
) -> Result<Result<(Vec<u8>, Vec<u8>), RequestError>, HandshakeError> {
    let mut head = Vec::with_capacity(1024);
    loop {
        // The end may straddle two reads. Searched bytes are not searched again, so that a request in
        // small pieces costs no more than others.
        let from = head.len().saturating_sub(3);
        if io.read_buf(&mut head).await.map_err(HandshakeError::Io)? == 0 {
            return Err(match head.is_empty() {
                true => HandshakeError::NoRequest,
                false => HandshakeError::Io(io::ErrorKind::UnexpectedEof.into()),
            });
        }
        // Another protocol, for example MQTT without WebSocket.
        if !head[0].is_ascii_uppercase() {
            return Ok(Err(RequestError::malformed(detect(&head))));
        }
        if let Some(end) = head[from..].windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = head.split_off(from + end + 4);
            return Ok(Ok((head, rest)));
        }
        if head.len() >= HEAD_MAX_BYTES {
            return Ok(Err(RequestError::HeaderTooLarge));
        }
    }
}

/// Answers, and ends the connection.
async fn answer<S>(io: &mut S, status: u16, extra: &str, text: &str) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let phrase = match status {
        200 => "OK",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        505 => "HTTP Version Not Supported",
        _ => "Bad Request",
    };
    // 426 lists Upgrade in Connection (RFC 9110 section 7.8).
    let connection = match status {
        426 => "close, Upgrade",
        _ => "close",
    };
    let mut answer = format!(
        "HTTP/1.1 {status} {phrase}\r\n{extra}Connection: {connection}\r\n\
         Cache-Control: no-store\r\n"
    );
    if !text.is_empty() {
        answer.push_str(&format!(
            "Content-Type: text/plain\r\nContent-Length: {}\r\n\r\n{text}\n",
            text.len() + 1
        ));
    } else {
        answer.push_str("\r\n");
    }
    io.write_all(answer.as_bytes()).await?;
    io.shutdown().await?;
    let drain = async {
        let (mut sink, mut total) = ([0; 512], 0);
        while total < LINGER_MAX_BYTES {
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
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::config::Transport;

    fn listener(origins: &[&str]) -> Listener {
        Listener {
            paths: vec!["/mqtt".into(), "/ws".into()],
            origins: origins.iter().map(|o| (*o).to_owned()).collect(),
            ..Listener::new(Transport::Ws, PEER)
        }
    }

    const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 7);

    async fn ask(request: &str, origins: &[&str]) -> (String, Result<Answer, HandshakeError>) {
        let (answer, result, peer) = ask_at(request, &listener(origins)).await;
        assert_eq!(peer, PEER);
        (answer, result)
    }

    async fn ask_at(
        request: &str,
        listener: &Listener,
    ) -> (String, Result<Answer, HandshakeError>, SocketAddr) {
        let (mut client, mut server) = tokio::io::duplex(128 * 1024);
        client.write_all(request.as_bytes()).await.expect("room");
        client.shutdown().await.expect("half-close");
        let mut peer = PEER;
        let result = accept(&mut server, listener, &mut peer).await;
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("answer");
        (answer, result, peer)
    }

    fn request(path: &str, extra: &str) -> String {
        format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extra}\r\n"
        )
    }

    fn early(result: Result<Answer, HandshakeError>) -> Vec<u8> {
        match result.expect("accepted") {
            Answer::Upgraded { early } => early,
            Answer::HealthCheck => panic!("not a health check"),
        }
    }

    const OFFER: &str = "Sec-WebSocket-Protocol: mqtt\r\n";

    #[tokio::test]
    async fn a_good_request_is_answered() {
        let (answer, result) = ask(&request("/mqtt?token=1", OFFER), &[]).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
        assert!(answer.contains("sec-websocket-protocol: mqtt\r\n"));
        assert!(early(result).is_empty());
    }

    #[tokio::test]
    async fn bytes_behind_the_request_are_kept() {
        let (_, result) = ask(&(request("/mqtt", OFFER) + "early"), &[]).await;
        assert_eq!(early(result), b"early");
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
    async fn several_paths_and_lists_on_several_lines() {
        assert!(ask(&request("/ws", OFFER), &[]).await.1.is_ok());
        assert!(ask(&request("http://x/ws", OFFER), &[]).await.1.is_ok());
        let lines = request("/mqtt", OFFER)
            .replace("keep-alive, Upgrade", "keep-alive\r\nConnection: UPGRADE")
            .replace("Upgrade: websocket", "Upgrade: h2c, WebSocket");
        assert!(ask(&lines, &[]).await.1.is_ok());
    }

    #[tokio::test]
    async fn refusals_say_why() {
        let good = request("/mqtt", OFFER);
        let origin = format!("{OFFER}Origin: https://evil.example\r\n");
        let other = "Sec-WebSocket-Protocol: amqp, MQTT\r\n";
        let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        for (request, status, part) in [
            (request("/other\u{1b}", OFFER), 400, "malformed"),
            (request("/other", OFFER), 404, "\"/other\""),
            (request("/mqtt/", OFFER), 404, "\"/mqtt/\""),
            (request("/mqtt", ""), 400, "subprotocols"),
            (request("/mqtt", other), 400, "subprotocols"),
            (request("/mqtt", &origin), 403, "\"https://evil.example\""),
            (good.replace("GET", "POST"), 405, "GET"),
            (good.replace("GET /mqtt", "POST /x"), 404, "/x"),
            (good.replace("Upgrade: websocket\r\n", ""), 426, "pass on"),
            (good.replace(", Upgrade\r\n", "\r\n"), 426, "pass on"),
            (
                good.replace("Version: 13", "Version: 8"),
                426,
                "Version must be 13",
            ),
            (
                good.replace("Sec-WebSocket-Version: 13\r\n", ""),
                426,
                "Version must be 13",
            ),
            (good.replace("dGhlIH", "!!"), 400, "Key"),
            (good.replace(key, ""), 400, "Key"),
            (good.replace(key, &key.repeat(2)), 400, "Key"),
            (good.replace("Host: x\r\n", ""), 400, "Host"),
            (
                good.replace("Host: x\r\n", "Host: x\r\nHost: y\r\n"),
                400,
                "Host",
            ),
            (
                good.replace("HTTP/1.1", "HTTP/1.0"),
                426,
                "HTTP/1.1 is needed",
            ),
            (
                good.replace("HTTP/1.1", "HTTP/1.7"),
                505,
                "HTTP/1.1 is needed",
            ),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), 505, "HTTP/2"),
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), 404, "\"/\""),
            (
                "GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
                426,
                "pass on",
            ),
            ("\x10\x0c\0\x04MQTT".to_owned(), 400, "but MQTT alone"),
            (
                "\r\n\r\n\0\r\nQUIT\n\x21\x11".to_owned(),
                400,
                "but a PROXY",
            ),
            ("\x16\x03\x01\x02\x00\x01".to_owned(), 400, "but TLS"),
            (
                format!("PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r\n{good}"),
                400,
                "but a PROXY",
            ),
            ("A B\r\n\r\n".to_owned(), 400, "malformed"),
            (
                format!("GET /mqtt{} HTTP/1.1\r\n", "x".repeat(HEAD_MAX_BYTES)),
                431,
                "too large",
            ),
            (request("/mqtt", &"A: b\r\n".repeat(200)), 431, "lines"),
        ] {
            let (answer, result) = ask(&request, &["https://good.example"]).await;
            let line = format!("HTTP/1.1 {status} ");
            assert!(answer.starts_with(&line), "{answer} for {request:.80}");
            assert!(answer.contains("\r\nConnection: close"), "{answer}");
            let error = result.expect_err("refused");
            assert!(
                error.to_string().contains(&format!("HTTP {status}")),
                "{error}"
            );
            assert!(
                error.to_string().contains(part),
                "{error} for {request:.80}"
            );
            let subprotocol = matches!(error, HandshakeError::Request(RequestError::Subprotocol));
            assert_eq!(subprotocol, part == "subprotocols");
            if status == 426 {
                assert!(answer.contains("\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"));
                assert!(answer.contains("\r\nConnection: close, Upgrade\r\n"));
            }
            assert_eq!(answer.contains("\r\nAllow: GET\r\n"), status == 405);
        }
    }

    #[tokio::test]
    async fn text_of_a_client_is_escaped_and_cut_in_the_log() {
        let origin = format!("{OFFER}Origin: \u{9b}{}\r\n", "x".repeat(5000));
        let (_, result) = ask(&request("/mqtt", &origin), &["https://good.example"]).await;
        let error = result.expect_err("refused").to_string();
        assert!(error.contains("\\u{9b}xxx") && error.len() < 200, "{error}");
    }

    #[tokio::test]
    async fn health_checks_are_answered() {
        for (request, status, body) in [
            ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200, "ok\n"),
            ("GET /healthz?from=lb HTTP/1.0\r\n\r\n", 200, "ok\n"),
            ("HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""),
            ("HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404, ""),
            (
                "POST /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
                405,
                "only GET",
            ),
        ] {
            let (answer, result) = ask(request, &["https://good.example"]).await;
            let (head, found) = answer.split_once("\r\n\r\n").expect("a head");
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
            assert!(head.contains("\r\nConnection: close"), "{head}");
            assert!(
                found.starts_with(body) && found.is_empty() == body.is_empty(),
                "{answer}"
            );
            assert_eq!(matches!(result, Ok(Answer::HealthCheck)), status == 200);
        }
    }

    #[tokio::test]
    async fn a_trusted_proxy_names_the_client() {
        let headers = format!(
            "{OFFER}X-Forwarded-For: 203.0.113.9\r\nForwarded: for=192.0.2.60\r\n\
             X-Forwarded-For: 198.51.100.1\r\n"
        );
        for (header, client) in [
            (RealIpHeader::XForwardedFor, "198.51.100.1:0"),
            (RealIpHeader::Forwarded, "192.0.2.60:0"),
            (RealIpHeader::None, "10.0.0.1:7"),
        ] {
            let mut listener = listener(&[]);
            listener.real_ip_header = header;
            let (_, result, peer) = ask_at(&request("/mqtt", &headers), &listener).await;
            assert!(result.is_ok() && peer == PEER);
            listener.trusted_proxies = vec!["10.0.0.0/8".parse().expect("a network")];
            // The log of a refused request names the client as well.
            for path in ["/mqtt", "/other"] {
                let (_, result, peer) = ask_at(&request(path, &headers), &listener).await;
                assert_eq!(result.is_ok(), path == "/mqtt");
                assert_eq!(peer.to_string(), client);
            }
        }
    }

    #[tokio::test]
    async fn only_listed_origins_are_accepted() {
        let list = ["https://good.example"];
        let good = format!("{OFFER}Origin: HTTPS://good.example\r\n");
        assert!(ask(&request("/mqtt", &good), &list).await.1.is_ok());
        // A client that is not a browser sends no Origin.
        assert!(ask(&request("/mqtt", OFFER), &list).await.1.is_ok());
        let two = format!("{good}Origin: https://evil.example\r\n");
        assert!(ask(&request("/mqtt", &two), &list).await.1.is_err());
    }

    #[tokio::test]
    async fn hanging_up_is_an_io_error() {
        let (_, result) = ask("GET /mqtt HT", &[]).await;
        assert!(matches!(result, Err(HandshakeError::Io(_))));
        let (_, result) = ask("", &[]).await;
        assert!(matches!(result, Err(HandshakeError::NoRequest)));
    }
}
