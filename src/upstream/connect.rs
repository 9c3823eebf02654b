//! Dialling the core and the exchange of CONNECT and CONNACK.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::config::{Protocol, Server};
use crate::mqtt::{
    Connack, Connect, Decoder, Packet, Properties, QoS, ReasonCode, Receiver, Version,
    encode_disconnect,
};
use crate::router::BrokerFeatures;
use crate::telemetry::{LinkDownReason, UpstreamTlsReason, metrics};
use crate::transport::dial::{DialError, DialTarget, Dialed, TlsFailure, dial};

use crate::upstream::link::machine::Up;
use crate::upstream::profile::Capabilities;
use crate::upstream::{Core, LinkStatus, Role, SESSION_EXPIRY};

/// A 3.1.1 core does not say its window; brokers' defaults are 10 to 65,535.
const WINDOW_V3: u16 = 20;

/// A link that came up.
pub(super) struct Established {
    pub io: Dialed,
    pub up: Up,
    pub facts: BrokerFeatures,
    pub capabilities: Capabilities,
    /// Bytes that came behind the CONNACK.
    pub rest: BytesMut,
    pub keep_alive: Duration,
}

/// Why it did not.
#[derive(Debug)]
pub(super) struct Failed {
    pub reason: LinkDownReason,
    pub why: String,
}

impl Failed {
    fn new(reason: LinkDownReason, why: impl Into<String>) -> Self {
        Self {
            reason,
            why: why.into(),
        }
    }
}

/// Dials `server` and connects. `clean`: the process has not had this link's session before.
pub(super) async fn establish(
    core: &Core,
    link: &LinkStatus,
    server: &Server,
    clean: bool,
) -> Result<Established, Failed> {
    let limit = core.config.connect_timeout;
    let attempt = async {
        if core.no_v5.load(Ordering::Relaxed) {
            return connect_v3(core, link, server, clean).await;
        }
        match begin(core, link, server, Version::V5, clean).await {
            Err(Attempt::NoV5) if core.config.protocol == Protocol::Auto => {
                let up = connect_v3(core, link, server, clean).await;
                // A core that is just going away closes without a word, too.
                if up.is_ok() && !core.no_v5.swap(true, Ordering::Relaxed) {
                    tracing::info!(server = %server, "The core refuses MQTT 5; MQTT 3.1.1 is spoken");
                }
                up
            }
            Err(Attempt::NoV5) => Err(Failed::new(
                LinkDownReason::Refused,
                "the core refuses MQTT 5, and upstream.protocol = \"5\"",
            )),
            Err(Attempt::Failed(failed)) => Err(failed),
            Ok(up) => Ok(up),
        }
    };
    match timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(Failed::new(
            LinkDownReason::Timeout,
            "no CONNACK within upstream.connect_timeout",
        )),
    }
}

/// Why one CONNECT did not lead to a connection.
pub(super) enum Attempt {
    /// The core does not speak MQTT 5.
    NoV5,
    /// Something else.
    Failed(Failed),
}

