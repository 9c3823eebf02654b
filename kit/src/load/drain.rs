//! drain: sessions are away while messages come, and then empty their queues.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::args::DrainArgs;
use super::crowd::crowd;
use super::histogram::Histogram;
use super::peer::Peer;
use super::report::{Moment, Report, round};
use crate::audit::{Audit, Keeps, Stamp, now_ns};
use crate::client::ClientError;
use crate::link::Cut;
use crate::wire::Connect;

/// The longest time that a drain may make no progress.
const STANDSTILL: Duration = Duration::from_secs(5);

/// Runs the load.
///
/// # Errors
/// A connection cannot be made, or a watched process is gone.
pub async fn run(args: &DrainArgs) -> io::Result<Report> {
    let common = &args.common;
    let (prefix, dialers) = (common.prefix(), common.dialers()?);
    let watched = &common.watched;
    let topics = args.topics.max(1);
    let topic = |k: usize| format!("{prefix}/drain/{k}");
    let connect = |i: usize| {
        let connect = Connect::new(format!("{prefix}-{i}")).version(common.version());
        let connect = connect.clean(false).keep_alive(0);
        if common.version().is_v5() {
            connect.expiry(3600).receive_max(1000)
        } else {
            connect
        }
    };
    // Few connections are open at any time, so that their memory is reused and does not hide that
    // of the sessions.
    let detach = |i: usize| {
        let (dialer, connect, topic) = (&dialers[i % dialers.len()], connect(i), topic(i % topics));
        async move {
            let qos = common.qos.max(1);
            let (peer, _, _) = Peer::connect(dialer, &connect, Some((&topic, qos))).await?;
            peer.cut(Cut::Close);
            Ok::<_, ClientError>(())
        }
    };
    let settle = Duration::from_secs_f64(args.settle);
    let base = args.base.min(args.connections);
    crowd(base, common.handshakes, detach).await?;
    sleep(settle).await;
    let some = Moment::now(watched)?;
    crowd(args.connections - base, common.handshakes, |i| {
        detach(base + i)
    })
    .await?;
    sleep(settle).await;
    let away = Moment::now(watched)?;

    let sent = fill(args, &topic).await?;
    sleep(settle).await;
    let full = Moment::now(watched)?;

    let latency = Histogram::default();
    let begun = Instant::now();
    let (fresh, lost, faults) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    crowd(args.connections, common.handshakes, |i| {
        let (dialer, connect) = (&dialers[i % dialers.len()], connect(i));
        let (k, latency, fresh, lost, faults) = (i % topics, &latency, &fresh, &lost, &faults);
        let wanted = sent[k];
        async move {
            let begun = std::time::Instant::now();
            let (mut peer, _, _) = Peer::connect(dialer, &connect, None).await?;
            let audit = receive(&mut peer, k as u32, wanted).await?;
            peer.disconnect().await;
            latency.record(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
            fresh.fetch_add(audit.fresh, Relaxed);
            lost.fetch_add(audit.lost(k as u32, wanted), Relaxed);
            faults.fetch_add(audit.fault_counts.values().sum(), Relaxed);
            Ok::<_, ClientError>(())
        }
    })
    .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let drained = Moment::now(watched)?;

    let added = (args.connections - base) as u64;
    let references = (0..args.connections).map(|i| sent[i % topics]).sum();
    let fresh = fresh.into_inner();
    let mut report = Report::new("drain");
    report
        .put("transport", common.transports())
        .put("sessions", args.connections)
        .put("messages_sent", sent.iter().sum::<u64>())
        .put("payload_bytes", common.payload)
        .put("qos", common.qos.max(1))
        .put("queued_references", references)
        .put("deliveries", fresh)
        .put("deliveries_per_s", round(fresh as f64 / seconds, 0))
        .put("lost", lost.into_inner())
        .put("faults", faults.into_inner())
        .latency("reconnect_and_drain", &latency)
        .growth(
            "private_bytes_per_detached_session",
            watched,
            (&some, &away),
            added,
        )
        .growth(
            "private_bytes_per_queued_reference",
            watched,
            (&away, &full),
            references,
        )
        .processes(watched, (&full, &drained), ("delivery", fresh));
    Ok(report)
}

/// Receives until all of a topic's messages are there, or none comes for [`STANDSTILL`].
async fn receive(peer: &mut Peer, topic: u32, wanted: u64) -> Result<Audit, ClientError> {
    let mut audit = Audit::new(Keeps::Everything);
    while audit.lost(topic, wanted) > 0 {
        let turn = peer.turn(|publish| {
            if let Some(stamp) = Stamp::read(publish.payload) {
                audit.deliver(stamp, publish.dup, publish.id);
            }
        });
        match timeout(STANDSTILL, turn).await {
            Ok(turn) => drop(turn?),
            Err(_) => break,
        }
    }
    Ok(audit)
}

/// Publishes the messages, topics in turn; returns the number of messages per topic.
async fn fill(args: &DrainArgs, topic: &impl Fn(usize) -> String) -> io::Result<Vec<u64>> {
    let common = &args.common;
    let topics = args.topics.max(1);
    let connect = Connect::new(format!("{}-p", common.prefix())).keep_alive(0);
    let dialers = common.publish_dialers()?;
    let (mut peer, _, window) = Peer::connect(&dialers[0], &connect, None)
        .await
        .map_err(io::Error::other)?;
    let window = u64::from(window.min(64));
    let start = Instant::now();
    let mut sent = vec![0u64; topics];
    let mut in_flight = 0;
    for n in 0..args.messages {
        if args.rate > 0.0 {
            sleep_until(start + Duration::from_secs_f64(n as f64 / args.rate)).await;
        }
        let k = n as usize % topics;
        sent[k] += 1;
        let stamp = Stamp {
            stream: k as u32,
            seq: sent[k],
            sent_ns: now_ns(),
        };
        peer.publish(&topic(k), &stamp.payload(common.payload), 1);
        in_flight += 1;
        in_flight -= u64::from(peer.flush(|_| {}).await?.completed);
        while in_flight >= window || (n + 1 == args.messages && in_flight > 0) {
            let turn = timeout(STANDSTILL, peer.turn(|_| {})).await;
            in_flight -= u64::from(turn.map_err(io::Error::other)??.completed);
        }
    }
    peer.disconnect().await;
    Ok(sent)
}
