//! Listeners of every transport: bytes in both directions, accepting, deadlines, ends.

use std::sync::Arc;
use std::time::Duration;

use tidegate::config::Transport;
use tidegate::transport::{CloseHow, Closed, ConnectionCap, Handshakes, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::transport::common::*;

#[tokio::test]
async fn tcp_echoes_and_half_closes() {
    let mut server = Server::start(Transport::Tcp);
    let client = server.tcp().await;
    let local = client.local_addr().expect("bound");
    let accepted = server.accept().await;
    assert_eq!(accepted.peer, local);
    assert_eq!(accepted.stream.current_peer(), None);
    assert_eq!(accepted.stream.transport(), Transport::Tcp);
    tokio::join!(echo(accepted.stream), soon(exercise(client)));
}

#[tokio::test]
async fn tls_echoes_with_and_without_alpn() {
    let mut server = Server::start(Transport::Tls);
    for alpn in [&["mqtt"][..], &[]] {
        let client = server.tls(alpn).await.expect("handshake");
        let accepted = server.accept().await;
        assert_eq!(accepted.stream.transport(), Transport::Tls);
        tokio::join!(echo(accepted.stream), soon(exercise(client)));
    }
}

#[tokio::test]
async fn ws_echoes() {
    let mut server = Server::start(Transport::Ws);
    let client = server.ws().await;
    let mut accepted = server.accept().await;
    assert_eq!(accepted.stream.transport(), Transport::Ws);
    accepted.stream.authenticated();
    tokio::join!(echo(accepted.stream), soon(exercise_ws(client)));
}

#[tokio::test]
async fn wss_echoes() {
    let mut server = Server::start(Transport::Wss);
    let tls = server.tls(&["http/1.1"]).await.expect("handshake");
    let client = websocket(tls, "/mqtt", Some("mqttv3.1"))
        .await
        .expect("upgraded");
    let mut accepted = server.accept().await;
    assert_eq!(accepted.stream.transport(), Transport::Wss);
    accepted.stream.authenticated();
    tokio::join!(echo(accepted.stream), soon(exercise_ws(client)));
}

#[tokio::test]
async fn quic_echoes() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (send, recv) = connection.open_bi().await.expect("a stream");
    let client = tokio::io::join(recv, send);
    let exercise = soon(exercise(client));
    let echo = async {
        let accepted = server.accept().await;
        assert_eq!(accepted.stream.transport(), Transport::Quic);
        echo(accepted.stream).await;
    };
    tokio::join!(echo, exercise);
    match soon(connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, 0u32.into()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn silent_clients_take_no_handshake_permit() {
    for kind in [Transport::Tls, Transport::Ws, Transport::Wss] {
        // There is one permit, and a silent client must not take it.
        let mut server = Server::with(kind, |_, limits| limits.handshakes = Handshakes::new(1));
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(server.tcp().await);
        }
        if kind == Transport::Ws {
            let _client = server.ws().await;
            server.accept().await;
            continue;
        }
        let mut tls = server.tls(&[]).await.expect("handshake");
        if kind == Transport::Wss {
            websocket(&mut tls, "/mqtt", Some("mqtt"))
                .await
                .expect("upgraded");
        }
        server.accept().await;
    }
}

#[tokio::test]
async fn slow_handshakes_end_at_the_deadline_and_delay_no_other_client() {
    const SLOW: usize = 20;
    for (kind, say) in [
        (Transport::Tls, &b""[..]),
        (Transport::Tls, b"\x16\x03\x01"),
        (Transport::Ws, b"GET /mqtt HTTP/1.1\r\n"),
        (Transport::Wss, b""),
        (Transport::Wss, b"\x16\x03\x01"),
    ] {
        let mut server = Server::with(kind, |_, limits| {
            limits.accept_deadline = Duration::from_secs(2);
        });
        let mut slow = Vec::new();
        for _ in 0..SLOW {
            let mut client = server.tcp().await;
            client.write_all(say).await.expect("written");
            slow.push(client);
        }
        match kind {
            Transport::Ws => drop(server.ws().await),
            Transport::Tls => drop(server.tls(&[]).await.expect("handshake")),
            _ => {
                let tls = server.tls(&[]).await.expect("handshake");
                let upgraded = websocket(tls, "/mqtt", Some("mqtt")).await;
                drop(upgraded.expect("upgraded"));
            }
        }
        server.accept().await;
        for mut client in slow {
            assert_eq!(server.event().await, "failed deadline");
            // The connection may be closed or reset.
            assert!(matches!(
                soon(client.read(&mut [0; 1])).await,
                Ok(0) | Err(_)
            ));
        }
        assert_eq!(server.cap.used(), 0);
    }
}

#[tokio::test]
async fn the_deadline_counts_from_accept() {
    let mut server = Server::start(Transport::Ws);
    let before = tokio::time::Instant::now();
    let _client = server.ws().await;
    let accepted = server.accept().await;
    let ten = Duration::from_secs(10);
    assert!(accepted.deadline >= before + ten);
    assert!(accepted.deadline <= tokio::time::Instant::now() + ten);
}

#[tokio::test]
async fn connections_past_the_cap_are_refused() {
    for kind in [Transport::Tcp, Transport::Quic] {
        let cap = Arc::new(ConnectionCap::new(1));
        let mut server = Server::with(kind, |_, limits| limits.connections = Arc::clone(&cap));
        if kind == Transport::Tcp {
            let _first = server.tcp().await;
            let kept = server.accept().await;
            let mut second = server.tcp().await;
            assert_eq!(server.event().await, "refused connections_max");
            assert!(matches!(
                soon(second.read(&mut [0; 1])).await,
                Ok(0) | Err(_)
            ));
            drop(kept);
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
async fn stop_closes_the_socket_and_keeps_connections() {
    for kind in [Transport::Tcp, Transport::Quic] {
        let mut server = Server::start(kind);
        if kind == Transport::Tcp {
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
    let mut server = Server::start(Transport::Ws);
    let mut client = server.tcp().await;
    client.write_all(b"GET /mqtt").await.expect("written");
    // The handshake begins when the connection is admitted.
    while server.cap.used() == 0 {
        tokio::task::yield_now().await;
    }
    server.stop.cancel();
    assert_eq!(server.event().await, "failed stopped");
    assert_eq!(server.cap.used(), 0);
}

#[tokio::test]
async fn wrong_alpn_is_refused_by_name() {
    let mut server = Server::start(Transport::Tls);
    server.tls(&["h2"]).await.expect_err("refused");
    assert_eq!(server.event().await, "failed alpn");

    let mut server = Server::start(Transport::Quic);
    for alpn in [&["h3"][..], &[]] {
        let endpoint = server.quic_endpoint(alpn);
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        soon(connecting).await.expect_err("refused");
        assert_eq!(server.event().await, "failed alpn");
    }
}

#[tokio::test]
async fn plain_text_on_a_tls_port_is_named() {
    let mut server = Server::start(Transport::Tls);
    let mut client = server.tcp().await;
    client.write_all(b"\x10\x0c\0\x04MQTT").await.expect("sent");
    assert_eq!(server.event().await, "failed tls");
}

#[tokio::test]
async fn the_last_packet_survives_unread_input() {
    let mut server = Server::start(Transport::Tcp);
    let mut client = server.tcp().await;
    let mut stream = server.accept().await.stream;
    // The server never reads the flood, sends a last packet, and closes.
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
    let mut server = Server::start(Transport::Tcp);
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

#[tokio::test]
async fn a_client_that_does_not_trust_the_certificate_is_named_as_such() {
    let trusted_instead = Server::start(Transport::Tls).cert;
    for (transport, alpn) in [(Transport::Tls, "mqtt"), (Transport::Wss, "http/1.1")] {
        for version in rustls::ALL_VERSIONS {
            let mut server = Server::start(transport);
            server.cert = trusted_instead.clone();
            let config = server.client_tls_of(&[version], &[alpn]);
            let name = LOCAL.try_into().expect("a name");
            let io = server.tcp().await;
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            soon(connector.connect(name, io))
                .await
                .expect_err("no trust");
            // Both certificates have one issuer's name, and different keys.
            assert_eq!(
                server.event().await,
                "failed refused_by_client DecryptError"
            );
        }
    }
    for (webtransport, alpn) in [(false, "mqtt"), (true, "h3")] {
        let mut server = Server::with(Transport::Quic, |listener, _| {
            listener.webtransport = webtransport;
        });
        server.cert = trusted_instead.clone();
        let endpoint = server.quic_endpoint(&[alpn]);
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        soon(connecting).await.expect_err("no trust");
        assert_eq!(
            server.event().await,
            "failed refused_by_client DecryptError"
        );
    }
}

#[tokio::test]
async fn a_tls_client_that_leaves_without_a_request_is_named_as_such() {
    let mut server = Server::start(Transport::Wss);
    let mut client = server.tls(&["http/1.1"]).await.expect("handshake");
    client.shutdown().await.expect("closed");
    assert_eq!(server.event().await, "failed no_request");
}
