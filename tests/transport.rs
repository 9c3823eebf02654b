//! The byte transports over loopback, with clients that are not ours:
//! tungstenite, tokio-rustls and quinn in their client roles, and raw sockets.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, ServerName};
use tidegate::transport::dial::{DialError, DialTarget, Dialed, dial};
use tidegate::transport::limits::HandshakeError;
use tidegate::transport::{
    Accepted, ClientTls, CloseHow, Closed, ConnectionCap, Drain, Events, Handshakes, Kind, Limits,
    ListenSpec, ListenerInfo, OutBuf, Recv, ServerTls, Stream, bind, selfsigned,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_util::sync::CancellationToken;

const LOCAL: &str = "localhost";

// ---- the server under test -------------------------------------------------

/// What the listener reported, and a way to wait for it.
struct Seen {
    log: mpsc::UnboundedSender<String>,
}

impl Events for Seen {
    fn accept_error(&self, _: &ListenerInfo, kind: &'static str) {
        let _ = self.log.send(format!("accept_error {kind}"));
    }
    fn refused(&self, _: &ListenerInfo, reason: &'static str) {
        let _ = self.log.send(format!("refused {reason}"));
    }
    fn handshake_failed(&self, _: &ListenerInfo, reason: &'static str) {
        let _ = self.log.send(format!("failed {reason}"));
    }
    fn retry_sent(&self, _: &ListenerInfo) {
        let _ = self.log.send("retry".into());
    }
    fn migrated(&self, _: &ListenerInfo, from: SocketAddr, to: SocketAddr) {
        assert_ne!(from, to);
        let _ = self.log.send("migrated".into());
    }
}

struct Server {
    addr: SocketAddr,
    cert: CertificateDer<'static>,
    events: mpsc::UnboundedReceiver<String>,
    accepted: mpsc::UnboundedReceiver<Accepted>,
    cap: Arc<ConnectionCap>,
    stop: CancellationToken,
    drain: Drain,
    served: tokio::task::JoinHandle<()>,
}

impl Server {
    fn start(kind: Kind) -> Self {
        Self::with(kind, |_, _| {})
    }

    /// Accepted connections come out of `self.accepted`.
    fn with(kind: Kind, change: impl FnOnce(&mut ListenSpec, &mut Limits)) -> Self {
        let (log, events) = mpsc::unbounded_channel();
        let (send, accepted) = mpsc::unbounded_channel();
        let tls = Arc::new(
            ServerTls::ephemeral(&[LOCAL.to_owned(), "127.0.0.1".to_owned()]).expect("certificate"),
        );
        let cert = CertificateDer::from(tls.leaf().to_vec());
        let cap = Arc::new(ConnectionCap::new(1000));
        let mut spec = ListenSpec {
            name: format!("test-{kind}"),
            transport: kind,
            bind: ([127, 0, 0, 1], 0).into(),
            path: "/mqtt".into(),
            origins: vec![],
            tls: Some(tls),
        };
        let mut limits = Limits {
            connections: Arc::clone(&cap) as _,
            events: Arc::new(Seen { log }),
            ..Limits::default()
        };
        change(&mut spec, &mut limits);
        let bound = bind(spec, Arc::new(limits)).expect("binds");
        let (addr, drain) = (bound.local_addr(), bound.drain());
        let stop = CancellationToken::new();
        let handler = move |accepted: Accepted| {
            let send = send.clone();
            async move {
                let _ = send.send(accepted);
            }
        };
        let served = tokio::spawn(bound.serve(handler, stop.clone()));
        Self {
            addr,
            cert,
            events,
            accepted,
            cap,
            stop,
            drain,
            served,
        }
    }

    async fn accept(&mut self) -> Accepted {
        soon(self.accepted.recv()).await.expect("server runs")
    }

    async fn event(&mut self) -> String {
        soon(self.events.recv()).await.expect("server runs")
    }

    fn client_tls(&self, alpn: &[&str]) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.cert.clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
        config
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.expect("connects")
    }

    async fn tls(
        &self,
        alpn: &[&str],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(LOCAL).expect("a name");
        TlsConnector::from(Arc::new(self.client_tls(alpn)))
            .connect(name, self.tcp().await)
            .await
    }

    async fn ws(&self) -> WebSocketStream<TcpStream> {
        websocket(self.tcp().await, "/mqtt", Some("mqtt"))
            .await
            .expect("upgraded")
    }

    fn quic_endpoint(&self, alpn: &[&str]) -> quinn::Endpoint {
        use quinn::crypto::rustls::QuicClientConfig;
        let crypto = QuicClientConfig::try_from(self.client_tls(alpn)).expect("TLS 1.3");
        let mut endpoint =
            quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).expect("client endpoint");
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        endpoint
    }

    async fn quic(&self) -> (quinn::Endpoint, quinn::Connection) {
        let endpoint = self.quic_endpoint(&["mqtt"]);
        let connecting = endpoint.connect(self.addr, LOCAL).expect("starts");
        (endpoint, soon(connecting).await.expect("connects"))
    }
}

