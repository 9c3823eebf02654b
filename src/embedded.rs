//! The embedded core: a small in-process broker for `servers = ["embedded:"]`.
//!
//! Links speak to it as to any other core, MQTT 5, 3.1.1 or 3.1, through an
//! in-memory pipe or a real port. It keeps everything in memory, has no
//! authentication, and can be given the quirks and faults of real brokers. It is no broker product.

mod conn;
mod inbound;
mod options;
mod outbound;
mod retained;
mod route;
mod shared;
mod state;
#[cfg(test)]
pub(crate) mod stepped;

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

pub use options::{EmbeddedOptions, Overlap, RefuseV5, Shared};
use state::{State, Wire};

/// Bytes that the in-memory pipe of a connection holds in each direction.
const PIPE_BYTES: usize = 256 * 1024;
/// Pause after an accept that failed, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A running embedded core; clones are handles to the same one.
///
/// It ends when the last handle and the last connection are gone.
#[derive(Clone)]
pub struct EmbeddedBroker {
    inner: Arc<Inner>,
}

/// What an embedded core holds now and what it has done since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EmbeddedStats {
    /// Connections now, CONNECT seen or not.
    pub connections: usize,
    /// Sessions now, connected or not.
    pub sessions: usize,
    /// Subscriptions now, over all sessions.
    pub subscriptions: usize,
    /// Retained messages now.
    pub retained: usize,
    /// Messages now in all sessions' queues, those in flight included.
    pub queued: usize,
    /// CONNECT packets accepted.
    pub connects: u64,
    /// SUBSCRIBE packets received.
    pub subscribes: u64,
    /// UNSUBSCRIBE packets received.
    pub unsubscribes: u64,
    /// Application messages published to this core, wills included, a QoS 2
    /// message once.
    pub published: u64,
    /// PUBLISH packets sent, redeliveries included.
    pub delivered: u64,
    /// Messages dropped because a session's queue, or the retained store, was
    /// at its limit.
    pub dropped_full: u64,
    /// Messages dropped because their Message Expiry Interval had passed.
    pub dropped_expired: u64,
    /// Messages dropped because they exceed a client's Maximum Packet Size
    /// [MQTT-3.1.2-25].
    pub dropped_too_large: u64,
}

impl EmbeddedBroker {
    /// Starts a core. Must be called inside a tokio runtime, which then runs
    /// its timers and connections.
    pub fn start(options: EmbeddedOptions) -> EmbeddedBroker {
        let inner = Arc::new(Inner {
            base: Instant::now(),
            state: Mutex::new(State::new(options)),
            timer: Arc::new(Notify::new()),
        });
        tokio::spawn(run_timers(Arc::downgrade(&inner), inner.timer.clone()));
        EmbeddedBroker { inner }
    }

    /// Opens a connection; what is returned is the client's end. While the
    /// core is stopped, or at `connections_max`, it is at end of file at once.
    pub fn connect(&self) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        self.adopt(theirs);
        ours
    }

    /// Accepts on `listener` until the future is dropped; connections already
    /// accepted go on.
    pub async fn serve_tcp(self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // Batches are written whole, so Nagle could only delay.
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%peer, %error, "TCP_NODELAY refused");
                    }
                    self.adopt(stream);
                }
                Err(error) => {
                    tracing::warn!(%error, "the embedded core could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Drops every connection without a word, as a crash does, and refuses new
    /// ones until [`EmbeddedBroker::restart`]. Wills are lost with the process
    /// that held them.
    pub fn stop(&self) {
        self.inner.with(&mut Vec::new(), State::stop);
    }

    /// [`EmbeddedBroker::stop`] and start again. `keep_sessions` false ends every
    /// session; retained messages stay either way, see
    /// [`EmbeddedBroker::clear_retained`].
    pub fn restart(&self, keep_sessions: bool) {
        self.inner.with(&mut Vec::new(), |st| {
            st.stop();
            st.start(keep_sessions);
        });
    }

    /// Forgets all retained messages, as a broker does that does not persist
    /// them.
    pub fn clear_retained(&self) {
        self.inner.with(&mut Vec::new(), |st| st.retained.clear());
    }

    /// Changes the options. What a CONNACK capabilities stays as it was for the
    /// connections that exist.
    pub fn set_options(&self, options: EmbeddedOptions) {
        self.inner.with(&mut Vec::new(), |st| st.options = options);
    }

    /// The present counts.
    pub fn stats(&self) -> EmbeddedStats {
        self.inner.with(&mut Vec::new(), |st| st.stats())
    }

    fn adopt<S>(&self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Some(wire) = self.inner.with(&mut Vec::new(), State::open) {
            tokio::spawn(conn::run(self.inner.clone(), wire, stream));
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

struct Inner {
    /// Zero of this core's clock.
    base: Instant,
    state: Mutex<State>,
    /// Told when a deadline came that is earlier than those known, and when
    /// the core ends.
    timer: Arc<Notify>,
}

impl Inner {
    /// One short section under the lock, at one moment of the clock; who got
    /// something to send is woken after it. `wakes` is a buffer to reuse.
    fn with<R>(&self, wakes: &mut Vec<Arc<Wire>>, f: impl FnOnce(&mut State) -> R) -> R {
        let (result, timer) = {
            let mut st = self.state.lock();
            st.now = self.base.elapsed().as_millis() as u64;
            let earliest = st.next_deadline();
            std::mem::swap(&mut st.wakes, wakes);
            let result = f(&mut st);
            std::mem::swap(&mut st.wakes, wakes);
            let next = st.next_deadline();
            let timer = next.is_some_and(|n| earliest.is_none_or(|e| n < e));
            (result, timer)
        };
        for wire in wakes.drain(..) {
            wire.wake.notify_one();
        }
        if timer {
            self.timer.notify_one();
        }
        result
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.timer.notify_one();
    }
}

/// Session expiry, delayed wills and late retained replays.
async fn run_timers(core: std::sync::Weak<Inner>, timer: Arc<Notify>) {
    loop {
        let Some(inner) = core.upgrade() else { return };
        let next = inner.with(&mut Vec::new(), |st| {
            st.fire_due();
            st.next_deadline()
        });
        let at = next.map(|ms| inner.base + Duration::from_millis(ms));
        // Holding it while asleep would keep the core alive.
        drop(inner);
        match at {
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = timer.notified() => {}
            },
            None => timer.notified().await,
        }
    }
}
