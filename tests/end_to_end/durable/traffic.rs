//! Kills at random moments under traffic: no message that the broker has acknowledged is missing, none of QoS 2
//! comes twice, and all come in their order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tidegate_kit::client::{Client, ClientError};
use tidegate_kit::dial::Dialer;
use tidegate_kit::process::MosquittoConfig;
use tidegate_kit::rng::Rng;
use tidegate_kit::wire::{Ack, Connect, Packet};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Node, PATIENCE, Result, kept};

/// The transports of the receivers.
const RECEIVERS: [&str; 4] = ["ws", "wss", "quic", "tcp"];
/// The time between two messages of a publisher.
const PACE: Duration = Duration::from_millis(5);
/// The last message of each topic.
const LAST: u64 = u64::MAX;

/// A client that keeps the state of its session, as the specification says, over connections that break.
#[derive(Debug, Default)]
struct Receiver {
    id: &'static str,
    /// The numbers that it got at QoS 1 and 2, in the order of arrival.
    got: [Vec<u64>; 2],
    /// Packet identifiers of QoS 2 between PUBLISH and PUBREL.
    unreleased: BTreeSet<u16>,
}

impl Receiver {
    fn is_done(&self) -> bool {
        self.got.iter().all(|got| got.contains(&LAST))
    }

