//! Publish, subscribe, retained messages, windows.

use std::time::Duration;

use tidegate::embedded::{EmbeddedBroker, EmbeddedOptions};
use tidegate::mqtt::{
    AckKind, Alias, Connect, Delivery, Message, MessageSpec, Packet, Properties, QoS, ReasonCode,
    SubscribeOptions, Version, encode_ack, encode_disconnect, encode_pingreq, encode_subscribe,
    encode_unsubscribe,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::embedded::client::{Client, Got, kept, options, v5};

fn broker() -> EmbeddedBroker {
    EmbeddedBroker::start(EmbeddedOptions::default())
}

#[tokio::test(start_paused = true)]
async fn every_qos_both_ways() {
    let broker = broker();
    let (mut sub, _) = Client::connect(&broker, &v5("sub")).await;
    let codes = sub
        .subscribe(Some(268_435_455), &[("a/+", options(2)), ("b", options(1))])
        .await;
    assert_eq!(codes, [2, 1]);
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;

    publisher.publish("a/0", "zero", 0, 0).await;
    let got = sub.publish_got().await;
    assert_eq!((got.payload.as_str(), got.qos, got.id), ("zero", 0, 0));
    assert_eq!(got.ids, [268_435_455]);

    publisher.publish("a/1", "one", 1, 10).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 10, 0));
    let got = sub.publish_got().await;
    assert_eq!((got.payload.as_str(), got.qos), ("one", 1));
    sub.ack(AckKind::Puback, got.id).await;

    publisher.publish("a/2", "two", 2, 11).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, 11, 0));
    // The same again before PUBREL is not passed on again.
    let again = Delivery {
        dup: true,
        ..publisher.delivery(2, 11)
    };
    publisher.publish_as(again, "a/2", "two").await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, 11, 0));
    publisher.ack(AckKind::Pubrel, 11).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubcomp, 11, 0));
    publisher.ack(AckKind::Pubrel, 11).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubcomp, 11, 0x92));
    let got = sub.publish_got().await;
    assert_eq!((got.payload.as_str(), got.qos), ("two", 2));
    sub.ack(AckKind::Pubrec, got.id).await;
    assert_eq!(sub.next().await, Got::Ack(AckKind::Pubrel, got.id, 0));
    sub.ack(AckKind::Pubcomp, got.id).await;
    sub.quiet().await;

    // The subscription's QoS is the highest.
    publisher.publish("b", "down", 2, 12).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Pubrec, 12, 0));
    assert_eq!(sub.publish_got().await.qos, 1);

    publisher.publish("nobody", "", 1, 13).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 13, 0x10));

    assert_eq!(sub.unsubscribe("a/+").await, [0]);
    assert_eq!(sub.unsubscribe("a/+").await, [0x11]);
    publisher.publish("a/0", "late", 0, 0).await;
    sub.quiet().await;

    let stats = broker.stats();
    assert_eq!(
        (stats.connects, stats.connections, stats.sessions),
        (2, 2, 2)
    );
    assert_eq!((stats.subscribes, stats.unsubscribes), (1, 2));
    assert_eq!((stats.subscriptions, stats.published), (1, 6));
    // One QoS 1 message was never acknowledged.
    assert_eq!((stats.delivered, stats.queued), (4, 1));
}

#[tokio::test(start_paused = true)]
async fn options_of_a_subscription() {
    let broker = broker();
    let (mut a, _) = Client::connect(&broker, &v5("a")).await;
    let (mut b, _) = Client::connect(&broker, &v5("b")).await;
    let own = SubscribeOptions {
        no_local: true,
        retain_as_published: true,
        ..options(1)
    };
    a.subscribe(None, &[("t", own)]).await;
    b.subscribe(None, &[("t", options(0))]).await;
    a.retain("t", "x").await;
    a.quiet().await;
    assert!(!b.publish_got().await.retain);
    b.retain("t", "y").await;
    assert!(a.publish_got().await.retain);
    assert_eq!(b.publish_got().await.payload, "y");
    assert_eq!(a.subscribe(None, &[("$share/g/t", options(1))]).await, [1]);
}

