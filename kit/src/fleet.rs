//! A fleet of clients that vanish and come back under live traffic, and the promises that must hold
//! meanwhile: no message is lost or out of order, and duplicates come only with DUP and only after
//! a resume.

mod member;
mod speaker;
mod verdict;

pub use member::{Kind, Tally};
pub use verdict::Verdict;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::audit::{Audit, Keeps, Stamp};
use crate::client::{Client, ClientError};
use crate::dial::Dialer;
use crate::link::Cut;
use crate::load::crowd::crowd;
use crate::wire::{Connect, Packet};
use member::{Command, Handle, Member};
use speaker::Speaker;

/// How large a fleet is and how it behaves.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Clients. A third keep MQTT 5 sessions, a third 3.1.1 sessions, a third are clean.
    pub clients: usize,
    /// Clients that share a second topic.
    pub group: usize,
    /// Flaps in all.
    pub flaps: usize,
    /// Flaps a second together.
    pub flap_rate: f64,
    /// Messages a second from steady publishers, in addition to messages aimed at clients that
    /// vanish.
    pub rate: f64,
    /// Messages aimed at a client around the moment when it vanishes.
    pub aimed: usize,
    /// Will Delay in seconds. A tenth of the clients with MQTT 5 sessions have such a will.
    pub will_delay: u32,
    /// The least time by which the broker's acknowledgements are delayed. Where the server cannot
    /// notice a cut, or forgets the session with it, a client with open publishes comes back before
    /// that time.
    pub ack_delay: Duration,
    /// The ways in which clients vanish, chosen at random.
    pub cuts: Vec<Cut>,
    /// Topics begin with this.
    pub prefix: String,
    /// Seed of all choices.
    pub seed: u64,
}

/// The state that the tasks of a fleet share.
#[derive(Debug)]
pub(crate) struct Shared {
    plan: Plan,
    /// Messages sent by stream.
    sent: Vec<AtomicU64>,
    speakers_stop: AtomicBool,
    faults: Mutex<Vec<String>>,
    start: Instant,
    flaps: AtomicU64,
    resumes: AtomicU64,
    retries: AtomicU64,
    resent: AtomicU64,
}

/// A fleet that is connected and subscribed.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    members: Vec<Handle>,
    speakers: Vec<(mpsc::Sender<usize>, JoinHandle<io::Result<()>>)>,
    /// Publishes of the clients, as a subscriber at the broker sees them, and wills.
    watch: JoinHandle<()>,
    arrivals: Arc<Mutex<Arrivals>>,
    wills: Arc<Mutex<Vec<String>>>,
    will_flapped: Option<Instant>,
    rng: Rng,
}

impl Fleet {
    /// Connects a fleet through `edge`, with steady publishers through `edge` and at the `broker` itself.
    ///
    /// # Errors
    /// A client cannot connect or subscribe.
    pub async fn gather(plan: Plan, edge: Arc<Dialer>, broker: &Dialer) -> io::Result<Self> {
        let streams = SPEAKERS * plan.topics();
        let seed = plan.seed;
        let shared = Arc::new(Shared {
            sent: (0..streams).map(|_| AtomicU64::new(0)).collect(),
            plan,
            speakers_stop: AtomicBool::new(false),
            faults: Mutex::new(Vec::new()),
            start: Instant::now(),
            flaps: AtomicU64::new(0),
            resumes: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            resent: AtomicU64::new(0),
        });
        let arrivals = Arc::new(Mutex::new(Arrivals::new()));
        let wills = Arc::new(Mutex::new(Vec::new()));
        let watcher = watcher(broker, &shared.plan.prefix)
            .await
            .map_err(io::Error::other)?;
        let watch = tokio::spawn(watch(
            watcher,
            arrivals.clone(),
            wills.clone(),
            shared.clone(),
        ));
        let members = crowd(shared.plan.clients, 32, |i| {
            let member = Member::new(i, edge.clone(), shared.clone());
            async move { member.join().await }
        })
        .await?;
        let mut speakers = Vec::new();
        for number in 0..SPEAKERS {
            // Most publishers are backends at the broker; one is a client like those of the fleet.
            let dialer = if number + 1 < SPEAKERS {
                broker
            } else {
                &*edge
            };
            let speaker = Speaker::connect(number, dialer, shared.clone()).await?;
            let (aim, aimed) = mpsc::channel(1000);
            speakers.push((aim, tokio::spawn(speaker.speak(aimed))));
        }
        let rng = Rng(seed | 1);
        let will_flapped = None;
        Ok(Self {
            shared,
            members,
            speakers,
            watch,
            arrivals,
            wills,
            will_flapped,
            rng,
        })
    }

