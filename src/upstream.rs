//! The core side: a few quiet links to the broker.
//!
//! D links hold the filters and bring messages in, P links take publishes out, the R link fetches
//! retained messages. Each link is a machine without I/O, driven by one task that dials,
//! reconnects and moves bytes.

mod connect;
pub(crate) mod link;
pub mod profile;
mod task;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::config;
use crate::mqtt::QoS;
use crate::router::Router;
use crate::store::Store;
use crate::telemetry::{self, metrics};
use crate::time::Millis;
use crate::transport::ClientTls;

use crate::embedded::EmbeddedBroker;
use link::data::Data;
use link::publish::Publisher;
use link::retained::Fetch;
use profile::BrokerProfile;

/// User properties with this key are ours: stripped from what clients send, and from what the
/// core brings.
pub const RESERVED_KEY: &str = "tidegate";

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Data in.
    Data,
    /// Publishes out.
    Publish,
    /// Retained messages.
    Retained,
    /// Shared subscriptions.
    Shared,
}

impl Role {
    /// The letter in names and client identifiers.
    pub fn letter(self) -> char {
        match self {
            Self::Data => 'd',
            Self::Publish => 'p',
            Self::Retained => 'r',
            Self::Shared => 's',
        }
    }
}

/// How a link stands, for logs, metrics and the admin API.
#[derive(Debug)]
pub struct LinkStatus {
    /// Its name: the role's letter and a number.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its number among those of its role.
    pub number: usize,
    /// CONNECTs sent.
    pub connects: AtomicU64,
    state: Mutex<LinkState>,
    /// From the first dial on: a link that is not needed yet is not one that is down.
    metrics: OnceLock<telemetry::LinkMetrics>,
}

/// The part of a link's status that changes together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    /// Connected: CONNACK received.
    pub up: bool,
    /// The server last tried.
    pub server: String,
    /// `5` or `3.1.1`.
    pub protocol: Option<&'static str>,
    /// The core's Receive Maximum.
    pub window: usize,
    /// Unacknowledged publishes.
    pub in_flight: usize,
    /// Why the last connection ended or failed.
    pub last_error: Option<String>,
}

impl LinkStatus {
    fn metrics(&self) -> &telemetry::LinkMetrics {
        self.metrics.get_or_init(|| metrics().link(&self.name))
    }

    /// It is dialled, or was.
    pub fn wanted(&self) -> bool {
        self.metrics.get().is_some()
    }

    /// How it stands now.
    pub fn state(&self) -> LinkState {
        self.state.lock().clone()
    }
}

/// The core as all links know it, and how it is dialled.
pub(crate) struct Core {
    pub config: config::Upstream,
    pub node: String,
    pub packet_max: u32,
    pub tls: Option<ClientTls>,
    pub embedded: Option<EmbeddedBroker>,
    /// It is known to speak MQTT 3.1.1 and not 5.
    pub no_v5: AtomicBool,
    /// It is known to speak MQTT 5.
    pub has_v5: AtomicBool,
    /// What is known of it; locked while it is probed.
    pub known: tokio::sync::Mutex<Option<profile::cache::Known>>,
    /// The record that holds now, for those who look.
    pub profile: Arc<Mutex<Option<Arc<BrokerProfile>>>>,
}

/// What all links share.
pub(crate) struct Shared {
    pub core: Core,
    pub router: Arc<Router>,
    pub clock: Clock,
    pub stop: CancellationToken,
    /// Raised when filters were placed anew: data links begin again.
    pub placement: AtomicU64,
    /// The one of `servers` that all links are at, or go to.
    pub server: AtomicUsize,
    /// Links that are connected.
    pub up: AtomicUsize,
}

