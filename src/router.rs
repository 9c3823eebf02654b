//! The meeting point: clients' sessions on one side, filters and publishes toward the core on the
//! other. No sockets, no clock: the time in milliseconds comes in with each call.
//!
//! Locks, in the order in which they may be nested: what presence told, who evicts, or retained; the
//! table; groups; one shard; and, each as the last, one link's lanes, what is deferred, what is lost, a
//! wake's own. None is held over an await.
mod apply;
mod barrier;
mod delivery;
mod filters;
pub mod handle;
pub mod publish;
mod retained;
mod sessions;
mod tick;
mod types;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};

use foldhash::fast::FixedState;
use parking_lot::{Mutex, RwLock};

use crate::budget::Account;
use crate::mqtt::QoS;
use crate::session::{Effect, Session, SessionLimits};
use crate::store::Store;
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;

pub use apply::Caller;
pub use filters::filter::LinkSession;
pub use filters::links::{BrokerFeatures, Wanted};
pub use publish::{Answered, ClientPublish};
pub use sessions::connect::{Connect, Connected, Refused};
pub use sessions::view::{SessionInfo, SubscriptionInfo, Totals};
pub use types::{Arrived, Peer, RetainedRequest, SessionRef};

use delivery::shared::Groups;
use filters::table::Table;
use handle::{ConnectionHandle, TaskWaker};
use publish::queue::Lanes;
use retained::Retained;
use sessions::shard::Shard;

/// Shards; at most 64, since a filter's shards are the bits of one word.
const SHARDS: usize = 32;

/// What the router is told at start; times in milliseconds, sizes in bytes.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Number of D links, 1 to 8.
    pub data_links: usize,
    /// Number of links for shared subscriptions, 1 to 4.
    pub shared_links: usize,
    /// Shared subscriptions are shared out at this node: the core has none that work.
    pub local_groups: bool,
    /// Filters that are held for good, disjoint; clients' filters inside cost the core nothing.
    pub roots: Vec<String>,
    /// Number of P links at first, 1 to 8.
    pub publish_links: usize,
    /// To which it may grow while their windows are what limits.
    pub publish_links_max: usize,
    /// Where clients' coming and going is told, `%c` being the client identifier; empty: nowhere.
    pub presence_topic: String,
    /// Unix time when the clock was at zero, milliseconds.
    pub started_at: u64,
    /// How long a filter that nobody holds stays subscribed.
    pub linger: u64,
    /// The same for filters with traffic that nobody reads, and at least when there are too many.
    pub linger_busy_min: u64,
    /// Filters that may linger.
    pub filters_lingering_max: usize,
    /// How long a SUBSCRIBE for a new filter waits for an absent core.
    pub subscribe_wait: u64,
    /// After that it is granted, with a gap; else refused.
    pub subscribe_accept: bool,
    /// Budget of all publishes that wait for the core.
    pub publishes_waiting: u64,
    /// One client's share of it.
    pub publishes_waiting_per_client: usize,
    /// The retained cache.
    pub retained_cache: usize,
    /// After the core lost a filter its retained messages are fetched again, for all who have it.
    pub retained_resync: bool,
    /// Budget of all sessions' queues.
    pub queues: u64,
    /// Budget of the output of all connections together.
    pub output: u64,
    /// An entry of the output that nobody takes for this long ends its connection.
    pub write_stall: u64,
    /// Spreads sessions over shards and filters over links, so that nobody can aim at one; a
    /// process's own.
    pub hash_seed: u64,
}

