//! From the first byte to CONNACK.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, timeout, timeout_at};

use crate::auth::Identity;
use crate::budget::Account;
use crate::mqtt::{
    Connack, Connect, Error, Message, MessageSpec, QoS, ReasonCode, Version, decode_connect,
};
use crate::router::handle::ConnectionHandle;
use crate::router::{self, Peer, Refused};
use crate::session::{ConnectionSpec, Policy, Scope, Will};
use crate::telemetry::{RateLimited, RefusedReason, clean, metrics};
use crate::transport::{
    ClientCertificate, CloseHow, Closed, Detected, OutBuf, Stream,
    UNAUTHENTICATED_PACKET_MAX_BYTES, detect,
};

use crate::client::connection::{Admitted, Opened};
use crate::client::partial::{KEEP, Partial};
use crate::client::scope::{owner, room_for, scope_of};
use crate::client::{ClientPolicy, Clients, ListenerContext};

/// Characters of a client's text in a log line.
const LOGGED: usize = 64;
/// How long a refused client is given to take its answer.
const GOODBYE: std::time::Duration = std::time::Duration::from_secs(1);

static REFUSALS: RateLimited = RateLimited::new(std::time::Duration::from_millis(20));

/// Why a connection gets no session.
struct Refusal {
    label: RefusedReason,
    code: ReasonCode,
    why: String,
    /// The version to answer in; none: nothing that a client could read.
    answer: Option<Version>,
    client_id: String,
}

/// Takes CONNECT, authenticates, and gives the client its session.
pub(super) async fn open(
    clients: &Arc<Clients>,
    door: &ListenerContext,
    mut stream: Stream,
    peer: SocketAddr,
    deadline: Instant,
    began: u64,
) -> Option<Box<Opened>> {
    let mut input = Partial::default();
    let budget = (&clients.strangers, clients.strangers_max);
    let read = read_connect(&mut stream, &mut input, budget);
    let read = timeout_at(deadline, read).await;
    let mut input = std::mem::take(&mut input.bytes);
    let refusal = match read {
        Ok(Ok(())) => {
            let certificate = stream.take_certificate();
            let result = admit(clients, door, peer, certificate, &input).await;
            match result {
                Ok((admitted, used)) => {
                    input.drain(..used);
                    metrics()
                        .connect_seconds
                        .record(clients.clock.now().saturating_sub(began) as f64 / 1000.0);
                    stream.authenticated();
                    return Some(Box::new(Opened {
                        stream,
                        input,
                        admitted,
                    }));
                }
                Err(refusal) => refusal,
            }
        }
        Ok(Err(refusal)) => refusal,
        Err(_) => Refusal {
            label: RefusedReason::Timeout,
            code: ReasonCode::SUCCESS,
            why: "no complete CONNECT within limits.accept_deadline".into(),
            answer: None,
            client_id: String::new(),
        },
    };
    metrics().connects_refused[refusal.label].increment(1);
    // What balancers do to see whether the port is open.
    let probed = refusal.label == RefusedReason::Closed
        && input.is_empty()
        && matches!(door.transport, "tcp" | "tls");
    if probed {
        tracing::debug!(listener = &*door.name, transport = door.transport, peer = %peer, "{}", refusal.why);
    } else if let Some(suppressed) = REFUSALS.permit(clients.clock.now()) {
        tracing::info!(
            client_id = refusal.client_id,
            listener = &*door.name,
            transport = door.transport,
            peer = %peer,
            code = refusal.code.0,
            reason = %refusal.label,
            suppressed,
            "Connection refused: {}",
            refusal.why
        );
    }
    let _ = timeout(GOODBYE, refuse(&mut stream, &refusal)).await;
    None
}

