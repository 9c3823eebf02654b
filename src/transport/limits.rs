//! The limits that hold before a client is known.

mod handshakes;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::transport::quic::keys::QuicSecret;
pub(super) use handshakes::HandshakePermit;
pub use handshakes::Handshakes;

/// The most bytes of an MQTT packet, and of a WebSocket message, before a client is authenticated.
pub const UNAUTHENTICATED_PACKET_MAX_BYTES: u32 = 16 * 1024;
/// How much larger than the largest packet a WebSocket message may be: one message may carry several
/// packets [MQTT-6.0.0-2].
const MESSAGE_SLACK_BYTES: usize = 64 * 1024;
/// The smallest limit of a WebSocket message after authentication.
const MESSAGE_MIN_BYTES: usize = 256 * 1024;

/// Limits shared by all listeners.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Permits for TLS and QUIC handshakes that run at the same time.
    pub handshakes: Handshakes,
    /// The time from accept to a complete CONNECT.
    pub accept_deadline: Duration,
    /// The largest MQTT packet after authentication, bytes.
    pub packet_max: usize,
    /// QUIC's max_idle_timeout (RFC 9000 section 10.1).
    pub quic_idle: Duration,
    /// The secret from which QUIC's keys are derived.
    pub quic_secret: QuicSecret,
    /// The limit on connections, which holds before anything is spent on one.
    pub connections: Arc<ConnectionCap>,
}

impl Limits {
    /// The most bytes of a WebSocket message after authentication.
    pub fn message_max(&self) -> usize {
        self.packet_max
            .saturating_add(MESSAGE_SLACK_BYTES)
            .max(MESSAGE_MIN_BYTES)
    }
}

impl Default for Limits {
    /// 512 handshakes of each kind, 10 s, 1 MiB, 15 min, a secret of zeros, 100,000 connections.
    fn default() -> Self {
        Self {
            handshakes: Handshakes::new(512),
            accept_deadline: Duration::from_secs(10),
            packet_max: 1024 * 1024,
            quic_idle: Duration::from_secs(15 * 60),
            quic_secret: QuicSecret::new([0; QuicSecret::LEN]),
            connections: Arc::new(ConnectionCap::new(100_000)),
        }
    }
}

/// One connection under a [`ConnectionCap`], given back when dropped.
#[derive(Debug)]
pub struct Permit(Arc<ConnectionCap>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A limit on connections that are open at the same time.
#[derive(Debug)]
pub struct ConnectionCap {
    used: AtomicUsize,
    max: usize,
}

impl ConnectionCap {
    /// At most `max` connections at once.
    pub fn new(max: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            max,
        }
    }

    /// How many there are now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// A permit for one more connection, unless the limit is reached.
    pub fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
                (used < self.max).then_some(used + 1)
            })
            .ok()?;
        Some(Permit(Arc::clone(self)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_cap_holds_at_the_limit() {
        let cap = Arc::new(ConnectionCap::new(2));
        let a = cap.try_acquire().expect("first");
        let _b = cap.try_acquire().expect("second");
        assert!(cap.try_acquire().is_none());
        drop(a);
        assert_eq!(cap.used(), 1);
        assert!(cap.try_acquire().is_some());
    }

    #[test]
    fn message_limit_has_a_floor_and_slack() {
        let mut limits = Limits {
            packet_max: 1000,
            ..Limits::default()
        };
        assert_eq!(limits.message_max(), 256 * 1024);
        limits.packet_max = 1 << 20;
        assert_eq!(limits.message_max(), (1 << 20) + (64 << 10));
        limits.packet_max = usize::MAX;
        assert_eq!(limits.message_max(), usize::MAX);
    }
}