impl From<Failed> for Attempt {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

async fn connect_v3(
    core: &Core,
    link: &LinkStatus,
    server: &Server,
    clean: bool,
) -> Result<Established, Failed> {
    begin(core, link, server, Version::V311, clean)
        .await
        .map_err(|attempt| match attempt {
            Attempt::NoV5 => Failed::new(
                LinkDownReason::Refused,
                "the core refuses MQTT 5 and MQTT 3.1.1",
            ),
            Attempt::Failed(failed) => failed,
        })
}

/// A session that is to be kept but must begin empty takes two connections: in 3.1.1 there is no
/// other way, and mosquitto 2.0 forgets over a restart what began with Clean Start, whatever its
/// expiry.
async fn begin(
    core: &Core,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, Attempt> {
    if clean && link.role != Role::Retained {
        let mut first = connect(core, link, server, version, true).await?;
        let mut bye = Vec::new();
        encode_disconnect(version, ReasonCode::SUCCESS, None, None, &mut bye);
        // The session is gone whether or not the core hears this.
        let _ = first.io.write_all(&bye).await;
        let _ = first.io.shutdown().await;
    }
    let clean = link.role == Role::Retained;
    connect(core, link, server, version, clean).await
}

async fn connect(
    core: &Core,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, Attempt> {
    let mut io = open(core, server).await?;
    link.count_connect(&server.to_string());
    let fresh = clean || link.role == Role::Retained;
    let kept = !fresh;
    let out = connect_packet(core, &link.name, version, fresh, kept)?;
    let accepted = |connack: &Connack<'_>| {
        if fresh && connack.session_present {
            return Err(Failed::new(
                LinkDownReason::Protocol,
                "the core says Session Present to a connection that begins anew [MQTT-3.2.2-4]",
            )
            .into());
        }
        accept(core, link, version, connack)
    };
    let (accepted, rest) = exchange(core, &mut io, &out, version, accepted).await?;
    let (up, facts, capabilities, keep_alive) = accepted;
    Ok(Established {
        io,
        up,
        facts,
        capabilities,
        rest,
        keep_alive,
    })
}

/// A connection for a probe of the core: clean, and gone with its end.
pub(super) async fn connect_probe(
    core: &Core,
    server: &Server,
    version: Version,
) -> Result<(Dialed, BytesMut, Capabilities), Attempt> {
    let mut io = open(core, server).await?;
    let out = connect_packet(core, "probe", version, true, false)?;
    let accepted = |connack: &Connack<'_>| {
        judge(version, connack)?;
        Ok(capabilities(version, connack))
    };
    let (capabilities, rest) = exchange(core, &mut io, &out, version, accepted).await?;
    Ok((io, rest, capabilities))
}

/// Sends a CONNECT and reads up to the CONNACK; with what `accept` makes of it, the bytes that
/// came behind it.
async fn exchange<R>(
    core: &Core,
    io: &mut Dialed,
    out: &[u8],
    version: Version,
    accept: impl FnOnce(&Connack<'_>) -> Result<R, Attempt>,
) -> Result<(R, BytesMut), Attempt> {
    let io_failed = |e: std::io::Error| Failed::new(LinkDownReason::Io, e.to_string());
    io.write_all(out).await.map_err(io_failed)?;
    io.flush().await.map_err(io_failed)?;
    let decoder = Decoder {
        version,
        receiver: Receiver::Client,
        max: 64 * 1024,
    };
    let mut buf = BytesMut::with_capacity(4096);
    loop {
        if io.read_buf(&mut buf).await.map_err(io_failed)? == 0 {
            // Some brokers close without a word on a protocol that they do not speak.
            let unknown = !core.has_v5.load(Ordering::Relaxed);
            if version == Version::V5 && buf.is_empty() && unknown {
                return Err(Attempt::NoV5);
            }
            return Err(Failed::new(
                LinkDownReason::Closed,
                "the core closed the connection before CONNACK",
            )
            .into());
        }
        // A 3.1.1 CONNACK in answer to an MQTT 5 CONNECT: "unacceptable protocol version".
        if version == Version::V5 && buf.starts_with(&[0x20, 0x02, 0x00, 0x01]) {
            return Err(Attempt::NoV5);
        }
        let (accepted, used) = match decoder.next(&buf) {
            Ok(None) => continue,
            Ok(Some((Packet::Connack(connack), used))) => (accept(&connack)?, used),
            Ok(Some(_)) => {
                return Err(Failed::new(
                    LinkDownReason::Protocol,
                    "the core sent something else before CONNACK",
                )
                .into());
            }
            Err(e) => return Err(Failed::new(LinkDownReason::Protocol, e.to_string()).into()),
        };
        return Ok((accepted, buf.split_off(used)));
    }
}

fn accept(
    core: &Core,
    link: &LinkStatus,
    version: Version,
    connack: &Connack<'_>,
) -> Result<(Up, BrokerFeatures, Capabilities, Duration), Attempt> {
    judge(version, connack)?;
    if version == Version::V5 {
        core.has_v5.store(true, Ordering::Relaxed);
    }
    let capabilities = capabilities(version, connack);
    // 0 would leave a dead link unnoticed.
    let keep_alive = connack
        .server_keep_alive
        .filter(|s| *s > 0)
        .map_or(core.config.keepalive, |s| Duration::from_secs(s.into()));
    let packet_max = capabilities.maximum_packet_size.unwrap_or(u32::MAX);
    let v5 = capabilities.version_5;
    let up = Up {
        version,
        session_present: connack.session_present && link.role != Role::Retained,
        doubtful: false,
        receive_maximum: capabilities.receive_maximum,
        packet_max,
        identifiers: capabilities.identifiers,
        keeps_retain: v5,
        fetch_qos: QoS::AtMostOnce,
        fetch_quiet: 0,
    };
    let facts = BrokerFeatures {
        identifiers: capabilities.identifiers,
        properties: v5,
        keeps_retain: v5,
        shared: capabilities.shared,
        replaces: true,
        maximum_qos: connack.maximum_qos.unwrap_or(QoS::ExactlyOnce),
        retain_available: capabilities.retain_available,
        packet_max,
    };
    Ok((up, facts, capabilities, keep_alive))
}

/// Whether the core takes us.
fn judge(version: Version, connack: &Connack<'_>) -> Result<(), Attempt> {
    if !connack.reason.is_error() {
        return Ok(());
    }
    if connack.reason == ReasonCode::UNSUPPORTED_PROTOCOL_VERSION && version == Version::V5 {
        return Err(Attempt::NoV5);
    }
    Err(refused(connack).into())
}

fn capabilities(version: Version, connack: &Connack<'_>) -> Capabilities {
    let v5 = version == Version::V5;
    Capabilities {
        version_5: v5,
        identifiers: v5 && connack.subscription_ids_available.unwrap_or(true),
        shared: connack.shared_subscription_available.unwrap_or(true),
        receive_maximum: match v5 {
            true => connack.receive_maximum.unwrap_or(u16::MAX),
            false => WINDOW_V3,
        },
        maximum_qos: connack.maximum_qos.unwrap_or(QoS::ExactlyOnce) as u8,
        maximum_packet_size: connack.maximum_packet_size,
        retain_available: connack.retain_available.unwrap_or(true),
    }
}

fn refused(connack: &Connack<'_>) -> Failed {
    let why = match connack.reason_string {
        Some(why) => format!(" ({})", crate::telemetry::clean(why, 200)),
        None => String::new(),
    };
    let reason = connack.reason.name();
    Failed::new(
        LinkDownReason::Refused,
        format!("the core refused the connection: {reason}{why}"),
    )
}

fn connect_packet(
    core: &Core,
    name: &str,
    version: Version,
    clean: bool,
    kept: bool,
) -> Result<Vec<u8>, Failed> {
    let config = &core.config;
    let client_id = format!("{}-{}-{name}", config.client_id_prefix, core.node);
    let password = config.read_password().map_err(|e| {
        Failed::new(
            LinkDownReason::Connect,
            format!("upstream.password_file cannot be read: {e}"),
        )
    })?;
    let mut out = Vec::with_capacity(128);
    Connect {
        version,
        clean_start: clean,
        keep_alive: config.keepalive.as_secs() as u16,
        client_id: &client_id,
        will: None,
        username: config.username.as_deref(),
        password: password.as_deref(),
        session_expiry: kept.then_some(SESSION_EXPIRY.as_secs() as u32),
        receive_maximum: Some(u16::MAX),
        maximum_packet_size: Some(core.packet_max),
        topic_alias_maximum: 0,
        request_response_information: false,
        request_problem_information: true,
        authentication_method: None,
        authentication_data: None,
        properties: Properties::default(),
    }
    .encode(&mut out);
    Ok(out)
}

async fn open(core: &Core, server: &Server) -> Result<Dialed, Failed> {
    let target = match server {
        Server::Embedded { .. } => {
            let Some(embedded) = &core.embedded else {
                return Err(Failed::new(LinkDownReason::Connect, "no embedded core"));
            };
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
    dial(&target, core.tls.as_ref(), core.config.connect_timeout)
        .await
        .map_err(dial_failed)
}

fn dial_failed(error: DialError) -> Failed {
    let reason = match &error {
        DialError::Timeout => LinkDownReason::Timeout,
        DialError::Tls { reason, .. } => {
            let label = match reason {
                TlsFailure::UnknownCa => UpstreamTlsReason::UnknownIssuer,
                TlsFailure::NameMismatch => UpstreamTlsReason::Name,
                TlsFailure::Expired => UpstreamTlsReason::Expired,
                TlsFailure::Refused => UpstreamTlsReason::ClientCertificate,
                TlsFailure::Other => UpstreamTlsReason::Other,
            };
            metrics().upstream_tls_errors[label].increment(1);
            LinkDownReason::Tls
        }
        _ => LinkDownReason::Connect,
    };
    Failed::new(reason, error.to_string())
}
