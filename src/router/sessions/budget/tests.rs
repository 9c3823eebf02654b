use std::sync::Arc;

use super::*;
use crate::mqtt::{
    AckKind, Decoder, Message, MessageSpec, Packet, Properties, QoS, ReasonCode, Receiver, Version,
    encode_ack,
};
use crate::router::handle::ConnectionHandle;
use crate::router::testing;
use crate::router::types::Arrived;
use crate::router::{Connect, Connected, LinkSession, Router, RouterConfig};
use crate::session::ConnectionSpec;
use crate::sim::testing::packet_of;
use crate::topics::FilterId;

const MIB: usize = 1024 * 1024;

fn router(config: RouterConfig) -> Arc<Router> {
    let router = testing::router_of(config);
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// A client of a principal connects; its session is kept for ever.
fn connect(router: &Router, id: &str, principal: &str, now: u64) -> Connected {
    let connect = Connect {
        key: id.into(),
        principal: principal.into(),
        anonymous: false,
        clean_start: false,
        expiry: u32::MAX,
        spec: ConnectionSpec {
            version: Version::V5,
            bridge: false,
            receive_maximum: u16::MAX,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            keep_alive: None,
            scope: None,
        },
        will: None,
        handle: Arc::new(ConnectionHandle::default()),
        peer: testing::peer(),
    };
    let connected = router.connect(connect, Millis::new(now), |_, _| {});
    connected.expect("nobody else has the identifier")
}

/// The client subscribes to a filter, and the broker grants it.
fn subscribe(router: &Router, client: Connected, filter: &str) -> FilterId {
    testing::subscribe(router, client, filter);
    for wanted in router.next_subscribes(0, 10) {
        router.suback(wanted.filter, ReasonCode(1), Millis::ZERO);
    }
    take(router, client, &mut Vec::new());
    router.filters.table().write().intern(filter).0
}

fn disconnect(router: &Router, client: Connected, now: u64) {
    let now = Millis::new(now);
    router.disconnected(client.session, client.connection_no, false, now);
}

/// The data link brings `count` messages of `size` bytes at QoS 1.
fn bring(router: &Router, filter: FilterId, size: usize, count: usize) {
    bring_at(router, filter, size, count, 1);
}

fn bring_at(router: &Router, filter: FilterId, size: usize, count: usize, now: u64) {
    for _ in 0..count {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: &vec![b'x'; size],
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: Some(router.queue_account().clone()),
        });
        let mut batch = [Arrived {
            message,
            filters: [filter].into_iter().collect(),
            link: 0,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }];
        router.fan_out(&mut batch, Millis::new(now));
    }
}

/// The client reads and acknowledges everything.
fn read_all(router: &Router, client: Connected) -> Vec<usize> {
    read_on(router, client, Vec::new())
}

/// The client reads and acknowledges everything that follows `input`, which it was sent before. Returns
/// the sizes of all payloads.
fn read_on(router: &Router, client: Connected, mut input: Vec<u8>) -> Vec<usize> {
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    let mut sizes = Vec::new();
    loop {
        let mut taken = Vec::new();
        take(router, client, &mut taken);
        let done = taken.is_empty();
        input.append(&mut taken);
        let (mut used, mut acks) = (0, Vec::new());
        while let Some((packet, size)) = decoder.next(&input[used..]).expect("legal") {
            if let Packet::Publish(p) = packet {
                sizes.push(p.payload.len());
                let (kind, code) = (AckKind::Puback, ReasonCode::SUCCESS);
                encode_ack(Version::V5, kind, p.packet_id, code, None, &mut acks);
            }
            used += size;
        }
        input.drain(..used);
        if done && acks.is_empty() {
            assert!(input.is_empty(), "a packet is not complete");
            return sizes;
        }
        // Acknowledgements of four bytes; a turn takes a few of them.
        for acks in acks.chunks(4 * 16) {
            packet_of(router, client, acks, Millis::new(1));
        }
    }
}

/// The connection's task takes output.
fn take(router: &Router, client: Connected, output: &mut Vec<u8>) {
    let (session, connection_no) = (client.session, client.connection_no);
    router.take_output(session, connection_no, output, Millis::new(1));
}

