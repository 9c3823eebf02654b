//! A limit on events per second, shared between the clients' networks.

use std::net::IpAddr;

use foldhash::fast::RandomState;
use lru::LruCache;
use parking_lot::Mutex;

use crate::shares::{SHARE_DIVISOR, network};
use crate::time::Millis;

/// Networks whose shares are remembered, about 80 bytes each. A network that is forgotten begins anew
/// with a whole share.
const NETWORKS_MAX: usize = 16_384;

/// A limit on events per second, with a second's worth in reserve. Every network may use the first half
/// of the reserve, but of the second half only an eighth of the limit: a network that asks for more
/// than everything leaves the others their events.
#[derive(Debug)]
pub struct Rate {
    per_second: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    all: Reserve,
    /// The shares of networks that have used them.
    shares: LruCache<IpAddr, Reserve, RandomState>,
}

/// Thousandths of an event in reserve, and the time of the count.
#[derive(Clone, Copy, Debug)]
struct Reserve {
    thousandths: u64,
    at: Millis,
}

impl Reserve {
    fn full(per_second: u64, at: Millis) -> Self {
        Self {
            thousandths: per_second * 1000,
            at,
        }
    }

    fn refill(&mut self, per_second: u64, now: Millis) {
        let gained = now.since(self.at).as_millis() as u64 * per_second;
        self.thousandths = (self.thousandths + gained).min(per_second * 1000);
        self.at = now.max(self.at);
    }

    fn take(&mut self) -> bool {
        let left = self.thousandths.checked_sub(1000);
        self.thousandths = left.unwrap_or(self.thousandths);
        left.is_some()
    }
}

impl Rate {
    /// A limit of `per_second` in the long run.
    pub fn new(per_second: u32) -> Self {
        let per_second = u64::from(per_second);
        Self {
            per_second,
            state: Mutex::new(State {
                all: Reserve::full(per_second, Millis::ZERO),
                shares: LruCache::unbounded_with_hasher(RandomState::default()),
            }),
        }
    }

    /// Takes an event for a client at `from`, if its network has one left.
    pub fn take(&self, now: Millis, from: IpAddr) -> bool {
        let mut state = self.state.lock();
        let State { all, shares } = &mut *state;
        all.refill(self.per_second, now);
        if all.thousandths > self.per_second * 500 {
            return all.take();
        }
        let per_second = (self.per_second / SHARE_DIVISOR as u64).max(1);
        let new = || Reserve::full(per_second, now);
        let share = shares.get_or_insert_mut(network(from), new);
        share.refill(per_second, now);
        let taken = all.thousandths >= 1000 && share.take() && all.take();
        if shares.len() > NETWORKS_MAX {
            shares.pop_lru();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ip: &str) -> IpAddr {
        ip.parse().expect("an address")
    }

    #[test]
    fn a_rate_allows_its_reserve_and_then_its_pace() {
        let rate = Rate::new(80);
        let one = at("192.0.2.1");
        let taken = |now| {
            (0..200)
                .filter(|_| rate.take(Millis::new(now), one))
                .count()
        };
        // The first half, and its share of the second.
        assert_eq!(taken(0), 40 + 10);
        assert_eq!(taken(0), 0);
        // In the long run it has everything that nobody else wants.
        let later: usize = (1..=100).map(|tenth| taken(tenth * 100)).sum();
        assert!((750..=810).contains(&later), "{later}");
    }

    #[test]
    fn a_network_that_asks_for_everything_leaves_the_others_their_share() {
        let rate = Rate::new(80);
        let flood = at("2001:db8:0:1::1");
        let mut refused = 0;
        for now in 0..60_000 {
            for _ in 0..2 {
                rate.take(Millis::new(now), flood);
            }
            // Five events a second from another network.
            if now % 200 == 0 && !rate.take(Millis::new(now), at("2001:db8:0:2::1")) {
                refused += 1;
            }
        }
        assert_eq!(refused, 0);
        assert!(!rate.take(Millis::new(60_000), at("2001:db8:0:1:f::2")));
    }

    #[test]
    fn the_memory_is_bounded() {
        let rate = Rate::new(1_000_000);
        for n in 0..900_000_u32 {
            rate.take(Millis::ZERO, IpAddr::from(n.to_be_bytes()));
        }
        assert_eq!(rate.state.lock().shares.len(), NETWORKS_MAX);
    }
}
