//! The plain values that the rest of the program reads.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use crate::config::choices::{
    Ack, AclMode, AuthMode, CertificateIdentity, ClientAuth, ClientIdRule, Durability, LogFormat,
    Probe, Protocol, ProxyProtocol, QueueFull, RealIpHeader, SenderProperty, SharedAt,
    SubscribeWhileAway, Transport,
};
use crate::config::units::{duration, duration_or_none, size, size32};
use crate::config::upstream::{PublishLinks, Server};

/// The whole configuration, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file that it was read from; `None` for the built-in defaults, with
    /// which a taken port may be replaced by a free one.
    pub source: Option<PathBuf>,
    /// This process.
    pub node: Node,
    /// Certificates, by name.
    pub tls: Vec<Tls>,
    /// Where clients connect; never empty, names are unique.
    pub listeners: Vec<Listener>,
    /// The core broker and the links to it.
    pub upstream: Upstream,
    /// Sessions and their queues.
    pub session: Session,
    /// What one client, or all together, may ask for.
    pub limits: Limits,
    /// Memory accounts, resolved to bytes.
    pub memory: Memory,
    /// What outlives the process.
    pub store: Store,
    /// Who a client is.
    pub auth: Auth,
    /// What a client may do, first match decides; empty unless `auth.acl` is
    /// [`AclMode::Rules`].
    pub acl: Vec<AclRule>,
    /// The HTTP side: metrics, health, read-only JSON.
    pub admin: Admin,
    /// The log on stderr.
    pub log: Log,
    /// The end of the process.
    pub drain: Drain,
}

/// `[node]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// Stable name of this process; part of the upstream client ids.
    pub id: String,
    /// Directory for what must outlive the process.
    pub data_dir: PathBuf,
}

/// `[[tls]]`: one certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The name that listeners refer to.
    pub name: String,
    /// Where the certificate comes from.
    pub source: CertSource,
    /// Which client certificates are taken; `None`: none is asked for.
    pub clients: Option<ClientCertificates>,
    /// File that the secrets of every connection are appended to (the format
    /// of `SSLKEYLOGFILE`), for debugging.
    pub key_log: Option<PathBuf>,
}

impl Tls {
    /// The files that certificates come from, in no order; a change of one is
    /// a reason to load all again.
    pub fn files(&self) -> impl Iterator<Item = &std::path::Path> {
        let own = match &self.source {
            CertSource::Files { cert, key } => vec![cert, key],
            CertSource::Throwaway => vec![],
        };
        let clients = self.clients.iter();
        own.into_iter()
            .chain(clients.flat_map(|c| std::iter::once(&c.ca).chain(&c.crl)))
            .map(PathBuf::as_path)
    }
}

/// Which client certificates are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// PEM file of the authorities that issue them.
    pub ca: PathBuf,
    /// PEM files of revocation lists; with one, there must be one that is not
    /// past its date of each authority in a client's chain.
    pub crl: Vec<PathBuf>,
    /// Whether a client must have one.
    pub auth: ClientAuth,
    /// What in it is the client's name.
    pub identity: CertificateIdentity,
}

/// Where a certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertSource {
    /// PEM files: the chain, and its key.
    Files {
        /// Certificate chain, leaf first.
        cert: PathBuf,
        /// Private key.
        key: PathBuf,
    },
    /// Made at start for `localhost`, gone at the end: for development, on
    /// loopback listeners only.
    Throwaway,
}

/// `[[listeners]]`: one address where clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Label in logs and metrics; unique.
    pub name: String,
    /// What is spoken there.
    pub transport: Transport,
    /// Address; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// Request paths of WebSocket and WebTransport, each begins with `/`; never empty, the first is
    /// told.
    pub paths: Vec<String>,
    /// Names of `[[tls]]` entries, the default first; empty exactly when the
    /// transport is not encrypted.
    pub tls: Vec<String>,
    /// `Origin` values that such a request may carry; empty allows all.
    pub origins: Vec<String>,
    /// Whether browsers are served over WebTransport (HTTP/3) at the same
    /// port; `quic` only.
    pub webtransport: bool,
    /// Whether what clients send in 0-RTT packets is taken, and kept until
    /// their handshake is confirmed; `quic` only.
    pub early_data: bool,
    /// How clients of this listener are authenticated (`[auth] mode` unless
    /// the listener says otherwise).
    pub auth: AuthMode,
    /// What all topics of its clients begin with at the core, unseen by them; `%u` is the user
    /// name, `%c` the client id. Empty: nothing.
    pub mount: String,
    /// Networks whose peers are proxies: what they say of a client's address is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether connections begin with a PROXY protocol header.
    pub proxy_protocol: ProxyProtocol,
    /// Which header of a WebSocket request names the client.
    pub real_ip_header: RealIpHeader,
    /// Silence after which a WebSocket is pinged; `None`: never.
    pub ping_interval: Option<Duration>,
}

