//! The CONNECT phase: from the first byte of an accepted connection to its CONNACK.
//!
//! Its future is boxed, and dropped before the task of the connection begins.

mod admit;
mod authenticate;
mod read;
mod refuse;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, timeout_at};

use crate::auth::Identity;
use crate::mqtt::{Connect, ReasonCode, decode_connect};
use crate::router::Peer;
use crate::telemetry::{RefusedReason, clean, metrics};
use crate::transport::{ClientCertificate, Stream, UNAUTHENTICATED_PACKET_MAX_BYTES};

use crate::client::machine::{Machine, ReadBuffer};
use crate::client::scope::{added_bytes, owner, scope_of};
use crate::client::{ClientPolicy, Clients, ListenerContext};
pub use admit::{Admission, Admitted, Applicant};
use authenticate::authenticate;
pub use refuse::Refusal;

/// Characters of a client's text in a log line.
const LOGGED_CHARS: usize = 64;

/// A connection whose client has its session.
pub(super) struct AcceptedConnection {
    pub stream: Stream,
    /// Bytes that arrived with CONNECT.
    pub input: Vec<u8>,
    pub session: AcceptedSession,
}

/// The outcome of a CONNECT.
pub(super) struct AcceptedSession {
    pub machine: Machine,
    pub identity: Box<Identity>,
    pub peer: Arc<Peer>,
}

/// Takes CONNECT, authenticates the client, and gives it its session. `None`: it was refused, and
/// the connection is closed.
pub(super) async fn accept(
    clients: &Arc<Clients>,
    listener: &ListenerContext,
    mut stream: Stream,
    peer: SocketAddr,
    deadline: Instant,
) -> Option<Box<AcceptedConnection>> {
    let began = clients.clock.now();
    let mut input = ReadBuffer::default();
    let budget = (&clients.unauthenticated, clients.unauthenticated_max_bytes);
    let read = read::read_connect(&mut stream, &mut input, budget);
    let read = timeout_at(deadline, read).await;
    let mut input = std::mem::take(&mut input.bytes);
    let refusal = match read {
        Ok(Ok(())) => {
            let certificate = stream.take_certificate();
            match open_session(clients, listener, peer, certificate, &input).await {
                Ok((session, used)) => {
                    input.drain(..used);
                    metrics()
                        .connect_seconds
                        .record(clients.clock.now().since(began).as_secs_f64());
                    stream.authenticated();
                    return Some(Box::new(AcceptedConnection {
                        stream,
                        input,
                        session,
                    }));
                }
                Err(refusal) => refusal,
            }
        }
        Ok(Err(refusal)) => refusal,
        Err(_) => Refusal::new(
            RefusedReason::Timeout,
            ReasonCode::SUCCESS,
            "no complete CONNECT within limits.accept_deadline",
        ),
    };
    let empty = input.is_empty();
    let now = clients.clock.now();
    refuse::refuse(&mut stream, listener, peer, &refusal, empty, now).await;
    None
}

/// Gives the client behind a complete CONNECT its session. Returns the CONNECT's length too.
async fn open_session(
    clients: &Clients,
    listener: &ListenerContext,
    peer: SocketAddr,
    certificate: Option<Box<ClientCertificate>>,
    input: &[u8],
) -> Result<(AcceptedSession, usize), Refusal> {
    let Ok(Some((connect, used))) = decode_connect(input, UNAUTHENTICATED_PACKET_MAX_BYTES) else {
        // It was decoded a moment ago.
        return Err(Refusal::new(
            RefusedReason::Malformed,
            ReasonCode::MALFORMED_PACKET,
            "CONNECT changed while it was read",
        ));
    };
    let session = session_for(clients, listener, peer, certificate, &connect).await;
    session
        .map(|session| (session, used))
        .map_err(|refusal| refusal.answering(&connect))
}

async fn session_for(
    clients: &Clients,
    listener: &ListenerContext,
    peer: SocketAddr,
    certificate: Option<Box<ClientCertificate>>,
    connect: &Connect<'_>,
) -> Result<AcceptedSession, Refusal> {
    if clients.draining.load(Ordering::Acquire) {
        return Err(Refusal::new(
            RefusedReason::Draining,
            ReasonCode::SERVER_SHUTTING_DOWN,
            "the process is ending",
        ));
    }
    if !clients.rate.take(clients.clock.now()) {
        return Err(Refusal::new(
            RefusedReason::Rate,
            ReasonCode::CONNECTION_RATE_EXCEEDED,
            "limits.connect_rate_max is exceeded",
        ));
    }
    let identity = authenticate(clients, listener.auth, connect, certificate).await?;
    let scope = scope_of(clients, listener, &identity, peer).map_err(|why| {
        let (label, code) = (RefusedReason::NotAuthorized, ReasonCode::NOT_AUTHORIZED);
        Refusal::new(label, code, why)
    })?;
    let peer = Arc::new(Peer {
        listener: listener.name.clone(),
        transport: listener.transport,
        ping_after: listener.ping_after,
        address: peer,
    });
    let admission = Admission {
        router: &clients.router,
        policy: &ClientPolicy {
            clients,
            identity: &identity,
        },
        session: &clients.session,
        limits: &clients.limits,
        now: clients.clock.now(),
    };
    let admitted = admission.admit(
        connect,
        Applicant {
            client_id: identity.client_id.clone(),
            owner: owner(&identity.principal, scope.as_deref()),
            added_bytes: added_bytes(clients, scope.as_deref()),
            scope,
            peer: peer.clone(),
        },
    )?;
    log_session(&identity, &peer, connect, &admitted);
    Ok(AcceptedSession {
        machine: admitted.machine,
        identity: Box::new(identity),
        peer,
    })
}

fn log_session(identity: &Identity, peer: &Peer, connect: &Connect<'_>, admitted: &Admitted) {
    let event = match (admitted.taken_over, admitted.present) {
        (true, true) => "Session resumed, taken over from a live connection",
        (true, false) => "Session taken over and begun anew",
        (false, true) => "Session resumed",
        (false, false) => "Client connected",
    };
    tracing::info!(
        client_id = clean(&identity.client_id, LOGGED_CHARS),
        principal = clean(&identity.principal, LOGGED_CHARS),
        listener = &*peer.listener,
        transport = peer.transport,
        peer = %peer.address,
        version = connect.version as u8,
        clean_start = connect.clean_start,
        expiry = admitted.expiry_seconds,
        keep_alive = admitted.keep_alive_seconds,
        session_present = admitted.present,
        "{event}"
    );
}
