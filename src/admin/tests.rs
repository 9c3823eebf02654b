//! Tests of the admin server over a real socket, with requests written by hand.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

/// Its tasks that fail.
#[derive(Default)]
struct Fake(Vec<String>);

impl AdminView for Fake {
    fn ready(&self) -> bool {
        false
    }
    fn failing(&self) -> Vec<String> {
        self.0.clone()
    }
    fn sessions(&self, after: Option<&str>, limit: usize) -> SessionPage {
        let all = (0..5).map(|i| format!("c{i}"));
        let sessions: Vec<_> = all
            .filter(|id| after.is_none_or(|a| id.as_str() > a))
            .take(limit)
            .map(|client_id| SessionSummary {
                client_id,
                ..SessionSummary::default()
            })
            .collect();
        SessionPage {
            next: sessions.last().map(|s| s.client_id.clone()),
            sessions,
        }
    }
    fn end_session(&self, id: &str, mount: Option<&str>) -> Found<()> {
        match (id, mount) {
            ("twice", None) => Found::Several,
            ("twice", Some("a/")) => Found::One(()),
            _ => Found::None,
        }
    }
    fn session(&self, id: &str, _: Option<&str>) -> Found<SessionView> {
        if id != "a/b c" {
            return Found::None;
        }
        Found::One(SessionView {
            summary: SessionSummary {
                client_id: id.to_owned(),
                principal: "\"\n".to_owned() + &"x".repeat(300),
                version: "5",
                ..SessionSummary::default()
            },
            subscriptions: vec![SubscriptionView {
                filter: "a/#".to_owned(),
                qos: 1,
                ..SubscriptionView::default()
            }],
        })
    }
    fn broker(&self) -> Option<serde_json::Value> {
        Some(serde_json::json!({ "mapping": "ids" }))
    }

    fn links(&self) -> Vec<LinkView> {
        vec![LinkView {
            name: "d0".to_owned(),
            ..LinkView::default()
        }]
    }
    fn before_scrape(&self) {
        metrics().queue_messages.set(42.0);
    }
}

async fn start(bind: &str, api: bool) -> SocketAddr {
    let bind = bind.parse().expect("an address");
    let server = Server::bind(&config::Admin { bind, api }, Arc::new(Fake::default()))
        .await
        .expect("bound");
    let address = server.local_addr();
    assert_ne!(address.port(), 0);
    tokio::spawn(async move { server.run(std::future::pending()).await });
    address
}

async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    get_as(address, path, &address.to_string()).await
}

/// Status, head and body.
async fn get_as(address: SocketAddr, path: &str, host: &str) -> (u16, String, String) {
    let port = address.port();
    let mut stream = TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (
        status.expect("a status"),
        head.to_ascii_lowercase(),
        body.to_owned(),
    )
}