    /// Receives until the connection breaks, or breaks it itself.
    async fn connection(&mut self, dialer: &Dialer, rng: &mut Rng) -> Result {
        let (mut client, ack) = Client::connect(dialer, &kept(self.id)).await?;
        if !ack.session_present {
            return Err(format!("{} has lost its session", self.id).into());
        }
        let packets = rng.below(400);
        let mut count = 0;
        while count < packets || self.is_done() {
            let Some(packet) = client.next_within(Duration::from_secs(2)).await? else {
                return Ok(());
            };
            count += 1;
            match packet {
                Packet::Publish(publish) => {
                    let number = std::str::from_utf8(&publish.payload)?.parse()?;
                    match publish.qos {
                        1 => self.got[0].push(number),
                        _ if self.unreleased.insert(publish.id) => self.got[1].push(number),
                        _ => {}
                    }
                    client.acknowledge(&publish).await?;
                }
                Packet::PubRel(ack) => {
                    self.unreleased.remove(&ack.id);
                    let ack = Ack {
                        id: ack.id,
                        ..Ack::default()
                    };
                    client.send(&Packet::PubComp(ack)).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn run(mut self, mut doors: watch::Receiver<Doors>, mut rng: Rng) -> Result<Self> {
        while !self.is_done() {
            let dialer = door(&mut doors, self.id).await?;
            match timeout(PATIENCE, self.connection(&dialer, &mut rng)).await? {
                Ok(()) => sleep(Duration::from_millis(rng.below(100))).await,
                Err(error) if is_broken(&*error) => sleep(Duration::from_millis(20)).await,
                Err(error) => return Err(format!("{}: {error}", self.id).into()),
            }
        }
        Ok(self)
    }
}

fn is_broken(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let closed = matches!(
        error.downcast_ref(),
        Some(ClientError::Closed | ClientError::Io(_) | ClientError::Timeout(_))
    );
    closed || error.downcast_ref::<std::io::Error>().is_some()
}

/// The ways to the process that runs: each has other ports. There are none while none runs.
type Doors = BTreeMap<&'static str, Arc<Dialer>>;

fn doors(node: &Node) -> Result<Doors> {
    let broker = ("broker", Arc::new(node.broker_dialer()?));
    let ways = RECEIVERS.map(|way| (way, Arc::new(node.tidegate.dialer(way))));
    Ok(ways.into_iter().chain([broker]).collect())
}

/// Waits for a process, and returns the way to it.
async fn door(doors: &mut watch::Receiver<Doors>, way: &str) -> Result<Arc<Dialer>> {
    let doors = doors.wait_for(|doors| doors.contains_key(way)).await?;
    Ok(doors[way].clone())
}

/// The numbers that the broker has acknowledged to a publisher.
type Sent = BTreeSet<u64>;

/// Publishes numbers until `stop`. A number whose answer is missing is not sent again.
async fn publish(
    (mut doors, way): (watch::Receiver<Doors>, &'static str),
    id: &'static str,
    (topic, qos): (&'static str, u8),
    numbers: u64,
    stop: Arc<AtomicBool>,
) -> Result<Sent> {
    let mut sent = Sent::default();
    let mut number = numbers;
    while !stop.load(Ordering::Relaxed) {
        let dialer = door(&mut doors, way).await?;
        let connected = Client::connect(&dialer, &Connect::new(id).clean(true)).await;
        let Ok((mut client, _)) = connected else {
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            let published = client.publish(topic, number.to_string(), qos);
            match timeout(Duration::from_secs(5), published).await {
                Ok(Ok(_)) => sent.insert(number),
                _ => break,
            };
            sleep(PACE).await;
        }
    }
    Ok(sent)
}

fn judge(receiver: &Receiver, at_least: &[Sent], once: &Sent) {
    let id = receiver.id;
    let [least, exact] = &receiver.got;
    for sent in at_least {
        for number in sent {
            assert!(least.contains(number), "{id} misses {number} of QoS 1");
        }
    }
    for number in once {
        assert!(exact.contains(number), "{id} misses {number} of QoS 2");
    }
    let ascends = exact.windows(2).all(|pair| pair[0] < pair[1]);
    let place = exact.windows(2).position(|pair| pair[0] >= pair[1]);
    assert!(
        ascends,
        "{id} at {place:?}: {:?}",
        &exact[place.unwrap_or(0)..]
    );
    // The first copies of each publisher are in order. A publish without an answer may have been on its way to
    // the broker, on an old connection, when the next one was sent.
    for sent in at_least {
        let mut seen = BTreeSet::new();
        let of_one = |n: &&u64| sent.contains(n);
        let firsts = least.iter().filter(of_one).filter(|n| seen.insert(**n));
        let firsts: Vec<u64> = firsts.copied().collect();
        assert!(firsts.is_sorted(), "{id}: QoS 1 is out of order");
    }
}

#[test]
fn no_message_is_lost_or_repeated_by_kills_under_traffic() {
    let kills = match std::env::var_os("TIDEGATE_FULL") {
        Some(_) => 1000,
        None => 20,
    };
    let seed = super::seed();
    // Each kill takes about a second.
    let patience = 3 * PATIENCE + Duration::from_secs(3 * kills);
    super::run_within(patience, async move {
        let mut rng = Rng::new(seed);
        let config = MosquittoConfig {
            persistence: true,
            ..MosquittoConfig::default()
        };
        let mut node = Node::start_with("disk", &config, &[])?;
        for id in RECEIVERS {
            let (mut client, _) = node.connect(&kept(id)).await?;
            client.subscribe(&["least/+"], 1).await?;
            client.subscribe(&["once/+"], 2).await?;
            client.disconnect().await?;
        }
        let (open, open_doors) = watch::channel(doors(&node)?);
        let mut receivers = JoinSet::new();
        for id in RECEIVERS {
            let receiver = Receiver {
                id,
                ..Receiver::default()
            };
            receivers.spawn(receiver.run(open_doors.clone(), Rng::new(rng.next())));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let spawn = |way, id, to, numbers| {
            tokio::spawn(publish(
                (open_doors.clone(), way),
                id,
                to,
                numbers,
                stop.clone(),
            ))
        };
        let direct = spawn("broker", "direct", ("least/a", 1), 0);
        let once = spawn("broker", "once", ("once/a", 2), 0);
        // Its publishes go through Tidegate.
        let through = spawn("tcp", "through", ("least/b", 1), 1 << 32);
        for kill in 1..=kills {
            sleep(Duration::from_millis(50 + rng.below(600))).await;
            node.tidegate.kill();
            open.send_replace(Doors::new());
            if kill % 5 == 0 {
                node.broker.stop(false)?;
                node.broker.start_again()?;
            }
            node.tidegate.start_again()?;
            open.send_replace(doors(&node)?);
        }
        stop.store(true, Ordering::Relaxed);
        let at_least = [direct.await??, through.await??];
        let once = once.await??;
        let mut last = node
            .connect_to_broker(&Connect::new("last").clean(true))
            .await?;
        last.publish("least/a", LAST.to_string(), 1).await?;
        last.publish("once/a", LAST.to_string(), 2).await?;
        while let Some(receiver) = receivers.join_next().await {
            judge(&receiver??, &at_least, &once);
        }
        println!(
            "acknowledged: {} and {} of QoS 1, {} of QoS 2",
            at_least[0].len(),
            at_least[1].len(),
            once.len()
        );
        Ok(())
    });
}
