//! A client sends DISCONNECT, and at once CONNECT on another connection, over every transport: the
//! DISCONNECT and the messages before it count.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tidegate_kit::client::{Client, ClientError};
use tidegate_kit::dial::{Dialer, Transport};
use tidegate_kit::process::TidegateConfig;
use tidegate_kit::wire::{Connect, Packet, Publish, Reason, Version, Will};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const WAYS: [&str; 6] = ["tcp", "tls", "ws", "wss", "quic", "webtransport"];
/// Clients that do this at the same time, for each pair of transports.
const PHONES: usize = 4;
const TRIES: usize = 8;
/// Messages of QoS 0 before each DISCONNECT, half of them on a data stream where there are some.
const MESSAGES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Phone {
    id: String,
    version: Version,
    /// Clean Start of the new connection.
    clean: bool,
    old: Arc<Dialer>,
    new: Arc<Dialer>,
}

impl Phone {
    fn connect(&self, clean: bool) -> Connect {
        let connect = Connect::new(&self.id).version(self.version).clean(clean);
        let connect = connect.will(Will {
            topic: format!("wills/{}", self.id),
            ..Will::default()
        });
        match self.version {
            Version::V5 => connect.expiry(300),
            _ => connect,
        }
    }

    /// Connects, says everything and goes, and is back at once.
    async fn flap(&self, number: usize) -> Result {
        let (mut old, _) = Client::connect(&self.old, &self.connect(false)).await?;
        let mut new = Client::over(self.new.open().await?, self.version);
        let several = matches!(
            self.old.url().transport,
            Transport::Quic | Transport::WebTransport
        );
        let mut aside = match several {
            true => Some(old.open_stream().await?),
            false => None,
        };
        for message in 0..MESSAGES {
            let publish = Packet::Publish(Publish {
                topic: format!("last/{}", self.id),
                payload: format!("{number}.{message}").into_bytes(),
                ..Publish::default()
            });
            match &mut aside {
                Some(aside) if message % 2 == 1 => aside.queue(&publish),
                _ => old.queue(&publish),
            }
        }
        if let Some(aside) = &mut aside {
            send(aside).await?;
        }
        old.queue(&Packet::Disconnect(Reason::default()));
        new.queue(&Packet::Connect(Box::new(self.connect(self.clean))));
        send(&mut old).await?;
        new.flush().await?;
        match timeout(PATIENCE, new.next()).await?? {
            Packet::ConnAck(ack) if ack.code == 0 && ack.session_present != self.clean => {}
            other => return Err(format!("{}: {other:?}", self.id).into()),
        }
        new.disconnect().await?;
        Ok(())
    }
}

/// Sends everything that is queued, and waits until it is on the wire: QUIC sends later.
async fn send(client: &mut Client) -> Result {
    let before = client.link().stream_frames_sent();
    match client.flush().await {
        // The server closes the connection when it has read DISCONNECT.
        Ok(()) | Err(ClientError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    while before.is_some() && client.link().stream_frames_sent() == before {
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_were_sent_before_a_connect_count_over_every_transport() -> Result {
    let _machine = crate::beside_others().await;
    let edge = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), "embedded:")
        .listen(&WAYS)
        .set("limits", "connect_rate_max", "100000")
        .start()?;
    let ways: Vec<Arc<Dialer>> = WAYS.iter().map(|way| Arc::new(edge.dialer(way))).collect();
    let (mut watcher, _) = Client::connect(&ways[0], &Connect::new("watcher")).await?;
    watcher.subscribe(&["last/#", "wills/#"], 0).await?;
    let mut missing = BTreeSet::new();
    let mut phones = JoinSet::new();
    for (at, old) in ways.iter().enumerate() {
        for to in [at, (at + 1) % ways.len(), (at + 3) % ways.len()] {
            for n in 0..PHONES {
                let phone = Phone {
                    id: format!("{}-{}-{n}", WAYS[at], WAYS[to]),
                    version: [Version::V5, Version::V311][n % 2],
                    clean: n / 2 % 2 == 1,
                    old: old.clone(),
                    new: ways[to].clone(),
                };
                for number in 0..TRIES {
                    missing.extend((0..MESSAGES).map(|m| format!("{} {number}.{m}", phone.id)));
                }
                phones.spawn(async move {
                    for number in 0..TRIES {
                        phone.flap(number).await?;
                    }
                    Result::Ok(())
                });
            }
        }
    }
    let mut wills = Vec::new();
    let mut running = true;
    while running || !missing.is_empty() {
        let packet = tokio::select! {
            biased;
            packet = watcher.next() => packet?,
            ended = phones.join_next(), if running => {
                match ended {
                    Some(ended) => ended??,
                    None => running = false,
                }
                continue;
            }
            () = sleep(Duration::from_secs(5)), if !running => break,
        };
        if let Packet::Publish(publish) = packet {
            let (kind, id) = publish.topic.split_once('/').expect("two levels");
            match kind {
                "last" => {
                    let text = String::from_utf8_lossy(&publish.payload);
                    missing.remove(&format!("{id} {text}"));
                }
                _ => wills.push(id.to_owned()),
            }
        }
    }
    assert!(wills.is_empty(), "{} wills: {wills:?}", wills.len());
    assert!(missing.is_empty(), "{} missing: {missing:?}", missing.len());
    Ok(())
}