impl Shared {
    /// A link could not reach this server. While another link is there, it is the link's trouble
    /// alone; else all go to the next: what one publishes must be where another subscribes.
    pub fn fail_over(&self, from: usize) {
        let servers = &self.core.config.servers;
        let next = (from + 1) % servers.len();
        if next == from || self.up.load(Ordering::Acquire) > 0 {
            return;
        }
        let (order, lax) = (Ordering::AcqRel, Ordering::Relaxed);
        if self.server.compare_exchange(from, next, order, lax).is_ok() {
            let old = self.core.config.protocol == config::Protocol::V311;
            self.core.no_v5.store(old, Ordering::Relaxed);
            self.core.has_v5.store(false, Ordering::Relaxed);
            tracing::warn!(
                from = %servers[from],
                to = %servers[next],
                "The links go to the next of upstream.servers"
            );
        }
    }
}

/// How a core is reached.
pub struct Reach {
    /// `[upstream]`.
    pub config: config::Upstream,
    /// `node.id`.
    pub node: String,
    /// Largest packet that may be forwarded, bytes.
    pub packet_max: u32,
    /// TLS toward the core, where a server needs it.
    pub tls: Option<ClientTls>,
    /// The in-process core, if that is what `servers` names.
    pub embedded: Option<EmbeddedBroker>,
}

impl Core {
    fn new(reach: Reach) -> Self {
        Self {
            no_v5: (reach.config.protocol == config::Protocol::V311).into(),
            has_v5: AtomicBool::new(false),
            config: reach.config,
            node: reach.node,
            packet_max: reach.packet_max,
            tls: reach.tls,
            embedded: reach.embedded,
            known: tokio::sync::Mutex::default(),
            profile: Arc::default(),
        }
    }
}

/// Probes the first server of a configuration, for a person.
///
/// # Errors
/// Why it cannot be reached.
pub async fn probe_once(reach: Reach) -> Result<BrokerProfile, String> {
    profile::cache::probe_once(&Core::new(reach)).await
}

/// The running links.
#[derive(Debug, Clone)]
pub struct Upstream {
    links: Arc<[Arc<LinkStatus>]>,
    profile: Arc<Mutex<Option<Arc<BrokerProfile>>>>,
}

/// What [`Upstream::start`] needs.
pub struct Start {
    /// How the core is reached.
    pub reach: Reach,
    /// The router.
    pub router: Arc<Router>,
    /// What the links remember.
    pub store: Arc<dyn Store>,
    /// The process's clock.
    pub clock: Clock,
    /// Tells the links to end.
    pub stop: CancellationToken,
    /// A number that other processes do not have: marks No Local tags.
    pub instance: u64,
}

impl Upstream {
    /// Starts all links; each dials on its own.
    pub fn start(start: Start, tasks: &TaskTracker) -> Self {
        let shared = Arc::new(Shared {
            core: Core::new(start.reach),
            router: start.router,
            clock: start.clock,
            stop: start.stop,
            placement: AtomicU64::new(0),
            server: AtomicUsize::new(0),
            up: AtomicUsize::new(0),
        });
        let profile = shared.core.profile.clone();
        let probes: Arc<str> = shared.core.config.probe_topic.as_str().into();
        let mut links = Vec::new();
        let mut add = |role: Role, number: usize| {
            let name = format!("{}{number}", role.letter());
            let status = Arc::new(LinkStatus {
                metrics: OnceLock::new(),
                name,
                role,
                number,
                connects: AtomicU64::new(0),
                state: Mutex::default(),
            });
            links.push(status.clone());
            status
        };
        for n in 0..usize::from(shared.core.config.data_links) {
            let (router, probes) = (shared.router.clone(), probes.clone());
            let machine = Data::new(router, n, start.instance, probes, &*start.store);
            let wake = shared.router.data_wake(n).clone();
            tasks.spawn(task::run(shared.clone(), add(Role::Data, n), machine, wake));
        }
        for n in 0..usize::from(shared.core.config.shared_links) {
            let link = shared.router.shared_link(n);
            let (router, probes) = (shared.router.clone(), probes.clone());
            let machine = Data::new(router, link, start.instance, probes, &*start.store);
            let wake = shared.router.data_wake(link).clone();
            tasks.spawn(task::run(
                shared.clone(),
                add(Role::Shared, n),
                machine,
                wake,
            ));
        }
        for n in 0..usize::from(shared.core.config.publish_links.max) {
            let machine = Publisher::new(shared.router.clone(), n, start.instance);
            let wake = shared.router.publish_wake(n).clone();
            tasks.spawn(task::run(
                shared.clone(),
                add(Role::Publish, n),
                machine,
                wake,
            ));
        }
        let machine = Fetch::new(shared.router.clone(), probes);
        let wake = shared.router.fetch_wake().clone();
        tasks.spawn(task::run(
            shared.clone(),
            add(Role::Retained, 0),
            machine,
            wake,
        ));
        Self {
            links: links.into(),
            profile,
        }
    }

