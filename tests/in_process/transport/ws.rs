//! WebSocket: refusals, limits, control frames, close codes.

use std::future::poll_fn;

use futures_util::{SinkExt, StreamExt};
use tidegate::config::{ProxyProtocol, Transport};
use tidegate::transport::{CloseHow, Closed, FrameError, Violation};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::transport::common::*;

#[tokio::test]
async fn ws_refusals() {
    let mut server = Server::with(Transport::Ws, |listener, _| {
        listener.origins = vec!["https://good.example".into()];
    });
    let wrong_path = websocket(server.tcp().await, "/other", Some("mqtt")).await;
    assert_eq!(status(wrong_path), 404);
    assert_eq!(server.event().await, "failed http_404");
    let none = websocket(server.tcp().await, "/mqtt", None).await;
    assert_eq!(status(none), 400);
    assert_eq!(server.event().await, "failed subprotocol");
    let other = websocket(server.tcp().await, "/mqtt", Some("amqp")).await;
    assert_eq!(status(other), 400);
    assert_eq!(server.event().await, "failed subprotocol");

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

/// Waits for the close frame, then drops the client's socket.
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
    let mut server = Server::start(Transport::Ws);
    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    client
        .send(Message::Binary(b"first".to_vec().into()))
        .await
        .expect("sent");
    client.send(Message::text("no")).await.expect("sent");
    // The bytes before it are not lost.
    assert_eq!(recv_n(&mut stream, 5).await, b"first");
    match recv_end(&mut stream).await {
        Closed::Violation(Violation::WebSocket(FrameError::Text)) => {}
        other => panic!("{other:?}"),
    }
    let (frame, ()) = tokio::join!(until_close(client), close(&mut stream, CloseHow::Normal));
    assert_eq!(frame.expect("a code").code, CloseCode::Unsupported);
}

#[tokio::test]
async fn ws_message_limit_is_1009_and_rises_with_authentication() {
    let mut server = Server::with(Transport::Ws, |_, limits| limits.packet_max = 300_000);
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
            // The server stops reading, so this may never finish.
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
async fn ws_packets_sent_before_connack_wait_for_the_higher_limit() {
    let mut server = Server::start(Transport::Ws);
    for authenticate in [true, false] {
        let mut client = server.ws().await;
        let mut stream = server.accept().await.stream;
        let big = pattern(50_000);
        for message in [b"connect".to_vec(), big.clone()] {
            client
                .feed(Message::Binary(message.into()))
                .await
                .expect("fed");
        }
        client.flush().await.expect("flushed");
        assert_eq!(recv_n(&mut stream, 7).await, b"connect");
        if authenticate {
            stream.authenticated();
            assert!(recv_n(&mut stream, big.len()).await == big);
        } else {
            for _ in 0..2 {
                assert!(matches!(recv_end(&mut stream).await, Closed::TooLarge));
            }
        }
    }
}

#[tokio::test]
async fn ws_pings_are_answered_while_only_reading() {
    let mut server = Server::start(Transport::Ws);
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
    // Our pings reach the client, whose library answers.
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
        let mut server = Server::start(Transport::Ws);
        let mut client = server.ws().await;
        let mut stream = server.accept().await.stream;
        send(&mut stream, 0, b"last packet").await.expect("sent");
        let reading = async {
            let last = soon(client.next()).await.expect("a message").expect("good");
            assert_eq!(last, Message::Binary(b"last packet".to_vec().into()));
            let close = soon(client.next()).await.expect("a message").expect("good");
            // Sends the answer and waits for the end of the socket.
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

#[tokio::test]
async fn health_checks_are_not_accepted_as_connections() {
    let mut server = Server::start(Transport::Ws);
    let mut plain = server.tcp().await;
    plain
        .write_all(b"GET /healthz HTTP/1.0\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = String::new();
    soon(plain.read_to_string(&mut answer))
        .await
        .expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(plain);
    assert_eq!(server.event().await, "health");
    // A connection that is only opened and closed is reported.
    drop(server.tcp().await);
    assert_eq!(server.event().await, "failed closed");
    assert!(server.accepted.try_recv().is_err());
    assert_eq!(server.cap.used(), 0);
}

#[tokio::test]
async fn unread_answers_to_pings_take_no_memory() {
    let mut server = Server::start(Transport::Ws);
    let mut client = server.ws().await;
    let mut stream = server.accept().await.stream;
    // The answers are more than the sockets can hold.
    let flood = async {
        for n in 0..200_000u32 {
            let mut text = [b'.'; 125];
            text[..4].copy_from_slice(&n.to_be_bytes());
            let ping = Message::Ping(text.to_vec().into());
            client.feed(ping).await.expect("the server goes on reading");
        }
        client.flush().await.expect("flushed");
        client
            .send(Message::Binary(b"end".to_vec().into()))
            .await
            .expect("sent");
    };
    let (got, ()) = tokio::join!(recv_n(&mut stream, 3), flood);
    assert_eq!(got, b"end");
}

#[tokio::test]
async fn a_required_proxy_header_names_the_client() {
    for kind in [Transport::Tcp, Transport::Tls, Transport::Ws] {
        let mut server = Server::with(kind, |listener, _| {
            listener.proxy_protocol = ProxyProtocol::Required;
            listener.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
        });
        let mut plain = server.tcp().await;
        plain
            .write_all(b"PROXY TCP4 192.0.2.7 10.0.0.1 4660 80\r\n")
            .await
            .expect("sent");
        match kind {
            Transport::Ws => {
                let _client = websocket(plain, "/mqtt", Some("mqtt")).await;
            }
            Transport::Tls => drop(server.tls_on(plain, &["mqtt"]).await.expect("handshake")),
            _ => {}
        }
        let accepted = server.accept().await;
        assert_eq!(accepted.peer.to_string(), "192.0.2.7:4660");
        drop(server.tcp().await);
        assert_eq!(server.event().await, "failed closed");
        let mut other = server.tcp().await;
        other.write_all(b"GET / HTTP/1.1\r\n").await.expect("sent");
        assert_eq!(server.event().await, "failed proxy_protocol");
    }
}
