//! The limits of queues and the budget, for members that sleep.

use super::*;
use crate::budget::QueueFull;

/// QoS 0 displaces nothing.
#[test]
fn qos_0_displaces_no_message_that_is_kept() {
    let router = router_with(|limits| limits.queue_messages_max = 4);
    let audience = Audience::new(router, 3);
    audience.bring(0..4, LATER);
    for _ in 0..10 {
        let zero = message("t", "zero", QoS::AtMostOnce);
        bring_message(&audience.router, audience.filter, zero, None, LATER);
    }
    let id = &audience.ids[2];
    assert_eq!(gaps(&audience.router, id), 10);
    assert_eq!(resume(&audience.router, id, LATER), texts(0..4));
    assert_eq!(gaps(&audience.router, id), 10);
}

#[test]
fn the_lock_of_a_shard_is_offered_to_others_within_a_batch_for_clients_that_sleep() {
    let audience = Audience::new(router(), 3);
    audience.bring(0..1, LATER);
    assert_eq!(audience.asleep(), 3);
    let arrived = |_| Arrived {
        message: message("t", "x", QoS::AtLeastOnce),
        filters: [audience.filter].into_iter().collect(),
        link: 0,
        origin_mark: None,
        link_origin: None,
        skipped: false,
    };
    let mut batch: Vec<Arrived> = (0..2000).map(arrived).collect();
    let router = &audience.router;
    let (shards, _) =
        crate::router::locks::taken_by(|| router.fan_out(&mut batch, Millis::new(LATER)));
    assert!(shards >= 4, "{shards}");
}

/// One client with many private filters does not displace another client's message.
#[test]
fn private_filters_begin_no_backlog_and_large_backlogs_are_trimmed_first() {
    let router = testing::router_of(crate::router::RouterConfig {
        queues: 1 << 20,
        ..testing::config()
    });
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    let ids = names(&router, 22);
    let mut filters = Vec::new();
    for (n, id) in ids.iter().enumerate() {
        let client = connect(&router, id, 0);
        let name = if n < 2 { "large" } else { "small" };
        let filter = subscribe(&router, client, name, options(QoS::AtLeastOnce));
        filters.push(filter);
        read(&router, client, 0, true);
        leave(&router, client, AWAY);
    }
    let (large, small) = (filters[0], filters[21]);
    let charged = |size: usize| {
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
    };
    for _ in 0..3 {
        bring_message(&router, small, charged(100), None, LATER);
    }
    for _ in 0..40 {
        bring_message(&router, large, charged(50_000), None, LATER);
    }
    assert!(router.queue_used() <= 1 << 20);
    for id in &ids[2..] {
        assert_eq!((queued(&router, id), gaps(&router, id)), (3, 0));
    }
    let info = (queued(&router, &ids[0]), gaps(&router, &ids[0]));
    assert!(info.0 < 21 && info.0 + info.1 as usize == 40, "{info:?}");
    assert_eq!(resume(&router, &ids[0], LATER).len(), info.0);
    assert_eq!(gaps(&router, &ids[0]), info.1);
}

/// With the other policies of a full queue no member sleeps.
#[test]
fn other_policies_of_a_full_queue_are_exact() {
    for policy in [QueueFull::Newest, QueueFull::EndSession] {
        let router = router_with(|limits| {
            limits.queue_messages_max = 5;
            limits.queue_full = policy;
        });
        let audience = Audience::new(router, 3);
        audience.bring(0..8, LATER);
        assert_eq!(audience.asleep(), 0);
        for id in &audience.ids {
            let session = audience.router.session(&id.as_str().into());
            match policy {
                QueueFull::EndSession => assert!(session.is_none()),
                _ => {
                    assert_eq!(resume(&audience.router, id, LATER), texts(0..5));
                    assert_eq!(gaps(&audience.router, id), 3);
                }
            }
        }
    }
}

