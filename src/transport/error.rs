//! Why a connection did not come about: errors of accepting, refusals, and failed handshakes.

use std::fmt;
use std::io;

use quinn::ConnectionError;

use crate::config::Transport;
use crate::transport::closed::QuicError;
use crate::transport::detect::Detected;
use crate::transport::proxy::header::ProxyError;

/// Why `accept` failed.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The process or the system has no free file descriptor.
    #[error("{0}")]
    FileLimit(io::Error),
    /// The system has no free memory for a socket.
    #[error("{0}")]
    Memory(io::Error),
    /// The connection that waited is gone. The listener is well.
    #[error("{0}")]
    Aborted(io::Error),
    /// Any other error.
    #[error("{0}")]
    Other(io::Error),
}

/// Why a connection was refused before its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// The limit on connections is reached.
    Connections,
    /// Every permit for a QUIC handshake is taken, or the client's network has used its share.
    Handshakes,
}

/// The fault of a client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateFault {
    /// A certificate is required, and the client gave none.
    Missing,
    /// It has expired or is not valid yet.
    Expired,
    /// It is on a revocation list.
    Revoked,
    /// No trusted authority issued it, or no valid revocation list covers it.
    Untrusted,
    /// It is damaged, or not meant for this use.
    Other,
}

/// The library's error about a client's certificate.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LibraryError {
    /// The handshake of TLS over TCP.
    #[error("{0}")]
    Tls(rustls::Error),
    /// The handshake of QUIC.
    #[error("{}", without_code(.0))]
    Quic(ConnectionError),
}

/// The words of QUIC's library about an error of TLS, whose code the fault of the certificate tells.
fn without_code(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TransportError(error) => error.reason.clone(),
        other => QuicError::from(other.clone()).to_string(),
    }
}

/// Why a transport handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It was not done in time, or the client stayed silent.
    #[error("not done before the deadline")]
    Deadline,
    /// The listener stopped meanwhile.
    #[error("listener stopped")]
    Stopped,
    /// The peer hung up or the network failed.
    #[error("connection lost: {0}")]
    Io(io::Error),
    /// The peer closed without a byte, as load balancers do to see whether a port is open.
    #[error("closed without a byte")]
    Silent,
    /// TLS failed.
    #[error("TLS: {reason}{}", hint(*detected))]
    Tls {
        /// The library's error.
        reason: rustls::Error,
        /// What the peer spoke in place of TLS, where that is known.
        detected: Option<Detected>,
    },
    /// The client refused the certificate of this server.
    #[error(
        "the client does not trust the certificate of this listener ({alert}): give the client the authority that \
         issued it, or use a certificate for the name that the client connects to"
    )]
    CertificateRefused {
        /// The TLS alert that the client sent (RFC 8446 section 6.2).
        alert: String,
    },
    /// The client closed the connection after the TLS handshake without a request. Some libraries
    /// verify the certificate only then, and send no alert.
    #[error(
        "closed without a request; clients that do not trust the certificate of this listener do so"
    )]
    NoRequest,
    /// The client's certificate is missing or was not accepted.
    #[error("client certificate: {why}")]
    ClientCertificate {
        /// Its fault.
        fault: CertificateFault,
        /// The library's error.
        why: LibraryError,
    },
    /// The client offered no application protocol that is served here (RFC 7301).
    #[error("no common application protocol (ALPN): \"{0}\" is needed")]
    Alpn(&'static str),
    /// The PROXY protocol header is missing or wrong.
    #[error("PROXY protocol: {0}")]
    Proxy(ProxyError),
    /// The HTTP request was answered with an error status.
    #[error("HTTP {}: {}", .0.status(), .0)]
    Request(RequestError),
    /// QUIC failed.
    #[error("QUIC: {0}")]
    Quic(QuicError),
    /// The HTTP/3 part of WebTransport failed.
    #[error("WebTransport: {0}")]
    WebTransport(WebTransportError),
}

fn hint(detected: Option<Detected>) -> String {
    detected.map_or_else(String::new, |what| format!("; this looks like {what}"))
}

impl HandshakeError {
    /// An error before the first byte: some load balancers end a port check with a reset.
    pub(super) fn before_first_byte(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Self::Silent,
            _ => Self::Io(error),
        }
    }

    /// The transport that was being spoken on a listener of the given transport.
    pub const fn transport(&self, listener: Transport) -> Transport {
        match (listener, self) {
            (Transport::Quic, Self::Request(_) | Self::WebTransport(_)) => Transport::WebTransport,
            (transport, _) => transport,
        }
    }
}