async fn refuse(stream: &mut Stream, refusal: &Refusal) {
    if let Some(version) = refusal.answer {
        let mut out = OutBuf::default();
        Connack {
            reason: refusal.code,
            ..Connack::default()
        }
        .encode(version, &mut out.buf);
        if poll_fn(|cx| stream.poll_send(cx, 0, &mut out))
            .await
            .is_err()
        {
            return;
        }
    }
    let how = match refusal.label {
        RefusedReason::Malformed | RefusedReason::Protocol | RefusedReason::TooLarge => {
            CloseHow::Protocol
        }
        // The connection lives on without its control stream.
        RefusedReason::Closed if stream.has_data_streams() => CloseHow::Protocol,
        RefusedReason::Draining => CloseHow::GoingAway,
        RefusedReason::Rate | RefusedReason::Memory => CloseHow::Overload,
        _ => CloseHow::Normal,
    };
    poll_fn(|cx| stream.poll_close(cx, how)).await;
}

/// Reads until the CONNECT is whole; `account` may hold `max` bytes.
async fn read_connect<'a>(
    stream: &mut Stream,
    input: &mut Partial<'a>,
    (account, max): (&'a Account, u64),
) -> Result<(), Refusal> {
    let refusal = |label, code, why: String, answer| Refusal {
        label,
        code,
        why,
        answer,
        client_id: String::new(),
    };
    loop {
        let bytes = &input.bytes;
        let guess = detect(bytes).filter(|guess| *guess != Detected::Mqtt);
        match (
            decode_connect(bytes, UNAUTHENTICATED_PACKET_MAX_BYTES),
            guess,
        ) {
            (Ok(Some(_)), _) => return Ok(()),
            (Ok(None), None) => {
                input.settle(account, false, 0);
                if account.used() > max && input.bytes.len() > KEEP {
                    let (label, code) = (RefusedReason::Memory, ReasonCode::QUOTA_EXCEEDED);
                    let why = "incomplete CONNECTs use up their budget";
                    return Err(refusal(label, code, why.into(), None));
                }
            }
            // Its first byte may pass for a packet that is not complete.
            (Ok(None), Some(other)) => {
                let (label, code) = (RefusedReason::Protocol, ReasonCode::PROTOCOL_ERROR);
                let why = format!("no CONNECT; this looks like {other}");
                return Err(refusal(label, code, why, None));
            }
            (Err(error), guess) => {
                let label = match &error {
                    Error::TooLarge { .. } => RefusedReason::TooLarge,
                    Error::UnsupportedVersion { .. } => RefusedReason::Version,
                    Error::Protocol(_) => RefusedReason::Protocol,
                    _ => RefusedReason::Malformed,
                };
                let why = match guess {
                    None => error.to_string(),
                    Some(other) => format!("{error}; this looks like {other}"),
                };
                let code = error.reason_code();
                // Only to something that is a CONNECT an answer means anything.
                let answer = answerable(bytes);
                return Err(refusal(label, code, why, answer));
            }
        }
        let mut more = Vec::new();
        match poll_fn(|cx| stream.poll_recv(cx, &mut more)).await {
            Ok(_) => {
                input.bytes.append(&mut more);
            }
            Err(closed) => {
                let label = match closed {
                    Closed::TooLarge => RefusedReason::TooLarge,
                    Closed::Violation(_) => RefusedReason::Protocol,
                    _ => RefusedReason::Closed,
                };
                let why = format!("{closed} before CONNECT was complete");
                return Err(refusal(label, ReasonCode::SUCCESS, why, None));
            }
        }
    }
}

/// In which version a refused CONNECT can be answered. 3.1.1 closes without an answer on a
/// malformed one [MQTT-3.1.4-1], but says that it does not know a version [MQTT-3.1.2-2].
fn answerable(input: &[u8]) -> Option<Version> {
    if input.first() != Some(&0x10) {
        return None;
    }
    // The protocol name is within the first bytes, whatever the length field's size.
    let name = input.windows(4).take(8).position(|w| w == b"MQTT")?;
    match input.get(name + 4) {
        Some(4) => None,
        Some(level) if *level >= 5 => Some(Version::V5),
        Some(_) => Some(Version::V311),
        None => None,
    }
}

