//! QUIC: streams, migration, close codes, pressure.

use std::future::poll_fn;
use std::time::Duration;

use tidegate::config::Transport;
use tidegate::transport::{CloseHow, Closed, Handshakes, Stream};
use tokio::io::AsyncWriteExt;

use crate::transport::common::*;
use tidegate::streams::StreamId;

/// An authenticated client, which may open data streams.
async fn connect_client(
    server: &mut Server,
) -> (
    quinn::Endpoint,
    quinn::Connection,
    (quinn::SendStream, quinn::RecvStream),
    Stream,
) {
    let (endpoint, connection) = server.quic().await;
    let (mut control, control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"c").await.expect("written");
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    assert_eq!(recv_n(&mut stream, 1).await, b"c");
    (endpoint, connection, (control, control_rx), stream)
}

#[tokio::test]
async fn quic_data_streams_wait_for_authentication() {
    let mut server = Server::start(Transport::Quic);
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
    let got = recv(&mut stream, &mut buf).await.expect("the data stream");
    assert_eq!((got.stream, got.bytes), (StreamId::new(1), 5));
    assert_eq!(buf, b"early");

    // Answers are sent on the same stream.
    send(&mut stream, 1, b"ack").await.expect("sent");
    let mut ack = [0; 3];
    soon(data_rx.read_exact(&mut ack)).await.expect("read");
    assert_eq!(&ack, b"ack");

    // The client ends its direction; the connection goes on.
    data.finish().expect("open");
    let end = recv(&mut stream, &mut buf).await.expect("stream end");
    assert!(end.stream == StreamId::new(1) && end.bytes == 0 && end.finished);
    // Answers are still sent.
    send(&mut stream, 1, b"all").await.expect("sent");
    soon(data_rx.read_exact(&mut ack)).await.expect("read");
    assert_eq!(&ack, b"all");
    stream.finish_stream(StreamId::new(1));
    assert_eq!(soon(data_rx.read(&mut ack)).await.expect("FIN"), None);
    let gone = send(&mut stream, 1, b"late").await.expect_err("gone");
    assert!(matches!(gone, Closed::StreamReset(n) if n == StreamId::new(1)));
    control.write_all(b"more").await.expect("written");
    assert_eq!(recv_n(&mut stream, 4).await, b"more");
}

#[tokio::test]
async fn quic_clients_that_are_silent_for_longer_than_the_idle_timeout_stay_connected() {
    let idle = Duration::from_millis(600);
    let mut server = Server::with(Transport::Quic, |_, limits| limits.quic_idle = idle);
    let (_endpoint, _connection, (mut control, _), mut stream) = connect_client(&mut server).await;
    // The library's timers run in real time.
    tokio::time::sleep(3 * idle).await;
    control.write_all(b"here").await.expect("connected");
    assert_eq!(recv_n(&mut stream, 4).await, b"here");
}

#[tokio::test]
async fn quic_unauthenticated_clients_have_a_small_window() {
    use futures_util::FutureExt;
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    let (mut data, _data_rx) = connection.open_bi().await.expect("data");
    let more = pattern(128 * 1024);
    let first = soon(control.write(&more)).await.expect("written");
    assert_eq!(first, 32 * 1024);
    assert!(data.write(&more).now_or_never().is_none());
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    soon(data.write_all(&more[..64 * 1024]))
        .await
        .expect("written");
    soon(control.write_all(&more[first..64 * 1024]))
        .await
        .expect("written");
    assert!(data.write(&more).now_or_never().is_none());
    // All bytes can be read.
    let mut buf = Vec::new();
    while buf.len() < 128 * 1024 {
        recv(&mut stream, &mut buf).await.expect("bytes");
    }
}

