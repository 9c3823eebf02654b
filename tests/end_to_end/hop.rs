//! One client identifier keeps its session while it hops from transport to transport in the middle
//! of QoS 1 and QoS 2 traffic in both directions, on data streams where the transport has them. No
//! message is lost or out of order, QoS 2 arrives once, and QoS 1 arrives again only with DUP.
//!
//! `TIDEGATE_FULL=1` hops ten times as often; `HOP_SEED` repeats the choices of another run.

mod phone;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use phone::Phone;
use tidegate_kit::audit::Stamp;
use tidegate_kit::client::Client;
use tidegate_kit::dial::Dialer;
use tidegate_kit::process::{Mosquitto, TidegateConfig};
use tidegate_kit::rng::Rng;
use tidegate_kit::wire::{Ack, Connect, Packet, Publish, Version};
use tokio::time::timeout;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const PHONES: u32 = 6;
/// The transports in the order in which a phone uses them, again and again.
const WAYS: [&str; 4] = ["quic", "wss", "webtransport", "tls"];
/// The topic of the message that ends the run.
const LAST: &str = "hop/up/last";
const PATIENCE: Duration = Duration::from_secs(60);

/// The number of the stream of all messages of one QoS to or from a phone.
fn stream(phone: u32, qos: u8) -> u32 {
    phone * 2 + u32::from(qos - 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_hops_from_transport_to_transport_and_nothing_is_lost() -> Result {
    let _machine = crate::beside_others().await;
    let full = std::env::var_os("TIDEGATE_FULL").is_some();
    let hops = if full { 600 } else { 60 };
    let seed: u64 = match std::env::var("HOP_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => 0x7469_6465,
    };
    println!("HOP_SEED={seed}");
    let broker = Mosquitto::start()?;
    let edge = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), &broker.url())
        .listen(&WAYS)
        .start()?;
    let ways: Vec<Arc<Dialer>> = WAYS.iter().map(|way| Arc::new(edge.dialer(way))).collect();
    let at_broker = Arc::new(Dialer::new(
        &format!("tcp://{}", broker.addr()).parse()?,
        &tidegate_kit::dial::Trust::Anything,
    )?);

    let listener = Listener::connect(&at_broker).await?;
    let mut phones = Vec::new();
    for number in 0..PHONES {
        let version = if number % 3 == 2 {
            Version::V311
        } else {
            Version::V5
        };
        let rng = Rng::new(seed + u64::from(number));
        phones.push(Phone::connect(number, version, ways.clone(), rng).await?);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let backend = tokio::spawn(speak(at_broker.clone(), stop.clone()));
    let phones: Vec<_> = phones
        .into_iter()
        .map(|mut phone| {
            tokio::spawn(async move {
                for _ in 0..hops {
                    let packets = phone.rng.between(3, 30) as usize;
                    phone.live(packets).await?;
                    phone.hop().await?;
                }
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(phone)
            })
        })
        .collect();
    let mut back = Vec::new();
    for phone in phones {
        back.push(phone.await??);
    }
    stop.store(true, Relaxed);
    let sent = backend.await??;
    // Wait until every phone has received and sent everything.
    let mut said = Vec::new();
    let mut resent = Vec::new();
    for phone in &mut back {
        let number = phone.number;
        let rest = phone.rest(
            sent[stream(number, 1) as usize],
            sent[stream(number, 2) as usize],
        );
        timeout(PATIENCE, rest)
            .await
            .map_err(|_| format!("phone {number} still misses something: {phone:?}"))??;
        said.push(phone.said);
        resent.push(std::mem::take(&mut phone.resent));
    }
    // This message arrives after all publishes of the phones.
    let (mut last, _) = Client::connect(&at_broker, &Connect::new("hop-last")).await?;
    last.publish(LAST, Vec::new(), 2).await?;
    let heard = timeout(PATIENCE, listener.hear(&said, &resent));
    heard
        .await
        .map_err(|_| "not all publishes of the phones reached the broker")??;
    let hopped: usize = back.iter().map(|p| p.hops).sum();
    let resumed = edge.metrics()?.sum("tidegate_flaps_absorbed_total", &[]);
    let on_data: u64 = back.iter().map(|p| p.on_data).sum();
    println!(
        "{hopped} hops, {resumed} resumed; {sent:?} down, {on_data} on data streams, {said:?} up"
    );
    assert_eq!(hopped, hops * PHONES as usize);
    assert!(
        resumed >= hopped as f64,
        "only {resumed} of {hopped} hops resumed the session"
    );
    let unused = back.iter().filter(|p| p.on_data == 0).count();
    assert_eq!(
        unused, 0,
        "{unused} phones got no delivery on a data stream"
    );
    Ok(())
}

/// Publishes to all phones from the broker's side, at QoS 1 and 2. Returns the number of messages
/// by stream.
async fn speak(broker: Arc<Dialer>, stop: Arc<AtomicBool>) -> Result<Vec<u64>> {
    let (mut client, _) = Client::connect(&broker, &Connect::new("hop-backend")).await?;
    let mut sent = vec![0; 2 * PHONES as usize];
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    while !stop.load(Relaxed) {
        for phone in 0..PHONES {
            for qos in [1, 2] {
                let stream = stream(phone, qos);
                let seq = &mut sent[stream as usize];
                *seq += 1;
                let stamp = Stamp {
                    stream,
                    seq: *seq,
                    sent_ns: 0,
                };
                let topic = format!("hop/{phone}/{qos}");
                client.publish(&topic, stamp.payload(32), qos).await?;
            }
        }
        pace.tick().await;
    }
    Ok(sent)
}

/// A subscriber at the broker that receives the phones' publishes.
struct Listener {
    client: Client,
}

impl Listener {
    async fn connect(broker: &Dialer) -> Result<Self> {
        let connect = Connect::new("hop-listener").receive_max(2000);
        let (mut client, _) = Client::connect(broker, &connect).await?;
        client.subscribe(&["hop/up/#"], 2).await?;
        Ok(Self { client })
    }

    /// Receives until the last message. `said` has each phone's number of messages at QoS 1 and 2;
    /// `resent` has, by phone, the QoS 1 messages that it sent again and how often.
    async fn hear(mut self, said: &[[u64; 2]], resent: &[HashMap<u64, u64>]) -> Result {
        let mut last = vec![[0; 2]; said.len()];
        let mut again = vec![HashMap::new(); said.len()];
        loop {
            match self.client.next().await? {
                Packet::Publish(publish) if publish.topic == LAST => break,
                Packet::Publish(publish) => {
                    heard(&mut last, &mut again, &publish)?;
                    self.client.acknowledge(&publish).await?;
                }
                Packet::PubRel(ack) => {
                    let done = Ack {
                        id: ack.id,
                        ..Ack::default()
                    };
                    self.client.send(&Packet::PubComp(done)).await?;
                }
                other => return Err(format!("unexpected {other:?}").into()),
            }
        }
        if last != said {
            return Err(format!(
                "the phones sent {said:?} messages, and {last:?} reached the broker"
            )
            .into());
        }
        for (phone, (again, resent)) in again.iter().zip(resent).enumerate() {
            for (seq, times) in again {
                let may = resent.get(seq).copied().unwrap_or_default();
                if *times > may {
                    let what = format!(
                        "phone {phone} sent {seq} again {may} times, and the broker got it {times} times"
                    );
                    return Err(what.into());
                }
            }
        }
        Ok(())
    }
}

fn heard(last: &mut [[u64; 2]], again: &mut [HashMap<u64, u64>], publish: &Publish) -> Result {
    let stamp = Stamp::read(&publish.payload).ok_or("the payload has no stamp")?;
    let (phone, qos) = ((stamp.stream / 2) as usize, publish.qos);
    let at = &mut last[phone][usize::from(qos - 1)];
    match stamp.seq {
        seq if seq == *at + 1 => *at = seq,
        // A phone that hops before its PUBACK arrives sends the message again, and Tidegate may
        // publish both.
        seq if seq <= *at && qos == 1 => *again[phone].entry(seq).or_default() += 1,
        seq => {
            let what = format!("the broker got {seq} of phone {phone} at QoS {qos}, behind {at}");
            return Err(what.into());
        }
    }
    Ok(())
}