async fn admit(
    clients: &Arc<Clients>,
    door: &ListenerContext,
    peer: SocketAddr,
    certificate: Option<Box<ClientCertificate>>,
    input: &[u8],
) -> Result<(Admitted, usize), Refusal> {
    let (connect, used) = match decode_connect(input, UNAUTHENTICATED_PACKET_MAX_BYTES) {
        Ok(Some(decoded)) => decoded,
        // It decoded a moment ago.
        _ => unreachable_connect()?,
    };
    let version = connect.version;
    let refuse = |label, code: ReasonCode, why: &str| Refusal {
        label,
        code,
        why: why.to_owned(),
        answer: Some(version),
        client_id: clean(connect.client_id, LOGGED),
    };
    if clients.draining.load(Ordering::Acquire) {
        return Err(refuse(
            RefusedReason::Draining,
            ReasonCode::SERVER_SHUTTING_DOWN,
            "the process is ending",
        ));
    }
    if !clients.rate.take(clients.clock.now()) {
        return Err(refuse(
            RefusedReason::Rate,
            ReasonCode::CONNECTION_RATE_EXCEEDED,
            "limits.connect_rate_max is exceeded",
        ));
    }
    if connect.authentication_method.is_some() {
        return Err(refuse(
            RefusedReason::AuthMethod,
            ReasonCode::BAD_AUTHENTICATION_METHOD,
            "enhanced authentication is not offered",
        ));
    }
    let assigned = connect.client_id.is_empty();
    if assigned && version < Version::V5 && (!connect.clean_start || version == Version::V31) {
        return Err(refuse(
            RefusedReason::ClientId,
            ReasonCode::CLIENT_IDENTIFIER_NOT_VALID,
            "an empty client identifier needs Clean Session [MQTT-3.1.3-8]",
        ));
    }
    let client_id: Arc<str> = match assigned {
        true => assigned_id().into(),
        false => connect.client_id.into(),
    };
    let named = certificate.map(|certificate| certificate.name());
    let principal = clients
        .authenticator
        .verify(
            door.auth,
            &client_id,
            connect.username,
            connect.password,
            named.clone().and_then(Result::ok),
        )
        .await
        .map_err(|code| match code {
            ReasonCode::NOT_AUTHORIZED => refuse(
                RefusedReason::NotAuthorized,
                code,
                match named {
                    None => "the client gave no certificate",
                    Some(Err(why)) => why,
                    Some(Ok(_)) => "the name in its certificate stands for clients without one",
                },
            ),
            ReasonCode::CLIENT_IDENTIFIER_NOT_VALID => refuse(
                RefusedReason::ClientId,
                code,
                "auth.client_id = \"username\": the client identifier must be the user name, or \
                 the name in the certificate",
            ),
            ReasonCode::BAD_USER_NAME_OR_PASSWORD => refuse(
                RefusedReason::BadCredentials,
                code,
                "the user name or the password is wrong",
            ),
            _ => refuse(
                RefusedReason::Other,
                code,
                "too many passwords to verify at once",
            ),
        })?;
    let identity = Identity::new(principal.clone(), client_id.clone());
    let scope = scope_of(clients, door, &identity, peer).map_err(|why| {
        refuse(
            RefusedReason::NotAuthorized,
            ReasonCode::NOT_AUTHORIZED,
            why,
        )
    })?;
    let owner = owner(&principal, scope.as_deref());
    let will = match &connect.will {
        None => None,
        Some(_) => Some(
            will_of(clients, &connect, &identity, scope.as_deref())
                .map_err(|(label, code, why)| refuse(label, code, why))?,
        ),
    };
    let session = &clients.session;
    let expiry_max = whole_seconds(session.expiry_max);
    let asked = match version {
        Version::V5 => connect.session_expiry.unwrap_or(0),
        _ if connect.clean_start => 0,
        _ => whole_seconds(session.expiry_v3),
    };
    let expiry = asked.min(expiry_max);
    let keep_alive = keep_alive(clients, &connect);
    let receive_maximum = connect.receive_maximum.unwrap_or(u16::MAX);
    let spec = ConnectionSpec {
        version,
        receive_maximum,
        maximum_packet_size: connect.maximum_packet_size.unwrap_or(u32::MAX),
        topic_alias_maximum: connect.topic_alias_maximum,
        problem_information: connect.request_problem_information,
        keep_alive,
        scope,
    };
    let wake = Arc::new(ConnectionHandle::default());
    let place = Arc::new(Peer {
        listener: door.name.clone(),
        transport: door.transport,
        ping_after: door.ping_after,
        address: peer,
    });
    let router = &clients.router;
    let maximum_qos = router.maximum_qos();
    // Room for what is added to each of its publishes.
    let own = room_for(clients, spec.scope.as_deref());
    let packet_max = router.packet_max().saturating_sub(own as u32).max(256);
    let response_wanted = Connack {
        session_present: false,
        reason: ReasonCode::SUCCESS,
        session_expiry: (version == Version::V5 && expiry != asked).then_some(expiry),
        receive_maximum: Some(clients.limits.receive_max),
        maximum_qos: (maximum_qos < QoS::ExactlyOnce).then_some(maximum_qos),
        retain_available: (!router.retain_available()).then_some(false),
        maximum_packet_size: Some(packet_max),
        assigned_client_id: assigned.then_some(&*client_id),
        topic_alias_maximum: Some(clients.limits.topic_alias_max),
        shared_subscription_available: (!router.shares()).then_some(false),
        server_keep_alive: (keep_alive != connect.keep_alive).then_some(keep_alive),
        ..Connack::default()
    };
    let connected = router
        .connect(
            router::Connect {
                client_id: client_id.clone(),
                principal: owner,
                clean_start: connect.clean_start,
                expiry,
                spec,
                will,
                handle: wake.clone(),
                peer: place.clone(),
            },
            clients.clock.now(),
            |present, out| {
                Connack {
                    session_present: present,
                    ..response_wanted
                }
                .encode(version, out);
            },
        )
        .map_err(|Refused::Principal| {
            refuse(
                RefusedReason::ClientId,
                ReasonCode::CLIENT_IDENTIFIER_NOT_VALID,
                "the client identifier's session belongs to another principal",
            )
        })?;
    let event = match (connected.taken_over, connected.present) {
        (true, true) => "Session resumed, taken over from a live connection",
        (true, false) => "Session taken over and begun anew",
        (false, true) => "Session resumed",
        (false, false) => "Client connected",
    };
    tracing::info!(
        client_id = clean(&client_id, LOGGED),
        principal = clean(&principal, LOGGED),
        listener = &*door.name,
        transport = door.transport,
        peer = %peer,
        version = version as u8,
        clean_start = connect.clean_start,
        expiry,
        keep_alive,
        session_present = connected.present,
        "{event}"
    );
    Ok((
        Admitted {
            session: connected.session,
            connection_no: connected.connection_no,
            publish_link: connected.publish_link,
            version,
            packet_max,
            wake,
            identity: Box::new(identity),
            place,
        },
        used,
    ))
}

