//! The broker is restarted under load, again and again, and no client is disconnected by it.
//!
//! After SIGTERM, a mosquitto that keeps its sessions loses no QoS 1 message that was acknowledged
//! to its publisher. After SIGKILL it forgets its sessions; messages are lost only inside a
//! recorded gap.
//!
//! `TIDEGATE_FULL=1` runs the full counts.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tidegate_kit::audit::{Stamp, now_ns};
use tidegate_kit::client::Client;
use tidegate_kit::dial::Dialer;
use tidegate_kit::process::{MosquittoConfig, Tidegate, TidegateConfig, raise_open_files};
use tidegate_kit::wire::{Connect, Packet};
use tokio::task::JoinSet;

/// The number of publishers in a group; each client of the group receives from all of them.
const GROUP: usize = 10;
/// A message acknowledged up to this long before a kill may not have been passed on by the broker.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

#[test]
fn a_broker_with_persistence_loses_no_message_over_its_restarts() {
    let (clients, restarts) = if full() { (1000, 50) } else { (100, 5) };
    run(clients, restarts, false);
}

#[test]
fn messages_that_a_killed_broker_loses_lie_in_a_recorded_gap() {
    let (clients, restarts) = if full() { (1000, 5) } else { (100, 2) };
    run(clients, restarts, true);
}

fn full() -> bool {
    std::env::var_os("TIDEGATE_FULL").is_some()
}

fn run(clients: usize, restarts: usize, kill: bool) {
    let _machine = crate::alone();
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let limit = Duration::from_secs(60 + 6 * restarts as u64);
    let outcome = runtime.block_on(async {
        tokio::time::timeout(limit, restart(clients, restarts, kill))
            .await
            .unwrap_or_else(|_| Err(format!("the test did not end within {limit:?}")))
    });
    runtime.shutdown_background();
    outcome.unwrap_or_else(|what| panic!("{what}"));
}

/// The state that the clients share.
#[derive(Default)]
struct Books {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    /// Sequence number and time of each acknowledged message, by publisher.
    sent: Mutex<HashMap<u32, Vec<(u64, u64)>>>,
    /// The sequence numbers that each subscriber got, by publisher.
    got: Vec<Mutex<HashMap<u32, HashSet<u64>>>>,
    faults: Mutex<Vec<String>>,
}

impl Books {
    fn fault(&self, what: String) {
        self.faults
            .lock()
            .expect("no thread panicked with the lock")
            .push(what);
    }
}

async fn restart(clients: usize, restarts: usize, kill: bool) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let publishers = clients / 20;
    let subscribers = clients - publishers;
    let config = MosquittoConfig {
        persistence: true,
        max_inflight_messages: Some(65_535),
        ..MosquittoConfig::default()
    };
    let mut broker = config.start().map_err(text)?;
    let tidegate = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), &broker.url())
        .listen(&["tcp"])
        .set("upstream", "backoff_max", "\"200ms\"")
        .start()
        .map_err(text)?;
    let dialer = Arc::new(tidegate.dialer("tcp"));
    let books = Arc::new(Books {
        got: (0..subscribers).map(|_| Mutex::default()).collect(),
        ..Books::default()
    });
    let mut tasks = JoinSet::new();
    for number in 0..subscribers {
        let client = subscriber(&dialer, number).await?;
        tasks.spawn(listen(client, number, books.clone()));
    }
    let mut speakers = JoinSet::new();
    for number in 0..publishers {
        speakers.spawn(speak(dialer.clone(), number, books.clone()));
    }
    progress(&books, publishers).await?;
    // By restart, the times of its begin and of the recovery, in nanoseconds of the audit's clock.
    let mut away: Vec<(u64, u64)> = Vec::new();
    for _ in 0..restarts {
        let began = now_ns();
        broker.stop(kill).map_err(text)?;
        broker.start_again().map_err(text)?;
        progress(&books, publishers).await?;
        away.push((began, now_ns()));
    }
    books.stop.store(true, Ordering::Release);
    while speakers.join_next().await.is_some() {}
    let missing = settle(&books, kill).await;
    tasks.abort_all();
    judge(&books, &tidegate, &missing, &away, kill)
}

/// Checks that no client failed and that messages are missing only where the broker may lose them.
fn judge(
    books: &Books,
    tidegate: &Tidegate,
    missing: &[(usize, u32, u64, u64)],
    away: &[(u64, u64)],
    kill: bool,
) -> Result<(), String> {
    let mut faults = std::mem::take(
        &mut *books
            .faults
            .lock()
            .expect("no thread panicked with the lock"),
    );
    let metrics = tidegate.metrics().map_err(|e| e.to_string())?;
    let gaps = metrics.sum("tidegate_upstream_gaps_total", &[]);
    let said = tidegate.log();
    let said = said
        .iter()
        .filter(|l| l.contains("lost this data link's session"));
    let said = said.count();
    if kill {
        if (gaps as usize) < away.len() || said < away.len() {
            faults.push(format!(
                "{gaps} gaps are counted and {said} logged, of {}",
                away.len()
            ));
        }
        let before = ON_ITS_WAY.as_nanos() as u64;
        let inside = |at: u64| away.iter().any(|(a, b)| at + before >= *a && at <= *b);
        for (subscriber, stream, seq, at) in missing {
            if !inside(*at) {
                faults.push(format!(
                    "subscriber {subscriber} misses message {seq} of stream {stream}, outside any gap"
                ));
            }
        }
    } else {
        if gaps > 0.0 {
            faults.push(format!(
                "{gaps} gaps are counted although the broker kept its sessions"
            ));
        }
        for (subscriber, stream, seq, _) in missing {
            faults.push(format!(
                "subscriber {subscriber} misses message {seq} of stream {stream}"
            ));
        }
    }
    println!(
        "{} acknowledged, {} missing of all deliveries, {gaps} gaps in {} restarts",
        books.acknowledged.load(Ordering::Relaxed),
        missing.len(),
        away.len()
    );
    if faults.is_empty() {
        return Ok(());
    }
    faults.truncate(20);
    let log = tidegate.log();
    let tail = log[log.len().saturating_sub(20)..].join("\n");
    Err(format!("{}\n{tail}", faults.join("\n")))
}