#[tokio::test(start_paused = true)]
async fn properties_and_expiry_travel() {
    let broker = broker();
    let (mut keeper, _) = Client::connect(&broker, &kept("keeper")).await;
    keeper.subscribe(None, &[("t/#", options(1))]).await;
    drop(keeper);
    tokio::time::sleep(Duration::from_millis(1)).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    for (id, expiry) in [(1, 5), (2, 60)] {
        let delivery = Delivery {
            message_expiry: Some(expiry),
            user_property: Some(("k", "v")),
            ..publisher.delivery(1, id)
        };
        publisher.publish_as(delivery, "t/x", "m").await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, id, 0));
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (mut keeper, present) = Client::connect(&broker, &kept("keeper")).await;
    assert!(present);
    let got = keeper.publish_got().await;
    assert_eq!(got.expiry, Some(50));
    assert_eq!(got.user, [("k".to_owned(), "v".to_owned())]);
    keeper.quiet().await;
    assert_eq!(broker.stats().dropped_expired, 1);
}

#[tokio::test(start_paused = true)]
async fn retained_messages() {
    let broker = broker();
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    publisher.retain("r/1", "one").await;
    publisher.retain("r/2", "two").await;
    publisher.retain("$r/3", "hidden").await;
    let brief = Delivery {
        retain: true,
        message_expiry: Some(5),
        ..publisher.delivery(0, 0)
    };
    publisher.publish_as(brief, "r/brief", "b").await;
    publisher.quiet().await;
    assert_eq!(broker.stats().retained, 4);

    let (mut sub, _) = Client::connect(&broker, &v5("sub")).await;
    sub.subscribe(Some(5), &[("#", options(2))]).await;
    let mut found = Vec::new();
    for _ in 0..3 {
        let got = sub.publish_got().await;
        assert!(got.retain && got.ids == [5]);
        found.push(got.topic);
    }
    found.sort();
    assert_eq!(found, ["r/1", "r/2", "r/brief"]);
    sub.quiet().await;

    tokio::time::sleep(Duration::from_secs(6)).await;
    publisher.retain("r/2", "").await;
    assert_eq!(sub.publish_got().await.payload, "");
    let handling = |retain_handling| SubscribeOptions {
        retain_handling,
        ..options(0)
    };
    sub.subscribe(None, &[("#", handling(1))]).await;
    sub.quiet().await;
    sub.subscribe(None, &[("r/+", handling(2))]).await;
    sub.quiet().await;
    sub.subscribe(None, &[("r/#", handling(1))]).await;
    assert_eq!(sub.publish_got().await.payload, "one");
    sub.quiet().await;
    // r/1 and $r/3; the expired one went with the last look.
    assert_eq!(broker.stats().retained, 2);
    broker.clear_retained();
    sub.subscribe(None, &[("r/1", handling(0))]).await;
    sub.quiet().await;
}

#[tokio::test(start_paused = true)]
async fn the_clients_limits_hold() {
    let broker = broker();
    let (mut sub, _) = Client::connect(
        &broker,
        &Connect {
            receive_maximum: Some(2),
            maximum_packet_size: Some(40),
            ..v5("sub")
        },
    )
    .await;
    sub.subscribe(None, &[("t", options(1))]).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    publisher.publish("t", &"x".repeat(60), 1, 9).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 9, 0));
    for id in 1..=5 {
        publisher.publish("t", &id.to_string(), 1, id).await;
        assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, id, 0));
    }
    let first = sub.publish_got().await;
    let second = sub.publish_got().await;
    assert_eq!(
        (first.payload.as_str(), second.payload.as_str()),
        ("1", "2")
    );
    sub.quiet().await;
    // Acknowledged out of order.
    sub.ack(AckKind::Puback, second.id).await;
    let third = sub.publish_got().await;
    assert_eq!(third.payload, "3");
    sub.quiet().await;
    sub.ack(AckKind::Puback, first.id).await;
    sub.ack(AckKind::Puback, third.id).await;
    assert_eq!(sub.publish_got().await.payload, "4");
    assert_eq!(sub.publish_got().await.payload, "5");
    assert_eq!(broker.stats().dropped_too_large, 1);
}

#[tokio::test(start_paused = true)]
async fn topic_aliases() {
    let broker = broker();
    let (mut sub, _) = Client::connect(&broker, &v5("sub")).await;
    sub.subscribe(None, &[("t/#", options(0))]).await;
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    let by = |alias| Delivery {
        alias,
        ..publisher.delivery(0, 0)
    };
    let (define, again, used, above) = (
        by(Alias::Define(10)),
        by(Alias::Define(10)),
        by(Alias::Use(10)),
        by(Alias::Define(11)),
    );
    publisher.publish_as(define, "t/1", "a").await;
    publisher.publish_as(used, "-", "b").await;
    publisher.publish_as(again, "t/2", "c").await;
    publisher.publish_as(used, "-", "d").await;
    for (topic, payload) in [("t/1", "a"), ("t/1", "b"), ("t/2", "c"), ("t/2", "d")] {
        let got = sub.publish_got().await;
        assert_eq!((got.topic.as_str(), got.payload.as_str()), (topic, payload));
    }
    publisher.publish_as(above, "t/3", "e").await;
    assert_eq!(publisher.next().await, Got::Disconnect(0x94));
    assert_eq!(publisher.next().await, Got::Closed);
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    publisher.publish_as(used, "-", "f").await;
    assert_eq!(publisher.next().await, Got::Disconnect(0x82));
}

