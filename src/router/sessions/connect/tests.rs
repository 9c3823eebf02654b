//! The will of a connection that another one takes over from.

use std::time::Duration;

use super::*;
use crate::client::machine::Machine;
use crate::mqtt::{QoS, ReasonCode, Version, encode_disconnect};
use crate::router::Router;
use crate::sim::testing::{config, context, kept_client_of, numbered, router, router_limited};
use crate::streams::StreamId;

fn will(delay: u32) -> Option<Will> {
    Some(Will::new(numbered(7, QoS::AtLeastOnce), delay, None))
}

/// Publishes that wait for the broker.
fn published(router: &Router) -> usize {
    let mut pops = std::iter::from_fn(|| router.publish_queues(0, |queues| queues.pop()));
    pops.by_ref().count()
}

/// A client with a will connects again while it is connected. Returns its connections.
fn taken_over(router: &Router, version: Version, delay: u32) -> [Connected; 2] {
    let connect = |will| kept_client_of(router, "client", version, will, Millis::ZERO);
    let old = connect(will(delay));
    assert_eq!(published(router), 0);
    let new = connect(None);
    assert!(new.taken_over && new.present);
    [old, new]
}

#[test]
fn a_takeover_publishes_a_will_without_delay_once() {
    for version in [Version::V5, Version::V311, Version::V31] {
        let router = router();
        let [old, new] = taken_over(&router, version, 0);
        assert_eq!(published(&router), 1, "{version:?}");
        for connection in [old, new] {
            let (session, connection_no) = (connection.session, connection.connection_no);
            router.disconnected(session, connection_no, false, Millis::new(1));
        }
        assert_eq!(published(&router), 0, "{version:?}");
    }
}

#[test]
fn a_takeover_cancels_a_delayed_will() {
    let router = router();
    taken_over(&router, Version::V5, 1);
    router.tick(Millis::new(10_000));
    assert_eq!(published(&router), 0);
}

#[test]
fn a_grace_covers_a_takeover() {
    for version in [Version::V5, Version::V311] {
        let router = router_limited(config(), |limits| {
            limits.will_grace = Duration::from_secs(5);
        });
        taken_over(&router, version, 0);
        router.tick(Millis::new(10_000));
        assert_eq!(published(&router), 0, "{version:?}");
    }
}

#[test]
fn a_takeover_after_disconnect_publishes_no_will() {
    let router = router();
    let old = kept_client_of(&router, "client", Version::V5, will(0), Millis::ZERO);
    let mut disconnect = Vec::new();
    encode_disconnect(
        Version::V5,
        ReasonCode::SUCCESS,
        None,
        None,
        &mut disconnect,
    );
    let mut machine = Machine::new(&old, Arc::default(), Version::V5, u32::MAX);
    let end = machine.received(
        &context(&router, Millis::ZERO),
        StreamId::CONTROL,
        &disconnect,
    );
    assert!(end.expect_err("DISCONNECT").is_by_client());
    // Its connection has not told the router of its end yet.
    let new = kept_client_of(&router, "client", Version::V5, None, Millis::ZERO);
    assert!(new.taken_over);
    assert_eq!(published(&router), 0);
}