fn unreachable_connect<T>() -> Result<T, Refusal> {
    Err(Refusal {
        label: RefusedReason::Malformed,
        code: ReasonCode::MALFORMED_PACKET,
        why: "CONNECT changed while it was read".into(),
        answer: None,
        client_id: String::new(),
    })
}

/// The will, judged as the publish that it will be.
fn will_of(
    clients: &Clients,
    connect: &Connect<'_>,
    identity: &Identity,
    scope: Option<&Scope>,
) -> Result<Will, (RefusedReason, ReasonCode, &'static str)> {
    let Some(will) = &connect.will else {
        return Err((
            RefusedReason::Will,
            ReasonCode::UNSPECIFIED_ERROR,
            "no will",
        ));
    };
    let policy = ClientPolicy { clients, identity };
    if will.qos > policy.maximum_qos() {
        return Err((
            RefusedReason::Will,
            ReasonCode::QOS_NOT_SUPPORTED,
            "the will's QoS is above the core's maximum [MQTT-3.2.2-12]",
        ));
    }
    if will.retain && !policy.retain_available() {
        return Err((
            RefusedReason::Will,
            ReasonCode::RETAIN_NOT_SUPPORTED,
            "a retained will where the core keeps none [MQTT-3.2.2-13]",
        ));
    }
    if will.topic.split('/').count() > clients.limits.topic_levels_max as usize {
        return Err((
            RefusedReason::Will,
            ReasonCode::TOPIC_NAME_INVALID,
            "the will's topic has more levels than limits.topic_levels_max",
        ));
    }
    if !policy.may_publish(will.topic) {
        return Err((
            RefusedReason::NotAuthorized,
            ReasonCode::NOT_AUTHORIZED,
            "no rule allows the will's topic",
        ));
    }
    let (mount, sender) = scope.map_or(("", &[][..]), |s| (&*s.mount, &*s.sender));
    if mount.len() + will.topic.len() > usize::from(u16::MAX) {
        return Err((
            RefusedReason::Will,
            ReasonCode::TOPIC_NAME_INVALID,
            "the will's topic is too long below the listener's mount",
        ));
    }
    let spec = MessageSpec {
        topic: will.topic,
        properties: will.properties,
        payload: will.payload,
        qos: will.qos,
        retain: will.retain,
        // Counted from its publication; see the session.
        expires_at: u64::MAX,
        strip_key: Some(clients.router.limits().reserved_key),
        account: None,
    };
    let message = Message::mounted(&spec, mount, sender);
    Ok(Will::new(message, will.delay, will.message_expiry))
}