fn gaps(router: &Router, id: &str) -> u64 {
    router.session(&id.into()).expect("there").gaps
}

/// Messages that wait for a client or that it has not acknowledged.
fn has(router: &Router, id: &str) -> usize {
    let session = router.session(&id.into()).expect("there");
    session.queue_messages + session.in_flight
}

#[test]
fn a_session_that_ends_while_its_client_is_away_leaves_the_order_of_eviction() {
    let router = router(testing::config());
    let client = connect(&router, "gone", "gone", 1);
    disconnect(&router, client, 2);
    assert!(router.end_session(&"gone".into(), Millis::new(3)));
    for number in router.sessions.shards() {
        assert!(router.sessions.shard(number).accounts.listed().is_empty());
    }
}

#[test]
fn a_connected_client_gets_more_than_may_wait_for_a_client_that_is_away() {
    for (size, count) in [
        (10_000, 200),
        (MIB, 5),
        (MIB + 1, 8),
        (100_000, 200),
        (10, 3000),
    ] {
        let router = router(testing::config());
        let client = connect(&router, "c", "p", 1);
        let filter = subscribe(&router, client, "t");
        bring(&router, filter, size, count);
        assert_eq!(read_all(&router, client), vec![size; count]);
        assert_eq!(gaps(&router, "c"), 0);
    }
}

#[test]
fn messages_that_waited_for_a_connected_client_survive_a_short_absence() {
    let router = router(testing::config());
    let client = connect(&router, "c", "p", 1);
    let filter = subscribe(&router, client, "t");
    bring(&router, filter, 10, 3000);
    disconnect(&router, client, 2);
    bring(&router, filter, 11, 1000);
    assert_eq!((has(&router, "c"), gaps(&router, "c")), (4000, 0));
    // One past the limit: the oldest message that waits is dropped.
    bring(&router, filter, 12, 1);
    assert_eq!((has(&router, "c"), gaps(&router, "c")), (4000, 1));
    let client = connect(&router, "c", "p", 3);
    let sizes = read_all(&router, client);
    let of = |size| sizes.iter().filter(|s| **s == size).count();
    assert_eq!((of(10), of(11), of(12)), (2999, 1000, 1));
}

#[test]
fn the_budget_of_all_queues_bounds_a_connected_client() {
    let config = RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let client = connect(&router, "c", "p", 1);
    let filter = subscribe(&router, client, "t");
    bring(&router, filter, 10_000, 2000);
    assert!(router.queue_used() <= 8 * MIB as u64);
    let lost = gaps(&router, "c") as usize;
    assert!(lost > 1000, "{lost}");
    assert_eq!(has(&router, "c") + lost, 2000);
}

/// Many sessions of one principal, whose topic is flooded, and one of another principal. Returns
/// whether the other one's messages are all there in the end.
fn flooded(connected: bool) -> bool {
    let config = RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let quiet = connect(&router, "quiet", "quiet", 1);
    let filter = subscribe(&router, quiet, "t/quiet");
    disconnect(&router, quiet, 2);
    bring(&router, filter, 1000, 100);
    let mut filters = Vec::new();
    for n in 0..20 {
        let id = format!("flood-{n}");
        let client = connect(&router, &id, "flood", 3);
        filters.push(subscribe(&router, client, &format!("t/{id}")));
        if !connected {
            disconnect(&router, client, 4);
        }
    }
    for _ in 0..200 {
        for filter in &filters {
            bring(&router, *filter, 10_000, 1);
        }
        assert!(router.queue_used() <= 8 * MIB as u64);
    }
    gaps(&router, "quiet") == 0 && has(&router, "quiet") == 100
}

#[test]
fn a_principal_that_floods_its_sessions_evicts_its_own_messages() {
    assert!(flooded(false));
}

#[test]
fn a_principal_that_floods_its_connected_clients_evicts_its_own_messages() {
    assert!(flooded(true));
}