/// No test waits longer than this for what must come.
async fn soon<F: Future>(f: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), f)
        .await
        .expect("must happen soon")
}

async fn websocket<S>(
    io: S,
    path: &str,
    subprotocol: Option<&'static str>,
) -> Result<WebSocketStream<S>, WsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = format!("ws://{LOCAL}{path}")
        .into_client_request()
        .expect("a request");
    if let Some(name) = subprotocol {
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", HeaderValue::from_static(name));
    }
    soon(tokio_tungstenite::client_async(request, io))
        .await
        .map(|(ws, response)| {
            assert_eq!(
                response.headers().get("sec-websocket-protocol").cloned(),
                subprotocol.map(HeaderValue::from_static)
            );
            ws
        })
}

fn status(result: Result<WebSocketStream<TcpStream>, WsError>) -> u16 {
    match result {
        Err(WsError::Http(response)) => response.status().as_u16(),
        other => panic!("expected an HTTP error, got {other:?}"),
    }
}

async fn recv(stream: &mut Stream, buf: &mut Vec<u8>) -> Result<Recv, Closed> {
    soon(poll_fn(|cx| stream.poll_recv(cx, buf))).await
}

/// Reads until `n` bytes have come, on lane 0.
async fn recv_n(stream: &mut Stream, n: usize) -> Vec<u8> {
    let mut buf = Vec::new();
    while buf.len() < n {
        let got = recv(stream, &mut buf).await.expect("bytes");
        assert!(got.lane == 0 && got.bytes > 0 && !got.lane_closed);
    }
    buf
}

async fn recv_end(stream: &mut Stream) -> Closed {
    let mut buf = Vec::new();
    let end = recv(stream, &mut buf).await.expect_err("an end");
    assert!(buf.is_empty());
    end
}

async fn send(stream: &mut Stream, lane: u8, bytes: &[u8]) -> Result<(), Closed> {
    let mut out = OutBuf {
        buf: bytes.to_vec(),
        at: 0,
    };
    soon(poll_fn(|cx| stream.poll_send(cx, lane, &mut out))).await?;
    assert!(out.is_empty());
    Ok(())
}

async fn close(stream: &mut Stream, how: CloseHow) {
    soon(poll_fn(|cx| stream.poll_close(cx, how))).await;
}

fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i % 251) as u8).collect()
}

/// Sends everything it reads back, until the end.
async fn echo(mut stream: Stream) {
    let mut out = OutBuf::default();
    while recv(&mut stream, &mut out.buf).await.is_ok() {
        soon(poll_fn(|cx| stream.poll_send(cx, 0, &mut out)))
            .await
            .expect("sent");
    }
    close(&mut stream, CloseHow::Normal).await;
}

/// Large and small messages there and back, then the client's end.
async fn exercise<S: AsyncRead + AsyncWrite + Unpin>(io: S) {
    let (mut read, mut write) = tokio::io::split(io);
    for size in [1, 100, 70_000, 1_500_000, 3] {
        let sent = pattern(size);
        let mut got = vec![0; size];
        let (w, r) = tokio::join!(
            async {
                write.write_all(&sent).await?;
                write.flush().await
            },
            read.read_exact(&mut got)
        );
        w.expect("written");
        r.expect("read");
        assert!(got == sent, "{size} bytes differ");
    }
    write.shutdown().await.expect("half-closed");
    assert_eq!(read.read(&mut [0; 10]).await.expect("an end"), 0);
}

async fn exercise_ws<S: AsyncRead + AsyncWrite + Unpin>(mut ws: WebSocketStream<S>) {
    for size in [1, 100, 70_000, 1_000_000, 3] {
        let sent = pattern(size);
        ws.feed(Message::Binary(sent.clone().into()))
            .await
            .expect("fed");
        let mut got = Vec::new();
        while got.len() < size {
            tokio::select! {
                biased;
                flushed = ws.flush() => flushed.expect("flushed"),
                () = std::future::ready(()) => {}
            }
            match ws.next().await.expect("a message").expect("good") {
                Message::Binary(bytes) => got.extend_from_slice(&bytes),
                other => panic!("unexpected {other:?}"),
            }
        }
        assert!(got == sent, "{size} bytes differ");
    }
    ws.close(None).await.expect("close sent");
    let reply = ws.next().await.expect("a close frame").expect("good");
    assert!(reply.is_close());
    assert!(ws.next().await.is_none(), "the server closes the socket");
}

// ---- every kind ------------------------------------------------------------

