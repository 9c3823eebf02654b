//! flap: clients vanish and come back under live traffic.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::args::FlapArgs;
use super::crowd::crowd;
use super::histogram::Histogram;
use super::peer::Peer;
use super::report::{Moment, Report, round};
use crate::audit::{Audit, Keeps, Stamp, now_ns};
use crate::dial::Dialer;
use crate::link::Cut;
use crate::wire::Connect;

/// Runs the load.
///
/// # Errors
/// A connection cannot be made at the start, or a watched process is gone.
pub async fn run(args: &FlapArgs) -> io::Result<Report> {
    let common = &args.common;
    let (prefix, dialers) = (common.prefix(), Arc::new(common.dialers()?));
    let shared = Arc::new(Shared::default());
    let connect = |i: usize| {
        let connect = Connect::new(format!("{prefix}-{i}")).version(common.version());
        let connect = connect.clean(false).keep_alive(0);
        if common.version().is_v5() {
            connect.expiry(300)
        } else {
            connect
        }
    };
    let topic = |i: usize| format!("{prefix}/flap/{i}");
    let peers = crowd(args.connections, common.handshakes, |i| {
        let (dialer, connect, topic) = (&dialers[i % dialers.len()], connect(i), topic(i));
        async move { Peer::connect(dialer, &connect, Some((&topic, common.qos))).await }
    })
    .await?;
    let mut clients = Vec::new();
    for (i, (peer, _, _)) in peers.into_iter().enumerate() {
        let client = Arc::new(Flapper {
            number: i,
            connect: connect(i),
            cut: Notify::new(),
            audit: Mutex::new(Audit::new(Keeps::Everything)),
        });
        let (dialers, shared) = (dialers.clone(), shared.clone());
        let away = Duration::from_millis(args.away);
        tokio::spawn(live(client.clone(), peer, dialers, away, shared));
        clients.push(client);
    }

    let speakers = speakers(args, &prefix, &topic, &shared).await?;

    sleep(Duration::from_secs(1)).await;
    let before = Moment::now(&common.watched)?;
    let start = Instant::now();
    let mut flaps = 0u64;
    while start.elapsed().as_secs_f64() < args.seconds {
        if args.flaps <= 0.0 {
            sleep(Duration::from_secs_f64(args.seconds)).await;
            break;
        }
        clients[flaps as usize % clients.len()].cut.notify_one();
        flaps += 1;
        sleep_until(start + Duration::from_secs_f64(flaps as f64 / args.flaps)).await;
    }
    let after = Moment::now(&common.watched)?;
    shared.stop.store(true, Relaxed);
    let mut sent = vec![0u64; args.connections];
    for speaker in speakers {
        for (k, n) in speaker.await.map_err(io::Error::other)?? {
            sent[k as usize] = n;
        }
    }
    let lost = || lost(&clients, &sent);
    let deadline = Instant::now() + Duration::from_secs(10);
    while lost() > 0 && Instant::now() < deadline {
        sleep(Duration::from_millis(50)).await;
    }

    let arrived = arrived(&clients);
    let mut report = Report::new("flap");
    report
        .put("transport", common.transports())
        .put("connections", args.connections)
        .put("flaps", flaps)
        .put(
            "flaps_per_s",
            round(flaps as f64 / after.since(&before).as_secs_f64(), 1),
        )
        .put("resumed", shared.resumed.load(Relaxed))
        .put("session_absent", shared.absent.load(Relaxed))
        .put("connects_failed", shared.failed.load(Relaxed))
        .put("published_in_all", sent.iter().sum::<u64>())
        .put("deliveries", arrived.fresh)
        .put("lost", lost())
        .put("duplicates_with_dup", arrived.duplicates)
        .put("faults", serde_json::json!(arrived.faults))
        .latency("reconnect", &shared.reconnect)
        .latency("latency", &shared.latency)
        .processes(&common.watched, (&before, &after), ("flap", flaps));
    Ok(report)
}

type Speaking = JoinHandle<io::Result<Vec<(u32, u64)>>>;

/// Starts the publishers; each has a part of the topics.
async fn speakers(
    args: &FlapArgs,
    prefix: &str,
    topic: &impl Fn(usize) -> String,
    shared: &Arc<Shared>,
) -> io::Result<Vec<Speaking>> {
    let common = &args.common;
    let sources = common.publish_dialers()?;
    let mut speakers = Vec::new();
    for i in 0..args.publishers.max(1) {
        let connect = Connect::new(format!("{prefix}-p{i}")).keep_alive(0);
        let (peer, _, window) = Peer::connect(&sources[i % sources.len()], &connect, None)
            .await
            .map_err(io::Error::other)?;
        let topics = (i..args.connections).step_by(args.publishers.max(1));
        let topics: Vec<_> = topics.map(|k| (k as u32, topic(k))).collect();
        let every = Duration::from_secs_f64(args.publishers.max(1) as f64 / args.rate.max(0.001));
        let shape = (common.qos, common.payload, u64::from(window.min(64)));
        speakers.push(tokio::spawn(speak(
            peer,
            topics,
            every,
            shape,
            shared.clone(),
        )));
    }
    Ok(speakers)
}

