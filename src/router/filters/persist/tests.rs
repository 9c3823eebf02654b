//! Filters, links and their log in front of a model of the broker: a request waits for the disk, and a process
//! that starts again knows the broker's filters.

mod crashes;
mod restarts;

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::mqtt::{
    QoS, ReasonCode, SubscribeOptions, Version, encode_subscribe, encode_unsubscribe,
};
use crate::router::filters::filter::Filter;
use crate::router::testing::{self, peer, router_of};
use crate::router::{
    Batch, BrokerFeatures, Connect, Connected, LinkSession, Router, RouterConfig, SessionOwner,
};
use crate::session::{ConnectionSpec, SessionKey};
use crate::sim::testing::packet_of;
use crate::store::log::disk::sim::SimDisk;
use crate::store::log::{Log, Options, Recovery, Step, Writer};
use crate::store::records::{FoundFilters, FoundSessions};
use crate::time::{Millis, UnixMillis};
use crate::topics::{FilterId, overlaps, split_shared};

/// The broker's session of one link: the filters with their numbers and QoS.
type BrokerSession = BTreeMap<String, (FilterId, QoS)>;

/// The broker, which outlives the processes.
#[derive(Clone, Debug, Default)]
struct Broker {
    /// By client identifier.
    sessions: BTreeMap<String, BrokerSession>,
    identifiers: bool,
    subscribes: usize,
    unsubscribes: usize,
}

impl Broker {
    /// Returns Session Present.
    fn connect(&mut self, client_id: &str, clean: bool) -> bool {
        if clean {
            self.sessions.remove(client_id);
        }
        let present = self.sessions.contains_key(client_id);
        self.sessions.entry(client_id.to_owned()).or_default();
        present
    }

