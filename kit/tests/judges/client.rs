//! Tests of the judges: the kit's client, recorder and process helpers against mosquitto, rumqttc
//! and small relays for the transports that mosquitto does not speak.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use tidegate_kit::certs::Certs;
use tidegate_kit::client::{Client, ClientError};
use tidegate_kit::dial::{Dialer, Trust, Url};
use tidegate_kit::fleet::{Fleet, Plan};
use tidegate_kit::link::Cut;
use tidegate_kit::process::{Mosquitto, MosquittoConfig, TempDir};
use tidegate_kit::recorder::{Recorder, Toward};
use tidegate_kit::wire::{Ack, Connect, Packet, Version, Will, kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const VERSIONS: [Version; 3] = [Version::V31, Version::V311, Version::V5];

fn dialer(addr: SocketAddr) -> Dialer {
    let url: Url = format!("tcp://{addr}")
        .parse()
        .expect("the URL is well formed");
    Dialer::new(&url, &Trust::Anything).expect("an address resolves")
}

#[tokio::test]
async fn the_client_speaks_with_mosquitto_in_every_version() -> Result {
    let broker = Mosquitto::start()?;
    let dialer = dialer(broker.addr());
    for version in VERSIONS {
        let name = format!("v{}", version.level());
        let connect = |id: &str| Connect::new(format!("{name}-{id}")).version(version);
        let (mut listener, ack) = Client::connect(&dialer, &connect("sub")).await?;
        assert!(!ack.session_present);
        assert_eq!(
            listener.subscribe(&[&format!("{name}/#")], 2).await?.codes,
            [2]
        );
        let (mut speaker, _) = Client::connect(&dialer, &connect("pub")).await?;
        for qos in 0..3 {
            let topic = format!("{name}/{qos}");
            assert_eq!(speaker.publish(&topic, vec![qos; 3000], qos).await?, 0);
            let got = listener.next_publish().await?;
            assert_eq!(
                (&got.topic, got.qos, got.payload),
                (&topic, qos, vec![qos; 3000])
            );
            if qos == 2 {
                listener
                    .send(&Packet::PubRec(Ack {
                        id: got.id,
                        ..Ack::default()
                    }))
                    .await?;
                assert!(matches!(listener.next().await?, Packet::PubRel(a) if a.id == got.id));
                listener
                    .send(&Packet::PubComp(Ack {
                        id: got.id,
                        ..Ack::default()
                    }))
                    .await?;
            } else if qos == 1 {
                listener
                    .send(&Packet::PubAck(Ack {
                        id: got.id,
                        ..Ack::default()
                    }))
                    .await?;
            }
        }
        let codes = listener.unsubscribe(&[&format!("{name}/#")]).await?.codes;
        assert_eq!(codes.len(), usize::from(version.is_v5()));
        listener.ping().await?;
        speaker.disconnect().await?;
        listener.disconnect().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_reset_keeps_the_session_and_fires_the_will() -> Result {
    let broker = Mosquitto::start()?;
    let dialer = dialer(broker.addr());
    let (mut watcher, _) = Client::connect(&dialer, &Connect::new("watcher")).await?;
    watcher.subscribe(&["will"], 1).await?;
    let will = Will {
        topic: "will".into(),
        payload: b"gone".to_vec(),
        qos: 1,
        ..Will::default()
    };
    let connect = Connect::new("phone").expiry(300).clean(false).will(will);
    let (mut phone, _) = Client::connect(&dialer, &connect).await?;
    phone.subscribe(&["news"], 1).await?;
    phone.cut(Cut::Reset);
    assert_eq!(watcher.next_publish().await?.payload, b"gone");
    watcher.publish("news", "while away", 1).await?;
    let (mut phone, ack) = Client::connect(&dialer, &connect).await?;
    assert!(ack.session_present);
    let got = phone.next_publish().await?;
    assert_eq!(
        (got.payload.as_slice(), got.dup),
        (&b"while away"[..], false)
    );
    phone.cut(Cut::Reset);
    let (mut phone, _) = Client::connect(&dialer, &connect).await?;
    assert!(phone.next_publish().await?.dup, "it was not acknowledged");
    Ok(())
}

#[tokio::test]
async fn the_client_reports_a_refusal_and_logs_in_with_a_password() -> Result {
    let login = Some(("edge".to_owned(), "secret".to_owned()));
    let broker = MosquittoConfig {
        login,
        ..MosquittoConfig::default()
    }
    .start()?;
    let dialer = dialer(broker.addr());
    let refused = Client::connect(&dialer, &Connect::new("a").login("edge", "wrong")).await;
    assert!(matches!(refused, Err(ClientError::Refused(ack)) if ack.code == 0x87));
    Client::connect(&dialer, &Connect::new("a").login("edge", "secret")).await?;
    Ok(())
}

#[tokio::test]
async fn mosquitto_keeps_its_sessions_over_a_restart() -> Result {
    let config = MosquittoConfig {
        persistence: true,
        ..MosquittoConfig::default()
    };
    let mut broker = config.start()?;
    let dialer = dialer(broker.addr());
    let connect = Connect::new("phone").expiry(300).clean(false);
    Client::connect(&dialer, &connect)
        .await?
        .0
        .disconnect()
        .await?;
    broker.stop(false)?;
    broker.start_again()?;
    assert!(Client::connect(&dialer, &connect).await?.1.session_present);
    Ok(())
}

#[tokio::test]
async fn the_recorder_counts_every_change_that_a_flap_could_cause() -> Result {
    let broker = Mosquitto::start()?;
    let recorder = Recorder::start(broker.addr()).await?;
    let dialer = dialer(recorder.addr());
    let (mut link, _) = Client::connect(&dialer, &Connect::new("link")).await?;
    link.subscribe(&["a/#"], 1).await?;
    link.publish("a/b", "one", 1).await?;
    link.ping().await?;
    let before = recorder.snapshot();
    assert_eq!(before.to_broker[usize::from(kind::CONNECT)], 1);
    assert_eq!(
        (before.links[0].client_id.as_str(), before.links[0].level),
        ("link", 5)
    );
    assert_eq!(before.subscribed.get("a/#"), Some(&1));

    link.publish("a/b", "two", 1).await?;
    link.ping().await?;
    let quiet = recorder.snapshot().since(&before);
    assert!(quiet.is_quiet(), "{quiet}");
    assert_eq!(quiet.to_broker[usize::from(kind::PUBLISH)], 1);

    link.subscribe(&["c"], 0).await?;
    let diff = recorder.snapshot().since(&before);
    assert!(
        !diff.is_quiet() && diff.subscribed.contains_key("c"),
        "{diff}"
    );
    link.unsubscribe(&["c"]).await?;
    assert_eq!(
        recorder.snapshot().since(&before).unsubscribed.get("c"),
        Some(&1)
    );

    let before = recorder.snapshot();
    link.publish("a/b", "two", 1).await?;
    let diff = recorder.snapshot().since(&before);
    assert_eq!(diff.second_copies, 1);
    assert_eq!(diff.second_copies_seen[0].payload, "two");
    assert!(
        !diff.is_quiet() && diff.to_string().contains("two"),
        "{diff}"
    );

    let before = recorder.snapshot();
    recorder.watch("b/");
    link.publish("a/b", "two", 1).await?;
    assert!(recorder.snapshot().since(&before).is_quiet());

    Client::connect(&dialer, &Connect::new("other").version(Version::V311)).await?;
    let diff = recorder.snapshot().since(&before);
    assert!(!diff.is_quiet());
    assert_eq!(
        (diff.links[0].client_id.as_str(), diff.links[0].level),
        ("other", 4)
    );
    Ok(())
}

#[tokio::test]
async fn the_recorder_delays_pauses_cuts_and_refuses() -> Result {
    let broker = Mosquitto::start()?;
    let recorder = Recorder::start(broker.addr()).await?;
    let dialer = dialer(recorder.addr());
    let (mut link, _) = Client::connect(&dialer, &Connect::new("link")).await?;
    let delay = Duration::from_millis(150);
    recorder.delay_acks(delay);
    let start = Instant::now();
    link.publish("a", "1", 1).await?;
    assert!(start.elapsed() >= delay);
    recorder.delay_acks(Duration::ZERO);

    recorder.pause(Toward::Broker, true);
    link.send(&Packet::PingReq).await?;
    assert_eq!(link.next_within(Duration::from_millis(100)).await?, None);
    recorder.pause(Toward::Broker, false);
    assert_eq!(link.next().await?, Packet::PingResp);

    recorder.cut();
    assert!(link.next().await.is_err());
    recorder.refuse(true);
    assert!(
        Client::connect(&dialer, &Connect::new("link"))
            .await
            .is_err()
    );
    recorder.refuse(false);
    Client::connect(&dialer, &Connect::new("link"))
        .await?
        .0
        .ping()
        .await?;
    Ok(())
}

#[tokio::test]
async fn rumqttc_and_the_kit_understand_each_other() -> Result {
    let broker = Mosquitto::start()?;
    let recorder = Recorder::start(broker.addr()).await?;
    let (mut ours, _) = Client::connect(&dialer(broker.addr()), &Connect::new("ours")).await?;
    ours.subscribe(&["from/theirs"], 1).await?;
    let addr = recorder.addr();
    let options = rumqttc::v5::MqttOptions::new("theirs", addr.ip().to_string(), addr.port());
    let (client, mut events) = rumqttc::v5::AsyncClient::new(options, 16);
    let qos = rumqttc::v5::mqttbytes::QoS::AtLeastOnce;
    client.subscribe("from/ours", qos).await?;
    client.publish("from/theirs", qos, false, "hello").await?;
    let theirs = tokio::spawn(async move {
        loop {
            use rumqttc::v5::{Event, Incoming};
            match events.poll().await {
                Ok(Event::Incoming(Incoming::Publish(p))) => return Ok(p.payload),
                Ok(_) => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    });
    assert_eq!(ours.next_publish().await?.payload, b"hello");
    ours.publish("from/ours", "hi", 1).await?;
    assert_eq!(
        &tokio::time::timeout(Duration::from_secs(10), theirs).await???[..],
        b"hi"
    );
    let seen = recorder.snapshot();
    assert!(seen.illegal.is_empty(), "{:?}", seen.illegal);
    assert_eq!(seen.subscribed.get("from/ours"), Some(&1));
    Ok(())
}

#[tokio::test]
async fn a_fleet_without_a_proxy_finds_the_faults_that_flaps_cause() -> Result {
    let broker = MosquittoConfig {
        max_inflight_messages: Some(500),
        ..MosquittoConfig::default()
    };
    let broker = broker.start()?;
    let recorder = Recorder::start(broker.addr()).await?;
    recorder.watch("fleet/");
    let plan = Plan {
        clients: 12,
        group: 6,
        flaps: 60,
        flap_rate: 30.0,
        rate: 100.0,
        aimed: 3,
        will_delay: 4,
        ack_delay: Duration::from_millis(200),
        cuts: vec![Cut::Reset, Cut::Silent],
        prefix: "fleet".to_owned(),
        seed: 5,
    };
    recorder.delay_acks(plan.ack_delay);
    let edge = Arc::new(dialer(recorder.addr()));
    let mut fleet = Fleet::gather(plan, edge, &dialer(broker.addr())).await?;
    fleet.warm_up().await;
    let before = recorder.snapshot();
    fleet.flap().await?;
    fleet.come_to_rest(Duration::from_secs(10)).await;
    let diff = recorder.snapshot().since(&before);
    let verdict = fleet.judge().await;
    // mosquitto keeps its sessions, but no proxy shields it from the flaps.
    assert_eq!(verdict.flaps, 60, "{verdict}");
    assert!(verdict.resumes > 0 && verdict.duplicates > 0, "{verdict}");
    assert!(diff.to_broker[usize::from(kind::CONNECT)] >= 60, "{diff}");
    assert!(diff.to_broker[usize::from(kind::SUBSCRIBE)] > 0, "{diff}");
    assert!(diff.second_copies > 0 && !diff.is_quiet(), "{diff}");
    // A publish that is sent twice arrives twice, and the audit shows it.
    assert!(
        verdict
            .faults
            .iter()
            .any(|f| f.starts_with("at the broker")),
        "{verdict}"
    );
    assert!(
        !verdict
            .faults
            .iter()
            .any(|f| f.contains("lost") || f.contains("will")),
        "{verdict}"
    );
    Ok(())
}

/// One exchange and one reset over a URL behind which mosquitto answers.
async fn exercise(url: &str, trust: &Trust) -> Result {
    let dialer = Dialer::new(&url.parse()?, trust)?;
    let connect = Connect::new("phone").expiry(60).clean(false);
    let (mut phone, _) = Client::connect(&dialer, &connect).await?;
    phone.subscribe(&["t"], 1).await?;
    for (i, cut) in [Cut::Reset, Cut::Close, Cut::Silent]
        .into_iter()
        .enumerate()
    {
        let payload = vec![i as u8; 40_000];
        phone.publish("t", payload.clone(), 1).await?;
        let got = phone.next_publish().await?;
        assert_eq!(got.payload, payload, "{url}");
        phone.acknowledge(&got).await?;
        phone.ping().await?;
        let abandoned = phone.cut(cut);
        let ack;
        (phone, ack) = Client::connect(&dialer, &connect).await?;
        assert!(ack.session_present, "{url} {cut:?}");
        drop(abandoned);
    }
    phone.disconnect().await?;
    Ok(())
}

#[tokio::test]
async fn the_client_speaks_over_tcp_and_tls() -> Result {
    let broker = Mosquitto::start()?;
    exercise(&format!("tcp://{}", broker.addr()), &Trust::Anything).await?;
    let dir = TempDir::new("certs")?;
    let certs = Certs::make(dir.path())?;
    let tls = Some(certs.clone());
    let broker = MosquittoConfig {
        tls,
        ..MosquittoConfig::default()
    }
    .start()?;
    let url = format!("tls://localhost:{}", broker.port());
    exercise(&url, &Trust::ca(&certs.ca)?).await?;
    // A client that trusts another authority does not connect.
    let other = TempDir::new("certs")?;
    let wrong = Trust::ca(&Certs::make(other.path())?.ca)?;
    let refused = Dialer::new(&url.parse()?, &wrong)?.open().await;
    assert!(refused.is_err());
    Ok(())
}

#[tokio::test]
async fn the_client_speaks_over_ws() -> Result {
    let broker = Mosquitto::start()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("ws://{}/mqtt", listener.local_addr()?);
    tokio::spawn(ws_relay(listener, broker.addr()));
    exercise(&url, &Trust::Anything).await
}

#[tokio::test]
async fn the_client_speaks_over_quic() -> Result {
    let broker = Mosquitto::start()?;
    let dir = TempDir::new("certs")?;
    let certs = Certs::make(dir.path())?;
    let endpoint = quic_endpoint(&certs)?;
    let url = format!("quic://localhost:{}", endpoint.local_addr()?.port());
    tokio::spawn(quic_relay(endpoint, broker.addr()));
    exercise(&url, &Trust::ca(&certs.ca)?).await
}

#[allow(
    clippy::result_large_err,
    reason = "the type is of tungstenite's callback"
)]
async fn ws_relay(listener: TcpListener, broker: SocketAddr) {
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let answer = |_: &Request, mut response: Response| {
                let mqtt = "mqtt".parse().expect("a legal header value");
                response
                    .headers_mut()
                    .insert("Sec-WebSocket-Protocol", mqtt);
                Ok(response)
            };
            let socket = tokio_tungstenite::accept_hdr_async(stream, answer).await;
            let Ok((mut to, mut from)) = socket.map(StreamExt::split) else {
                return;
            };
            let Ok((mut broker_from, mut broker_to)) =
                TcpStream::connect(broker).await.map(TcpStream::into_split)
            else {
                return;
            };
            let up = async {
                while let Some(Ok(Message::Binary(bytes))) = from.next().await {
                    if broker_to.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            };
            let down = async {
                let mut buf = vec![0; 1000];
                while let Ok(n @ 1..) = broker_from.read(&mut buf).await {
                    let message = Message::Binary(buf[..n].to_vec().into());
                    if to.send(message).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! { () = up => {}, () = down => {} }
        });
    }
}

fn quic_endpoint(certs: &Certs) -> Result<quinn::Endpoint> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let cert = CertificateDer::from_pem_file(&certs.cert)?;
    let key = PrivateKeyDer::from_pem_file(&certs.key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)?;
    tls.alpn_protocols = vec![b"mqtt".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    Ok(quinn::Endpoint::server(config, "127.0.0.1:0".parse()?)?)
}

async fn quic_relay(endpoint: quinn::Endpoint, broker: SocketAddr) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else {
                return;
            };
            let Ok((mut to, mut from)) = connection.accept_bi().await else {
                return;
            };
            let Ok((mut broker_from, mut broker_to)) =
                TcpStream::connect(broker).await.map(TcpStream::into_split)
            else {
                return;
            };
            tokio::select! {
                _ = tokio::io::copy(&mut from, &mut broker_to) => {}
                _ = tokio::io::copy(&mut broker_from, &mut to) => {}
            }
        });
    }
}
