//! The limits that hold before a client is known.

mod handshakes;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::shares::{SHARE_DIVISOR, network};
use crate::transport::quic::keys::QuicSecret;
pub use handshakes::Handshakes;

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
    /// The largest CONNECT, and the largest WebSocket message before authentication, bytes.
    pub connect_max: usize,
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
    /// 512 handshakes of each kind, 10 s, 16 KiB, 1 MiB, 15 min, a secret of zeros, 100,000
    /// connections.
    fn default() -> Self {
        Self {
            handshakes: Handshakes::new(512),
            accept_deadline: Duration::from_secs(10),
            connect_max: 16 * 1024,
            packet_max: 1024 * 1024,
            quic_idle: Duration::from_secs(15 * 60),
            quic_secret: QuicSecret::new([0; QuicSecret::LEN]),
            connections: Arc::new(ConnectionCap::new(100_000)),
        }
    }
}

/// The connections that every network may have before its clients are authenticated.
const SHARE_MIN: usize = 16;

/// One connection under a [`ConnectionCap`], given back when dropped.
#[derive(Debug)]
pub struct Permit(Arc<ConnectionCap>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A connection that counts for its client's network until it is dropped: its client is not
/// authenticated.
#[derive(Debug)]
pub struct Unauthenticated {
    cap: Arc<ConnectionCap>,
    network: IpAddr,
    /// Bytes of the connection's incomplete CONNECT.
    bytes: usize,
}

impl Unauthenticated {
    /// The connection holds so many bytes now. Returns the bytes of all such connections of its
    /// network.
    pub fn hold(&mut self, bytes: usize) -> u64 {
        let mut networks = self.cap.unauthenticated.lock();
        let Some(network) = networks.get_mut(&self.network) else {
            return bytes as u64;
        };
        network.bytes = network.bytes + bytes as u64 - self.bytes as u64;
        self.bytes = bytes;
        network.bytes
    }
}

impl Drop for Unauthenticated {
    fn drop(&mut self) {
        let mut networks = self.cap.unauthenticated.lock();
        if let Some(network) = networks.get_mut(&self.network) {
            network.connections -= 1;
            network.bytes -= self.bytes as u64;
            if network.connections == 0 {
                networks.remove(&self.network);
            }
        }
    }
}

/// The connections of a network that are not authenticated.
#[derive(Debug, Default)]
struct Network {
    connections: usize,
    /// Bytes of their incomplete CONNECTs.
    bytes: u64,
}

/// A connection that was accepted, before its CONNECT.
#[derive(Debug)]
pub(super) struct Admitted {
    pub permit: Permit,
    /// `None`: the client's network is not known yet.
    pub unauthenticated: Option<Unauthenticated>,
}

impl From<Permit> for Admitted {
    fn from(permit: Permit) -> Self {
        Self {
            permit,
            unauthenticated: None,
        }
    }
}

impl Admitted {
    /// Counts the connection for the network of `from`, unless it counts already. False: the network
    /// has its share.
    pub(super) fn count_for(&mut self, from: IpAddr) -> bool {
        if self.unauthenticated.is_none() {
            self.unauthenticated = self.permit.0.share(from);
        }
        self.unauthenticated.is_some()
    }
}

/// A limit on connections that are open at the same time. Once half of them are open, one network may
/// have an eighth of the limit in connections that are not authenticated.
#[derive(Debug)]
pub struct ConnectionCap {
    used: AtomicUsize,
    max: usize,
    /// The networks with connections that are not authenticated.
    unauthenticated: Mutex<HashMap<IpAddr, Network, RandomState>>,
}

impl ConnectionCap {
    /// At most `max` connections at once.
    pub fn new(max: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            max,
            unauthenticated: Mutex::default(),
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

    /// A permit for one more connection from `from`, unless the limit or the network's share is
    /// reached.
    pub(super) fn try_admit(self: &Arc<Self>, from: IpAddr) -> Option<Admitted> {
        let mut admitted = Admitted::from(self.try_acquire()?);
        admitted.count_for(from).then_some(admitted)
    }

    fn share(self: &Arc<Self>, from: IpAddr) -> Option<Unauthenticated> {
        let network = network(from);
        let share = (self.max / SHARE_DIVISOR).max(SHARE_MIN);
        let mut networks = self.unauthenticated.lock();
        let taken = networks.get(&network).map_or(0, |n| n.connections);
        if self.used() > self.max / 2 && taken >= share {
            return None;
        }
        networks.entry(network).or_default().connections += 1;
        Some(Unauthenticated {
            cap: Arc::clone(self),
            network,
            bytes: 0,
        })
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
    fn silent_connections_of_one_network_leave_room_for_the_others() {
        let cap = Arc::new(ConnectionCap::new(256));
        let at = |ip: &str| ip.parse::<IpAddr>().expect("an address");
        let of = |ip| std::iter::from_fn(|| cap.try_admit(at(ip))).collect::<Vec<_>>();
        let mut flood = of("2001:db8:0:1::1");
        // The first half of the limit.
        assert_eq!(flood.len(), 128);
        assert!(cap.try_admit(at("2001:db8:0:1:f::2")).is_none());
        assert_eq!(cap.used(), 128);
        let other = of("192.0.2.1");
        assert_eq!(other.len(), 32);
        // Authenticated clients do not count for their network.
        for one in &mut flood {
            one.unauthenticated = None;
        }
        assert_eq!(of("2001:db8:0:1::1").len(), 32);
        // A proxy's client counts once its address is known.
        let mut late = Admitted::from(cap.try_acquire().expect("room"));
        assert!(!late.count_for(at("192.0.2.1")) && late.count_for(at("192.0.2.2")));
        drop((flood, other, late));
        assert!(cap.unauthenticated.lock().is_empty());
        assert_eq!(cap.used(), 0);
    }

    #[test]
    fn a_network_is_told_the_bytes_of_all_its_connections() {
        let cap = Arc::new(ConnectionCap::new(16));
        let from = "192.0.2.1".parse().expect("an address");
        let mut all = [(); 2].map(|()| cap.share(from).expect("room"));
        assert_eq!(all[0].hold(100), 100);
        assert_eq!(all[1].hold(50), 150);
        assert_eq!(all[0].hold(20), 70);
        let [one, mut two] = all;
        drop(one);
        assert_eq!(two.hold(60), 60);
        drop(two);
        assert!(cap.unauthenticated.lock().is_empty());
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
