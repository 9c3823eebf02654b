//! The broker's side: a few quiet links to the broker.
//!
//! Data links carry the filters and bring messages, publish links carry publishes to the broker,
//! the retained link fetches retained messages, and shared links carry shared subscriptions. Each
//! link is a machine without I/O (`link`), driven by one task that dials, reconnects and moves
//! bytes (`task`). The known properties of the broker are its [`profile`].

mod broker;
mod connect;
mod discover;
mod duplicate_node;
pub(crate) mod link;
mod link_times;
mod outage;
pub(crate) mod profile;
mod pump;
mod role;
mod stale;
mod status;
mod task;

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::router::Router;
use crate::router::handle::TaskWaker;
use crate::store::Store;
use crate::supervise::Health;

pub(crate) use broker::{BrokerAccess, client_id};
pub(crate) use discover::probe_once;
pub(crate) use link::common::RESERVED_KEY;
pub(crate) use role::Role;
pub(crate) use status::LinkStatus;

use broker::LinkContext;
use link::data::DataLink;
use link::machine::Machine;
use link::publish::PublishLink;
use link::retained::RetainedLink;
use profile::BrokerProfile;

/// What [`Upstream::start`] needs.
pub(crate) struct Start {
    /// How the broker is reached.
    pub broker: BrokerAccess,
    /// The router.
    pub router: Arc<Router>,
    /// Where filters' numbers and received packet identifiers are kept.
    pub store: Arc<dyn Store>,
    /// The process's clock.
    pub clock: Clock,
    /// Tells the links to end.
    pub stop: CancellationToken,
    /// A number that no other process has. It marks this process's publishes for No Local.
    pub instance: u64,
    /// Where a link that cannot be kept running is noted.
    pub health: Arc<Health>,
}

/// The running links.
#[derive(Debug, Clone)]
pub(crate) struct Upstream {
    links: Arc<[Arc<LinkStatus>]>,
    profile: Arc<Mutex<Option<Arc<BrokerProfile>>>>,
}

impl Upstream {
    /// Starts all links. Each connects in a task of its own.
    pub(crate) fn start(start: Start, tasks: &TaskTracker) -> Self {
        let (router, store, instance) = (start.router, start.store, start.instance);
        let context = LinkContext::new(start.broker, router.clone(), start.clock, start.stop);
        let context = Arc::new(context);
        tasks.spawn(stale::end_all(context.clone()));
        let mut spawn = Spawn {
            context: context.clone(),
            health: start.health,
            tasks,
            links: Vec::new(),
        };
        let config = &context.broker.access.config;
        let probes: Arc<str> = config.probe_topic.as_str().into();
        let data_link =
            |link| DataLink::new(router.clone(), link, instance, probes.clone(), &*store);
        for n in 0..usize::from(config.data_links.max) {
            let wake = router.data_waker(n).clone();
            spawn.link(Role::Data, n, data_link(n), wake);
        }
        for n in 0..usize::from(config.shared_links.max) {
            let link = router.shared_link(n);
            let wake = router.data_waker(link).clone();
            spawn.link(Role::Shared, n, data_link(link), wake);
        }
        for n in 0..usize::from(config.publish_links.max) {
            let machine = PublishLink::new(router.clone(), n, instance);
            let wake = router.publish_waker(n).clone();
            spawn.link(Role::Publish, n, machine, wake);
        }
        let machine = RetainedLink::new(router.clone(), probes);
        let wake = router.retained_waker().clone();
        spawn.link(Role::Retained, 0, machine, wake);
        Self {
            links: spawn.links.into(),
            profile: context.broker.profiles.current(),
        }
    }

    /// All links.
    pub(crate) fn links(&self) -> &[Arc<LinkStatus>] {
        &self.links
    }

    /// The broker's profile; `None` before the first link has connected.
    pub(crate) fn profile(&self) -> Option<Arc<BrokerProfile>> {
        self.profile.lock().clone()
    }

    /// Publishes that the broker has not acknowledged.
    pub(crate) fn in_flight(&self) -> usize {
        self.links.iter().map(|l| l.state().in_flight).sum()
    }
}

/// Starts the tasks of links.
struct Spawn<'a> {
    context: Arc<LinkContext>,
    health: Arc<Health>,
    tasks: &'a TaskTracker,
    links: Vec<Arc<LinkStatus>>,
}

impl Spawn<'_> {
    fn link<M: Machine + 'static>(
        &mut self,
        role: Role,
        number: usize,
        machine: M,
        wake: Arc<TaskWaker>,
    ) {
        let status = Arc::new(LinkStatus::new(role, number));
        self.links.push(status.clone());
        let (context, health) = (self.context.clone(), self.health.clone());
        let task = task::run(context, health, status, machine, wake);
        self.tasks.spawn(task);
    }
}