#[tokio::test]
async fn tcp_echoes_and_half_closes() {
    let mut server = Server::start(Kind::Tcp);
    let client = server.tcp().await;
    let local = client.local_addr().expect("bound");
    let accepted = server.accept().await;
    assert_eq!(accepted.peer, local);
    assert_eq!(accepted.stream.peer_addr(), local);
    assert_eq!(accepted.stream.kind(), Kind::Tcp);
    assert_eq!(accepted.listener.name, "test-tcp");
    tokio::join!(echo(accepted.stream), soon(exercise(client)));
}

#[tokio::test]
async fn tls_echoes_with_and_without_alpn() {
    let mut server = Server::start(Kind::Tls);
    for alpn in [&["mqtt"][..], &[]] {
        let client = server.tls(alpn).await.expect("handshake");
        let accepted = server.accept().await;
        assert_eq!(accepted.stream.kind(), Kind::Tls);
        tokio::join!(echo(accepted.stream), soon(exercise(client)));
    }
}

#[tokio::test]
async fn ws_echoes() {
    let mut server = Server::start(Kind::Ws);
    let client = server.ws().await;
    let mut accepted = server.accept().await;
    assert_eq!(accepted.stream.kind(), Kind::Ws);
    accepted.stream.authenticated();
    tokio::join!(echo(accepted.stream), soon(exercise_ws(client)));
}

#[tokio::test]
async fn wss_echoes() {
    let mut server = Server::start(Kind::Wss);
    let tls = server.tls(&["http/1.1"]).await.expect("handshake");
    let client = websocket(tls, "/mqtt", Some("mqttv3.1"))
        .await
        .expect("upgraded");
    let mut accepted = server.accept().await;
    assert_eq!(accepted.stream.kind(), Kind::Wss);
    accepted.stream.authenticated();
    tokio::join!(echo(accepted.stream), soon(exercise_ws(client)));
}

#[tokio::test]
async fn quic_echoes() {
    let mut server = Server::start(Kind::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (send, recv) = connection.open_bi().await.expect("a stream");
    let client = tokio::io::join(recv, send);
    let exercise = soon(exercise(client));
    let echo = async {
        let accepted = server.accept().await;
        assert_eq!(accepted.stream.kind(), Kind::Quic);
        echo(accepted.stream).await;
    };
    tokio::join!(echo, exercise);
    match soon(connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, 0u32.into()),
        other => panic!("{other:?}"),
    }
}

// ---- accepting -------------------------------------------------------------

#[tokio::test]
async fn silent_clients_hold_up_nobody() {
    for kind in [Kind::Tls, Kind::Ws, Kind::Wss] {
        // One place: whoever is silent must not even hold that.
        let mut server = Server::with(kind, |_, limits| limits.handshakes = Handshakes::new(1));
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(server.tcp().await);
        }
        if kind == Kind::Ws {
            let _client = server.ws().await;
            server.accept().await;
            continue;
        }
        let mut tls = server.tls(&[]).await.expect("handshake");
        if kind == Kind::Wss {
            websocket(&mut tls, "/mqtt", Some("mqtt"))
                .await
                .expect("upgraded");
        }
        server.accept().await;
    }
}

#[tokio::test]
async fn slow_handshakes_end_at_the_deadline() {
    for (kind, say) in [
        (Kind::Tls, &b""[..]),
        (Kind::Tls, b"\x16\x03\x01"),
        (Kind::Ws, b"GET /mqtt HTTP/1.1\r\n"),
        (Kind::Wss, b""),
    ] {
        let mut server = Server::with(kind, |_, limits| {
            limits.accept_deadline = Duration::from_millis(50);
        });
        let mut client = server.tcp().await;
        client.write_all(say).await.expect("written");
        assert_eq!(server.event().await, "failed deadline");
        // Closed or reset, either is an end.
        assert!(matches!(
            soon(client.read(&mut [0; 1])).await,
            Ok(0) | Err(_)
        ));
        assert_eq!(server.cap.used(), 0);
    }
}

