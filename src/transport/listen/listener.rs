//! The state that the accept loop and the handshakes of one listener share, and the task of a
//! connection.

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::transport::error::{HandshakeError, RefusalReason};
use crate::transport::events::Events;
use crate::transport::limits::{Admitted, Limits, Permit, Unauthenticated};
use crate::transport::proxy::trusts;
use crate::transport::stream::Stream;
use crate::transport::tls::server::ServerTls;

/// A connection whose transport handshake is done. No MQTT byte has been read.
#[derive(Debug)]
pub struct Accepted {
    /// The byte stream.
    pub stream: Stream,
    /// The client's address when the connection was accepted: the peer's, or the one that a trusted
    /// proxy named. Port 0 stands for a port that the proxy did not name.
    pub peer: SocketAddr,
    /// The instant by which CONNECT must be complete.
    pub deadline: Instant,
    /// The connection's permit under the limit on connections.
    pub permit: Permit,
    /// The connection's part of its network's share, to be dropped once the client is authenticated.
    pub unauthenticated: Option<Unauthenticated>,
}

/// Serves a client from the answer to its CONNECT to the connection's end. It lives as long as the
/// connection and should be small; the larger state of the connection's beginning is gone by then.
pub type ConnectionTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The state that the accept loop and the handshakes of one listener share.
pub(in crate::transport) struct Listener {
    pub config: config::Listener,
    /// Present where the listener's transport is encrypted.
    pub tls: Option<Arc<ServerTls>>,
    pub limits: Arc<Limits>,
    pub events: Arc<dyn Events>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.config).finish()
    }
}

impl Listener {
    /// The instant by which a connection that begins now must have sent its CONNECT.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.limits.accept_deadline
    }

    /// A permit under the limit on connections, for a connection from `peer`. A proxy's connections
    /// count for the networks of its clients, which are not known yet.
    pub(crate) fn admit(&self, peer: SocketAddr) -> Option<Admitted> {
        let connections = &self.limits.connections;
        let admitted = match trusts(&self.config, peer.ip()) {
            true => connections.try_acquire().map(Admitted::from),
            false => connections.try_admit(peer.ip()),
        };
        if admitted.is_none() {
            self.events.refused(RefusalReason::Connections);
        }
        admitted
    }

    /// Runs a handshake until its deadline or until the listener stops.
    pub(crate) async fn bounded<T>(
        &self,
        deadline: Instant,
        stop: &CancellationToken,
        handshake: impl Future<Output = Result<T, HandshakeError>>,
    ) -> Result<T, HandshakeError> {
        match stop
            .run_until_cancelled(timeout_at(deadline, handshake))
            .await
        {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(HandshakeError::Deadline),
            None => Err(HandshakeError::Stopped),
        }
    }

    /// The accepted connection, or nothing where its handshake failed, which is reported.
    pub(crate) fn finish(
        &self,
        result: Result<Stream, HandshakeError>,
        peer: SocketAddr,
        deadline: Instant,
        mut admitted: Admitted,
    ) -> Option<Accepted> {
        match result {
            Ok(stream) => {
                if !admitted.count_for(peer.ip()) {
                    self.events.refused(RefusalReason::Connections);
                    return None;
                }
                Some(Accepted {
                    stream,
                    peer,
                    deadline,
                    permit: admitted.permit,
                    unauthenticated: admitted.unauthenticated,
                })
            }
            Err(error) => {
                self.events.handshake_failed(peer, &error);
                None
            }
        }
    }
}

/// Serves one connection in a task of its own: its handshake, then `handler`, then the task that
/// `handler` returns.
pub(in crate::transport) fn spawn<H, F>(
    handshake: impl Future<Output = Option<Accepted>> + Send + 'static,
    handler: H,
) where
    H: Fn(Accepted) -> F + Send + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    // A future is as large as its largest state for as long as it exists, and keeps room for
    // everything that was moved into the future that it awaits. The boxes leave a task of a few
    // pointers.
    let handshake = Box::pin(handshake);
    let beginning = Box::pin(async move {
        let accepted = handshake.await?;
        handler(accepted).await
    });
    #[expect(
        clippy::disallowed_methods,
        reason = "the drain waits for the connection's permit"
    )]
    tokio::spawn(async move {
        let task = beginning.await;
        if let Some(task) = task {
            task.await;
        }
    });
}
