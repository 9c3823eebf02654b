//! Sessions and their log: answers that wait for it, records that are written, and the state after a crash.

mod answers;
mod crashes;
mod messages;
mod restarts;

use std::pin::pin;
use std::task::{Context, Poll};

use super::*;
use crate::mqtt::{
    Message, MessageSpec, Properties, QoS, ReasonCode, SubscribeOptions, Version, encode_subscribe,
    encode_unsubscribe,
};
use crate::router::testing::{self, config, facts, peer, router_of};
use crate::router::{Batch, Connect, Connected, LinkSession, Router, RouterConfig, SessionOwner};
use crate::session::{ConnectionSpec, SessionKey, Will};
use crate::sim::testing::packet_of;
use crate::store::log::disk::sim::{Fault, SimDisk};
use crate::store::log::{Mode, Options, Recovery, Step, Writer};
use crate::store::records::FoundSessions;
use crate::time::UnixMillis;
use tidegate_kit::rng::Rng;

const SEGMENT_BYTES: u32 = 12 * 1024;
const GRACE: Duration = Duration::from_secs(30);

/// A process that keeps its sessions in a log on a simulated disk.
struct Node {
    disk: SimDisk,
    router: Arc<Router>,
    log: Log,
    writer: Writer<SimDisk>,
    owner: SessionOwner,
    from: u16,
    /// The time of day of its start, in milliseconds.
    started_at: u64,
    now: Millis,
    /// The filters that the broker has granted, with the QoS of the requests.
    granted: Vec<(String, QoS)>,
}

impl Node {
    fn start(disk: SimDisk, started_at: u64) -> Self {
        let router = router_of(RouterConfig {
            started_at: UnixMillis::new(started_at),
            ..config()
        });
        router.keep_sessions(GRACE);
        let options = Options {
            segment_bytes: SEGMENT_BYTES,
            commit_records_max: 8,
            commit_bytes_max: 2048,
            ..Options::new(7)
        };
        let recovery = Recovery::open(disk.clone(), options).expect("it opens");
        let claims = recovery.claims().clone();
        let mut found = FoundSessions::default();
        let replayed = recovery.replay(|record| found.take(&record).expect("a record of ours"));
        let replayed = replayed.expect("it is read");
        router.restore_all(&found, &claims, replayed.report.stale, Millis::ZERO);
        let (log, writer) = replayed.start().expect("it starts");
        router.set_broker_features(&facts(), Millis::ZERO);
        router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
        let mut node = Self {
            owner: SessionOwner::new(router.clone(), log.clone()),
            disk,
            router,
            log,
            writer,
            from: 0,
            started_at,
            now: Millis::ZERO,
            granted: Vec::new(),
        };
        node.grant();
        node
    }

    /// The broker grants everything.
    fn grant(&mut self) {
        for link in 0..2 {
            for wanted in self.router.next_subscribes(link, 100) {
                let code = ReasonCode(wanted.qos as u8);
                self.router.suback(wanted.filter, code, self.now);
                self.granted.push((wanted.name.to_string(), wanted.qos));
            }
        }
    }

    /// Appends the sessions that are marked.
    fn append(&mut self) -> Batch {
        let mut room = self.log.try_reserve(1 << 20).expect("there is room");
        self.router
            .append_marked(&self.log, &mut room, &mut self.from)
    }

    /// Lets the writer work until it has nothing to do.
    fn write(&mut self) {
        while !matches!(
            self.writer.step(&mut self.owner, self.now),
            Step::Idle { .. }
        ) {}
    }

    /// Whether the records of a batch are decided.
    fn is_decided(&self, batch: &Batch) -> bool {
        let Some(last) = batch.last else {
            return true;
        };
        let wait = pin!(self.log.wait(last));
        let polled = wait.poll(&mut Context::from_waker(Waker::noop()));
        matches!(polled, Poll::Ready(_))
    }

