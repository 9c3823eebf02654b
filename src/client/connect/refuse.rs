//! The answer to a client that gets no session.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

use crate::mqtt::{Connack, Connect, Version};
use crate::streams::StreamId;
use crate::telemetry::{DeniedAction, RateLimited, RefusedReason, clean, metrics};
use crate::time::Millis;
use crate::transport::{CloseHow, OutBuf, Stream};

use crate::client::connect::RefusalCause;
use crate::client::{LOGGED_CHARS, ListenerContext, connection_lines};

/// How long a refused client is given to take its answer.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

static REFUSALS: RateLimited = connection_lines();
static FULL: RateLimited = RateLimited::new(Duration::from_secs(1));
static NOT_KEPT: RateLimited = RateLimited::new(Duration::from_secs(1));
static DENIED: RateLimited = RateLimited::burst(5, Duration::from_secs(1));

/// A connection that gets no session, and the answer to its client.
#[derive(Debug)]
pub struct Refusal {
    /// The reason.
    pub cause: RefusalCause,
    /// The version in which CONNACK is written; `None`: the client could not read an answer.
    pub(super) answer: Option<Version>,
    /// The client identifier for the log, cleaned and shortened.
    pub(super) client_id: String,
    /// For the log: the user name of CONNECT.
    pub(super) user: Option<String>,
}

impl Refusal {
    /// A refusal without an answer.
    pub(super) fn new(cause: RefusalCause) -> Self {
        Self {
            cause,
            answer: None,
            client_id: String::new(),
            user: None,
        }
    }

    /// The refusal as the answer to this CONNECT.
    pub(super) fn answering(self, connect: &Connect<'_>) -> Self {
        Self {
            answer: Some(connect.version),
            client_id: clean(connect.client_id, LOGGED_CHARS),
            user: connect.username.map(|name| clean(name, LOGGED_CHARS)),
            ..self
        }
    }

    /// Whether the client was refused because of its credentials or its rights.
    fn denies_login(&self) -> bool {
        use RefusedReason as R;
        matches!(
            self.cause.label(),
            R::BadCredentials | R::NotAuthorized | R::ClientId
        )
    }

    fn how(&self, has_data_streams: bool) -> CloseHow {
        match self.cause.label() {
            RefusedReason::Malformed | RefusedReason::Protocol | RefusedReason::TooLarge => {
                CloseHow::Protocol
            }
            // The client's end of the control stream does not end the connection.
            RefusedReason::Closed if has_data_streams => CloseHow::Protocol,
            RefusedReason::Draining => CloseHow::GoingAway,
            RefusedReason::Rate | RefusedReason::Memory | RefusedReason::SessionMemory => {
                CloseHow::Overload
            }
            _ => CloseHow::Normal,
        }
    }
}

/// Logs a refusal at a level, with further fields.
macro_rules! log_refusal {
    ($level:ident, $listener:ident, $peer:ident, $refusal:ident, $suppressed:ident $(, $field:ident = $value:expr)*) => {
        tracing::$level!(
            client_id = $refusal.client_id,
            $($field = $value,)*
            listener = &*$listener.name,
            transport = $listener.transport,
            peer = %$peer,
            code = $refusal.cause.code().0,
            reason = %$refusal.cause.label(),
            $suppressed,
            "Connection refused: {}",
            $refusal.cause
        )
    };
}

/// Counts, logs and answers a refusal, and closes the connection. `empty`: no byte arrived.
pub(super) async fn refuse(
    stream: &mut Stream,
    listener: &ListenerContext,
    peer: SocketAddr,
    refusal: &Refusal,
    empty: bool,
    now: Millis,
) {
    metrics().connects_refused[refusal.cause.label()].increment(1);
    // Balancers connect and close to see whether the port is open.
    let probed = refusal.cause.label() == RefusedReason::Closed
        && empty
        && matches!(listener.transport, "tcp" | "tls");
    if probed {
        tracing::debug!(
            listener = &*listener.name,
            transport = listener.transport,
            peer = %peer,
            "{}",
            refusal.cause
        );
    } else if refusal.denies_login() {
        metrics().denied[DeniedAction::Login].increment(1);
        if let Some(suppressed) = DENIED.permit(now) {
            log_refusal!(
                warn,
                listener,
                peer,
                refusal,
                suppressed,
                user = refusal.user
            );
        }
    } else if let Some(lines) = full_lines(&refusal.cause) {
        if let Some(suppressed) = lines.permit(now) {
            log_refusal!(warn, listener, peer, refusal, suppressed);
        }
    } else if let Some(suppressed) = REFUSALS.permit(now) {
        log_refusal!(info, listener, peer, refusal, suppressed);
    }
    let _ = timeout(CLOSE_WAIT, answer(stream, refusal)).await;
}

/// The lines for a refusal because `memory.sessions` is used up.
fn full_lines(cause: &RefusalCause) -> Option<&'static RateLimited> {
    match cause {
        RefusalCause::SessionMemory(_) => Some(&FULL),
        RefusalCause::NewSession(_) => Some(&NOT_KEPT),
        _ => None,
    }
}

async fn answer(stream: &mut Stream, refusal: &Refusal) {
    if let Some(version) = refusal.answer {
        let mut out = OutBuf::default();
        Connack {
            reason: refusal.cause.code(),
            ..Connack::default()
        }
        .encode(version, &mut out.buf);
        if poll_fn(|cx| stream.poll_send(cx, StreamId::CONTROL, &mut out))
            .await
            .is_err()
        {
            return;
        }
    }
    let how = refusal.how(stream.has_data_streams());
    poll_fn(|cx| stream.poll_close(cx, how)).await;
}
