//! connect: many idle subscribed connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::args::ConnectArgs;
use super::crowd::crowd;
use super::histogram::Histogram;
use super::peer::Peer;
use super::report::{Moment, Report, round};
use crate::wire::Connect;

/// Opens `base` connections, then the rest, and reports the growth of memory in between.
///
/// # Errors
/// A connection cannot be made, or a watched process is gone.
pub async fn run(args: &ConnectArgs) -> io::Result<Report> {
    let common = &args.common;
    let (prefix, dialers) = (common.prefix(), common.dialers()?);
    let latency = Histogram::default();
    let ended = Arc::new(AtomicU64::new(0));
    let watched = &common.watched;
    let start = Instant::now();
    let topics = args.topics.unwrap_or(args.connections).max(1);
    let open = |i: usize| {
        let (dialer, latency) = (&dialers[i % dialers.len()], &latency);
        let mut connect = Connect::new(format!("{prefix}-{i}"))
            .version(common.version())
            .clean(args.expiry == 0)
            .keep_alive(args.keep_alive);
        if common.version().is_v5() {
            connect = connect.expiry(args.expiry);
        }
        let filter = format!("{prefix}/idle/{}", i % topics);
        async move {
            if args.rate > 0.0 {
                sleep_until(start + Duration::from_secs_f64(i as f64 / args.rate)).await;
            }
            let begun = std::time::Instant::now();
            let filter = Some((filter.as_str(), common.qos));
            let (peer, _, _) = Peer::connect(dialer, &connect, filter).await?;
            latency.record(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
            Ok::<_, crate::client::ClientError>(peer)
        }
    };
    let base = args.base.min(args.connections);
    let settle = Duration::from_secs_f64(args.settle);
    let hold = |peers: Vec<Peer>| {
        for peer in peers {
            tokio::spawn(idle(peer, ended.clone()));
        }
    };
    let empty = Moment::now(watched)?;
    hold(crowd(base, common.handshakes, open).await?);
    sleep(settle).await;
    let some = Moment::now(watched)?;
    let begun = Instant::now();
    hold(
        crowd(args.connections - base, common.handshakes, |i| {
            open(base + i)
        })
        .await?,
    );
    let connecting = begun.elapsed().as_secs_f64();
    let done = Moment::now(watched)?;
    sleep(settle).await;
    let all = Moment::now(watched)?;
    sleep(Duration::from_secs_f64(args.seconds)).await;

    let added = (args.connections - base) as u64;
    let mut report = Report::new("connect");
    report
        .put("transport", common.transports())
        .put("connections", args.connections)
        .put("base", base)
        .put("topics", topics)
        .put(
            "connections_per_s",
            round(added as f64 / connecting.max(1e-9), 0),
        )
        .put("ended_meanwhile", ended.load(Relaxed))
        .latency("connect_and_subscribe", &latency)
        .growth(
            "private_bytes_per_connection",
            watched,
            (&some, &all),
            added,
        )
        .growth(
            "private_bytes_per_early_connection",
            watched,
            (&empty, &some),
            base as u64,
        )
        .processes(watched, (&some, &done), ("connection", added));
    Ok(report)
}

/// Stays connected and answers every packet that comes.
async fn idle(mut peer: Peer, ended: Arc<AtomicU64>) {
    while peer.turn(|_| {}).await.is_ok() {}
    ended.fetch_add(1, Relaxed);
}