    fn request(&mut self, client_id: &str, request: &Request) {
        let Some(session) = self.sessions.get_mut(client_id) else {
            return;
        };
        match request {
            Request::Subscribe(id, name, qos) => {
                self.subscribes += 1;
                session.insert(name.clone(), (*id, *qos));
                let topics = |name: &str| split_shared(name).map_or(name, |(_, t)| t).to_owned();
                let collides = |a: &String, b: &String| a < b && overlaps(&topics(a), &topics(b));
                let all = || session.keys();
                let found = all().find_map(|a| all().find(|b| collides(a, b)).map(|b| (a, b)));
                assert!(
                    self.identifiers || found.is_none(),
                    "{client_id}: {found:?}"
                );
            }
            Request::Unsubscribe(_, name) => {
                self.unsubscribes += 1;
                session.remove(name);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Request {
    Subscribe(FilterId, String, QoS),
    Unsubscribe(FilterId, String),
}

/// A link of a process.
#[derive(Debug, Default)]
struct Link {
    up: bool,
    /// It has connected in this process.
    connected: bool,
    has_session: bool,
    in_doubt: bool,
    /// Requests that the broker has not read, and requests without an answer.
    sent: VecDeque<Request>,
    read: VecDeque<Request>,
}

/// A process with its log on a simulated disk.
struct Node {
    disk: SimDisk,
    router: Arc<Router>,
    log: Log,
    writer: Writer<SimDisk>,
    owner: SessionOwner,
    from: u16,
    started_at: u64,
    now: Millis,
    config: RouterConfig,
    prefix: &'static str,
    broker: Broker,
    links: Vec<Link>,
    last_id: u16,
    /// The batch that is being written.
    pending: Option<Batch>,
}

fn config() -> RouterConfig {
    RouterConfig {
        data_links: 2,
        data_links_max: 4,
        linger: Duration::from_secs(20),
        linger_busy_min: Duration::from_secs(10),
        ..testing::config()
    }
}

fn features(identifiers: bool) -> BrokerFeatures {
    BrokerFeatures {
        identifiers,
        keeps_retain: identifiers,
        ..testing::facts()
    }
}

impl Node {
    fn new(identifiers: bool) -> Self {
        let broker = Broker {
            identifiers,
            ..Broker::default()
        };
        Self::start(SimDisk::default(), 1_000_000, broker, config(), "a")
    }

    fn start(
        disk: SimDisk,
        started_at: u64,
        broker: Broker,
        config: RouterConfig,
        prefix: &'static str,
    ) -> Self {
        let router = router_of(RouterConfig {
            started_at: UnixMillis::new(started_at),
            ..config.clone()
        });
        router.keep_sessions(Duration::from_secs(1));
        router.keep_filters();
        let options = Options {
            segment_bytes: 12 * 1024,
            commit_records_max: 8,
            commit_bytes_max: 2048,
            ..Options::new(7)
        };
        let recovery = Recovery::open(disk.clone(), options).expect("it opens");
        let claims = recovery.claims().clone();
        let (mut sessions, mut filters) = (FoundSessions::default(), FoundFilters::default());
        let replayed = recovery.replay(|record| {
            let taken = match FoundFilters::takes(record.kind) {
                true => filters.take(&record),
                false => sessions.take(&record),
            };
            taken.expect("a record of ours");
        });
        let replayed = replayed.expect("it is read");
        let is_trusted = !replayed.report.stale;
        let name = |link| client_id(prefix, link);
        router.restore_filters(filters, name, is_trusted, &claims, Millis::ZERO);
        router.restore_all(&sessions, &claims, !is_trusted, Millis::ZERO);
        let (log, writer) = replayed.start().expect("it starts");
        let links = (0..config.data_links_max + 1).map(|link| {
            let restored = router.restored_link(link);
            Link {
                has_session: restored.is_some(),
                in_doubt: restored.is_some_and(|link| link.in_doubt),
                ..Link::default()
            }
        });
        Self {
            links: links.collect(),
            owner: SessionOwner::new(router.clone(), log.clone()),
            disk,
            router,
            log,
            writer,
            from: 0,
            last_id: 0,
            pending: None,
            started_at,
            now: Millis::ZERO,
            config,
            prefix,
            broker,
        }
    }

    /// The process is killed, and another one starts from the contents of a disk.
    fn restart_on(self, disk: SimDisk, away: Duration) -> Self {
        let started_at = UnixMillis::new(self.started_at).at(self.now + away);
        let (broker, config) = (self.broker, self.config);
        Self::start(disk, started_at.as_u64(), broker, config, self.prefix)
    }

    fn restart(self) -> Self {
        let disk = self.disk.after_kill();
        self.restart_on(disk, Duration::from_secs(1))
    }

    fn append(&mut self) -> Batch {
        let mut room = self.log.try_reserve(1 << 20).expect("there is room");
        self.router
            .append_marked(&self.log, &mut room, &mut self.from)
    }

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

    /// Does a small part of the work of the persist task and of the writer.
    fn persist_a_little(&mut self) {
        match self.pending.take() {
            None => self.pending = Some(self.append()),
            Some(batch) if self.is_decided(&batch) => self.router.committed(&batch),
            Some(batch) => {
                self.writer.step(&mut self.owner, self.now);
                self.pending = Some(batch);
            }
        }
    }

    /// Does the work of the persist task until nothing is marked.
    fn persist(&mut self) {
        loop {
            let pending = self.pending.take();
            let is_new = pending.is_none();
            let batch = pending.unwrap_or_else(|| self.append());
            self.write();
            if is_new && batch.is_empty() {
                return;
            }
            assert!(self.is_decided(&batch));
            self.router.committed(&batch);
        }
    }

    /// The link is about to send CONNECT. Returns whether it is to begin anew.
    fn announce(&mut self, link: usize) -> bool {
        let clean = !self.links[link].has_session;
        let id = client_id(self.prefix, link);
        self.router.link_connects(link, clean, &id, "mqtt://b");
        self.persist();
        assert!(self.router.may_connect(link));
        clean
    }

    /// Connects a link that has something to do.
    fn connect_link(&mut self, link: usize) {
        let clean = self.announce(link);
        let present = self.broker.connect(&client_id(self.prefix, link), clean);
        self.connected(link, present);
    }

    fn connected(&mut self, link: usize, present: bool) {
        let in_doubt = std::mem::take(&mut self.links[link].in_doubt);
        let session = match (present, in_doubt) {
            (false, _) => LinkSession::New,
            (true, true) => LinkSession::Doubtful,
            (true, false) => LinkSession::Resumed,
        };
        let features = features(self.broker.identifiers);
        let anew = self.router.set_broker_features(&features, self.now);
        let first = !std::mem::replace(&mut self.links[link].connected, true);
        self.links[link].up = true;
        self.links[link].has_session = true;
        self.router.data_link_up(link, session, first, self.now);
        if anew {
            for link in 0..self.links.len() {
                self.disconnect(link);
                self.links[link].has_session = false;
            }
        }
    }

    /// The connection of a link breaks. The broker has read some of its requests.
    fn disconnect(&mut self, link: usize) {
        if std::mem::take(&mut self.links[link].up) {
            self.links[link].sent.clear();
            self.links[link].read.clear();
            self.router.data_link_down(link, self.now);
        }
    }

    /// Sends what the router has for a link.
    fn send(&mut self, link: usize) {
        let state = &mut self.links[link];
        let answered = state.sent.is_empty() && state.read.is_empty();
        let next = self.router.next_requests(link, 8, answered);
        for (id, name) in next.unsubscribes {
            state
                .sent
                .push_back(Request::Unsubscribe(id, name.to_string()));
        }
        for wanted in next.subscribes.into_iter().chain(next.suspects) {
            let name = wanted.name.to_string();
            state
                .sent
                .push_back(Request::Subscribe(wanted.filter, name, wanted.qos));
        }
    }

    /// The broker reads a request.
    fn read(&mut self, link: usize) {
        if let Some(request) = self.links[link].sent.pop_front() {
            self.broker.request(&client_id(self.prefix, link), &request);
            self.links[link].read.push_back(request);
        }
    }

    /// The broker's answer arrives.
    fn answer(&mut self, link: usize) {
        match self.links[link].read.pop_front() {
            Some(Request::Subscribe(id, _, qos)) => {
                self.router.suback(id, ReasonCode(qos as u8), self.now);
            }
            Some(Request::Unsubscribe(id, _)) => self.router.unsuback(id, self.now),
            None => {}
        }
    }

    /// Everything that is under way arrives, and all links are up.
    fn settle(&mut self) {
        for _ in 0..60 {
            self.persist();
            for link in 0..self.links.len() {
                let is_wanted = link < self.config.data_links || self.router.filters_on(link) > 0;
                if !self.links[link].up && is_wanted {
                    self.connect_link(link);
                }
                if !self.links[link].up {
                    continue;
                }
                self.send(link);
                while !self.links[link].sent.is_empty() || !self.links[link].read.is_empty() {
                    self.read(link);
                    self.answer(link);
                }
                if self.router.barrier_wanted(link) {
                    let number = self.router.barrier_begins(link);
                    self.router.barrier_passed(link, number, self.now);
                }
            }
            self.advance(Duration::from_millis(200));
        }
        self.persist();
        self.check();
    }

    fn advance(&mut self, by: Duration) {
        self.now += by;
        self.router.tick(self.now);
    }

    /// The broker has every filter that counts as granted on a link that is up.
    fn check(&self) {
        let table = self.router.filters.read();
        for (id, filter) in table.all() {
            let Some(link) = filter.link().filter(|link| self.links[*link].up) else {
                continue;
            };
            if filter.is_active() {
                let session = self.broker.sessions.get(&client_id(self.prefix, link));
                let at_broker = session.and_then(|s| s.get(&**filter.name()));
                let has = at_broker.is_some_and(|(number, _)| *number == id);
                assert!(has, "{}: {filter:?}, {at_broker:?}", self.prefix);
            }
        }
    }

    /// Nothing is under way: the broker has the filters of the sessions, and no others.
    fn check_all(&self, clients: &[&str]) {
        self.check();
        let table = self.router.filters.read();
        for (client_id_of, session) in &self.broker.sessions {
            for (name, (id, _)) in session {
                let known = table.get(*id).filter(|f| **f.name() == **name);
                let known = known.filter(|f| f.is_active());
                let link = known.and_then(Filter::link);
                let is_known =
                    link.is_some_and(|link| *client_id_of == client_id(self.prefix, link));
                assert!(
                    is_known,
                    "{client_id_of} has {name}, and the table {known:?}"
                );
            }
        }
        for client in clients {
            for name in self.filters_of(client) {
                let id = table.exact(&name).expect("it is known");
                let source = table.get(table.source(id)).expect("it is known");
                assert!(source.is_active(), "{client}: {name}: {source:?}");
                assert!(!self.router.filters.lost().contains(id), "{name}");
            }
        }
    }

    /// Connects a client, in the place of its last connection, and lets CONNACK go.
    fn connect(&mut self, id: &str) -> Connected {
        let connected = self.router.connect(kept(id), self.now, |_, _| ());
        self.persist();
        connected.expect("it is let in")
    }

    fn packet_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    fn subscribe(&mut self, client: Connected, filter: &str, qos: QoS) {
        let options = SubscribeOptions {
            qos,
            ..SubscribeOptions::default()
        };
        let mut bytes = Vec::new();
        let filters = std::iter::once((filter, options));
        encode_subscribe(Version::V5, self.packet_id(), None, filters, &mut bytes);
        packet_of(&self.router, client, &bytes, self.now);
    }

    fn unsubscribe(&mut self, client: Connected, filter: &str) {
        let mut bytes = Vec::new();
        let id = self.packet_id();
        encode_unsubscribe(Version::V5, id, std::iter::once(filter), &mut bytes);
        packet_of(&self.router, client, &bytes, self.now);
    }

    /// The filters of a session.
    fn filters_of(&self, client: &str) -> Vec<String> {
        let session = self.router.session(&SessionKey::from(client));
        let filters = session.into_iter().flat_map(|s| s.subscriptions);
        filters.map(|s| s.filter.to_string()).collect()
    }

    /// The filters that the broker has for a link.
    fn at_broker(&self, link: usize) -> Vec<&str> {
        let session = self.broker.sessions.get(&client_id(self.prefix, link));
        session
            .into_iter()
            .flatten()
            .map(|(name, _)| &**name)
            .collect()
    }

    /// How many filters the broker has.
    fn count_at_broker(&self) -> usize {
        self.broker.sessions.values().map(BTreeMap::len).sum()
    }

    fn number(&self, name: &str) -> Option<FilterId> {
        self.router.filters.read().exact(name)
    }
}

fn client_id(prefix: &str, link: usize) -> String {
    format!("{prefix}{link}")
}

fn kept(id: &str) -> Connect {
    Connect {
        key: id.into(),
        principal: "anonymous".into(),
        anonymous: true,
        clean_start: false,
        expiry: 100_000,
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