#[tokio::test]
async fn quic_without_a_stream_ends_at_the_deadline() {
    let mut server = Server::with(Kind::Quic, |_, limits| {
        limits.accept_deadline = Duration::from_millis(500);
    });
    let (_silent_endpoint, silent) = server.quic().await;
    // Meanwhile another is served.
    let (_endpoint, connection) = server.quic().await;
    let (mut send, _recv) = connection.open_bi().await.expect("a stream");
    send.write_all(b"hello").await.expect("written");
    assert_eq!(recv_n(&mut server.accept().await.stream, 5).await, b"hello");
    assert_eq!(server.event().await, "failed deadline");
    match soon(silent.closed()).await {
        quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, 1u32.into()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_deadline_counts_from_accept() {
    let mut server = Server::start(Kind::Ws);
    let before = tokio::time::Instant::now();
    let _client = server.ws().await;
    let accepted = server.accept().await;
    let ten = Duration::from_secs(10);
    assert!(accepted.deadline >= before + ten);
    assert!(accepted.deadline <= tokio::time::Instant::now() + ten);
}

#[tokio::test]
async fn connections_past_the_cap_are_refused() {
    for kind in [Kind::Tcp, Kind::Quic] {
        let cap = Arc::new(ConnectionCap::new(1));
        let mut server = Server::with(kind, |_, limits| limits.connections = Arc::clone(&cap) as _);
        if kind == Kind::Tcp {
            let _first = server.tcp().await;
            let held = server.accept().await;
            let mut second = server.tcp().await;
            assert_eq!(server.event().await, "refused connections_max");
            assert!(matches!(
                soon(second.read(&mut [0; 1])).await,
                Ok(0) | Err(_)
            ));
            drop(held);
            let _third = server.tcp().await;
            server.accept().await;
        } else {
            let (_endpoint, _connection) = server.quic().await;
            let endpoint = server.quic_endpoint(&["mqtt"]);
            let second = endpoint.connect(server.addr, LOCAL).expect("starts");
            assert!(soon(second).await.is_err());
            assert_eq!(server.event().await, "refused connections_max");
        }
    }
}

#[tokio::test]
async fn quic_asks_for_proof_of_address_under_pressure() {
    // Two half-said TLS handshakes hold two places, of three and of two.
    for places in [3, 2] {
        let handshakes = Handshakes::new(places);
        let busy = Server::with(Kind::Tls, |_, limits| {
            limits.handshakes = handshakes.clone();
        });
        let mut stuck = Vec::new();
        for _ in 0..2 {
            let mut client = busy.tcp().await;
            client.write_all(b"\x16\x03\x01").await.expect("written");
            stuck.push(client);
        }
        while handshakes.running() < 2 {
            tokio::task::yield_now().await;
        }
        let mut server = Server::with(Kind::Quic, |_, limits| {
            limits.handshakes = handshakes.clone();
        });
        let endpoint = server.quic_endpoint(&["mqtt"]);
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        let connected = soon(connecting).await;
        assert_eq!(server.event().await, "retry");
        if places == 3 {
            connected.expect("proved and served");
        } else {
            connected.expect_err("proved, but no place");
            assert_eq!(server.event().await, "refused handshakes_max");
        }
    }
}

#[tokio::test]
async fn stop_closes_the_socket_and_keeps_connections() {
    for kind in [Kind::Tcp, Kind::Quic] {
        let mut server = Server::start(kind);
        if kind == Kind::Tcp {
            let client = server.tcp().await;
            let accepted = server.accept().await;
            server.stop.cancel();
            soon(&mut server.served).await.expect("returns");
            assert!(TcpStream::connect(server.addr).await.is_err());
            tokio::join!(echo(accepted.stream), soon(exercise(client)));
            soon(server.drain.idle()).await;
        } else {
            let (_endpoint, connection) = server.quic().await;
            let (mut tx, mut rx) = connection.open_bi().await.expect("a stream");
            tx.write_all(b"hi").await.expect("written");
            let mut stream = server.accept().await.stream;
            server.stop.cancel();
            soon(&mut server.served).await.expect("returns");
            let late = server.quic_endpoint(&["mqtt"]);
            let late = late.connect(server.addr, LOCAL).expect("starts");
            assert!(soon(late).await.is_err());
            assert_eq!(recv_n(&mut stream, 2).await, b"hi");
            send(&mut stream, 0, b"bye").await.expect("sent");
            let closing = async {
                close(&mut stream, CloseHow::GoingAway).await;
                drop(stream);
                soon(server.drain.idle()).await;
            };
            let (got, ()) = tokio::join!(rx.read_to_end(10), closing);
            assert_eq!(got.expect("all of it"), b"bye");
        }
    }
}

#[tokio::test]
async fn stop_ends_handshakes() {
    let mut server = Server::start(Kind::Ws);
    let mut client = server.tcp().await;
    client.write_all(b"GET /mqtt").await.expect("written");
    // Until it is admitted there is nothing to end.
    while server.cap.used() == 0 {
        tokio::task::yield_now().await;
    }
    server.stop.cancel();
    assert_eq!(server.event().await, "failed stopped");
    assert_eq!(server.cap.used(), 0);
}

// ---- TLS -------------------------------------------------------------------

#[tokio::test]
async fn wrong_alpn_is_refused_by_name() {
    let mut server = Server::start(Kind::Tls);
    server.tls(&["h2"]).await.expect_err("refused");
    assert_eq!(server.event().await, "failed alpn");

    let mut server = Server::start(Kind::Quic);
    for alpn in [&["h3"][..], &[]] {
        let endpoint = server.quic_endpoint(alpn);
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        soon(connecting).await.expect_err("refused");
        assert_eq!(server.event().await, "failed alpn");
    }
}

#[tokio::test]
async fn plain_text_on_a_tls_port_is_named() {
    let mut server = Server::start(Kind::Tls);
    let mut client = server.tcp().await;
    client.write_all(b"\x10\x0c\0\x04MQTT").await.expect("sent");
    assert_eq!(server.event().await, "failed tls");
}

// ---- WebSocket -------------------------------------------------------------

#[tokio::test]
async fn ws_refusals() {
    let mut server = Server::with(Kind::Ws, |spec, _| {
        spec.origins = vec!["https://good.example".into()];
    });
    let wrong_path = websocket(server.tcp().await, "/other", Some("mqtt")).await;
    assert_eq!(status(wrong_path), 404);
    assert_eq!(server.event().await, "failed http_404");
    let none = websocket(server.tcp().await, "/mqtt", None).await;
    assert_eq!(status(none), 400);
    assert_eq!(server.event().await, "failed http_400");
    let other = websocket(server.tcp().await, "/mqtt", Some("amqp")).await;
    assert_eq!(status(other), 400);
    assert_eq!(server.event().await, "failed http_400");

    for (origin, good) in [
        ("https://good.example", true),
        ("https://evil.example", false),
    ] {
        let mut request = format!("ws://{LOCAL}/mqtt")
            .into_client_request()
            .expect("a request");
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", HeaderValue::from_static("mqtt"));
        headers.insert("Origin", HeaderValue::from_static(origin));
        let result = tokio_tungstenite::client_async(request, server.tcp().await).await;
        assert_eq!(result.is_ok(), good, "{origin}");
        if !good {
            assert_eq!(server.event().await, "failed http_403");
        }
    }

    let mut plain = server.tcp().await;
    plain
        .write_all(b"GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = String::new();
    soon(plain.read_to_string(&mut answer))
        .await
        .expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");
}

/// The close frame that comes; then the client's socket is dropped.
async fn until_close(mut ws: WebSocketStream<TcpStream>) -> Option<CloseFrame> {
    loop {
        if let Message::Close(frame) = soon(ws.next()).await.expect("a close frame").expect("good")
        {
            return frame;
        }
    }
}

#[tokio::test]
async fn ws_text_is_1003() {
    let mut server = Server::start(Kind::Ws);
    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    client
        .send(Message::Binary(b"first".to_vec().into()))
        .await
        .expect("sent");
    client.send(Message::text("no")).await.expect("sent");
    // What came before is not lost.
    assert_eq!(recv_n(&mut stream, 5).await, b"first");
    match recv_end(&mut stream).await {
        Closed::Violation { ws_code: 1003, .. } => {}
        other => panic!("{other:?}"),
    }
    let (frame, ()) = tokio::join!(until_close(client), close(&mut stream, CloseHow::Normal));
    assert_eq!(frame.expect("a code").code, CloseCode::Unsupported);
}

#[tokio::test]
async fn ws_message_limit_is_1009_and_rises_with_authentication() {
    let mut server = Server::with(Kind::Ws, |_, limits| limits.packet_max = 300_000);
    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    for (size, authenticate) in [(16 * 1024, true), (300_000 + 64 * 1024, false)] {
        client
            .feed(Message::Binary(pattern(size).into()))
            .await
            .expect("fed");
        let (flushed, got) = tokio::join!(client.flush(), recv_n(&mut stream, size));
        flushed.expect("flushed");
        assert!(got == pattern(size));
        if authenticate {
            stream.authenticated();
        }
    }
    client
        .feed(Message::Binary(pattern(300_000 + 64 * 1024 + 1).into()))
        .await
        .expect("fed");
    let (_, end) = tokio::join!(
        async {
            // The server stops reading, so this need not end.
            tokio::select! {
                biased;
                _ = client.flush() => {}
                () = std::future::ready(()) => {}
            }
        },
        recv_end(&mut stream)
    );
    assert!(matches!(end, Closed::TooLarge), "{end:?}");
    let (frame, ()) = tokio::join!(until_close(client), close(&mut stream, CloseHow::Protocol));
    assert_eq!(frame.expect("a code").code, CloseCode::Size);

    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    client
        .send(Message::Binary(pattern(16 * 1024 + 1).into()))
        .await
        .expect("sent");
    assert!(matches!(recv_end(&mut stream).await, Closed::TooLarge));
}

#[tokio::test]
async fn ws_pings_are_answered_while_only_reading() {
    let mut server = Server::start(Kind::Ws);
    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    client
        .send(Message::Ping(b"are you there".to_vec().into()))
        .await
        .expect("sent");
    let mut buf = Vec::new();
    let pong = tokio::select! {
        pong = soon(client.next()) => pong.expect("a message").expect("good"),
        end = recv(&mut stream, &mut buf) => panic!("{end:?}"),
    };
    assert_eq!(pong, Message::Pong(b"are you there".to_vec().into()));
    // Ours reach the client, which answers by itself.
    soon(poll_fn(|cx| stream.poll_ping(cx)))
        .await
        .expect("sent");
    let ping = soon(client.next()).await.expect("a message").expect("good");
    assert_eq!(ping, Message::Ping(Vec::new().into()));
}

#[tokio::test]
async fn ws_close_codes_are_ours() {
    for (how, code) in [
        (CloseHow::Normal, CloseCode::Normal),
        (CloseHow::GoingAway, CloseCode::Away),
        (CloseHow::Protocol, CloseCode::Protocol),
        (CloseHow::Overload, CloseCode::Again),
    ] {
        let mut server = Server::start(Kind::Ws);
        let mut client = server.ws().await;
        let mut stream = server.accept().await.stream;
        send(&mut stream, 0, b"last packet").await.expect("sent");
        let reading = async {
            let last = soon(client.next()).await.expect("a message").expect("good");
            assert_eq!(last, Message::Binary(b"last packet".to_vec().into()));
            let close = soon(client.next()).await.expect("a message").expect("good");
            // Drives the answer and sees the end of the socket.
            assert!(soon(client.next()).await.is_none());
            close
        };
        let (last, ()) = tokio::join!(reading, close(&mut stream, how));
        match last {
            Message::Close(Some(frame)) => assert_eq!(frame.code, code),
            other => panic!("{other:?}"),
        }
    }
}

// ---- ends ------------------------------------------------------------------

#[tokio::test]
async fn the_last_packet_survives_unread_input() {
    let mut server = Server::start(Kind::Tcp);
    let mut client = server.tcp().await;
    let mut stream = server.accept().await.stream;
    // A flood that the server never reads; then the server says why and closes.
    client.write_all(&pattern(100_000)).await.expect("sent");
    send(&mut stream, 0, b"because").await.expect("sent");
    let reading = async {
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.expect("no reset");
        drop(client);
        got
    };
    let (got, ()) = tokio::join!(reading, close(&mut stream, CloseHow::Protocol));
    assert_eq!(got, b"because");
}

#[tokio::test]
async fn a_reset_is_named() {
    let mut server = Server::start(Kind::Tcp);
    let client = server.tcp().await;
    let mut stream = server.accept().await.stream;
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .expect("set");
    drop(client);
    assert!(matches!(recv_end(&mut stream).await, Closed::Reset(_)));
}

#[tokio::test]
async fn a_pipe_is_a_stream() {
    let (ours, theirs) = tokio::io::duplex(1000);
    tokio::join!(echo(Stream::pipe(ours)), soon(exercise(theirs)));
}

// ---- QUIC ------------------------------------------------------------------

#[tokio::test]
async fn quic_data_lanes_wait_for_authentication() {
    let mut server = Server::start(Kind::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    let (mut data, mut data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"early").await.expect("written");
    control.write_all(b"connect").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 7).await, b"connect");
    let mut buf = Vec::new();
    let nothing =
        poll_fn(|cx| std::task::Poll::Ready(stream.poll_recv(cx, &mut buf).is_pending())).await;
    assert!(nothing, "data before authentication");
    stream.authenticated();
    let got = recv(&mut stream, &mut buf).await.expect("the data lane");
    assert_eq!((got.lane, got.bytes), (1, 5));
    assert_eq!(buf, b"early");

    // Answers go back on the lane.
    send(&mut stream, 1, b"ack").await.expect("sent");
    let mut ack = [0; 3];
    soon(data_rx.read_exact(&mut ack)).await.expect("read");
    assert_eq!(&ack, b"ack");

    // The client ends the lane: FIN back, and the connection lives.
    data.finish().expect("open");
    let end = recv(&mut stream, &mut buf).await.expect("lane end");
    assert!(end.lane == 1 && end.bytes == 0 && end.lane_closed);
    assert_eq!(soon(data_rx.read(&mut ack)).await.expect("FIN"), None);
    let gone = send(&mut stream, 1, b"late").await.expect_err("gone");
    assert!(matches!(gone, Closed::Lane(1)));
    control.write_all(b"more").await.expect("written");
    assert_eq!(recv_n(&mut stream, 4).await, b"more");
}

#[tokio::test]
async fn quic_lanes_come_and_go_without_end() {
    let mut server = Server::start(Kind::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (mut control, mut control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"c").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 1).await, b"c");
    stream.authenticated();
    let client = async {
        for round in 0..5 {
            // 15 at once are allowed beside control.
            let mut open = Vec::new();
            for _ in 0..15 {
                let (mut tx, rx) = soon(connection.open_bi()).await.expect("credit");
                tx.write_all(b"data").await.expect("written");
                open.push((tx, rx));
            }
            for (i, (mut tx, mut rx)) in open.into_iter().enumerate() {
                if i % 2 == round % 2 {
                    tx.finish().expect("open");
                } else {
                    tx.reset(31u32.into()).expect("open");
                }
                let end = soon(rx.read_to_end(10)).await.expect("FIN");
                assert!(end.is_empty() || end == b"ok");
            }
        }
        control.write_all(b"done").await.expect("written");
        soon(control_rx.read_exact(&mut [0; 4])).await.expect("ok");
    };
    let serving = async {
        let mut buf = Vec::new();
        let mut closed = 0;
        loop {
            buf.clear();
            let got = recv(&mut stream, &mut buf).await.expect("goes on");
            assert!(got.lane < 16);
            closed += usize::from(got.lane_closed);
            if got.lane == 0 {
                break;
            }
        }
        assert_eq!(closed, 75);
        send(&mut stream, 0, b"done").await.expect("sent");
    };
    tokio::join!(client, serving);
}

#[tokio::test]
async fn quic_reset_lane_spares_the_connection() {
    let mut server = Server::start(Kind::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"c").await.expect("written");
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    assert_eq!(recv_n(&mut stream, 1).await, b"c");
    let (mut data, mut data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"bad").await.expect("written");
    let mut buf = Vec::new();
    let got = recv(&mut stream, &mut buf).await.expect("data");
    stream.reset_lane(got.lane, 0x81);
    match soon(data_rx.read(&mut [0; 1])).await {
        Err(quinn::ReadError::Reset(code)) => assert_eq!(code, 0x81u32.into()),
        other => panic!("{other:?}"),
    }
    let stopped = soon(data.stopped()).await.expect("connection lives");
    assert_eq!(stopped, Some(0x81u32.into()));
    control.write_all(b"on").await.expect("written");
    assert_eq!(recv_n(&mut stream, 2).await, b"on");
}

#[tokio::test]
async fn quic_control_end_is_the_connections_end() {
    let mut server = Server::start(Kind::Quic);
    for reset in [false, true] {
        let (_endpoint, connection) = server.quic().await;
        let (mut control, _control_rx) = connection.open_bi().await.expect("control");
        control.write_all(b"bye").await.expect("written");
        let mut stream = server.accept().await.stream;
        assert_eq!(recv_n(&mut stream, 3).await, b"bye");
        if reset {
            control.reset(9u32.into()).expect("open");
            assert!(matches!(recv_end(&mut stream).await, Closed::Reset(_)));
        } else {
            control.finish().expect("open");
            assert!(matches!(recv_end(&mut stream).await, Closed::Eof));
        }
    }
}

#[tokio::test]
async fn quic_bytes_before_connection_close_are_read() {
    let mut server = Server::start(Kind::Quic);
    let (endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"connect").await.expect("written");
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    let (mut data, _data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"publish").await.expect("written");
    control.write_all(b"disconnect").await.expect("written");
    control.finish().expect("open");
    // All is acknowledged by the server's socket, nothing read by us.
    soon(control.stopped()).await.expect("delivered");
    connection.close(0u32.into(), b"");
    soon(endpoint.wait_idle()).await;
    let (mut control_got, mut data_got) = (Vec::new(), Vec::new());
    let end = loop {
        let mut buf = Vec::new();
        match recv(&mut stream, &mut buf).await {
            Ok(got) if got.lane == 0 => control_got.extend(buf),
            Ok(_) => data_got.extend(buf),
            Err(end) => break end,
        }
    };
    assert_eq!(control_got, b"connectdisconnect");
    assert_eq!(data_got, b"publish");
    assert!(matches!(end, Closed::Eof), "{end:?}");
}

#[tokio::test]
async fn quic_close_codes_are_ours() {
    for (how, code) in [
        (CloseHow::Normal, 0u32),
        (CloseHow::Protocol, 1),
        (CloseHow::Overload, 2),
    ] {
        let mut server = Server::start(Kind::Quic);
        let (_endpoint, connection) = server.quic().await;
        let (mut control, mut control_rx) = connection.open_bi().await.expect("control");
        control.write_all(b"x").await.expect("written");
        let mut stream = server.accept().await.stream;
        let last = pattern(100_000);
        let serving = async {
            send(&mut stream, 0, &last).await.expect("sent");
            close(&mut stream, how).await;
        };
        let (got, ()) = tokio::join!(control_rx.read_to_end(200_000), serving);
        assert!(got.expect("all before the close") == last);
        match soon(connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, code.into()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn quic_migration_is_followed_and_counted() {
    let mut server = Server::start(Kind::Quic);
    let (endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"here").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 4).await, b"here");
    assert_eq!(stream.peer_addr(), endpoint.local_addr().expect("bound"));
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("binds");
    endpoint.rebind(socket).expect("moves");
    control.write_all(b"there").await.expect("written");
    assert_eq!(recv_n(&mut stream, 5).await, b"there");
    assert_eq!(server.event().await, "migrated");
    assert_eq!(stream.peer_addr(), endpoint.local_addr().expect("bound"));
}

#[tokio::test]
async fn quic_allows_no_unidirectional_stream_and_15_data_streams() {
    let mut server = Server::start(Kind::Quic);
    let (_endpoint, connection) = server.quic().await;
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(soon(connection.open_bi()).await.expect("credit"));
    }
    open[0].0.write_all(b"x").await.expect("written");
    let _accepted = server.accept().await;
    // Credit came with the handshake, so "none yet" is "none".
    use futures_util::FutureExt;
    assert!(connection.open_bi().now_or_never().is_none());
    assert!(connection.open_uni().now_or_never().is_none());
}

// ---- dialling --------------------------------------------------------------

struct TempDir(std::path::PathBuf);

impl TempDir {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("tidegate-dial-{}-{n}", std::process::id())))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const SECONDS: Duration = Duration::from_secs(5);

