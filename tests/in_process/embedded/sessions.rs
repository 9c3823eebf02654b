//! Sessions: resume, expiry, takeover, wills, stop and restart.

use std::time::Duration;

use tidegate::embedded::{EmbeddedBroker, EmbeddedOptions};
use tidegate::mqtt::{AckKind, Connect, Properties, QoS, ReasonCode, Version, Will};

use crate::embedded::client::{Client, Got, kept, options, v5};

fn broker() -> EmbeddedBroker {
    EmbeddedBroker::start(EmbeddedOptions::default())
}

/// Publishes at QoS 1 and waits for the PUBACK.
async fn put(publisher: &mut Client, topic: &str, payload: &str) {
    publisher.publish(topic, payload, 1, 1).await;
    assert!(matches!(
        publisher.next().await,
        Got::Ack(AckKind::Puback, 1, _)
    ));
}

#[tokio::test(start_paused = true)]
async fn resumes_in_order() {
    let broker = broker();
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    sub.subscribe(Some(3), &[("t/1", options(1)), ("t/2", options(2))])
        .await;
    put(&mut publisher, "t/1", "a").await;
    publisher.publish("t/2", "b", 2, 2).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, 2, 0));
    put(&mut publisher, "t/1", "c").await;
    let a = sub.publish_got().await;
    let b = sub.publish_got().await;
    let c = sub.publish_got().await;
    sub.ack(AckKind::Pubrec, b.id).await;
    assert_eq!(sub.next().await, Got::Ack(AckKind::Pubrel, b.id, 0));
    drop(sub);
    put(&mut publisher, "t/1", "d").await;
    publisher.publish("t/1", "unkept", 0, 0).await;
    publisher.quiet().await;

    let (mut sub, present) = Client::connect(&broker, &kept("sub")).await;
    assert!(present);
    let again = sub.publish_got().await;
    assert_eq!(
        (again.id, again.payload.as_str(), again.dup),
        (a.id, "a", true)
    );
    assert_eq!(again.ids, [3]);
    assert_eq!(sub.next().await, Got::Ack(AckKind::Pubrel, b.id, 0));
    let again = sub.publish_got().await;
    assert_eq!(
        (again.id, again.payload.as_str(), again.dup),
        (c.id, "c", true)
    );
    let d = sub.publish_got().await;
    assert_eq!((d.payload.as_str(), d.dup), ("d", false));
    for id in [a.id, c.id, d.id] {
        sub.ack(AckKind::Puback, id).await;
    }
    sub.ack(AckKind::Pubcomp, b.id).await;
    sub.quiet().await;
    assert_eq!(broker.stats().queued, 0);

    // Over a smaller window, unacknowledged messages wait for their turn.
    for payload in ["e", "f", "g"] {
        put(&mut publisher, "t/1", payload).await;
        assert_eq!(sub.publish_got().await.payload, payload);
    }
    drop(sub);
    let narrow = Connect {
        receive_maximum: Some(1),
        ..kept("sub")
    };
    let (mut sub, _) = Client::connect(&broker, &narrow).await;
    for payload in ["e", "f", "g"] {
        let got = sub.publish_got().await;
        assert_eq!((got.payload.as_str(), got.dup), (payload, true));
        sub.quiet().await;
        sub.ack(AckKind::Puback, got.id).await;
    }
}

#[tokio::test(start_paused = true)]
async fn sessions_begin_and_end() {
    let broker = broker();
    let short = Connect {
        session_expiry: Some(10),
        ..kept("s")
    };
    let (client, present) = Client::connect(&broker, &short).await;
    assert!(!present);
    drop(client);
    tokio::time::sleep(Duration::from_secs(9)).await;
    let (client, present) = Client::connect(&broker, &short).await;
    assert!(present);
    drop(client);
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(broker.stats().sessions, 0);
    let (client, present) = Client::connect(&broker, &short).await;
    assert!(!present);
    // DISCONNECT can lengthen it …
    assert_eq!(
        client.disconnect(ReasonCode::SUCCESS, Some(100)).await,
        Got::Closed
    );
    tokio::time::sleep(Duration::from_secs(50)).await;
    let (client, present) = Client::connect(&broker, &short).await;
    assert!(present);
    // … or end it.
    assert_eq!(
        client.disconnect(ReasonCode::SUCCESS, Some(0)).await,
        Got::Closed
    );
    assert_eq!(broker.stats().sessions, 0);
    let (client, _) = Client::connect(&broker, &v5("s")).await;
    let end = client.disconnect(ReasonCode::SUCCESS, Some(5)).await;
    assert_eq!(end, Got::Disconnect(0x82));

    let (mut client, _) = Client::connect(&broker, &kept("s")).await;
    client.subscribe(None, &[("t", options(0))]).await;
    drop(client);
    let clean = Connect {
        clean_start: true,
        ..kept("s")
    };
    let (_client, present) = Client::connect(&broker, &clean).await;
    assert!(!present);
    assert_eq!(broker.stats().subscriptions, 0);
}

