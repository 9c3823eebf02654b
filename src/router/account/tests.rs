use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::client::machine::Machine;
use crate::mqtt::{
    Message, MessageSpec, Properties, QoS, ReasonCode, SubscribeOptions, Version, encode_subscribe,
};
use crate::router::{Connect, Connected, LinkSession, Refused, Router, RouterConfig, testing};
use crate::session::Will;
use crate::sim::testing::context;
use crate::streams::StreamId;
use crate::time::Millis;

mod charges;

const MAX: u64 = 1600;

fn account() -> SessionAccount {
    SessionAccount::new(MAX, 100, HashSeed::fixed())
}

fn at(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

/// Charges single bytes until one is refused. Returns their number and the refusal.
fn fill(account: &SessionAccount, holder: Holder) -> (u64, Full) {
    for n in 0.. {
        if let Err(full) = account.bytes.has_room(holder, 1) {
            return (n, full);
        }
        account.bytes.charge(holder, 1);
    }
    unreachable!("the account is bounded")
}

#[test]
fn one_principal_leaves_room_for_the_others_wherever_it_is() {
    let account = account();
    let of = |name, address| account.holder(Some(name), at(address));
    let greedy = of("mallory", "192.0.2.1");
    assert_eq!(fill(&account, greedy), (MAX / 2 + MAX / 8, Full::Principal));
    let elsewhere = of("mallory", "198.51.100.1");
    assert_eq!(fill(&account, elsewhere), (0, Full::Principal));
    assert_eq!(
        fill(&account, of("alice", "198.51.100.2")),
        (MAX / 8, Full::Principal)
    );
    account.bytes.release(greedy, MAX / 2 + MAX / 8);
    account.bytes.release(of("alice", "198.51.100.2"), MAX / 8);
    assert_eq!(account.bytes.used(), 0);
    assert_eq!(fill(&account, elsewhere).0, MAX / 2 + MAX / 8);
}

#[test]
fn one_network_leaves_room_for_the_others_whoever_is_there() {
    let account = account();
    let of = |address| account.holder(None, at(address));
    let greedy = of("2001:db8:0:1::1");
    assert_eq!(fill(&account, greedy), (MAX / 2 + MAX / 8, Full::Network));
    assert_eq!(
        fill(&account, of("2001:db8:0:1:ffff::2")),
        (0, Full::Network)
    );
    for last in 1..=3 {
        let other = account.holder(None, at(&format!("192.0.2.{last}")));
        assert_eq!(fill(&account, other).0, MAX / 8);
    }
    assert_eq!(fill(&account, of("192.0.2.4")), (0, Full::All));
}

#[test]
fn anonymous_clients_have_no_share_as_a_principal() {
    let account = account();
    let holder = account.holder(None, at("192.0.2.1"));
    account.bytes.charge(holder, MAX / 2 + MAX / 8);
    let other = account.holder(None, at("192.0.2.2"));
    assert_eq!(account.bytes.has_room(other, MAX / 8), Ok(()));
    assert!(account.bytes.has_room(other, MAX / 8 + 1).is_err());
    assert_eq!(
        account.bytes.has_room(holder, 0),
        Ok(()),
        "it has its share"
    );
    account.bytes.charge(other, 1);
    let room = account.bytes.has_room(holder, 0);
    assert_eq!(room, Err(Full::Network), "the first half became less");
}

#[test]
fn a_share_that_is_used_up_is_told_before_the_account() {
    let account = account();
    let mallory = account.holder(Some("mallory"), at("192.0.2.1"));
    account.bytes.charge(mallory, MAX / 2 + MAX / 8);
    for n in 0..3 {
        let other = account.holder(Some(&format!("alice-{n}")), at(&format!("192.0.3.{n}")));
        account.bytes.charge(other, MAX / 8);
    }
    let elsewhere = account.holder(Some("mallory"), at("192.0.2.7"));
    assert_eq!(account.bytes.has_room(elsewhere, 1), Err(Full::Principal));
    let neighbour = account.holder(Some("bob"), at("192.0.2.1"));
    assert_eq!(account.bytes.has_room(neighbour, 1), Err(Full::Network));
    let other = account.holder(Some("bob"), at("192.0.2.7"));
    assert_eq!(account.bytes.has_room(other, 1), Err(Full::All));
}

#[test]
fn filters_that_nobody_uses_have_seven_eighths_of_a_share() {
    const LINGERING: u64 = MAX / 8 * 7;
    let account = account();
    let holder = account.holder(None, at("192.0.2.1"));
    account.bytes.charge(holder, LINGERING / 2 + LINGERING / 8);
    assert!(!account.bytes.is_over(holder));
    account.bytes.charge(holder, 1);
    assert!(account.bytes.is_over(holder));
}

#[test]
fn a_session_that_is_kept_finds_nine_tenths_of_the_account_and_of_each_share() {
    const KEPT: u64 = MAX / 10 * 9;
    let account = account();
    let of = |address| account.holder(None, at(address));
    let greedy = of("192.0.2.1");
    account.bytes.charge(greedy, KEPT / 2 + KEPT / 8);
    let room = |holder, more| account.bytes.has_room_to_keep(holder, more);
    assert_eq!(room(greedy, 1), Err(Full::Network));
    assert_eq!(account.bytes.has_room(greedy, 1), Ok(()));
    let other = of("192.0.2.2");
    assert_eq!(room(other, KEPT / 8), Ok(()));
    assert_eq!(room(other, KEPT / 8 + 1), Err(Full::Network));
    account.bytes.charge(other, KEPT / 8);
    account.bytes.charge(of("192.0.2.3"), KEPT / 8);
    let last = of("192.0.2.4");
    assert_eq!(room(last, KEPT / 8), Ok(()));
    assert_eq!(room(last, KEPT / 8 + 1), Err(Full::Network));
    account.bytes.charge(last, KEPT / 8);
    assert_eq!(room(of("192.0.2.5"), 1), Err(Full::All));
    assert_eq!(account.bytes.has_room(of("192.0.2.5"), MAX / 10), Ok(()));
}

#[test]
fn without_pressure_nobody_is_refused() {
    let account = account();
    let holder = account.holder(Some("alice"), at("192.0.2.1"));
    assert_eq!(account.bytes.has_room(holder, MAX / 2), Ok(()));
    account.bytes.charge(holder, MAX / 4);
    let other = account.holder(Some("bob"), at("192.0.2.2"));
    assert_eq!(account.bytes.has_room(other, MAX / 4), Ok(()));
    assert_eq!(account.filters.used(), 0);
}

/// A router whose account of sessions has so many bytes.
fn router(sessions: u64) -> Arc<Router> {
    router_with(sessions, None)
}

fn router_with(sessions: u64, evict_after: Option<Duration>) -> Arc<Router> {
    let config = RouterConfig {
        sessions,
        evict_after,
        linger: Duration::from_secs(600),
        linger_busy_min: Duration::from_secs(60),
        filters_lingering_max: 1_000_000,
        ..testing::config()
    };
    let router = testing::router_of(config);
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// Subscribes one client after the other to filters of its own, until one is refused. Returns the number
/// of filters that were not refused.
fn fill_table(router: &Router, client: impl Fn(usize) -> Result<Connected, Refused>) -> usize {
    let most = router.limits().subscriptions_max;
    for n in 0.. {
        let Ok(connected) = client(n) else {
            return n * most;
        };
        for m in 0..most {
            if subscribe(router, connected, &format!("{n}/{m}")) == Some(0x97) {
                return n * most + m;
            }
        }
    }
    unreachable!("the account is bounded")
}

/// Subscribes a client to a filter. Returns the code of the SUBACK, if the client is answered at once.
fn subscribe(router: &Router, client: Connected, filter: &str) -> Option<u8> {
    let options = SubscribeOptions {
        qos: QoS::AtLeastOnce,
        retain_handling: 2,
        ..SubscribeOptions::default()
    };
    // Packet identifiers of SUBSCRIBEs that wait for the broker must differ.
    let waiting = router.with(client.session, client.connection_no, |session, _| {
        session.subscriptions().len()
    });
    let packet_id = waiting.map_or(1, |n| n as u16 + 1);
    let mut bytes = Vec::new();
    let filters = std::iter::once((filter, options));
    encode_subscribe(Version::V5, packet_id, None, filters, &mut bytes);
    let mut machine = Machine::new(&client, Arc::default(), Version::V5, u32::MAX);
    let now = Millis::ZERO;
    let received = machine.received(&context(router, now), StreamId::CONTROL, &bytes);
    assert!(received.is_ok_and(|reset| reset.is_none()));
    suback(router, client)
}

fn suback(router: &Router, client: Connected) -> Option<u8> {
    let mut bytes = Vec::new();
    router.take_output(
        client.session,
        client.connection_no,
        &mut bytes,
        Millis::ZERO,
    );
    (bytes.first() == Some(&0x90)).then(|| bytes[bytes.len() - 1])
}

fn grant_all(router: &Router) {
    loop {
        let wanted = router.next_subscribes(0, 100);
        if wanted.is_empty() {
            return;
        }
        for wanted in wanted {
            router.suback(wanted.filter, ReasonCode(1), Millis::ZERO);
        }
    }
}

fn will(payload: usize) -> Will {
    let message = Message::new(&MessageSpec {
        topic: "gone",
        properties: Properties::default(),
        payload: &vec![b'x'; payload],
        qos: QoS::AtLeastOnce,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    });
    Will::new(message, 3600, None)
}

#[test]
fn a_network_cannot_fill_the_table_for_the_others() {
    let router = router(1 << 20);
    let from = |n: usize, address| {
        testing::connect_from(&router, &format!("{address}-{n}"), None, address, None)
    };
    let filled = fill_table(&router, |n| from(n, "192.0.2.1"));
    assert!(filled > 500, "{filled}");
    let other = from(0, "198.51.100.1").expect("another network has its share");
    assert_eq!(subscribe(&router, other, "mine"), None);
    grant_all(&router);
    assert_eq!(suback(&router, other), Some(1));
    // A filter that is known needs no room in the table.
    assert_eq!(subscribe(&router, other, "0/0"), Some(1));
}

#[test]
fn a_principal_cannot_fill_the_table_from_many_networks() {
    let router = router(1 << 20);
    let from = |n: usize, name| {
        let address = format!("198.51.{}.{}", n / 250, n % 250);
        testing::connect_from(&router, &format!("{name}-{n}"), Some(name), &address, None)
    };
    fill_table(&router, |n| from(n, "mallory"));
    let other = from(7, "alice").expect("another principal has its share");
    assert_eq!(subscribe(&router, other, "mine"), None);
}

#[test]
fn sessions_with_large_wills_are_refused_when_the_account_is_full_and_give_it_back() {
    let router = router(1 << 20);
    let before = router.session_bytes();
    let connect = |n: usize| {
        testing::connect_from(
            &router,
            &format!("c{n}"),
            None,
            "192.0.2.1",
            Some(will(15_000)),
        )
    };
    let mut clients = Vec::new();
    let refused = loop {
        match connect(clients.len()) {
            Ok(client) => clients.push(client),
            Err(refused) => break refused,
        }
        assert!(clients.len() < 100, "the wills are in no account");
    };
    assert_eq!(refused, Refused::NotKept(Full::Network));
    for client in &clients {
        router.disconnected(client.session, client.connection_no, false, Millis::ZERO);
    }
    assert!(
        connect(clients.len()).is_err(),
        "they are detached, and their wills are kept"
    );
    // A client that comes back with the same will needs no more than it has.
    let back = connect(0).expect("its session is there");
    assert!(back.present);
    let larger = testing::connect_from(&router, "c1", None, "192.0.2.1", Some(will(300_000)));
    assert_eq!(larger, Err(Refused::Full(Full::Network)));
    assert!(router.session(&"c1".into()).is_some(), "nothing changed");
    // Wills that are discarded give their bytes back, and sessions that end the rest.
    for n in 0..clients.len() {
        let client = connect(n).expect("its session is there");
        router.disconnected(client.session, client.connection_no, true, Millis::ZERO);
    }
    assert!(router.session_bytes() < before + clients.len() as u64 * 2048);
    for n in 0..clients.len() {
        router.end_session(&format!("c{n}").as_str().into(), Millis::ZERO);
    }
    assert_eq!(router.session_bytes(), before);
}

#[test]
fn subscriptions_to_known_filters_are_charged_to_their_sessions() {
    let router = router(1 << 20);
    // Sessions that are not kept may use all of their share.
    let client = |n: usize| {
        let connect = testing::request_from(&format!("c{n}"), None, "192.0.2.1", None);
        let connect = Connect {
            expiry: if n == 0 { 1 } else { 0 },
            ..connect
        };
        router.connect(connect, Millis::ZERO, |_, _| {})
    };
    for n in 0..router.limits().subscriptions_max {
        let first = client(0).expect("there is room");
        assert_eq!(subscribe(&router, first, &format!("f/{n}")), None);
    }
    grant_all(&router);
    let mut refused = None;
    'full: for n in 1..1000 {
        let Ok(client) = client(n) else { break };
        for m in 0..router.limits().subscriptions_max {
            if subscribe(&router, client, &format!("f/{m}")) == Some(0x97) {
                refused = Some((client, m));
                break 'full;
            }
        }
    }
    let (last, m) = refused.expect("the account is bounded");
    // A subscription that is replaced needs no room.
    assert_eq!(subscribe(&router, last, &format!("f/{}", m - 1)), Some(1));
}

#[test]
fn filters_that_linger_beyond_a_share_make_room_early() {
    let router = router(1 << 20);
    let many = |n: usize| {
        let id = format!("c{n}");
        testing::connect_from(&router, &id, None, "192.0.2.1", None)
    };
    let filled = fill_table(&router, many);
    grant_all(&router);
    // Later than `linger` after the start of the clock.
    let idle_since = Millis::ZERO + Duration::from_secs(1000);
    for n in 0..=filled / router.limits().subscriptions_max {
        router.end_session(&format!("c{n}").as_str().into(), idle_since);
    }
    assert_eq!(router.filters_known(), filled);
    // Others use the first half of the account now.
    for n in 0..200 {
        let address = format!("198.51.100.{n}");
        let other = testing::connect_from(&router, &address, None, &address, None);
        let other = other.expect("it has its share");
        subscribe(&router, other, &address);
    }
    for _ in 0..10 {
        router.tick(idle_since + Duration::from_secs(61));
    }
    let wanted = router.next_unsubscribes(0, 1_000_000);
    assert_eq!(wanted.len(), filled);
}

/// An address of its own for each client, so that no network uses up its share.
fn address(n: usize) -> String {
    format!("198.{}.{}.{}", 18 + n / 65_536, n / 256 % 256, n % 256)
}

/// Connects new clients until one is refused. Returns the others, and the refusal. `expiry` is their
/// Session Expiry Interval in seconds.
fn fill_sessions(router: &Router, prefix: &str, expiry: u32) -> (Vec<Connected>, Refused) {
    let mut clients = Vec::new();
    loop {
        let (n, id) = (clients.len(), format!("{prefix}{}", clients.len()));
        let connect = Connect {
            expiry,
            ..testing::request_from(&id, None, &address(n), None)
        };
        match router.connect(connect, Millis::ZERO, |_, _| {}) {
            Ok(client) => clients.push(client),
            Err(refused) => return (clients, refused),
        }
        assert!(clients.len() < 100_000, "sessions are in no account");
    }
}

fn lose(router: &Router, client: Connected, normal: bool) {
    router.disconnected(client.session, client.connection_no, normal, Millis::ZERO);
}

#[test]
fn the_last_tenth_is_for_clients_that_come_back_and_sessions_that_are_not_kept() {
    let router = router(1 << 20);
    let (kept, refused) = fill_sessions(&router, "kept", 1);
    assert_eq!(refused, Refused::NotKept(Full::All));
    let (most, used) = ((1 << 20) / 10 * 9, router.session_bytes());
    assert!(used <= most && used > most - 2000, "{used} of {most}");
    for client in &kept {
        lose(&router, *client, false);
    }
    assert_eq!(
        router.session_bytes(),
        used,
        "they are detached, and charged"
    );
    // Clients that come back, with Clean Start too, need no more than they had.
    for clean_start in [false, true] {
        let connect = Connect {
            clean_start,
            ..testing::request_from("kept1", None, "192.0.2.1", None)
        };
        let back = router.connect(connect, Millis::ZERO, |_, _| {});
        assert_eq!(back.map(|c| c.present), Ok(!clean_start));
    }
    let (ending, refused) = fill_sessions(&router, "ending", 0);
    assert_eq!(refused, Refused::Full(Full::All));
    assert!(ending.len() > kept.len() / 20, "{}", ending.len());
    // A session that ends with its connection does not turn into one that is kept.
    let connect = testing::request_from("ending0", None, &address(0), None);
    let turned = router.connect(connect, Millis::ZERO, |_, _| {});
    assert_eq!(turned, Err(Refused::NotKept(Full::All)));
    assert!(
        router
            .session(&"ending0".into())
            .is_some_and(|s| s.attached)
    );
    assert!(router.session(&"kept0".into()).is_some());
    let connect = testing::request_from("kept0", None, &address(0), None);
    let back = router.connect(connect, Millis::ZERO, |_, _| {});
    assert_eq!(back.map(|c| c.present), Ok(true));
    // Every session gives back its bytes, whichever way it ends.
    for client in ending {
        lose(&router, client, true);
    }
    assert!(router.session_bytes() <= most);
    for n in 0..kept.len() / 2 {
        router.end_session(&format!("kept{n}").as_str().into(), Millis::ZERO);
    }
    router.tick(Millis::new(1001));
    assert_eq!((router.totals().detached, router.session_bytes()), (0, 0));
}

#[test]
fn a_client_whose_will_was_published_finds_room_for_it_when_it_comes_back() {
    let router = router(1 << 20);
    let soon = || Some(Will::new(will(20_000).message, 0, None));
    let connect = || testing::connect_from(&router, "c", None, "192.0.2.1", soon());
    let client = connect().expect("there is room");
    let charged = router.session_bytes();
    assert!(charged > 20_000);
    lose(&router, client, false);
    assert_eq!(router.session_bytes(), charged, "the will is published");
    fill_sessions(&router, "ending", 0);
    let back = connect().expect("it needs no more than it had");
    assert!(back.present);
    // A client that says goodbye gives up the room.
    let used = router.session_bytes();
    lose(&router, back, true);
    assert!(router.session_bytes() < used - 20_000);
    fill_sessions(&router, "others", 0);
    assert_eq!(connect(), Err(Refused::Full(Full::All)));
}
