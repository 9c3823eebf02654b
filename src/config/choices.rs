//! Values that are one of a few words.

use crate::budget::QueueFull;
use std::fmt;

use crate::config::units::choices;

/// How bytes travel between a client and a listener.
///
/// A listener is configured with any of these but `WebTransport`, which a `quic` listener serves at
/// the same port if its `webtransport` is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Plain TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
    /// WebSocket.
    Ws,
    /// WebSocket over TLS.
    Wss,
    /// QUIC, ALPN `mqtt`.
    Quic,
    /// WebTransport over HTTP/3: a connection's transport, never a listener's.
    WebTransport,
}

choices!(Transport {
    "tcp" => Tcp,
    "tls" => Tls,
    "ws" => Ws,
    "wss" => Wss,
    "quic" => Quic,
} not supported {});

impl Transport {
    /// The name in configuration, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Ws => "ws",
            Self::Wss => "wss",
            Self::Quic => "quic",
            Self::WebTransport => "webtransport",
        }
    }

    /// Whether a certificate is needed.
    pub const fn is_encrypted(self) -> bool {
        matches!(
            self,
            Self::Tls | Self::Wss | Self::Quic | Self::WebTransport
        )
    }

    /// Whether it speaks WebSocket, and so has a path and origins.
    pub const fn is_websocket(self) -> bool {
        matches!(self, Self::Ws | Self::Wss)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether connections begin with a PROXY protocol header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// No connection begins with a header; one that does is closed.
    Off,
    /// Each connection begins with a header of version 1 or 2, and comes from one of
    /// `trusted_proxies`.
    Required,
}

choices!(ProxyProtocol {
    "off" => Off,
    "required" => Required,
} not supported {});

/// The header in which a trusted proxy states the client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RealIpHeader {
    /// `X-Forwarded-For`.
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
    /// No header.
    None,
}

choices!(RealIpHeader {
    "X-Forwarded-For" => XForwardedFor,
    "Forwarded" => Forwarded,
    "none" => None,
} not supported {});

/// The MQTT version of the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 5, or 3.1.1 where the broker does not have 5.
    Auto,
    /// 5 only.
    V5,
    /// 3.1.1 only.
    V311,
}

choices!(Protocol {
    "auto" => Auto,
    "5" => V5,
    "3.1.1" => V311,
} not supported {});

/// When a client's publish is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// When the broker has acknowledged it.
    Upstream,
}

choices!(Ack {
    "upstream" => Upstream,
} not supported { "local", });

/// Whether the broker is probed for its quirks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// When a link comes up and its CONNACK is different from the known one.
    Auto,
    /// Never; the broker's CONNACK alone counts.
    Off,
}

choices!(Probe {
    "auto" => Auto,
    "off" => Off,
} not supported {});

/// A limit, deviation or fault of a real broker that the embedded broker imitates, for tests.
#[cfg(feature = "sim")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// A client with overlapping filters gets a copy for each of them, as MQTT 5 §3.3.4 allows.
    Many,
    /// A client with overlapping filters gets one copy with all identifiers, as MQTT 5 §3.3.4
    /// allows.
    One,
    /// CONNACK says that Subscription Identifiers are not available.
    NoIds,
    /// The one copy has the lowest QoS of the overlapping filters: a fault.
    LowestQos,
    /// A client gets a copy from a queue for QoS 0 and another from a queue for QoS 1 and 2; a
    /// second SUBSCRIBE leaves the filter in both: a fault.
    TwoQueues,
    /// Retained messages are sent long after SUBACK.
    LateRetained,
    /// Redeliveries have DUP 0: a fault.
    Dup0,
    /// Receive Maximum is 10 in both directions.
    SmallWindow,
    /// Shared subscriptions are granted, but no message is delivered to them: a fault.
    DeadShared,
    /// CONNACK says that shared subscriptions are not available.
    NoShared,
    /// RETAIN is never set on a live message: a fault.
    NoRap,
    /// A CONNECT of MQTT 5 is refused.
    V311,
}

