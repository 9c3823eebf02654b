//! The meeting point: clients' sessions on one side, filters and publishes toward the broker on the
//! other. It has no sockets and no clock: the time comes in with each call.
//!
//! Each module in here has one owner of its state. An owner does not call its siblings; it works on
//! the owners that come before it in the order of imports (`types`, `handle`, `account`, `messages`, `sessions`,
//! `publish`, `barrier`, `retained`, `filters`, `delivery`), and returns the actions that are left to
//! take. The facade, [`Router`], takes them.
//!
//! # Locks
//!
//! A thread may take several of these locks, in this order:
//!
//! 1. one of: the time of the last presence, the permission to evict, the permission to end a session for
//!    room, the retained cache, whether the publish links become more;
//! 2. the table of filters;
//! 3. the groups of shared subscriptions;
//! 4. one shard of the sessions;
//! 5. one of: the numbers of messages, the messages that wait for the log, the addressees of a message, the
//!    messages of QoS 2 that links have received and then the log, the publish queues of a link, the deferred actions, the tasks that wait for room, the
//!    lost filters, the requests to a connection handle.
//!
//! No lock is held over an await, and none while a client or a link is waited for.

mod account;
mod apply;
mod barrier;
mod broker;
mod config;
mod connections;
mod data_links;
mod delivery;
mod filters;
pub(crate) mod handle;
mod links;
#[cfg(test)]
mod locks;
mod lost;
mod messages;
mod persist;
mod presence;
pub mod publish;
mod replay;
mod restore;
mod retained;
mod sessions;
mod suback;
mod subscribe;
#[cfg(test)]
pub(crate) mod testing;
mod types;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::session::SessionLimits;
use crate::store::Store;
use crate::time::Millis;

pub use account::Full;
pub use apply::Caller;
pub use broker::BrokerFeatures;
pub use config::RouterConfig;
pub use filters::filter::LinkSession;
pub use filters::links::UpstreamSubscribe;
pub use filters::restore::{RestoredLink, StaleLink};
pub(crate) use messages::Committed;
#[cfg(test)]
pub(crate) use persist::Batch;
pub use persist::{Persist, SessionOwner};
pub use publish::ClientPublish;
pub use sessions::Answered;
pub(crate) use sessions::TYPICAL_SESSION_BYTES;
pub use sessions::connect::{Connect, Connected, Predecessor, Refused};
pub use sessions::view::{SessionInfo, SubscriptionInfo, Totals};
pub use types::{Arrived, Peer, RetainedRequest, SessionRef};

use account::SessionAccount;
use barrier::Barriers;
use broker::{BrokerLimits, OwnProbes};
use delivery::fanout::Routes;
use delivery::shared::SharedGroups;
use filters::counts::LinkCounts;
use filters::{FILTERS_MAX, Filters, FiltersConfig};
use handle::TaskWaker;
use presence::Presence;
use publish::{PublishBudgets, Publishing};
use retained::RetainedMessages;
use sessions::tally::Tally;
use sessions::{SessionActions, SessionBudgets, Sessions};

/// Sessions that end to make room for one CONNECT, at most.
const ENDED_FOR_CONNECT_MAX: usize = 8;

/// Sessions that end to make room in one tick, at most.
const ENDED_FOR_ROOM_MAX: usize = 256;

/// The router. Shared by all tasks.
#[derive(Debug)]
pub struct Router {
    config: RouterConfig,
    broker: BrokerLimits,
    own_probes: OwnProbes,
    sessions: Sessions,
    /// The account of sessions and filters.
    account: Arc<SessionAccount>,
    publishing: Publishing,
    presence: Option<Presence>,
    barriers: Barriers,
    retained: RetainedMessages,
    groups: SharedGroups,
    filters: Filters,
    links: LinkCounts,
    /// Wakes each data link's and shared link's task.
    data: Box<[Arc<TaskWaker>]>,
    ticks: AtomicU64,
}

