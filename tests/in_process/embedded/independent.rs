//! The broker behind a real port, with a client that we did not write.

use std::time::Duration;

use tidegate::embedded::{EmbeddedBroker, EmbeddedOptions};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

const COUNT: usize = 300;
const PATIENCE: Duration = Duration::from_secs(60);

async fn serve() -> (EmbeddedBroker, u16) {
    let broker = EmbeddedBroker::start(EmbeddedOptions::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(broker.clone().serve_tcp(listener));
    (broker, port)
}

/// The packets that arrived, as text, and a word for each acknowledgement that a test awaits.
async fn next(events: &mut mpsc::Receiver<String>) -> String {
    tokio::time::timeout(PATIENCE, events.recv())
        .await
        .expect("an event in time")
        .expect("the client runs")
}

async fn until(events: &mut mpsc::Receiver<String>, wanted: &str) {
    while next(events).await != wanted {}
}

/// Every delivery has been acknowledged.
async fn settled(broker: &EmbeddedBroker) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while broker.stats().queued > 0 {
        assert!(tokio::time::Instant::now() < deadline, "{broker:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

mod v3 {
    use rumqttc::{AsyncClient, Event, EventLoop, Incoming, MqttOptions, QoS};

    use super::*;

    fn client(id: &str, port: u16, clean: bool) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(id, "127.0.0.1", port);
        options.set_clean_session(clean);
        AsyncClient::new(options, 100)
    }

    fn run(mut events: EventLoop) -> (mpsc::Receiver<String>, JoinHandle<()>) {
        let (tx, rx) = mpsc::channel(10_000);
        let task = tokio::spawn(async move {
            loop {
                let event = match events.poll().await {
                    Ok(event) => event,
                    Err(error) => return eprintln!("the client ends: {error}"),
                };
                let word = match event {
                    Event::Incoming(Incoming::ConnAck(c)) => format!("up {}", c.session_present),
                    Event::Incoming(Incoming::SubAck(_)) => "subscribed".into(),
                    Event::Incoming(Incoming::PubAck(_)) => "puback".into(),
                    Event::Incoming(Incoming::PubComp(_)) => "pubcomp".into(),
                    Event::Incoming(Incoming::Publish(p)) => format!(
                        "{} {} {}",
                        p.topic,
                        p.qos as u8,
                        String::from_utf8_lossy(&p.payload)
                    ),
                    _ => continue,
                };
                if tx.send(word).await.is_err() {
                    return;
                }
            }
        });
        (rx, task)
    }

    #[tokio::test]
    async fn publishes_subscribes_and_resumes() {
        let (broker, port) = serve().await;
        let (sub, events) = client("sub", port, false);
        let (mut got, task) = run(events);
        assert_eq!(next(&mut got).await, "up false");
        sub.subscribe("n/+", QoS::ExactlyOnce)
            .await
            .expect("queued");
        until(&mut got, "subscribed").await;

        let (publisher, events) = client("pub", port, true);
        let (mut acks, _running) = run(events);
        for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
            let topic = format!("n/{}", qos as u8);
            for n in 0..COUNT {
                let payload = n.to_string();
                publisher
                    .publish(&topic, qos, false, payload)
                    .await
                    .expect("queued");
            }
            for n in 0..COUNT {
                assert_eq!(next(&mut got).await, format!("{topic} {} {n}", qos as u8));
            }
        }
        // Away, unannounced; the messages of the gap wait. This client forgets
        // its state, so nothing may be open.
        settled(&broker).await;
        task.abort();
        let _ = task.await;
        for n in 0..COUNT {
            let payload = n.to_string();
            publisher
                .publish("n/1", QoS::AtLeastOnce, false, payload)
                .await
                .expect("queued");
        }
        let (mut pubacks, mut pubcomps) = (0, 0);
        while (pubacks, pubcomps) != (2 * COUNT, COUNT) {
            match next(&mut acks).await.as_str() {
                "puback" => pubacks += 1,
                "pubcomp" => pubcomps += 1,
                _ => {}
            }
        }
        let (_sub, events) = client("sub", port, false);
        let (mut got, _running) = run(events);
        assert_eq!(next(&mut got).await, "up true");
        for n in 0..COUNT {
            assert_eq!(next(&mut got).await, format!("n/1 1 {n}"));
        }
        let stats = broker.stats();
        assert_eq!((stats.sessions, stats.dropped_full), (2, 0));
    }

    #[tokio::test]
    async fn retained_and_will() {
        let (_core, port) = serve().await;
        let (publisher, events) = client("pub", port, true);
        let (mut acks, _running) = run(events);
        publisher
            .publish("state", QoS::AtLeastOnce, true, "on")
            .await
            .expect("queued");
        until(&mut acks, "puback").await;
        let mut options = MqttOptions::new("mortal", "127.0.0.1", port);
        options.set_last_will(rumqttc::LastWill::new(
            "last",
            "bye",
            QoS::AtLeastOnce,
            false,
        ));
        let (_mortal, events) = AsyncClient::new(options, 10);
        let (mut up, task) = run(events);
        until(&mut up, "up false").await;
        let (sub, events) = client("sub", port, true);
        let (mut got, _running) = run(events);
        sub.subscribe("#", QoS::AtLeastOnce).await.expect("queued");
        until(&mut got, "subscribed").await;
        assert_eq!(next(&mut got).await, "state 1 on");
        task.abort();
        assert_eq!(next(&mut got).await, "last 1 bye");
    }
}

mod v5 {
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::{ConnectProperties, PublishProperties, SubscribeProperties};
    use rumqttc::v5::{AsyncClient, Event, EventLoop, Incoming, MqttOptions};

    use super::*;

    fn client(id: &str, port: u16, kept: bool) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(id, "127.0.0.1", port);
        options.set_clean_start(!kept);
        let mut properties = ConnectProperties::new();
        properties.session_expiry_interval = kept.then_some(600);
        properties.receive_maximum = Some(10);
        options.set_connect_properties(properties);
        AsyncClient::new(options, 100)
    }

    fn run(mut events: EventLoop) -> (mpsc::Receiver<String>, JoinHandle<()>) {
        let (tx, rx) = mpsc::channel(10_000);
        let task = tokio::spawn(async move {
            loop {
                let event = match events.poll().await {
                    Ok(event) => event,
                    Err(error) => return eprintln!("the client ends: {error}"),
                };
                let word = match event {
                    Event::Incoming(Incoming::ConnAck(c)) => format!("up {}", c.session_present),
                    Event::Incoming(Incoming::SubAck(_)) => "subscribed".into(),
                    Event::Incoming(Incoming::PubAck(_)) => "puback".into(),
                    Event::Incoming(Incoming::Publish(p)) => {
                        let properties = p.properties.unwrap_or_default();
                        format!(
                            "{} {} {:?} {:?} {:?}",
                            String::from_utf8_lossy(&p.topic),
                            String::from_utf8_lossy(&p.payload),
                            properties.subscription_identifiers,
                            properties.content_type,
                            properties.user_properties,
                        )
                    }
                    _ => continue,
                };
                if tx.send(word).await.is_err() {
                    return;
                }
            }
        });
        (rx, task)
    }

    #[tokio::test]
    async fn identifiers_properties_and_resume() {
        let (broker, port) = serve().await;
        let (sub, events) = client("sub", port, true);
        let (mut got, task) = run(events);
        for (filter, id) in [("a/#", 1), ("a/b", 200)] {
            let properties = SubscribeProperties {
                id: Some(id),
                user_properties: Vec::new(),
            };
            sub.subscribe_with_properties(filter, QoS::AtLeastOnce, properties)
                .await
                .expect("queued");
            until(&mut got, "subscribed").await;
        }
        let (publisher, events) = client("pub", port, false);
        let (mut acks, _running) = run(events);
        let properties = PublishProperties {
            content_type: Some("text".into()),
            user_properties: vec![("k".into(), "v".into())],
            ..PublishProperties::default()
        };
        publisher
            .publish_with_properties("a/b", QoS::AtLeastOnce, false, "x", properties)
            .await
            .expect("queued");
        let rest = r#"Some("text") [("k", "v")]"#;
        let mut both = [next(&mut got).await, next(&mut got).await];
        both.sort();
        assert_eq!(
            both,
            [format!("a/b x [1] {rest}"), format!("a/b x [200] {rest}")]
        );
        until(&mut acks, "puback").await;

        settled(&broker).await;
        task.abort();
        let _ = task.await;
        for n in 0..COUNT {
            let payload = n.to_string();
            publisher
                .publish("a/c", QoS::AtLeastOnce, false, payload)
                .await
                .expect("queued");
            until(&mut acks, "puback").await;
        }
        let (_sub, events) = client("sub", port, true);
        let (mut got, _running) = run(events);
        assert_eq!(next(&mut got).await, "up true");
        for n in 0..COUNT {
            assert_eq!(next(&mut got).await, format!("a/c {n} [1] None []"));
        }
        settled(&broker).await;
    }
}
