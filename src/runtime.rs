//! A configuration becomes a running proxy: wiring, reload, drain.

mod certificates;
mod check;
mod convert;
mod dates;
mod drain;
mod error;
mod events;
mod listeners;
mod loops;
mod open_files;
mod panics;
mod permissions;
mod probe;
mod ready;
mod reload;
mod report;
mod secret;
mod store;
mod ticker;
mod view;

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin;
use crate::clock::Clock;
use crate::config::{Config, Durability};
use crate::router::{Persist, Router};
use crate::store::{Memory, OfNode, Store};
use crate::supervise::{Health, Run, keep_running};
use crate::telemetry::{self, MemoryAccount, TaskKind, metrics};
use crate::transport::{Bound, ConnectionCap, Drain};
use crate::upstream::{Start, Upstream};

pub use check::check;
pub use error::StartError;
pub use panics::log_panics;
pub use probe::probe;

use certificates::Certificates;
use ready::Ready;
use reload::{Files, Reload};
use secret::NodeSecret;
use store::SessionStore;
use view::View;

/// Runs until SIGTERM or SIGINT, drains, and returns.
///
/// # Errors
/// [`StartError`]; no client was served.
pub async fn run(config: Config) -> Result<(), StartError> {
    let mut signals = drain::Signals::new()?;
    let hangup = reload::hangup()?;
    let clock = Clock::default();
    let tasks = TaskTracker::new();
    let stop_accepting = CancellationToken::new();
    let stop_links = CancellationToken::new();

    let node = node_secret(&config)?;
    let store: Arc<dyn Store> = match &node {
        Some(node) => Arc::new(OfNode {
            digests: node.digests(),
        }),
        None => Arc::new(Memory),
    };
    let hash_seed = node.as_ref().map(NodeSecret::hash_seed);
    let router = Arc::new(convert::router(&config, clock, &*store, hash_seed));
    let clients = Arc::new(convert::clients(&config, router.clone(), clock)?);
    check::validate_files(&config)?;
    permissions::warn(&config);
    let mut certificates = Certificates::load(&config)?;
    let broker = convert::broker_access(&config)?;
    let cap = Arc::new(ConnectionCap::new(connections(&config)));
    let limits = Arc::new(convert::transport_limits(&config, cap.clone())?);
    let listeners = listeners::bind_all(&config, &mut certificates, &limits, clock)?;
    // Before any link or client can ask for a session.
    let sessions = store::open(&config, &router, clock).await?;
    if sessions.is_some() {
        clients.judge_subscriptions_again();
    }

    let health = Arc::<Health>::default();
    let embedded = broker.embedded.clone();
    let upstream = Upstream::start(
        Start {
            broker,
            router: router.clone(),
            store,
            clock,
            stop: stop_links.clone(),
            instance: match &node {
                Some(node) => node.instance(),
                None => getrandom::u64().unwrap_or_default() | 1,
            },
            health: health.clone(),
        },
        &tasks,
    );
    let view = Arc::new(View {
        router: router.clone(),
        upstream: upstream.clone(),
        embedded,
        clients: clients.clone(),
        started: std::time::SystemTime::now(),
        health: health.clone(),
    });
    let admin = bind_admin(&config, view).await?;
    let ready = Ready::new(&config, &listeners, admin.local_addr());
    set_budgets(&config);

    // From here on nothing can fail.
    let reload = Reload {
        hangup,
        files: Arc::new(Mutex::new(Files {
            certificates,
            clients: clients.clone(),
            config: config.clone(),
        })),
    };
    let services = Services {
        tasks: &tasks,
        health: &health,
        stop: &stop_links,
    };
    services.start(admin, router.clone(), clock, reload);
    services.persist(sessions.as_ref(), router.clone());
    let drains: Vec<Drain> = listeners.iter().map(Bound::drain).collect();
    for listener in listeners {
        listeners::serve(&tasks, &health, &clients, listener, stop_accepting.clone());
    }
    ready.print().await;

    signals.recv().await;
    // To free the memory of a million sessions would only delay the end of the process.
    std::mem::forget(clients.router.clone());
    let draining = drain::drain(drain::Running {
        durability: config.store.durability,
        grace: config.drain.grace,
        clients,
        upstream,
        cap,
        stop_accepting,
        stop_links,
        drains,
        tasks,
    });
    signals.drain_unless_asked_again(draining).await;
    if let Some(sessions) = sessions {
        sessions.close(&router).await;
    }
    Ok(())
}

