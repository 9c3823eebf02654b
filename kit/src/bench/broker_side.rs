//! The broker's side: many filters, storms of SUBSCRIBE, and the shares of clients in a small
//! window.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::lab::{Lab, median};
use crate::client::Client;
use crate::dial::{Dialer, Trust};
use crate::load::histogram::Histogram;
use crate::process::{MosquittoConfig, Tidegate};
use crate::usage::Usage;
use crate::wire::{Connect, Packet, Publish};

/// Filters of one client.
const FILTERS_EACH: usize = 500;
/// Filters in one SUBSCRIBE.
const IN_PACKET: usize = 50;
/// Polite publishers beside the flood.
const POLITE: usize = 50;
/// Publishes that the flood keeps under way.
const FLOOD: usize = 64;

/// The load: 200 clients subscribe to 100,000 filters for the first time, then all ask for them
/// again at once.
pub(super) fn filters(lab: &mut Lab) -> io::Result<()> {
    let clients = 200;
    let all = clients * FILTERS_EACH;
    let runtime = runtime()?;
    let (mut first, mut again, mut alone, mut alone_again) = (vec![], vec![], vec![], vec![]);
    let (mut bytes, mut cpu, mut behind, mut direct_cpu) = (vec![], vec![], vec![], vec![]);
    for _ in 0..lab.args.rounds.min(3) {
        let pair = lab.pair(&["tcp"])?;
        let edge = Arc::new(pair.edge.dialer("tcp"));
        let mut fleet = runtime.block_on(gather(&edge, clients))?;
        let before = Usage::of(pair.edge.pid())?;
        let broker_before = Usage::of(pair.broker.pid())?;
        first.push(runtime.block_on(subscribe(&mut fleet))?.as_secs_f64());
        let after = Usage::of(pair.edge.pid())?;
        behind.push(micros_each(
            &broker_before,
            &Usage::of(pair.broker.pid())?,
            all,
        ));
        bytes.push((after.private.saturating_sub(before.private)) as f64 / all as f64);
        cpu.push(micros_each(&before, &after, all));
        // Retained messages are fetched to the end first; then all clients flap at once, with clean
        // sessions.
        std::thread::sleep(Duration::from_secs(4));
        drop(fleet);
        let mut fleet = runtime.block_on(gather(&edge, clients))?;
        again.push(runtime.block_on(subscribe(&mut fleet))?.as_secs_f64());
        drop(fleet);

        let broker = lab.broker()?;
        let direct = Arc::new(at(&broker.addr().to_string())?);
        let mut fleet = runtime.block_on(gather(&direct, clients))?;
        let before = Usage::of(broker.pid())?;
        alone.push(runtime.block_on(subscribe(&mut fleet))?.as_secs_f64());
        direct_cpu.push(micros_each(&before, &Usage::of(broker.pid())?, all));
        drop(fleet);
        let mut fleet = runtime.block_on(gather(&direct, clients))?;
        alone_again.push(runtime.block_on(subscribe(&mut fleet))?.as_secs_f64());
    }
    lab.say(&format!(
        "### {all} filters\n\n{clients} clients on tcp with {FILTERS_EACH} filters of their own each, all asking at \
         once with {IN_PACKET} in a SUBSCRIBE; from the first SUBSCRIBE to the last SUBACK.\n"
    ));
    lab.say(&format!(
        "| | Tidegate | mosquitto alone | ratio |\n|---|---|---|---|\n\
         | first held | {:.2} s | {:.2} s | {:.2} |\n| a storm: all back at once, clean | {:.2} s | {:.2} s | {:.2} |\n",
        median(&first),
        median(&alone),
        median(&first) / median(&alone),
        median(&again),
        median(&alone_again),
        median(&again) / median(&alone_again),
    ));
    lab.say(&format!(
        "Tidegate's private memory grew by **{:.0} bytes** per filter, subscription included. When a filter was first \
         held it took {:.1} µs of processor time, the broker behind it {:.1} µs, and mosquitto alone {:.1} µs.\n",
        median(&bytes),
        median(&cpu),
        median(&behind),
        median(&direct_cpu),
    ));
    Ok(())
}

/// The time that publishes of polite clients take while another client floods a broker with a
/// window of 20.
pub(super) fn fairness(lab: &mut Lab) -> io::Result<()> {
    let runtime = runtime()?;
    let (mut calm, mut flooded, mut shares) = (vec![], vec![], vec![]);
    for _ in 0..lab.args.rounds.min(3) {
        let broker = MosquittoConfig::default().start()?;
        let edge = lab
            .config(&["tcp"], &broker.url())
            .set("upstream", "protocol", "\"3.1.1\"")
            .set("upstream", "publish_links", "1")
            .start()?;
        let seconds = Duration::from_secs_f64(lab.args.seconds);
        calm.push(runtime.block_on(polite(&edge, seconds, false))?);
        let with = runtime.block_on(polite(&edge, seconds, true))?;
        shares.push(with.2);
        flooded.push(with);
    }
    let us = |all: &[(f64, f64, f64)], f: fn(&(f64, f64, f64)) -> f64| {
        median(&all.iter().map(f).collect::<Vec<_>>()) / 1000.0
    };
    lab.say(&format!(
        "### Fairness\n\n{POLITE} clients publish 10 messages of 64 bytes a second each, QoS 1, over one link with a \
         window of 20 (mosquitto, 3.1.1); beside them one client that keeps {FLOOD} of 4 KiB under way. PUBLISH to \
         PUBACK, µs:\n"
    ));
    lab.say(&format!(
        "| | p50 | p99 |\n|---|---|---|\n| alone | {:.0} | {:.0} |\n| beside the flood | {:.0} | {:.0} |\n",
        us(&calm, |c| c.0),
        us(&calm, |c| c.1),
        us(&flooded, |c| c.0),
        us(&flooded, |c| c.1),
    ));
    lab.say(&format!(
        "The flood got {:.0} messages a second through meanwhile.\n",
        median(&shares)
    ));
    Ok(())
}