fn json(body: &str) -> Value {
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn health_and_metrics() {
    let address = start("127.0.0.1:0", true).await;
    assert_eq!(get(address, "/healthz").await.0, 200);
    assert_eq!(get(address, "/readyz").await.0, 503);
    let (status, head, body) = get(address, "/metrics").await;
    assert_eq!(status, 200);
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(head.contains("cache-control: no-store"), "{head}");
    assert!(body.contains("\ntidegate_queue_messages 42\n"), "{body}");
    assert_eq!(get(address, "/").await.0, 404);
}

#[tokio::test]
async fn sessions_by_page() {
    let address = start("127.0.0.1:0", true).await;
    let ids = |body: &str| -> Vec<String> {
        let sessions = json(body)["sessions"].as_array().expect("a list").clone();
        let id = |s: &Value| s["client_id"].as_str().expect("text").to_owned();
        sessions.iter().map(id).collect()
    };
    let (_, _, first) = get(address, "/api/v1/sessions?limit=2").await;
    assert_eq!(ids(&first), ["c0", "c1"]);
    assert_eq!(json(&first)["next"], "c1");
    let (_, _, second) = get(address, "/api/v1/sessions?limit=2&after=c1").await;
    assert_eq!(ids(&second), ["c2", "c3"]);
    assert_eq!(ids(&get(address, "/api/v1/sessions").await.2).len(), 5);
    for query in ["limit=0", "limit=1001", "limit=x", "page=1"] {
        let (status, _, body) = get(address, &format!("/api/v1/sessions?{query}")).await;
        assert_eq!(status, 400, "{query}");
        assert!(json(&body)["error"].is_string());
    }
}

#[tokio::test]
async fn one_session_and_the_links() {
    let address = start("127.0.0.1:0", true).await;
    let (status, _, body) = get(address, "/api/v1/sessions/a%2Fb%20c").await;
    assert_eq!(status, 200);
    let session = json(&body);
    assert_eq!(session["client_id"], "a/b c");
    assert_eq!(session["subscriptions"][0]["filter"], "a/#");
    let principal = session["principal"].as_str().expect("text");
    assert_eq!(principal.chars().count(), 257);
    assert!(principal.starts_with("\"\nx") && principal.ends_with("x…"));
    assert_eq!(get(address, "/api/v1/sessions/none").await.0, 404);
    assert_eq!(get(address, "/api/v1/other").await.0, 404);
    let (_, _, body) = get(address, "/api/v1/links").await;
    assert_eq!(json(&body)["links"][0]["name"], "d0");
    assert_eq!(json(&body)["broker"]["mapping"], "ids");
}

#[tokio::test]
async fn an_operator_ends_a_session() {
    let address = start("127.0.0.1:0", true).await;
    let delete = async |path: &str, more: &str| {
        let request =
            format!("DELETE {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n");
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer[9..12].to_owned()
    };
    let twice = "/api/v1/sessions/twice";
    assert_eq!(delete(twice, "").await, "409");
    assert_eq!(delete(&format!("{twice}?mount=a/"), "").await, "204");
    assert_eq!(delete(&format!("{twice}?mount=b/"), "").await, "404");
    assert_eq!(delete(&format!("{twice}?mouth=a/"), "").await, "400");
    // A web page must not: its browser names its origin.
    for (origin, status) in [
        ("https://evil.example", "403"),
        ("null", "403"),
        ("http://localhost.evil.example", "403"),
        ("http://localhost:9883", "204"),
    ] {
        let more = format!("Origin: {origin}\r\n");
        let path = format!("{twice}?mount=a/");
        assert_eq!(delete(&path, &more).await, status, "{origin}");
    }
}

#[tokio::test]
async fn the_api_is_for_loopback_only() {
    for address in [
        start("0.0.0.0:0", true).await,
        start("127.0.0.1:0", false).await,
    ] {
        for path in ["/api/v1/sessions", "/api/v1/sessions/x", "/api/v1/links"] {
            assert_eq!(get(address, path).await.0, 403, "{address} {path}");
        }
        assert_eq!(get(address, "/metrics").await.0, 200);
    }
    let address = start("127.0.0.1:0", true).await;
    for (host, status) in [
        ("evil.example", 403),
        ("evil.example:9883", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("localhost:9883", 200),
        ("127.0.0.1", 200),
        ("[::1]:9883", 200),
    ] {
        assert_eq!(
            get_as(address, "/api/v1/links", host).await.0,
            status,
            "{host}"
        );
    }
}

#[tokio::test]
async fn a_request_that_trickles_in_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let silence_max = Duration::from_millis(300);
    let bounded = Bounded::new(Arc::new(listener), 1, silence_max, silence_max);
    let router = Router::new().route("/", axum::routing::get(|| async { "ok" }));
    tokio::spawn(async move { axum::serve(bounded, router).await });
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let (mut read, mut write) = stream.split();
    let trickle = async {
        while write.write_all(b"G").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let closed = async { read.read_to_end(&mut Vec::new()).await };
    let ended = async {
        tokio::select! { () = trickle => {}, _ = closed => {} }
    };
    tokio::time::timeout(Duration::from_secs(10), ended)
        .await
        .expect("the server closed it");
}

#[tokio::test]
async fn incomplete_requests_do_not_keep_a_new_one_waiting() {
    let address = start("127.0.0.1:0", true).await;
    let mut incomplete = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(b"GET /hea").await.expect("written");
        incomplete.push(stream);
    }
    for _ in 0..3 {
        let answer = tokio::time::timeout(Duration::from_secs(2), get(address, "/healthz")).await;
        assert_eq!(answer.expect("answered in time").0, 200);
    }
}

#[tokio::test]
async fn connections_are_bounded_and_come_free_again() {
    let address = start("127.0.0.1:0", true).await;
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        idle.push(TcpStream::connect(address).await.expect("connected"));
    }
    let one_more = get(address, "/healthz");
    tokio::pin!(one_more);
    let soon = tokio::time::timeout(Duration::from_millis(300), &mut one_more).await;
    assert!(soon.is_err(), "answered over the limit");
    drop(idle);
    let (status, _, _) = tokio::time::timeout(Duration::from_secs(5), one_more)
        .await
        .expect("answered");
    assert_eq!(status, 200);
}

#[tokio::test]
async fn health_fails_while_tasks_cannot_be_kept_running() {
    for (failing, status, body) in [
        (vec![], 200, "ok\n"),
        (
            vec!["link d0", "listener tcp"],
            503,
            "cannot be kept running: link d0, listener tcp\n",
        ),
    ] {
        let bind = ([127, 0, 0, 1], 0).into();
        let view = Fake(failing.into_iter().map(str::to_owned).collect());
        let admin = config::Admin { bind, api: false };
        let server = Server::bind(&admin, Arc::new(view)).await.expect("bound");
        let address = server.local_addr();
        tokio::spawn(async move { server.run(std::future::pending()).await });
        let (got, _, text) = get(address, "/healthz").await;
        assert_eq!((got, text.as_str()), (status, body));
    }
}