#[test]
fn one_client_that_acknowledges_nothing_costs_others_of_its_principal_nothing() {
    let config = RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let mut filters = Vec::new();
    for n in 0..10 {
        let id = format!("away-{n}");
        let client = connect(&router, &id, "p", 1);
        filters.push(subscribe(&router, client, &format!("t/{id}")));
        disconnect(&router, client, 2);
    }
    for filter in &filters {
        bring(&router, *filter, 1000, 100);
    }
    let hog = connect(&router, "hog", "p", 3);
    let filter = subscribe(&router, hog, "t/hog");
    for now in 0..20 {
        bring_at(&router, filter, 10_000, 100, 1000 * (now + 1));
    }
    assert!(gaps(&router, "hog") > 0);
    for n in 0..10 {
        let id = format!("away-{n}");
        assert_eq!((gaps(&router, &id), has(&router, &id)), (0, 100));
    }
}

/// The tasks of the closed connections have not run yet: their output still refers to the messages.
#[test]
fn connections_that_are_closed_for_their_output_cost_others_nothing() {
    let config = RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let quiet = connect(&router, "quiet", "quiet", 1);
    let filter = subscribe(&router, quiet, "t/quiet");
    disconnect(&router, quiet, 2);
    bring(&router, filter, 1000, 100);
    let others = ["other-1", "other-2"].map(|id| connect(&router, id, id, 3));
    let filters = others.map(|client| subscribe(&router, client, "t/others"));
    bring(&router, filters[0], 1000, 100);
    for n in 0..12 {
        let client = connect(&router, &format!("flood-{n}"), "flood", 3);
        let filter = subscribe(&router, client, &format!("t/{n}"));
        bring(&router, filter, MIB, 1);
    }
    assert_eq!((gaps(&router, "quiet"), has(&router, "quiet")), (0, 100));
    for id in ["other-1", "other-2"] {
        assert_eq!(gaps(&router, id), 0);
    }
}

#[test]
fn among_equals_the_least_recently_connected_session_loses_its_messages() {
    let config = RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let mut filters = Vec::new();
    for n in 0..40 {
        let id = format!("c{n}");
        let client = connect(&router, &id, &id, n);
        filters.push(subscribe(&router, client, &format!("t/{id}")));
        disconnect(&router, client, n);
    }
    for _ in 0..30 {
        for filter in &filters {
            bring(&router, *filter, 10_000, 1);
        }
    }
    let lost: Vec<u64> = (0..40).map(|n| gaps(&router, &format!("c{n}"))).collect();
    assert!(lost[..10].iter().all(|lost| *lost > 0), "{lost:?}");
    assert!(lost[30..].iter().all(|lost| *lost == 0), "{lost:?}");
}

/// Messages of `size` bytes for 300 clients that do not read: their output stays under its budget, and
/// they get everything when they read again.
fn unread(size: usize, rounds: usize) {
    let config = RouterConfig {
        output: 8 * MIB as u64,
        ..testing::config()
    };
    let router = router(config);
    let connect = |n| {
        let client = connect(&router, &format!("c{n}"), "p", 1);
        subscribe(&router, client, "t");
        client
    };
    let clients: Vec<Connected> = (0..300).map(connect).collect();
    let filter = router.filters.table().write().intern("t").0;
    // Each client may have a little beyond the budget.
    let bound = (8 * MIB + clients.len() * 4096) as u64;
    let mut sent = vec![Vec::new(); clients.len()];
    for round in 0..rounds {
        bring(&router, filter, size, 1);
        assert!(router.output_used() <= bound, "{}", router.output_used());
        // Some output is on its way to sockets that take nothing.
        for (client, sent) in clients.iter().zip(&mut sent).take(100) {
            if sent.is_empty() {
                take(&router, *client, sent);
            }
        }
        assert!(router.output_used() <= bound, "{}", router.output_used());
        if round % 50 == 0 {
            router.tick(Millis::new(100 * round as u64));
        }
    }
    for (n, (client, sent)) in clients.iter().zip(sent).enumerate() {
        assert_eq!(read_on(&router, *client, sent), vec![size; rounds]);
        assert_eq!(gaps(&router, &format!("c{n}")), 0);
    }
    assert_eq!(router.output_used(), 0);
}