/// Why an HTTP request for a WebSocket or a WebTransport session was refused. `Display` gives the
/// reason for the log. Text that a client wrote is escaped and cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The bytes are not an HTTP request; what they are instead, where that is known.
    Malformed(Option<Detected>),
    /// The header has too many bytes.
    HeaderTooLarge,
    /// The header has too many lines.
    TooManyLines,
    /// The version is neither HTTP/1.0 nor HTTP/1.1; what the bytes are, where that is known.
    Version(Option<Detected>),
    /// HTTP/1.0 cannot upgrade.
    Http10,
    /// The path is not among the listener's `paths`.
    Path(String),
    /// A path that upgrades was asked for with a method other than GET.
    UpgradeMethod,
    /// The path of health checks was asked for with a method other than GET and HEAD.
    HealthMethod,
    /// The `Host` header is missing, or there is more than one (RFC 9112 section 3.2).
    Host,
    /// The request does not ask for a WebSocket.
    NotWebSocket,
    /// The WebSocket version is not 13 (RFC 6455 section 4.2.1).
    WebSocketVersion,
    /// The WebSocket key is missing or malformed (RFC 6455 section 4.2.1).
    WebSocketKey,
    /// The browser's origin is not among the listener's `origins`.
    Origin(String),
    /// The WebSocket request offers no subprotocol that is served [MQTT-6.0.0-3].
    Subprotocol,
    /// The HTTP/3 request does not ask for a WebTransport session.
    NotWebTransport,
    /// The `:protocol` of an extended CONNECT is not WebTransport's (RFC 9220 section 3).
    ConnectProtocol,
    /// The WebTransport request offers protocols, and none of them is served.
    WebTransportProtocol,
}

impl RequestError {
    /// The status of the answer (RFC 9110 section 15).
    pub const fn status(&self) -> u16 {
        match self {
            Self::Malformed(_)
            | Self::Host
            | Self::WebSocketKey
            | Self::Subprotocol
            | Self::WebTransportProtocol => 400,
            Self::Origin(_) => 403,
            Self::Path(_) | Self::NotWebTransport => 404,
            Self::UpgradeMethod | Self::HealthMethod => 405,
            Self::Http10 | Self::NotWebSocket | Self::WebSocketVersion => 426,
            Self::HeaderTooLarge | Self::TooManyLines => 431,
            Self::ConnectProtocol => 501,
            Self::Version(_) => 505,
        }
    }

    /// The reason for the client, which repeats no text of the client's.
    pub(super) const fn answer(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed request",
            Self::HeaderTooLarge => "request header too large",
            Self::TooManyLines => "too many header lines",
            Self::Version(_) => "HTTP/1.1 is needed",
            Self::Http10 => "HTTP/1.1 is needed (nginx: proxy_http_version 1.1)",
            Self::Path(_) => "no such path",
            Self::UpgradeMethod => "only GET is served here",
            Self::HealthMethod => "only GET and HEAD are served here",
            Self::Host => "one Host header is needed",
            Self::NotWebSocket => {
                "this path serves MQTT over WebSocket only; a proxy before it must pass on \
                 Upgrade and Connection"
            }
            Self::WebSocketVersion => "Sec-WebSocket-Version must be 13",
            Self::WebSocketKey => "Sec-WebSocket-Key missing or malformed",
            Self::Origin(_) => "Origin not allowed",
            Self::Subprotocol => "Sec-WebSocket-Protocol must offer \"mqtt\"",
            Self::NotWebTransport => {
                "not a WebTransport request: nothing else is served over HTTP/3"
            }
            Self::ConnectProtocol => "CONNECT with a :protocol other than webtransport",
            Self::WebTransportProtocol => "WT-Available-Protocols must offer \"mqtt\"",
        }
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(Some(what)) => write!(f, "not a WebSocket request but {what}"),
            Self::Version(Some(what)) => write!(f, "not HTTP/1.1 but {what}"),
            Self::Path(path) => write!(f, "path \"{path}\" is not served"),
            Self::Origin(origin) => write!(f, "Origin \"{origin}\" is not in origins"),
            Self::Subprotocol => {
                f.write_str("none of the subprotocols \"mqtt\" and \"mqttv3.1\" offered")
            }
            other => f.write_str(other.answer()),
        }
    }
}

/// Why the HTTP/3 part of a WebTransport handshake failed. Some of the texts are also the reason
/// phrase of the CONNECTION_CLOSE frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WebTransportError {
    /// The peer takes no SETTINGS of ours.
    #[error("SETTINGS cannot be sent")]
    SettingsNotSent,
    /// The peer's SETTINGS are malformed or too large (RFC 9114 section 7.2.4).
    #[error("SETTINGS malformed or too large")]
    Settings,
    /// The first frame of the request stream is not a request (RFC 9114 section 4.1).
    #[error("a frame that is no request")]
    NotARequest,
    /// The control stream or the request stream ended before it was complete.
    #[error("a stream of HTTP/3 ended too early")]
    StreamEnded,
    /// The peer takes no answer to its request.
    #[error("the answer cannot be sent")]
    AnswerNotSent,
    /// The session ended before the client opened its control stream.
    #[error("session ended before its first stream")]
    SessionEnded,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_requests_are_those_of_webtransport_on_a_quic_listener() {
        let error = HandshakeError::Request(RequestError::Path("/x".into()));
        assert_eq!(error.transport(Transport::Ws), Transport::Ws);
        assert_eq!(error.transport(Transport::Quic), Transport::WebTransport);
        let error = HandshakeError::Deadline;
        assert_eq!(error.transport(Transport::Quic), Transport::Quic);
    }
}
