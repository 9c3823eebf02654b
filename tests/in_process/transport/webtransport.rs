//! WebTransport: accepted and refused requests, streams, ends.

use std::future::poll_fn;
use std::time::Duration;

use futures_util::FutureExt;
use tidegate::config::{Listener, Transport};
use tidegate::transport::{CloseHow, Closed};
use web_transport_quinn::proto::{self, ConnectRequest, ConnectResponse, Settings};
use web_transport_quinn::{
    ClientError, ConnectError, ReadError, RecvStream, SendStream, Session, SessionError,
    WebTransportError, WriteError,
};

use crate::transport::common::*;
use tidegate::streams::StreamId;

fn serve() -> Server {
    serve_with(|_| {})
}

fn serve_with(change: impl FnOnce(&mut Listener)) -> Server {
    Server::with(Transport::Quic, |listener, limits| {
        listener.webtransport = true;
        limits.accept_deadline = Duration::from_secs(2);
        change(listener);
    })
}

fn request(path: &str) -> ConnectRequest {
    let url = format!("https://{LOCAL}{path}");
    ConnectRequest::new(url.parse::<url::Url>().expect("a URL"))
}

/// A connection that speaks HTTP/3, and its endpoint.
async fn http3(server: &Server) -> (quinn::Endpoint, quinn::Connection) {
    let endpoint = server.quic_endpoint(&["h3"]);
    let connecting = endpoint.connect(server.addr, LOCAL).expect("starts");
    (endpoint, soon(connecting).await.expect("connects"))
}

async fn open_session(server: &Server, request: ConnectRequest) -> Result<Client, ClientError> {
    let (endpoint, connection) = http3(server).await;
    let session = soon(Session::connect(connection, request)).await?;
    Ok(Client {
        session,
        _endpoint: endpoint,
    })
}

struct Client {
    session: Session,
    _endpoint: quinn::Endpoint,
}

impl Client {
    async fn open(&self) -> (SendStream, RecvStream) {
        soon(self.session.open_bi()).await.expect("credit")
    }
}

/// A session and its control stream, with `x` sent and read.
async fn connected(
    server: &mut Server,
) -> (
    Client,
    (SendStream, RecvStream),
    tidegate::transport::Stream,
) {
    let client = open_session(server, request("/mqtt"))
        .await
        .expect("accepted");
    let (mut tx, rx) = client.open().await;
    tx.write_all(b"x").await.expect("written");
    let accepted = server.accept().await;
    let mut stream = accepted.stream;
    assert_eq!(stream.transport(), Transport::WebTransport);
    assert_eq!(recv_n(&mut stream, 1).await, b"x");
    (client, (tx, rx), stream)
}

#[tokio::test]
async fn webtransport_clients_that_are_silent_for_longer_than_the_idle_timeout_stay_connected() {
    let idle = Duration::from_millis(600);
    let mut server = Server::with(Transport::Quic, |listener, limits| {
        listener.webtransport = true;
        limits.quic_idle = idle;
    });
    let (_client, (mut control, _), mut stream) = connected(&mut server).await;
    // The library's timers run in real time.
    tokio::time::sleep(3 * idle).await;
    control.write_all(b"here").await.expect("connected");
    assert_eq!(recv_n(&mut stream, 4).await, b"here");
}

#[tokio::test]
async fn webtransport_streams_are_those_of_quic() {
    let mut server = serve();
    let client = open_session(&server, request("/mqtt"))
        .await
        .expect("accepted");
    assert_eq!(client.session.protocol(), None);
    let (mut control, mut control_rx) = client.open().await;
    let (mut data, mut data_rx) = client.open().await;
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
    assert_eq!((got.stream, &buf[..]), (StreamId::new(1), &b"early"[..]));

    send(&mut stream, 1, b"ack").await.expect("sent");
    send(&mut stream, 0, b"connack").await.expect("sent");
    let mut answer = [0; 7];
    soon(data_rx.read_exact(&mut answer[..3]))
        .await
        .expect("read");
    assert_eq!(&answer[..3], b"ack");
    soon(control_rx.read_exact(&mut answer))
        .await
        .expect("read");
    assert_eq!(&answer, b"connack");

    data.finish().expect("open");
    let end = recv(&mut stream, &mut buf).await.expect("stream end");
    assert!(end.stream == StreamId::new(1) && end.bytes == 0 && end.finished);
    stream.finish_stream(StreamId::new(1));
    assert_eq!(soon(data_rx.read(&mut answer)).await.expect("FIN"), None);

    // Large messages in both directions.
    let sent = pattern(300_000);
    let (echoed, ()) = tokio::join!(
        async {
            let got = recv_n(&mut stream, sent.len()).await;
            send(&mut stream, 0, &got).await.expect("sent");
            got
        },
        async {
            control.write_all(&sent).await.expect("written");
            let mut back = vec![0; sent.len()];
            soon(control_rx.read_exact(&mut back)).await.expect("read");
            assert!(back == sent);
        }
    );
    assert!(echoed == sent);
}

