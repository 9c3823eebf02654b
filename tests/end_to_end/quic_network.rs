//! Networks as phones have them. QUIC: a NAT that forgets its mapping, lost, duplicated and late
//! datagrams, and a restarted server. TLS: a path that stalls.

mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tidegate_kit::audit::{Audit, Keeps, Stamp, now_ns};
use tidegate_kit::client::Client;
use tidegate_kit::dial::{Dialer, Trust, Url};
use tidegate_kit::link::Cut;
use tidegate_kit::netem::Netem;
use tidegate_kit::process::{Tidegate, TidegateConfig};
use tidegate_kit::tcp_relay::TcpRelay;
use tidegate_kit::udp_relay::UdpRelay;
use tidegate_kit::wire::{Ack, Connect, Packet, Publish, Subscribe, Version, decode, encode};
use tokio::time::{Instant, timeout};

/// The test fails if an expected packet takes longer than this.
const SOON: Duration = Duration::from_secs(60);
/// Messages in each direction at each QoS.
const MESSAGES: u64 = 150;
/// Publishes of the device that may be unanswered at once.
const WINDOW: usize = 20;
const SEED: u64 = 0x7175_6963;

fn server() -> Tidegate {
    TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), "embedded:")
        .listen(&["tcp", "quic", "tls"])
        .start()
        .expect("starts")
}

fn quic_addr(server: &Tidegate) -> SocketAddr {
    ([127, 0, 0, 1], server.url("quic").port).into()
}

/// A dialer to the server's QUIC listener, through the relay.
fn through(relay: &UdpRelay, server: &Tidegate) -> Dialer {
    at(relay.addr(), server, "quic")
}

/// A dialer to a listener of the server that is reached at another address.
fn at(relay: SocketAddr, server: &Tidegate, way: &str) -> Dialer {
    let url = Url {
        port: relay.port(),
        ..server.url(way)
    };
    let trust = Trust::ca(&server.certs().ca).expect("certificates");
    Dialer::new(&url, &trust).expect("a loopback URL resolves")
}

fn connect() -> Connect {
    Connect::new("device").clean(false).expiry(300)
}

/// A client that publishes at QoS 1 and 2 and receives both, over connections that come and go.
struct Device {
    client: Client,
    audit: Audit,
    /// QoS 2 deliveries that have not been released.
    received: BTreeSet<u16>,
    /// Packets to send again after a resume, in order.
    unanswered: BTreeMap<u64, Packet>,
    sent: [u64; 2],
    order: u64,
}

impl Device {
    async fn new(dialer: &Dialer) -> Self {
        let (mut client, _) = Client::connect(dialer, &connect()).await.expect("connects");
        client.subscribe(&["down/1"], 1).await.expect("granted");
        client.subscribe(&["down/2"], 2).await.expect("granted");
        let mut audit = Audit::new(Keeps::Everything);
        audit.connected();
        Self {
            client,
            audit,
            received: BTreeSet::new(),
            unanswered: BTreeMap::new(),
            sent: [0; 2],
            order: 0,
        }
    }

    /// Resumes over a new connection; the old one falls silent.
    async fn flap(&mut self, dialer: &Dialer) {
        let (client, ack) = Client::connect(dialer, &connect()).await.expect("connects");
        assert!(ack.session_present);
        std::mem::replace(&mut self.client, client).cut(Cut::Silent);
        self.audit.connected();
        for packet in self.unanswered.values_mut() {
            if let Packet::Publish(publish) = packet {
                publish.dup = true;
            }
            self.client.queue(packet);
        }
    }

    fn say(&mut self) {
        while self.unanswered.len() < WINDOW {
            let qos = 1 + (self.order % 2) as u8;
            let sent = &mut self.sent[usize::from(qos) - 1];
            if *sent == MESSAGES {
                return;
            }
            *sent += 1;
            let stamp = Stamp {
                stream: u32::from(qos),
                seq: *sent,
                sent_ns: now_ns(),
            };
            let packet = Packet::Publish(Publish {
                qos,
                topic: format!("up/{qos}"),
                id: self.client_id(),
                payload: stamp.payload(200),
                ..Publish::default()
            });
            self.order += 1;
            self.client.queue(&packet);
            self.unanswered.insert(self.order, packet);
        }
    }

