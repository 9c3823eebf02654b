//! The HTTP side: metrics, health, and an API for operators.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | Prometheus text exposition |
//! | `/healthz` | 200 while the process answers and keeps its tasks running, else 503 with their names |
//! | `/readyz` | 200 while it takes clients, else 503 |
//! | `/api/v1/sessions?limit=&after=` | sessions in the order of their ids |
//! | `/api/v1/sessions/{id}?mount=` | one session with its subscriptions; DELETE ends it |
//! | `/api/v1/links` | the links to the broker |
//!
//! `/api` is answered on a loopback address only, and never holds a payload.

mod connections;
mod view;

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config;
use crate::telemetry::metrics;
use connections::Bounded;
pub(crate) use view::{
    AdminView, Found, LinkView, SessionPage, SessionSummary, SessionView, SubscriptionView,
};

/// Connections at once. Past them, a new connection waits for a place: it gets the place of the connection
/// that has been without an answer for longest, once that time is [`EVICT_AFTER`].
const CONNECTIONS_MAX: usize = 64;
/// The time for which a connection keeps its place without an answer, while others wait for one.
const EVICT_AFTER: Duration = Duration::from_secs(1);
/// The longest time for a request to arrive, and for a connection to stay open without a request.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Requests to `/api` that are answered at the same time.
const API_AT_ONCE: usize = 2;
/// Most sessions on a page.
const PAGE_MAX: usize = 1000;
const PAGE_DEFAULT: usize = 100;

/// An admin server whose socket is bound and which answers no request yet.
pub(crate) struct Server {
    listener: Arc<TcpListener>,
    address: SocketAddr,
    router: Router,
}

#[derive(Clone)]
struct Shared {
    view: Arc<dyn AdminView>,
    api_at_once: Arc<Semaphore>,
}

