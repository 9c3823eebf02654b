//! Dialling the broker, and the exchange of CONNECT and CONNACK.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::config::{Protocol, Server};
use crate::mqtt::{
    Connack, Connect, Decoder, Error, Packet, ReasonCode, Receiver, Version, encode_disconnect,
};
use crate::telemetry::{LinkDownReason, UpstreamTlsReason, clean, metrics};
use crate::transport::dial::{DialError, DialTarget, Dialed, TlsFailure, dial};

use crate::upstream::broker::{Broker, V5Support};
use crate::upstream::profile::Capabilities;
use crate::upstream::role::Role;
use crate::upstream::status::LinkStatus;

/// How long a link's session outlives its connection at the broker.
const SESSION_EXPIRY: Duration = Duration::from_secs(3600);

/// Largest packet that is accepted before CONNACK.
const CONNACK_MAX_BYTES: u32 = 64 * 1024;

/// Reason String of a refusal that is logged, bytes.
const REASON_STRING_MAX_BYTES: usize = 200;

/// A 3.1.1 CONNACK with return code 1, "unacceptable protocol version". Old brokers answer an
/// MQTT 5 CONNECT with it.
const CONNACK_V3_VERSION_REFUSED: [u8; 4] = [0x20, 0x02, 0x00, 0x01];

/// The link name in the client identifier of a probe.
const PROBE_NAME: &str = "probe";

/// Why a connection to the broker could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The server could not be dialled.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// `upstream.servers` names the embedded broker, and it does not run.
    #[error("no embedded broker")]
    NoEmbedded,
    /// The file with the password cannot be read.
    #[error("upstream.password_file cannot be read: {0}")]
    Password(io::Error),
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// CONNACK did not arrive in time.
    #[error("no CONNACK within upstream.connect_timeout")]
    Timeout,
    /// The broker closed the connection before CONNACK.
    #[error("the broker closed the connection before CONNACK")]
    Closed,
    /// The broker does not speak MQTT 5.
    #[error("the broker refuses MQTT 5; upstream.protocol can be \"auto\" or \"3.1.1\"")]
    V5Refused,
    /// CONNACK refuses the connection.
    #[error("the broker refused the connection: {}{}", .reason.name(), in_brackets(.text))]
    Refused {
        /// The reason code.
        reason: ReasonCode,
        /// The Reason String, cleaned and shortened.
        text: Option<String>,
    },
    /// CONNACK says Session Present to Clean Start [MQTT-3.2.2-4].
    #[error("the broker says Session Present to a connection with a clean session [MQTT-3.2.2-4]")]
    SessionPresent,
    /// Another packet arrived before CONNACK [MQTT-3.2.0-1].
    #[error("the broker sent another packet before CONNACK")]
    NotConnack,
    /// The broker sent bytes that are not a legal packet.
    #[error("{0}")]
    Malformed(Error),
}

fn in_brackets(text: &Option<String>) -> String {
    text.as_ref()
        .map(|text| format!(" ({text})"))
        .unwrap_or_default()
}

impl ConnectError {
    /// The metric label.
    pub(super) fn label(&self) -> LinkDownReason {
        match self {
            Self::Dial(DialError::Timeout) | Self::Timeout => LinkDownReason::Timeout,
            Self::Dial(DialError::Tls { .. }) => LinkDownReason::Tls,
            Self::Dial(_) | Self::NoEmbedded | Self::Password(_) => LinkDownReason::Connect,
            Self::Io(_) => LinkDownReason::Io,
            Self::Closed => LinkDownReason::Closed,
            Self::V5Refused | Self::Refused { .. } => LinkDownReason::Refused,
            Self::SessionPresent | Self::NotConnack | Self::Malformed(_) => {
                LinkDownReason::Protocol
            }
        }
    }

    /// Whether the broker may have begun a session for a CONNECT whose answer did not arrive.
    pub(super) fn may_have_begun_session(&self) -> bool {
        use LinkDownReason::{Closed, Io, Protocol, Timeout};
        matches!(self.label(), Closed | Io | Protocol | Timeout)
    }
}

/// A connection that the broker has accepted.
pub(super) struct Established {
    pub io: Dialed,
    pub capabilities: Capabilities,
    pub session_present: bool,
    pub keep_alive: Duration,
    /// Bytes that arrived after CONNACK.
    pub rest: BytesMut,
}