    /// The next packet identifier, by the session's count and not by the connection's.
    fn client_id(&self) -> u16 {
        (self.order % 60_000) as u16 + 1
    }

    fn answered(&mut self, id: u16) {
        self.unanswered.retain(|_, packet| match packet {
            Packet::Publish(publish) => publish.id != id,
            Packet::PubRel(ack) => ack.id != id,
            _ => false,
        });
    }

    /// Sends as much as the window allows, and handles one packet.
    async fn step(&mut self) {
        self.say();
        let Some(packet) = self.client.next_within(SOON).await.expect("goes on") else {
            panic!("no packet arrives: {:?}", self.audit);
        };
        let ack = |id| Ack {
            id,
            ..Ack::default()
        };
        match packet {
            Packet::Publish(publish) => {
                let stamp = Stamp::read(&publish.payload).expect("a stamp");
                if publish.qos == 1 {
                    self.audit.deliver(stamp, publish.dup, publish.id);
                    self.client.queue(&Packet::PubAck(ack(publish.id)));
                    return;
                }
                if self.received.insert(publish.id) {
                    // Exactly once: a second delivery counts as a duplicate, whatever its DUP flag.
                    self.audit.deliver(stamp, false, publish.id);
                }
                self.client.queue(&Packet::PubRec(ack(publish.id)));
            }
            Packet::PubRel(release) => {
                self.received.remove(&release.id);
                self.client.queue(&Packet::PubComp(ack(release.id)));
            }
            Packet::PubAck(ack) | Packet::PubComp(ack) => self.answered(ack.id),
            Packet::PubRec(received) => {
                let release = Packet::PubRel(ack(received.id));
                for packet in self.unanswered.values_mut() {
                    if matches!(packet, Packet::Publish(p) if p.id == received.id) {
                        *packet = release.clone();
                    }
                }
                self.client.queue(&release);
            }
            Packet::PingResp => {}
            other => panic!("{other:?}"),
        }
    }

    fn done(&self) -> bool {
        let all = [1, 2]
            .iter()
            .all(|qos| self.audit.highest(*qos) == MESSAGES);
        all && self.unanswered.is_empty() && self.sent == [MESSAGES; 2]
    }
}

/// Publishes the device's messages over an undisturbed network.
fn speak(server: &Tidegate) -> tokio::task::JoinHandle<()> {
    let dialer = server.dialer("tcp");
    tokio::spawn(async move {
        let (mut client, _) = Client::connect(&dialer, &Connect::new("speaker"))
            .await
            .expect("connects");
        for seq in 1..=MESSAGES {
            for qos in [1, 2] {
                let stamp = Stamp {
                    stream: u32::from(qos),
                    seq,
                    sent_ns: now_ns(),
                };
                let payload = stamp.payload(200);
                let topic = format!("down/{qos}");
                client.publish(&topic, payload, qos).await.expect("taken");
            }
        }
    })
}

