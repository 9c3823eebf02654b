//! fan-out, fan-in, pairs and paced: the same loop with different numbers of publishers and
//! subscribers.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::args::{Common, TrafficArgs};
use super::crowd::crowd;
use super::histogram::Histogram;
use super::peer::Peer;
use super::report::{Moment, Report, round};
use crate::audit::{Audit, Keeps, Stamp, now_ns};
use crate::wire::Connect;

/// Undelivered messages count as lost once deliveries have stood still for this long.
const STANDSTILL: Duration = Duration::from_secs(3);

/// The largest number of messages that a publisher puts into one write.
const BATCH: u64 = 64;

/// The assignment of topics to publishers and subscribers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// All publishers use one topic, and all subscribers subscribe to it.
    One,
    /// Each publisher has a topic, and all subscribers subscribe to all of them by a wildcard.
    All,
    /// Each publisher has a topic, and each subscriber subscribes to one, in turn.
    Own,
}

impl Shape {
    /// Subscribers that get a message of one publisher, on average.
    fn receivers(self, subscribers: usize, publishers: usize) -> f64 {
        match self {
            Self::One | Self::All => subscribers as f64,
            Self::Own => subscribers as f64 / publishers as f64,
        }
    }
}

/// Runs one of the four loads; `defaults` are publishers, subscribers and rate.
///
/// # Errors
/// A connection cannot be made, or a watched process is gone.
pub async fn run(
    name: &str,
    args: &TrafficArgs,
    shape: Shape,
    defaults: (usize, Option<usize>, f64),
) -> io::Result<Report> {
    let publishers = args.publishers.unwrap_or(defaults.0).max(1);
    let subscribers = args.subscribers.or(defaults.1).unwrap_or(publishers).max(1);
    let rate = args.rate.unwrap_or(defaults.2);
    let common = &args.common;
    let prefix = common.prefix();
    let shared = Arc::new(Shared::new(publishers));

    let (to, from) = (common.dialers()?, common.publish_dialers()?);
    let filter = |i: usize| match shape {
        Shape::One => format!("{prefix}/all"),
        Shape::All => format!("{prefix}/of/+"),
        Shape::Own => format!("{prefix}/of/{}", i % publishers),
    };
    let connect = |id: String| Connect::new(id).version(common.version()).keep_alive(0);
    let listening = crowd(subscribers, common.handshakes, |i| {
        let (dialer, filter) = (&to[i % to.len()], filter(i));
        let connect = connect(format!("{prefix}-s{i}")).receive_max(1000);
        async move { Peer::connect(dialer, &connect, Some((&filter, common.qos))).await }
    })
    .await?;
    let speaking = crowd(publishers, common.handshakes, |i| {
        let (dialer, connect) = (&from[i % from.len()], connect(format!("{prefix}-p{i}")));
        async move { Peer::connect(dialer, &connect, None).await }
    })
    .await?;

    let mut audits = Vec::new();
    let mut listeners = Vec::new();
    for (peer, _, _) in listening {
        let audit = Arc::new(Mutex::new(Audit::new(Keeps::Everything)));
        audits.push(audit.clone());
        listeners.push(tokio::spawn(listen(peer, audit, shared.clone())));
    }
    let receivers = shape.receivers(subscribers, publishers);
    let mut speakers = Vec::new();
    for (i, (peer, _, receive_max)) in speaking.into_iter().enumerate() {
        let topic = match shape {
            Shape::One => format!("{prefix}/all"),
            Shape::All | Shape::Own => format!("{prefix}/of/{i}"),
        };
        let every = (rate > 0.0).then(|| Duration::from_secs_f64(publishers as f64 / rate));
        let speaker = Speaker {
            peer,
            topic,
            stream: i as u32,
            qos: common.qos,
            window: u64::from(args.window.min(receive_max)),
            payload: vec![b'.'; common.payload.max(crate::audit::STAMP_LEN)],
            every,
            phase: i as f64 / publishers as f64,
            ahead: args.ahead,
            receivers,
            messages: args.messages.unwrap_or(u64::MAX),
            shared: shared.clone(),
        };
        speakers.push(tokio::spawn(speaker.speak()));
    }

    let watched = &common.watched;
    if args.messages.is_none() {
        sleep(Duration::from_secs_f64(args.warmup)).await;
        shared.latency.clear();
    }
    let (before, first) = (Moment::now(watched)?, shared.delivered.load(Relaxed));
    if args.messages.is_none() {
        sleep(Duration::from_secs_f64(args.seconds)).await;
    } else {
        while !speakers.iter().all(tokio::task::JoinHandle::is_finished) {
            sleep(Duration::from_millis(1)).await;
        }
        settle(&shared, audits.len(), shape).await;
    }
    let (after, last) = (Moment::now(watched)?, shared.delivered.load(Relaxed));
    shared.stop.store(true, Relaxed);
    let mut unacknowledged = 0;
    for speaker in speakers {
        unacknowledged += speaker.await?;
    }
    settle(&shared, audits.len(), shape).await;
    listeners.iter().for_each(tokio::task::JoinHandle::abort);

    let measured = Measured {
        publishers,
        subscribers,
        rate,
        delivered: last - first,
        unacknowledged,
        moments: (before, after),
    };
    let mut report = measured.report(name, common, &shared);
    tally(&mut report, &audits, &shared, shape);
    Ok(report)
}