#[tokio::test(start_paused = true)]
async fn the_newest_connection_wins() {
    let broker = broker();
    let (mut old, _) = Client::connect(&broker, &kept("same")).await;
    old.subscribe(None, &[("t", options(1))]).await;
    let (mut new, present) = Client::connect(&broker, &kept("same")).await;
    assert!(present);
    assert_eq!(old.next().await, Got::Disconnect(0x8E));
    assert_eq!(old.next().await, Got::Closed);
    new.publish("t", "self", 1, 1).await;
    assert_eq!(new.next().await, Got::Ack(AckKind::Puback, 1, 0));
    assert_eq!(new.publish_got().await.payload, "self");
    assert_eq!(
        (broker.stats().connections, broker.stats().sessions),
        (1, 1)
    );
}

fn with_will<'a>(connect: Connect<'a>, delay: u32) -> Connect<'a> {
    Connect {
        will: Some(Will {
            qos: QoS::AtLeastOnce,
            retain: true,
            topic: "will",
            payload: b"gone",
            delay,
            message_expiry: None,
            properties: Properties::default(),
        }),
        ..connect
    }
}

#[tokio::test(start_paused = true)]
async fn wills() {
    let broker = broker();
    let (mut watch, _) = Client::connect(&broker, &v5("watch")).await;
    watch.subscribe(None, &[("will", options(0))]).await;

    // The connection is lost.
    let (client, _) = Client::connect(&broker, &with_will(v5("c"), 0)).await;
    drop(client);
    assert_eq!(watch.publish_got().await.payload, "gone");
    assert_eq!(broker.stats().retained, 1);

    // DISCONNECT drops it, unless it asks for it.
    let (client, _) = Client::connect(&broker, &with_will(v5("c"), 0)).await;
    client
        .disconnect(ReasonCode::NORMAL_DISCONNECTION, None)
        .await;
    watch.quiet().await;
    let (client, _) = Client::connect(&broker, &with_will(v5("c"), 0)).await;
    client
        .disconnect(ReasonCode::DISCONNECT_WITH_WILL_MESSAGE, None)
        .await;
    assert_eq!(watch.publish_got().await.payload, "gone");

    // Delayed, and cancelled by a resume in time.
    let (client, _) = Client::connect(&broker, &with_will(kept("c"), 30)).await;
    drop(client);
    tokio::time::sleep(Duration::from_secs(29)).await;
    let (client, _) = Client::connect(&broker, &with_will(kept("c"), 30)).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    watch.quiet().await;
    drop(client);
    let from = tokio::time::Instant::now();
    assert_eq!(watch.publish_got().await.payload, "gone");
    assert_eq!(from.elapsed().as_secs(), 30);
    watch.quiet().await;

    // The session's end does not wait for the delay.
    let brief = Connect {
        session_expiry: Some(5),
        ..with_will(kept("c"), 30)
    };
    let (client, _) = Client::connect(&broker, &brief).await;
    drop(client);
    let from = tokio::time::Instant::now();
    assert_eq!(watch.publish_got().await.payload, "gone");
    assert_eq!(from.elapsed().as_secs(), 5);

    // Nor does the end by a clean start.
    let (client, _) = Client::connect(&broker, &with_will(kept("c"), 30)).await;
    drop(client);
    let clean = Connect {
        clean_start: true,
        ..kept("c")
    };
    let (_client, _) = Client::connect(&broker, &clean).await;
    assert_eq!(watch.publish_got().await.payload, "gone");

    // Takeover: without a delay it is due, though the session goes on.
    let (_old, _) = Client::connect(&broker, &with_will(kept("d"), 0)).await;
    let (_new, present) = Client::connect(&broker, &kept("d")).await;
    assert!(present);
    assert_eq!(watch.publish_got().await.payload, "gone");
    watch.quiet().await;
}

