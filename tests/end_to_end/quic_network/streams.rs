//! Clients that publish and subscribe on several data streams at once, while streams end and begin,
//! addresses change and connections are lost.
//!
//! `TIDEGATE_FULL=1` sends ten times as much; `STREAMS_SEED` repeats the choices of another run.

mod device;
mod verdict;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use device::Device;
use futures_util::future::join_all;
use tidegate_kit::audit::Stamp;
use tidegate_kit::client::Client;
use tidegate_kit::dial::Dialer;
use tidegate_kit::netem::Netem;
use tidegate_kit::process::{Tidegate, TidegateConfig};
use tidegate_kit::rng::Rng;
use tidegate_kit::udp_relay::UdpRelay;
use tidegate_kit::wire::{Ack, Connect, Packet};
use tokio::sync::{RwLock, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use verdict::Heard;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const DEVICES: u32 = 3;
/// The number of publishing flows of a device, and of its filters; each has a stream.
const FLOWS: usize = 3;
/// The topic of the message that ends the run.
const LAST: &str = "up/last";

/// The number of a flow. A flow's messages, of one QoS in one direction, are in order.
fn flow_of(device: u32, flow: usize, qos: u8) -> u32 {
    (device * FLOWS as u32 + flow as u32) * 2 + u32::from(qos - 1)
}

fn qos_of(flow: u32) -> u8 {
    1 + (flow % 2) as u8
}

fn flows(devices: std::ops::Range<u32>) -> std::ops::Range<u32> {
    let each = FLOWS as u32 * 2;
    devices.start * each..devices.end * each
}

/// Deliveries that may be under way or queued. Messages still queued when their stream ends come on
/// the control stream, while this test is about data streams.
const AHEAD: usize = 36;

/// The state that the devices share.
struct World {
    /// A connecting device holds this lock for reading: a handshake does not survive a change of
    /// address.
    network: RwLock<UdpRelay>,
    /// A permit for each message that may be published to the devices; each new delivery adds one.
    pace: Semaphore,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_streams_on_a_lossy_network_lose_and_duplicate_no_message() -> Result {
    let _machine = crate::beside_others().await;
    over("quic").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webtransport_streams_on_a_lossy_network_lose_and_duplicate_no_message() -> Result {
    let _machine = crate::beside_others().await;
    over("webtransport").await
}

async fn over(way: &str) -> Result {
    let full = std::env::var_os("TIDEGATE_FULL").is_some();
    let count = if full { 800 } else { 80 };
    let seed = match std::env::var("STREAMS_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => super::SEED,
    };
    println!("STREAMS_SEED={seed}");
    let server = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), "embedded:")
        .listen(&["tcp", way])
        .start()?;
    let netem = Netem {
        loss: 0.04,
        duplicate: 0.02,
        late: 0.1,
        by: Duration::from_millis(15),
        seed,
        ..Netem::FAIR
    };
    let target = ([127, 0, 0, 1], server.url(way).port).into();
    let relay = UdpRelay::start(target, netem).await?;
    let dialer = Arc::new(super::at(relay.addr(), &server, way));
    let world = Arc::new(World {
        network: RwLock::new(relay),
        pace: Semaphore::new(AHEAD),
    });

    let heard = tokio::spawn(hear(listener(&server).await?));
    let connecting = (0..DEVICES).map(|number| {
        let rng = Rng::new(seed + u64::from(number));
        Device::connect(number, count, dialer.clone(), world.clone(), rng)
    });
    let mut running = JoinSet::new();
    for device in join_all(connecting).await {
        running.spawn(device?.run());
    }
    let speaking = tokio::spawn(speak(server.dialer("tcp"), count, world.clone()));
    let mut all = device::Report::default();
    while let Some(device) = running.join_next().await {
        all.add(device??);
    }
    speaking.await??;
    // This message arrives after all publishes of the devices.
    let (mut last, _) = Client::connect(&server.dialer("tcp"), &Connect::new("last")).await?;
    last.publish(LAST, Vec::new(), 2).await?;
    let heard = timeout(super::SOON, heard).await???;
    heard.judge(flows(0..DEVICES), count, &all.resent)?;

    let metrics = server.metrics()?;
    let migrations = metrics.sum("tidegate_quic_migrations_total", &[]);
    let resent: u64 = all.resent.values().sum();
    println!(
        "{:?} ends, {migrations} migrations; deliveries: {} on data streams, {} on control, {} again; \
         {resent} publishes again",
        all.ends, all.on_data, all.on_control, all.again
    );
    assert!(
        world.network.read().await.lost() > 10,
        "the relay lost too few datagrams"
    );
    assert!(migrations >= 2.0, "{migrations}");
    assert!(all.ends.iter().all(|times| *times > 0), "{:?}", all.ends);
    let resumed = metrics.sum("tidegate_flaps_absorbed_total", &[]);
    assert!(
        resumed >= all.ends[device::CUT] as f64,
        "only {resumed} connections resumed the session"
    );
    // Most deliveries must use data streams, which this test is about.
    assert!(all.on_data > all.on_control, "{all:?}");
    Ok(())
}

/// Publishes to all devices, over an undisturbed network.
async fn speak(dialer: Dialer, count: u64, world: Arc<World>) -> Result {
    let (mut client, _) = Client::connect(&dialer, &Connect::new("speaker")).await?;
    for seq in 1..=count {
        for stream in flows(0..DEVICES) {
            world.pace.acquire().await?.forget();
            let (flow, qos) = (stream / 2, qos_of(stream));
            let stamp = Stamp {
                stream,
                seq,
                sent_ns: 0,
            };
            let topic = format!("down/{flow}/{qos}");
            client.publish(&topic, stamp.payload(200), qos).await?;
        }
    }
    Ok(())
}

async fn listener(server: &Tidegate) -> Result<Client> {
    let connect = Connect::new("listener").receive_max(2000);
    let (mut client, _) = Client::connect(&server.dialer("tcp"), &connect).await?;
    client.subscribe(&["up/#"], 2).await?;
    Ok(client)
}

/// Receives the devices' publishes up to the last message.
async fn hear(mut client: Client) -> Result<Heard> {
    let mut heard = Heard::default();
    loop {
        match client.next().await? {
            Packet::Publish(publish) if publish.topic == LAST => return Ok(heard),
            Packet::Publish(publish) => {
                heard.take(&publish)?;
                client.acknowledge(&publish).await?;
            }
            Packet::PubRel(ack) => client.send(&Packet::PubComp(ack_of(ack.id))).await?,
            other => return Err(format!("unexpected {other:?}").into()),
        }
    }
}

fn ack_of(id: u16) -> Ack {
    Ack {
        id,
        ..Ack::default()
    }
}

type Resent = HashMap<(u32, u64), u64>;
