//! The budget of all queues, where the clients that are away sleep.

use super::*;
use crate::router::RouterConfig;
use crate::router::locks;

const MIB: usize = 1 << 20;

/// A message of `size` bytes that is charged to the account of queues.
fn charged(router: &Router, size: usize) -> Message {
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

fn connect_as(router: &Router, id: &str, principal: &str, now: u64) -> Connected {
    let request = testing::request_from(id, Some(principal), "127.0.0.1", None);
    let connected = router.connect(request, Millis::new(now), |_, _| {});
    connected.expect("nobody else has the identifier")
}

fn router_with_queues(queues: usize) -> Arc<Router> {
    let config = RouterConfig {
        queues: queues as u64,
        ..testing::config()
    };
    let router = testing::router_of(config);
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// Three clients of one shard with principals of their own, which sleep and have nothing in their queues.
fn audience() -> Audience {
    let router = router_with_queues(8 * MIB);
    let ids = names(&router, 3);
    let mut filter = None;
    for id in &ids {
        let client = connect_as(&router, id, id, 0);
        filter = Some(subscribe(&router, client, "t", options(QoS::AtLeastOnce)));
        read(&router, client, 0, true);
        leave(&router, client, AWAY);
    }
    let filter = filter.expect("there is a client");
    bring(&router, filter, "0", LATER);
    // The first one was alone when it got the message, so that it is in its queue.
    let client = connect_as(&router, &ids[0], &ids[0], LATER);
    assert_eq!(read(&router, client, LATER, true), texts(0..1));
    leave(&router, client, LATER);
    bring(&router, filter, "1", 2 * LATER);
    assert_eq!(router.totals().asleep, 3);
    Audience {
        router,
        ids,
        filter,
    }
}

impl Audience {
    /// Brings `count` messages of `size` bytes.
    fn bring_charged(&self, size: usize, count: usize) {
        for _ in 0..count {
            let message = charged(&self.router, size);
            bring_message(&self.router, self.filter, message, None, 2 * LATER);
        }
    }

    /// Checks that the last two clients have lost nothing of `count` messages, and those before.
    fn judge(&self, count: usize) {
        for id in &self.ids[1..] {
            let has = (queued(&self.router, id), gaps(&self.router, id));
            assert_eq!(has, (count + 2, 0));
        }
    }
}

/// Each of the clients uses less than a quarter of the budget, so that it is not large by itself.
#[test]
fn stalled_clients_of_one_principal_cost_an_audience_that_sleeps_nothing() {
    let audience = audience();
    let router = &audience.router;
    audience.bring_charged(1000, 100);
    let flooded = (0..8).map(|n| {
        let client = connect_as(router, &format!("flood-{n}"), "flood", 2 * LATER);
        let filter = format!("flood/{n}");
        subscribe(router, client, &filter, options(QoS::AtLeastOnce))
    });
    let filters: Vec<FilterId> = flooded.collect();
    for _ in 0..200 {
        for filter in &filters {
            bring_message(router, *filter, charged(router, 10_000), None, 2 * LATER);
        }
        assert!(router.queue_used() <= 8 * MIB as u64);
    }
    audience.judge(100);
}

/// The tasks of the closed connections have not run yet: their output still refers to the messages.
#[test]
fn connections_that_are_closed_for_their_output_cost_an_audience_that_sleeps_nothing() {
    let audience = audience();
    let router = &audience.router;
    audience.bring_charged(4000, 100);
    for n in 0..12 {
        let client = connect_as(router, &format!("flood-{n}"), "flood", 2 * LATER);
        let filter = format!("flood/{n}");
        let filter = subscribe(router, client, &filter, options(QoS::AtLeastOnce));
        bring_message(router, filter, charged(router, MIB), None, 2 * LATER);
    }
    audience.judge(100);
}

#[test]
fn an_audience_without_bytes_is_not_searched_again_at_once() {
    let audience = audience();
    let router = &audience.router;
    // Nothing that is dropped gives this back.
    let others = charged(router, 9 * MIB);
    let enforce = || locks::taken_by(|| router.sessions.enforce_budget(Millis::new(2 * LATER))).0;
    assert!(enforce() > 0);
    assert_eq!((enforce(), enforce()), (0, 0));
    drop(others);
}

/// Two clients sleep in many filters. In each they have less than another client has in its queue, and they
/// have subscribed to the filter of others too.
#[test]
fn clients_that_sleep_in_many_filters_pay_before_others() {
    for principals in [["a", "v", "w"], ["a", "a", "a"]] {
        let router = router_with_queues(2 * MIB);
        let ids = names(&router, 5);
        let filters: Vec<String> = (0..40).map(|n| format!("f/{n}")).collect();
        let mut number = None;
        let mut many = Vec::new();
        for (n, id) in ids.iter().enumerate() {
            let client = connect_as(&router, id, principals[n / 2], 0);
            let subscribe = |name: &str| {
                let filter = subscribe(&router, client, name, options(QoS::AtLeastOnce));
                read(&router, client, 0, true);
                filter
            };
            match n {
                0 | 1 => many = filters.iter().map(|name| subscribe(name)).collect(),
                4 => number = Some(subscribe("own")),
                _ => {}
            }
            if n < 4 {
                subscribe("all");
            }
            leave(&router, client, AWAY);
        }
        let own = number.expect("the last client has it");
        let all = router.filters.table().write().intern("all").0;
        for _ in 0..10 {
            bring_message(&router, own, charged(&router, 10_000), None, LATER);
        }
        for _ in 0..4 {
            bring_message(&router, all, charged(&router, 10_000), None, LATER);
        }
        for _ in 0..8 {
            for filter in &many {
                bring_message(&router, *filter, charged(&router, 10_000), None, LATER);
                assert!(router.queue_used() <= 2 * MIB as u64);
            }
        }
        let has = |id: &String| (queued(&router, id), gaps(&router, id));
        assert!(has(&ids[0]).1 > 0 && has(&ids[1]).1 > 0);
        assert_eq!(has(&ids[4]), (10, 0), "{principals:?}");
        assert_eq!([has(&ids[2]), has(&ids[3])], [(4, 0); 2], "{principals:?}");
    }
}