/// The Keep Alive in force, seconds: the client's, or ours where it may be overridden.
fn keep_alive(clients: &Clients, connect: &Connect<'_>) -> u16 {
    let asked = connect.keep_alive;
    if connect.version < Version::V5 {
        return asked;
    }
    let max = clients.session.keepalive_max.map(|d| d.as_secs() as u16);
    let default = clients
        .session
        .keepalive_default
        .map(|d| d.as_secs() as u16);
    let granted = match asked {
        0 => default.or(max).unwrap_or(0),
        asked => asked,
    };
    max.map_or(granted, |max| match granted {
        0 => max,
        granted => granted.min(max),
    })
}

fn whole_seconds(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

/// Unique and not to be guessed [MQTT-3.1.3-6].
fn assigned_id() -> String {
    let high = getrandom::u64().unwrap_or_default();
    let low = getrandom::u64().unwrap_or_default();
    format!("auto-{high:016x}{low:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_connect_is_charged_while_it_is_not_whole() {
        let account = Account::new();
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let mut stream = Stream::pipe(server);
        // Of 16,000 bytes.
        let mut connect = vec![0x10, 0x80, 0x7d, 0, 4];
        connect.extend_from_slice(b"MQTT\x05\x02\0\0");
        connect.resize(6000, 0);
        client.write_all(&connect).await.expect("written");
        let mut input = Partial::default();
        let mut read = Box::pin(read_connect(&mut stream, &mut input, (&account, 6000)));
        assert!(futures_util::poll!(&mut read).is_pending());
        assert_eq!(account.used(), 6000);
        client.write_all(b"x").await.expect("written");
        let refusal = read.await.expect_err("one more than there is room for");
        assert_eq!(refusal.label, RefusedReason::Memory);
        drop(input);
        assert_eq!(account.used(), 0);
    }
}
