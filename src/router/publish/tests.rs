use std::time::Duration;

use crate::mqtt::QoS;
use crate::router::testing::{client, config, publish_at, router_of};
use crate::router::{Router, RouterConfig, SessionRef};
use crate::time::Millis;

use super::*;

/// A router whose publish links grow from `links` to one more.
fn router(links: usize) -> Arc<Router> {
    let router = router_of(RouterConfig {
        publish_links: links,
        publish_links_max: links + 1,
        ..config()
    });
    for link in 0..links {
        router.publish_link_up(link, true, Millis::ZERO);
    }
    router
}

fn pop(router: &Router) -> bool {
    router.publish_queues(0, |queues| queues.pop()).is_some()
}

/// The number of publish links that are used.
fn used(router: &Router) -> u8 {
    let session = |shard| SessionRef {
        shard,
        slot: 0,
        slot_version: 0,
    };
    let places = (0..32).map(|shard| router.publish_link(session(shard)));
    places.max().expect("there are shards") + 1
}

fn due(router: &Router, link: usize) -> bool {
    router.publish_ping_due(link, Millis::ZERO)
}

#[test]
fn a_new_link_is_used_once_the_publishes_of_the_others_have_arrived() {
    let router = router(2);
    assert!(router.add_publish_link());
    assert!(!due(&router, 0), "it is not connected");
    router.publish_link_up(2, true, Millis::ZERO);
    assert!(due(&router, 0) && !due(&router, 0), "one PINGREQ");
    assert!(due(&router, 1));
    router.publish_ping_answered(1);
    assert_eq!(used(&router), 2);
    router.publish_link_up(0, false, Millis::ZERO);
    router.publish_link_up(0, true, Millis::ZERO);
    assert!(due(&router, 0), "the connection took the first one with it");
    router.publish_ping_answered(0);
    assert_eq!(used(&router), 3);
    assert!(!due(&router, 0) && !due(&router, 1));
}

#[test]
fn a_round_passes_with_the_publishes_that_were_handed_over_before_it() {
    let router = router(1);
    let who = client(&router, "a");
    let publish = |n| publish_at(&router, who, n, QoS::AtMostOnce);
    publish(0);
    publish(1);
    let arrivals = &router.publishing.links[0].arrivals;
    let round = arrivals.next_round();
    assert!(!due(&router, 0), "nobody asks");
    arrivals.ask();
    assert!(!due(&router, 0), "two publishes wait");
    publish(2);
    assert!(
        arrivals.next_round() > round,
        "it came too late for this one"
    );
    assert!(pop(&router) && !due(&router, 0));
    assert!(
        pop(&router) && due(&router, 0),
        "the third is not waited for"
    );
    assert!(!arrivals.has_passed(round));
    router.publish_ping_answered(0);
    assert!(arrivals.has_passed(round));
    assert!(!arrivals.has_passed(arrivals.next_round()));
}

#[test]
fn rounds_keep_a_distance() {
    let router = router(1);
    let arrivals = &router.publishing.links[0].arrivals;
    for now in [0, 1000].map(Millis::new) {
        arrivals.ask();
        assert!(router.publish_ping_due(0, now));
        arrivals.ask();
        assert!(
            !router.publish_ping_due(0, now + Duration::from_millis(999)),
            "one is under way"
        );
        router.publish_ping_answered(0);
        assert!(!router.publish_ping_due(0, now + Duration::from_millis(999)));
    }
}

#[test]
fn a_round_outlives_the_connection() {
    let router = router(1);
    let arrivals = &router.publishing.links[0].arrivals;
    let round = arrivals.next_round();
    arrivals.ask();
    assert!(due(&router, 0));
    router.publish_link_up(0, false, Millis::ZERO);
    router.publish_link_up(0, true, Millis::ZERO);
    assert!(!arrivals.has_passed(round));
    assert!(due(&router, 0), "again");
    router.publish_ping_answered(0);
    assert!(arrivals.has_passed(round));
}
