//! The quirks and faults that the embedded broker can be given, and its limits.

use std::time::Duration;

use tidegate::embedded::{EmbeddedBroker, EmbeddedOptions, Overlap, Quirks, RefuseV5, Shared};
use tidegate::mqtt::{AckKind, Connect, Packet, QoS, Version, Will};
use tokio::io::AsyncReadExt;

use crate::embedded::client::{Client, Got, Publish, kept, options, v5};

/// What a client with overlapping subscriptions gets for one QoS 2 message.
async fn overlapping(broker_options: EmbeddedOptions) -> Vec<(u8, Vec<u32>)> {
    let broker = EmbeddedBroker::start(broker_options);
    let (mut sub, _) = Client::connect(&broker, &v5("sub")).await;
    sub.subscribe(Some(1), &[("a/#", options(2))]).await;
    sub.subscribe(Some(2), &[("a/+", options(1))]).await;
    sub.subscribe(Some(3), &[("a/b", options(0))]).await;
    let (mut other, _) = Client::connect(&broker, &v5("other")).await;
    other.subscribe(Some(9), &[("+/b", options(0))]).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    publisher.publish("a/b", "x", 2, 1).await;
    assert_eq!(other.publish_got().await.qos, 0);
    other.quiet().await;
    let mut got = Vec::new();
    while let Ok(next) = tokio::time::timeout(Duration::from_millis(20), sub.next()).await {
        let Got::Publish(Publish { qos, mut ids, .. }) = next else {
            panic!("{next:?}");
        };
        ids.sort_unstable();
        got.push((qos, ids));
    }
    got.sort();
    got
}

#[tokio::test(start_paused = true)]
async fn overlaps() {
    let with = |overlap, no_ids| EmbeddedOptions {
        quirks: Quirks {
            overlap,
            no_ids,
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    };
    let each = vec![(0, vec![3]), (1, vec![2]), (2, vec![1])];
    assert_eq!(overlapping(with(Overlap::Many, false)).await, each);
    let one = vec![(2, vec![1, 2, 3])];
    assert_eq!(overlapping(with(Overlap::One, false)).await, one);
    let lowest = vec![(0, vec![1, 2, 3])];
    assert_eq!(overlapping(with(Overlap::LowestQos, false)).await, lowest);
    let bare = vec![(0, vec![]), (1, vec![]), (2, vec![])];
    assert_eq!(overlapping(with(Overlap::Many, true)).await, bare);
}

#[tokio::test(start_paused = true)]
async fn connack_tells() {
    let broker = EmbeddedBroker::start(EmbeddedOptions {
        quirks: Quirks {
            no_ids: true,
            shared: Shared::Refused,
            small_window: Some(20),
            ..Quirks::default()
        },
        max_packet: Some(1000),
        max_qos: QoS::AtLeastOnce,
        retain_available: false,
        topic_alias_max: 3,
        ..EmbeddedOptions::default()
    });
    let mut client = Client::open(&broker, Version::V5);
    client.send(|out| v5("c").encode(out)).await;
    let seen = client
        .next_with(|packet| {
            let Packet::Connack(c) = packet else {
                panic!("{packet:?}");
            };
            assert_eq!(c.subscription_ids_available, Some(false));
            assert_eq!(c.receive_maximum, Some(20));
            assert_eq!(c.maximum_packet_size, Some(1000));
            assert_eq!(c.maximum_qos, Some(QoS::AtLeastOnce));
            assert_eq!(c.retain_available, Some(false));
            assert_eq!(c.topic_alias_maximum, Some(3));
            assert_eq!(c.shared_subscription_available, Some(false));
        })
        .await;
    assert!(seen.is_some());
    assert_eq!(client.subscribe(Some(5), &[("t", options(2))]).await, [1]);
    client.publish("t", "x", 1, 1).await;
    assert_eq!(client.next().await, Got::Ack(AckKind::Puback, 1, 0));
    assert_eq!(client.publish_got().await.ids, Vec::<u32>::new());
    client.retain("t", "x").await;
    assert_eq!(client.next().await, Got::Disconnect(0x9A));

    let (mut client, _) = Client::connect(&broker, &v5("c")).await;
    client.publish("t", "x", 2, 1).await;
    assert_eq!(client.next().await, Got::Disconnect(0x9B));
    let (mut client, _) = Client::connect(&broker, &v5("c")).await;
    client.publish("t", &"x".repeat(1000), 1, 1).await;
    assert_eq!(client.next().await, Got::Disconnect(0x95));
    for (qos, retain, code) in [
        (QoS::ExactlyOnce, false, 0x9B),
        (QoS::AtMostOnce, true, 0x9A),
    ] {
        let will = Will {
            qos,
            retain,
            topic: "w",
            ..Will::default()
        };
        let connect = Connect {
            will: Some(will),
            ..v5("w")
        };
        let (_, got) = Client::try_connect(&broker, &connect).await;
        assert_eq!(
            got,
            Got::Connack {
                present: false,
                reason: code
            }
        );
    }
}

#[tokio::test(start_paused = true)]
async fn small_window() {
    let broker = EmbeddedBroker::start(EmbeddedOptions {
        quirks: Quirks {
            small_window: Some(2),
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    });
    let (mut sub, _) = Client::connect(&broker, &v5("sub")).await;
    sub.subscribe(None, &[("t", options(1))]).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for id in 1..=4 {
        publisher.publish("t", "x", 1, id).await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, id, 0));
    }
    sub.publish_got().await;
    let second = sub.publish_got().await;
    sub.quiet().await;
    sub.ack(AckKind::Puback, second.id).await;
    sub.publish_got().await;
    sub.quiet().await;

    // QoS 2 uses the window until PUBCOMP.
    for id in [1, 2] {
        publisher.publish("t", "y", 2, id).await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, id, 0));
    }
    publisher.publish("t", "z", 2, 3).await;
    assert_eq!(publisher.next().await, Got::Disconnect(0x93));
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for id in 1..=3 {
        publisher.publish("t", "burst", 1, id).await;
    }
    // In the pipe at once, so no PUBACK can have been seen.
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 1, 0));
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 2, 0));
    assert_eq!(publisher.next().await, Got::Disconnect(0x93));
}