    /// Lets every client publish once and every topic be used, so that nothing happens for the first
    /// time when clients begin to vanish.
    pub async fn warm_up(&mut self) {
        let topics = self.shared.plan.topics();
        for i in 0..topics {
            let at = i % SPEAKERS;
            let _ = self.speakers[at].0.send(i).await;
        }
        for member in &self.members {
            let _ = member.commands.send(Command::Say).await;
        }
        sleep(Duration::from_secs(2)).await;
    }

    /// Lets clients vanish and come back, as many times and as fast as planned, and waits until the
    /// last is back.
    ///
    /// # Errors
    /// Clients do not come back in time.
    pub async fn flap(&mut self) -> io::Result<()> {
        let plan = self.shared.plan.clone();
        let start = Instant::now();
        for n in 0..plan.flaps {
            sleep_until(start + Duration::from_secs_f64(n as f64 / plan.flap_rate)).await;
            let i = self.idle_member();
            let member = &self.members[i];
            let how = plan.cuts[self.rng.below(plan.cuts.len())];
            // Most absences are short, some are long and some are none at all, as on mobile
            // networks.
            let away = match self.rng.below(10) {
                0..3 => 0,
                3..9 => self.rng.below(200),
                _ => 1000 + self.rng.below(1000),
            };
            let says = self.rng.below(3);
            let unknown = how == Cut::Silent || !member.kind.keeps_session();
            let away = if says > 0 && unknown {
                away.min(plan.ack_delay.as_millis() as usize / 4)
            } else {
                away
            };
            let flap = Command::Flap {
                how,
                says,
                lingers: Duration::from_millis(self.rng.below(12) as u64),
                away: Duration::from_millis(away as u64),
            };
            member.busy.store(true, Relaxed);
            if member.kind.has_will() && self.will_flapped.is_none() {
                self.will_flapped = Some(Instant::now());
            }
            let speaker = &self.speakers[self.rng.below(SPEAKERS)].0;
            for _ in 0..plan.aimed / 2 {
                let _ = speaker.try_send(i);
            }
            let _ = member.commands.send(flap).await;
            for _ in plan.aimed / 2..plan.aimed {
                let _ = speaker.try_send(i);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.members.iter().any(|m| m.busy.load(Relaxed)) {
            if Instant::now() > deadline {
                let busy = self.members.iter().filter(|m| m.busy.load(Relaxed));
                let who: Vec<_> = busy.take(10).map(|m| m.number).collect();
                return Err(io::Error::other(format!(
                    "clients are not back: {who:?} ..."
                )));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends the steady publishers and waits until everything that must arrive has arrived, or
    /// `wait` is over.
    pub async fn come_to_rest(&mut self, wait: Duration) {
        self.shared.speakers_stop.store(true, Relaxed);
        for (aim, speaker) in self.speakers.drain(..) {
            drop(aim);
            match speaker.await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => self.shared.fault(format!("a steady publisher: {e}")),
                Err(e) => self.shared.fault(format!("a steady publisher: {e}")),
            }
        }
        let deadline = Instant::now() + wait;
        while Instant::now() < deadline && !self.is_complete() {
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a will that a flap had released would have fired, disconnects every client with
    /// DISCONNECT, and judges.
    pub async fn judge(self) -> Verdict {
        if let Some(first) = self.will_flapped {
            let delay = Duration::from_secs(u64::from(self.shared.plan.will_delay) + 1);
            sleep_until(first + delay).await;
        }
        let tallies = crowd(self.members.len(), 64, |i| {
            let member = &self.members[i];
            async move { Ok::<_, String>(member.finish().await) }
        })
        .await
        .expect("no future above fails");
        // A server that publishes wills after DISCONNECT would do so at once.
        sleep(Duration::from_millis(500)).await;
        self.watch.abort();
        let arrivals = self.arrivals.lock().expect("bookkeeping does not panic");
        let wills = self.wills.lock().expect("a push does not panic");
        verdict::judge(&self.shared, &tallies, &arrivals, &wills)
    }

    /// The number of flaps after which the session was present.
    pub fn resumes(&self) -> u64 {
        self.shared.resumes.load(Relaxed)
    }

    fn is_complete(&self) -> bool {
        let arrivals = self.arrivals.lock().expect("bookkeeping does not panic");
        self.members.iter().all(|member| {
            let tally = member.tally.lock().expect("bookkeeping does not panic");
            let kind = member.kind;
            let heard = !kind.keeps_session() || verdict::lost(&self.shared, &tally) == 0;
            let stream = self.shared.plan.up_stream(member.number);
            let arrived = !kind.resends() || arrivals.of(kind).lost(stream, tally.said) == 0;
            heard && arrived && tally.unacknowledged == 0
        })
    }

    /// A client that is connected, chosen at random.
    fn idle_member(&mut self) -> usize {
        let n = self.members.len();
        let from = self.rng.below(n);
        let idle = (0..n)
            .map(|k| (from + k) % n)
            .find(|i| !self.members[*i].busy.load(Relaxed));
        idle.unwrap_or(from)
    }
}

/// The clients' publishes as a subscriber at the broker sees them.
#[derive(Debug)]
pub(crate) struct Arrivals {
    /// Publishes of clients that send them again until they are acknowledged.
    kept: Audit,
    /// Publishes of clients that do not send them again: they may be lost with their connections.
    clean: Audit,
}

impl Arrivals {
    fn new() -> Self {
        let mut this = Self {
            kept: Audit::new(Keeps::Everything),
            clean: Audit::new(Keeps::Order),
        };
        this.kept.connected();
        this.clean.connected();
        this
    }

    fn of(&self, kind: Kind) -> &Audit {
        if kind.resends() {
            &self.kept
        } else {
            &self.clean
        }
    }

    fn of_mut(&mut self, kind: Kind) -> &mut Audit {
        if kind.resends() {
            &mut self.kept
        } else {
            &mut self.clean
        }
    }
}

/// The steady publishers; each is a stream of its own on each topic.
const SPEAKERS: usize = 4;

impl Plan {
    /// Topics that steady publishers use: one of each client, and one of each group.
    fn topics(&self) -> usize {
        self.clients + self.clients.div_ceil(self.group)
    }

    fn topic(&self, index: usize) -> String {
        if index < self.clients {
            format!("{}/own/{index}", self.prefix)
        } else {
            format!("{}/group/{}", self.prefix, index - self.clients)
        }
    }

    /// The topics that a client has subscribed to.
    fn topics_of(&self, client: usize) -> [usize; 2] {
        [client, self.clients + client / self.group]
    }

    fn stream(&self, speaker: usize, topic: usize) -> u32 {
        (speaker * self.topics() + topic) as u32
    }

    /// The stream of a client's own publishes.
    fn up_stream(&self, client: usize) -> u32 {
        (SPEAKERS * self.topics() + client) as u32
    }
}

impl Shared {
    fn fault(&self, what: String) {
        let mut faults = self.faults.lock().expect("a push does not panic");
        if faults.len() < 50 {
            let at = self.start.elapsed().as_secs_f64();
            faults.push(format!("{what} (after {at:.3} s)"));
        }
    }
}

/// xorshift64*: the choices must be repeatable, not unpredictable.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

/// A subscriber at the broker itself: it sees the publishes that Tidegate forwards for its clients.
async fn watcher(broker: &Dialer, prefix: &str) -> Result<Client, ClientError> {
    let connect = Connect::new(format!("{prefix}-watcher"))
        .receive_max(2000)
        .keep_alive(0);
    let (mut client, _) = Client::connect(broker, &connect).await?;
    let (up, will) = (format!("{prefix}/up/#"), format!("{prefix}/will/#"));
    client.subscribe(&[&up, &will], 1).await?;
    Ok(client)
}

async fn watch(
    mut client: Client,
    arrivals: Arc<Mutex<Arrivals>>,
    wills: Arc<Mutex<Vec<String>>>,
    shared: Arc<Shared>,
) {
    loop {
        let publish = match client.next().await {
            Ok(Packet::Publish(publish)) => publish,
            Ok(_) => continue,
            Err(e) => return shared.fault(format!("the watcher at the broker: {e}")),
        };
        if publish.topic.contains("/will/") {
            wills
                .lock()
                .expect("a push does not panic")
                .push(publish.topic.clone());
        } else if let Some(stamp) = Stamp::read(&publish.payload) {
            let mut arrivals = arrivals.lock().expect("bookkeeping does not panic");
            let client = stamp.stream.wrapping_sub(shared.plan.up_stream(0)) as usize;
            let audit = arrivals.of_mut(Kind::of(client));
            audit.deliver(stamp, publish.dup, publish.id);
        }
        if let Err(e) = client.acknowledge(&publish).await {
            return shared.fault(format!("the watcher at the broker: {e}"));
        }
    }
}
