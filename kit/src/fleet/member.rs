//! One client of the fleet.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Rng, Shared};
use crate::audit::{Audit, Keeps, Stamp};
use crate::client::{Client, ClientError, PATIENCE};
use crate::dial::Dialer;
use crate::link::Cut;
use crate::wire::{Ack, Connect, Packet, Props, Publish, Value, Version, Will, prop};

/// The kinds of session in a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MQTT 5 with Session Expiry, and perhaps a delayed will.
    Expiry {
        /// Whether the client has a will.
        will: bool,
    },
    /// 3.1.1 with Clean Session 0.
    Kept311,
    /// A clean session that subscribes again at each connect. With MQTT 5 the client also sends its
    /// unacknowledged publishes again, as MQTT.js does with its defaults; with 3.1.1 it forgets
    /// them.
    Clean(Version),
}

impl Kind {
    pub(super) fn of(number: usize) -> Self {
        match number % 3 {
            0 => Self::Expiry {
                will: (number / 3).is_multiple_of(10),
            },
            1 => Self::Kept311,
            _ if number.is_multiple_of(2) => Self::Clean(Version::V5),
            _ => Self::Clean(Version::V311),
        }
    }

    /// Whether the session outlives its connection.
    pub fn keeps_session(self) -> bool {
        !matches!(self, Self::Clean(_))
    }

    /// Whether the client sends an unacknowledged publish again on the next connection.
    pub fn resends(self) -> bool {
        self != Self::Clean(Version::V311)
    }

    /// Whether the client has a will.
    pub fn has_will(self) -> bool {
        matches!(self, Self::Expiry { will: true })
    }
}

/// The record of one client's run.
#[derive(Debug)]
pub struct Tally {
    /// Its number in the fleet.
    pub number: usize,
    /// Its sort of session.
    pub kind: Kind,
    /// What it received.
    pub audit: Audit,
    /// Messages it has published, each counted once.
    pub said: u64,
    /// The number of those messages that are not acknowledged yet.
    pub unacknowledged: usize,
}

#[derive(Debug)]
pub(super) enum Command {
    /// Publish once.
    Say,
    /// Publish, wait a moment, vanish, stay away, come back.
    Flap {
        how: Cut,
        says: usize,
        lingers: Duration,
        away: Duration,
    },
    /// Disconnect with DISCONNECT.
    Finish(oneshot::Sender<()>),
}

/// The fleet's hold on a client.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) number: usize,
    pub(super) kind: Kind,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) busy: Arc<AtomicBool>,
    pub(super) tally: Arc<Mutex<Tally>>,
}

impl Handle {
    /// Ends the client and returns its tally.
    pub(super) async fn finish(&self) -> Arc<Mutex<Tally>> {
        let (done, wait) = oneshot::channel();
        // A client that has already ended has left its reason in the faults.
        let _ = self.commands.send(Command::Finish(done)).await;
        let _ = tokio::time::timeout(Duration::from_secs(20), wait).await;
        self.tally.clone()
    }
}

pub(super) struct Member {
    number: usize,
    kind: Kind,
    dialer: Arc<Dialer>,
    connect: Connect,
    filters: [String; 2],
    shared: Arc<Shared>,
    tally: Arc<Mutex<Tally>>,
    busy: Arc<AtomicBool>,
    /// Own publishes without an acknowledgement: packet identifier and sequence number.
    open: VecDeque<(u16, u64)>,
    /// Deliveries whose acknowledgement the client delays.
    held: Vec<u16>,
    next_id: u16,
    rng: Rng,
}