/// Messages that were sent and have not arrived; `sent` is by topic.
fn lost(clients: &[Arc<Flapper>], sent: &[u64]) -> u64 {
    let of = |(k, n): (usize, &u64)| {
        let audit = clients[k].audit.lock();
        audit
            .expect("bookkeeping does not panic")
            .lost(k as u32, *n)
    };
    sent.iter().enumerate().map(of).sum()
}

/// What arrived at all clients together.
#[derive(Default)]
struct Arrived {
    fresh: u64,
    duplicates: u64,
    faults: BTreeMap<String, u64>,
}

fn arrived(clients: &[Arc<Flapper>]) -> Arrived {
    let mut all = Arrived::default();
    for client in clients {
        let audit = client.audit.lock().expect("bookkeeping does not panic");
        all.fresh += audit.fresh;
        all.duplicates += audit.duplicates;
        for (name, n) in &audit.fault_counts {
            *all.faults.entry((*name).to_owned()).or_default() += n;
        }
    }
    all
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    resumed: AtomicU64,
    absent: AtomicU64,
    failed: AtomicU64,
    reconnect: Histogram,
    latency: Histogram,
}

struct Flapper {
    number: usize,
    connect: Connect,
    cut: Notify,
    audit: Mutex<Audit>,
}

/// Runs one client: it takes deliveries until its connection is cut, and then comes back.
async fn live(
    client: Arc<Flapper>,
    mut peer: Peer,
    dialers: Arc<Vec<Dialer>>,
    away: Duration,
    shared: Arc<Shared>,
) {
    let mut turn_of_dialer = client.number;
    loop {
        let lost = tokio::select! {
            waited = peer.wait() => {
                let now = now_ns();
                let mut audit = client.audit.lock().expect("bookkeeping does not panic");
                waited.and_then(|()| peer.take(|publish| {
                    if let Some(stamp) = Stamp::read(publish.payload) {
                        audit.deliver(stamp, publish.dup, publish.id);
                        shared.latency.record(now.saturating_sub(stamp.sent_ns));
                    }
                })).is_err()
            }
            () = client.cut.notified() => true,
        };
        if !lost {
            continue;
        }
        peer.cut(Cut::Reset);
        sleep(away).await;
        let begun = std::time::Instant::now();
        peer = loop {
            // With several URLs, the client comes back over another transport.
            turn_of_dialer += 1;
            let dialer = &dialers[turn_of_dialer % dialers.len()];
            match Peer::connect(dialer, &client.connect, None).await {
                Ok((peer, present, _)) => {
                    let counter = if present {
                        &shared.resumed
                    } else {
                        &shared.absent
                    };
                    counter.fetch_add(1, Relaxed);
                    break peer;
                }
                Err(_) => {
                    shared.failed.fetch_add(1, Relaxed);
                    sleep(Duration::from_millis(200)).await;
                }
            }
        };
        shared
            .reconnect
            .record(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
        client
            .audit
            .lock()
            .expect("bookkeeping does not panic")
            .connected();
    }
}

/// Publishes to the clients' topics in turn; returns the number of messages per topic.
async fn speak(
    mut peer: Peer,
    topics: Vec<(u32, String)>,
    every: Duration,
    (qos, payload, window): (u8, usize, u64),
    shared: Arc<Shared>,
) -> io::Result<Vec<(u32, u64)>> {
    let mut sent: Vec<_> = topics.iter().map(|(k, _)| (*k, 0u64)).collect();
    let mut due = Instant::now();
    let (mut at, mut in_flight) = (0, 0u64);
    while !shared.stop.load(Relaxed) || in_flight > 0 {
        tokio::select! {
            turn = peer.turn(|_| {}) => in_flight -= u64::from(turn?.completed).min(in_flight),
            () = sleep_until(due), if in_flight < window && !shared.stop.load(Relaxed) => {
                let (stream, topic) = &topics[at];
                sent[at].1 += 1;
                let stamp = Stamp { stream: *stream, seq: sent[at].1, sent_ns: now_ns() };
                peer.publish(topic, &stamp.payload(payload), qos);
                in_flight += u64::from(qos > 0);
                at = (at + 1) % topics.len();
                due += every;
                let turn = peer.flush(|_| {}).await?;
                in_flight -= u64::from(turn.completed).min(in_flight);
            }
            () = sleep(Duration::from_millis(250)) => {}
        }
    }
    Ok(sent)
}