    /// Does the work of the persist task until nothing is marked. Returns the number of sessions.
    fn persist(&mut self) -> usize {
        let mut written = 0;
        loop {
            let batch = self.append();
            if batch.is_empty() {
                return written;
            }
            written += batch.sessions();
            self.write();
            assert!(self.is_decided(&batch));
            self.router.committed(&batch);
        }
    }

    /// The process is killed, and another one starts after `away`.
    fn restart(self, away: Duration) -> Self {
        let disk = self.disk.after_kill();
        self.restart_on(disk, away)
    }

    fn restart_on(self, disk: SimDisk, away: Duration) -> Self {
        let started_at = UnixMillis::new(self.started_at).at(self.now + away);
        Self::start(disk, started_at.as_u64())
    }

    fn connect(&self, connect: Connect) -> Connected {
        let connected = self.router.connect(connect, self.now, |present, out| {
            out.extend([0x20, u8::from(present)]);
        });
        connected.expect("it is let in")
    }

    fn kept(&self, id: &str) -> Connected {
        self.connect(kept(id))
    }

    /// Whether the client is given output.
    fn answers(&self, client: Connected) -> bool {
        let mut out = Vec::new();
        let (session, connection_no) = (client.session, client.connection_no);
        self.router
            .take_output(session, connection_no, &mut out, self.now);
        !out.is_empty()
    }

    fn subscribe(&mut self, client: Connected, filter: &str) {
        self.subscribe_at(client, filter, QoS::AtLeastOnce);
    }

    fn subscribe_at(&mut self, client: Connected, filter: &str, qos: QoS) {
        let options = SubscribeOptions {
            qos,
            retain_handling: 2,
            ..SubscribeOptions::default()
        };
        let mut bytes = Vec::new();
        let filters = std::iter::once((filter, options));
        encode_subscribe(Version::V5, 8, None, filters, &mut bytes);
        packet_of(&self.router, client, &bytes, self.now);
        self.grant();
    }

    fn unsubscribe(&self, client: Connected, filter: &str) {
        let mut bytes = Vec::new();
        encode_unsubscribe(Version::V5, 9, std::iter::once(filter), &mut bytes);
        packet_of(&self.router, client, &bytes, self.now);
    }

    fn leave(&self, client: Connected, normal: bool) {
        let (session, connection_no) = (client.session, client.connection_no);
        self.router
            .disconnected(session, connection_no, normal, self.now);
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
        self.router.tick(self.now);
    }

    fn filters(&self, id: &str) -> Option<Vec<String>> {
        let session = self.router.session(&SessionKey::from(id))?;
        let filters = session.subscriptions.iter();
        Some(filters.map(|s| s.filter.to_string()).collect())
    }

    /// The payloads of the wills that are published.
    fn wills(&self) -> Vec<String> {
        let pops = std::iter::from_fn(|| self.router.publish_queues(0, |queues| queues.pop()));
        let payload = |message: &Message| String::from_utf8_lossy(message.payload()).into_owned();
        pops.map(|out| payload(&out.message)).collect()
    }
}

fn kept(id: &str) -> Connect {
    Connect {
        key: id.into(),
        principal: "anonymous".into(),
        anonymous: true,
        clean_start: false,
        expiry: 100,
        spec: ConnectionSpec {
            version: Version::V5,
            bridge: false,
            receive_maximum: u16::MAX,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            keep_alive: None,
            scope: None,
        },
        will: None,
        handle: Arc::default(),
        peer: peer(),
    }
}

fn will(payload: &str, delay: u32) -> Option<Will> {
    let message = Message::new(&MessageSpec {
        topic: "wills",
        properties: Properties::default(),
        payload: payload.as_bytes(),
        qos: QoS::AtLeastOnce,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    });
    Some(Will::new(message, delay, None))
}

fn with_will(id: &str, payload: &str) -> Connect {
    Connect {
        will: will(payload, 0),
        ..kept(id)
    }
}

fn node() -> Node {
    Node::start(SimDisk::default(), 1_000_000)
}
