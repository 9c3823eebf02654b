//! The server under test and its clients.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::{CertificateDer, ServerName};
use tidegate::config::{Listener, Transport};
use tidegate::streams::StreamId;
use tidegate::transport::{
    AcceptError, Accepted, CertificateFault, CloseHow, Closed, ConnectionCap, Drain, Events,
    HandshakeError, Limits, OutBuf, Recv, RefusalReason, RequestError, ServerTls, Stream, bind,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_util::sync::CancellationToken;

pub(super) const LOCAL: &str = "localhost";

/// Turns the events of a listener into words and passes them on.
struct Reports {
    log: mpsc::UnboundedSender<String>,
}

impl Reports {
    fn send(&self, words: impl Into<String>) {
        // The test may have ended.
        let _ = self.log.send(words.into());
    }
}

impl Events for Reports {
    fn accept_failed(&self, error: &AcceptError) {
        self.send(format!("accept failed: {error}"));
    }
    fn refused(&self, reason: RefusalReason) {
        self.send(match reason {
            RefusalReason::Connections => "refused connections_max",
            RefusalReason::Handshakes => "refused handshakes_max",
        });
    }
    fn handshake_failed(&self, _: SocketAddr, error: &HandshakeError) {
        self.send(format!("failed {}", kind_of(error)));
    }
    fn health_checked(&self) {
        self.send("health");
    }
    fn retry_sent(&self) {
        self.send("retry");
    }
    fn uni_stream_stopped(&self, _: SocketAddr) {
        self.send("uni stream stopped");
    }
    fn migrated(&self, from: SocketAddr, to: SocketAddr) {
        assert_ne!(from, to);
        self.send("migrated");
    }
}

fn kind_of(error: &HandshakeError) -> String {
    match error {
        HandshakeError::Deadline => "deadline".into(),
        HandshakeError::Stopped => "stopped".into(),
        HandshakeError::Io(_) => "io".into(),
        HandshakeError::Silent => "closed".into(),
        HandshakeError::Tls { .. } => "tls".into(),
        HandshakeError::CertificateRefused { alert } => format!("refused_by_client {alert}"),
        HandshakeError::NoRequest => "no_request".into(),
        HandshakeError::ClientCertificate { fault, .. } => match fault {
            CertificateFault::Missing => "certificate_missing".into(),
            CertificateFault::Expired => "certificate_expired".into(),
            CertificateFault::Revoked => "certificate_revoked".into(),
            CertificateFault::Untrusted => "certificate_untrusted".into(),
            CertificateFault::Other => "certificate_other".into(),
        },
        HandshakeError::Alpn(_) => "alpn".into(),
        HandshakeError::Proxy(_) => "proxy_protocol".into(),
        HandshakeError::Request(RequestError::Subprotocol) => "subprotocol".into(),
        HandshakeError::Request(error) => format!("http_{}", error.status()),
        HandshakeError::Quic(_) => "quic".into(),
        HandshakeError::WebTransport(_) => "webtransport".into(),
    }
}

pub(super) struct Server {
    pub addr: SocketAddr,
    pub cert: CertificateDer<'static>,
    pub events: mpsc::UnboundedReceiver<String>,
    pub accepted: mpsc::UnboundedReceiver<Accepted>,
    pub cap: Arc<ConnectionCap>,
    pub stop: CancellationToken,
    pub drain: Drain,
    pub served: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(super) fn start(transport: Transport) -> Self {
        Self::with(transport, |_, _| {})
    }

    /// Accepted connections come out of `self.accepted`.
    pub(super) fn with(
        transport: Transport,
        change: impl FnOnce(&mut Listener, &mut Limits),
    ) -> Self {
        let tls = ServerTls::ephemeral(&[LOCAL.to_owned(), "127.0.0.1".to_owned()]);
        Self::with_tls(transport, tls.expect("certificate"), change)
    }

    pub(super) fn with_tls(
        transport: Transport,
        tls: ServerTls,
        change: impl FnOnce(&mut Listener, &mut Limits),
    ) -> Self {
        let (log, events) = mpsc::unbounded_channel();
        let (send, accepted) = mpsc::unbounded_channel();
        let tls = Arc::new(tls);
        let cert = CertificateDer::from(tls.leaf());
        let cap = Arc::new(ConnectionCap::new(1000));
        let mut listener = Listener::new(transport, ([127, 0, 0, 1], 0).into());
        let mut limits = Limits {
            connections: Arc::clone(&cap),
            ..Limits::default()
        };
        change(&mut listener, &mut limits);
        let reports = Arc::new(Reports { log });
        let bound = bind(listener, Some(tls), Arc::new(limits), reports).expect("binds");
        let (addr, drain) = (bound.local_addr(), bound.drain());
        let stop = CancellationToken::new();
        let handler = move |accepted: Accepted| {
            let send = send.clone();
            async move {
                let _ = send.send(accepted);
                None
            }
        };
        let served = tokio::spawn({
            let stop = stop.clone();
            async move { bound.serve(handler, stop).await }
        });
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

    pub(super) async fn accept(&mut self) -> Accepted {
        soon(self.accepted.recv()).await.expect("server runs")
    }

    pub(super) async fn event(&mut self) -> String {
        soon(self.events.recv()).await.expect("server runs")
    }

    pub(super) fn client_tls(&self, alpn: &[&str]) -> rustls::ClientConfig {
        self.client_tls_of(rustls::DEFAULT_VERSIONS, alpn)
    }

    pub(super) fn client_tls_of(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
        alpn: &[&str],
    ) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.cert.clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|a| a.as_bytes().to_vec()).collect();
        config
    }

    pub(super) async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.expect("connects")
    }

    pub(super) async fn tls(
        &self,
        alpn: &[&str],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        self.tls_on(self.tcp().await, alpn).await
    }

    /// A TLS handshake on a connection that may have carried other bytes before.
    pub(super) async fn tls_on(
        &self,
        io: TcpStream,
        alpn: &[&str],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(LOCAL).expect("a name");
        TlsConnector::from(Arc::new(self.client_tls(alpn)))
            .connect(name, io)
            .await
    }

    pub(super) async fn ws(&self) -> WebSocketStream<TcpStream> {
        websocket(self.tcp().await, "/mqtt", Some("mqtt"))
            .await
            .expect("upgraded")
    }

    pub(super) fn quic_endpoint(&self, alpn: &[&str]) -> quinn::Endpoint {
        self.quic_endpoint_at([127, 0, 0, 1], alpn)
    }

    pub(super) fn quic_endpoint_at(&self, ip: [u8; 4], alpn: &[&str]) -> quinn::Endpoint {
        use quinn::crypto::rustls::QuicClientConfig;
        let crypto = QuicClientConfig::try_from(self.client_tls(alpn)).expect("TLS 1.3");
        let mut endpoint = quinn::Endpoint::client((ip, 0).into()).expect("client endpoint");
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        endpoint
    }

    pub(super) async fn quic(&self) -> (quinn::Endpoint, quinn::Connection) {
        let endpoint = self.quic_endpoint(&["mqtt"]);
        let connecting = endpoint.connect(self.addr, LOCAL).expect("starts");
        (endpoint, soon(connecting).await.expect("connects"))
    }
}