#[tokio::test]
async fn quic_stream_numbers_are_used_again() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection) = server.quic().await;
    let (mut control, mut control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"c").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 1).await, b"c");
    stream.authenticated();
    let client = async {
        for round in 0..5 {
            // 15 data streams are allowed at once.
            let mut open = Vec::new();
            for _ in 0..15 {
                let (mut tx, rx) = soon(connection.open_bi()).await.expect("credit");
                tx.write_all(b"data").await.expect("written");
                open.push((tx, rx));
            }
            for (i, (mut tx, mut rx)) in open.into_iter().enumerate() {
                if i % 2 == round % 2 {
                    tx.finish().expect("open");
                    let end = soon(rx.read_to_end(10)).await.expect("FIN");
                    assert!(end.is_empty());
                } else {
                    tx.reset(31u32.into()).expect("open");
                    match soon(rx.read(&mut [0; 1])).await {
                        Err(quinn::ReadError::Reset(code)) => assert_eq!(code, 31u32.into()),
                        other => panic!("{other:?}"),
                    }
                }
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
            let got = match recv(&mut stream, &mut buf).await {
                Err(Closed::StreamReset(_)) => {
                    closed += 1;
                    continue;
                }
                other => other.expect("goes on"),
            };
            assert!(got.stream.index() < 16);
            if got.finished {
                closed += 1;
                stream.finish_stream(got.stream);
            }
            if got.stream == StreamId::CONTROL {
                break;
            }
        }
        assert_eq!(closed, 75);
        send(&mut stream, 0, b"done").await.expect("sent");
    };
    tokio::join!(client, serving);
}

#[tokio::test]
async fn quic_reset_stream_spares_the_connection() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection, (mut control, _control_rx), mut stream) =
        connect_client(&mut server).await;
    let (mut data, mut data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"bad").await.expect("written");
    let mut buf = Vec::new();
    let got = recv(&mut stream, &mut buf).await.expect("data");
    stream.reset_stream(got.stream, 0x81);
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
async fn quic_stream_that_the_client_stops_is_reset_at_once() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection, (mut control, _control_rx), mut stream) =
        connect_client(&mut server).await;
    let (mut data, mut data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"x").await.expect("written");
    let mut buf = Vec::new();
    let got = recv(&mut stream, &mut buf).await.expect("data");
    // No bytes of ours are in flight on the stream.
    data_rx.stop(7u32.into()).expect("open");
    let gone = recv(&mut stream, &mut buf).await.expect_err("gone");
    assert!(matches!(gone, Closed::StreamReset(n) if n == got.stream));
    let stopped = soon(data.stopped()).await.expect("connection lives");
    assert_eq!(stopped, Some(7u32.into()));
    control.write_all(b"on").await.expect("written");
    assert_eq!(recv_n(&mut stream, 2).await, b"on");
}

#[tokio::test]
async fn quic_resets_of_watched_streams_are_limited() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection, (_control, _control_rx), mut stream) =
        connect_client(&mut server).await;
    let mut buf = Vec::new();
    for n in 0..4096 {
        let (mut data, mut data_rx) = soon(connection.open_bi()).await.expect("a stream");
        data.write_all(b"x").await.expect("written");
        let got = recv(&mut stream, &mut buf).await.expect("data");
        let idle =
            poll_fn(|cx| std::task::Poll::Ready(stream.poll_recv(cx, &mut buf).is_pending())).await;
        assert!(idle, "round {n}");
        data.reset(31u32.into()).expect("open");
        let gone = recv(&mut stream, &mut buf).await.expect_err("gone");
        assert!(matches!(gone, Closed::StreamReset(n) if n == got.stream));
        match soon(data_rx.read(&mut [0; 1])).await {
            Err(quinn::ReadError::Reset(code)) => assert_eq!(code, 31u32.into()),
            other => panic!("{other:?}"),
        }
    }
    let end = recv(&mut stream, &mut buf).await.expect_err("enough");
    assert!(matches!(end, Closed::TooManyResets), "{end}");
}

