//! The broker as all links know it, and what they share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::config;
use crate::embedded::EmbeddedBroker;
use crate::router::Router;
use crate::telemetry::RateLimited;
use crate::transport::ClientTls;

use crate::upstream::link_times::LinkTimes;
use crate::upstream::outage::OutageLog;
use crate::upstream::profile::cache::ProfileCache;

/// Changes of the server that are logged in a minute: while all servers are away, the links go round.
const FAILOVER_LINES_MAX: u32 = 3;

/// The configuration of connections to the broker.
pub(crate) struct BrokerAccess {
    /// `[upstream]`.
    pub config: config::Upstream,
    /// `node.id`.
    pub node: String,
    /// Largest packet that may be forwarded, bytes.
    pub packet_max: u32,
    /// TLS toward the broker, where a server needs it.
    pub tls: Option<ClientTls>,
    /// The embedded broker, if `servers` names it.
    pub embedded: Option<EmbeddedBroker>,
}

/// Whether a broker speaks MQTT 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum V5Support {
    /// No connection has shown it yet.
    Unknown,
    /// It has accepted an MQTT 5 connection.
    Spoken,
    /// It has refused one, or configuration says 3.1.1.
    Refused,
}

/// The broker: how it is reached, and what the links have found out about it.
pub(crate) struct Broker {
    pub access: BrokerAccess,
    pub(super) profiles: ProfileCache,
    v5: Mutex<V5Support>,
}

impl Broker {
    pub(super) fn new(access: BrokerAccess) -> Self {
        Self {
            v5: Mutex::new(v5_by_configuration(&access.config)),
            access,
            profiles: ProfileCache::default(),
        }
    }

    pub(super) fn v5_support(&self) -> V5Support {
        *self.v5.lock()
    }

    /// Notes that the broker has accepted an MQTT 5 connection. A refusal outweighs it.
    pub(super) fn v5_spoken(&self) {
        let mut v5 = self.v5.lock();
        if *v5 == V5Support::Unknown {
            *v5 = V5Support::Spoken;
        }
    }

    /// Notes that the broker refuses MQTT 5. Returns whether that is news.
    pub(super) fn v5_refused(&self) -> bool {
        std::mem::replace(&mut *self.v5.lock(), V5Support::Refused) != V5Support::Refused
    }

    /// Another server may speak another version.
    fn server_changed(&self) {
        *self.v5.lock() = v5_by_configuration(&self.access.config);
    }

    /// The client identifier of the link (or probe) of this name.
    pub(super) fn client_id(&self, name: &str) -> String {
        client_id(&self.access.config, &self.access.node, name)
    }
}

/// The client identifier of the link of this name.
pub(crate) fn client_id(config: &config::Upstream, node: &str, name: &str) -> String {
    format!("{}-{node}-{name}", config.client_id_prefix)
}

fn v5_by_configuration(config: &config::Upstream) -> V5Support {
    match config.protocol {
        config::Protocol::V311 => V5Support::Refused,
        _ => V5Support::Unknown,
    }
}

/// What all links share.
pub(super) struct LinkContext {
    pub broker: Broker,
    pub router: Arc<Router>,
    pub clock: Clock,
    /// Tells the links to end.
    pub stop: CancellationToken,
    /// Raised when all filters are placed anew; data links then begin again.
    pub placement: AtomicU64,
    /// The index of the one of `upstream.servers` that all links use.
    pub server: AtomicUsize,
    /// Links that are connected.
    pub connected: AtomicUsize,
    /// What the links have logged about a broker that is away.
    pub outage: OutageLog,
    failovers_log: RateLimited,
    /// When each link last connected and ended.
    pub times: LinkTimes,
}

impl LinkContext {
    pub(super) fn new(
        access: BrokerAccess,
        router: Arc<Router>,
        clock: Clock,
        stop: CancellationToken,
    ) -> Self {
        // The server that an earlier process used has its links' sessions.
        let links = 0..usize::from(access.config.data_links.max);
        let restored = links
            .into_iter()
            .find_map(|link| router.restored_link(link));
        let server = restored.and_then(|link| access.config.server_named(&link.server));
        Self {
            broker: Broker::new(access),
            router,
            clock,
            stop,
            placement: AtomicU64::new(0),
            server: AtomicUsize::new(server.unwrap_or(0)),
            connected: AtomicUsize::new(0),
            outage: OutageLog::default(),
            failovers_log: RateLimited::burst(FAILOVER_LINES_MAX, Duration::from_secs(60)),
            times: LinkTimes::default(),
        }
    }

    /// Notes that a link could not reach the server of index `from`. If no link is connected, all
    /// links go to the next server together: a message must be published at the server where
    /// others subscribe. While another link is connected, the trouble is this link's alone.
    pub(super) fn fail_over(&self, from: usize) {
        let servers = &self.broker.access.config.servers;
        let next = (from + 1) % servers.len();
        if next == from || self.connected.load(Ordering::Acquire) > 0 {
            return;
        }
        let (order, lax) = (Ordering::AcqRel, Ordering::Relaxed);
        if self.server.compare_exchange(from, next, order, lax).is_ok() {
            self.broker.server_changed();
            if let Some(suppressed) = self.failovers_log.permit(self.clock.now()) {
                tracing::warn!(
                    from = %servers[from],
                    to = %servers[next],
                    suppressed,
                    "The links go to the next of upstream.servers"
                );
            }
        }
    }
}