/// The router. Shared by all tasks.
#[derive(Debug)]
pub struct Router {
    /// The limits of every session.
    pub limits: SessionLimits,
    config: RouterConfig,
    shards: Box<[Mutex<Shard>]>,
    table: RwLock<Table>,
    retained: Mutex<Retained>,
    groups: Mutex<Groups>,
    lanes: Box<[PublishLane]>,
    /// P links that sessions are spread over.
    publish_links: AtomicU8,
    /// P links that are dialled: one more while another is on its way.
    publish_wanted: AtomicU8,
    /// Wakes each D link's task.
    data: Box<[Arc<TaskWaker>]>,
    data_up: Box<[AtomicBool]>,
    /// Until when the loss of a data link puts its filters in doubt, milliseconds.
    doubted_until: Box<[AtomicU64]>,
    /// How often a data link was lost.
    data_lost: AtomicU64,
    /// The time of the last presence that was told.
    told: Mutex<u64>,
    fences: Box<[barrier::Fence]>,
    /// Shards with sessions that wait for fences, having left a filter.
    leaving: AtomicU64,
    /// Wakes the R link's task.
    fetch: Arc<TaskWaker>,
    /// Messages that came from the core and are alive in a queue.
    queue_account: Arc<Account>,
    entry_bytes: AtomicI64,
    output_bytes: AtomicI64,
    /// The limit of each connection's output while there is no pressure.
    output_buffer: usize,
    evicting: Mutex<()>,
    /// What could not be settled under a shard's lock; at most one entry for each ended session.
    deferred: Mutex<Vec<sessions::connect::Due>>,
    /// Tasks that wait for room among the publishes; at most one entry for each per tick.
    waiting_for_room: Mutex<Vec<Arc<ConnectionHandle>>>,
    core: Core,
    hasher: FixedState,
    incarnations: AtomicU64,
    ticks: AtomicU64,
}

/// What waits for one P link.
#[derive(Debug, Default)]
struct PublishLane {
    lanes: Mutex<Lanes>,
    wake: Arc<TaskWaker>,
    up: AtomicBool,
}

/// What the core's last CONNACK said; limits that clients are held to.
#[derive(Debug)]
struct Core {
    maximum_qos: AtomicU8,
    retain_available: AtomicBool,
    packet_max: AtomicU32,
    /// Live messages keep their RETAIN (MQTT 5 with Retain As Published).
    retain_as_published: AtomicBool,
    /// User properties reach the core: No Local can be marked.
    properties: AtomicBool,
    /// Shared subscriptions work.
    shared: AtomicBool,
}

impl Router {
    /// A router without sessions, with the filters that `store` knows.
    pub fn new(limits: SessionLimits, config: RouterConfig, store: &dyn Store) -> Self {
        let numbers = store.identifiers();
        let mut table = Table::new(numbers, config.data_links, config.shared_links);
        table.local_groups = config.local_groups;
        for root in &config.roots {
            table.add_root(root);
        }
        let links = config.data_links + config.shared_links;
        Self {
            shards: (0..SHARDS)
                .map(|n| Mutex::new(Shard::new(n as u16, table.lost.clone())))
                .collect(),
            table: RwLock::new(table),
            retained: Mutex::new(Retained::new(config.retained_cache)),
            publish_links: AtomicU8::new(config.publish_links as u8),
            publish_wanted: AtomicU8::new(config.publish_links as u8),
            lanes: (0..config.publish_links_max)
                .map(|_| PublishLane::default())
                .collect(),
            data: (0..links).map(|_| Arc::default()).collect(),
            data_up: (0..links).map(|_| AtomicBool::new(false)).collect(),
            doubted_until: (0..links).map(|_| AtomicU64::new(0)).collect(),
            data_lost: AtomicU64::new(0),
            told: Mutex::new(0),
            fences: (0..links).map(|_| Default::default()).collect(),
            leaving: AtomicU64::new(0),
            groups: Mutex::default(),
            fetch: Arc::default(),
            queue_account: Arc::new(Account::new()),
            entry_bytes: AtomicI64::new(0),
            output_bytes: AtomicI64::new(0),
            output_buffer: limits.output_buffer.load(Ordering::Relaxed),
            evicting: Mutex::new(()),
            deferred: Mutex::new(Vec::new()),
            waiting_for_room: Mutex::new(Vec::new()),
            core: Core {
                maximum_qos: AtomicU8::new(2),
                shared: AtomicBool::new(true),
                retain_available: AtomicBool::new(true),
                packet_max: AtomicU32::new(u32::MAX),
                retain_as_published: AtomicBool::new(true),
                properties: AtomicBool::new(true),
            },
            hasher: FixedState::with_seed(config.hash_seed),
            // 0 means "no mark".
            incarnations: AtomicU64::new(0),
            ticks: AtomicU64::new(0),
            limits,
            config,
        }
    }

