//! Panics in the tasks of a connection, a link and a listener; takeovers.

mod takeover;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Acl;
use crate::client::{Clients, ListenerContext};
use crate::clock::Clock;
use crate::config::{self, AuthMode, Config, Transport};
use crate::mqtt::{Connect, Decoder, Packet, QoS, Receiver, SubscribeOptions, Version};
use crate::mqtt::{encode_ack, encode_subscribe};
use crate::router::Router;
use crate::session::SessionKey;
use crate::store::{Identifiers, Memory, Received, Ring, Store};
use crate::supervise::Health;
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;
use crate::transport::{self, Accepted, ConnectionCap, Events, Limits, RefusalReason, Stream};
use crate::upstream::{Start, Upstream};

use crate::runtime::{convert, listeners};

const PATIENCE: Duration = Duration::from_secs(20);
/// A filter that panics in the task of the client that subscribes it.
const TRAP_FILTER: &str = "trap";
/// A topic that panics once in the task of the data link that brings a message of it.
const TRAP_TOPIC: &str = "a/trap";

/// A store in memory that panics on request.
#[derive(Clone, Debug, Default)]
struct Traps {
    sprung: Arc<AtomicBool>,
}

impl Store for Traps {
    fn identifiers(&self) -> Box<dyn Identifiers> {
        Box::new(TrapIdentifiers(Memory.identifiers()))
    }

    fn ring(&self, link: usize) -> Box<dyn Ring> {
        Box::new(TrapRing(Memory.ring(link), self.sprung.clone()))
    }
}

#[derive(Debug)]
struct TrapIdentifiers(Box<dyn Identifiers>);

impl Identifiers for TrapIdentifiers {
    fn load(&self) -> Vec<Option<Arc<str>>> {
        self.0.load()
    }
    fn take_over(
        &mut self,
        names: Vec<(FilterId, Arc<str>)>,
        rests: Vec<(Millis, FilterId)>,
    ) -> usize {
        self.0.take_over(names, rests)
    }
    fn number(&mut self, name: &str) -> (FilterId, Arc<str>) {
        assert_ne!(name, TRAP_FILTER, "a test's panic");
        self.0.number(name)
    }
    fn release(&mut self, name: &str, now: Millis, until: Millis) {
        self.0.release(name, now, until);
    }
    fn known(&self, name: &str) -> Option<FilterId> {
        self.0.known(name)
    }
    fn count(&self) -> usize {
        self.0.count()
    }
}

#[derive(Debug)]
struct TrapRing(Box<dyn Ring>, Arc<AtomicBool>);

impl Ring for TrapRing {
    fn digest(&self, topic: &str, payload: &[u8], qos: u8) -> u64 {
        let springs = topic == TRAP_TOPIC && !self.1.swap(true, Ordering::SeqCst);
        assert!(!springs, "a test's panic");
        self.0.digest(topic, payload, qos)
    }
    fn positions(&self) -> Range<u64> {
        self.0.positions()
    }
    fn remember(&mut self, received: Received) {
        self.0.remember(received);
    }
    fn find(&self, among: Range<u64>, received: Received) -> Option<u64> {
        self.0.find(among, received)
    }
    fn settle(&mut self, mark: u64) {
        self.0.settle(mark);
    }
    fn clear(&mut self) {
        self.0.clear();
    }
}