/// Messages are dropped by their age from their arrival on, also where no sleeper is looked
/// at.
#[test]
fn messages_that_are_too_old_or_expired_are_dropped() {
    let router = router_with(|limits| limits.queue_age_max = Some(Duration::from_secs(10)));
    let audience = Audience::new(router, 3);
    audience.bring(0..2, LATER);
    audience.bring(2..4, LATER + 8000);
    let router = &audience.router;
    assert_eq!(
        resume(router, &audience.ids[0], LATER + 10_000),
        texts(2..4)
    );
    assert_eq!(gaps(router, &audience.ids[0]), 2);
    let mut shard = router.sessions.shard(7);
    shard.purge_backlogs(router.limits(), Millis::new(LATER + 10_000));
    assert_eq!(shard.backlogged_of_all(), 4);
    drop(shard);
    assert_eq!(queued(router, &audience.ids[1]), 2);
    assert_eq!(gaps(router, &audience.ids[1]), 2);
}

/// Each data link has the time of its own thread.
#[test]
fn a_message_from_a_link_whose_clock_is_ahead_is_not_old() {
    let router = router_with(|limits| limits.queue_age_max = Some(Duration::from_secs(10)));
    let audience = Audience::new(router, 3);
    audience.bring(0..2, LATER + 1);
    let router = &audience.router;
    let mut shard = router.sessions.shard(7);
    shard.purge_backlogs(router.limits(), Millis::new(LATER));
    drop(shard);
    for id in &audience.ids {
        assert_eq!(resume(router, id, LATER), texts(0..2));
        assert_eq!(gaps(router, id), 0);
    }
}

#[test]
fn a_message_that_is_for_no_sleeper_but_the_one_that_it_lets_sleep_is_kept() {
    let router = router();
    let ids = names(&router, 3);
    let mut filter = None;
    for (n, id) in ids.iter().enumerate() {
        let client = connect(&router, id, 0);
        let qos = if n < 2 {
            QoS::AtMostOnce
        } else {
            QoS::AtLeastOnce
        };
        filter = Some(subscribe(&router, client, "t", options(qos)));
        if n < 2 {
            leave(&router, client, AWAY);
        }
    }
    let filter = filter.expect("there are clients");
    bring_all(&router, filter, 0..2, LATER);
    assert_eq!(router.totals().asleep, 2);
    let id = &ids[2];
    let client = connect(&router, id, LATER);
    read(&router, client, LATER, true);
    leave(&router, client, LATER);
    bring_all(&router, filter, 2..4, 2 * LATER);
    assert_eq!(router.totals().asleep, 3);
    assert_eq!(resume(&router, id, 2 * LATER), texts(2..4));
    assert_eq!((gaps(&router, id), gaps(&router, &ids[0])), (0, 4));
}

/// A session that sleeps in many filters does not gather all their messages before it drops most.
#[test]
fn a_session_with_many_filters_gathers_little_more_than_its_queue_may_have() {
    let limits = SessionLimits {
        queue_messages_max: 10,
        ..testing::router().limits().clone()
    };
    let session = Session::new("c".into(), "p".into(), Incarnation::nth(1), Millis::ZERO);
    let subscription = Subscription {
        filter: FilterId(1),
        name: "t".into(),
        options: options(QoS::AtLeastOnce),
        asked: QoS::AtLeastOnce,
        identifier: None,
        active: true,
        overlaps: 0,
        shared: false,
        wild: false,
        wild_below: None,
    };
    let sleeper = Sleeper::new(0, 0, true);
    let mut gathered = Gathered::new(limits.queue_messages_max);
    // Some filters got their messages later than others, and some at the same time.
    for filter in 0..100_u64 {
        let mut backlog = Backlog::default();
        backlog.add(&[sleeper], None);
        for number in 0..10 {
            let position = 1000 * (filter * 7 % 5) + 100 * number + filter;
            backlog.arrived();
            let message = message("t", "", QoS::AtLeastOnce);
            backlog.keep(&limits, &message, None, position, Millis::ZERO);
        }
        gathered.add(&backlog, &sleeper, (&session, &subscription), &limits);
        assert!(gathered.kept.len() < 20 && gathered.kept.capacity() < 100);
    }
    let positions: Vec<u64> = gathered.take().iter().map(|kept| kept.position).collect();
    let mut newest: Vec<u64> = (0..100)
        .filter(|filter| filter * 7 % 5 == 4)
        .map(|filter| 4900 + filter)
        .collect();
    newest.sort_unstable();
    assert_eq!(positions, newest[newest.len() - 10..]);
    let mut lost = Lost::default();
    lost.add(Reason::Messages, 990);
    assert_eq!(gathered.lost, lost);
}