/// The values that outlive the process, where sessions do.
fn node_secret(config: &Config) -> Result<Option<NodeSecret>, StartError> {
    if config.store.durability == Durability::Memory {
        return Ok(None);
    }
    let secret = NodeSecret::load(&config.node.data_dir);
    let failed = |e| StartError::Internal(format!("no randomness: {e}"));
    secret.map_err(failed).map(Some)
}

/// The tasks that serve the whole process, each started again if it ends.
struct Services<'a> {
    tasks: &'a TaskTracker,
    health: &'a Arc<Health>,
    stop: &'a CancellationToken,
}

impl Services<'_> {
    fn start(&self, admin: admin::Server, router: Arc<Router>, clock: Clock, reload: Reload) {
        self.keep(TaskKind::Admin, "admin", admin, |admin, stop| {
            Box::pin(async {
                // It ends with an error only where the supervisor has to start it again.
                let _ = admin.run(stop.cancelled_owned()).await;
            })
        });
        self.keep(TaskKind::Timer, "metrics timer", (), |(), stop| {
            Box::pin(async move {
                stop.run_until_cancelled(telemetry::upkeep()).await;
            })
        });
        self.keep(
            TaskKind::Timer,
            "router timer",
            router,
            move |router, stop| Box::pin(ticker::run(router, clock, stop)),
        );
        self.keep(TaskKind::Reload, "reload", reload, |reload, stop| {
            Box::pin(reload.run(stop))
        });
    }

    /// Writes sessions that change to the disk, where they are kept there.
    fn persist(&self, sessions: Option<&SessionStore>, router: Arc<Router>) {
        let Some(sessions) = sessions else {
            return;
        };
        let persist = Persist::new(sessions.log());
        self.keep(
            TaskKind::Store,
            "session store",
            persist,
            move |persist, stop| {
                let router = router.clone();
                Box::pin(async move { store::persist(persist, &router, stop).await })
            },
        );
    }

    fn keep<S: Send + 'static>(
        &self,
        kind: TaskKind,
        name: &str,
        state: S,
        run: impl for<'a> Fn(&'a mut S, CancellationToken) -> Run<'a> + Send + Sync + 'static,
    ) {
        let (health, stop) = (self.health.clone(), self.stop.clone());
        let until = stop.clone();
        let task = keep_running(kind, name.to_owned(), health, until, state, move |state| {
            run(state, stop.clone())
        });
        self.tasks.spawn(task);
    }
}

/// The cap on connections that the configuration and the open-file limit allow.
fn connections(config: &Config) -> usize {
    let cap = open_files::connection_cap(config, open_files::raise());
    if let Some(warning) = &cap.warning {
        tracing::warn!("{warning}");
    }
    if let Some(note) = &cap.note {
        tracing::info!("{note}");
    }
    cap.connections
}

/// Binds the admin side. A first run takes a free port where the default port is taken.
async fn bind_admin(config: &Config, view: Arc<View>) -> Result<admin::Server, StartError> {
    let failed = |e: std::io::Error| {
        StartError::Temporary(format!(
            "admin.bind: {} cannot be bound: {e}",
            config.admin.bind
        ))
    };
    match admin::Server::bind(&config.admin, view.clone()).await {
        Err(e) if config.source.is_none() && e.kind() == std::io::ErrorKind::AddrInUse => {
            let mut free = config.admin.clone();
            free.bind.set_port(0);
            let server = admin::Server::bind(&free, view).await.map_err(failed)?;
            listeners::warn_port_taken(
                "admin",
                config.admin.bind.port(),
                server.local_addr().port(),
            );
            Ok(server)
        }
        other => other.map_err(failed),
    }
}

fn set_budgets(config: &Config) {
    let budgets = &metrics().memory_budget_bytes;
    for (account, bytes) in [
        (MemoryAccount::Total, config.memory.max),
        (MemoryAccount::Sessions, config.memory.sessions),
        (MemoryAccount::Queues, config.memory.queues),
        (
            MemoryAccount::PublishesWaiting,
            config.upstream.publishes_waiting,
        ),
        (MemoryAccount::RetainedCache, config.upstream.retained_cache),
        (
            MemoryAccount::EmbeddedBroker,
            convert::embedded_bytes(config),
        ),
    ] {
        budgets[account].set(bytes as f64);
    }
}

#[cfg(test)]
mod tests;
