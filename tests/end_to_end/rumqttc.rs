//! rumqttc, an independent client, in front of the binary with mosquitto behind it.

use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS as QoS5;
use rumqttc::v5::{
    AsyncClient as Client5, Event as Event5, EventLoop as Loop5, Incoming as Incoming5,
    MqttOptions as Options5,
};
use rumqttc::{AsyncClient, Event, Incoming, MqttOptions, QoS};
use tidegate_kit::process::{Mosquitto, Tidegate, TidegateConfig};

const COUNT: usize = 200;
const PATIENCE: Duration = Duration::from_secs(60);

fn start() -> (Mosquitto, Tidegate, u16) {
    let broker = Mosquitto::start().expect("mosquitto starts");
    let edge = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), &broker.url())
        .listen(&["tcp"])
        .start()
        .expect("tidegate starts");
    let port = edge.url("tcp").port;
    (broker, edge, port)
}

#[tokio::test]
async fn a_3_1_1_session_survives_its_connection() {
    let _machine = crate::beside_others().await;
    let (_broker, _edge, port) = start();
    let options = |clean| {
        let mut options = MqttOptions::new("rumqttc-3", "127.0.0.1", port);
        options.set_clean_session(clean);
        options
    };
    let (client, mut events) = AsyncClient::new(options(false), COUNT);
    client
        .subscribe("rumqttc/#", QoS::ExactlyOnce)
        .await
        .expect("it is queued");
    let until_subscribed = async {
        loop {
            let event = events.poll().await.expect("the connection stands");
            if matches!(event, Event::Incoming(Incoming::SubAck(_))) {
                return;
            }
        }
    };
    within(until_subscribed).await;
    // The connection is dropped without DISCONNECT.
    drop(events);
    drop(client);

    let (publisher, mut events) =
        AsyncClient::new(MqttOptions::new("pub-3", "127.0.0.1", port), COUNT);
    for n in 0..COUNT {
        let qos = [QoS::AtLeastOnce, QoS::ExactlyOnce][n % 2];
        publisher
            .publish(format!("rumqttc/{n}"), qos, false, n.to_string())
            .await
            .expect("it is queued");
    }
    let until_answered = async {
        let mut answered = 0;
        while answered < COUNT {
            let event = events.poll().await.expect("the connection stands");
            answered += usize::from(matches!(
                event,
                Event::Incoming(Incoming::PubAck(_) | Incoming::PubComp(_))
            ));
        }
    };
    within(until_answered).await;

    let (_client, mut events) = AsyncClient::new(options(false), COUNT);
    let all = within(async {
        let mut got = Vec::new();
        while got.len() < COUNT {
            match events.poll().await.expect("the connection stands") {
                Event::Incoming(Incoming::ConnAck(c)) => assert!(c.session_present),
                Event::Incoming(Incoming::Publish(p)) => {
                    let text = String::from_utf8_lossy(&p.payload).into_owned();
                    got.push(text.parse::<usize>().expect("a number"));
                }
                _ => {}
            }
        }
        got
    })
    .await;
    for qos in 0..2 {
        let of_qos: Vec<usize> = all.iter().copied().filter(|n| n % 2 == qos).collect();
        let expected: Vec<usize> = (qos..COUNT).step_by(2).collect();
        assert_eq!(of_qos, expected, "order holds per QoS, each message once");
    }
}

#[tokio::test]
async fn mqtt_5_both_ways() {
    let _machine = crate::beside_others().await;
    let (_broker, _edge, port) = start();
    let (client, mut events): (Client5, Loop5) =
        Client5::new(Options5::new("rumqttc-5", "127.0.0.1", port), COUNT);
    client
        .subscribe("five/+", QoS5::ExactlyOnce)
        .await
        .expect("it is queued");
    let (mut got, mut sent) = (Vec::new(), false);
    let exchange = async {
        while got.len() < COUNT {
            match events.poll().await.expect("the connection stands") {
                Event5::Incoming(Incoming5::SubAck(_)) if !sent => {
                    sent = true;
                    for n in 0..COUNT {
                        client
                            .try_publish(
                                format!("five/{n}"),
                                QoS5::ExactlyOnce,
                                false,
                                n.to_string(),
                            )
                            .expect("there is room");
                    }
                }
                Event5::Incoming(Incoming5::Publish(p)) => {
                    got.push(String::from_utf8_lossy(&p.payload).into_owned());
                }
                _ => {}
            }
        }
    };
    within(exchange).await;
    let expected: Vec<String> = (0..COUNT).map(|n| n.to_string()).collect();
    assert_eq!(got, expected);
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}
