//! Dialling a broker over TCP, TLS and WebSocket.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tidegate::config::Transport;
use tidegate::transport::dial::{DialError, DialTarget, Dialed, TlsFailure, dial};
use tidegate::transport::{ClientTls, ServerTls, selfsigned};

use crate::transport::common::*;

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
    let mut server = Server::start(Transport::Tcp);
    let target = |host: &str, port| target(host, port, false, None);
    let dialed = dial(&target(LOCAL, server.addr.port()), None, SECONDS)
        .await
        .expect("connects");
    assert!(matches!(dialed, Dialed::Tcp(_)));
    let accepted = server.accept().await;
    tokio::join!(echo(accepted.stream), soon(exercise(dialed)));

    server.stop.cancel();
    soon(&mut server.served).await.expect("returns");
    let refused = dial(&target("127.0.0.1", server.addr.port()), None, SECONDS).await;
    assert!(matches!(refused, Err(DialError::Refused(_))));
    let unknown = dial(&target("no-such-host.invalid", 1), None, SECONDS).await;
    assert!(matches!(unknown, Err(DialError::Resolve { .. })));
}

#[tokio::test]
async fn dial_tls_and_its_failures() {
    let dir = TempDir::new();
    let files = selfsigned::generate(&dir.0, &[LOCAL.to_owned(), "127.0.0.1".to_owned()])
        .expect("generated");
    let tls = ServerTls::load(&files.cert, &files.key).expect("loads");
    let mut server = Server::with_tls(Transport::Tls, tls, |_, _| {});
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
    let target = |host: &str| target(host, port, true, None);

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
    for (tls, failure) in [
        (client(&other.ca, None, "mqtt"), TlsFailure::UnknownCa),
        (
            client(&files.ca, Some("elsewhere.example"), "mqtt"),
            TlsFailure::NameMismatch,
        ),
        (client(&files.ca, None, "h2"), TlsFailure::Other),
    ] {
        let error = dial(&target("127.0.0.1"), Some(&tls), SECONDS)
            .await
            .expect_err("refused");
        assert!(
            matches!(error, DialError::Tls { reason, .. } if reason == failure),
            "{error}"
        );
    }
    let settings = dial(&target("127.0.0.1"), None, SECONDS).await;
    assert!(matches!(settings, Err(DialError::NoTlsSettings)));
}

#[tokio::test]
async fn dial_websockets_and_their_failures() {
    let dir = TempDir::new();
    let files = selfsigned::generate(&dir.0, &[LOCAL.to_owned()]).expect("generated");
    let trust = ClientTls::load(Some(&files.ca), None, None, None, vec![]).expect("loads");
    for (transport, tls) in [(Transport::Ws, None), (Transport::Wss, Some(&trust))] {
        let own = ServerTls::load(&files.cert, &files.key).expect("loads");
        let mut server = Server::with_tls(transport, own, |_, _| {});
        let port = server.addr.port();
        let path = |path| target(LOCAL, port, tls.is_some(), Some(path));
        let dialed = dial(&path("/mqtt"), tls, SECONDS).await.expect("connects");
        let accepted = server.accept().await;
        tokio::join!(echo(accepted.stream), soon(exercise(dialed)));

        let error = dial(&path("/elsewhere"), tls, SECONDS).await;
        let error = error.expect_err("another path");
        assert!(matches!(error, DialError::WebSocket(_)), "{error}");
        assert!(error.to_string().contains("404"), "{error}");
    }
}

fn target(host: &str, port: u16, tls: bool, path: Option<&str>) -> DialTarget {
    DialTarget {
        host: host.into(),
        port,
        tls,
        path: path.map(str::to_owned),
    }
}

#[tokio::test]
async fn dial_times_out_on_a_silent_server() {
    // Accepts, but never speaks TLS.
    let dir = TempDir::new();
    let files = selfsigned::generate(&dir.0, &[LOCAL.to_owned()]).expect("generated");
    let tls = ClientTls::load(Some(&files.ca), None, None, None, vec![]).expect("loads");
    let mut server = Server::start(Transport::Tcp);
    let target = target("127.0.0.1", server.addr.port(), true, None);
    let error = dial(&target, Some(&tls), Duration::from_millis(500))
        .await
        .expect_err("silence");
    assert!(matches!(error, DialError::Timeout), "{error}");
    drop(server.accept().await);
}