#[tokio::test(start_paused = true)]
async fn keep_alive_and_silence() {
    let broker = broker();
    let connect = Connect {
        keep_alive: 2,
        ..v5("c")
    };
    let (mut client, _) = Client::connect(&broker, &connect).await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(2900)).await;
        client.send(encode_pingreq).await;
        assert_eq!(client.next().await, Got::Pingresp);
    }
    let from = tokio::time::Instant::now();
    assert_eq!(client.next().await, Got::Disconnect(0x8D));
    let waited = from.elapsed();
    assert!((Duration::from_secs(3)..Duration::from_millis(3200)).contains(&waited));

    let mut silent = Client::open(&broker, Version::V5);
    let from = tokio::time::Instant::now();
    silent.send(|out| out.push(0x10)).await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    silent.send(|out| out.push(0x7F)).await;
    assert_eq!(silent.next().await, Got::Closed);
    assert!(from.elapsed() < Duration::from_secs(11));
}

#[tokio::test(start_paused = true)]
async fn three_dot_x() {
    let broker = broker();
    let old = |version| Connect {
        version,
        clean_start: false,
        client_id: "old",
        ..Connect::default()
    };
    let (mut sub, present) = Client::connect(&broker, &old(Version::V31)).await;
    assert!(!present);
    assert_eq!(sub.subscribe(None, &[("t", options(2))]).await, [2]);
    drop(sub);
    let (mut publisher, _) = Client::connect(&broker, &v5("pub")).await;
    publisher.publish("t", "kept", 1, 1).await;
    assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, 1, 0));
    tokio::time::sleep(Duration::from_secs(1_000_000)).await;
    let (mut sub, present) = Client::connect(&broker, &old(Version::V311)).await;
    assert!(present);
    let got = sub.publish_got().await;
    assert_eq!(
        (got.payload.as_str(), got.qos, got.ids.len()),
        ("kept", 1, 0)
    );
    assert_eq!(
        sub.subscribe(None, &[("$share/g/t", options(2))]).await,
        [2]
    );
    assert_eq!(sub.unsubscribe("nothing").await, Vec::<u8>::new());
    drop(sub);

    let nameless = Connect {
        client_id: "",
        ..old(Version::V311)
    };
    let (_, got) = Client::try_connect(&broker, &nameless).await;
    assert_eq!(
        got,
        Got::Connack {
            present: false,
            reason: 0x85
        }
    );
}

#[tokio::test(start_paused = true)]
async fn an_assigned_client_id_is_returned() {
    let broker = broker();
    let mut client = Client::open(&broker, Version::V5);
    client.send(|out| v5("").encode(out)).await;
    let id = client
        .next_with(|packet| match packet {
            Packet::Connack(c) => c.assigned_client_id.map(str::to_owned),
            other => panic!("{other:?}"),
        })
        .await;
    assert!(id.flatten().is_some_and(|id| id.starts_with("embedded-")));
}

#[tokio::test(start_paused = true)]
async fn bad_input_is_refused() {
    let broker = broker();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xC0, 0],
        &[0x10, 0xFF, 0xFF, 0xFF, 0xFF, 1],
    ] {
        let mut client = Client::open(&broker, Version::V311);
        client.send(|out| out.extend_from_slice(bytes)).await;
        assert_eq!(client.next().await, Got::Closed);
    }
    let mut future = Client::open(&broker, Version::V311);
    future
        .send(|out| out.extend_from_slice(b"\x10\x0D\x00\x04MQTT\x06\x02\x00\x00\x00\x00\x00"))
        .await;
    assert_eq!(
        future.next().await,
        Got::Connack {
            present: false,
            reason: 0x84
        }
    );

    let (mut twice, _) = Client::connect(&broker, &v5("twice")).await;
    twice.send(|out| v5("twice").encode(out)).await;
    assert_eq!(twice.next().await, Got::Disconnect(0x82));
    let (mut odd, _) = Client::connect(&broker, &v5("odd")).await;
    odd.send(|out| out.extend_from_slice(&[0x62, 0x01, 0x00]))
        .await;
    assert_eq!(odd.next().await, Got::Disconnect(0x81));
    let method = Connect {
        authentication_method: Some("SCRAM"),
        ..v5("m")
    };
    let (_, got) = Client::try_connect(&broker, &method).await;
    assert_eq!(
        got,
        Got::Connack {
            present: false,
            reason: 0x8C
        }
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(broker.stats().connections, 0);
}