/// The figures of one run.
struct Measured {
    publishers: usize,
    subscribers: usize,
    rate: f64,
    delivered: u64,
    unacknowledged: u64,
    moments: (Moment, Moment),
}

impl Measured {
    fn report(&self, name: &str, common: &Common, shared: &Shared) -> Report {
        let (before, after) = &self.moments;
        let seconds = after.since(before).as_secs_f64();
        let mut report = Report::new(name);
        report
            .put("transport", common.transports())
            .put("publishers", self.publishers)
            .put("subscribers", self.subscribers)
            .put("qos", common.qos)
            .put("payload_bytes", common.payload)
            .put("rate_asked", self.rate)
            .put("seconds", round(seconds, 2))
            .put("deliveries", self.delivered)
            .put(
                "deliveries_per_s",
                round(self.delivered as f64 / seconds, 0),
            )
            .put("published_in_all", shared.sent_in_all())
            .put("publishes_unacknowledged", self.unacknowledged)
            .put("publishes_refused", shared.refused.load(Relaxed))
            .put(
                "errors",
                shared.errors.lock().expect("a push does not panic").clone(),
            )
            .latency("latency", &shared.latency)
            .processes(
                &common.watched,
                (before, after),
                ("delivery", self.delivered),
            );
        report
    }
}

/// Adds loss, duplicates and disorder over all receivers.
fn tally(report: &mut Report, audits: &[Arc<Mutex<Audit>>], shared: &Shared, shape: Shape) {
    let (mut lost, mut marked, mut unmarked, mut disorder) = (0, 0, 0, 0);
    for (i, audit) in audits.iter().enumerate() {
        let audit = audit.lock().expect("bookkeeping does not panic");
        let sent = |k: usize| shared.sent[k].load(Relaxed);
        lost += match shape {
            Shape::Own => {
                let k = i % shared.sent.len();
                audit.lost(k as u32, sent(k))
            }
            _ => (0..shared.sent.len())
                .map(|k| audit.lost(k as u32, sent(k)))
                .sum(),
        };
        let count = |name: &str| audit.fault_counts.get(name).copied().unwrap_or(0);
        marked += audit.duplicates + count("redelivered without reason");
        unmarked += count("duplicate without DUP");
        disorder += count("disorder");
    }
    report
        .put("lost", lost)
        .put("duplicates_with_dup", marked)
        .put("duplicates_without_dup", unmarked)
        .put("disorder", disorder);
}

/// The state that all tasks of a run share.
struct Shared {
    delivered: AtomicU64,
    /// Messages sent by stream.
    sent: Vec<AtomicU64>,
    total: AtomicU64,
    /// Deliveries counted as lost, so that losses at QoS 0 do not stop the publishers.
    written_off: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
    latency: Histogram,
    errors: Mutex<Vec<String>>,
}

impl Shared {
    fn new(streams: usize) -> Self {
        Self {
            delivered: AtomicU64::new(0),
            sent: (0..streams).map(|_| AtomicU64::new(0)).collect(),
            total: AtomicU64::new(0),
            written_off: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            latency: Histogram::default(),
            errors: Mutex::new(Vec::new()),
        }
    }

    fn sent_in_all(&self) -> u64 {
        self.total.load(Relaxed)
    }

    fn error(&self, what: String) {
        let mut errors = self.errors.lock().expect("a push does not panic");
        if errors.len() < 10 {
            errors.push(what);
        }
    }
}

async fn listen(mut peer: Peer, audit: Arc<Mutex<Audit>>, shared: Arc<Shared>) {
    loop {
        let waited = peer.wait().await;
        let now = now_ns();
        let taken = waited.and_then(|()| {
            let mut audit = audit.lock().expect("bookkeeping does not panic");
            peer.take(|publish| {
                if let Some(stamp) = Stamp::read(publish.payload) {
                    audit.deliver(stamp, publish.dup, publish.id);
                    shared.latency.record(now.saturating_sub(stamp.sent_ns));
                }
            })
        });
        match taken {
            Ok(turn) => drop(
                shared
                    .delivered
                    .fetch_add(u64::from(turn.delivered), Relaxed),
            ),
            Err(e) => return shared.error(format!("a subscriber's connection ended: {e}")),
        }
    }
}

