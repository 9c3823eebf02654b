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
mod permissions;
mod probe;
mod ready;
mod reload;
mod report;
mod secret;
mod ticker;
mod view;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin;
use crate::clock::Clock;
use crate::config::Config;
use crate::store::{Memory, Store};
use crate::telemetry::{self, MemoryAccount, metrics};
use crate::transport::{Bound, ConnectionCap, Drain};
use crate::upstream::{Start, Upstream};

pub use check::check;
pub use error::StartError;
pub use probe::probe;

use certificates::Certificates;
use ready::Ready;
use reload::Reload;
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

    let store: Arc<dyn Store> = Arc::new(Memory);
    let router = Arc::new(convert::router(&config, clock, &*store));
    let clients = Arc::new(convert::clients(&config, router.clone(), clock)?);
    check::validate_files(&config)?;
    permissions::warn(&config);
    let mut certificates = Certificates::load(&config)?;
    let broker = convert::broker_access(&config)?;
    let cap = Arc::new(ConnectionCap::new(connections(&config)));
    let limits = Arc::new(convert::transport_limits(&config, cap.clone())?);
    let listeners = listeners::bind_all(&config, &mut certificates, &limits, clock)?;

    let upstream = Upstream::start(
        Start {
            broker,
            router: router.clone(),
            store,
            clock,
            stop: stop_links.clone(),
            instance: getrandom::u64().unwrap_or_default() | 1,
        },
        &tasks,
    );
    let view = Arc::new(View {
        router: router.clone(),
        upstream: upstream.clone(),
        clients: clients.clone(),
        started: std::time::SystemTime::now(),
    });
    let admin = bind_admin(&config, view).await?;
    let ready = Ready::new(&config, &listeners, admin.local_addr());
    set_budgets(&config);

    // From here on nothing can fail.
    tasks.spawn(admin.run(stop_links.clone().cancelled_owned()));
    let upkeep = stop_links.clone();
    tasks.spawn(async move {
        upkeep.run_until_cancelled(telemetry::upkeep()).await;
    });
    tasks.spawn(ticker::run(router, clock, stop_links.clone()));
    let reload = Reload {
        certificates,
        clients: clients.clone(),
        config: config.clone(),
    };
    tasks.spawn(reload.run(hangup, stop_links.clone()));
    let drains: Vec<Drain> = listeners.iter().map(Bound::drain).collect();
    for listener in listeners {
        listeners::serve(&tasks, &clients, listener, stop_accepting.clone());
    }
    ready.print();

    signals.recv().await;
    drain::drain(drain::Running {
        grace: config.drain.grace,
        clients,
        upstream,
        cap,
        stop_accepting,
        stop_links,
        drains,
        tasks,
    })
    .await;
    Ok(())
}

/// The cap on connections that the configuration and the open-file limit allow.
fn connections(config: &Config) -> usize {
    let cap = open_files::connection_cap(config, open_files::raise());
    if let Some(warning) = &cap.warning {
        tracing::warn!("{warning}");
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
        (MemoryAccount::Queues, config.memory.queues),
        (
            MemoryAccount::PublishesWaiting,
            config.upstream.publishes_waiting,
        ),
        (MemoryAccount::RetainedCache, config.upstream.retained_cache),
    ] {
        budgets[account].set(bytes as f64);
    }
}
