//! Filters that nobody uses and that the broker still has: how many, since when, and on whose account.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use crate::hashing::LookUp;
use crate::router::types::SessionRef;
use crate::time::Millis;
use crate::topics::FilterId;

/// When a filter began to linger, and its number.
pub(in crate::router) type Idle = (Millis, FilterId);

/// The filters that linger.
#[derive(Debug, Default)]
pub(in crate::router) struct Lingering {
    /// Longest idle first.
    filters: BTreeMap<Idle, Entry>,
    /// Bytes of all their names.
    bytes: usize,
    /// Lingering filters charged to the client that unsubscribed from them.
    accounts: LookUp<SessionRef, LingerAccount>,
}

#[derive(Debug)]
struct Entry {
    /// Bytes of its name.
    bytes: usize,
    /// The client that it is charged to.
    account: Option<SessionRef>,
}

#[derive(Debug, Default)]
struct LingerAccount {
    filters: BTreeSet<Idle>,
    bytes: usize,
}

impl Lingering {
    /// A filter whose name has so many bytes begins to linger.
    pub(super) fn insert(&mut self, idle: Idle, bytes: usize) {
        let entry = Entry {
            bytes,
            account: None,
        };
        if let Some(known) = self.filters.insert(idle, entry) {
            self.forget(idle, &known);
        }
        self.bytes += bytes;
    }

    /// A filter does not linger any more.
    pub(super) fn remove(&mut self, idle: Idle) {
        if let Some(entry) = self.filters.remove(&idle) {
            self.forget(idle, &entry);
        }
    }

    fn forget(&mut self, idle: Idle, entry: &Entry) {
        self.bytes -= entry.bytes;
        let Some(client) = entry.account else {
            return;
        };
        if let Some(own) = self.accounts.get_mut(&client) {
            own.filters.remove(&idle);
            own.bytes -= entry.bytes;
            if own.filters.is_empty() {
                self.accounts.remove(&client);
            }
        }
    }

    /// Charges a lingering filter to `client`, which unsubscribed from it. Beyond so many filters or
    /// bytes the oldest are taken off the account, and returned.
    pub(super) fn charge(
        &mut self,
        idle: Idle,
        client: SessionRef,
        most: usize,
        bytes: usize,
    ) -> Vec<FilterId> {
        let mut surplus = Vec::new();
        let Some(entry) = self.filters.get_mut(&idle) else {
            return surplus;
        };
        if entry.account.is_some() {
            return surplus;
        }
        entry.account = Some(client);
        let own = self.accounts.entry(client).or_default();
        own.filters.insert(idle);
        own.bytes += entry.bytes;
        while (own.filters.len() > most || own.bytes > bytes)
            && let Some(oldest) = own.filters.pop_first()
        {
            if let Some(entry) = self.filters.get_mut(&oldest) {
                own.bytes -= entry.bytes;
                entry.account = None;
            }
            surplus.push(oldest.1);
        }
        if own.filters.is_empty() {
            self.accounts.remove(&client);
        }
        surplus
    }

    /// How many filters linger.
    pub(super) fn len(&self) -> usize {
        self.filters.len()
    }

    /// Bytes of their names.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The filters behind `last`, longest idle first, each with the bytes of its name.
    pub(super) fn behind(&self, last: Option<Idle>) -> impl Iterator<Item = (Idle, usize)> {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.filters.range((from, Bound::Unbounded));
        behind.map(|(idle, entry)| (*idle, entry.bytes))
    }
}

/// Decides which lingering filters are released, from the longest idle on.
#[derive(Debug)]
pub(in crate::router) struct Overdue {
    /// The time from which the filters' idle time is counted back.
    pub now: Millis,
    /// Filters that are idle for so long are released.
    pub linger: Duration,
    /// Busy filters and surplus ones are released if they are idle for so long.
    pub busy_min: Duration,
    /// How many filters linger beyond the configured number.
    pub surplus: usize,
    /// How many filters are released whatever their age.
    pub urgent: usize,
    /// How many bytes of names are released whatever their age.
    pub urgent_bytes: usize,
}