impl Router {
    /// A router without sessions, with the filters that `store` knows.
    pub fn new(limits: SessionLimits, config: RouterConfig, store: &dyn Store) -> Self {
        let links = LinkCounts {
            data: config.data_links,
            data_max: config.data_links_max.max(config.data_links),
            filters_each: config.data_link_filters.max(1),
            shared: config.shared_links,
            shared_max: config.shared_links_max.max(config.shared_links),
        };
        let filters = FiltersConfig {
            links,
            local_groups: config.local_groups,
            linger: config.linger,
            linger_busy_min: config.linger_busy_min,
            lingering_max: config.filters_lingering_max,
            client_lingering_max: limits.subscriptions_max,
            client_lingering_bytes_max: limits.filter_bytes_max,
            hash_seed: limits.hash_seed,
        };
        let account = SessionAccount::new(config.sessions, FILTERS_MAX, limits.hash_seed);
        let account = Arc::new(account);
        let filters = Filters::new(filters, &config.roots, store.identifiers(), &account);
        let data: Box<[Arc<TaskWaker>]> = (0..links.all()).map(|_| Arc::default()).collect();
        let publish_budgets = PublishBudgets {
            bytes: config.publishes_waiting,
            client_bytes: config.publishes_waiting_per_client,
            v3_publishes: limits.v3_publishes_max,
        };
        let session_budgets = SessionBudgets {
            queue_bytes: config.queues,
            output_bytes: config.output,
            write_stall: config.write_stall,
            evict_after: config.evict_after,
        };
        let publish_account = limits.publish_account.clone();
        let sessions = Sessions::new(limits, session_budgets, filters.lost(), &account);
        Self {
            broker: BrokerLimits::new(),
            own_probes: OwnProbes::default(),
            publishing: Publishing::new(
                config.publish_links,
                config.publish_links_max,
                links.all(),
                publish_budgets,
                publish_account,
            ),
            retained: RetainedMessages::new(config.retained_cache, sessions.cache_accounts()),
            sessions,
            account,
            presence: (config.presence_topic.clone())
                .map(|topic| Presence::new(topic, config.started_at)),
            barriers: Barriers::new(&data),
            groups: SharedGroups::default(),
            filters,
            data,
            ticks: AtomicU64::new(0),
            links,
            config,
        }
    }

    /// Gives a client its session. `connack` writes the CONNACK, told Session Present, before
    /// anything else can be written [MQTT-3.2.0-1].
    ///
    /// # Errors
    /// [`Refused`]; nothing changed.
    pub fn connect(
        &self,
        connect: Connect,
        now: Millis,
        connack: impl FnOnce(bool, &mut Vec<u8>),
    ) -> Result<Connected, Refused> {
        for _ in 0..ENDED_FOR_CONNECT_MAX {
            let lingering = || self.filters.lingering_bytes();
            let Some(actions) = self.sessions.make_room(&connect, lingering, now) else {
                break;
            };
            self.settle(actions, now);
        }
        let publish_link = |session| self.publishing.link_of(session);
        let connected = self.sessions.connect(connect, now, publish_link, connack);
        let (mut connected, actions) = connected?;
        if !actions.groups.is_empty() {
            self.groups.members_came(&actions.groups, connected.session);
        }
        self.settle(actions.session, now);
        connected.publish_round = self.publishing.next_round(connected.publish_link);
        Ok(connected)
    }

    /// A connection ended. `normal`: by DISCONNECT 0x00, which discards the will. True if the
    /// session ended with it.
    pub fn disconnected(
        &self,
        session: SessionRef,
        connection_no: u64,
        normal: bool,
        now: Millis,
    ) -> bool {
        let left = self
            .sessions
            .disconnected(session, connection_no, normal, now);
        let Some((over, actions)) = left else {
            return false;
        };
        self.settle(actions, now);
        over
    }

    /// Ends sessions that were detached long ago, if the account of sessions is too full. The filters that
    /// nobody uses are going already, so a session need not end for them.
    fn end_surplus(&self, now: Millis) {
        if !self.sessions.makes_room() {
            return;
        }
        for _ in 0..ENDED_FOR_ROOM_MAX {
            let lingering = self.filters.lingering_bytes();
            let Some(actions) = self.sessions.end_surplus(lingering, now) else {
                return;
            };
            self.settle(actions, now);
        }
    }

