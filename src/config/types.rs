//! The configuration as plain values, for the rest of the program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use crate::budget::QueueFull;
use crate::config::choices::{
    Ack, AclMode, AuthMode, CertificateIdentity, ClientAuth, ClientIdRule, Durability, LogFormat,
    Probe, Protocol, ProxyProtocol, RealIpHeader, ResponseTopicRule, SenderProperty, SharedAt,
    SubscribeWhileAway, Transport,
};
use crate::config::files;
use crate::config::units::{duration, duration_or_none, size, size32};
use crate::config::upstream::{LinkCount, Server};

/// The whole configuration, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file; `None` for the built-in configuration, with which a free port may replace a default
    /// port that is taken.
    pub source: Option<PathBuf>,
    /// This process.
    pub node: Node,
    /// Certificates, by name.
    pub tls: Vec<Tls>,
    /// The listeners; at least one, with unique names.
    pub listeners: Vec<Listener>,
    /// The broker and the links to it.
    pub upstream: Upstream,
    /// Sessions and their queues.
    pub session: Session,
    /// Limits of one client and of all together.
    pub limits: Limits,
    /// Memory accounts, resolved to bytes.
    pub memory: Memory,
    /// Where sessions are stored.
    pub store: Store,
    /// How clients are authenticated.
    pub auth: Auth,
    /// The access rules. The first match decides. Empty unless `auth.acl` is
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
    /// Stable name of this process; part of the links' client identifiers.
    pub id: String,
    /// Directory for state that must outlive the process.
    pub data_dir: PathBuf,
}

/// `[[tls]]`: one certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The name that listeners refer to.
    pub name: String,
    /// Where the certificate comes from.
    pub source: CertSource,
    /// Which client certificates are accepted; `None`: clients are not asked for one.
    pub clients: Option<ClientCertificates>,
    /// File that the secrets of every connection are appended to (the format
    /// of `SSLKEYLOGFILE`), for debugging.
    pub key_log: Option<PathBuf>,
}

impl Tls {
    /// The files of this entry, in no order. When one of them changes, all are read again.
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

/// Which client certificates are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// PEM file of the authorities that issue them.
    pub ca: PathBuf,
    /// PEM files of revocation lists. If there is any, each authority in a client's chain needs a list
    /// that has not expired.
    pub crl: Vec<PathBuf>,
    /// Whether a client must have a certificate.
    pub auth: ClientAuth,
    /// The part of the certificate that is the client's name.
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
    /// Made at each start for `localhost` and never written: for development, on loopback listeners
    /// only.
    Throwaway,
}

/// `[[listeners]]`: one address where clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Label in logs and metrics; unique.
    pub name: String,
    /// Its transport.
    pub transport: Transport,
    /// Address; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// Request paths of WebSocket and WebTransport, at least one, each beginning with `/`. The first
    /// is shown to users.
    pub paths: Vec<String>,
    /// Names of `[[tls]]` entries, the default first; empty if and only if the transport is not
    /// encrypted.
    pub tls: Vec<String>,
    /// Allowed `Origin` values of WebSocket and WebTransport requests, in their normal form; `*.` at the
    /// beginning of a host stands for one label. Empty allows all.
    pub origins: Vec<String>,
    /// Whether browsers are served over WebTransport (HTTP/3) at the same port; `quic` only.
    pub webtransport: bool,
    /// Whether data in 0-RTT packets is accepted, and kept until the handshake is confirmed; `quic`
    /// only.
    pub early_data: bool,
    /// How clients of this listener are authenticated.
    pub auth: AuthMode,
    /// Prefix of all topics of its clients at the broker, which clients do not see; `%u` is the user
    /// name, `%c` the client identifier. May be empty.
    pub mount: String,
    /// Networks of proxies that may state a client's address.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether connections begin with a PROXY protocol header.
    pub proxy_protocol: ProxyProtocol,
    /// The header of a WebSocket request that states the client's address.
    pub real_ip_header: RealIpHeader,
    /// Silence after which a WebSocket is pinged; `None`: never.
    pub ping_interval: Option<Duration>,
}