impl Overdue {
    /// Whether the next filter is released. `None`: neither that one nor any behind it.
    pub(super) fn next(
        &mut self,
        since: Millis,
        bytes: usize,
        busy: impl FnOnce() -> bool,
    ) -> Option<bool> {
        let urgent = self.urgent > 0 || self.urgent_bytes > 0;
        let idle = self.now.since(since);
        if idle < self.busy_min && !urgent {
            return None;
        }
        let released = urgent || self.surplus > 0 || idle >= self.linger || busy();
        self.surplus = self.surplus.saturating_sub(1);
        self.urgent = self.urgent.saturating_sub(1);
        if released {
            self.urgent_bytes = self.urgent_bytes.saturating_sub(bytes);
        }
        Some(released)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{SubscribeOptions, Version, encode_subscribe, encode_unsubscribe};
    use crate::router::{Connected, LinkSession, Router};
    use crate::sim::testing;

    const CLIENT: SessionRef = SessionRef {
        shard: 1,
        slot: 2,
        slot_version: 3,
    };

    #[test]
    fn the_lingering_filters_of_one_client_are_bounded_oldest_first() {
        let mut lingering = Lingering::default();
        lingering.insert((Millis::new(1), FilterId(9)), 10);
        for number in 0..3 {
            lingering.insert((Millis::new(2), FilterId(number)), 10);
            assert!(
                lingering
                    .charge((Millis::new(2), FilterId(number)), CLIENT, 3, 100)
                    .is_empty()
            );
        }
        lingering.insert((Millis::new(3), FilterId(7)), 10);
        assert_eq!(
            lingering.charge((Millis::new(3), FilterId(7)), CLIENT, 3, 100),
            [FilterId(0)]
        );
        // The oldest is off the account, so the next one follows.
        lingering.insert((Millis::new(4), FilterId(8)), 10);
        assert_eq!(
            lingering.charge((Millis::new(4), FilterId(8)), CLIENT, 3, 100),
            [FilterId(1)]
        );
        // A filter that is used again makes room.
        lingering.remove((Millis::new(3), FilterId(7)));
        lingering.insert((Millis::new(5), FilterId(7)), 10);
        assert!(
            lingering
                .charge((Millis::new(5), FilterId(7)), CLIENT, 3, 100)
                .is_empty()
        );
        assert_eq!(lingering.len(), 6);
    }

    #[test]
    fn the_bytes_of_one_clients_lingering_filters_are_bounded_too() {
        let mut lingering = Lingering::default();
        for number in 0..3 {
            lingering.insert((Millis::ZERO, FilterId(number)), 40);
            let gone = lingering.charge((Millis::ZERO, FilterId(number)), CLIENT, 10, 100);
            assert_eq!(gone.is_empty(), number < 2);
        }
        lingering.insert((Millis::new(1), FilterId(5)), 1000);
        assert_eq!(
            lingering.charge((Millis::new(1), FilterId(5)), CLIENT, 10, 100),
            [1, 2, 5].map(FilterId)
        );
        assert!(lingering.accounts.is_empty());
        assert_eq!(lingering.bytes(), 1120);
        for idle in [(0, 0), (0, 1), (0, 2), (1, 5), (1, 5)] {
            lingering.remove((Millis::new(idle.0), FilterId(idle.1)));
        }
        assert_eq!((lingering.len(), lingering.bytes()), (0, 0));
    }

    /// The filters that are released of four that are idle since 10, 20, 30 and 40, with names of ten bytes.
    fn released(mut due: Overdue, busy: u64) -> Vec<u64> {
        let all = [10, 20, 30, 40].into_iter();
        let judged = all
            .map_while(|since| Some((since, due.next(Millis::new(since), 10, || since == busy)?)));
        judged
            .filter(|(_, leaves)| *leaves)
            .map(|(s, _)| s)
            .collect()
    }

    #[test]
    fn the_longest_idle_are_released_and_under_pressure_whatever_their_age() {
        let due = |surplus, urgent, urgent_bytes| Overdue {
            now: Millis::new(40),
            linger: Duration::from_millis(30),
            busy_min: Duration::from_millis(10),
            surplus,
            urgent,
            urgent_bytes,
        };
        assert_eq!(released(due(0, 0, 0), 0), [10]);
        assert_eq!(released(due(0, 0, 0), 30), [10, 30]);
        assert_eq!(released(due(0, 0, 0), 40), [10]);
        assert_eq!(released(due(2, 0, 0), 0), [10, 20]);
        assert_eq!(released(due(9, 0, 0), 0), [10, 20, 30]);
        assert_eq!(released(due(0, 9, 0), 0), [10, 20, 30, 40]);
        assert_eq!(released(due(0, 0, 11), 0), [10, 20]);
        assert_eq!(released(due(0, 0, 31), 0), [10, 20, 30, 40]);
    }

    fn subscribe_and_unsubscribe(router: &Router, client: Connected, filter: &str) {
        subscribe(router, client, filter);
        unsubscribe(router, client, &[filter]);
    }

    fn subscribe(router: &Router, client: Connected, filter: &str) {
        let mut packet = Vec::new();
        let options = SubscribeOptions {
            retain_handling: 2,
            ..SubscribeOptions::default()
        };
        let filters = std::iter::once((filter, options));
        encode_subscribe(Version::V5, 1, None, filters, &mut packet);
        testing::packet_of(router, client, &packet, Millis::new(1));
    }

    fn unsubscribe(router: &Router, client: Connected, filters: &[&str]) {
        let mut packet = Vec::new();
        encode_unsubscribe(Version::V5, 1, filters.iter().copied(), &mut packet);
        testing::packet_of(router, client, &packet, Millis::new(1));
    }

    /// A router with the root `r/#`.
    fn rooted() -> std::sync::Arc<Router> {
        let mut config = testing::config();
        config.roots.push("r/#".into());
        let router = testing::router_of(config);
        router.set_broker_features(&testing::facts(), Millis::ZERO);
        router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
        for wanted in router.next_subscribes(0, 10) {
            router.suback(wanted.filter, crate::mqtt::ReasonCode(2), Millis::ZERO);
        }
        router
    }

    #[test]
    fn a_client_that_subscribes_and_unsubscribes_leaves_a_bounded_number_of_filters() {
        let router = rooted();
        let (flood, other) = (
            testing::client(&router, "flood"),
            testing::client(&router, "other"),
        );
        subscribe_and_unsubscribe(&router, other, "r/mine");
        let most = router.limits().subscriptions_max;
        for n in 0..10 * most {
            subscribe_and_unsubscribe(&router, flood, &format!("r/{n}"));
        }
        router.tick(Millis::new(1));
        let table = router.filters.table.read();
        assert_eq!((table.lingering.len(), table.len()), (most + 1, most + 2));
        assert!(table.knows("r/mine") && table.knows("r/999") && !table.knows("r/0"));
    }

    #[test]
    fn filters_that_were_handed_over_are_on_the_account_too() {
        let router = rooted();
        let flood = testing::client(&router, "flood");
        let most = router.limits().subscriptions_max;
        for n in 0..most + 50 {
            let (primary, other) = (format!("r/{n}/#"), format!("r/{n}/+"));
            subscribe(&router, flood, &primary);
            subscribe(&router, flood, &other);
            unsubscribe(&router, flood, &[&primary]);
            assert!(router.barrier_wanted(0), "it is given back at once");
            unsubscribe(&router, flood, &[&other]);
            while router.barrier_wanted(0) {
                let number = router.barrier_begins(0);
                router.barrier_passed(0, number, Millis::new(1));
            }
        }
        router.tick(Millis::new(1));
        let table = router.filters.table.read();
        assert_eq!((table.lingering.len(), table.len()), (most, most + 1));
    }

    #[test]
    fn lingering_filters_are_released_when_the_bytes_of_their_names_are_too_many() {
        let router = testing::router();
        let rest = "x".repeat(65_000);
        {
            let mut table = router.filters.table.write();
            for n in 0..1100 {
                let (number, _) = table.intern(&format!("{n}{rest}"));
                table.reference(number, 0);
                table.unreference(number, 0, Millis::new(n));
            }
        }
        router.tick(Millis::new(1100));
        let table = router.filters.table.read();
        assert!(table.lingering.bytes() <= 64 * 1024 * 1024);
        assert_eq!(table.lingering.len(), 1032);
        assert!(!table.knows(&format!("0{rest}")) && table.knows(&format!("1099{rest}")));
    }
}