/// Whole conversations with some of their bytes changed: the broker answers,
/// refuses or waits, and serves the next client.
#[tokio::test(start_paused = true)]
async fn no_bytes_hurt() {
    let broker = broker();
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    let mut below = move |n: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % n as u64) as usize
    };
    let mut script = Vec::new();
    v5("victim").encode(&mut script);
    let after_connect = script.len();
    let filters = [("a/#", options(2)), ("$share/g/b", options(1))];
    encode_subscribe(Version::V5, 1, Some(2), filters.into_iter(), &mut script);
    for qos in 0..3u8 {
        let message = Message::new(&MessageSpec {
            topic: "a/b",
            properties: Properties::default(),
            payload: b"payload",
            qos: QoS::from_u8(qos).expect("0 to 2"),
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let delivery = Delivery {
            version: Version::V5,
            dup: false,
            qos: message.qos(),
            retain: true,
            packet_id: u16::from(qos),
            alias: Alias::Define(3),
            message_expiry: Some(9),
            subscription_ids: &[],
            user_property: Some(("k", "v")),
            hidden: 0,
        };
        delivery.encode(&message, &mut script);
    }
    for kind in [
        AckKind::Pubrel,
        AckKind::Puback,
        AckKind::Pubrec,
        AckKind::Pubcomp,
    ] {
        encode_ack(Version::V5, kind, 2, ReasonCode::SUCCESS, None, &mut script);
    }
    encode_unsubscribe(Version::V5, 3, std::iter::once("a/#"), &mut script);
    encode_pingreq(&mut script);
    encode_disconnect(Version::V5, ReasonCode::SUCCESS, Some(1), None, &mut script);

    for round in 0..3000 {
        let mut bytes = script.clone();
        // Now and then the CONNECT too.
        let from = if round % 4 == 0 { 0 } else { after_connect };
        for _ in 0..1 + below(3) {
            let at = from + below(bytes.len() - from);
            bytes[at] = below(256) as u8;
        }
        bytes.truncate(bytes.len() - below(2) * below(40));
        let mut io = broker.connect();
        for piece in bytes.chunks(1 + below(50)) {
            if io.write_all(piece).await.is_err() {
                break;
            }
        }
        let mut answer = Vec::new();
        let wait = io.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_millis(5), wait).await;
    }
    let (mut client, _) = Client::connect(&broker, &v5("after")).await;
    client.publish("z", "x", 1, 1).await;
    assert_eq!(client.next().await, Got::Ack(AckKind::Puback, 1, 0x10));
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(broker.stats().connections, 1);
}

/// Many tasks on real threads: no wake-up is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_message_reaches_everyone() {
    const COUNT: u16 = 1000;
    const CLIENTS: usize = 4;
    let broker = broker();
    let mut readers = Vec::new();
    for n in 0..CLIENTS {
        let id = format!("sub{n}");
        let connect = Connect {
            receive_maximum: Some(7),
            ..v5(&id)
        };
        let (mut sub, _) = Client::connect(&broker, &connect).await;
        sub.subscribe(None, &[("t/#", options(1))]).await;
        readers.push(tokio::spawn(async move {
            let mut last = [0; CLIENTS];
            for _ in 0..COUNT * CLIENTS as u16 {
                let got = sub.publish_got().await;
                let from: usize = got.topic[2..].parse().expect("a number");
                last[from] += 1;
                assert_eq!(got.payload, last[from].to_string());
                sub.ack(AckKind::Puback, got.id).await;
            }
        }));
    }
    for n in 0..CLIENTS {
        let broker = broker.clone();
        readers.push(tokio::spawn(async move {
            let (mut publisher, _) = Client::connect(&broker, &v5(&format!("pub{n}"))).await;
            for id in 1..=COUNT {
                publisher
                    .publish(&format!("t/{n}"), &id.to_string(), 1, id)
                    .await;
                assert_eq!(publisher.next().await, Got::Ack(AckKind::Puback, id, 0));
            }
        }));
    }
    for reader in readers {
        let done = tokio::time::timeout(Duration::from_secs(60), reader).await;
        done.expect("all in time").expect("no assertion failed");
    }
}