/// `[upstream]`: the broker and the links to it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// The broker's addresses, tried in order; at least one. The embedded broker stands alone.
    pub servers: Vec<Server>,
    /// User name of the links.
    pub username: Option<String>,
    /// File that holds the links' password; see [`Upstream::read_password`].
    pub password_file: Option<PathBuf>,
    /// MQTT version of the links.
    pub protocol: Protocol,
    /// First part of the links' client identifiers.
    pub client_id_prefix: String,
    /// Number of data links, 1 to 8. `"auto"`: 2, and more where the broker has no Subscription
    /// Identifiers and filters overlap.
    pub data_links: LinkCount<2>,
    /// Number of publish links, 1 to 8.
    pub publish_links: LinkCount<2>,
    /// Number of shared links, 1 to 8; opened when a client first asks for a shared subscription.
    /// `"auto"`: 1, and more as for data links.
    pub shared_links: LinkCount<1>,
    /// The side that distributes the messages of shared subscriptions.
    pub shared: SharedAt,
    /// Disjoint wildcard filters that stay subscribed. A client's filter inside one costs the broker
    /// nothing.
    pub roots: Vec<String>,
    /// When a client's publish is acknowledged.
    pub ack: Ack,
    /// Whether the broker is probed, or its CONNACK alone counts.
    pub probe: Probe,
    /// Topic prefix under which probes publish and subscribe; clients never see it.
    pub probe_topic: String,
    /// User properties that name a publish's sender to the broker's subscribers.
    pub sender_properties: Vec<SenderProperty>,
    /// How long a filter without subscribers stays subscribed at the broker.
    #[serde(deserialize_with = "duration")]
    pub linger: Duration,
    /// The shortest such time, for filters whose traffic nobody reads and when too many linger.
    #[serde(deserialize_with = "duration")]
    pub linger_busy_min: Duration,
    /// Filters that may linger at once; beyond it the oldest are unsubscribed.
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
    /// How long a client's SUBSCRIBE waits for an absent broker.
    #[serde(deserialize_with = "duration")]
    pub subscribe_wait: Duration,
    /// The answer after that time.
    pub subscribe_while_away: SubscribeWhileAway,
    /// Bytes of all publishes that wait for the broker.
    #[serde(deserialize_with = "size")]
    pub publishes_waiting: u64,
    /// Bytes of one client's publishes that wait for the broker.
    #[serde(deserialize_with = "size")]
    pub publishes_waiting_per_client: u64,
    /// Publishes of one 3.x client that may wait for the broker; beyond it the client's socket is not
    /// read.
    pub publishes_waiting_v3_max: u32,
    /// Bytes of the retained cache.
    #[serde(deserialize_with = "size")]
    pub retained_cache: u64,
    /// Whether retained messages are fetched again after the broker lost a link's session; messages
    /// that changed are sent to their subscribers.
    pub retained_resync: bool,
    /// TLS toward `mqtts` servers.
    pub tls: UpstreamTls,
}

impl Upstream {
    /// Whether the broker is the embedded one.
    pub fn is_embedded(&self) -> bool {
        matches!(self.servers.first(), Some(Server::Embedded { .. }))
    }

    /// The index of the server of this name, as logs have it.
    pub fn server_named(&self, name: &str) -> Option<usize> {
        self.servers.iter().position(|s| s.to_string() == *name)
    }

    /// Reads the links' password, without the line end. Called at each dial, so that a new secret is
    /// used.
    ///
    /// # Errors
    /// When `password_file` is set and cannot be read.
    pub fn read_password(&self) -> std::io::Result<Option<Vec<u8>>> {
        let Some(path) = &self.password_file else {
            return Ok(None);
        };
        let mut secret = files::read(path)?;
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
    /// Messages that may wait for one client while it is away.
    pub queue_messages_max: u32,
    /// Bytes that may wait for one client while it is away.
    #[serde(deserialize_with = "size")]
    pub queue_bytes_max: u64,
    /// What goes when a queue is full.
    pub queue_full: QueueFull,
    /// Whether QoS 0 messages wait for an absent client.
    pub queue_qos0: bool,
    /// Age at which a message that waits for an absent client is dropped.
    #[serde(deserialize_with = "duration_or_none")]
    pub queue_age_max: Option<Duration>,
    /// How long a client is away before its session may end to make room for new ones.
    #[serde(deserialize_with = "duration_or_none")]
    pub evict_after: Option<Duration>,
    /// How long a client is away before other members of its groups get what it was to have.
    #[serde(deserialize_with = "duration")]
    pub shared_redeliver_after: Duration,
    /// How long a client may be away before its will goes out and its absence is told.
    #[serde(deserialize_with = "duration")]
    pub will_grace: Duration,
    /// How long after a start no session ends and no will goes out.
    #[serde(deserialize_with = "duration")]
    pub restart_grace: Duration,
    /// Topic of the messages that tell when a client comes or goes; `%c` is its client identifier.
    pub presence_topic: String,
    /// Longest keep alive granted; a longer or absent one is answered with
    /// Server Keep Alive. Whole seconds, 1 to 65535.
    #[serde(deserialize_with = "duration_or_none")]
    pub keepalive_max: Option<Duration>,
    /// Keep alive for clients that ask for none (0). Whole seconds.
    #[serde(deserialize_with = "duration_or_none")]
    pub keepalive_default: Option<Duration>,
}

/// The value of a key, and whether somebody has asked for it. Equal values are equal settings.
#[derive(Clone, Copy, Debug)]
pub enum Setting<T> {
    /// The file does not have the key.
    Default(T),
    /// The file has the key.
    Configured(T),
}

impl<T: Copy> Setting<T> {
    /// The value.
    pub const fn value(self) -> T {
        match self {
            Self::Default(value) | Self::Configured(value) => value,
        }
    }
}

impl<T: Copy + PartialEq> PartialEq for Setting<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value() == other.value()
    }
}

