//! The configuration's values as the modules behind it want them.

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::auth::{Acl, Authenticator};
use crate::budget::Account;
use crate::client::{Clients, Rate, machine};
use crate::clock::Clock;
use crate::config::{self, Config, Server};
use crate::embedded::{EmbeddedBroker, EmbeddedOptions};
use crate::hashing::HashSeed;
use crate::router::{Router, RouterConfig};
use crate::session::{SLEEP_AFTER, SessionLimits};
use crate::store::Store;
use crate::transport::{ClientTls, ConnectionCap, Handshakes, Limits, QuicSecret};
use crate::upstream::{BrokerAccess, RESERVED_KEY};

use crate::runtime::error::StartError;
use crate::runtime::secret;

/// The messages of the embedded broker may have this fraction of `memory.max`.
const EMBEDDED_SHARE: u64 = 8;
/// Bytes of subscriptions' filters that one session may hold for each subscription that it may have.
const FILTER_BYTES: usize = 64;
/// The least bytes of subscriptions' filters that one session may hold, whatever their number.
const FILTERS_MIN_BYTES: usize = 256 * 1024;
/// Packets of one client that are taken before other clients have their turn. The cheapest ones come by
/// the ten thousand in one read, and each turn costs about as much as twenty of them.
const TURN_PACKETS: NonZeroU8 = NonZeroU8::MAX;
/// Bytes that properties and a mount may add to a client's largest packet on its way to the broker.
const UPSTREAM_PACKET_GROWTH_BYTES: u32 = 1024;

/// `hash_seed` is the node's, if it has one; else the process's own is drawn.
pub(super) fn router(
    config: &Config,
    clock: Clock,
    store: &dyn Store,
    hash_seed: Option<HashSeed>,
) -> Router {
    // Without randomness the seed can be guessed; nothing else changes.
    let random = || [0; 2].map(|_: u64| getrandom::u64().unwrap_or_default());
    let hash_seed = hash_seed.unwrap_or_else(|| HashSeed::from_random(random()));
    let limits = session_limits(config, hash_seed);
    Router::new(limits, router_config(config, clock), store)
}

pub(super) fn clients(
    config: &Config,
    router: Arc<Router>,
    clock: Clock,
) -> Result<Clients, StartError> {
    Ok(Clients {
        router,
        clock,
        authenticator: Arc::new(authenticator(config)?),
        acl: ArcSwap::from_pointee(Acl::of(config)),
        rules_replaced: AtomicBool::new(false),
        probe_topic: config.upstream.probe_topic.as_str().into(),
        response_topic_rule: config.auth.response_topic,
        session: config.session.clone(),
        limits: config.limits.clone(),
        rate: Rate::new(config.limits.connect_rate_max),
        machine_limits: machine::Limits {
            input: Arc::default(),
            input_max_bytes: config.memory.max / 8,
            packet_deadline: config.limits.packet_deadline,
            write_stall: config.limits.write_stall,
            turn_packets: TURN_PACKETS,
        },
        unauthenticated: Arc::default(),
        unauthenticated_max_bytes: config.memory.max / 16,
        sender_properties: config.upstream.sender_properties.clone(),
        draining: AtomicBool::new(false),
    })
}

pub(super) fn authenticator(config: &Config) -> Result<Authenticator, StartError> {
    Authenticator::new(&config.auth).map_err(|e| StartError::Config(format!("auth.file: {e}")))
}

/// Everything that is needed to dial the broker.
pub(super) fn broker_access(config: &Config) -> Result<BrokerAccess, StartError> {
    Ok(BrokerAccess {
        config: config.upstream.clone(),
        node: config.node.id.clone(),
        packet_max: config
            .limits
            .packet_max
            .saturating_add(UPSTREAM_PACKET_GROWTH_BYTES),
        tls: client_tls(config)?,
        embedded: embedded(config),
    })
}

pub(super) fn client_tls(config: &Config) -> Result<Option<ClientTls>, StartError> {
    let wanted = config
        .upstream
        .servers
        .iter()
        .any(|s| matches!(s, Server::Remote { tls: true, .. }));
    if !wanted {
        return Ok(None);
    }
    let tls = &config.upstream.tls;
    ClientTls::load(
        tls.ca.as_deref(),
        tls.cert.as_deref(),
        tls.key.as_deref(),
        tls.server_name.clone(),
        tls.alpn.clone(),
    )
    .map(Some)
    .map_err(|e| StartError::Config(format!("[upstream.tls]: {e}")))
}

/// Bytes that the messages of the embedded broker may have; none without it.
pub(super) fn embedded_bytes(config: &Config) -> u64 {
    match config.upstream.is_embedded() {
        true => config.memory.max / EMBEDDED_SHARE,
        false => 0,
    }
}