#[test]
fn large_messages_for_clients_that_do_not_read_stay_under_the_budget_of_output() {
    unread(MIB, 3);
}

#[test]
fn small_messages_for_clients_that_do_not_read_stay_under_the_budget_of_output() {
    unread(1000, 200);
}

/// Bytes of queues that nothing gives back.
fn occupy(router: &Router, size: usize) -> Message {
    Message::new(&MessageSpec {
        topic: "t",
        properties: Properties::default(),
        payload: &vec![b'x'; size],
        qos: QoS::AtLeastOnce,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: Some(router.queue_account().clone()),
    })
}

#[test]
fn the_queues_grow_little_where_all_sessions_were_visited_in_vain() {
    let budget = 8 * MIB;
    let router = router(RouterConfig {
        queues: budget as u64,
        ..testing::config()
    });
    let client = connect(&router, "c", "p", 1);
    let filter = subscribe(&router, client, "t");
    let limit = budget - BATCH_BYTES as usize;
    let others = occupy(&router, limit - 20_000);
    for _ in 0..20 {
        bring(&router, filter, 50_000, 1);
        assert!(router.queue_used() <= budget as u64);
    }
    drop(others);
}

#[test]
fn a_caller_waits_for_the_one_that_evicts_where_the_excess_is_large() {
    let budget = 8 * MIB as u64;
    let router = router(RouterConfig {
        queues: budget,
        ..testing::config()
    });
    let client = connect(&router, "c", "p", 1);
    let filter = subscribe(&router, client, "t");
    disconnect(&router, client, 2);
    for (excess, waits) in [(1, false), (budget / GROWTH_DIVISOR + 1, true)] {
        let evicting = router.sessions.evicting.lock();
        let queued = budget - BATCH_BYTES + excess - router.queue_used();
        let others = occupy(&router, queued as usize);
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                router.sessions.enforce_budget(Millis::new(3));
                done.send(()).expect("the test waits for it");
            });
            match waits {
                true => assert!(is_done.recv_timeout(Duration::from_millis(200)).is_err()),
                false => is_done.recv().expect("it goes on"),
            }
            drop(evicting);
        });
        drop(others);
        bring(&router, filter, 1000, 1);
    }
}

/// The backlogs with messages, while a part of the budget is in them.
#[test]
fn backlogs_are_not_searched_again_at_once_for_few_messages() {
    let router = router(RouterConfig {
        queues: 8 * MIB as u64,
        ..testing::config()
    });
    let mut filter = None;
    // Several of them are in one shard.
    for n in 0..100 {
        let client = connect(&router, &format!("c{n}"), "p", 1);
        filter = Some(subscribe(&router, client, "t"));
        disconnect(&router, client, 2);
    }
    let filter = filter.expect("there is a client");
    let sessions = &router.sessions;
    let mut candidates = Candidates::default();
    let mut trimmed = |size, now| {
        bring_at(&router, filter, size, 1, now);
        candidates.search(sessions, Millis::new(now));
        let mut trimmed = 0;
        while let Some(first) = candidates.first(sessions) {
            sessions.shard(first.shard).trim_backlog(first.filter);
            trimmed += 1;
        }
        trimmed
    };
    assert!(trimmed(10, 5000) > 0);
    assert_eq!(trimmed(10, 5001), 0);
    assert!(trimmed(8 * MIB / GROWTH_DIVISOR as usize, 5002) > 0);
    assert!(trimmed(10, 5002 + 100) > 0);
}

#[test]
fn messages_that_wait_for_retained_ones_are_dropped_like_those_of_the_queue() {
    let config = RouterConfig {
        queues: 100_000,
        ..testing::config()
    };
    let router = router(config);
    let client = connect(&router, "a", "p", 1);
    testing::subscribe_handling(&router, client, "t", 0);
    let filter = router.next_subscribes(0, 10)[0].filter;
    router.suback(filter, ReasonCode(1), Millis::ZERO);
    take(&router, client, &mut Vec::new());
    for _ in 0..10 {
        bring(&router, filter, 30_000, 1);
        assert!(router.queue_used() <= 100_000, "{}", router.queue_used());
    }
    assert!(gaps(&router, "a") > 0);
}