impl<T: Copy + Eq> Eq for Setting<T> {}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Setting<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self::Configured)
    }
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest packet accepted, in bytes, fixed header included.
    #[serde(deserialize_with = "size32")]
    pub packet_max: u32,
    /// Largest CONNECT accepted, in bytes, fixed header included.
    #[serde(deserialize_with = "size32")]
    pub connect_max: u32,
    /// Connections at once.
    pub connections_max: Setting<u32>,
    /// CONNECTs per second.
    pub connect_rate_max: u32,
    /// Receive Maximum announced to clients.
    pub receive_max: u16,
    /// Unacknowledged publishes of an MQTT 5 client at which its connection is ended; `receive_max` if
    /// that is more.
    pub receive_max_hard: u16,
    /// Topic Alias Maximum announced to clients.
    pub topic_alias_max: u16,
    /// Subscriptions of one session.
    pub subscriptions_per_client_max: u32,
    /// Levels of a topic name or filter.
    pub topic_levels_max: u32,
    /// TLS handshakes at once, and as many of QUIC. When half of the places are taken, one address
    /// (IPv6: one /64) may hold an eighth of them.
    pub handshakes_max: u32,
    /// Time from accept to a complete CONNECT.
    #[serde(deserialize_with = "duration")]
    pub accept_deadline: Duration,
    /// Time from a packet's first byte to its last; a second more for each 8 KiB received.
    #[serde(deserialize_with = "duration")]
    pub packet_deadline: Duration,
    /// A socket that takes no bytes for this long is closed; for each 8 KiB that wait for it, it has a
    /// second more.
    #[serde(deserialize_with = "duration")]
    pub write_stall: Duration,
    /// Bytes encoded ahead of a socket, per connection.
    #[serde(deserialize_with = "size32")]
    pub output_buffer: u32,
}

/// `[memory]`, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of all accounts together.
    pub max: u64,
    /// Bytes of all sessions and filters together, without the queues.
    pub sessions: u64,
    /// Bytes of all sessions' queues together.
    pub queues: u64,
}

/// `[store]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// Where sessions are stored.
    pub durability: Durability,
    /// Bytes on disk.
    #[serde(deserialize_with = "size")]
    pub disk_max: u64,
}

/// `[auth]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// How clients are authenticated on listeners without a mode of their own.
    pub mode: AuthMode,
    /// Password file; `Some` when any listener uses [`AuthMode::File`].
    pub file: Option<PathBuf>,
    /// Whether access rules apply.
    pub acl: AclMode,
    /// The client identifiers that a principal may use.
    pub client_id: ClientIdRule,
    /// Whether a client certificate and the user of its name in the password file are one principal.
    pub certificate_users: bool,
    /// What becomes of a Response Topic to which its client may not publish.
    pub response_topic: ResponseTopicRule,
}

/// `[[acl]]`: one rule.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclRule {
    /// A principal, or a pattern in which `*` stands for any text.
    pub who: String,
    /// The actions that are allowed; all others are denied.
    pub allow: AclAllow,
    /// Topic filters, with `%c` for the client identifier and `%u` for the user name.
    pub topics: Vec<String>,
}

/// The actions that an access rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AclAllow {
    /// Whether clients may publish.
    pub publish: bool,
    /// Whether clients may subscribe.
    pub subscribe: bool,
}

/// `[admin]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/api`.
    pub bind: SocketAddr,
    /// Whether `/api` is served; on loopback only.
    pub api: bool,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A level, or filter directives such as `info,tidegate::upstream=debug`.
    pub level: String,
    /// The format of a line.
    pub format: LogFormat,
}

/// `[drain]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// Longest time from SIGTERM to the end of the process.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}
