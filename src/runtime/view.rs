//! The view of the running program for the admin side.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::admin::{
    AdminView, Found, LinkView, SessionPage, SessionSummary, SessionView, SubscriptionView,
};
use crate::auth::owner_name;
use crate::client::Clients;
use crate::embedded::EmbeddedBroker;
use crate::router::{Router, SessionInfo};
use crate::session::SessionKey;
use crate::supervise::Health;
use crate::telemetry::{SessionState, clean, metrics};
use crate::time::Millis;
use crate::upstream::{Role, Upstream};

/// The running program.
pub(super) struct View {
    pub router: Arc<Router>,
    pub upstream: Upstream,
    pub embedded: Option<EmbeddedBroker>,
    pub clients: Arc<Clients>,
    /// When the clock started.
    pub started: SystemTime,
    pub health: Arc<Health>,
}

impl AdminView for View {
    fn ready(&self) -> bool {
        !self.clients.draining.load(Ordering::Acquire)
    }

    fn failing(&self) -> Vec<String> {
        self.health.failing()
    }

    fn sessions(&self, after: Option<&str>, limit: usize) -> SessionPage {
        let mut found = self.router.sessions(after, limit + 1);
        let more = found.len() > limit;
        found.truncate(limit);
        SessionPage {
            next: match more {
                true => found.last().map(|s| s.key.as_str().to_owned()),
                false => None,
            },
            sessions: found.iter().map(|s| self.summary(s)).collect(),
        }
    }

    fn session(&self, id: &str, mount: Option<&str>) -> Found<SessionView> {
        let info = match self.find(id, mount) {
            Found::One(key) => self.router.session(&key),
            Found::None => None,
            Found::Several => return Found::Several,
        };
        let Some(info) = info else {
            return Found::None;
        };
        Found::One(SessionView {
            summary: self.summary(&info),
            subscriptions: info
                .subscriptions
                .iter()
                .map(|s| SubscriptionView {
                    filter: s.filter.to_string(),
                    qos: s.options.qos as u8,
                    no_local: s.options.no_local,
                    retain_as_published: s.options.retain_as_published,
                    retain_handling: s.options.retain_handling,
                    identifier: s.identifier.map(NonZeroU32::get),
                })
                .collect(),
        })
    }

    fn end_session(&self, id: &str, mount: Option<&str>) -> Found<()> {
        let key = match self.find(id, mount) {
            Found::One(key) => key,
            Found::None => return Found::None,
            Found::Several => return Found::Several,
        };
        if !self.router.end_session(&key, self.clients.clock.now()) {
            return Found::None;
        }
        tracing::warn!(
            client_id = clean(key.client_id(), 64),
            mount = clean(key.mount(), 64),
            "An operator ended a session"
        );
        Found::One(())
    }

    fn broker(&self) -> Option<serde_json::Value> {
        let profile = self.upstream.profile()?;
        serde_json::to_value(&*profile).ok()
    }

    fn links(&self) -> Vec<LinkView> {
        let links = self.upstream.links().iter();
        links
            .map(|link| {
                let state = link.state();
                LinkView {
                    name: link.name.clone(),
                    role: link.role.name(),
                    server: state.server,
                    state: match (state.up, link.wanted()) {
                        (true, _) => "up",
                        (false, true) => "down",
                        (false, false) => "idle",
                    },
                    protocol: state.protocol,
                    window: state.window as u32,
                    inflight: state.in_flight as u32,
                    filters: match link.role {
                        Role::Data => self.router.filters_on(link.number),
                        Role::Shared => {
                            let number = self.router.shared_link(link.number);
                            self.router.filters_on(number)
                        }
                        _ => 0,
                    },
                    connects: link.connects.load(Ordering::Relaxed),
                    last_error: state.last_error,
                }
            })
            .collect()
    }

    fn before_scrape(&self) {
        let m = metrics();
        let totals = self.router.totals();
        m.sessions[SessionState::Attached].set(totals.attached as f64);
        m.sessions[SessionState::Detached].set(totals.detached as f64);
        m.queue_messages.set(totals.queue_messages as f64);
        m.session_bytes.set(self.router.session_bytes() as f64);
        m.filters.set(self.router.filters_known() as f64);
        m.queue_bytes.set(self.router.queue_used() as f64);
        m.output_bytes.set(self.router.output_used() as f64);
        m.publishes_waiting
            .set(self.router.publishes_waiting() as f64);
        let waiting = self.router.limits().publish_account.used();
        m.publishes_waiting_bytes.set(waiting as f64);
        m.retained_cache_bytes
            .set(self.router.retained_bytes() as f64);
        let embedded = self.embedded.as_ref();
        m.embedded_broker_bytes
            .set(embedded.map_or(0, |broker| broker.stats().bytes) as f64);
        m.retained_fetches_pending
            .set(self.router.retained_pending() as f64);
    }
}

impl View {
    /// The key of a client identifier's only session, or of the one behind a mount.
    fn find(&self, id: &str, mount: Option<&str>) -> Found<SessionKey> {
        let mut keys = self.router.session_keys(id);
        if let Some(mount) = mount {
            keys.retain(|key| key.mount() == mount);
        }
        match (keys.pop(), keys.len()) {
            (None, _) => Found::None,
            (Some(key), 0) => Found::One(key),
            (Some(_), _) => Found::Several,
        }
    }

    fn summary(&self, info: &SessionInfo) -> SessionSummary {
        let (principal, by_certificate) = owner_name(&info.principal);
        let peer = info.peer.as_deref();
        let since = self.started + info.since.since(Millis::ZERO);
        let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
        SessionSummary {
            client_id: info.key.client_id().to_owned(),
            mount: info.key.mount().to_owned(),
            principal: principal.to_owned(),
            by_certificate,
            version: info.version.name(),
            attached: info.attached,
            listener: peer.map(|o| o.listener.to_string()).unwrap_or_default(),
            transport: peer.map_or("", |o| o.transport),
            peer: peer.map(|o| o.address.to_string()),
            connected_since: info.attached.then_some(since.as_secs()),
            expiry_seconds: info.expiry,
            subscription_count: info.subscriptions.len(),
            queue_messages: info.queue_messages,
            queue_bytes: info.queue_bytes,
            inflight: info.in_flight,
            session_bytes: info.session_bytes,
            gaps: info.gaps,
        }
    }
}
