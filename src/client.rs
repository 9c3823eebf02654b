//! One task per client connection.
//!
//! [`connect`] takes CONNECT and gives the client its session; its future is boxed, and dropped
//! before the task of the connection begins. [`machine`] is the connection without its socket, and
//! `task` moves bytes between the two.

pub mod connect;
mod end;
pub mod machine;
mod rate;
mod scope;
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::auth::{Acl, Authenticator, Identity};
use crate::budget::Account;
use crate::clock::Clock;
use crate::config::{self, AuthMode, ResponseTopicRule, SenderProperty, Transport};
use crate::mqtt::QoS;
use crate::router::Router;
use crate::session::{Policy, ResponseTopic};
use crate::telemetry::{DeniedAction, ListenerMetrics, RateLimited, clean, metrics};
use crate::topics::{is_bridge_state, split_shared};
use crate::transport::{Accepted, ConnectionTask, Permit};

pub use end::End;
pub use rate::Rate;

/// Characters of a client's text in a log line.
const LOGGED_CHARS: usize = 64;

static RESPONSE_TOPICS: RateLimited = RateLimited::new(Duration::from_secs(1));

/// Characters of a client's topic in a log line.
const LOGGED_TOPIC_CHARS: usize = 256;

/// What every connection needs.
pub struct Clients {
    /// The router.
    pub router: Arc<Router>,
    /// The process's clock.
    pub clock: Clock,
    /// Verifies who clients are.
    pub authenticator: Arc<Authenticator>,
    /// What clients may do.
    pub acl: ArcSwap<Acl>,
    /// The rules have been replaced since the start, so that sessions may have subscriptions that they
    /// forbid.
    pub rules_replaced: AtomicBool,
    /// `[session]`.
    pub session: config::Session,
    /// `[limits]`.
    pub limits: config::Limits,
    /// `limits.connect_rate_max`.
    pub rate: Rate,
    /// The limits of every connection after CONNACK.
    pub machine_limits: machine::Limits,
    /// Bytes of the incomplete packets of unauthenticated connections, kept apart so that a flood of
    /// them cannot use up the budget of authenticated clients.
    pub unauthenticated: Arc<Account>,
    /// The budget of `unauthenticated`.
    pub unauthenticated_max_bytes: u64,
    /// `upstream.probe_topic`.
    pub probe_topic: Box<str>,
    /// `auth.response_topic`.
    pub response_topic_rule: ResponseTopicRule,
    /// The user properties that name the sender in each publish.
    pub sender_properties: Vec<SenderProperty>,
    /// The process is ending: clients get no new sessions.
    pub draining: AtomicBool,
}

/// What the connections of one listener share.
#[derive(Clone)]
pub struct ListenerContext {
    /// How the listener's clients are authenticated.
    pub auth: AuthMode,
    /// The listener's name.
    pub name: Arc<str>,
    /// The transport's name.
    pub transport: &'static str,
    /// The listener's metrics.
    pub metrics: Arc<ListenerMetrics>,
    /// The metrics of its WebTransport connections.
    pub webtransport: Option<Arc<ListenerMetrics>>,
    /// `mount`.
    pub mount: Arc<str>,
    /// `ping_interval` of a WebSocket listener; `None`: no pings.
    pub ping_after: Option<Duration>,
    /// The longest Keep Alive that MQTT 5 clients are granted, since the transport ends silent
    /// connections; `None`: it does not.
    pub keep_alive_max: Option<Duration>,
}

impl Clients {
    /// Takes the CONNECT of one accepted connection. Returns the task that serves it to its end.
    pub async fn serve(
        self: Arc<Self>,
        mut listener: ListenerContext,
        accepted: Accepted,
    ) -> Option<ConnectionTask> {
        let transport = accepted.stream.transport();
        listener.transport = transport.name();
        if let (Transport::WebTransport, Some(own)) = (transport, &listener.webtransport) {
            listener.metrics = own.clone();
        }
        let guard = OpenGuard::new(&listener.metrics, accepted.permit);
        let Accepted {
            stream,
            peer,
            deadline,
            unauthenticated,
            ..
        } = accepted;
        let accepting = connect::accept(&self, &listener, stream, peer, deadline, unauthenticated);
        // The connection's part of its network's share is dropped before CONNACK is sent, since the
        // client may count on it.
        let accepted = accepting.await;
        accepted.map(|accepted| task::serve(self, accepted, guard))
    }

    /// Uses other rules from now on.
    pub fn replace_rules(&self, rules: Acl) {
        self.acl.store(Arc::new(rules));
        self.rules_replaced.store(true, Ordering::Release);
    }