/// Processor time between two readings of a process, in microseconds for each of `all` filters.
fn micros_each(before: &Usage, after: &Usage, all: usize) -> f64 {
    (after.cpu() - before.cpu()).as_secs_f64() * 1e6 / all as f64
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
}

fn at(addr: &str) -> io::Result<Dialer> {
    let url = format!("tcp://{addr}").parse().map_err(io::Error::other)?;
    Dialer::new(&url, &Trust::Anything)
}

async fn gather(dialer: &Arc<Dialer>, clients: usize) -> io::Result<Vec<Client>> {
    let mut fleet = Vec::new();
    for n in 0..clients {
        let connect = Connect::new(format!("filters-{n}"));
        let (client, _) = Client::connect(dialer, &connect)
            .await
            .map_err(io::Error::other)?;
        fleet.push(client);
    }
    Ok(fleet)
}

/// Subscribes all clients at once and returns the time to the last SUBACK. The clients stay
/// connected.
async fn subscribe(fleet: &mut Vec<Client>) -> io::Result<Duration> {
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (n, mut client) in std::mem::take(fleet).into_iter().enumerate() {
        tasks.spawn(async move {
            let names: Vec<String> = (0..FILTERS_EACH)
                .map(|f| format!("filters/{n}/device/{f}/command"))
                .collect();
            for some in names.chunks(IN_PACKET) {
                let some: Vec<&str> = some.iter().map(String::as_str).collect();
                let codes = client.subscribe(&some, 1).await.map_err(io::Error::other)?;
                if codes.codes.iter().any(|c| *c != 1) {
                    return Err(io::Error::other("a filter was refused"));
                }
            }
            Ok::<_, io::Error>(client)
        });
    }
    while let Some(done) = tasks.join_next().await {
        fleet.push(done.map_err(io::Error::other)??);
    }
    Ok(began.elapsed())
}

/// p50 and p99 of the polite publishers in nanoseconds, and the flood's messages a second.
async fn polite(edge: &Tidegate, time: Duration, flood: bool) -> io::Result<(f64, f64, f64)> {
    let dialer = Arc::new(edge.dialer("tcp"));
    let seen = Arc::new(Histogram::default());
    let stop = Arc::new(AtomicBool::new(false));
    let flooding = flood.then(|| tokio::spawn(flooder(dialer.clone(), stop.clone())));
    let mut tasks = JoinSet::new();
    for n in 0..POLITE {
        let (dialer, seen, stop) = (dialer.clone(), seen.clone(), stop.clone());
        tasks.spawn(async move {
            let connect = Connect::new(format!("polite-{n}-{flood}"));
            let (mut client, _) = Client::connect(&dialer, &connect)
                .await
                .map_err(io::Error::other)?;
            // A start at different times keeps the publishers out of step.
            tokio::time::sleep(Duration::from_millis(2 * n as u64)).await;
            let mut pace = tokio::time::interval(Duration::from_millis(100));
            while !stop.load(Ordering::Relaxed) {
                pace.tick().await;
                let began = Instant::now();
                let topic = format!("polite/{n}");
                let code = client
                    .publish(&topic, vec![b'.'; 64], 1)
                    .await
                    .map_err(io::Error::other)?;
                if code >= 0x80 {
                    return Err(io::Error::other(format!("PUBACK 0x{code:02X}")));
                }
                seen.record(began.elapsed().as_nanos() as u64);
            }
            Ok::<_, io::Error>(())
        });
    }
    tokio::time::sleep(time / 4).await;
    seen.clear();
    tokio::time::sleep(time).await;
    let figures = (seen.quantile(0.5) as f64, seen.quantile(0.99) as f64);
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = tasks.join_next().await {
        done.map_err(io::Error::other)??;
    }
    let sent = match flooding {
        None => 0,
        Some(task) => task.await.map_err(io::Error::other)??,
    };
    Ok((
        figures.0,
        figures.1,
        sent as f64 / (time * 5 / 4).as_secs_f64(),
    ))
}

async fn flooder(dialer: Arc<Dialer>, stop: Arc<AtomicBool>) -> io::Result<u64> {
    let connect = Connect::new("flood");
    let (mut client, _) = Client::connect(&dialer, &connect)
        .await
        .map_err(io::Error::other)?;
    let mut acknowledged = 0;
    let mut open = 0;
    while !stop.load(Ordering::Relaxed) {
        while open < FLOOD {
            let id = client.new_id();
            client.queue(&Packet::Publish(Publish {
                qos: 1,
                topic: "flood".to_owned(),
                id,
                payload: vec![b'.'; 4096],
                ..Publish::default()
            }));
            open += 1;
        }
        client.flush().await.map_err(io::Error::other)?;
        let mut packet = Some(client.next().await.map_err(io::Error::other)?);
        while let Some(Packet::PubAck(ack)) = packet {
            open -= 1;
            acknowledged += u64::from(ack.code < 0x80);
            packet = client.buffered().map_err(io::Error::other)?;
        }
    }
    Ok(acknowledged)
}