impl Member {
    pub(super) fn new(number: usize, dialer: Arc<Dialer>, shared: Arc<Shared>) -> Self {
        let plan = &shared.plan;
        let kind = Kind::of(number);
        let version = match kind {
            Kind::Expiry { .. } => Version::V5,
            Kind::Kept311 => Version::V311,
            Kind::Clean(version) => version,
        };
        let mut connect = Connect::new(format!("{}-{number}", plan.prefix)).version(version);
        connect = connect.clean(!kind.keeps_session()).keep_alive(300);
        if matches!(kind, Kind::Expiry { .. }) {
            connect = connect.expiry(3600);
        }
        if kind.has_will() {
            let delay = Value::Four(plan.will_delay);
            connect = connect.will(Will {
                topic: format!("{}/will/{number}", plan.prefix),
                payload: b"this client is gone".to_vec(),
                qos: 1,
                retain: false,
                props: Props::default().with(prop::WILL_DELAY, delay),
            });
        }
        let keeps = if kind.keeps_session() {
            Keeps::Everything
        } else {
            Keeps::WhileConnected
        };
        let audit = Audit::new(keeps);
        let tally = Tally {
            number,
            kind,
            audit,
            said: 0,
            unacknowledged: 0,
        };
        Self {
            number,
            kind,
            dialer,
            connect,
            filters: plan.topics_of(number).map(|topic| plan.topic(topic)),
            tally: Arc::new(Mutex::new(tally)),
            busy: Arc::new(AtomicBool::new(false)),
            open: VecDeque::new(),
            held: Vec::new(),
            next_id: 0,
            rng: Rng((plan.seed ^ (number as u64) << 20) | 1),
            shared,
        }
    }

    /// Connects, subscribes, and continues as a task.
    pub(super) async fn join(mut self) -> Result<Handle, ClientError> {
        let client = self.arrive(true).await?;
        let (commands, orders) = mpsc::channel(4);
        let handle = Handle {
            number: self.number,
            kind: self.kind,
            commands,
            busy: self.busy.clone(),
            tally: self.tally.clone(),
        };
        tokio::spawn(async move {
            if let Err(e) = self.live(client, orders).await {
                self.shared
                    .fault(format!("client {} ({:?}): {e}", self.number, self.kind));
                self.busy.store(false, Relaxed);
            }
        });
        Ok(handle)
    }

    async fn live(
        &mut self,
        mut client: Client,
        mut orders: mpsc::Receiver<Command>,
    ) -> Result<(), ClientError> {
        loop {
            let order = tokio::select! {
                packet = client.next() => {
                    self.take(&mut client, packet?);
                    continue;
                }
                order = orders.recv() => order,
            };
            match order {
                None => return Ok(()),
                Some(Command::Say) => self.say(&mut client).await?,
                Some(Command::Flap {
                    how,
                    says,
                    lingers,
                    away,
                }) => {
                    self.wait_for_acknowledgements(&mut client).await?;
                    for _ in 0..says {
                        self.say(&mut client).await?;
                    }
                    sleep(lingers).await;
                    let abandoned = client.cut(how);
                    sleep(away).await;
                    client = self.arrive(false).await?;
                    drop(abandoned);
                    self.shared.flaps.fetch_add(1, Relaxed);
                    self.busy.store(false, Relaxed);
                }
                Some(Command::Finish(done)) => {
                    self.acknowledge(&mut client);
                    client.ping().await?;
                    while let Some(packet) = client.buffered()? {
                        self.take(&mut client, packet);
                    }
                    client.disconnect().await?;
                    let _ = done.send(());
                    return Ok(());
                }
            }
        }
    }

    /// Connects and checks Session Present. A kept session must be present, and the client sends
    /// its open publishes again; a clean session must not be present, and the client subscribes
    /// again.
    async fn arrive(&mut self, first: bool) -> Result<Client, ClientError> {
        let connected = self.connect_patiently().await;
        let (mut client, ack) = connected?;
        self.tally(|tally| tally.audit.connected());
        self.held.clear();
        let expected = self.kind.keeps_session() && !first;
        if ack.session_present != expected {
            self.fault(format!(
                "Session Present {} after a flap",
                ack.session_present
            ));
        }
        if expected {
            self.shared.resumes.fetch_add(1, Relaxed);
        } else {
            let filters = [self.filters[0].as_str(), self.filters[1].as_str()];
            let codes = client.subscribe(&filters, 1).await?.codes;
            if codes != [1, 1] {
                self.fault(format!("SUBSCRIBE was answered {codes:?}"));
            }
        }
        if self.kind.resends() {
            let open: Vec<_> = self.open.iter().copied().collect();
            for (id, seq) in open {
                let again = self.message(id, seq, true);
                client.queue(&Packet::Publish(again));
                self.shared.resent.fetch_add(1, Relaxed);
            }
            client.flush().await?;
        } else {
            self.open.clear();
            self.tally(|tally| tally.unacknowledged = 0);
        }
        Ok(client)
    }