/// The embedded broker, if the configuration names it.
fn embedded(config: &Config) -> Option<EmbeddedBroker> {
    let bytes = embedded_bytes(config);
    match config.upstream.servers.first() {
        #[cfg(feature = "sim")]
        Some(Server::Embedded { quirks }) => {
            let options = EmbeddedOptions::with_quirks(quirks).within(bytes);
            Some(EmbeddedBroker::start(options))
        }
        #[cfg(not(feature = "sim"))]
        Some(Server::Embedded {}) => {
            let options = EmbeddedOptions::default().within(bytes);
            Some(EmbeddedBroker::start(options))
        }
        _ => None,
    }
}

pub(super) fn transport_limits(
    config: &Config,
    cap: Arc<ConnectionCap>,
) -> Result<Limits, StartError> {
    Ok(Limits {
        handshakes: Handshakes::new(config.limits.handshakes_max as usize),
        accept_deadline: config.limits.accept_deadline,
        connect_max: config.limits.connect_max as usize,
        packet_max: config.limits.packet_max as usize,
        connections: cap,
        quic_secret: quic_secret(config)
            .map_err(|e| StartError::Internal(format!("no randomness: {e}")))?,
        ..Limits::default()
    })
}

/// The secret is kept in a file only for configured QUIC listeners; a first run writes no files.
fn quic_secret(config: &Config) -> std::io::Result<QuicSecret> {
    let wanted = |l: &config::Listener| l.transport == config::Transport::Quic;
    match config.source.is_some() && config.listeners.iter().any(wanted) {
        true => secret::load(&config.node.data_dir),
        false => Ok(QuicSecret::random()?.0),
    }
}

fn session_limits(config: &Config, hash_seed: HashSeed) -> SessionLimits {
    let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
    let subscriptions_max = config.limits.subscriptions_per_client_max as usize;
    SessionLimits {
        receive_max: config.limits.receive_max,
        receive_max_hard: config.limits.receive_max_hard,
        topic_alias_max: config.limits.topic_alias_max,
        packet_max: config.limits.packet_max,
        queue_messages_max: config.session.queue_messages_max as usize,
        queue_bytes_max: config.session.queue_bytes_max as usize,
        queue_age_max: config.session.queue_age_max,
        sleep_after: SLEEP_AFTER,
        shared_redeliver_after: config.session.shared_redeliver_after,
        will_grace: config.session.will_grace,
        presence: !config.session.presence_topic.is_empty(),
        queue_full: config.session.queue_full,
        queue_qos0: config.session.queue_qos0,
        output_buffer: Arc::new((config.limits.output_buffer as usize).into()),
        filter_bytes_max: (subscriptions_max * FILTER_BYTES).max(FILTERS_MIN_BYTES),
        subscriptions_max,
        topic_levels_max: config.limits.topic_levels_max as usize,
        v3_publishes_max: config.upstream.publishes_waiting_v3_max as usize,
        expiry_max: seconds(config.session.expiry_max),
        publish_account: Arc::new(Account::new()),
        reserved_key: RESERVED_KEY,
        hash_seed,
    }
}

/// With more filters than this for each data link, another one is opened. mosquitto goes through a
/// connection's subscriptions for each new one; so many take it a microsecond.
const DATA_LINK_FILTERS: usize = 2000;

fn router_config(config: &Config, clock: Clock) -> RouterConfig {
    let upstream = &config.upstream;
    RouterConfig {
        data_links: usize::from(upstream.data_links.first),
        data_links_max: usize::from(upstream.data_links.max),
        data_link_filters: DATA_LINK_FILTERS,
        shared_links: usize::from(upstream.shared_links.first),
        shared_links_max: usize::from(upstream.shared_links.max),
        local_groups: upstream.shared == config::SharedAt::Local,
        roots: upstream.roots.clone(),
        publish_links: usize::from(upstream.publish_links.first),
        publish_links_max: usize::from(upstream.publish_links.max),
        presence_topic: Some(config.session.presence_topic.clone()).filter(|t| !t.is_empty()),
        started_at: clock.started_at(),
        linger: upstream.linger,
        linger_busy_min: upstream.linger_busy_min,
        filters_lingering_max: upstream.filters_lingering_max as usize,
        subscribe_wait: upstream.subscribe_wait,
        subscribe_accept: upstream.subscribe_while_away == config::SubscribeWhileAway::Accept,
        publishes_waiting: upstream.publishes_waiting,
        publishes_waiting_per_client: upstream.publishes_waiting_per_client as usize,
        retained_cache: upstream.retained_cache as usize,
        retained_resync: upstream.retained_resync,
        sessions: config.memory.sessions,
        queues: config.memory.queues,
        output: config.memory.max / 8,
        write_stall: config.limits.write_stall,
        evict_after: config.session.evict_after,
    }
}