/// `[upstream]`: the core broker and the links to it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// Tried in order; never empty; embedded only alone.
    pub servers: Vec<Server>,
    /// User name of the links.
    pub username: Option<String>,
    /// File that holds the links' password; see [`Upstream::read_password`].
    pub password_file: Option<PathBuf>,
    /// MQTT version spoken to the core.
    pub protocol: Protocol,
    /// First part of the links' client ids.
    pub client_id_prefix: String,
    /// Number of D links, 1 to 8.
    pub data_links: u8,
    /// Number of P links, 1 to 8; `auto` is 2 at first.
    pub publish_links: PublishLinks,
    /// Number of links for shared subscriptions, 1 to 4; opened when first asked for.
    pub shared_links: u8,
    /// Who shares out the messages of shared subscriptions.
    pub shared: SharedAt,
    /// Filters subscribed for good, disjoint; clients' filters inside them cost
    /// the core nothing.
    pub roots: Vec<String>,
    /// When a client's publish is acknowledged.
    pub ack: Ack,
    /// Whether the core's habits are probed or taken as its CONNACK says.
    pub probe: Probe,
    /// The topic below which probes publish and subscribe; clients never see it.
    pub probe_topic: String,
    /// What user properties tell the core's subscribers of a publish's sender.
    pub sender_properties: Vec<SenderProperty>,
    /// How long a filter that nobody holds any more stays subscribed.
    #[serde(deserialize_with = "duration")]
    pub linger: Duration,
    /// The shortest such time under pressure or with traffic nobody reads.
    #[serde(deserialize_with = "duration")]
    pub linger_busy_min: Duration,
    /// How many filters may linger at once; past it the oldest go.
    pub filters_lingering_max: u32,
    /// Keep alive of the links, whole seconds, 1 to 65535.
    #[serde(deserialize_with = "duration")]
    pub keepalive: Duration,
    /// From dial to CONNACK.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// First wait before a reconnect.
    #[serde(deserialize_with = "duration")]
    pub backoff_min: Duration,
    /// Longest wait before a reconnect.
    #[serde(deserialize_with = "duration")]
    pub backoff_max: Duration,
    /// How long a client's SUBSCRIBE is held for an absent core.
    #[serde(deserialize_with = "duration")]
    pub subscribe_wait: Duration,
    /// What happens to it then.
    pub subscribe_while_away: SubscribeWhileAway,
    /// Bytes of all publishes that wait for the core.
    #[serde(deserialize_with = "size")]
    pub publishes_waiting: u64,
    /// Bytes of one client's publishes that wait for the core.
    #[serde(deserialize_with = "size")]
    pub publishes_waiting_per_client: u64,
    /// Messages of one 3.x client that may wait for the core; past it its
    /// socket is left unread.
    pub publishes_waiting_v3_max: u32,
    /// Bytes of the retained cache.
    #[serde(deserialize_with = "size")]
    pub retained_cache: u64,
    /// After the core lost a link's session, retained messages are fetched again, and what changed
    /// goes to those who have subscribed to it.
    pub retained_resync: bool,
    /// TLS toward `mqtts` servers.
    pub tls: UpstreamTls,
}

impl Upstream {
    /// Whether the core is the in-process one.
    pub fn is_embedded(&self) -> bool {
        matches!(self.servers.first(), Some(Server::Embedded { .. }))
    }

    /// Reads the links' password, without the line end; read at each dial, so
    /// that a rotated secret is taken up.
    ///
    /// # Errors
    /// When `password_file` is set and cannot be read.
    pub fn read_password(&self) -> std::io::Result<Option<Vec<u8>>> {
        let Some(path) = &self.password_file else {
            return Ok(None);
        };
        let mut secret = std::fs::read(path)?;
        while matches!(secret.last(), Some(b'\n' | b'\r')) {
            secret.pop();
        }
        Ok(Some(secret))
    }
}

/// `[upstream.tls]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamTls {
    /// PEM file of trusted roots; the system's by default.
    pub ca: Option<PathBuf>,
    /// PEM chain of the client certificate; together with `key`.
    pub cert: Option<PathBuf>,
    /// PEM key of the client certificate.
    pub key: Option<PathBuf>,
    /// Name to verify and to send as SNI; the server's host by default.
    pub server_name: Option<String>,
    /// ALPN protocols to offer; none by default.
    pub alpn: Vec<String>,
}