#[tokio::test(start_paused = true)]
async fn stop_and_restart() {
    let broker = broker();
    let (mut publisher, _) = Client::connect(&broker, &with_will(v5("pub"), 0)).await;
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    sub.subscribe(None, &[("#", options(1))]).await;
    publisher.retain("r", "kept").await;
    put(&mut publisher, "t", "inflight").await;
    assert_eq!(sub.publish_got().await.payload, "kept");
    let first = sub.publish_got().await;

    broker.stop();
    assert_eq!(sub.next().await, Got::Closed);
    assert_eq!(publisher.next().await, Got::Closed);
    let mut refused = Client::open(&broker, Version::V5);
    assert_eq!(refused.next().await, Got::Closed);
    broker.restart(true);

    let (mut sub, present) = Client::connect(&broker, &kept("sub")).await;
    assert!(present);
    let again = sub.publish_got().await;
    assert_eq!((again.id, again.dup), (first.id, true));
    // A clean session does not survive, and a crash fires no will.
    sub.quiet().await;
    assert_eq!(broker.stats().sessions, 1);

    broker.restart(false);
    assert_eq!(sub.next().await, Got::Closed);
    let (mut sub, present) = Client::connect(&broker, &kept("sub")).await;
    assert!(!present);
    sub.subscribe(None, &[("#", options(1))]).await;
    assert_eq!(sub.publish_got().await.payload, "kept");
}

#[tokio::test(start_paused = true)]
async fn a_core_ends_with_its_last_handle() {
    let broker = broker();
    let (mut client, _) = Client::connect(&broker, &v5("c")).await;
    drop(broker);
    // The connection keeps it.
    client.publish("t", "x", 1, 1).await;
    assert_eq!(client.next().await, Got::Ack(AckKind::Puback, 1, 0x10));
    drop(client);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks(),
        0
    );
}

/// A link that is cut again and again loses nothing, keeps the order, and gets
/// QoS 2 once.
#[tokio::test(start_paused = true)]
async fn cuts_lose_nothing() {
    for seed in 1..=30u64 {
        let broker = broker();
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut below = move |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
        let window = Connect {
            receive_maximum: Some(1 + below(8) as u16),
            ..kept("sub")
        };
        let (mut sub, _) = Client::connect(&broker, &window).await;
        sub.subscribe(Some(1), &[("one", options(1)), ("two", options(2))])
            .await;
        const COUNT: usize = 100;
        let mut sent = 0;
        let mut ones: Vec<usize> = Vec::new();
        let mut twos: Vec<usize> = Vec::new();
        // Packet ids of QoS 2 received and not released, as a receiver keeps them.
        let mut held: Vec<u16> = Vec::new();
        while broker.stats().queued > 0 || sent < COUNT {
            for _ in 0..below(10) {
                if sent < COUNT {
                    let payload = sent.to_string();
                    if below(2) == 0 {
                        put(&mut publisher, "one", &payload).await;
                    } else {
                        publisher.publish("two", &payload, 2, 2).await;
                        assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, 2, 0));
                        publisher.ack(AckKind::Pubrel, 2).await;
                        assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubcomp, 2, 0));
                    }
                    sent += 1;
                }
            }
            for _ in 0..below(20) {
                let wait = tokio::time::timeout(Duration::from_millis(5), sub.next());
                match wait.await {
                    Err(_) => break,
                    Ok(Got::Publish(p)) => {
                        let n: usize = p.payload.parse().expect("a number");
                        if p.qos == 1 {
                            let new = ones.last().is_none_or(|&last| n > last);
                            assert!(new || p.dup, "seed {seed}: {n} again without DUP");
                            if !ones.contains(&n) {
                                assert!(new, "seed {seed}: {n} out of order");
                                ones.push(n);
                            }
                            if below(4) > 0 {
                                sub.ack(AckKind::Puback, p.id).await;
                            }
                        }
                        if p.qos == 2 {
                            if !held.contains(&p.id) {
                                held.push(p.id);
                                twos.push(n);
                            }
                            if below(4) > 0 {
                                sub.ack(AckKind::Pubrec, p.id).await;
                            }
                        }
                    }
                    Ok(Got::Ack(AckKind::Pubrel, id, _)) => {
                        held.retain(|&h| h != id);
                        if below(4) > 0 {
                            sub.ack(AckKind::Pubcomp, id).await;
                        }
                    }
                    Ok(other) => panic!("seed {seed}: {other:?}"),
                }
            }
            if below(2) == 0 {
                drop(sub);
                let (next, present) = Client::connect(&broker, &window).await;
                assert!(present);
                sub = next;
            }
        }
        assert_eq!(ones.len() + twos.len(), COUNT, "seed {seed}");
        assert!(ones.len() > 10 && twos.len() > 10);
        assert!(
            twos.windows(2).all(|w| w[0] < w[1]),
            "seed {seed}: {twos:?}"
        );
    }
}
