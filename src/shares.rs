//! Limits that are shared between the clients' networks, so that no network can take all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// One network may take this fraction of all permits from the second half.
pub(crate) const SHARE_DIVISOR: usize = 8;

/// A number of permits. No network can take all of them.
#[derive(Debug)]
pub(crate) struct Shares {
    max: usize,
    /// The first half of the permits, for any client.
    common: Arc<Semaphore>,
    /// The second half; each network may take its share of it.
    rest: Arc<Semaphore>,
    /// The number of permits in one network's share.
    share: usize,
    networks: Mutex<Networks>,
}

/// The networks that have permits of the second half or wait for one, each with its remaining share
/// and the number of its users.
type Networks = HashMap<IpAddr, (Arc<Semaphore>, usize), RandomState>;

/// One permit, given back when dropped.
#[derive(Debug)]
pub(crate) struct SharePermit {
    _permit: OwnedSemaphorePermit,
    /// Dropped in this order, so that the permit is returned before its network is forgotten.
    _share: Option<(OwnedSemaphorePermit, NetworkShare)>,
}

impl Shares {
    /// `max` permits, at least one.
    pub(crate) fn new(max: usize) -> Self {
        let max = max.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            max,
            common: Arc::new(Semaphore::new(max / 2)),
            rest: Arc::new(Semaphore::new(max - max / 2)),
            share: (max / SHARE_DIVISOR).max(1),
            networks: Mutex::default(),
        }
    }

    /// How many permits are taken.
    pub(crate) fn running(&self) -> usize {
        let free = self.common.available_permits() + self.rest.available_permits();
        self.max.saturating_sub(free)
    }

    /// Whether more than half of the permits are taken.
    pub(crate) fn pressed(&self) -> bool {
        self.running() > self.max / 2
    }

    /// Waits for a permit for a client at `from`.
    pub(crate) async fn acquire(self: &Arc<Self>, from: SocketAddr) -> SharePermit {
        if let Some(permit) = self.try_acquire(from) {
            return permit;
        }
        let of_share = async {
            let share = NetworkShare::of(self, from);
            let own = acquired(Arc::clone(&share.permits).acquire_owned().await);
            let permit = acquired(Arc::clone(&self.rest).acquire_owned().await);
            SharePermit {
                _permit: permit,
                _share: Some((own, share)),
            }
        };
        tokio::select! {
            permit = Arc::clone(&self.common).acquire_owned() => SharePermit {
                _permit: acquired(permit),
                _share: None,
            },
            permit = of_share => permit,
        }
    }

    /// A permit for a client at `from`, if one is free.
    pub(crate) fn try_acquire(self: &Arc<Self>, from: SocketAddr) -> Option<SharePermit> {
        if let Ok(permit) = Arc::clone(&self.common).try_acquire_owned() {
            return Some(SharePermit {
                _permit: permit,
                _share: None,
            });
        }
        let share = NetworkShare::of(self, from);
        let own = Arc::clone(&share.permits).try_acquire_owned().ok()?;
        let permit = Arc::clone(&self.rest).try_acquire_owned().ok()?;
        Some(SharePermit {
            _permit: permit,
            _share: Some((own, share)),
        })
    }
}

/// A network's share of the second half. It exists while a client of the network has a permit of it
/// or waits for one.
#[derive(Debug)]
struct NetworkShare {
    of: Arc<Shares>,
    network: IpAddr,
    permits: Arc<Semaphore>,
}

impl NetworkShare {
    fn of(all: &Arc<Shares>, from: SocketAddr) -> Self {
        let network = network(from.ip());
        let mut networks = all.networks.lock();
        let new = || (Arc::new(Semaphore::new(all.share)), 0);
        let (permits, users) = networks.entry(network).or_insert_with(new);
        *users += 1;
        Self {
            of: Arc::clone(all),
            network,
            permits: Arc::clone(permits),
        }
    }
}

impl Drop for NetworkShare {
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

/// The network that one client can have addresses of: an IPv6 client usually has a /64.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) >> 64 << 64).into(),
    }
}

fn acquired(permit: Result<OwnedSemaphorePermit, AcquireError>) -> OwnedSemaphorePermit {
    permit.expect("these semaphores are never closed")
}

/// A client at this address.
#[cfg(test)]
pub(crate) fn at(ip: &str) -> SocketAddr {
    (ip.parse::<IpAddr>().expect("an address"), 1).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn one_network_leaves_permits_for_the_others() {
        let permits = Arc::new(Shares::new(16));
        let from = at("2001:db8:0:1::1");
        let of = |from| std::iter::from_fn(|| permits.try_acquire(from)).collect::<Vec<_>>();
        // The first half, and its share of the second.
        let kept = of(from);
        assert_eq!(kept.len(), 8 + 2);
        assert!(permits.try_acquire(at("2001:db8:0:1:ffff::2")).is_none());
        let others = ["2001:db8:0:2::1", "192.0.2.1", "192.0.2.2"].map(|ip| of(at(ip)));
        assert!(others.iter().all(|kept| kept.len() == 2));
        assert!(permits.try_acquire(at("192.0.2.3")).is_none());
        drop((kept, others));
        assert_eq!((permits.running(), permits.networks.lock().len()), (0, 0));
        assert_eq!(of(from).len(), 8 + 2);
    }

    #[test]
    fn waiting_clients_do_not_delay_other_networks() {
        let permits = Arc::new(Shares::new(16));
        let flood = at("192.0.2.1");
        let mut kept = Vec::new();
        let mut waiting = Vec::new();
        for _ in 0..100 {
            let mut permit = Box::pin(permits.acquire(flood));
            match permit.as_mut().now_or_never() {
                Some(permit) => kept.push(permit),
                None => waiting.push(permit),
            }
        }
        assert_eq!(kept.len(), 10);
        let other = permits.acquire(at("192.0.2.2")).now_or_never();
        assert!(other.is_some());
        // The waiting clients get their turn.
        kept.pop();
        let first = waiting[0].as_mut().now_or_never();
        assert!(first.is_some());
        assert!(waiting[1].as_mut().now_or_never().is_none());
        kept.swap_remove(0);
        let second = waiting[1].as_mut().now_or_never();
        assert!(second.is_some());
        drop((kept, waiting, other, first, second));
        assert_eq!((permits.running(), permits.networks.lock().len()), (0, 0));
    }
}
