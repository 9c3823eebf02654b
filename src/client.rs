//! One task per client connection: bytes to and from its session.
//!
//! The CONNECT phase is a future of its own, boxed and dropped once it is over; what runs for the
//! life of a connection is small.

mod accept;
mod connection;
mod end;
mod partial;
mod scope;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// What every connection needs.
pub struct Clients {
    /// The router.
    pub router: Arc<Router>,
    /// The process's clock.
    pub clock: Clock,
    /// Who clients are.
    pub authenticator: Arc<Authenticator>,
    /// What they may do.
    pub acl: Acl,
    /// `[session]`.
    pub session: config::Session,
    /// `[limits]`.
    pub limits: config::Limits,
    /// CONNECTs per second.
    pub rate: Rate,
    /// Bytes of packets that are not complete yet, and their budget.
    pub input: Account,
    /// The budget of `input`, bytes.
    pub input_max: u64,
    /// The same for those of whom it is not known who they are: what they do is no client's loss.
    pub strangers: Account,
    /// The budget of `strangers`, bytes.
    pub strangers_max: u64,
    /// What publishes tell of their sender.
    pub sender_properties: Vec<SenderProperty>,
    /// The process is ending: no new sessions.
    pub draining: AtomicBool,
}

/// What the connections of one listener share.
#[derive(Clone)]
pub struct ListenerContext {
    /// How its clients are authenticated.
    pub auth: AuthMode,
    /// The listener's name.
    pub name: Arc<str>,
    /// The transport's name.
    pub transport: &'static str,
    /// Its metrics.
    pub metrics: Arc<ListenerMetrics>,
    /// The metrics of those that come over WebTransport.
    pub webtransport: Option<Arc<ListenerMetrics>>,
    /// `mount`.
    pub mount: Arc<str>,
    /// `ping_interval` of a WebSocket listener, milliseconds; `None`: no pings.
    pub ping_after: Option<u64>,
}

impl Clients {
    /// Takes the CONNECT of one accepted connection; what serves it then to its end.
    pub async fn serve(
        self: Arc<Self>,
        mut door: ListenerContext,
        accepted: Accepted,
    ) -> Option<ConnectionTask> {
        let transport = accepted.stream.transport();
        door.transport = transport.name();
        if let (Transport::WebTransport, Some(own)) = (transport, &door.webtransport) {
            door.metrics = own.clone();
        }
        let open = Open::new(&door.metrics, accepted.permit);
        let began = self.clock.now();
        let Accepted {
            stream,
            peer,
            deadline,
            ..
        } = accepted;
        let opened = accept::open(&self, &door, stream, peer, deadline, began).await;
        opened.map(|opened| connection::serve(self, opened, open))
    }

    /// No new sessions from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }
}

/// A connection is open as long as it has this.
struct Open {
    metrics: Arc<ListenerMetrics>,
    _permit: Permit,
}

impl Open {
    fn new(metrics: &Arc<ListenerMetrics>, permit: Permit) -> Self {
        metrics.connections.increment(1);
        metrics.connections_open.increment(1.0);
        Self {
            metrics: metrics.clone(),
            _permit: permit,
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.connections_open.decrement(1.0);
    }
}

/// A limit on events per second, with a second's worth in reserve.
#[derive(Debug)]
pub struct Rate {
    per_second: u64,
    /// Thousandths of an event, and when they were counted.
    state: Mutex<(u64, u64)>,
}

impl Rate {
    /// At most `per_second` in the long run.
    pub fn new(per_second: u32) -> Self {
        let per_second = u64::from(per_second);
        Self {
            per_second,
            state: Mutex::new((per_second * 1000, 0)),
        }
    }

    /// Takes one, if there is one at `now` (milliseconds).
    pub fn take(&self, now: Millis) -> bool {
        let mut state = self.state.lock();
        let (left, at) = *state;
        let gained = now.saturating_sub(at) * self.per_second;
        let left = (left + gained).min(self.per_second * 1000);
        *state = (left.saturating_sub(1000), now.max(at));
        left >= 1000
    }
}

/// The session's questions, answered for one client.
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
        assert_eq!((0..20).filter(|_| rate.take(0)).count(), 10);
        assert!(!rate.take(99));
        assert!(rate.take(200));
        assert_eq!((0..20).filter(|_| rate.take(60_000)).count(), 10);
    }
}
