//! One task per client connection.
//!
//! [`connect`] takes CONNECT and gives the client its session; its future is boxed, and dropped
//! before the task of the connection begins. [`machine`] is the connection without its socket, and
//! `task` moves bytes between the two.

pub mod connect;
mod end;
pub mod machine;
mod scope;
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::auth::{Acl, Authenticator, Identity};
use crate::budget::Account;
use crate::clock::Clock;
use crate::config::{self, AuthMode, SenderProperty, Transport};
use crate::mqtt::QoS;
use crate::router::Router;
use crate::session::Policy;
use crate::telemetry::ListenerMetrics;
use crate::time::Millis;
use crate::transport::{Accepted, ConnectionTask, Permit};

pub use end::End;

/// What every connection needs.
pub struct Clients {
    /// The router.
    pub router: Arc<Router>,
    /// The process's clock.
    pub clock: Clock,
    /// Verifies who clients are.
    pub authenticator: Arc<Authenticator>,
    /// What clients may do.
    pub acl: Acl,
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
            ..
        } = accepted;
        let accepted = connect::accept(&self, &listener, stream, peer, deadline).await;
        accepted.map(|accepted| task::serve(self, accepted, guard))
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

/// A limit on events per second, with a second's worth in reserve.
#[derive(Debug)]
pub struct Rate {
    per_second: u64,
    /// Thousandths of an event in reserve, and the time of the count.
    state: Mutex<(u64, Millis)>,
}

impl Rate {
    /// A limit of `per_second` in the long run.
    pub fn new(per_second: u32) -> Self {
        let per_second = u64::from(per_second);
        Self {
            per_second,
            state: Mutex::new((per_second * 1000, Millis::ZERO)),
        }
    }

    /// Takes an event, if there is one in reserve.
    pub fn take(&self, now: Millis) -> bool {
        let mut state = self.state.lock();
        let (reserve, at) = *state;
        let gained = now.since(at).as_millis() as u64 * self.per_second;
        let reserve = (reserve + gained).min(self.per_second * 1000);
        *state = (reserve.saturating_sub(1000), now.max(at));
        reserve >= 1000
    }
}

/// What one client may do.
struct ClientPolicy<'a> {
    clients: &'a Clients,
    identity: &'a Identity,
}

impl Policy for ClientPolicy<'_> {
    fn may_publish(&self, topic: &str) -> bool {
        self.clients.acl.may_publish(self.identity, topic)
    }

    fn may_subscribe(&self, filter: &str) -> bool {
        self.clients.acl.may_subscribe(self.identity, filter)
    }

    fn maximum_qos(&self) -> QoS {
        self.clients.router.maximum_qos()
    }

    fn retain_available(&self) -> bool {
        self.clients.router.retain_available()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_allows_its_reserve_and_then_its_pace() {
        let rate = Rate::new(10);
        assert_eq!((0..20).filter(|_| rate.take(Millis::ZERO)).count(), 10);
        assert!(!rate.take(Millis::new(99)));
        assert!(rate.take(Millis::new(200)));
        assert_eq!(
            (0..20).filter(|_| rate.take(Millis::new(60_000))).count(),
            10
        );
    }
}