    /// If a PUBACK is on its way when the connection breaks, the server is certain that the
    /// exchange is over, and forwarding a second copy is right [MQTT-4.3.2-5]. So a client breaks
    /// off only while the PUBACKs of its publishes cannot have left the broker yet.
    async fn wait_for_acknowledgements(&mut self, client: &mut Client) -> Result<(), ClientError> {
        let deadline = Instant::now() + PATIENCE;
        while !self.open.is_empty() {
            let packet = timeout_at(deadline, client.next()).await;
            self.take(client, packet.map_err(|_| ClientError::Timeout("PUBACK"))??);
        }
        Ok(())
    }

    async fn connect_patiently(&self) -> Result<(Client, crate::wire::ConnAck), ClientError> {
        let mut tries = 0;
        loop {
            match Client::connect(&self.dialer, &self.connect).await {
                Ok(connected) => return Ok(connected),
                Err(e) if tries == 5 => return Err(e),
                Err(_) => {
                    tries += 1;
                    self.shared.retries.fetch_add(1, Relaxed);
                    sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn say(&mut self, client: &mut Client) -> Result<(), ClientError> {
        // An identifier may be reused only after its acknowledgement.
        while self.open.len() >= 50 {
            let packet = client.next().await?;
            self.take(client, packet);
        }
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        let id = self.next_id;
        let seq = self.tally(|tally| {
            tally.said += 1;
            tally.unacknowledged += 1;
            tally.said
        });
        self.open.push_back((id, seq));
        client
            .send(&Packet::Publish(self.message(id, seq, false)))
            .await
    }

    /// The bytes are the same each time, so that a second copy at the broker can be recognised.
    fn message(&self, id: u16, seq: u64, dup: bool) -> Publish {
        let plan = &self.shared.plan;
        let stamp = Stamp {
            stream: plan.up_stream(self.number),
            seq,
            sent_ns: 0,
        };
        Publish {
            dup,
            qos: 1,
            topic: format!("{}/up/{}", plan.prefix, self.number),
            id,
            payload: stamp.payload(32),
            ..Publish::default()
        }
    }

    fn take(&mut self, client: &mut Client, packet: Packet) {
        match packet {
            Packet::Publish(publish) => {
                if publish.qos != 1 || publish.retain {
                    self.fault(format!("QoS {} RETAIN {}", publish.qos, publish.retain));
                }
                let Some(stamp) = Stamp::read(&publish.payload) else {
                    return self.fault(format!("a foreign message on {}", publish.topic));
                };
                if !self.filters.contains(&publish.topic) {
                    self.fault(format!("a message for another, on {}", publish.topic));
                }
                self.tally(|tally| tally.audit.deliver(stamp, publish.dup, publish.id));
                self.held.push(publish.id);
                // The client delays some acknowledgements until the next delivery, so that a flap
                // finds open deliveries. The order stays that of arrival.
                if self.rng.below(3) > 0 || self.held.len() > 20 {
                    self.acknowledge(client);
                }
            }
            Packet::PubAck(ack) => {
                if ack.code >= 0x80 {
                    self.fault(format!("PUBACK with {:#04x}", ack.code));
                }
                match self.open.front() {
                    Some((id, _)) if *id == ack.id => {
                        self.open.pop_front();
                        let open = self.open.len();
                        self.tally(|tally| tally.unacknowledged = open);
                    }
                    other => {
                        let what = format!("PUBACK {} while {other:?} is the oldest", ack.id);
                        self.fault(what);
                    }
                }
            }
            Packet::PingResp => {}
            other => self.fault(format!("an unexpected {other:?}")),
        }
    }

    fn acknowledge(&mut self, client: &mut Client) {
        for id in self.held.drain(..) {
            client.queue(&Packet::PubAck(Ack {
                id,
                ..Ack::default()
            }));
        }
    }

    fn tally<T>(&self, change: impl FnOnce(&mut Tally) -> T) -> T {
        change(&mut self.tally.lock().expect("bookkeeping does not panic"))
    }

    fn fault(&self, what: String) {
        self.shared
            .fault(format!("client {} ({:?}): {what}", self.number, self.kind));
    }
}