#[tokio::test]
async fn quic_control_end_is_the_connections_end() {
    let mut server = Server::start(Transport::Quic);
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
        drop(stream);
        match soon(connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(c) => assert_eq!(c.error_code, 1u32.into()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn quic_control_stream_is_read_after_a_data_stream_has_reported_the_end() {
    let mut server = Server::start(Transport::Quic);
    let (endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"c").await.expect("written");
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    let (mut data, _data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"x").await.expect("written");
    let mut buf = Vec::new();
    while buf.len() < 2 {
        recv(&mut stream, &mut buf).await.expect("a byte");
    }
    // The control stream was read last, so the data stream is read first.
    control.write_all(b"on").await.expect("written");
    assert_eq!(recv_n(&mut stream, 2).await, b"on");
    control.write_all(b"disconnect").await.expect("written");
    control.finish().expect("open");
    soon(control.stopped()).await.expect("delivered");
    connection.close(0u32.into(), b"");
    soon(endpoint.wait_idle()).await;
    assert_eq!(recv_n(&mut stream, 10).await, b"disconnect");
    let end = recv(&mut stream, &mut buf).await.expect_err("over");
    assert!(matches!(end, Closed::Eof));
}

#[tokio::test]
async fn quic_bytes_before_connection_close_are_read() {
    let mut server = Server::start(Transport::Quic);
    let (endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"connect").await.expect("written");
    let mut stream = server.accept().await.stream;
    stream.authenticated();
    let (mut data, _data_rx) = connection.open_bi().await.expect("data");
    data.write_all(b"publish").await.expect("written");
    control.write_all(b"disconnect").await.expect("written");
    control.finish().expect("open");
    // The server's socket has acknowledged everything, and nothing has been read.
    soon(control.stopped()).await.expect("delivered");
    connection.close(0u32.into(), b"");
    soon(endpoint.wait_idle()).await;
    let (mut control_got, mut data_got) = (Vec::new(), Vec::new());
    let end = loop {
        let mut buf = Vec::new();
        match recv(&mut stream, &mut buf).await {
            Ok(got) if got.stream == StreamId::CONTROL => control_got.extend(buf),
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
        let mut server = Server::start(Transport::Quic);
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
    let mut server = Server::start(Transport::Quic);
    let (endpoint, connection) = server.quic().await;
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"here").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 4).await, b"here");
    assert_eq!(stream.current_peer(), endpoint.local_addr().ok());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("binds");
    endpoint.rebind(socket).expect("moves");
    control.write_all(b"there").await.expect("written");
    assert_eq!(recv_n(&mut stream, 5).await, b"there");
    assert_eq!(server.event().await, "migrated");
    assert_eq!(stream.current_peer(), endpoint.local_addr().ok());
    assert_eq!(stream.take_new_peer(), endpoint.local_addr().ok());
    assert_eq!(stream.take_new_peer(), None);
}

#[tokio::test]
async fn quic_peer_is_the_address_that_opened_the_first_stream() {
    let mut server = Server::start(Transport::Quic);
    let (endpoint, connection) = server.quic().await;
    let socket = std::net::UdpSocket::bind("127.0.0.2:0").expect("binds");
    endpoint.rebind(socket).expect("moves");
    let (mut control, _control_rx) = connection.open_bi().await.expect("control");
    control.write_all(b"here").await.expect("written");
    let accepted = server.accept().await;
    assert_eq!(accepted.peer, endpoint.local_addr().expect("bound"));
    assert_eq!(Some(accepted.peer), accepted.stream.current_peer());
}

#[tokio::test]
async fn quic_stops_unidirectional_streams_and_allows_15_data_streams() {
    let mut server = Server::start(Transport::Quic);
    let (_endpoint, connection) = server.quic().await;
    use futures_util::FutureExt;
    let mut open = Vec::new();
    for _ in 0..13 {
        open.push(soon(connection.open_bi()).await.expect("credit"));
    }
    // The handshake brings the credit, so more will not follow.
    assert!(connection.open_bi().now_or_never().is_none());
    open[0].0.write_all(b"x").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(recv_n(&mut stream, 1).await, b"x");
    stream.authenticated();
    // A client that uses several streams is allowed all of them.
    for (send, _) in &mut open[1..3] {
        send.write_all(b"y").await.expect("written");
    }
    for _ in 0..2 {
        let got = recv(&mut stream, &mut Vec::new()).await.expect("a byte");
        assert!(!got.stream.is_control());
    }
    while open.len() < 16 {
        open.push(soon(connection.open_bi()).await.expect("credit"));
    }
    assert!(connection.open_bi().now_or_never().is_none());
    // More than may be open at once: each is stopped, and the next one gets its place.
    for _ in 0..10 {
        let mut buf = Vec::new();
        let stopped = async {
            let mut uni = connection.open_uni().await.expect("credit");
            uni.write_all(b"unread").await.expect("written");
            uni.stopped().await.expect("connection lives")
        };
        let stopped = tokio::select! {
            stopped = soon(stopped) => stopped,
            got = recv(&mut stream, &mut buf) => panic!("{got:?}"),
        };
        assert_eq!(stopped, Some(0x82u32.into()));
        assert_eq!(server.event().await, "uni stream stopped");
    }
}

#[tokio::test]
async fn quic_without_a_stream_ends_at_the_deadline() {
    let mut server = Server::with(Transport::Quic, |_, limits| {
        limits.accept_deadline = Duration::from_secs(2);
    });
    let (_silent_endpoint, silent) = server.quic().await;
    // Another client is served meanwhile.
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

/// Begins handshakes and does not go on with them.
async fn unfinished_handshakes(
    server: &Server,
    handshakes: &Handshakes,
    count: usize,
) -> Vec<(quinn::Endpoint, quinn::Connecting)> {
    let mut kept = Vec::new();
    for n in 1..=count {
        // The client's first datagram, forwarded by a socket that returns no answer.
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0")
            .await
            .expect("binds");
        let endpoint = server.quic_endpoint(&["mqtt"]);
        let to = socket.local_addr().expect("bound");
        let connecting = endpoint.connect(to, LOCAL).expect("starts");
        let mut datagram = [0; 2048];
        let size = soon(socket.recv(&mut datagram)).await.expect("its first");
        let first = &datagram[..size];
        socket.send_to(first, server.addr).await.expect("sent");
        soon(async {
            while handshakes.running() < n {
                tokio::task::yield_now().await;
            }
        })
        .await;
        kept.push((endpoint, connecting));
    }
    kept
}

#[tokio::test]
async fn quic_asks_for_proof_of_address_under_pressure() {
    let handshakes = Handshakes::new(3);
    let mut server = Server::with(Transport::Quic, |_, limits| {
        limits.handshakes = handshakes.clone();
    });
    // Two of three permits, which are all that one address can have.
    let _held = unfinished_handshakes(&server, &handshakes, 2).await;
    for (from, served) in [([127, 0, 0, 1], false), ([127, 0, 0, 2], true)] {
        let endpoint = server.quic_endpoint_at(from, &["mqtt"]);
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        let connected = soon(connecting).await;
        assert_eq!(server.event().await, "retry");
        if served {
            connected.expect("proved and served");
        } else {
            connected.expect_err("proved, but without a permit");
            assert_eq!(server.event().await, "refused handshakes_max");
        }
    }
}

#[tokio::test]
async fn quic_accepts_a_token_as_proof_of_address() {
    let handshakes = Handshakes::new(3);
    let mut server = Server::with(Transport::Quic, |_, limits| {
        limits.handshakes = handshakes.clone();
    });
    let endpoint = server.quic_endpoint_at([127, 0, 0, 2], &["mqtt"]);
    let mut kept = Vec::new();
    for pressed in [false, true] {
        if pressed {
            kept = unfinished_handshakes(&server, &handshakes, 2).await;
        }
        let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
        let connection = soon(connecting).await.expect("served");
        let (mut control, mut control_rx) = connection.open_bi().await.expect("control");
        control.write_all(b"x").await.expect("written");
        let mut stream = server.accept().await.stream;
        assert_eq!(recv_n(&mut stream, 1).await, b"x");
        // The tokens are sent before this.
        send(&mut stream, 0, b"y").await.expect("sent");
        soon(control_rx.read_exact(&mut [0])).await.expect("read");
        assert!(server.events.try_recv().is_err(), "pressed: {pressed}");
    }
    drop(kept);
}

#[tokio::test]
async fn unfinished_tls_handshakes_leave_permits_for_others() {
    let handshakes = Handshakes::new(8);
    let start = |kind| {
        Server::with(kind, |_, limits| {
            limits.handshakes = handshakes.clone();
        })
    };
    let (mut tls, mut quic) = (start(Transport::Tls), start(Transport::Quic));
    let mut flood = Vec::new();
    for _ in 0..100 {
        let mut client = tls.tcp().await;
        client.write_all(b"\x16\x03\x01").await.expect("written");
        flood.push(client);
    }
    // Half of the permits, and one for the address.
    soon(async {
        while handshakes.running() < 5 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (_endpoint, connection) = quic.quic().await;
    let (mut control, _rx) = connection.open_bi().await.expect("control");
    control.write_all(b"x").await.expect("written");
    quic.accept().await;
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 2], 0).into()).expect("binds");
    let other = socket.connect(tls.addr).await.expect("connects");
    soon(tls.tls_on(other, &["mqtt"])).await.expect("served");
    tls.accept().await;
    assert_eq!(handshakes.running(), 5);
}