#[tokio::test]
async fn dial_tcp_and_its_failures() {
    let mut server = Server::start(Kind::Tcp);
    let target = |host: &str, port| DialTarget::Tcp {
        host: host.into(),
        port,
    };
    let dialed = dial(&target(LOCAL, server.addr.port()), None, SECONDS)
        .await
        .expect("connects");
    assert!(matches!(dialed, Dialed::Tcp(_)));
    let accepted = server.accept().await;
    tokio::join!(echo(accepted.stream), soon(exercise(dialed)));

    server.stop.cancel();
    soon(&mut server.served).await.expect("returns");
    let refused = dial(&target("127.0.0.1", server.addr.port()), None, SECONDS).await;
    assert_eq!(refused.expect_err("nobody there").label(), "refused");
    let unknown = dial(&target("no-such-host.invalid", 1), None, SECONDS).await;
    assert_eq!(unknown.expect_err("no such name").label(), "resolve");
}

#[tokio::test]
async fn dial_tls_and_its_failures() {
    let dir = TempDir::new();
    let files = selfsigned::generate(&dir.0, &[LOCAL.to_owned(), "127.0.0.1".to_owned()])
        .expect("generated");
    let mut server = Server::with(Kind::Tls, |spec, _| {
        let tls = ServerTls::load(&files.cert, &files.key).expect("loads");
        spec.tls = Some(Arc::new(tls));
    });
    let port = server.addr.port();
    let client = |ca: &std::path::Path, name: Option<&str>, alpn: &str| {
        ClientTls::load(
            Some(ca),
            None,
            None,
            name.map(str::to_owned),
            vec![alpn.to_owned()],
        )
        .expect("loads")
    };
    let target = |host: &str| DialTarget::Tls {
        host: host.into(),
        port,
    };

    let good = client(&files.ca, None, "mqtt");
    for host in ["127.0.0.1", LOCAL] {
        let dialed = dial(&target(host), Some(&good), SECONDS)
            .await
            .expect("connects");
        let accepted = server.accept().await;
        tokio::join!(echo(accepted.stream), soon(exercise(dialed)));
    }

    let other_dir = TempDir::new();
    let other = selfsigned::generate(&other_dir.0, &[LOCAL.to_owned()]).expect("generated");
    for (tls, label) in [
        (client(&other.ca, None, "mqtt"), "tls_unknown_ca"),
        (
            client(&files.ca, Some("elsewhere.example"), "mqtt"),
            "tls_name_mismatch",
        ),
        (client(&files.ca, None, "h2"), "tls_other"),
    ] {
        let error = dial(&target("127.0.0.1"), Some(&tls), SECONDS)
            .await
            .expect_err("refused");
        assert_eq!(error.label(), label, "{error}");
    }
    let settings = dial(&target("127.0.0.1"), None, SECONDS).await;
    assert!(matches!(settings, Err(DialError::Settings(_))));
}