/// Dials `server` and connects. `clean`: neither this process nor a store has the link's session there.
pub(super) async fn establish(
    broker: &Broker,
    link: &LinkStatus,
    server: &Server,
    clean: bool,
) -> Result<Established, ConnectError> {
    let attempt = async {
        if broker.v5_support() == V5Support::Refused {
            return begin(broker, link, server, Version::V311, clean).await;
        }
        match begin(broker, link, server, Version::V5, clean).await {
            Err(ConnectError::V5Refused) if broker.access.config.protocol == Protocol::Auto => {
                let connected = begin(broker, link, server, Version::V311, clean).await;
                // A broker that is about to end closes a connection without an answer too, so only
                // a 3.1.1 connection that is accepted shows that MQTT 5 is refused.
                if connected.is_ok() && broker.v5_refused() {
                    tracing::info!(server = %server, "The broker refuses MQTT 5; the links speak MQTT 3.1.1");
                }
                connected
            }
            other => other,
        }
    };
    match timeout(broker.access.config.connect_timeout, attempt).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout),
    }
}

/// Connects a link. A session that is to be kept but must begin empty takes two connections: MQTT
/// 3.1.1 has no other way, and mosquitto 2.0 forgets a session that began with Clean Start when it
/// restarts, whatever its expiry.
async fn begin(
    broker: &Broker,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, ConnectError> {
    if clean && link.role != Role::Retained {
        let mut first = connect(broker, link, server, version, true).await?;
        disconnect(&mut first.io, version).await;
    }
    let clean = link.role == Role::Retained;
    connect(broker, link, server, version, clean).await
}

async fn connect(
    broker: &Broker,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, ConnectError> {
    let mut io = dial_server(broker, server).await?;
    link.count_connect(&server.to_string());
    let packet = connect_packet(broker, &broker.client_id(&link.name), version, clean)?;
    let accept = |connack: &Connack<'_>| {
        if clean && connack.session_present {
            return Err(ConnectError::SessionPresent);
        }
        accepted(version, connack)?;
        if version == Version::V5 {
            broker.v5_spoken();
        }
        // A Server Keep Alive of 0 would leave a dead link unnoticed.
        let keep_alive = connack.server_keep_alive.filter(|seconds| *seconds > 0);
        Ok((connack.session_present, keep_alive))
    };
    let ((session_present, keep_alive), capabilities, rest) =
        exchange(broker, &mut io, &packet, version, accept).await?;
    Ok(Established {
        io,
        capabilities,
        session_present,
        keep_alive: keep_alive.map_or(broker.access.config.keepalive, |seconds| {
            Duration::from_secs(seconds.into())
        }),
        rest,
    })
}

/// Connects to probe the broker, with a session that ends with the connection.
///
/// Returns the connection, the bytes that arrived after CONNACK, and what CONNACK announced.
pub(super) async fn connect_probe(
    broker: &Broker,
    server: &Server,
    version: Version,
) -> Result<(Dialed, BytesMut, Capabilities), ConnectError> {
    let mut io = dial_server(broker, server).await?;
    let packet = connect_packet(broker, &broker.client_id(PROBE_NAME), version, true)?;
    let accept = |connack: &Connack<'_>| accepted(version, connack);
    let ((), capabilities, rest) = exchange(broker, &mut io, &packet, version, accept).await?;
    Ok((io, rest, capabilities))
}

/// Ends the session that a server has under a client identifier, by a connection with a clean one.
pub(super) async fn end_session(
    broker: &Broker,
    server: &Server,
    version: Version,
    client_id: &str,
) -> Result<(), ConnectError> {
    let mut io = dial_server(broker, server).await?;
    let packet = connect_packet(broker, client_id, version, true)?;
    let accept = |connack: &Connack<'_>| accepted(version, connack);
    exchange(broker, &mut io, &packet, version, accept).await?;
    disconnect(&mut io, version).await;
    Ok(())
}

/// Ends a connection with a clean session, which ends with it whether or not the broker reads the
/// DISCONNECT.
async fn disconnect(io: &mut Dialed, version: Version) {
    let mut disconnect = Vec::new();
    encode_disconnect(version, ReasonCode::SUCCESS, None, None, &mut disconnect);
    let _ = io.write_all(&disconnect).await;
    let _ = io.shutdown().await;
}

/// Sends a CONNECT and reads up to the CONNACK. Returns what `accept` makes of it, the
/// capabilities that it announces, and the bytes that arrived after it.
async fn exchange<R>(
    broker: &Broker,
    io: &mut Dialed,
    packet: &[u8],
    version: Version,
    accept: impl FnOnce(&Connack<'_>) -> Result<R, ConnectError>,
) -> Result<(R, Capabilities, BytesMut), ConnectError> {
    io.write_all(packet).await?;
    io.flush().await?;
    let decoder = Decoder {
        version,
        receiver: Receiver::Client,
        max: CONNACK_MAX_BYTES,
    };
    let mut buf = BytesMut::with_capacity(4096);
    loop {
        if io.read_buf(&mut buf).await? == 0 {
            // Some brokers close the connection without an answer to a protocol that they do not
            // speak.
            let spoken = broker.v5_support() == V5Support::Spoken;
            if version == Version::V5 && buf.is_empty() && !spoken {
                return Err(ConnectError::V5Refused);
            }
            return Err(ConnectError::Closed);
        }
        if version == Version::V5 && buf.starts_with(&CONNACK_V3_VERSION_REFUSED) {
            return Err(ConnectError::V5Refused);
        }
        let (accepted, capabilities, used) = match decoder.next(&buf) {
            Ok(None) => continue,
            Ok(Some((Packet::Connack(connack), used))) => {
                (accept(&connack)?, Capabilities::of(version, &connack), used)
            }
            Ok(Some(_)) => return Err(ConnectError::NotConnack),
            Err(error) => return Err(ConnectError::Malformed(error)),
        };
        return Ok((accepted, capabilities, buf.split_off(used)));
    }
}

/// `Err` if CONNACK refuses the connection.
fn accepted(version: Version, connack: &Connack<'_>) -> Result<(), ConnectError> {
    let reason = connack.reason;
    if !reason.is_error() {
        return Ok(());
    }
    if reason == ReasonCode::UNSUPPORTED_PROTOCOL_VERSION && version == Version::V5 {
        return Err(ConnectError::V5Refused);
    }
    let text = connack.reason_string;
    Err(ConnectError::Refused {
        reason,
        text: text.map(|text| clean(text, REASON_STRING_MAX_BYTES).to_string()),
    })
}

/// The CONNECT of a link (or probe) with this client identifier. `clean`: with a session that begins and ends
/// with the connection; otherwise with one that outlives it.
fn connect_packet(
    broker: &Broker,
    client_id: &str,
    version: Version,
    clean: bool,
) -> Result<Vec<u8>, ConnectError> {
    let config = &broker.access.config;
    let password = config.read_password().map_err(ConnectError::Password)?;
    let mut out = Vec::with_capacity(128);
    Connect {
        version,
        clean_start: clean,
        keep_alive: config.keepalive.as_secs() as u16,
        client_id,
        username: config.username.as_deref(),
        password: password.as_deref(),
        session_expiry: (!clean).then_some(SESSION_EXPIRY.as_secs() as u32),
        receive_maximum: Some(u16::MAX),
        // A broker drops larger messages without a sign. They are skipped here instead, and counted.
        maximum_packet_size: None,
        ..Connect::default()
    }
    .encode(&mut out);
    Ok(out)
}

async fn dial_server(broker: &Broker, server: &Server) -> Result<Dialed, ConnectError> {
    let access = &broker.access;
    let target = match server {
        Server::Embedded { .. } => {
            let embedded = access.embedded.as_ref().ok_or(ConnectError::NoEmbedded)?;
            return Ok(Dialed::Pipe(embedded.connect()));
        }
        Server::Remote {
            tls,
            host,
            port,
            path,
        } => DialTarget {
            host: host.clone(),
            port: *port,
            tls: *tls,
            path: path.clone(),
        },
    };
    let dialled = dial(&target, access.tls.as_ref(), access.config.connect_timeout).await;
    if let Err(DialError::Tls { reason, .. }) = &dialled {
        metrics().upstream_tls_errors[tls_label(*reason)].increment(1);
    }
    Ok(dialled?)
}

fn tls_label(failure: TlsFailure) -> UpstreamTlsReason {
    match failure {
        TlsFailure::UnknownCa => UpstreamTlsReason::UnknownIssuer,
        TlsFailure::NameMismatch => UpstreamTlsReason::Name,
        TlsFailure::Expired => UpstreamTlsReason::Expired,
        TlsFailure::Refused => UpstreamTlsReason::ClientCertificate,
        TlsFailure::Other => UpstreamTlsReason::Other,
    }
}
