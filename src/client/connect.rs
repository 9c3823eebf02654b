//! The CONNECT phase: from the first byte of an accepted connection to its CONNACK.
//!
//! Its future is boxed, and dropped before the task of the connection begins.

mod admit;
mod authenticate;
mod cause;
mod read;
mod refuse;
mod takeover;

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, sleep_until, timeout_at};

use crate::auth::{Denial, Identity};
use crate::mqtt::{Connect, decode_connect};
use crate::router::Peer;
use crate::session::SessionKey;
use crate::telemetry::{RateLimited, clean, metrics};
use crate::transport::{Stream, Unauthenticated};

use crate::client::machine::{Machine, ReadBuffer};
use crate::client::scope::{UnfitName, added_bytes, scope_of};
use crate::client::{ClientPolicy, Clients, LOGGED_CHARS, ListenerContext, connection_lines};
pub use admit::{Admission, Admitted, Applicant};
use authenticate::authenticate;
pub use cause::RefusalCause;
pub use refuse::Refusal;

static SESSIONS: RateLimited = connection_lines();

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
    mut unauthenticated: Option<Unauthenticated>,
) -> Option<Box<AcceptedConnection>> {
    let began = clients.clock.now();
    let mut input = ReadBuffer::default();
    let budget = (&clients.unauthenticated, clients.unauthenticated_max_bytes);
    let connect_max = clients.limits.connect_max;
    let share = unauthenticated.as_mut();
    let read = read::read_connect(&mut stream, &mut input, connect_max, budget, share);
    let read = timeout_at(deadline, read).await;
    let mut input = input.take_bytes();
    let refusal = match read {
        Ok(Ok(())) => {
            let mut waiting = Waiting {
                stream: &mut stream,
                more: Vec::new(),
                deadline,
            };
            match open_session(clients, listener, peer, &mut waiting, &input).await {
                Ok((session, used)) => {
                    let mut more = waiting.more;
                    input.drain(..used);
                    input.append(&mut more);
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
        Err(_) => Refusal::new(RefusalCause::Deadline),
    };
    let empty = input.is_empty();
    let now = clients.clock.now();
    refuse::refuse(&mut stream, listener, peer, &refusal, empty, now).await;
    None
}

/// A client that waits for its CONNACK.
struct Waiting<'a> {
    stream: &'a mut Stream,
    /// Bytes that arrived meanwhile.
    more: Vec<u8>,
    /// When CONNACK must be there.
    deadline: Instant,
}

impl Waiting<'_> {
    /// Waits for `check`, but no longer than the client does, and no longer than its deadline.
    async fn bound<T>(
        &mut self,
        check: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        tokio::select! {
            biased;
            done = check => done,
            closed = read::until_gone(self.stream, &mut self.more) => Err(Refusal::new(RefusalCause::ClosedDuringCheck(closed))),
            () = sleep_until(self.deadline) => Err(Refusal::new(RefusalCause::CheckDeadline)),
        }
    }
}

/// Gives the client behind a complete CONNECT its session. Returns the CONNECT's length too.
async fn open_session(
    clients: &Clients,
    listener: &ListenerContext,
    peer: SocketAddr,
    waiting: &mut Waiting<'_>,
    input: &[u8],
) -> Result<(AcceptedSession, usize), Refusal> {
    let Ok(Some((connect, used))) = decode_connect(input, clients.limits.connect_max) else {
        // It was decoded a moment ago.
        return Err(Refusal::new(RefusalCause::Changed));
    };
    let session = session_for(clients, listener, peer, waiting, &connect).await;
    session
        .map(|session| (session, used))
        .map_err(|refusal| refusal.answering(&connect))
}

async fn session_for(
    clients: &Clients,
    listener: &ListenerContext,
    peer: SocketAddr,
    waiting: &mut Waiting<'_>,
    connect: &Connect<'_>,
) -> Result<AcceptedSession, Refusal> {
    if clients.draining.load(Ordering::Acquire) {
        return Err(Refusal::new(RefusalCause::Draining));
    }
    if !clients.rate.take(clients.clock.now(), peer.ip()) {
        return Err(Refusal::new(RefusalCause::Rate));
    }
    let certificate = waiting.stream.take_certificate();
    let check = authenticate(clients, listener.auth, connect, certificate, peer);
    let (identity, owner) = waiting.bound(check).await?;
    let scope = scope_of(clients, listener, &identity, peer)
        .map_err(|UnfitName| Refusal::new(RefusalCause::Mount))?;
    let key = SessionKey::new(
        &identity.client_id,
        scope.as_deref().map_or("", |s| &s.mount),
    );
    takeover::read_out(&clients.router, &key, &owner, waiting.deadline).await;
    if !clients
        .authenticator
        .still_knows(listener.auth, &identity.principal)
    {
        return Err(Refusal::new(RefusalCause::Denied(Denial::Credentials)));
    }
    let peer = Arc::new(Peer {
        listener: listener.name.clone(),
        transport: listener.transport,
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
            owner,
            added_bytes: added_bytes(clients, scope.as_deref()),
            keep_alive_max: listener.keep_alive_max,
            scope,
            peer: peer.clone(),
            ping_after: listener.ping_after,
        },
    )?;
    if let Some(suppressed) = SESSIONS.permit(admission.now) {
        log_session(&identity, &peer, connect, &admitted, suppressed);
    }
    Ok(AcceptedSession {
        machine: admitted.machine,
        identity: Box::new(identity),
        peer,
    })
}

fn log_session(
    identity: &Identity,
    peer: &Peer,
    connect: &Connect<'_>,
    admitted: &Admitted,
    suppressed: u64,
) {
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
        version = connect.version.name(),
        bridge = connect.bridge,
        clean_start = connect.clean_start,
        expiry = admitted.expiry_seconds,
        keep_alive = admitted.keep_alive.map_or(0, NonZeroU16::get),
        session_present = admitted.present,
        suppressed,
        "{event}"
    );
}