    /// The account that messages from the core are charged to.
    pub fn queue_account(&self) -> &Arc<Account> {
        &self.queue_account
    }

    /// Bytes that all queues hold: messages once, and their entries.
    pub fn queue_used(&self) -> u64 {
        let entries = self.entry_bytes.load(Ordering::Relaxed).max(0) as u64;
        self.queue_account.used() + entries
    }

    /// Bytes of output that wait for sockets.
    pub fn output_used(&self) -> u64 {
        self.output_bytes.load(Ordering::Relaxed).max(0) as u64
    }

    /// The largest QoS that the core takes.
    pub fn maximum_qos(&self) -> QoS {
        QoS::from_u8(self.core.maximum_qos.load(Ordering::Relaxed)).unwrap_or(QoS::ExactlyOnce)
    }

    /// Whether clients are granted shared subscriptions.
    pub fn shares(&self) -> bool {
        self.config.local_groups || self.core.shared.load(Ordering::Relaxed)
    }

    /// Whether the core keeps retained messages.
    pub fn retain_available(&self) -> bool {
        self.core.retain_available.load(Ordering::Relaxed)
    }

    /// The smaller of our and the core's Maximum Packet Size, bytes. Room for what we add to a
    /// forwarded packet is taken off the core's.
    pub fn packet_max(&self) -> u32 {
        let core = self.core.packet_max.load(Ordering::Relaxed);
        self.limits.packet_max.min(core.saturating_sub(64))
    }

    /// Works on a session under its shard's lock. `None`: it is gone, or `connection_no` is not its
    /// current connection any more.
    pub fn with<R>(
        &self,
        reference: SessionRef,
        connection_no: u64,
        f: impl FnOnce(&mut Session, &SessionLimits) -> R,
    ) -> Option<R> {
        let mut shard = self.shards.get(usize::from(reference.shard))?.lock();
        let slot = shard.get(reference)?;
        if connection_no != 0
            && (slot.session.connection_no() != connection_no || !slot.session.attached())
        {
            return None;
        }
        let result = f(&mut slot.session, &self.limits);
        self.shed(slot);
        shard.settle(reference.slot);
        self.charge_entries(&mut shard);
        Some(result)
    }

    /// Works on a session as [`Router::with`] does, for packets of its client. Members that its
    /// UNSUBSCRIBEs end leave before the lock is given back: nothing follows an UNSUBACK.
    pub fn feed<R>(
        &self,
        reference: SessionRef,
        connection_no: u64,
        effects: &mut Vec<Effect>,
        f: impl FnOnce(&mut Session, &SessionLimits, &mut Vec<Effect>) -> R,
    ) -> Option<R> {
        let mut shard = self.shards.get(usize::from(reference.shard))?.lock();
        let slot = shard.get(reference)?;
        if slot.session.connection_no() != connection_no || !slot.session.attached() {
            return None;
        }
        let result = f(&mut slot.session, &self.limits, effects);
        self.shed(slot);
        let refused = std::mem::take(&mut slot.session.refused_publishes);
        if refused > 0 {
            metrics().messages_dropped[DropReason::Acl].increment(refused.into());
        }
        for effect in effects.iter_mut() {
            if let Effect::Unsubscribe { filters } = effect {
                for left in filters {
                    shard.leave(reference.slot, left.filter);
                    if !left.primary_over.is_empty() && !shard.leavers.leave(reference.slot, left) {
                        left.primary_over.clear();
                    }
                }
                shard.rejoin(reference.slot);
            }
        }
        shard.settle(reference.slot);
        self.charge_entries(&mut shard);
        Some(result)
    }