impl Server {
    /// Binds the address of the configuration.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub(crate) async fn bind(
        admin: &config::Admin,
        view: Arc<dyn AdminView>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(admin.bind).await?;
        let address = listener.local_addr()?;
        let shared = Shared {
            view,
            api_at_once: Arc::new(Semaphore::new(API_AT_ONCE)),
        };
        let api = admin.api && config::is_loopback(&address);
        Ok(Self {
            listener: Arc::new(listener),
            address,
            router: router(shared, api),
        })
    }

    /// The bound address.
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` completes and the open connections are done.
    ///
    /// # Errors
    /// The listener fails permanently.
    pub(crate) async fn run(
        &self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> std::io::Result<()> {
        let listener = self.listener.clone();
        let listener = Bounded::new(listener, CONNECTIONS_MAX, SILENCE_MAX, EVICT_AFTER);
        axum::serve(listener, self.router.clone())
            .with_graceful_shutdown(shutdown)
            .await
    }
}

fn router(shared: Shared, api: bool) -> Router {
    let routes = if api {
        Router::new()
            .route("/sessions", get(sessions))
            .route("/sessions/{id}", get(session).delete(end_session))
            .route("/links", get(links))
            .fallback(|| async { problem(StatusCode::NOT_FOUND, "no such path") })
            .layer(from_fn_with_state(shared.clone(), guard))
    } else {
        Router::new().fallback(|| async {
            let why = "/api is answered on a loopback [admin] bind with api = true only";
            problem(StatusCode::FORBIDDEN, why)
        })
    };
    Router::new()
        .route("/metrics", get(exposition))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .nest("/api/v1", routes)
        .layer(from_fn(no_store))
        .with_state(shared)
}

async fn no_store(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response
}

/// Refuses the requests of a web page that reaches the server through a name for a loopback address (DNS
/// rebinding), and bounds how many requests are answered at once.
async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST);
    if !host
        .and_then(|h| h.to_str().ok())
        .is_some_and(is_local_host)
    {
        return problem(
            StatusCode::FORBIDDEN,
            "the Host header must be a loopback address",
        );
    }
    // A browser states where a page's request comes from; curl and scripts state nothing.
    let origin = request.headers().get(header::ORIGIN);
    let own = |origin: &HeaderValue| {
        let text = origin.to_str().unwrap_or_default();
        text.strip_prefix("http://").is_some_and(is_local_host)
    };
    if !origin.is_none_or(own) {
        let why = "the request comes from a page of another origin";
        return problem(StatusCode::FORBIDDEN, why);
    }
    match shared.api_at_once.acquire().await {
        Ok(_permit) => next.run(request).await,
        Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "ending"),
    }
}

fn is_local_host(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return config::is_loopback(&address);
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() => name,
        _ => host,
    };
    let ip = name
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    match ip {
        Ok(ip) => config::is_loopback(&SocketAddr::new(ip, 0)),
        Err(_) => name.eq_ignore_ascii_case("localhost"),
    }
}

async fn exposition(State(shared): State<Shared>) -> impl IntoResponse {
    shared.view.before_scrape();
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics().render())
}

async fn healthy(State(shared): State<Shared>) -> (StatusCode, String) {
    let failing = shared.view.failing();
    if failing.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        let text = format!("cannot be kept running: {}\n", failing.join(", "));
        (StatusCode::SERVICE_UNAVAILABLE, text)
    }
}

async fn ready(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.view.ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    #[serde(default = "page_default")]
    limit: usize,
    after: Option<String>,
}

fn page_default() -> usize {
    PAGE_DEFAULT
}

async fn sessions(
    State(shared): State<Shared>,
    page: Result<Query<Page>, QueryRejection>,
) -> Response {
    let page = match page {
        Ok(Query(page)) if (1..=PAGE_MAX).contains(&page.limit) => page,
        _ => {
            let what = "the query has limit (1 to 1000, default 100) and after (a client id)";
            return problem(StatusCode::BAD_REQUEST, what);
        }
    };
    // Sorting many sessions takes milliseconds, so a thread does it that serves no connection.
    work(move || {
        let mut found = shared.view.sessions(page.after.as_deref(), page.limit);
        found.sessions.iter_mut().for_each(SessionSummary::cut);
        Json(found).into_response()
    })
    .await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mount {
    mount: Option<String>,
}

async fn session(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    mount: Result<Query<Mount>, QueryRejection>,
) -> Response {
    with_session(mount, move |mount| match shared.view.session(&id, mount) {
        Found::One(mut found) => {
            found.cut();
            Found::One(Json(found).into_response())
        }
        Found::None => Found::None,
        Found::Several => Found::Several,
    })
    .await
}

async fn end_session(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    mount: Result<Query<Mount>, QueryRejection>,
) -> Response {
    with_session(mount, move |mount| {
        match shared.view.end_session(&id, mount) {
            Found::One(()) => Found::One(StatusCode::NO_CONTENT.into_response()),
            Found::None => Found::None,
            Found::Several => Found::Several,
        }
    })
    .await
}

async fn with_session(
    mount: Result<Query<Mount>, QueryRejection>,
    job: impl FnOnce(Option<&str>) -> Found<Response> + Send + 'static,
) -> Response {
    let Ok(Query(Mount { mount })) = mount else {
        let what = "the query has mount (the mount of the session's listener) or nothing";
        return problem(StatusCode::BAD_REQUEST, what);
    };
    work(move || match job(mount.as_deref()) {
        Found::One(response) => response,
        Found::None => problem(StatusCode::NOT_FOUND, "no such session"),
        Found::Several => {
            let what = "the client id has sessions behind several mounts; name one: ?mount=";
            problem(StatusCode::CONFLICT, what)
        }
    })
    .await
}

#[derive(Serialize)]
struct Links {
    /// The profile of the broker.
    broker: Option<serde_json::Value>,
    links: Vec<LinkView>,
}

async fn links(State(shared): State<Shared>) -> Response {
    work(move || {
        let mut links = shared.view.links();
        links.iter_mut().for_each(LinkView::cut);
        let broker = shared.view.broker();
        Json(Links { broker, links }).into_response()
    })
    .await
}

async fn work(job: impl FnOnce() -> Response + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(job).await {
        Ok(response) => response,
        Err(_) => problem(StatusCode::INTERNAL_SERVER_ERROR, "failed"),
    }
}

#[derive(Serialize)]
struct Problem {
    error: &'static str,
}

fn problem(status: StatusCode, error: &'static str) -> Response {
    (status, Json(Problem { error })).into_response()
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "a test's server ends with its runtime"
)]
mod tests;
