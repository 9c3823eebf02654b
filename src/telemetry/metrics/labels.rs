//! The values of the metrics' labels, one enum per label.

use crate::qos::QoS;

/// A label whose set of values is fixed.
pub trait Label: Copy + 'static {
    /// The label's name in the exposition.
    const NAME: &'static str;
    /// Every value, in the order of [`index`](Label::index).
    const ALL: &'static [Self];
    /// The value as text.
    fn name(self) -> &'static str;
    /// The position of the value in [`ALL`](Label::ALL).
    fn index(self) -> usize;
}

macro_rules! labels {
    ($( $(#[$meta:meta])* $ty:ident as $label:literal {
        $( $(#[$vmeta:meta])* $variant:ident = $text:literal, )+
    } )+) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $ty { $( $(#[$vmeta])* $variant, )+ }

        impl Label for $ty {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$( Self::$variant, )+];
            fn name(self) -> &'static str {
                match self { $( Self::$variant => $text, )+ }
            }
            fn index(self) -> usize {
                self as usize
            }
        }

        impl std::fmt::Display for $ty {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(Label::name(*self))
            }
        }
    )+ };
}

impl Label for QoS {
    const NAME: &'static str = "qos";
    const ALL: &'static [Self] = &[Self::AtMostOnce, Self::AtLeastOnce, Self::ExactlyOnce];