    /// A client came to have another address, within its connection.
    pub fn moved(&self, reference: SessionRef, connection_no: u64, peer: Arc<Peer>) {
        let Some(shard) = self.shards.get(usize::from(reference.shard)) else {
            return;
        };
        let mut shard = shard.lock();
        if let Some(slot) = shard.get(reference)
            && slot.session.connection_no() == connection_no
        {
            slot.peer = Some(peer);
        }
    }

    /// Wakes a task at the next tick: it waits for room, or for a deadline.
    pub fn wake_soon(&self, handle: &Arc<ConnectionHandle>) {
        if handle.queue_up() {
            self.waiting_for_room.lock().push(handle.clone());
        }
    }

    /// Takes what waits for a connection's socket, after filling it up. `empty` is exchanged for
    /// the control lane's bytes. `None`: the connection is not the session's any more.
    pub fn take_output(
        &self,
        reference: SessionRef,
        connection_no: u64,
        empty: &mut Vec<u8>,
        now: Millis,
    ) -> Option<Vec<(u8, Vec<u8>)>> {
        self.take_lanes(reference, connection_no, (u16::MAX, 0), empty, now)
    }

    /// The same for a connection of several streams, some of which have not taken all of what they
    /// were given: only for those that are set in `free`, while `held` bytes are still with the
    /// others.
    pub fn take_lanes(
        &self,
        reference: SessionRef,
        connection_no: u64,
        (free, held): (u16, usize),
        empty: &mut Vec<u8>,
        now: Millis,
    ) -> Option<Vec<(u8, Vec<u8>)>> {
        let mut shard = self.shards.get(usize::from(reference.shard))?.lock();
        let slot = shard.get(reference)?;
        if slot.session.connection_no() != connection_no {
            return None;
        }
        slot.woken = false;
        slot.session.connection()?.streams_free(free);
        slot.session.pump(&self.limits, now);
        let side = slot.session.connection()?.take_output(free, empty);
        let aside = side.iter().map(|(_, b)| b.len()).sum::<usize>();
        let mut taken = held + aside;
        // What waits for one data stream is its task's to watch; control is the connection.
        if free & 1 != 0 {
            slot.taken_at = now;
            slot.offered = empty.len();
            taken += empty.len();
        }
        slot.taken = taken;
        if aside + empty.len() > 0
            && let Some(handle) = &slot.handle
        {
            handle.sent(now);
        }
        self.shed(slot);
        shard.settle(reference.slot);
        self.charge_entries(&mut shard);
        Some(side)
    }

    fn defer(&self, due: sessions::connect::Due) {
        self.deferred.lock().push(due);
    }

    fn shed(&self, slot: &mut sessions::shard::Slot) {
        if slot.session.outbound().shed != Default::default() {
            let mut tally = delivery::fanout::Tally::default();
            slot.session.gaps += tally.shed(slot.session.outbound_mut());
            tally.flush();
        }
    }

    fn charge_entries(&self, shard: &mut Shard) {
        let delta = std::mem::take(&mut shard.entry_bytes);
        if delta != 0 {
            self.entry_bytes.fetch_add(delta, Ordering::Relaxed);
        }
        let delta = std::mem::take(&mut shard.output_bytes);
        if delta != 0 {
            self.output_bytes.fetch_add(delta, Ordering::Relaxed);
        }
    }

    fn hash(&self, text: &str) -> u64 {
        self.hasher.hash_one(text)
    }

    fn shard_of(&self, client_id: &str) -> usize {
        (self.hash(client_id) % SHARDS as u64) as usize
    }
}