/// A process without listeners, before its embedded broker.
struct Process {
    clients: Arc<Clients>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Process {
    fn start(traps: &Traps) -> Self {
        let mut config = Config::builtin();
        config.auth.acl = config::AclMode::Open;
        let clock = Clock::default();
        let router: Arc<Router> = Arc::new(convert::router(&config, clock, traps, None));
        let clients = convert::clients(&config, router.clone(), clock).expect("no files");
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let start = Start {
            broker: convert::broker_access(&config).expect("no files"),
            router,
            store: Arc::new(traps.clone()),
            clock,
            stop: stop.clone(),
            instance: 1,
            health: Arc::default(),
        };
        Upstream::start(start, &tasks);
        Self {
            clients: Arc::new(clients),
            tasks,
            stop,
        }
    }

    /// Connects a client, whose connection is served until it ends.
    fn connect(&self, client_id: &str) -> Device {
        self.connect_with(client_id, "", true)
    }

    /// As `connect`, behind a mount.
    fn connect_with(&self, client_id: &str, mount: &str, clean_start: bool) -> Device {
        let connect = Connect {
            client_id,
            clean_start,
            session_expiry: Some(300),
            ..Connect::default()
        };
        self.open(&connect, mount, 64 * 1024)
    }

    /// As `connect`, with a CONNECT of the test's own, through a pipe of so many bytes.
    fn open(&self, connect: &Connect<'_>, mount: &str, pipe_bytes: usize) -> Device {
        let (near, far) = tokio::io::duplex(pipe_bytes);
        let listener = ListenerContext {
            auth: AuthMode::Anonymous,
            name: "tcp".into(),
            transport: "tcp",
            metrics: Arc::new(metrics().listener("tcp", "tcp")),
            webtransport: None,
            mount: mount.into(),
            ping_after: None,
            keep_alive_max: None,
        };
        let cap = Arc::new(ConnectionCap::new(1));
        let accepted = Accepted {
            stream: Stream::pipe(far),
            peer: ([127, 0, 0, 1], 1).into(),
            deadline: Instant::now() + PATIENCE,
            permit: cap.try_acquire().expect("the first"),
            unauthenticated: None,
        };
        let clients = self.clients.clone();
        let served = self.tasks.spawn(async move {
            if let Some(task) = clients.serve(listener, accepted).await {
                task.await;
            }
        });
        let mut out = Vec::new();
        connect.encode(&mut out);
        Device {
            io: near,
            version: connect.version,
            input: Vec::new(),
            out,
            served,
        }
    }

    /// Ends the links; connections end with the test's runtime.
    fn end(self) {
        self.stop.cancel();
    }
}

struct Device {
    io: DuplexStream,
    version: Version,
    input: Vec<u8>,
    out: Vec<u8>,
    /// Our side of the connection.
    served: JoinHandle<()>,
}

impl Device {
    async fn send(&mut self) {
        self.io
            .write_all(&self.out)
            .await
            .expect("room in the pipe");
        self.out.clear();
    }

    async fn subscribe(&mut self, filter: &str) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: 2,
        };
        let filters = [(filter, options)];
        encode_subscribe(self.version, 1, None, filters.into_iter(), &mut self.out);
        self.send().await;
    }

    /// Reads until `wanted` finds a packet; `None`: the connection has ended.
    async fn read_until<R>(&mut self, wanted: impl Fn(&Packet<'_>) -> Option<R>) -> Option<R> {
        let decoder = Decoder {
            version: self.version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        loop {
            while let Some((packet, used)) = decoder.next(&self.input).expect("legal packets") {
                let found = wanted(&packet);
                self.input.drain(..used);
                if found.is_some() {
                    return found;
                }
            }
            let read = self.io.read_buf(&mut self.input);
            if timeout(PATIENCE, read)
                .await
                .expect("bytes or an end")
                .ok()?
                == 0
            {
                return None;
            }
        }
    }
}

#[tokio::test]
async fn a_session_is_detached_when_the_task_of_its_connection_panics() {
    let process = Process::start(&Traps::default());
    let mut device = process.connect("victim");
    device.subscribe(TRAP_FILTER).await;
    let suback = |packet: &Packet<'_>| matches!(packet, Packet::Suback(_)).then_some(());
    assert!(device.read_until(suback).await.is_none(), "it panicked");
    let served = timeout(PATIENCE, device.served).await.expect("it ends");
    served.expect("the panic ends in the connection");
    let session = process.clients.router.session(&"victim".into());
    assert!(!session.expect("it is kept").attached);
    let shown = metrics().render();
    assert!(!shown.contains("tidegate_disconnects_total{reason=\"panic\"} 0\n"));
    // The client comes back to its session, and others are served.
    let mut device = process.connect("victim");
    device.subscribe("a/b").await;
    assert!(device.read_until(suback).await.is_some());
    process.end();
}

#[tokio::test]
async fn a_data_link_whose_task_panics_comes_back_and_loses_no_message() {
    let process = Process::start(&Traps::default());
    let mut subscriber = process.connect("subscriber");
    subscriber.subscribe("a/#").await;
    let suback = |packet: &Packet<'_>| matches!(packet, Packet::Suback(_)).then_some(());
    assert!(subscriber.read_until(suback).await.is_some());
    let mut publisher = process.connect("publisher");
    for (id, topic) in [(1, "a/before"), (2, TRAP_TOPIC), (3, "a/after")] {
        let length = (2 + topic.len() + 2 + 1) as u8;
        publisher.out.extend([0x32, length, 0, topic.len() as u8]);
        publisher.out.extend(topic.as_bytes());
        publisher.out.extend([0, id, 0]);
    }
    publisher.send().await;
    let mut arrived = Vec::new();
    while !["a/before", TRAP_TOPIC, "a/after"]
        .iter()
        .all(|topic| arrived.iter().any(|have| have == topic))
    {
        let message = |packet: &Packet<'_>| match packet {
            Packet::Publish(p) => Some((p.topic.to_owned(), p.packet_id)),
            _ => None,
        };
        let (topic, id) = subscriber.read_until(message).await.expect("a message");
        arrived.push(topic);
        let (kind, reason) = (
            crate::mqtt::AckKind::Puback,
            crate::mqtt::ReasonCode::SUCCESS,
        );
        encode_ack(Version::V5, kind, id, reason, None, &mut subscriber.out);
        subscriber.send().await;
    }
    let shown = metrics().render();
    let counted = |line: &str| {
        let name = "tidegate_upstream_disconnects_total";
        line.starts_with(name) && line.contains("reason=\"panic\"") && !line.ends_with(" 0")
    };
    assert!(shown.lines().any(counted), "{shown}");
    process.end();
}