    /// Takes the actions that a session's change has left to take.
    fn settle(&self, actions: SessionActions, now: Millis) {
        self.filters.release(&actions.released, actions.shard, now);
        for will in actions.wills {
            self.publishing.publish_will(&self.sessions, will, now);
        }
        self.groups
            .redeliver(&self.sessions, actions.redeliveries, now);
        if let Some(presence) = &self.presence {
            for change in &actions.presence_changes {
                let qos = crate::mqtt::QoS::AtLeastOnce.min(self.broker.maximum_qos());
                presence.publish(&self.sessions, &self.publishing, change, qos, now);
            }
        }
        self.request_retained(actions.retained, now);
        for closed in actions.closed {
            let (session, link) = (closed.session, closed.publish_link);
            let waits = self.publishing.is_waiting(session, link);
            let moves = closed.just_left && self.publishing.may_move(session, link);
            self.sessions.forget(session, waits || moves, now);
        }
    }

    /// Delivers a batch in order. Bounded work per lock; never waits for a client.
    pub fn fan_out(&self, batch: &mut [Arrived], now: Millis) {
        if batch.is_empty() {
            return;
        }
        let numbers = self.sessions.numbers();
        let under_way = numbers.number(batch, now);
        let mut routes = Routes::default();
        let table = self.filters.read();
        routes.find(&table, self.links.data_max, batch);
        let batch = &*batch;
        if let Some(under_way) = &under_way {
            for (at, arrived) in batch.iter().enumerate() {
                // A member of a shared subscription is named when it gets the message.
                if arrived.link < self.links.data_max {
                    let filters = arrived.filters.iter().filter_map(|id| table.get(*id));
                    let filters = filters.map(|filter| filter.name().clone());
                    numbers.address(under_way, at, &arrived.message, filters);
                }
            }
        }
        drop(table);
        let keeps_retain = self.broker.keeps_retain();
        // A copy whose counterpart was delivered is for nobody.
        for arrived in batch.iter().filter(|a| !a.filters.is_empty()) {
            let unknown = arrived.skipped && arrived.message.retain();
            if !keeps_retain || unknown {
                self.retained.doubtful(arrived, now);
            } else if arrived.message.retain() {
                self.retained.live(arrived, now);
            }
        }
        let mut tally = Tally::default();
        if routes.shared {
            for arrived in batch.iter().filter(|arrived| !arrived.skipped) {
                for filter in &arrived.filters {
                    self.groups
                        .share(&self.sessions, *filter, &arrived.message, now, &mut tally);
                }
            }
            tally.wake();
        }
        for (at, group) in &routes.local_groups {
            if batch[*at].skipped {
                continue;
            }
            self.groups
                .share(&self.sessions, *group, &batch[*at].message, now, &mut tally);
        }
        tally.wake();
        for shard in routes.shards() {
            let arrived = routes.of_shard(shard, batch);
            self.sessions.fan_out(shard, arrived, now, &mut tally);
        }
        tally.flush();
        self.sessions.enforce_budget(now);
    }

    /// Lets time pass: to be called a few times a second.
    pub fn tick(&self, now: Millis) {
        for actions in self.sessions.take_deferred() {
            self.settle(actions, now);
        }
        self.sessions.wake_waiting();
        self.sessions.tick_budgets(now);
        for shard in self.sessions.shards() {
            let actions = self.sessions.tick(shard, now);
            self.settle(actions, now);
        }
        self.end_surplus(now);
        self.tick_late(now);
        self.tick_unsubscribed(now);
        let wake = self.filters.tick_moves(now, |link| self.barriers.ask(link));
        self.wake_links(wake);
        let served = (self.retained).release_late(&self.sessions, &self.filters, now);
        self.end_waits(&served, now);
        // Retained messages that were handed on are in queues now.
        self.sessions.enforce_budget(now);
        self.retained
            .forget_missed(|| self.data_settled().then(|| self.data_losses()));
        // It walks over all lingering filters, so not at each tick.
        if self
            .ticks
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(10)
        {
            self.tick_linger(now);
            self.filters.read().suggest_root();
            self.ask_for_checkpoint();
        }
    }
}
