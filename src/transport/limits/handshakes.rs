//! Places for handshakes that run at the same time, so shared out that no
//! network can keep all of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// The part of all places that one network may have of the second half.
const SHARE: usize = 8;

/// A limit on handshakes that run at the same time, over all listeners: of TLS
/// over TCP, and apart from that of QUIC.
#[derive(Clone, Debug)]
pub struct Handshakes {
    pub(in crate::transport) tls: Arc<Places>,
    pub(in crate::transport) quic: Arc<Places>,
}

impl Handshakes {
    /// At most `max` of each at once; at least one.
    pub fn new(max: usize) -> Self {
        Self {
            tls: Arc::new(Places::new(max)),
            quic: Arc::new(Places::new(max)),
        }
    }

    /// How many run now.
    pub fn running(&self) -> usize {
        self.tls.running() + self.quic.running()
    }
}

/// The places of one kind of handshake.
#[derive(Debug)]
pub(in crate::transport) struct Places {
    max: usize,
    /// Half of all, for whoever comes.
    common: Arc<Semaphore>,
    /// The others, for networks that have not had their share of them.
    rest: Arc<Semaphore>,
    /// Places in one network's share.
    share: usize,
    networks: Mutex<Networks>,
}

/// Networks that have places of the second half or wait for one, with how many
/// do.
type Networks = HashMap<IpAddr, (Arc<Semaphore>, usize), RandomState>;

/// Held while a handshake runs.
#[derive(Debug)]
pub(in crate::transport) struct Place {
    _permit: OwnedSemaphorePermit,
    /// In this order: what is given back is counted before it is forgotten.
    _share: Option<(OwnedSemaphorePermit, Share)>,
}

impl Places {
    fn new(max: usize) -> Self {
        let max = max.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            max,
            common: Arc::new(Semaphore::new(max / 2)),
            rest: Arc::new(Semaphore::new(max - max / 2)),
            share: (max / SHARE).max(1),
            networks: Mutex::default(),
        }
    }

    fn running(&self) -> usize {
        let free = self.common.available_permits() + self.rest.available_permits();
        self.max.saturating_sub(free)
    }

    /// More than half of the places are taken.
    pub(in crate::transport) fn pressed(&self) -> bool {
        self.running() > self.max / 2
    }

    /// A place for a client at `from`, once there is one.
    pub(in crate::transport) async fn place(self: &Arc<Self>, from: SocketAddr) -> Place {
        if let Some(place) = self.try_place(from) {
            return place;
        }
        let of_share = async {
            let share = Share::of(self, from);
            let own = acquired(Arc::clone(&share.places).acquire_owned().await);
            let permit = acquired(Arc::clone(&self.rest).acquire_owned().await);
            Place {
                _permit: permit,
                _share: Some((own, share)),
            }
        };
        tokio::select! {
            permit = Arc::clone(&self.common).acquire_owned() => Place {
                _permit: acquired(permit),
                _share: None,
            },
            place = of_share => place,
        }
    }

    /// The same, if there is one now.
    pub(in crate::transport) fn try_place(self: &Arc<Self>, from: SocketAddr) -> Option<Place> {
        if let Ok(permit) = Arc::clone(&self.common).try_acquire_owned() {
            return Some(Place {
                _permit: permit,
                _share: None,
            });
        }
        let share = Share::of(self, from);
        let own = Arc::clone(&share.places).try_acquire_owned().ok()?;
        let permit = Arc::clone(&self.rest).try_acquire_owned().ok()?;
        Some(Place {
            _permit: permit,
            _share: Some((own, share)),
        })
    }
}

/// A network's share of the second half, known while somebody has or wants a
/// place of it.
#[derive(Debug)]
struct Share {
    of: Arc<Places>,
    network: IpAddr,
    places: Arc<Semaphore>,
}

impl Share {
    fn of(all: &Arc<Places>, from: SocketAddr) -> Self {
        let network = network(from.ip());
        let mut networks = all.networks.lock();
        let new = || (Arc::new(Semaphore::new(all.share)), 0);
        let (places, users) = networks.entry(network).or_insert_with(new);
        *users += 1;
        Self {
            of: Arc::clone(all),
            network,
            places: Arc::clone(places),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut networks = self.of.networks.lock();
        if let Some((_, users)) = networks.get_mut(&self.network) {
            *users -= 1;
            if *users == 0 {
                networks.remove(&self.network);
            }
        }
    }
}

/// What one client can have addresses from: IPv6 is given out by /64.
fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) >> 64 << 64).into(),
    }
}

fn acquired(permit: Result<OwnedSemaphorePermit, AcquireError>) -> OwnedSemaphorePermit {
    permit.expect("these semaphores are never closed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn at(ip: &str) -> SocketAddr {
        (ip.parse::<IpAddr>().expect("an address"), 1).into()
    }

    #[test]
    fn pressure_begins_past_half() {
        let handshakes = Handshakes::new(4);
        let from = at("192.0.2.1");
        let take = || handshakes.quic.try_place(from);
        let held = [take(), take()];
        assert!(!handshakes.quic.pressed());
        let third = take();
        assert!(handshakes.quic.pressed() && !handshakes.tls.pressed());
        assert_eq!(handshakes.running(), 3);
        drop((held, third));
        assert_eq!(handshakes.running(), 0);
    }

    #[test]
    fn one_network_leaves_places_for_the_others() {
        let places = Arc::new(Places::new(16));
        let from = at("2001:db8:0:1::1");
        let of = |from| std::iter::from_fn(|| places.try_place(from)).collect::<Vec<_>>();
        // Half, and its share of the other half.
        let held = of(from);
        assert_eq!(held.len(), 8 + 2);
        assert!(places.try_place(at("2001:db8:0:1:ffff::2")).is_none());
        let others = ["2001:db8:0:2::1", "192.0.2.1", "192.0.2.2"].map(|ip| of(at(ip)));
        assert!(others.iter().all(|held| held.len() == 2));
        assert!(places.try_place(at("192.0.2.3")).is_none());
        drop((held, others));
        assert_eq!((places.running(), places.networks.lock().len()), (0, 0));
        assert_eq!(of(from).len(), 8 + 2);
    }

    #[test]
    fn those_who_wait_hold_up_no_other_network() {
        let places = Arc::new(Places::new(16));
        let flood = at("192.0.2.1");
        let mut held = Vec::new();
        let mut waiting = Vec::new();
        for _ in 0..100 {
            let mut place = Box::pin(places.place(flood));
            match place.as_mut().now_or_never() {
                Some(place) => held.push(place),
                None => waiting.push(place),
            }
        }
        assert_eq!(held.len(), 10);
        let other = places.place(at("192.0.2.2")).now_or_never();
        assert!(other.is_some());
        // In their turn, those too.
        held.pop();
        let first = waiting[0].as_mut().now_or_never();
        assert!(first.is_some());
        assert!(waiting[1].as_mut().now_or_never().is_none());
        held.swap_remove(0);
        let second = waiting[1].as_mut().now_or_never();
        assert!(second.is_some());
        drop((held, waiting, other, first, second));
        assert_eq!((places.running(), places.networks.lock().len()), (0, 0));
    }
}
