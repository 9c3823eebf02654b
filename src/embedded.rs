//! The embedded broker: a small in-process broker for `servers = ["embedded:"]`.
//!
//! Links speak MQTT 5, 3.1.1 or 3.1 to it as to any other broker, through an in-memory pipe or a
//! real port. It keeps everything in memory and has no authentication. With the cargo feature
//! `sim` it can be given the quirks and faults of real brokers. It is not a broker product.

mod connection;
mod inbound;
mod locked;
mod options;
mod outbound;
#[cfg_attr(
    not(feature = "sim"),
    expect(
        dead_code,
        unreachable_pub,
        reason = "only the feature sim makes a broker with quirks"
    )
)]
mod quirks;
mod retained;
mod route;
mod sessions;
mod shared;
mod state;
mod stats;
#[cfg(test)]
pub(crate) mod stepped;
mod subscription;

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpListener;

use crate::backoff::Backoff;

pub use options::EmbeddedOptions;
#[cfg(feature = "sim")]
pub use quirks::{Overlap, Quirks, RefuseV5, Shared};
pub use stats::EmbeddedStats;

use locked::LockedState;
use state::State;

/// Bytes that the in-memory pipe of a connection holds in each direction.
const PIPE_BYTES: usize = 256 * 1024;

/// A running embedded broker. Clones are handles to the same one.
///
/// It ends when the last handle and the last connection are gone.
#[derive(Clone)]
pub struct EmbeddedBroker {
    state: Arc<LockedState>,
}

impl EmbeddedBroker {
    /// Starts a broker. Must be called inside a tokio runtime, which then runs its timers and
    /// connections.
    pub fn start(options: EmbeddedOptions) -> EmbeddedBroker {
        EmbeddedBroker {
            state: LockedState::start(options),
        }
    }

    /// Opens a connection and returns the client's end. While the broker is stopped or has
    /// `connections_max` connections, that end is at end of file at once.
    pub fn connect(&self) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        self.adopt(theirs);
        ours
    }

    /// Accepts connections on `listener` until the future is dropped. Accepted connections go on.
    pub async fn serve_tcp(self, listener: TcpListener) {
        let mut backoff = Backoff::for_accept();
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    backoff.reset();
                    // Batches are written whole, so Nagle's algorithm could only delay them.
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%peer, %error, "TCP_NODELAY refused");
                    }
                    self.adopt(stream);
                }
                Err(error) => {
                    tracing::warn!(%error, "the embedded broker could not accept a connection");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    /// Drops every connection without a DISCONNECT, as a crash does, and refuses new ones until
    /// [`EmbeddedBroker::restart`]. The wills of connected clients are lost.
    pub fn stop(&self) {
        self.with(State::stop);
    }

    /// Stops and starts again. With `keep_sessions` false every session ends. Retained messages
    /// stay either way, see [`EmbeddedBroker::clear_retained`].
    pub fn restart(&self, keep_sessions: bool) {
        self.with(|state| {
            state.stop();
            state.start(keep_sessions);
        });
    }

    /// Forgets all retained messages, as a broker that does not persist them.
    pub fn clear_retained(&self) {
        self.with(|state| state.retained.clear());
    }

    /// Changes the options. Present connections keep what their CONNACK announced.
    pub fn set_options(&self, options: EmbeddedOptions) {
        self.with(|state| state.options = options);
    }

    /// The present counts.
    pub fn stats(&self) -> EmbeddedStats {
        self.with(|state| state.stats())
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        self.state.with(&mut Vec::new(), f)
    }

    fn adopt<S>(&self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Some(handle) = self.with(State::open) {
            #[expect(clippy::disallowed_methods, reason = "it ends with its pipe or socket")]
            tokio::spawn(connection::run(self.state.clone(), handle, stream));
        }
    }
}

impl std::fmt::Debug for EmbeddedBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedBroker")
            .field("stats", &self.stats())
            .finish()
    }
}