    /// All links.
    pub fn links(&self) -> &[Arc<LinkStatus>] {
        &self.links
    }

    /// What is known of the core; `None` before the first link came up.
    pub fn profile(&self) -> Option<Arc<BrokerProfile>> {
        self.profile.lock().clone()
    }

    /// Publishes that the core has not acknowledged.
    pub fn in_flight(&self) -> usize {
        self.links.iter().map(|l| l.state.lock().in_flight).sum()
    }
}

impl LinkStatus {
    fn set_window(&self, in_flight: usize, window: usize) {
        let mut state = self.state.lock();
        if (state.in_flight, state.window) != (in_flight, window) {
            state.in_flight = in_flight;
            state.window = window;
            drop(state);
            self.metrics().window_used.set(in_flight as f64);
            self.metrics().window.set(window as f64);
        }
    }

    fn count_connect(&self, server: &str) {
        self.connects.fetch_add(1, Ordering::Relaxed);
        self.metrics().connects.increment(1);
        self.state.lock().server = server.to_owned();
    }
}

fn qos_label(qos: QoS) -> telemetry::Qos {
    match qos {
        QoS::AtMostOnce => telemetry::Qos::AtMostOnce,
        QoS::AtLeastOnce => telemetry::Qos::AtLeastOnce,
        QoS::ExactlyOnce => telemetry::Qos::ExactlyOnce,
    }
}

/// Whether a topic is below that of probes, of this node or another.
fn is_probe(topic: &str, probes: &str) -> bool {
    let rest = topic.strip_prefix(probes);
    rest.is_some_and(|rest| rest.starts_with('/'))
}

/// When a message with this Message Expiry Interval (seconds) expires; `u64::MAX`: never.
fn expires_at(expiry: Option<u32>, now: Millis) -> u64 {
    expiry.map_or(u64::MAX, |s| now + u64::from(s) * 1000)
}

/// What is left of it, in seconds, rounded up.
fn remaining(expires_at: u64, now: Millis) -> Option<u32> {
    (expires_at != u64::MAX).then(|| {
        let left = expires_at.saturating_sub(now).div_ceil(1000);
        u32::try_from(left).unwrap_or(u32::MAX)
    })
}

/// The next packet identifier that is not in use; fewer than 65,535 must be.
fn next_id(last: &mut u16, in_use: impl Fn(u16) -> bool) -> u16 {
    loop {
        *last = last.wrapping_add(1);
        if *last != 0 && !in_use(*last) {
            return *last;
        }
    }
}

/// Cuts a list so that no part has more than a packet's worth of bytes.
fn by_bytes<T>(all: &[T], size: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = all;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take_while(|item| {
                let first = bytes == 0;
                bytes += size(item) + 4;
                first || bytes <= REQUEST_BYTES
            })
            .count();
        let (these, others) = rest.split_at(count);
        rest = others;
        (!these.is_empty()).then_some(these)
    })
}

/// Bytes of filters in one request.
const REQUEST_BYTES: usize = 8 * 1024;

/// How long a link's session outlives its connection at the core.
const SESSION_EXPIRY: Duration = Duration::from_secs(3600);
