//! The defaults: the value of each key that a file leaves out.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::budget::QueueFull;
use crate::config::address::WS_PATH;
use crate::config::choices::{
    Ack, AclMode, AuthMode, ClientIdRule, Durability, LogFormat, Probe, Protocol, ProxyProtocol,
    RealIpHeader, ResponseTopicRule, SharedAt, SubscribeWhileAway, Transport,
};
use crate::config::host;
use crate::config::types::{
    Admin, Auth, CertSource, Config, Drain, Limits, Listener, Log, Memory, Node, Session, Setting,
    Store, Tls, Upstream, UpstreamTls,
};
use crate::config::upstream::{LinkCount, Server};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// `memory.max`: share of the machine's (or control group's) memory, in percent.
pub(super) const MEMORY_MAX_PERCENT: u64 = 80;
/// `memory.sessions`: share of `memory.max`, in percent.
pub(super) const MEMORY_SESSIONS_PERCENT: u64 = 15;
/// `memory.queues`: share of `memory.max`, in percent.
pub(super) const MEMORY_QUEUES_PERCENT: u64 = 25;
/// `node.id` with the embedded broker, which needs none.
pub(super) const NODE_ID_EMBEDDED: &str = "local";
/// The name of the `[[tls]]` of a listener that names none.
pub(super) const TLS_NAME: &str = "default";
/// Less than the 60 seconds after which nginx and most load balancers cut a silent connection.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(45);

impl Config {
    /// The configuration without a file: loopback listeners of every transport, the embedded broker,
    /// and a throw-away certificate.
    pub fn builtin() -> Self {
        let memory_max = host::memory() / 100 * MEMORY_MAX_PERCENT;
        let mut config = Self {
            source: None,
            node: Node {
                id: NODE_ID_EMBEDDED.to_owned(),
                ..Node::default()
            },
            tls: vec![throwaway()],
            listeners: listeners(),
            upstream: Upstream::default(),
            session: Session::default(),
            limits: Limits::default(),
            memory: Memory {
                max: memory_max,
                sessions: memory_max / 100 * MEMORY_SESSIONS_PERCENT,
                queues: memory_max / 100 * MEMORY_QUEUES_PERCENT,
            },
            store: Store::default(),
            auth: Auth {
                mode: AuthMode::Anonymous,
                file: None,
                acl: AclMode::Open,
                client_id: ClientIdRule::Any,
                certificate_users: false,
                response_topic: ResponseTopicRule::Remove,
            },
            acl: Vec::new(),
            admin: Admin::default(),
            log: Log::default(),
            drain: Drain::default(),
        };
        config.fit_small_memory(|_| false);
        config
    }

    /// Shrinks the default budgets of a small machine to an eighth of `memory.max` each. Values that
    /// the file writes stay.
    pub(super) fn fit_small_memory(&mut self, written: impl Fn(&str) -> bool) {
        let most = self.memory.max / 8;
        let up = &mut self.upstream;
        if !written("upstream.publishes_waiting") {
            up.publishes_waiting = up.publishes_waiting.min(most);
        }
        if !written("upstream.retained_cache") {
            up.retained_cache = up.retained_cache.min(most);
        }
        if !written("upstream.publishes_waiting_per_client") {
            let most = up.publishes_waiting;
            up.publishes_waiting_per_client = up.publishes_waiting_per_client.min(most);
        }
    }
}

impl Listener {
    /// A listener with the default of every other key.
    pub fn new(transport: Transport, bind: SocketAddr) -> Self {
        Self {
            name: transport.name().to_owned(),
            transport,
            bind,
            paths: vec![WS_PATH.to_owned()],
            tls: match transport.is_encrypted() {
                true => vec![TLS_NAME.to_owned()],
                false => Vec::new(),
            },
            origins: Vec::new(),
            webtransport: false,
            early_data: false,
            auth: AuthMode::Anonymous,
            mount: String::new(),
            trusted_proxies: Vec::new(),
            proxy_protocol: ProxyProtocol::Off,
            real_ip_header: RealIpHeader::XForwardedFor,
            ping_interval: Some(PING_INTERVAL),
        }
    }
}

/// The built-in listeners, all on loopback.
pub(super) fn listeners() -> Vec<Listener> {
    let listener = |transport: Transport, port| Listener {
        // WebTransport is on for a first try. A configuration turns it on explicitly, since it opens
        // a QUIC listener to the scripts of any web page.
        webtransport: transport == Transport::Quic,
        ..Listener::new(transport, loopback(port))
    };
    vec![
        listener(Transport::Tcp, 1883),
        listener(Transport::Ws, 8083),
        listener(Transport::Wss, 8084),
        listener(Transport::Tls, 8883),
        listener(Transport::Quic, 14567),
    ]
}

/// The only `[[tls]]` of a file that has none.
pub(super) fn throwaway() -> Tls {
    Tls {
        name: TLS_NAME.to_owned(),
        source: CertSource::Throwaway,
        clients: None,
        key_log: None,
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

impl Default for Node {
    fn default() -> Self {
        Self {
            id: String::new(),
            data_dir: PathBuf::from("data"),
        }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            servers: vec![Server::embedded()],
            username: None,
            password_file: None,
            protocol: Protocol::Auto,
            client_id_prefix: "tidegate".to_owned(),
            data_links: LinkCount::AUTO,
            publish_links: LinkCount::AUTO,
            shared_links: LinkCount::AUTO,
            shared: SharedAt::Broker,
            roots: Vec::new(),
            sender_properties: Vec::new(),
            ack: Ack::Upstream,
            probe: Probe::Auto,
            probe_topic: "tidegate/probe".to_owned(),
            linger: Duration::from_secs(600),
            linger_busy_min: Duration::from_secs(60),
            filters_lingering_max: 100_000,
            keepalive: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            subscribe_wait: Duration::from_secs(10),
            subscribe_while_away: SubscribeWhileAway::Accept,
            publishes_waiting: 64 * MIB,
            publishes_waiting_per_client: 4 * MIB,
            publishes_waiting_v3_max: 1000,
            retained_cache: 64 * MIB,
            retained_resync: true,
            tls: UpstreamTls::default(),
        }
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            expiry_v3: Duration::from_secs(2 * 3600),
            expiry_max: Duration::from_secs(7 * 24 * 3600),
            queue_messages_max: 1000,
            queue_bytes_max: 16 * MIB,
            queue_full: QueueFull::Oldest,
            queue_qos0: false,
            queue_age_max: None,
            evict_after: None,
            shared_redeliver_after: Duration::from_secs(30),
            will_grace: Duration::ZERO,
            restart_grace: Duration::from_secs(30),
            presence_topic: String::new(),
            keepalive_max: None,
            keepalive_default: None,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            packet_max: MIB as u32,
            connect_max: (128 * KIB) as u32,
            connections_max: Setting::Default(100_000),
            connect_rate_max: 5000,
            receive_max: 256,
            receive_max_hard: 1024,
            topic_alias_max: 64,
            subscriptions_per_client_max: 10_000,
            topic_levels_max: 128,
            handshakes_max: 1000,
            accept_deadline: Duration::from_secs(10),
            packet_deadline: Duration::from_secs(30),
            write_stall: Duration::from_secs(60),
            output_buffer: (64 * KIB) as u32,
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self {
            durability: Durability::Memory,
            disk_max: 10 * GIB,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            bind: loopback(9883),
            api: true,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            // Docker kills a container 10 s after it has asked it to stop.
            grace: Duration::from_secs(7),
        }
    }
}