/// Receives the device's publishes; returns their sequence numbers by QoS, in order.
async fn listen(server: &Tidegate) -> tokio::task::JoinHandle<[Vec<u64>; 2]> {
    let dialer = server.dialer("tcp");
    let (mut client, _) = Client::connect(&dialer, &Connect::new("listener"))
        .await
        .expect("connects");
    client.subscribe(&["up/#"], 0).await.expect("granted");
    tokio::spawn(async move {
        let mut heard = [Vec::new(), Vec::new()];
        while heard.iter().any(|h| h.last() != Some(&MESSAGES)) {
            let publish = client.next_publish().await.expect("more to come");
            let stamp = Stamp::read(&publish.payload).expect("a stamp");
            heard[stamp.stream as usize - 1].push(stamp.seq);
        }
        heard
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_network_with_address_changes_loses_and_duplicates_no_message() {
    let _machine = crate::beside_others().await;
    let server = server();
    let netem = Netem {
        loss: 0.05,
        duplicate: 0.02,
        late: 0.1,
        by: Duration::from_millis(15),
        seed: SEED,
        ..Netem::FAIR
    };
    let relay = UdpRelay::start(quic_addr(&server), netem)
        .await
        .expect("starts");
    let dialer = through(&relay, &server);
    let mut device = Device::new(&dialer).await;
    let heard = listen(&server).await;
    let speaking = speak(&server);
    let quarter = MESSAGES / 4;
    for part in 1..=3 {
        while device.audit.highest(2) < part * quarter {
            device.step().await;
        }
        relay.rebind();
        if part == 2 {
            device.flap(&dialer).await;
        }
    }
    timeout(SOON, async {
        while !device.done() {
            device.step().await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{:?} {:?}", device.audit, device.unanswered));
    speaking.await.expect("spoke");
    let [one, two] = timeout(SOON, heard).await.expect("in time").expect("heard");

    assert!(device.audit.faults.is_empty(), "{:?}", device.audit.faults);
    assert_eq!(device.audit.fresh, 2 * MESSAGES);
    for qos in [1, 2] {
        assert_eq!(device.audit.lost(qos, MESSAGES), 0);
    }
    assert_eq!(
        two,
        (1..=MESSAGES).collect::<Vec<_>>(),
        "QoS 2 is exactly once, in order"
    );
    // Publishes that were unanswered when the device fell silent may come again at QoS 1.
    let mut first = BTreeSet::new();
    let order: Vec<u64> = one
        .iter()
        .copied()
        .filter(|seq| first.insert(*seq))
        .collect();
    assert_eq!(order, (1..=MESSAGES).collect::<Vec<_>>());
    assert!(
        one.len() - order.len() <= WINDOW,
        "{} came again",
        one.len() - order.len()
    );
    assert!(relay.lost() > 10, "the relay lost too few datagrams");
    let metrics = server.metrics().expect("metrics");
    assert!(metrics.sum("tidegate_quic_migrations_total", &[]) >= 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nat_that_forgets_its_mapping_causes_no_gap() {
    let _machine = crate::beside_others().await;
    let server = server();
    let relay = UdpRelay::start(quic_addr(&server), Netem::FAIR)
        .await
        .expect("starts");
    let mut device = Device::new(&through(&relay, &server)).await;
    let heard = listen(&server).await;
    let speaking = speak(&server);
    for part in 1..=3 {
        while device.audit.highest(2) < part * MESSAGES / 4 {
            device.step().await;
        }
        relay.rebind();
    }
    while !device.done() {
        device.step().await;
    }
    speaking.await.expect("spoke");
    let all: Vec<u64> = (1..=MESSAGES).collect();
    assert_eq!(heard.await.expect("heard"), [all.clone(), all]);
    assert!(device.audit.faults.is_empty(), "{:?}", device.audit.faults);
    let metrics = server.metrics().expect("metrics");
    // On loopback the server may read no datagram between two changes.
    let migrations = metrics.sum("tidegate_quic_migrations_total", &[]);
    assert!((2.0..=3.0).contains(&migrations), "{migrations}");
    assert_eq!(metrics.sum("tidegate_flaps_absorbed_total", &[]), 0.0);
    let told = server
        .wait_for_log("Client's address changed", SOON)
        .expect("logged");
    assert!(told.contains("device"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalling_tcp_path_loses_and_duplicates_no_message() {
    let _machine = crate::beside_others().await;
    let server = server();
    let target = ([127, 0, 0, 1], server.url("tls").port).into();
    let start = async || TcpRelay::start(target, Netem::FAIR).await;
    let mut relay = start().await.expect("starts");
    let mut left = Vec::new();
    let mut device = Device::new(&at(relay.addr(), &server, "tls")).await;
    let heard = listen(&server).await;
    let speaking = speak(&server);
    for part in 1..=3 {
        while device.audit.highest(2) < part * MESSAGES / 4 {
            device.step().await;
        }
        relay.stall(true);
        device.say();
        // The length of the stall is the condition under test: no packet arrives meanwhile.
        tokio::time::sleep(Duration::from_millis(500)).await;
        if part == 2 {
            // The device resumes over another path, and its old connection never ends.
            left.push(std::mem::replace(
                &mut relay,
                start().await.expect("starts"),
            ));
            device.flap(&at(relay.addr(), &server, "tls")).await;
        }
        relay.stall(false);
    }
    timeout(SOON, async {
        while !device.done() {
            device.step().await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{:?} {:?}", device.audit, device.unanswered));
    speaking.await.expect("spoke");
    let [one, two] = timeout(SOON, heard).await.expect("in time").expect("heard");
    let all: Vec<u64> = (1..=MESSAGES).collect();
    assert_eq!(two, all);
    let mut first = BTreeSet::new();
    let order: Vec<u64> = one.into_iter().filter(|seq| first.insert(*seq)).collect();
    assert_eq!(order, all);
    let faults = &device.audit.faults;
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!(device.audit.fresh, 2 * MESSAGES);
}

/// The next packet on a stream.
async fn read(stream: &mut quinn::RecvStream, bytes: &mut Vec<u8>) -> Packet {
    loop {
        if let Some((packet, size)) = decode(Version::V5, bytes).expect("MQTT") {
            bytes.drain(..size);
            return packet;
        }
        let chunk = timeout(SOON, stream.read_chunk(64 * 1024, true)).await;
        let chunk = chunk.expect("in time").expect("goes on").expect("no end");
        bytes.extend_from_slice(&chunk.bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_leaves_a_subscription_on_its_stream() {
    let _machine = crate::beside_others().await;
    let server = server();
    let relay = UdpRelay::start(quic_addr(&server), Netem::FAIR)
        .await
        .expect("starts");
    let (mut client, _) = Client::connect(&through(&relay, &server), &connect())
        .await
        .expect("connects");
    let connection = client.link().as_quic().expect("QUIC").connection().clone();
    let (mut tx, mut rx) = connection.open_bi().await.expect("a stream");
    let mut bytes = Vec::new();
    let subscribe = Packet::Subscribe(Subscribe {
        id: 1,
        filters: vec![("down".to_owned(), 1)],
        ..Subscribe::default()
    });
    encode(&subscribe, Version::V5, &mut bytes);
    tx.write_all(&bytes).await.expect("sent");
    bytes.clear();
    assert!(matches!(read(&mut rx, &mut bytes).await, Packet::SubAck(_)));

    let (mut speaker, _) = Client::connect(&server.dialer("tcp"), &Connect::new("speaker"))
        .await
        .expect("connects");
    relay.set_netem(Netem {
        loss: 1.0,
        ..Netem::FAIR
    });
    // Publish more messages than may be under way.
    const COUNT: u64 = 100;
    let mut payload = vec![0; 4000];
    for n in 1..=COUNT {
        payload[..8].copy_from_slice(&n.to_be_bytes());
        let sent = speaker.publish("down", payload.clone(), 1).await;
        sent.expect("taken");
    }
    // The length of the outage is the condition under test.
    tokio::time::sleep(Duration::from_secs(3)).await;
    relay.set_netem(Netem::FAIR);
    payload[..8].copy_from_slice(&(COUNT + 1).to_be_bytes());
    let sent = speaker.publish("down", payload, 1).await;
    sent.expect("taken");
    for n in 1..=COUNT + 1 {
        match read(&mut rx, &mut bytes).await {
            Packet::Publish(publish) => assert_eq!(publish.payload[..8], n.to_be_bytes()),
            other => panic!("{other:?}"),
        }
    }
    client.queue_raw(&[0xC0, 0x00]);
    client.flush().await.expect("sent");
    let next = client.next_within(SOON).await.expect("goes on");
    assert_eq!(
        next,
        Some(Packet::PingResp),
        "a delivery came on the control stream"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_restarted_server_notice_the_restart_at_once() {
    let _machine = crate::beside_others().await;
    let mut server = server();
    let key = server.dir().join("data/quic.key");
    let mode = std::fs::metadata(&key).expect("kept").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let relay = UdpRelay::start(quic_addr(&server), Netem::FAIR)
        .await
        .expect("starts");
    let dialer = through(&relay, &server);
    let (mut client, _) = Client::connect(&dialer, &connect())
        .await
        .expect("connects");
    client.ping().await.expect("served");
    let before = std::fs::read(&key).expect("kept");

    server.kill();
    server.start_again().expect("starts again");
    assert_eq!(std::fs::read(&key).expect("kept"), before);
    relay.lead_to(quic_addr(&server));
    let connection = client.link().as_quic().expect("QUIC").connection().clone();
    let began = Instant::now();
    client.queue_raw(&[0xC0, 0x00]);
    client.flush().await.expect("sent");
    // The client has no idle time-out of its own.
    let end = timeout(SOON, connection.closed())
        .await
        .expect("it learns of it");
    assert!(matches!(end, quinn::ConnectionError::Reset), "{end:?}");
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let (mut client, ack) = Client::connect(&dialer, &connect())
        .await
        .expect("connects");
    assert!(!ack.session_present);
    client.ping().await.expect("served");
}
