//! Wiring: configuration in, a running proxy out; signals, ticks, drain.

mod certificates;
mod dates;
mod drain;
mod events;
mod hints;
mod probe;
mod secret;
mod view;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin;
use crate::auth::{Acl, Authenticator};
use crate::budget::Account;
use crate::client::{Clients, ListenerContext, Rate};
use crate::clock::Clock;
use crate::config::{self, CertSource, Config, Server};
use crate::embedded::{EmbeddedBroker, EmbeddedOptions};
use crate::router::{Router, RouterConfig};
use crate::session::{QueueFull, SessionLimits};
use crate::store::{Memory, Store};
use crate::telemetry::metrics;
use crate::topics::overlaps;
use crate::transport::{
    self, BindError, Bound, ClientTls, ConnectionCap, Drain, Handshakes, Kind, Limits, ListenSpec,
    Proxies, QuicSecret,
};
use crate::upstream::{RESERVED_KEY, Reach, Start, Upstream};

pub use probe::probe;

use certificates::Certificates;
use events::Counted;
use view::View;

/// Why the process does not start; each has its exit code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Something that the configuration names is missing or wrong (exit 64).
    #[error("{0}")]
    Config(String),
    /// An address is taken, or cannot be had now (exit 75).
    #[error("{0}")]
    Temporary(String),
    /// Anything else (exit 70).
    #[error("{0}")]
    Internal(String),
}

impl StartError {
    /// The process's exit code: sysexits' USAGE, SOFTWARE or TEMPFAIL.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 64,
            Self::Internal(_) => 70,
            Self::Temporary(_) => 75,
        }
    }
}

/// A listener that is bound and not served yet.
struct Opened {
    listener: config::Listener,
    bound: Bound,
}

/// Runs until SIGTERM or SIGINT, drains, and returns. `connections` is the cap that the open-file
/// limit allows.
///
/// # Errors
/// [`StartError`]; nothing was served.
pub async fn run(config: Config, connections: usize) -> Result<(), StartError> {
    let mut signals = drain::Signals::new()?;
    let hangup = certificates::hangup()?;
    let clock = Clock::default();
    let stop_accepting = CancellationToken::new();
    let stop_links = CancellationToken::new();
    let tasks = TaskTracker::new();
    let cap = Arc::new(ConnectionCap::new(connections));
    let store: Arc<dyn Store> = Arc::new(Memory);
    let router = Router::new(
        session_limits(&config),
        router_config(&config, clock),
        &*store,
    );
    let router = Arc::new(router);
    let clients = Arc::new(Clients {
        router: router.clone(),
        clock,
        authenticator: Authenticator::new(&config.auth)
            .map_err(|e| StartError::Config(format!("auth.file: {e}")))?,
        acl: Acl::new(config.auth.acl, &config.acl),
        session: config.session.clone(),
        limits: config.limits.clone(),
        rate: Rate::new(config.limits.connect_rate_max),
        input: Account::new(),
        input_max: config.memory.max / 8,
        strangers: Account::new(),
        strangers_max: config.memory.max / 16,
        sender_properties: config.upstream.sender_properties.clone(),
        draining: AtomicBool::new(false),
    });
    named(&config)?;
    let mut certificates = Certificates::load(&config)?;
    let tls = client_tls(&config)?;
    let embedded = embedded(&config);
    let limits = Arc::new(transport_limits(&config, cap.clone())?);
    let opened = open_listeners(&config, &mut certificates, &limits)?;

    // From here on nothing of the configuration can fail.
    let upstream = Upstream::start(
        Start {
            reach: Reach {
                config: config.upstream.clone(),
                node: config.node.id.clone(),
                packet_max: upstream_packet_max(&config),
                tls,
                embedded,
            },
            router: router.clone(),
            store,
            clock,
            stop: stop_links.clone(),
            instance: getrandom::u64().unwrap_or_default() | 1,
        },
        &tasks,
    );
    let view = Arc::new(View {
        router: router.clone(),
        upstream: upstream.clone(),
        clients: clients.clone(),
        started: std::time::SystemTime::now(),
    });
    let admin = open_admin(&config, view).await?;
    set_budgets(&config);
    let mut lines: Vec<(String, &'static str, String)> = opened
        .iter()
        .map(|o| hints::address(&o.listener, o.bound.local_addr()))
        .collect();
    lines.extend(
        opened
            .iter()
            .filter_map(|o| hints::webtransport(&o.listener, o.bound.local_addr())),
    );
    let throwaway = throwaway(&config, &opened);
    lines.push((
        "admin".into(),
        "http",
        format!("http://{}", admin.local_addr()),
    ));
    tasks.spawn(admin.run(stop_links.clone().cancelled_owned()));
    let upkeep_stop = stop_links.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = crate::telemetry::upkeep() => {}
            () = upkeep_stop.cancelled() => {}
        }
    });
    tasks.spawn(tick(router.clone(), clock, stop_links.clone()));
    tasks.spawn(certificates.watch(hangup, stop_links.clone()));
    let drains: Vec<Drain> = opened.iter().map(|o| o.bound.drain()).collect();
    for Opened { listener, bound } in opened {
        serve(&tasks, &clients, &listener, bound, stop_accepting.clone());
    }
    tell(&config, &lines, &throwaway);

    signals.come().await;
    drain::drain(drain::Running {
        grace: config.drain.grace,
        clients,
        upstream,
        cap,
        stop_accepting,
        stop_links,
        drains,
        tasks,
    })
    .await;
    Ok(())
}

