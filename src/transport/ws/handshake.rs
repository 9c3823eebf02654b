//! The opening handshake of a WebSocket (RFC 6455 section 4.2): the request is
//! read, judged and answered. Whatever is no WebSocket gets an HTTP answer that
//! says what was wrong, and the connection ends with it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::config::RealIpHeader;
use crate::transport::ListenSpec;
use crate::transport::limits::HandshakeError;
use crate::transport::ws::request::{Head, Refusal, Verdict, malformed};

/// The most bytes of a request; browsers send cookies along.
const HEAD_MAX: usize = 16 * 1024;
/// The most bytes thrown away after an answer, and for how long, so that it is
/// not overtaken by a reset.
const LINGER_MAX: usize = 64 * 1024;
const LINGER: Duration = Duration::from_secs(1);

/// Serves one handshake; returns what the client sent behind its request.
/// `peer` becomes the client where a trusted proxy tells of it.
pub(in crate::transport) async fn accept<S>(
    io: &mut S,
    spec: &ListenSpec,
    peer: &mut SocketAddr,
) -> Result<Vec<u8>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (head, rest) = match read_head(io).await.map_err(HandshakeError::Io)? {
        Ok((bytes, rest)) => (Head::parse(&bytes), rest),
        Err(refusal) => (Err(refusal), Vec::new()),
    };
    let verdict = match head {
        Ok(head) => {
            *peer = client(&head, spec, *peer);
            head.judge(spec)
        }
        Err(refusal) => Verdict::Refused(refusal),
    };
    match verdict {
        Verdict::Upgrade(answer) => {
            io.write_all(&answer).await.map_err(HandshakeError::Io)?;
            io.flush().await.map_err(HandshakeError::Io)?;
            Ok(rest)
        }
        // The verdict is what matters; the peer may be gone already.
        Verdict::Healthy { body } => {
            let _ = answer(io, 200, "", if body { "ok" } else { "" }).await;
            Err(HandshakeError::Health)
        }
        Verdict::Refused(refusal) => {
            let extra = match refusal.status {
                405 => format!("Allow: {}\r\n", refusal.allow),
                // RFC 9110 section 15.5.22, RFC 6455 section 4.2.2.
                426 => "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n".to_owned(),
                _ => String::new(),
            };
            let body = if refusal.body { refusal.told } else { "" };
            let _ = answer(io, refusal.status, &extra, body).await;
            Err(match refusal.subprotocol {
                true => HandshakeError::Subprotocol,
                false => HandshakeError::Http {
                    status: refusal.status,
                    reason: refusal.logged,
                },
            })
        }
    }
}

fn client(head: &Head, spec: &ListenSpec, peer: SocketAddr) -> SocketAddr {
    let name = match spec.proxies.header {
        RealIpHeader::XForwardedFor => "x-forwarded-for",
        RealIpHeader::Forwarded => "forwarded",
        RealIpHeader::None => return peer,
    };
    let lines = head.headers.get_all(name).into_iter();
    spec.proxies.client(peer, lines.map(|line| line.as_bytes()))
}

/// Reads up to the empty line; also returns what came behind it.
async fn read_head<S: AsyncRead + Unpin>(
    io: &mut S,
) -> io::Result<Result<(Vec<u8>, Vec<u8>), Refusal>> {
    let mut head = Vec::with_capacity(1024);
    loop {
        // The end may straddle two reads; what was searched is not searched
        // again, so that a request in small pieces costs no more than others.
        let from = head.len().saturating_sub(3);
        if io.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Something else altogether, say MQTT without WebSocket.
        if !head[0].is_ascii_uppercase() {
            return Ok(Err(malformed(&head)));
        }
        if let Some(end) = head[from..].windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = head.split_off(from + end + 4);
            return Ok(Ok((head, rest)));
        }
        if head.len() >= HEAD_MAX {
            return Ok(Err(Refusal::new(431, "request header too large")));
        }
    }
}

/// Answers and ends the connection: nothing but a handshake keeps it open.
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
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::transport::{Kind, Proxies};

    fn spec(origins: &[&str]) -> ListenSpec {
        ListenSpec {
            name: "here".into(),
            transport: Kind::Ws,
            bind: PEER,
            paths: vec!["/mqtt".into(), "/ws".into()],
            origins: origins.iter().map(|o| (*o).to_owned()).collect(),
            proxies: Proxies::default(),
            tls: None,
            webtransport: false,
        }
    }

    const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 7);

    async fn ask(request: &str, origins: &[&str]) -> (String, Result<Vec<u8>, HandshakeError>) {
        let (answer, result, peer) = ask_at(request, &spec(origins)).await;
        assert_eq!(peer, PEER);
        (answer, result)
    }

    async fn ask_at(
        request: &str,
        spec: &ListenSpec,
    ) -> (String, Result<Vec<u8>, HandshakeError>, SocketAddr) {
        let (mut client, mut server) = tokio::io::duplex(128 * 1024);
        client.write_all(request.as_bytes()).await.expect("room");
        client.shutdown().await.expect("half-close");
        let mut peer = PEER;
        let result = accept(&mut server, spec, &mut peer).await;
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
                format!("GET /mqtt{} HTTP/1.1\r\n", "x".repeat(HEAD_MAX)),
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
            assert_eq!(error.label() == "subprotocol", part == "subprotocols");
            if status == 426 {
                assert!(answer.contains("\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"));
                assert!(answer.contains("\r\nConnection: close, Upgrade\r\n"));
            }
            assert_eq!(answer.contains("\r\nAllow: GET\r\n"), status == 405);
        }
    }

    #[tokio::test]
    async fn what_a_client_wrote_is_escaped_and_short_in_the_log() {
        let origin = format!("{OFFER}Origin: \u{9b}{}\r\n", "x".repeat(5000));
        let (_, result) = ask(&request("/mqtt", &origin), &["https://good.example"]).await;
        let error = result.expect_err("refused").to_string();
        assert!(error.contains("\\u{9b}xxx") && error.len() < 200, "{error}");
    }

    #[tokio::test]
    async fn health_is_answered_to_whoever_asks() {
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
            assert_eq!(matches!(result, Err(HandshakeError::Health)), status == 200);
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
            let mut spec = spec(&[]);
            spec.proxies.header = header;
            let (_, result, peer) = ask_at(&request("/mqtt", &headers), &spec).await;
            assert!(result.is_ok() && peer == PEER);
            spec.proxies.trusted = vec!["10.0.0.0/8".parse().expect("a network")];
            // Also where it is refused, for the log.
            for path in ["/mqtt", "/other"] {
                let (_, result, peer) = ask_at(&request(path, &headers), &spec).await;
                assert_eq!(result.is_ok(), path == "/mqtt");
                assert_eq!(peer.to_string(), client);
            }
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