#[cfg(feature = "sim")]
choices!(Quirk {
    "many" => Many,
    "one" => One,
    "no-ids" => NoIds,
    "lowest-qos" => LowestQos,
    "two-queues" => TwoQueues,
    "late-retained" => LateRetained,
    "dup0" => Dup0,
    "small-window" => SmallWindow,
    "dead-shared" => DeadShared,
    "no-shared" => NoShared,
    "no-rap" => NoRap,
    "3.1.1" => V311,
} not supported {});

#[cfg(feature = "sim")]
impl Quirk {
    /// The word after `embedded:` in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Many => "many",
            Self::One => "one",
            Self::NoIds => "no-ids",
            Self::LowestQos => "lowest-qos",
            Self::TwoQueues => "two-queues",
            Self::LateRetained => "late-retained",
            Self::Dup0 => "dup0",
            Self::SmallWindow => "small-window",
            Self::DeadShared => "dead-shared",
            Self::NoShared => "no-shared",
            Self::NoRap => "no-rap",
            Self::V311 => "3.1.1",
        }
    }
}

/// The side that distributes the messages of shared subscriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedAt {
    /// The broker, among all its clients and Tidegates.
    Broker,
    /// This process, among its own clients.
    Local,
}

choices!(SharedAt {
    "broker" => Broker,
    "local" => Local,
} not supported {});

/// A user property that names the sender of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderProperty {
    /// `tidegate-client-id`.
    ClientId,
    /// `tidegate-user`, where the sender is authenticated.
    Username,
    /// `tidegate-listener`.
    Listener,
    /// `tidegate-address`, without the port.
    Address,
}

choices!(SenderProperty {
    "client_id" => ClientId,
    "username" => Username,
    "listener" => Listener,
    "address" => Address,
} not supported {});

/// The answer to a SUBSCRIBE when the broker stays absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubscribeWhileAway {
    /// Granted, with a recorded gap.
    Accept,
    /// Refused.
    Refuse,
}

choices!(SubscribeWhileAway {
    "accept" => Accept,
    "refuse" => Refuse,
} not supported {});

choices!(QueueFull {
    "oldest" => Oldest,
    "newest" => Newest,
    "end_session" => EndSession,
} not supported {});

/// Where sessions live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// In memory; they end with the process.
    Memory,
    /// On the disk, as far as a restart needs them.
    Disk,
}

choices!(Durability {
    "memory" => Memory,
    "disk" => Disk,
} not supported {});

/// How clients are authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuthMode {
    /// They are not authenticated; all have the principal `anonymous`.
    Anonymous,
    /// By user name and password, with the password file.
    File,
    /// By the client certificate, which the TLS handshake verifies.
    Mtls,
}

choices!(AuthMode {
    "anonymous" => Anonymous,
    "file" => File,
    "mtls" => Mtls,
} not supported { "jwt", "delegate", });

/// Whether a client must have a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A handshake without a valid certificate fails.
    Required,
    /// A client may have no certificate; a certificate that it has must be valid.
    Optional,
}

choices!(ClientAuth {
    "required" => Required,
    "optional" => Optional,
} not supported {});

/// The part of a client certificate that is the client's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateIdentity {
    /// The subject's common name.
    Cn,
    /// The first DNS name among the subject's alternative names.
    SanDns,
    /// The first URI among the subject's alternative names, such as a SPIFFE ID.
    SanUri,
}

choices!(CertificateIdentity {
    "cn" => Cn,
    "san_dns" => SanDns,
    "san_uri" => SanUri,
} not supported {});

/// Whether access rules apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AclMode {
    /// All topics are allowed, except topics that begin with `$` or with our own prefixes.
    Open,
    /// Only topics that a rule allows.
    Rules,
}

choices!(AclMode {
    "open" => Open,
    "rules" => Rules,
} not supported {});

/// The client identifiers that a principal may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientIdRule {
    /// Any client identifier.
    Any,
    /// Only its own user name.
    Username,
}

choices!(ClientIdRule {
    "any" => Any,
    "username" => Username,
} not supported {});

/// What becomes of a Response Topic to which its client may not publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseTopicRule {
    /// The publish is passed on without it.
    Remove,
    /// The publish is refused.
    Refuse,
}

choices!(ResponseTopicRule {
    "remove" => Remove,
    "refuse" => Refuse,
} not supported {});

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

choices!(LogFormat {
    "text" => Text,
    "json" => Json,
} not supported {});
