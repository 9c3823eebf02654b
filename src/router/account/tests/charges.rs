//! The charges of sessions beside the bytes that their detached state takes on the heap.

use super::*;
use crate::router::Arrived;
use crate::topics::FilterId;

/// The bytes that are charged, in percent of the bytes that are taken: what a table reserves ahead is not
/// the same at each size.
const TOLERANCE: std::ops::RangeInclusive<u64> = 90..=125;

/// A kind of session.
struct Kind {
    name: &'static str,
    /// Bytes of the client identifier, at least.
    id: usize,
    /// Bytes of the will's payload.
    will: Option<usize>,
    /// The subscriptions.
    filters: fn(usize) -> Vec<String>,
    /// A message waits for each client.
    queued: bool,
}

const PLAIN: Kind = Kind {
    name: "no subscription",
    id: 0,
    will: None,
    filters: |_| Vec::new(),
    queued: false,
};

const KINDS: [Kind; 8] = [
    PLAIN,
    Kind {
        name: "a long client identifier",
        id: 200,
        ..PLAIN
    },
    Kind {
        name: "a will",
        will: Some(500),
        ..PLAIN
    },
    Kind {
        name: "a shared topic",
        filters: |_| vec!["fleet/all".to_owned()],
        ..PLAIN
    },
    Kind {
        name: "a shared topic with a message",
        filters: |_| vec!["fleet/all".to_owned()],
        queued: true,
        ..PLAIN
    },
    Kind {
        name: "a topic of its own",
        filters: |n| vec![format!("fleet/{n}")],
        ..PLAIN
    },
    Kind {
        name: "twenty shared topics",
        filters: |_| (0..20).map(|m| format!("fleet/{m}")).collect(),
        ..PLAIN
    },
    Kind {
        name: "twenty topics of its own",
        filters: |n| (0..20).map(|m| format!("fleet/{n}/{m}")).collect(),
        ..PLAIN
    },
];

/// A client connects, subscribes and goes away.
fn visit(router: &Router, kind: &Kind, n: usize) {
    let id = format!("{:x<1$}", format!("client-{n}"), kind.id);
    let will = kind.will.map(will);
    // It has an expiry, so that it has a timer.
    let connect = Connect {
        expiry: 7 * 24 * 60 * 60,
        ..testing::request_from(&id, None, &address(n), will)
    };
    let client = router.connect(connect, Millis::ZERO, |_, _| {});
    let client = client.expect("there is room");
    for filter in (kind.filters)(n) {
        testing::subscribe(router, client, &filter);
        grant_all(router);
        suback(router, client);
    }
    lose(router, client, false);
}

/// The broker sends a message on the filter that it was asked for first.
fn bring(router: &Router) {
    let message = testing::numbered(7, QoS::AtLeastOnce);
    let filter = FilterId::from_subscription_identifier(1);
    let mut batch = [Arrived {
        message,
        filters: filter.into_iter().collect(),
        link: 0,
        origin_mark: None,
        link_origin: None,
        skipped: false,
    }];
    router.fan_out(&mut batch, Millis::ZERO);
}

/// The bytes that are charged for sessions and their queues.
fn charged(router: &Router) -> u64 {
    router.session_bytes() + router.queue_used()
}

/// The bytes that `count` sessions of a kind take, and the bytes that are charged for them.
fn taken_and_charged(kind: &Kind, count: usize) -> (u64, u64) {
    // The detached sessions are kept in order.
    let router = router_with(1 << 30, Some(Duration::from_secs(60)));
    // Tables of fixed size are there already.
    visit(&router, kind, 0);
    let before = charged(&router);
    let heap = allocation_counter::measure(|| {
        for n in 1..=count {
            visit(&router, kind, n);
        }
        if kind.queued {
            bring(&router);
        }
    });
    (heap.bytes_current.max(0) as u64, charged(&router) - before)
}

#[test]
fn the_charge_of_a_detached_session_is_true() {
    let mut wrong = Vec::new();
    for kind in &KINDS {
        for count in [1000, 3000, 5000] {
            let (taken, charged) = taken_and_charged(kind, count);
            let percent = charged * 100 / taken;
            let (taken, charged) = (taken / count as u64, charged / count as u64);
            let line = format!(
                "{} x {}: {charged} bytes are charged and {taken} taken, {percent} %",
                count, kind.name
            );
            eprintln!("{line}");
            if !TOLERANCE.contains(&percent) {
                wrong.push(line);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