fn serve(
    tasks: &TaskTracker,
    clients: &Arc<Clients>,
    listener: &config::Listener,
    bound: Bound,
    stop: CancellationToken,
) {
    let transport = listener.transport.name();
    let door = ListenerContext {
        auth: listener.auth,
        name: listener.name.as_str().into(),
        transport,
        metrics: Arc::new(metrics().listener(&listener.name, transport)),
        webtransport: listener
            .webtransport
            .then(|| Arc::new(metrics().listener(&listener.name, Kind::WebTransport.as_str()))),
        mount: listener.mount.as_str().into(),
        ping_after: match listener.ping_interval {
            Some(after) if listener.transport.is_websocket() => after.as_millis() as u64,
            _ => 0,
        },
    };
    let clients = clients.clone();
    let handler = move |accepted| clients.clone().serve(door.clone(), accepted);
    tasks.spawn(bound.serve(handler, stop));
}

/// The throw-away certificates that a page may have to name.
fn throwaway(config: &Config, opened: &[Opened]) -> Vec<hints::Certificate> {
    let thrown = config
        .tls
        .iter()
        .filter(|tls| matches!(tls.source, CertSource::Throwaway));
    let found = thrown.filter_map(|tls| {
        let user = opened
            .iter()
            .find(|o| o.listener.webtransport && o.listener.tls.first() == Some(&tls.name))?;
        let sha256 = user.bound.spec().tls.as_ref()?.leaf_sha256()?;
        Some(hints::Certificate {
            name: tls.name.clone(),
            sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    });
    found.collect()
}

/// Tells every bound address on standard output, then `ready`.
fn tell(
    config: &Config,
    lines: &[(String, &'static str, String)],
    certificates: &[hints::Certificate],
) {
    let mut out = String::new();
    for (name, transport, url) in lines {
        out.push_str(&format!("listening {name} {transport} {url}\n"));
    }
    for hints::Certificate { name, sha256 } in certificates {
        out.push_str(&format!("certificate {name} sha256 {sha256}\n"));
    }
    out.push_str("ready\n");
    if config.source.is_none() {
        out.push_str(&hints::what_to_type(lines, certificates));
    }
    let mut stdout = std::io::stdout().lock();
    // A closed standard output is no reason not to serve.
    let _ = stdout.write_all(out.as_bytes());
    let _ = stdout.flush();
}

async fn open_admin(config: &Config, view: Arc<View>) -> Result<admin::Server, StartError> {
    let failed = |e: std::io::Error| {
        StartError::Temporary(format!(
            "admin.bind: {} cannot be bound: {e}",
            config.admin.bind
        ))
    };
    match admin::Server::bind(&config.admin, view.clone()).await {
        Err(e) if config.source.is_none() && e.kind() == std::io::ErrorKind::AddrInUse => {
            let mut free = config.admin.clone();
            free.bind.set_port(0);
            let server = admin::Server::bind(&free, view).await.map_err(failed)?;
            say_taken(
                "admin",
                config.admin.bind.port(),
                server.local_addr().port(),
            );
            Ok(server)
        }
        other => other.map_err(failed),
    }
}

/// Looks at everything that the configuration names, as a start would, without opening a port.
///
/// # Errors
/// What a start would fail on.
pub fn check(config: &Config) -> Result<Checked, StartError> {
    let certificates = Certificates::load(config)?;
    named(config)?;
    let now = std::time::SystemTime::now();
    let mut checked = Checked::default();
    for dated in certificates.dated() {
        let (tls, what, place) = (&dated.tls, dated.what, dated.place());
        let line = format!("{tls:<16} {what} until {}, {place}", dated.until());
        checked.certificates.push(line);
        if dated.near(now) != dates::Near::Far {
            let warning = format!("[[tls]] \"{tls}\": {place}: {}", dated.say(now));
            checked.warnings.push(warning);
        }
    }
    for tls in config.tls.iter().filter(|tls| tls.key_log.is_some()) {
        checked.warnings.push(format!(
            "[[tls]] \"{}\": key_log is on: who has that file can read all connections",
            tls.name
        ));
    }
    Ok(checked)
}

/// What a configuration names, as far as it is good.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// A line for each certificate and revocation list, with its date.
    pub certificates: Vec<String>,
    /// What works, and should not stay as it is.
    pub warnings: Vec<String>,
}

/// What a configuration names beside certificates.
fn named(config: &Config) -> Result<(), StartError> {
    client_tls(config)?;
    roots(config)?;
    config
        .upstream
        .read_password()
        .map_err(|e| StartError::Config(format!("upstream.password_file: {e}")))?;
    Ok(())
}

/// Roots overlap no other: a message comes by one of them.
fn roots(config: &Config) -> Result<(), StartError> {
    let roots = &config.upstream.roots;
    for (n, root) in roots.iter().enumerate() {
        if let Some(other) = roots[..n].iter().find(|other| overlaps(other, root)) {
            return Err(StartError::Config(format!(
                "upstream.roots[{n}]: {root:?} overlaps {other:?}; write the wider of them, or disjoint ones"
            )));
        }
    }
    Ok(())
}

fn open_listeners(
    config: &Config,
    certificates: &mut Certificates,
    limits: &Arc<Limits>,
) -> Result<Vec<Opened>, StartError> {
    let mut opened = Vec::new();
    for listener in &config.listeners {
        let spec = ListenSpec {
            name: listener.name.clone(),
            transport: kind(listener.transport),
            bind: listener.bind,
            paths: listener.paths.clone(),
            origins: listener.origins.clone(),
            proxies: Proxies {
                trusted: listener.trusted_proxies.clone(),
                protocol: listener.proxy_protocol,
                header: listener.real_ip_header,
            },
            tls: certificates.serve(&listener.tls, listener.early_data)?,
            webtransport: listener.webtransport,
        };
        let bound = match transport::bind(spec.clone(), limits.clone()) {
            Err(BindError::AddrInUse { .. }) if config.source.is_none() => {
                let mut free = spec.clone();
                free.bind.set_port(0);
                let bound = transport::bind(free, limits.clone()).map_err(bind_failed)?;
                let port = bound.local_addr().port();
                say_taken(&listener.name, listener.bind.port(), port);
                bound
            }
            other => other.map_err(bind_failed)?,
        };
        opened.push(Opened {
            listener: listener.clone(),
            bound,
        });
    }
    Ok(opened)
}

fn say_taken(name: &str, taken: u16, port: u16) {
    tracing::warn!(
        listener = name,
        taken,
        port,
        "The default port is taken; a free one is used"
    );
}

fn bind_failed(error: BindError) -> StartError {
    match error {
        BindError::AddrInUse { .. } => StartError::Temporary(error.to_string()),
        other => StartError::Temporary(other.to_string()),
    }
}

fn kind(transport: config::Transport) -> Kind {
    match transport {
        config::Transport::Tcp => Kind::Tcp,
        config::Transport::Tls => Kind::Tls,
        config::Transport::Ws => Kind::Ws,
        config::Transport::Wss => Kind::Wss,
        config::Transport::Quic => Kind::Quic,
    }
}

/// The in-process core, if that is what the configuration names.
fn embedded(config: &Config) -> Option<EmbeddedBroker> {
    match config.upstream.servers.first() {
        #[cfg(feature = "sim")]
        Some(Server::Embedded { quirks }) => {
            let options = EmbeddedOptions::with_quirks(quirks);
            Some(EmbeddedBroker::start(options))
        }
        #[cfg(not(feature = "sim"))]
        Some(Server::Embedded {}) => Some(EmbeddedBroker::start(EmbeddedOptions::default())),
        _ => None,
    }
}

fn client_tls(config: &Config) -> Result<Option<ClientTls>, StartError> {
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

fn transport_limits(config: &Config, cap: Arc<ConnectionCap>) -> Result<Limits, StartError> {
    Ok(Limits {
        handshakes: Handshakes::new(config.limits.handshakes_max as usize),
        accept_deadline: config.limits.accept_deadline,
        frame_before_auth: 16 * 1024,
        packet_max: config.limits.packet_max as usize,
        connections: cap,
        events: Arc::new(Counted),
        quic_secret: quic_secret(config)
            .map_err(|e| StartError::Internal(format!("no randomness: {e}")))?,
        ..Limits::default()
    })
}

/// Kept where there is a configuration, and somebody to use it.
fn quic_secret(config: &Config) -> std::io::Result<QuicSecret> {
    let wanted = |l: &config::Listener| l.transport == config::Transport::Quic;
    match config.source.is_some() && config.listeners.iter().any(wanted) {
        true => secret::load(&config.node.data_dir),
        false => Ok(QuicSecret::random()?.0),
    }
}

/// What a client's largest packet may have become with what we add.
fn upstream_packet_max(config: &Config) -> u32 {
    config.limits.packet_max.saturating_add(1024)
}

fn session_limits(config: &Config) -> SessionLimits {
    let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
    SessionLimits {
        receive_max: config.limits.receive_max,
        topic_alias_max: config.limits.topic_alias_max,
        packet_max: config.limits.packet_max,
        queue_messages_max: config.session.queue_messages_max as usize,
        queue_bytes_max: config.session.queue_bytes_max as usize,
        queue_age_max: config
            .session
            .queue_age_max
            .map_or(u64::MAX, |age| age.as_millis() as u64),
        shared_redeliver_after: config.session.shared_redeliver_after.as_millis() as u64,
        will_grace: config.session.will_grace.as_millis() as u64,
        presence: !config.session.presence_topic.is_empty(),
        queue_full: match config.session.queue_full {
            config::QueueFull::Oldest => QueueFull::Oldest,
            config::QueueFull::Newest => QueueFull::Newest,
            config::QueueFull::EndSession => QueueFull::EndSession,
        },
        queue_qos0: config.session.queue_qos0,
        output_buffer: Arc::new((config.limits.output_buffer as usize).into()),
        filter_bytes_max: 256 * 1024,
        subscriptions_max: config.limits.subscriptions_per_client_max as usize,
        topic_levels_max: config.limits.topic_levels_max as usize,
        v3_publishes_max: config.upstream.publishes_waiting_v3_max as usize,
        expiry_max: seconds(config.session.expiry_max),
        publish_account: Arc::new(Account::new()),
        reserved_key: RESERVED_KEY,
        hasher: Default::default(),
    }
}

fn router_config(config: &Config, clock: Clock) -> RouterConfig {
    let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let upstream = &config.upstream;
    RouterConfig {
        data_links: usize::from(upstream.data_links),
        shared_links: usize::from(upstream.shared_links),
        local_groups: upstream.shared == config::SharedAt::Local,
        roots: upstream.roots.clone(),
        publish_links: usize::from(upstream.publish_links.first),
        publish_links_max: usize::from(upstream.publish_links.max),
        presence_topic: config.session.presence_topic.clone(),
        started_at: clock.started_at(),
        linger: ms(upstream.linger),
        linger_busy_min: ms(upstream.linger_busy_min),
        filters_lingering_max: upstream.filters_lingering_max as usize,
        subscribe_wait: ms(upstream.subscribe_wait),
        subscribe_accept: upstream.subscribe_while_away == config::SubscribeWhileAway::Accept,
        publishes_waiting: upstream.publishes_waiting,
        publishes_waiting_per_client: upstream.publishes_waiting_per_client as usize,
        retained_cache: upstream.retained_cache as usize,
        retained_resync: upstream.retained_resync,
        queues: config.memory.queues,
        output: config.memory.max / 8,
        write_stall: ms(config.limits.write_stall),
        // What does not work leaves a number that could be guessed, and nothing else.
        hash_seed: getrandom::u64().unwrap_or_default(),
    }
}

fn set_budgets(config: &Config) {
    use crate::telemetry::MemoryAccount as A;
    let budgets = &metrics().memory_budget_bytes;
    budgets[A::Total].set(config.memory.max as f64);
    budgets[A::Queues].set(config.memory.queues as f64);
    budgets[A::PublishesWaiting].set(config.upstream.publishes_waiting as f64);
    budgets[A::RetainedCache].set(config.upstream.retained_cache as f64);
}

/// How often the router is told the time.
const TICK: Duration = Duration::from_millis(100);
/// Ticks between walks over all sessions.
const WALK: u32 = 20;

async fn tick(router: Arc<Router>, clock: Clock, stop: CancellationToken) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count: u32 = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let now = clock.now();
        router.tick(now);
        count = count.wrapping_add(1);
        if count.is_multiple_of(WALK) {
            router.close_stalled(now);
            router.ping_idle(now);
        }
    }
}