    fn name(self) -> &'static str {
        match self {
            Self::AtMostOnce => "0",
            Self::AtLeastOnce => "1",
            Self::ExactlyOnce => "2",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

labels! {
    /// Why a connection got no session.
    RefusedReason as "reason" {
        /// Unknown user or wrong password.
        BadCredentials = "bad_credentials",
        /// A rule forbids it.
        NotAuthorized = "not_authorized",
        /// The client id is not legal, or belongs to another principal.
        ClientId = "client_id",
        /// An MQTT version that we do not speak.
        Version = "unsupported_version",
        /// Extended authentication that we do not offer.
        AuthMethod = "bad_auth_method",
        /// A malformed CONNECT.
        Malformed = "malformed",
        /// The first packet was not CONNECT, or it broke a rule.
        Protocol = "protocol_error",
        /// CONNECT larger than allowed before authentication.
        TooLarge = "packet_too_large",
        /// The will breaks a limit or a rule.
        Will = "will",
        /// No CONNECT within the deadline.
        Timeout = "timeout",
        /// `connect_rate_max`.
        Rate = "connect_rate",
        /// `connections_max`.
        Connections = "connections_max",
        /// `handshakes_max`.
        Handshakes = "handshakes_max",
        /// The memory accounts are full.
        Memory = "memory",
        /// `memory.sessions` is full, or the client's share of it.
        SessionMemory = "session_memory",
        /// The process is ending.
        Draining = "draining",
        /// The peer closed before the answer.
        Closed = "closed",
        /// None of the above.
        Other = "other",
    }

    /// A kind of task that is started again when it ends.
    TaskKind as "task" {
        /// A link to the broker.
        Link = "link",
        /// The accept loop of a listener.
        Listener = "listener",
        /// The admin side.
        Admin = "admin",
        /// A timer of the process.
        Timer = "timer",
        /// The watch on certificates, and on SIGHUP.
        Reload = "reload",
        /// The writer of sessions to the disk.
        Store = "store",
    }

    /// What a client was denied.
    DeniedAction as "action" {
        /// To connect.
        Login = "login",
        /// To publish, or to have a will published.
        Publish = "publish",
        /// To subscribe.
        Subscribe = "subscribe",
    }

    /// Why a log line was dropped.
    LogDropReason as "reason" {
        /// Too many lines waited for the reader of the log.
        BufferFull = "buffer_full",
        /// Standard error refused it.
        WriteFailed = "write_failed",
    }

    /// Why we reset a data stream.
    StreamReason as "reason" {
        /// A malformed packet.
        Malformed = "malformed",
        /// A packet over `packet_max`.
        TooLarge = "packet_too_large",
        /// A packet that belongs on the control stream, or that broke a rule.
        Protocol = "protocol_error",
        /// The stream ended in the middle of a packet.
        Incomplete = "incomplete",
        /// A packet did not end within `packet_deadline`.
        PacketDeadline = "packet_deadline",
        /// The client read too little within `write_stall`.
        WriteStall = "write_stall",
        /// The client exceeded one of our limits.
        Quota = "quota",
    }

    /// Why a filter of a SUBSCRIBE was refused without asking the broker.
    SubscribeRefusedReason as "reason" {
        /// `memory.sessions` is full, or the client's share of it.
        SessionMemory = "session_memory",
        /// The table of filters is full, or the client's share of it.
        Filters = "filters",
        /// `subscriptions_per_client_max`, or another limit of one client.
        ClientLimit = "client_limit",
        /// The broker has closed links for it.
        Quarantined = "quarantined",
        /// It overlaps another filter on every data link of a broker without identifiers.
        Overlaps = "overlaps",
        /// Larger than the broker's Maximum Packet Size.
        TooLarge = "too_large",
        /// Shared subscriptions or No Local, which the broker does not have.
        NotSupported = "not_supported",
    }

    /// Why a connection ended.
    DisconnectReason as "reason" {
        /// DISCONNECT 0x00.
        Normal = "normal",
        /// DISCONNECT 0x04.
        NormalWithWill = "normal_with_will",
        /// The peer closed without DISCONNECT.
        Closed = "closed",
        /// The connection's task panicked.
        Panic = "panic",
        /// The socket failed.
        Io = "io_error",
        /// The client sent nothing for 1.5 times its keep alive.
        KeepAlive = "keep_alive",
        /// Another connection has the session now (0x8E).
        TakenOver = "taken_over",
        /// A malformed packet.
        Malformed = "malformed",
        /// A rule of the protocol was broken.
        Protocol = "protocol_error",
        /// A packet over `packet_max` (0x95).
        TooLarge = "packet_too_large",
        /// More unacknowledged publishes than `receive_max_hard`, or of QoS 2 than `receive_max` (0x93).
        ReceiveMaximum = "receive_maximum",
        /// An illegal topic alias (0x94).
        TopicAlias = "topic_alias",
        /// An illegal topic name or filter (0x90, 0x8F).
        Topic = "topic",
        /// A QoS or RETAIN that CONNACK excluded (0x9B, 0x9A).
        NotSupported = "not_supported",
        /// The client read too little within `write_stall`.
        WriteStall = "write_stall",
        /// A packet did not end within `packet_deadline`.
        PacketDeadline = "packet_deadline",
        /// The client exceeded one of our limits (0x97).
        Quota = "quota",
        /// The session was ended under the connection.
        SessionEnded = "session_ended",
        /// The process is ending (0x8B).
        Draining = "draining",
        /// An operator ended it (0x98).
        Admin = "admin",
        /// None of the above.
        Other = "other",
    }

    /// Why a session ended.
    SessionEndReason as "reason" {
        /// A CONNECT with Clean Start.
        CleanStart = "clean_start",
        /// Its connection closed, and its expiry was 0.
        NotKept = "not_kept",
        /// Its expiry passed.
        Expired = "expired",
        /// Its queue was full and `queue_full = "end_session"`.
        QueueFull = "queue_full",
        /// `session.evict_after`: its client was away, and new sessions needed the room.
        Memory = "memory",
        /// An operator ended it.
        Admin = "admin",
        /// The process ended.
        Shutdown = "shutdown",
    }

    /// Whether a session has a connection.
    SessionState as "state" {
        /// It has a connection.
        Attached = "attached",
        /// It has no connection.
        Detached = "detached",
    }

    /// Why a message did not reach a client or the broker.
    DropReason as "reason" {
        /// `queue_messages_max`.
        QueueFull = "queue_full",
        /// `queue_bytes_max`.
        QueueBytes = "queue_bytes",
        /// The budget of all queues.
        Budget = "budget",
        /// Its message expiry interval passed while it waited.
        Expired = "expired",
        /// `queue_age_max`.
        Age = "age",
        /// QoS 0 for a client that is away.
        Qos0Offline = "qos0_offline",
        /// QoS 0 for a client that reads too slowly.
        Qos0Slow = "qos0_slow",
        /// Larger than the receiver's Maximum Packet Size.
        TooLarge = "too_large",
        /// Its session ended while it waited.
        SessionEnd = "session_end",
        /// No rule allows the publish.
        Acl = "acl",
        /// A topic or property of the publish is not accepted: 0x90, 0x83.
        Invalid = "invalid",
        /// QoS 0, and the budget of publishes that wait for the broker is used up.
        UpstreamBudget = "upstream_budget",
        /// QoS 0 while the broker is absent.
        UpstreamAwayQos0 = "upstream_away_qos0",
        /// A legal publish for which the broker would close the link.
        UpstreamLimit = "upstream_limit",
        /// The broker refused it.
        UpstreamRefused = "upstream_refused",
        /// A publish for which the broker has closed the link before.
        Quarantined = "quarantined",
        /// A message of the broker whose filter has no subscribers any more.
        NoReceiver = "no_receiver",
        /// A message of the broker that is larger than `packet_max`.
        UpstreamTooLarge = "upstream_too_large",
        /// The messages of the embedded broker exceed their limit.
        EmbeddedFull = "embedded_full",
    }

    /// Why a publish has to wait before it is sent to the broker.
    DeferReason as "reason" {
        /// No link is up.
        BrokerAway = "broker_away",
        /// The broker's Receive Maximum is used up.
        Window = "window",
        /// The client's share is used up: an MQTT 5 publish was answered 0x97.
        ClientShare = "client_share",
        /// The budget of all is used up: an MQTT 5 publish was answered 0x97.
        Budget = "budget",
        /// A data link lags, and its window for a round is used up.
        DataLinkLag = "data_link_lag",
        /// A 3.x socket is left unread.
        V3Unread = "v3_unread",
        /// An MQTT 5 client has sent more than `receive_max` and is left unread.
        ReceiveMaximum = "receive_maximum",
    }

    /// Why accepting a connection failed.
    AcceptErrorReason as "reason" {
        /// EMFILE or ENFILE.
        FileLimit = "file_limit",
        /// ENOMEM or ENOBUFS.
        Memory = "memory",
        /// The peer closed before it was accepted.
        Aborted = "aborted",
        /// None of the above.
        Other = "other",
    }

    /// Why a connection failed between accept and its first MQTT byte.
    HandshakeReason as "reason" {
        /// TLS failed.
        Tls = "tls",
        /// No common ALPN protocol.
        Alpn = "alpn",
        /// The client does not trust our certificate.
        CertificateRefused = "certificate_refused",
        /// The client sent no certificate, and one is required.
        CertificateMissing = "client_certificate_missing",
        /// A client certificate that has expired or is not valid yet.
        CertificateExpired = "client_certificate_expired",
        /// A client certificate on a revocation list.
        CertificateRevoked = "client_certificate_revoked",
        /// A client certificate that no authority in `client_ca` issued, or whose authority has no
        /// valid list in `crl`.
        CertificateUntrusted = "client_certificate_untrusted",
        /// Any other fault of a client certificate.
        CertificateOther = "client_certificate_other",
        /// QUIC failed.
        Quic = "quic",
        /// An unacceptable WebSocket request.
        WebSocket = "websocket",
        /// An unacceptable WebTransport session.
        WebTransport = "webtransport",
        /// A path that is not served.
        Path = "path",
        /// An origin that is not allowed.
        Origin = "origin",
        /// No MQTT subprotocol.
        Subprotocol = "subprotocol",
        /// No PROXY protocol header, a wrong one, or from an untrusted peer.
        Proxy = "proxy_protocol",
        /// The deadline passed.
        Timeout = "timeout",
        /// `handshakes_max` or `connections_max`.
        Limit = "limit",
        /// The peer closed.
        Closed = "closed",
        /// The socket failed.
        Io = "io_error",
    }

    /// Why a link to the broker went down.
    LinkDownReason as "reason" {
        /// The address could not be reached.
        Connect = "connect",
        /// TLS failed.
        Tls = "tls",
        /// CONNACK refused.
        Refused = "refused",
        /// No answer within `connect_timeout`.
        Timeout = "timeout",
        /// The broker closed the connection.
        Closed = "closed",
        /// The broker sent DISCONNECT.
        Disconnect = "disconnect",
        /// Another connection took the link's client identifier.
        TakenOver = "taken_over",
        /// All links move to the next of `upstream.servers`.
        Failover = "failover",
        /// The socket failed.
        Io = "io_error",
        /// No PINGRESP.
        KeepAlive = "keep_alive",
        /// The broker broke the protocol.
        Protocol = "protocol_error",
        /// The link's task panicked.
        Panic = "panic",
        /// We closed it.
        Shutdown = "shutdown",
    }

    /// Why TLS toward the broker failed.
    UpstreamTlsReason as "reason" {
        /// No trusted root issued the certificate.
        UnknownIssuer = "unknown_issuer",
        /// The certificate names another host.
        Name = "name",
        /// The certificate has expired.
        Expired = "expired",
        /// The certificate is not valid yet.
        NotYetValid = "not_yet_valid",
        /// The broker did not accept our client certificate.
        ClientCertificate = "client_certificate",
        /// No common ALPN protocol.
        Alpn = "alpn",
        /// None of the above.
        Other = "other",
    }

    /// How a reload ended.
    ReloadResult as "result" {
        /// The content of the files is in use.
        Success = "success",
        /// The files could not be used; the earlier content stays in use.
        Failure = "failure",
    }

    /// What a memory budget is for.
    MemoryAccount as "account" {
        /// All accounts together.
        Total = "total",
        /// Connections, with their buffers.
        Connections = "connections",
        /// Sessions and their subscriptions.
        Sessions = "sessions",
        /// Messages in the sessions' queues.
        Queues = "queues",
        /// Publishes that wait for the broker.
        PublishesWaiting = "publishes_waiting",
        /// Retained messages kept for the next subscriber.
        RetainedCache = "retained_cache",
        /// Connections that are not authenticated yet.
        Handshakes = "handshakes",
        /// Messages of the embedded broker.
        EmbeddedBroker = "embedded_broker",
    }
}