#[tokio::test]
async fn webtransport_allows_15_data_streams_and_resets_one_alone() {
    let mut server = serve();
    let (client, (mut control, _control_rx), mut stream) = connected(&mut server).await;
    stream.authenticated();
    let mut open = Vec::new();
    for n in 0..15u8 {
        let (mut tx, rx) = client.open().await;
        tx.write_all(&[n]).await.expect("written");
        open.push((tx, rx));
        let got = recv(&mut stream, &mut Vec::new()).await.expect("a byte");
        assert_eq!((got.stream, got.bytes), (StreamId::new(n + 1), 1));
    }
    assert!(client.session.open_bi().now_or_never().is_none());
    stream.reset_stream(StreamId::new(7), 0x81);
    let (tx, rx) = &mut open[6];
    match soon(rx.read(&mut [0; 1])).await {
        Err(ReadError::Reset(0x81)) => {}
        other => panic!("{other:?}"),
    }
    match soon(tx.write_all(&[0; 10])).await {
        Err(WriteError::Stopped(0x81)) => {}
        other => panic!("{other:?}"),
    }
    // A client's reset ends its stream, and is answered with the same code.
    open[0].0.reset(31).expect("open");
    let gone = recv(&mut stream, &mut Vec::new()).await.expect_err("gone");
    assert!(matches!(gone, Closed::StreamReset(n) if n == StreamId::new(1)));
    match soon(open[0].1.read(&mut [0; 1])).await {
        Err(ReadError::Reset(31)) => {}
        other => panic!("{other:?}"),
    }
    control.write_all(b"on").await.expect("written");
    assert_eq!(recv_n(&mut stream, 2).await, b"on");
}

fn status(result: Result<Client, ClientError>) -> u16 {
    match result.err() {
        Some(ClientError::HttpError(ConnectError::ProtoError(
            proto::ConnectError::WrongStatus(Some(status)),
        ))) => status.as_u16(),
        other => panic!("expected a status, got {other:?}"),
    }
}

#[tokio::test]
async fn webtransport_requests_are_judged() {
    let mut server = serve_with(|listener| listener.origins = vec!["https://good.example".into()]);
    let origin = |value: &'static str| {
        let value = web_transport_quinn::http::HeaderValue::from_static(value);
        let name = web_transport_quinn::http::header::ORIGIN;
        request("/mqtt").with_header(name, value)
    };
    for (request, expected) in [
        (request("/"), 404),
        (request("/mqtt/x"), 404),
        (origin("https://evil.example"), 403),
        (request("/mqtt").with_protocol("amqp"), 400),
    ] {
        assert_eq!(status(open_session(&server, request).await), expected);
        assert_eq!(server.event().await, format!("failed http_{expected}"));
    }
    let all = origin("https://good.example").with_protocols(["x".to_owned(), "mqtt".to_owned()]);
    let client = open_session(&server, all).await.expect("accepted");
    assert_eq!(client.session.protocol(), Some("mqtt"));
    let query = open_session(&server, request("/mqtt?token=1")).await;
    query.expect("accepted");
    // None of these sessions opened a stream, and none keeps a permit.
    drop(client);
    for _ in 0..2 {
        assert_eq!(server.event().await, "failed webtransport");
    }
    assert_eq!(server.cap.used(), 0);
}

/// SETTINGS on a control stream, which must be kept.
async fn settings(connection: &quinn::Connection) -> quinn::SendStream {
    let mut control = connection.open_uni().await.expect("credit");
    let mut bytes = Vec::new();
    let mut settings = Settings::default();
    settings.enable_webtransport(1);
    settings.encode(&mut bytes);
    control.write_all(&bytes).await.expect("written");
    control
}

/// HEADERS with fields of QPACK's static table.
fn headers(fields: &[u8]) -> Vec<u8> {
    let mut payload = vec![0, 0];
    payload.extend_from_slice(fields);
    payload.extend_from_slice(b"\x50\x09localhost");
    let mut frame = vec![1, payload.len() as u8];
    frame.extend_from_slice(&payload);
    frame
}