#[tokio::test]
async fn a_resumed_session_loses_the_subscriptions_that_new_rules_forbid() {
    let process = Process::start(&Traps::default());
    let mut config = Config::builtin();
    config.auth.acl = config::AclMode::Rules;
    config.acl = vec![config::AclRule {
        who: "*".to_owned(),
        allow: config::AclAllow {
            publish: true,
            subscribe: true,
        },
        topics: vec!["kept/#".to_owned()],
    }];
    let filters = [
        "kept/1",
        "gone/1",
        "gone/#",
        "$share/g/gone/1",
        "$share/g/kept/1",
    ];
    let suback = |packet: &Packet<'_>| matches!(packet, Packet::Suback(_)).then_some(());
    for mount in ["", "site/"] {
        let mut device = process.connect_with("device", mount, true);
        for filter in filters {
            device.subscribe(filter).await;
            assert!(device.read_until(suback).await.is_some());
        }
        drop(device.io);
        let served = timeout(PATIENCE, device.served).await.expect("it ends");
        served.expect("no panic");
    }
    process.clients.replace_rules(Acl::of(&config));
    for (mount, kept) in [
        ("", ["$share/g/kept/1", "kept/1"]),
        ("site/", ["$share/g/site/kept/1", "site/kept/1"]),
    ] {
        let mut device = process.connect_with("device", mount, false);
        device.send().await;
        let present = |packet: &Packet<'_>| match packet {
            Packet::Connack(connack) => Some(connack.session_present),
            _ => None,
        };
        assert_eq!(device.read_until(present).await, Some(true));
        let key = SessionKey::new(&"device".into(), mount);
        let session = process.clients.router.session(&key).expect("it is kept");
        let remaining = session.subscriptions.iter().map(|s| &*s.filter);
        let mut remaining: Vec<&str> = remaining.collect();
        remaining.sort_unstable();
        assert_eq!(remaining, kept);
    }
    process.end();
}

/// Panics at the first refusal, and tells of all.
struct PanicsOnce {
    panicked: AtomicBool,
    refusals: Sender<()>,
}

impl Events for PanicsOnce {
    fn refused(&self, _: RefusalReason) {
        self.refusals.try_send(()).expect("the test waits");
        let earlier = self.panicked.swap(true, Ordering::SeqCst);
        assert!(earlier, "a test's panic");
    }
}

#[tokio::test]
async fn a_listener_whose_accept_loop_panics_accepts_again() {
    let process = Process::start(&Traps::default());
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = config::Listener::new(Transport::Tcp, any);
    let limits = Limits {
        connections: Arc::new(ConnectionCap::new(0)),
        ..Limits::default()
    };
    let (refusals, mut refused) = channel(3);
    let events = PanicsOnce {
        panicked: AtomicBool::new(false),
        refusals,
    };
    let bound = transport::bind(listener, None, Arc::new(limits), Arc::new(events)).expect("bound");
    let address = bound.local_addr();
    let health = Arc::<Health>::default();
    let (tasks, clients, stop) = (&process.tasks, &process.clients, process.stop.clone());
    listeners::serve(tasks, &health, clients, bound, stop);
    for _ in 0..3 {
        let _client = TcpStream::connect(address).await.expect("it listens");
        let seen = timeout(PATIENCE, refused.recv()).await;
        seen.expect("it accepts").expect("it runs");
    }
    assert!(health.failing().is_empty());
    process.end();
}
