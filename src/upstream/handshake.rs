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
use crate::router::CoreFacts;
use crate::telemetry::{LinkDownReason, UpstreamTlsReason, metrics};
use crate::transport::dial::{DialError, DialTarget, Dialed, TlsFailure, dial};

use super::machine::Up;
use super::{LinkStatus, Role, SESSION_EXPIRY, Shared};

/// A 3.1.1 core does not say its window; brokers' defaults are 10 to 65,535.
const WINDOW_V3: u16 = 20;

/// A link that came up.
pub(super) struct Established {
    pub io: Dialed,
    pub up: Up,
    pub facts: CoreFacts,
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
    shared: &Shared,
    link: &LinkStatus,
    server: &Server,
    clean: bool,
) -> Result<Established, Failed> {
    let limit = shared.config.connect_timeout;
    let attempt = async {
        if shared.no_v5.load(Ordering::Relaxed) {
            return connect_v3(shared, link, server, clean).await;
        }
        match begin(shared, link, server, Version::V5, clean).await {
            Err(Attempt::NoV5) if shared.config.protocol == Protocol::Auto => {
                let up = connect_v3(shared, link, server, clean).await;
                // A core that is just going away closes without a word, too.
                if up.is_ok() && !shared.no_v5.swap(true, Ordering::Relaxed) {
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

enum Attempt {
    NoV5,
    Failed(Failed),
}

impl From<Failed> for Attempt {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

async fn connect_v3(
    shared: &Shared,
    link: &LinkStatus,
    server: &Server,
    clean: bool,
) -> Result<Established, Failed> {
    begin(shared, link, server, Version::V311, clean)
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
    shared: &Shared,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, Attempt> {
    if clean && link.role != Role::Retained {
        let mut first = connect(shared, link, server, version, true).await?;
        let mut bye = Vec::new();
        encode_disconnect(version, ReasonCode::SUCCESS, None, None, &mut bye);
        // The session is gone whether or not the core hears this.
        let _ = first.io.write_all(&bye).await;
        let _ = first.io.shutdown().await;
    }
    let clean = link.role == Role::Retained;
    connect(shared, link, server, version, clean).await
}

async fn connect(
    shared: &Shared,
    link: &LinkStatus,
    server: &Server,
    version: Version,
    clean: bool,
) -> Result<Established, Attempt> {
    let mut io = open(shared, server).await?;
    link.count_connect(&server.to_string());
    let out = connect_packet(shared, link, version, clean)?;
    let io_failed = |e: std::io::Error| Failed::new(LinkDownReason::Io, e.to_string());
    io.write_all(&out).await.map_err(io_failed)?;
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
            let unknown = !shared.has_v5.load(Ordering::Relaxed);
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
        let (established, used) = match decoder.next(&buf) {
            Ok(None) => continue,
            Ok(Some((Packet::Connack(connack), used))) => {
                (accept(shared, link, version, &connack)?, used)
            }
            Ok(Some(_)) => {
                return Err(Failed::new(
                    LinkDownReason::Protocol,
                    "the core sent something else before CONNACK",
                )
                .into());
            }
            Err(e) => return Err(Failed::new(LinkDownReason::Protocol, e.to_string()).into()),
        };
        let (up, facts, keep_alive) = established;
        let rest = buf.split_off(used);
        return Ok(Established {
            io,
            up,
            facts,
            rest,
            keep_alive,
        });
    }
}

fn accept(
    shared: &Shared,
    link: &LinkStatus,
    version: Version,
    connack: &Connack<'_>,
) -> Result<(Up, CoreFacts, Duration), Attempt> {
    if connack.reason.is_error() {
        if connack.reason == ReasonCode::UNSUPPORTED_PROTOCOL_VERSION && version == Version::V5 {
            return Err(Attempt::NoV5);
        }
        return Err(Failed::new(
            LinkDownReason::Refused,
            format!(
                "the core refused the connection: {}{}",
                connack.reason.name(),
                match connack.reason_string {
                    Some(why) => format!(" ({})", crate::telemetry::clean(why, 200)),
                    None => String::new(),
                }
            ),
        )
        .into());
    }
    let v5 = version == Version::V5;
    if v5 {
        shared.has_v5.store(true, Ordering::Relaxed);
    }
    let identifiers = v5 && connack.subscription_ids_available.unwrap_or(true);
    let packet_max = connack.maximum_packet_size.unwrap_or(u32::MAX);
    // 0 would leave a dead link unnoticed.
    let keep_alive = connack
        .server_keep_alive
        .filter(|s| *s > 0)
        .map_or(shared.config.keepalive, |s| Duration::from_secs(s.into()));
    let window = match version {
        Version::V5 => connack.receive_maximum.unwrap_or(u16::MAX),
        _ => WINDOW_V3,
    };
    let up = Up {
        version,
        session_present: connack.session_present && link.role != Role::Retained,
        receive_maximum: window,
        packet_max,
        identifiers,
    };
    let facts = CoreFacts {
        identifiers,
        version_5: v5,
        maximum_qos: connack.maximum_qos.unwrap_or(QoS::ExactlyOnce),
        retain_available: connack.retain_available.unwrap_or(true),
        packet_max,
    };
    Ok((up, facts, keep_alive))
}

fn connect_packet(
    shared: &Shared,
    link: &LinkStatus,
    version: Version,
    clean: bool,
) -> Result<Vec<u8>, Failed> {
    let config = &shared.config;
    let client_id = format!("{}-{}-{}", config.client_id_prefix, shared.node, link.name);
    let password = config.read_password().map_err(|e| {
        Failed::new(
            LinkDownReason::Connect,
            format!("upstream.password_file cannot be read: {e}"),
        )
    })?;
    let retained = link.role == Role::Retained;
    let mut out = Vec::with_capacity(128);
    Connect {
        version,
        clean_start: clean || retained,
        keep_alive: config.keepalive.as_secs() as u16,
        client_id: &client_id,
        will: None,
        username: config.username.as_deref(),
        password: password.as_deref(),
        session_expiry: (!retained && !clean).then_some(SESSION_EXPIRY.as_secs() as u32),
        receive_maximum: Some(u16::MAX),
        maximum_packet_size: Some(shared.packet_max),
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

async fn open(shared: &Shared, server: &Server) -> Result<Dialed, Failed> {
    let target = match server {
        Server::Embedded(_) => {
            let Some(core) = &shared.embedded else {
                return Err(Failed::new(LinkDownReason::Connect, "no embedded core"));
            };
            return Ok(Dialed::Pipe(core.connect()));
        }
        Server::Remote { tls, host, port } => {
            let (host, port) = (host.clone(), *port);
            match tls {
                true => DialTarget::Tls { host, port },
                false => DialTarget::Tcp { host, port },
            }
        }
    };
    dial(&target, shared.tls.as_ref(), shared.config.connect_timeout)
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