/// `:method` GET, `:scheme` https, `:path` /.
const GET: [u8; 3] = [0xd1, 0xd7, 0xc1];

async fn closed(connection: &quinn::Connection) -> u64 {
    match soon(connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn webtransport_ports_answer_plain_http() {
    let mut server = serve();
    // CONNECT with another :protocol, as literals.
    let mut connect = vec![0xcf, 0xd7, 0xc1, 0x27, 0x02];
    connect.extend_from_slice(b":protocol");
    connect.extend_from_slice(b"\x09websocket");
    for (fields, expected) in [(&GET[..], 404), (&connect, 501), (&[0xd1], 400)] {
        let (_endpoint, connection) = http3(&server).await;
        let _control = settings(&connection).await;
        let (mut tx, mut rx) = connection.open_bi().await.expect("credit");
        tx.write_all(&headers(fields)).await.expect("written");
        tx.finish().expect("open");
        let answer = soon(rx.read_to_end(1000)).await.expect("an answer");
        match ConnectResponse::decode(&mut &answer[..]) {
            Err(proto::ConnectError::WrongStatus(Some(status))) => assert_eq!(status, expected),
            other => panic!("{other:?}"),
        }
        assert_eq!(closed(&connection).await, 0x100, "H3_NO_ERROR");
        assert_eq!(server.event().await, format!("failed http_{expected}"));
    }
    // A header that is too large, and a frame that is not a request.
    for (bytes, code) in [(&b"\x01\x80\x00\x50\x00"[..], 0x100), (b"\x00\x01x", 0x105)] {
        let (_endpoint, connection) = http3(&server).await;
        let _control = settings(&connection).await;
        let (mut tx, _rx) = connection.open_bi().await.expect("credit");
        tx.write_all(bytes).await.expect("written");
        assert_eq!(closed(&connection).await, code);
        let failed = ["failed http_431", "failed webtransport"];
        assert!(failed.contains(&&*server.event().await));
    }
}

#[tokio::test]
async fn webtransport_close_codes_reach_the_client() {
    for (how, expected) in [
        (CloseHow::Normal, 0),
        (CloseHow::Protocol, 1),
        (CloseHow::Overload, 2),
    ] {
        let mut server = serve();
        let (client, (_control, mut control_rx), mut stream) = connected(&mut server).await;
        let last = pattern(100_000);
        let serving = async {
            send(&mut stream, 0, &last).await.expect("sent");
            close(&mut stream, how).await;
        };
        let (got, ()) = tokio::join!(control_rx.read_to_end(200_000), serving);
        assert!(got.expect("all before the close") == last);
        match soon(client.session.closed()).await {
            SessionError::WebTransportError(WebTransportError::Closed(code, _)) => {
                assert_eq!(code, expected);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn webtransport_ends_when_the_client_closes_it() {
    let mut server = serve();
    for (code, words) in [(0, "closed by the peer"), (7, "code 7")] {
        let (client, (mut control, _rx), mut stream) = connected(&mut server).await;
        control.write_all(b"last").await.expect("written");
        control.finish().expect("open");
        assert_eq!(recv_n(&mut stream, 4).await, b"last");
        client.session.close(code, b"words of the peer's");
        let end = recv_end(&mut stream).await;
        // The control stream's FIN may be seen before the session's end.
        let text = end.to_string();
        assert!(text.contains(words) || matches!(end, Closed::Eof), "{text}");
        assert!(!text.contains("words"), "{text}");
    }
    // The client ends only the session, or the connection with it.
    for (code, words) in [(0, "closed by the peer"), (7, "code 7")] {
        let (client, _control, mut stream) = connected(&mut server).await;
        client.session.close(code, b"bye");
        let text = recv_end(&mut stream).await.to_string();
        assert!(text.contains(words) && !text.contains("bye"), "{text}");
    }
    let (client, _control, mut stream) = connected(&mut server).await;
    quinn::Connection::close(&client.session, 0x100u32.into(), b"");
    assert!(matches!(recv_end(&mut stream).await, Closed::Eof));
    let (_client, (mut control, _rx), mut stream) = connected(&mut server).await;
    control.reset(9).expect("open");
    let text = recv_end(&mut stream).await.to_string();
    assert!(text.contains("reset by the peer with code 9"), "{text}");
}

#[tokio::test]
async fn webtransport_bounds_unread_streams_and_datagrams() {
    let mut server = serve();
    let (client, (mut control, _rx), mut stream) = connected(&mut server).await;
    stream.authenticated();
    // Besides HTTP/3's control stream, three more may be open. Those of the session are stopped.
    let mut stray = Vec::new();
    for _ in 0..3 {
        let mut uni = soon(client.session.open_uni()).await.expect("credit");
        uni.write_all(b"nobody reads this").await.expect("written");
        stray.push(uni);
    }
    for uni in &mut stray {
        let mut buf = Vec::new();
        let stopped = tokio::select! {
            stopped = soon(uni.stopped()) => stopped.expect("connection lives"),
            got = recv(&mut stream, &mut buf) => panic!("{got:?}"),
        };
        assert_eq!(stopped, Some(0x82));
        assert_eq!(server.event().await, "uni stream stopped");
    }
    for _ in 0..100 {
        client
            .session
            .send_datagram(vec![7; 1000].into())
            .expect("fits");
    }
    // Another request among the session's streams.
    let (mut tx, mut rx) = quinn::Connection::open_bi(&client.session)
        .await
        .expect("credit");
    tx.write_all(&headers(&GET)).await.expect("written");
    let gone = recv(&mut stream, &mut Vec::new()).await.expect_err("gone");
    assert!(matches!(gone, Closed::StreamReset(n) if n == StreamId::new(1)));
    match soon(rx.read(&mut [0; 1])).await {
        Err(quinn::ReadError::Reset(code)) => assert_eq!(code, 0x10bu32.into()),
        other => panic!("{other:?}"),
    }
    control.write_all(b"on").await.expect("written");
    assert_eq!(recv_n(&mut stream, 2).await, b"on");
}

#[tokio::test]
async fn webtransport_handshakes_have_a_deadline() {
    let mut server = serve();
    let close_of_1 = proto::error_to_http3(1);
    let mut stages = Vec::new();
    for (stage, code) in [(0, 0x10a), (1, 0x10d), (2, 0x10d), (3, close_of_1)] {
        let (endpoint, connection) = http3(&server).await;
        let (mut kept, mut unread) = (Vec::new(), Vec::new());
        if stage > 0 {
            kept.push(settings(&connection).await);
        }
        if stage > 1 {
            let (mut tx, rx) = connection.open_bi().await.expect("credit");
            unread.push(rx);
            let mut bytes = Vec::new();
            request("/mqtt").encode(&mut bytes).expect("encodes");
            let whole = bytes.len() - usize::from(stage == 2);
            tx.write_all(&bytes[..whole]).await.expect("written");
            kept.push(tx);
        }
        stages.push((stage, code, endpoint, connection, kept, unread));
    }
    for (stage, code, _endpoint, connection, ..) in &stages {
        assert_eq!(server.event().await, "failed deadline", "stage {stage}");
        assert_eq!(closed(connection).await, *code, "stage {stage}");
    }
    // A session that the client closes earlier fails at once.
    let client = open_session(&server, request("/mqtt"))
        .await
        .expect("accepted");
    client.session.close(0, b"");
    let event = server.event().await;
    assert!(
        event == "failed webtransport" || event == "failed quic",
        "{event}"
    );
}

#[tokio::test]
async fn webtransport_listeners_serve_mqtt_over_quic() {
    let mut server = serve();
    let (_endpoint, connection) = server.quic().await;
    let (mut control, _rx) = connection.open_bi().await.expect("a stream");
    control.write_all(b"hello").await.expect("written");
    let mut stream = server.accept().await.stream;
    assert_eq!(stream.transport(), Transport::Quic);
    assert_eq!(recv_n(&mut stream, 5).await, b"hello");
    // Unidirectional streams, which are never read, are stopped.
    let mut strays = Vec::new();
    while let Some(uni) = connection.open_uni().now_or_never() {
        let mut uni = uni.expect("connection lives");
        uni.write_all(b"unread").await.expect("written");
        strays.push(uni);
    }
    assert_eq!(strays.len(), 4);
    control.write_all(b"more").await.expect("written");
    assert_eq!(recv_n(&mut stream, 4).await, b"more");
    for uni in &mut strays {
        let mut buf = Vec::new();
        let stopped = tokio::select! {
            stopped = soon(uni.stopped()) => stopped.expect("connection lives"),
            got = recv(&mut stream, &mut buf) => panic!("{got:?}"),
        };
        assert_eq!(stopped, Some(0x82u32.into()));
    }
    // Without `webtransport` the listener does not offer HTTP/3.
    let mut without = Server::start(Transport::Quic);
    let endpoint = without.quic_endpoint(&["h3"]);
    let connecting = endpoint.connect(without.addr, LOCAL).expect("starts");
    soon(connecting).await.expect_err("refused");
    assert_eq!(without.event().await, "failed alpn");
}