#[tokio::test(start_paused = true)]
async fn redelivery_without_dup() {
    let broker = EmbeddedBroker::start(EmbeddedOptions {
        quirks: Quirks {
            dup0: true,
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    });
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    sub.subscribe(None, &[("t", options(1))]).await;
    sub.publish("t", "x", 1, 1).await;
    assert_eq!(sub.next().await, Got::Ack(AckKind::Puback, 1, 0));
    let first = sub.publish_got().await;
    drop(sub);
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    assert_eq!(sub.publish_got().await, first);
}

#[tokio::test(start_paused = true)]
async fn late_retained() {
    let broker = EmbeddedBroker::start(EmbeddedOptions {
        quirks: Quirks {
            late_retained: Some(Duration::from_millis(700)),
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    });
    let (mut c, _) = Client::connect(&broker, &v5("c")).await;
    c.retain("r", "old").await;
    let from = tokio::time::Instant::now();
    c.subscribe(None, &[("r", options(0)), ("#", options(0))])
        .await;
    c.unsubscribe("#").await;
    assert_eq!(c.publish_got().await.payload, "old");
    assert_eq!(from.elapsed().as_millis(), 700);
    // The other subscription had ended.
    c.quiet().await;
}

#[tokio::test(start_paused = true)]
async fn mqtt_5_refused() {
    for (refuse_v5, wanted) in [
        (RefuseV5::ReturnCode, &[0x20, 2, 0, 1][..]),
        (RefuseV5::ReasonCode, &[0x20, 3, 0, 0x84, 0][..]),
    ] {
        let broker = EmbeddedBroker::start(EmbeddedOptions {
            quirks: Quirks {
                refuse_v5,
                ..Quirks::default()
            },
            ..EmbeddedOptions::default()
        });
        let mut io = broker.connect();
        let mut bytes = Vec::new();
        v5("c").encode(&mut bytes);
        tokio::io::AsyncWriteExt::write_all(&mut io, &bytes)
            .await
            .expect("the pipe is open");
        let mut got = Vec::new();
        io.read_to_end(&mut got).await.expect("closed in order");
        assert_eq!(got, wanted);
        let old = Connect {
            version: Version::V311,
            ..v5("c")
        };
        Client::connect(&broker, &old).await;
    }
}

#[tokio::test(start_paused = true)]
async fn limits_hold() {
    let broker = EmbeddedBroker::start(EmbeddedOptions {
        queue_max: 3,
        retained_bytes_max: 400,
        sessions_max: 2,
        connections_max: 3,
        ..EmbeddedOptions::default()
    });
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    sub.subscribe(None, &[("t", options(1))]).await;
    drop(sub);
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for id in 1..=5 {
        publisher.publish("t", &id.to_string(), 1, id).await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, id, 0));
    }
    assert_eq!((broker.stats().queued, broker.stats().dropped_full), (3, 2));
    publisher.retain("r", &"x".repeat(200)).await;
    publisher.retain("r", &"y".repeat(500)).await;
    publisher.quiet().await;
    // The stale one is not kept in place of the one that has no room.
    assert_eq!(
        (broker.stats().retained, broker.stats().dropped_full),
        (0, 3)
    );

    let (third, got) = Client::try_connect(&broker, &v5("third")).await;
    assert_eq!(
        got,
        Got::Connack {
            present: false,
            reason: 0x97
        }
    );
    drop(third);
    let (mut sub, present) = Client::connect(&broker, &kept("sub")).await;
    assert!(present);
    for wanted in ["3", "4", "5"] {
        assert_eq!(sub.publish_got().await.payload, wanted);
    }
    sub.quiet().await;
    let _idle = broker.connect();
    let mut over = Client::open(&broker, Version::V5);
    assert_eq!(over.next().await, Got::Closed);

    let broker = EmbeddedBroker::start(EmbeddedOptions {
        queue_bytes_max: 1000,
        ..EmbeddedOptions::default()
    });
    let (mut sub, _) = Client::connect(&broker, &kept("sub")).await;
    sub.subscribe(None, &[("t", options(1))]).await;
    drop(sub);
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for id in 1..=5 {
        publisher.publish("t", &"x".repeat(300), 1, id).await;
        publisher.next().await;
    }
    assert_eq!((broker.stats().queued, broker.stats().dropped_full), (2, 3));
}