async fn subscriber(dialer: &Dialer, number: usize) -> Result<Client, String> {
    let connect = Connect::new(format!("listener-{number}"));
    let (mut client, _) = Client::connect(dialer, &connect)
        .await
        .map_err(|e| e.to_string())?;
    let filter = format!("restart/{}/#", number % GROUP);
    client
        .subscribe(&[&filter], 1)
        .await
        .map_err(|e| e.to_string())?;
    Ok(client)
}

async fn listen(mut client: Client, number: usize, books: Arc<Books>) {
    loop {
        let packet = match client.next_within(Duration::from_secs(20)).await {
            Ok(Some(packet)) => packet,
            // A quiet connection: this test sends PINGREQ itself.
            Ok(None) => match client.ping().await {
                Ok(()) => continue,
                Err(e) => return books.fault(format!("listener {number}: {e}")),
            },
            Err(e) => return books.fault(format!("listener {number}: {e}")),
        };
        let Packet::Publish(publish) = packet else {
            continue;
        };
        let Some(stamp) = Stamp::read(&publish.payload) else {
            return books.fault(format!(
                "listener {number}: a payload without the right stamp"
            ));
        };
        {
            let mut got = books.got[number]
                .lock()
                .expect("no thread panicked with the lock");
            got.entry(stamp.stream).or_default().insert(stamp.seq);
        }
        if let Err(e) = client.acknowledge(&publish).await {
            return books.fault(format!("listener {number}: {e}"));
        }
    }
}

async fn speak(dialer: Arc<Dialer>, number: usize, books: Arc<Books>) {
    let connect = Connect::new(format!("speaker-{number}"));
    let mut client = match Client::connect(&dialer, &connect).await {
        Ok((client, _)) => client,
        Err(e) => return books.fault(format!("speaker {number}: {e}")),
    };
    let topic = format!("restart/{}/{number}", number % GROUP);
    let stream = number as u32;
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let mut seq = 0;
    while !books.stop.load(Ordering::Acquire) {
        pace.tick().await;
        seq += 1;
        let sent_ns = now_ns();
        let stamp = Stamp {
            stream,
            seq,
            sent_ns,
        };
        match client.publish(&topic, stamp.payload(64), 1).await {
            Ok(code) if code < 0x80 => {}
            Ok(code) => {
                books.fault(format!("speaker {number}: {seq} is answered 0x{code:02X}"));
                continue;
            }
            Err(e) => return books.fault(format!("speaker {number}: {e}")),
        }
        books.acknowledged.fetch_add(1, Ordering::Relaxed);
        let mut sent = books.sent.lock().expect("no thread panicked with the lock");
        sent.entry(stream).or_default().push((seq, sent_ns));
    }
}

/// Waits until messages flow: ten more of each publisher are acknowledged.
async fn progress(books: &Books, publishers: usize) -> Result<(), String> {
    let wanted = books.acknowledged.load(Ordering::Relaxed) + 10 * publishers as u64;
    let deadline = Instant::now() + Duration::from_secs(20);
    while books.acknowledged.load(Ordering::Relaxed) < wanted {
        if Instant::now() > deadline {
            return Err("the broker stopped acknowledging publishes".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Waits until all acknowledged messages have arrived. Returns the missing ones: subscriber,
/// publisher, sequence number, time. Messages that a broker forgot never arrive; then a second
/// without progress ends the wait.
async fn settle(books: &Books, forgets: bool) -> Vec<(usize, u32, u64, u64)> {
    let mut deadline = Instant::now() + Duration::from_secs(if forgets { 1 } else { 20 });
    let mut before = usize::MAX;
    loop {
        let missing = missing(books);
        if missing.len() < before && forgets {
            deadline = Instant::now() + Duration::from_secs(1);
        }
        before = missing.len();
        if missing.is_empty() || Instant::now() > deadline {
            return missing;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn missing(books: &Books) -> Vec<(usize, u32, u64, u64)> {
    let sent = books.sent.lock().expect("no thread panicked with the lock");
    let mut missing = Vec::new();
    for (number, got) in books.got.iter().enumerate() {
        let got = got.lock().expect("no thread panicked with the lock");
        for (stream, all) in sent.iter() {
            if *stream as usize % GROUP != number % GROUP {
                continue;
            }
            let got = got.get(stream);
            let lost = all
                .iter()
                .filter(|(seq, _)| !got.is_some_and(|g| g.contains(seq)));
            missing.extend(lost.map(|(seq, at)| (number, *stream, *seq, *at)));
        }
    }
    missing
}