/// `[session]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Session {
    /// Expiry of 3.x sessions with Clean Session 0; at most `expiry_max`.
    #[serde(deserialize_with = "duration")]
    pub expiry_v3: Duration,
    /// Cap on every session's expiry, whole seconds.
    #[serde(deserialize_with = "duration")]
    pub expiry_max: Duration,
    /// Messages in one session's queue.
    pub queue_messages_max: u32,
    /// Bytes in one session's queue.
    #[serde(deserialize_with = "size")]
    pub queue_bytes_max: u64,
    /// What goes when a queue is full.
    pub queue_full: QueueFull,
    /// Whether QoS 0 messages wait for an absent client.
    pub queue_qos0: bool,
    /// Age at which a waiting message is dropped.
    #[serde(deserialize_with = "duration_or_none")]
    pub queue_age_max: Option<Duration>,
    /// How long a client is away before other members of its groups get what it was to have.
    #[serde(deserialize_with = "duration")]
    pub shared_redeliver_after: Duration,
    /// How long a client may be away before its will goes out and its absence is told.
    #[serde(deserialize_with = "duration")]
    pub will_grace: Duration,
    /// Topic on which the core is told that a client comes or goes, `%c` being its id.
    pub presence_topic: String,
    /// Longest keep alive granted; a longer or absent one is answered with
    /// Server Keep Alive. Whole seconds, 1 to 65535.
    #[serde(deserialize_with = "duration_or_none")]
    pub keepalive_max: Option<Duration>,
    /// Keep alive for clients that ask for none (0). Whole seconds.
    #[serde(deserialize_with = "duration_or_none")]
    pub keepalive_default: Option<Duration>,
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest packet taken, in bytes, fixed header included.
    #[serde(deserialize_with = "size32")]
    pub packet_max: u32,
    /// Connections at once.
    pub connections_max: u32,
    /// CONNECTs per second.
    pub connect_rate_max: u32,
    /// Receive Maximum announced to clients.
    pub receive_max: u16,
    /// Topic Alias Maximum announced to clients.
    pub topic_alias_max: u16,
    /// Subscriptions of one session.
    pub subscriptions_per_client_max: u32,
    /// Levels of a topic name or filter.
    pub topic_levels_max: u32,
    /// TLS handshakes at once, and as many of QUIC; past half of them one
    /// address (of IPv6 a /64) gets no more than an eighth.
    pub handshakes_max: u32,
    /// From accept to CONNECT.
    #[serde(deserialize_with = "duration")]
    pub accept_deadline: Duration,
    /// From a packet's first byte to its last.
    #[serde(deserialize_with = "duration")]
    pub packet_deadline: Duration,
    /// A socket that takes nothing for this long is closed; for each 8 KiB that
    /// wait for it it has a second more.
    #[serde(deserialize_with = "duration")]
    pub write_stall: Duration,
    /// Bytes encoded ahead of a socket, per connection.
    #[serde(deserialize_with = "size32")]
    pub output_buffer: u32,
}

/// `[memory]`, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All accounts together.
    pub max: u64,
    /// All sessions' queues together.
    pub queues: u64,
}

/// `[store]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// Where sessions live.
    pub durability: Durability,
    /// Bytes on disk.
    #[serde(deserialize_with = "size")]
    pub disk_max: u64,
}

/// `[auth]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// How clients are authenticated where the listener does not say.
    pub mode: AuthMode,
    /// Password file; `Some` when any listener uses [`AuthMode::File`].
    pub file: Option<PathBuf>,
    /// Whether rules hold.
    pub acl: AclMode,
    /// Which client ids a principal may use.
    pub client_id: ClientIdRule,
}

/// `[[acl]]`: one rule.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclRule {
    /// A principal, or a pattern in which `*` stands for any text.
    pub who: String,
    /// What is allowed; what is not named is denied.
    pub allow: AclAllow,
    /// Topic filters, with `%c` for the client id and `%u` for the user name.
    pub topics: Vec<String>,
}

/// What an ACL rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AclAllow {
    /// To publish.
    pub publish: bool,
    /// To subscribe.
    pub subscribe: bool,
}

/// `[admin]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/api`.
    pub bind: SocketAddr,
    /// Whether `/api` is served, which it only is on loopback.
    pub api: bool,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A level, or filter directives such as `info,tidegate::upstream=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// `[drain]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// From SIGTERM to the end, at most.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}