    /// The rules may be others than those under which a restored session subscribed.
    pub fn judge_subscriptions_again(&self) {
        self.rules_replaced.store(true, Ordering::Release);
    }

    /// Gives clients no new sessions from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }
}

/// Counts a connection as open until it is dropped.
struct OpenGuard {
    metrics: Arc<ListenerMetrics>,
    _permit: Permit,
}

impl OpenGuard {
    fn new(metrics: &Arc<ListenerMetrics>, permit: Permit) -> Self {
        metrics.connections.increment(1);
        metrics.connections_open.increment(1.0);
        Self {
            metrics: metrics.clone(),
            _permit: permit,
        }
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.metrics.connections_open.decrement(1.0);
    }
}

/// Log lines about the beginning, the end or a move of connections that are written per second. A
/// client that connects and leaves again and again must not fill a disk.
const CONNECTION_LINES_MAX: u32 = 50;

/// A limit on log lines that each connection may cause.
const fn connection_lines() -> RateLimited {
    RateLimited::burst(CONNECTION_LINES_MAX, Duration::from_secs(1))
}

static DENIED: RateLimited = RateLimited::burst(5, Duration::from_secs(1));

/// What one client may do.
struct ClientPolicy<'a> {
    clients: &'a Clients,
    identity: &'a Identity,
}

impl ClientPolicy<'_> {
    fn allows_publish(&self, mount: &str, topic: &str) -> bool {
        let acl = self.clients.acl.load();
        !self.is_own_probe(topic) && acl.may_publish(self.identity, mount, topic)
    }

    /// Counts and logs that a rule forbids the client to publish to a topic, or to subscribe to a
    /// filter.
    #[cold]
    fn denied(&self, action: DeniedAction, mount: &str, topic: &str) {
        metrics().denied[action].increment(1);
        let Some(suppressed) = DENIED.permit(self.clients.clock.now()) else {
            return;
        };
        let (acl, identity) = (self.clients.acl.load(), self.identity);
        let rule = match action {
            DeniedAction::Subscribe => acl.subscribe_rule(identity, mount, topic),
            _ => acl.publish_rule(identity, mount, topic),
        };
        tracing::warn!(
            client_id = clean(&identity.client_id, LOGGED_CHARS),
            user = clean(&identity.principal, LOGGED_CHARS),
            topic = clean(topic, LOGGED_TOPIC_CHARS),
            %rule,
            suppressed,
            "Denied: {action}"
        );
    }

    /// Whether the client is a probe of this process. Other topics cost a comparison.
    fn is_own_probe(&self, topic: &str) -> bool {
        let probes = &*self.clients.probe_topic;
        let plain = split_shared(topic).map_or(topic, |(_, plain)| plain);
        plain.starts_with(probes) && self.clients.router.is_own_probe(plain)
    }
}

impl Policy for ClientPolicy<'_> {
    fn may_publish(&self, mount: &str, topic: &str) -> bool {
        let allowed = self.allows_publish(mount, topic);
        // A bridge with its defaults publishes its state, so nobody has done anything wrong.
        if !allowed && !is_bridge_state(topic) {
            self.denied(DeniedAction::Publish, mount, topic);
        }
        allowed
    }

    fn may_subscribe(&self, mount: &str, filter: &str) -> bool {
        let acl = self.clients.acl.load();
        let allowed = !self.is_own_probe(filter) && acl.may_subscribe(self.identity, mount, filter);
        if !allowed {
            self.denied(DeniedAction::Subscribe, mount, filter);
        }
        allowed
    }

    fn may_have_changed(&self) -> bool {
        self.clients.rules_replaced.load(Ordering::Acquire)
    }

    fn response_topic(&self, mount: &str, topic: &str) -> ResponseTopic {
        if self.allows_publish(mount, topic) {
            return ResponseTopic::Mounted;
        }
        metrics().response_topics_denied.increment(1);
        if let Some(suppressed) = RESPONSE_TOPICS.permit(self.clients.clock.now()) {
            tracing::warn!(
                client_id = clean(&self.identity.client_id, LOGGED_CHARS),
                principal = clean(&self.identity.principal, LOGGED_CHARS),
                response_topic = clean(topic, LOGGED_CHARS),
                suppressed,
                "A Response Topic is outside its client's rules"
            );
        }
        match self.clients.response_topic_rule {
            ResponseTopicRule::Remove => ResponseTopic::Removed,
            ResponseTopicRule::Refuse => ResponseTopic::Refused,
        }
    }

    fn maximum_qos(&self) -> QoS {
        self.clients.router.maximum_qos()
    }

    fn retain_available(&self) -> bool {
        self.clients.router.retain_available()
    }
}