/// Waits for something that must happen, but not for long.
pub(super) async fn soon<F: Future>(f: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), f)
        .await
        .expect("must happen soon")
}

pub(super) async fn websocket<S>(
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

pub(super) fn status(result: Result<WebSocketStream<TcpStream>, WsError>) -> u16 {
    match result {
        Err(WsError::Http(response)) => response.status().as_u16(),
        other => panic!("expected an HTTP error, got {other:?}"),
    }
}

pub(super) async fn recv(stream: &mut Stream, buf: &mut Vec<u8>) -> Result<Recv, Closed> {
    soon(poll_fn(|cx| stream.poll_recv(cx, buf))).await
}

/// Reads `n` bytes of the control stream.
pub(super) async fn recv_n(stream: &mut Stream, n: usize) -> Vec<u8> {
    let mut buf = Vec::new();
    while buf.len() < n {
        let got = recv(stream, &mut buf).await.expect("bytes");
        assert!(got.stream == StreamId::CONTROL && got.bytes > 0 && !got.finished);
    }
    buf
}

pub(super) async fn recv_end(stream: &mut Stream) -> Closed {
    let mut buf = Vec::new();
    let end = recv(stream, &mut buf).await.expect_err("an end");
    assert!(buf.is_empty());
    end
}

pub(super) async fn send(stream: &mut Stream, number: u8, bytes: &[u8]) -> Result<(), Closed> {
    let mut out = OutBuf::from(bytes.to_vec());
    soon(poll_fn(|cx| {
        stream.poll_send(cx, StreamId::new(number), &mut out)
    }))
    .await?;
    assert!(out.is_empty());
    Ok(())
}

pub(super) async fn close(stream: &mut Stream, how: CloseHow) {
    soon(poll_fn(|cx| stream.poll_close(cx, how))).await;
}

pub(super) fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i % 251) as u8).collect()
}

/// Sends all received bytes back, until the end.
pub(super) async fn echo(mut stream: Stream) {
    let mut out = OutBuf::default();
    while recv(&mut stream, &mut out.buf).await.is_ok() {
        soon(poll_fn(|cx| {
            stream.poll_send(cx, StreamId::CONTROL, &mut out)
        }))
        .await
        .expect("sent");
    }
    close(&mut stream, CloseHow::Normal).await;
}

/// Sends large and small messages and reads them back, then ends the client's direction.
pub(super) async fn exercise<S: AsyncRead + AsyncWrite + Unpin>(io: S) {
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

pub(super) async fn exercise_ws<S: AsyncRead + AsyncWrite + Unpin>(mut ws: WebSocketStream<S>) {
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
