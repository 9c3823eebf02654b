//! The data that the admin side shows, and the trait through which it reads them.

use serde::Serialize;

/// Characters of a client's text that are shown at most.
const TEXT_MAX: usize = 256;

/// The questions of the admin side to the running program. Its threads may block for milliseconds, so
/// no call may wait for a socket.
pub(crate) trait AdminView: Send + Sync + 'static {
    /// Whether clients are accepted. It does not depend on the broker.
    fn ready(&self) -> bool;
    /// The names of the tasks that cannot be kept running.
    fn failing(&self) -> Vec<String>;
    /// At most `limit` sessions with an id behind `after`, by byte order of ids.
    fn sessions(&self, after: Option<&str>, limit: usize) -> SessionPage;
    /// The session of a client identifier, behind a mount if one is given.
    fn session(&self, id: &str, mount: Option<&str>) -> Found<SessionView>;
    /// Ends such a session and its connection.
    fn end_session(&self, id: &str, mount: Option<&str>) -> Found<()>;
    /// The links to the broker.
    fn links(&self) -> Vec<LinkView>;
    /// The profile of the broker; `None` before the first link came up.
    fn broker(&self) -> Option<serde_json::Value>;
    /// Sets the gauges that are computed only when metrics are read.
    fn before_scrape(&self);
}

/// The outcome of a search for one session.
#[derive(Clone, Debug)]
pub(crate) enum Found<T> {
    /// Exactly one session has the client identifier.
    One(T),
    /// No session has the client identifier.
    None,
    /// The client identifier has sessions behind several mounts, and none was named.
    Several,
}

/// A page of sessions.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct SessionPage {
    /// In the order of their ids.
    pub sessions: Vec<SessionSummary>,
    /// The parameter `after` of the next page; `None` on the last page.
    pub next: Option<String>,
}

/// A session without its subscriptions.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct SessionSummary {
    /// Client id.
    pub client_id: String,
    /// Prefix of its topics at the broker.
    pub mount: String,
    /// The principal that owns it.
    pub principal: String,
    /// Whether a client certificate, and not a user name, stated the principal.
    pub by_certificate: bool,
    /// MQTT version: `5`, `3.1.1` or `3.1`.
    pub version: &'static str,
    /// Whether it has a connection.
    pub attached: bool,
    /// Listener of its connection, or of its last one.
    pub listener: String,
    /// Transport of that listener.
    pub transport: &'static str,
    /// Address of its connection's other end.
    pub peer: Option<String>,
    /// Start of its connection, in seconds since 1970.
    pub connected_since: Option<u64>,
    /// Session Expiry Interval in seconds.
    pub expiry_seconds: u32,
    /// Number of subscriptions.
    pub subscription_count: usize,
    /// Messages that wait for the client.
    pub queue_messages: usize,
    /// Bytes of the waiting messages.
    pub queue_bytes: usize,
    /// Deliveries that the client has not acknowledged.
    pub inflight: usize,
    /// Bytes that are charged to `memory.sessions` for it, without its filters.
    pub session_bytes: u32,
    /// Gaps: periods in which it may have missed messages.
    pub gaps: u64,
}

/// A session with its subscriptions.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct SessionView {
    /// The session without its subscriptions.
    #[serde(flatten)]
    pub summary: SessionSummary,
    /// Subscriptions.
    pub subscriptions: Vec<SubscriptionView>,
}

/// A subscription with its options [MQTT5 3.8.3.1].
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct SubscriptionView {
    /// Topic filter, `$share` included.
    pub filter: String,
    /// Granted QoS.
    pub qos: u8,
    /// No Local.
    pub no_local: bool,
    /// Retain As Published.
    pub retain_as_published: bool,
    /// Retain Handling.
    pub retain_handling: u8,
    /// Subscription Identifier.
    pub identifier: Option<u32>,
}

/// A link to the broker.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct LinkView {
    /// Name, as in metrics.
    pub name: String,
    /// Its role.
    pub role: &'static str,
    /// Address of the broker that it speaks or last spoke to.
    pub server: String,
    /// Its state.
    pub state: &'static str,
    /// MQTT version; `None` before its first CONNACK.
    pub protocol: Option<&'static str>,
    /// The broker's Receive Maximum.
    pub window: u32,
    /// Publishes that the broker has not acknowledged.
    pub inflight: u32,
    /// Filters subscribed on it.
    pub filters: usize,
    /// CONNECTs sent since the start.
    pub connects: u64,
    /// The reason of its last disconnection.
    pub last_error: Option<String>,
}

impl SessionSummary {
    pub(super) fn cut(&mut self) {
        cut(&mut self.client_id);
        cut(&mut self.mount);
        cut(&mut self.principal);
    }
}

impl SessionView {
    pub(super) fn cut(&mut self) {
        self.summary.cut();
        for subscription in &mut self.subscriptions {
            cut(&mut subscription.filter);
        }
    }
}

impl LinkView {
    pub(super) fn cut(&mut self) {
        if let Some(error) = &mut self.last_error {
            cut(error);
        }
    }
}

fn cut(text: &mut String) {
    if let Some((at, _)) = text.char_indices().nth(TEXT_MAX) {
        text.truncate(at);
        text.push('…');
    }
}