#[tokio::test]
async fn dial_times_out_on_a_silent_server() {
    // Accepts, but never speaks TLS.
    let dir = TempDir::new();
    let files = selfsigned::generate(&dir.0, &[LOCAL.to_owned()]).expect("generated");
    let tls = ClientTls::load(Some(&files.ca), None, None, None, vec![]).expect("loads");
    let mut server = Server::start(Kind::Tcp);
    let target = DialTarget::Tls {
        host: "127.0.0.1".into(),
        port: server.addr.port(),
    };
    let error = dial(&target, Some(&tls), Duration::from_millis(50))
        .await
        .expect_err("silence");
    assert_eq!(error.label(), "timeout");
    drop(server.accept().await);
}

#[tokio::test]
async fn handshake_errors_have_bounded_labels() {
    let labels: Mutex<Vec<_>> = Mutex::default();
    for error in [
        HandshakeError::Deadline,
        HandshakeError::Stopped,
        HandshakeError::Alpn("mqtt"),
        HandshakeError::Tls("peer's words".into()),
        HandshakeError::Quic("peer's words".into()),
        HandshakeError::Http {
            status: 599,
            reason: "x",
        },
    ] {
        labels.lock().push(error.label());
    }
    let want = ["deadline", "stopped", "alpn", "tls", "quic", "http_other"];
    assert_eq!(*labels.lock(), want);
}