/// Waits until all sent messages are delivered, or deliveries stand still.
async fn settle(shared: &Shared, subscribers: usize, shape: Shape) {
    let streams = shared.sent.len();
    let expected: u64 = match shape {
        Shape::One | Shape::All => shared.sent_in_all() * subscribers as u64,
        Shape::Own => (0..subscribers)
            .map(|i| shared.sent[i % streams].load(Relaxed))
            .sum(),
    };
    let (mut last, mut since) = (shared.delivered.load(Relaxed), Instant::now());
    while last < expected && since.elapsed() < STANDSTILL {
        sleep(Duration::from_millis(2)).await;
        let now = shared.delivered.load(Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

/// A publisher.
struct Speaker {
    peer: Peer,
    topic: String,
    stream: u32,
    qos: u8,
    window: u64,
    payload: Vec<u8>,
    /// Time between two messages; `None` is as fast as the publisher can go.
    every: Option<Duration>,
    /// The fraction of that time, 0 to 1, after which the publisher begins, so that publishers do
    /// not all start at once.
    phase: f64,
    ahead: u64,
    receivers: f64,
    messages: u64,
    shared: Arc<Shared>,
}

impl Speaker {
    /// Publishes until told to stop; returns how many publishes were not acknowledged.
    async fn speak(mut self) -> u64 {
        let shared = self.shared.clone();
        let mut in_flight = 0;
        let result = self.run(&mut in_flight).await;
        // In-flight messages get some time to be acknowledged, however the run was stopped.
        let deadline = Instant::now() + STANDSTILL;
        let mut result = result;
        while result.is_ok() && in_flight > 0 && Instant::now() < deadline {
            let turn = tokio::time::timeout_at(deadline, self.peer.turn(|_| {})).await;
            result = match turn {
                Ok(Ok(turn)) => {
                    in_flight -= u64::from(turn.completed).min(in_flight);
                    Ok(())
                }
                Ok(Err(e)) => Err(e),
                Err(_) => Ok(()),
            };
        }
        if let Err(e) = result {
            shared.error(format!("a publisher's connection ended: {e}"));
        }
        in_flight
    }

    async fn run(&mut self, in_flight: &mut u64) -> io::Result<()> {
        let shared = self.shared.clone();
        let mut due = Instant::now() + self.every.unwrap_or_default().mul_f64(self.phase);
        let mut stuck = (0, Instant::now());
        while !shared.stop.load(Relaxed) && shared.sent_in_all() < self.messages {
            let free = if self.qos == 0 {
                BATCH
            } else {
                self.window - *in_flight
            };
            let wanted = match self.every {
                None => self.room(&mut stuck),
                Some(every) => {
                    let late = Instant::now().saturating_duration_since(due);
                    if Instant::now() < due {
                        0
                    } else {
                        1 + late.div_duration_f64(every) as u64
                    }
                }
            };
            let n = free
                .min(wanted)
                .min(BATCH)
                .min(self.messages - shared.sent_in_all());
            if n == 0 {
                // An acknowledgement, the clock or a short timeout wakes the publisher.
                let soon = Instant::now() + Duration::from_millis(1);
                let until = match self.every {
                    Some(_) if wanted == 0 => due.min(Instant::now() + Duration::from_millis(250)),
                    _ => soon,
                };
                tokio::select! {
                    turn = self.peer.turn(|_| {}) => self.account(turn?, in_flight),
                    () = sleep_until(until) => {}
                }
                continue;
            }
            for _ in 0..n {
                self.say(due);
                due += self.every.unwrap_or_default();
            }
            if self.qos > 0 {
                *in_flight += n;
            }
            let turn = self.peer.flush(|_| {}).await?;
            self.account(turn, in_flight);
        }
        Ok(())
    }

    fn account(&self, turn: super::peer::Turn, in_flight: &mut u64) {
        *in_flight -= u64::from(turn.completed).min(*in_flight);
        self.shared
            .refused
            .fetch_add(u64::from(turn.refused), Relaxed);
    }

    fn say(&mut self, due: Instant) {
        let sent = &self.shared.sent[self.stream as usize];
        let seq = sent.fetch_add(1, Relaxed) + 1;
        self.shared.total.fetch_add(1, Relaxed);
        // The latency of a message that is late because the server pushes back counts from the time
        // when it was due. The timer's resolution of a millisecond does not count against the
        // server.
        let late = Instant::now().saturating_duration_since(due);
        let late = if self.every.is_some() && late > Duration::from_millis(3) {
            u64::try_from(late.as_nanos()).unwrap_or(u64::MAX)
        } else {
            0
        };
        let sent_ns = now_ns().saturating_sub(late);
        Stamp {
            stream: self.stream,
            seq,
            sent_ns,
        }
        .write(&mut self.payload);
        self.peer.publish(&self.topic, &self.payload, self.qos);
    }

    /// The number of messages that may be sent now without running too far ahead of the deliveries.
    fn room(&self, stuck: &mut (u64, Instant)) -> u64 {
        let shared = &self.shared;
        let delivered = shared.delivered.load(Relaxed);
        let expected = (shared.sent_in_all() as f64 * self.receivers) as u64;
        let done = delivered + shared.written_off.load(Relaxed);
        let open = expected.saturating_sub(done) as f64 / self.receivers;
        let room = self.ahead.saturating_sub(open.ceil() as u64);
        if room > 0 || stuck.0 != delivered {
            *stuck = (delivered, Instant::now());
        } else if stuck.1.elapsed() > STANDSTILL / 3 {
            shared.written_off.store(expected - delivered, Relaxed);
        }
        room
    }
}