#[tokio::test(start_paused = true)]
async fn all_messages_together_are_bounded_and_the_longest_queue_loses_its_oldest() {
    let broker = EmbeddedBroker::start(EmbeddedOptions::default().within(100_000));
    for (id, filter) in [("short", "s"), ("long", "l")] {
        let (mut sub, _) = Client::connect(&broker, &kept(id)).await;
        sub.subscribe(None, &[(filter, options(1))]).await;
    }
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    let mut publish = async |topic, payload: &str| {
        publisher.publish(topic, payload, 1, 1).await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 1, 0));
        broker.stats().bytes
    };
    let mut most = 0;
    for n in 0..10 {
        publish("s", &n.to_string()).await;
    }
    for n in 0..1000 {
        most = most.max(publish("l", &format!("{n} {}", "x".repeat(500))).await);
    }
    assert!((90_000..=100_000).contains(&most), "{most}");
    let (mut short, _) = Client::connect(&broker, &kept("short")).await;
    for n in 0..10 {
        assert_eq!(short.publish_got().await.payload, n.to_string());
    }
    let kept_messages = broker.stats().queued - 10;
    assert_eq!(broker.stats().dropped_full, 1000 - kept_messages as u64);
    let (mut long, _) = Client::connect(&broker, &kept("long")).await;
    for n in 1000 - kept_messages..1000 {
        let payload = long.publish_got().await.payload;
        assert!(payload.starts_with(&format!("{n} ")), "{n}: {payload}");
    }
    broker.restart(false);
    assert_eq!(broker.stats().bytes, 0, "everything was given back");
}

#[tokio::test(start_paused = true)]
async fn retained_messages_have_half_of_the_memory() {
    let broker = EmbeddedBroker::start(EmbeddedOptions::default().within(100_000));
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for n in 0..200 {
        publisher.retain(&format!("r/{n}"), &"x".repeat(1000)).await;
    }
    publisher.quiet().await;
    let stats = broker.stats();
    assert!(stats.retained > 40 && stats.bytes <= 50_000, "{stats:?}");
    assert_eq!(stats.retained as u64 + stats.dropped_full, 200);
}

#[tokio::test(start_paused = true)]
async fn options_can_change() {
    let broker = EmbeddedBroker::start(EmbeddedOptions::default());
    let (mut c, _) = Client::connect(&broker, &v5("c")).await;
    broker.set_options(EmbeddedOptions {
        quirks: Quirks {
            refuse_v5: RefuseV5::ReasonCode,
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    });
    c.publish("t", "x", 1, 1).await;
    assert_eq!(c.next().await, Got::Ack(AckKind::Puback, 1, 0x10));
    let (_, got) = Client::try_connect(&broker, &v5("d")).await;
    assert_eq!(
        got,
        Got::Connack {
            present: false,
            reason: 0x84
        }
    );
}

#[tokio::test(start_paused = true)]
async fn shared_subscriptions() {
    let broker = EmbeddedBroker::start(EmbeddedOptions::default());
    let mut members = Vec::new();
    for name in ["a", "b"] {
        let (mut member, _) = Client::connect(&broker, &v5(name)).await;
        let suback = member
            .subscribe(Some(9), &[("$share/g/t/+", options(1))])
            .await;
        assert_eq!(suback, [1]);
        members.push(member);
    }
    let (mut other, _) = Client::connect(&broker, &v5("other")).await;
    other.subscribe(None, &[("$share/h/t/#", options(0))]).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for n in 1..=4 {
        publisher.publish("t/x", &n.to_string(), 1, n).await;
        publisher.next().await;
    }
    for (member, expected) in members.iter_mut().zip([["1", "3"], ["2", "4"]]) {
        for payload in expected {
            let got = member.publish_got().await;
            assert_eq!((got.payload.as_str(), got.ids), (payload, vec![9]));
        }
        member.quiet().await;
    }
    for n in 1..=4 {
        assert_eq!(other.publish_got().await.payload, n.to_string());
    }
    // The one that is left gets all.
    drop(members.remove(0));
    members[0].quiet().await;
    for n in 5..=6 {
        publisher.publish("t/x", &n.to_string(), 1, n).await;
        publisher.next().await;
        assert_eq!(members[0].publish_got().await.payload, n.to_string());
    }

    let dead = EmbeddedBroker::start(EmbeddedOptions {
        quirks: Quirks {
            shared: Shared::Dead,
            ..Quirks::default()
        },
        ..EmbeddedOptions::default()
    });
    let (mut sub, _) = Client::connect(&dead, &v5("s")).await;
    assert_eq!(
        sub.subscribe(None, &[("$share/g/t", options(1))]).await,
        [1]
    );
    sub.publish("t", "x", 1, 1).await;
    assert_eq!(sub.next().await, Got::Ack(AckKind::Puback, 1, 0x10));
    sub.quiet().await;
}
