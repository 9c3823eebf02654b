//! The listeners: bound first, and served once nothing can fail any more.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::{Clients, ListenerContext};
use crate::clock::Clock;
use crate::config::{self, Config, Transport};
use crate::supervise::{Health, keep_running};
use crate::telemetry::{TaskKind, metrics};
use crate::transport::{self, BindError, Bound, Limits};

use crate::runtime::certificates::Certificates;
use crate::runtime::error::StartError;
use crate::runtime::events::ListenerEvents;

/// Binds all listeners.
///
/// # Errors
/// [`StartError::Config`] for certificates that do not fit together, [`StartError::Temporary`] for
/// an address that cannot be bound.
pub(super) fn bind_all(
    config: &Config,
    certificates: &mut Certificates,
    limits: &Arc<Limits>,
    clock: Clock,
) -> Result<Vec<Bound>, StartError> {
    let mut all = Vec::new();
    for listener in &config.listeners {
        let tls = certificates.serve(&listener.tls, listener.early_data)?;
        let bind = |listener: config::Listener| {
            let events = Arc::new(ListenerEvents::new(&listener, clock));
            transport::bind(listener, tls.clone(), limits.clone(), events)
        };
        let bound = match bind(listener.clone()) {
            // A first run, without a configuration file, takes a free port where the default port is
            // taken.
            Err(BindError::AddrInUse { .. }) if config.source.is_none() => {
                let mut free = listener.clone();
                free.bind.set_port(0);
                bind(free).inspect(|bound| {
                    let port = bound.local_addr().port();
                    warn_port_taken(&listener.name, listener.bind.port(), port);
                })
            }
            other => other,
        };
        all.push(bound.map_err(|e| StartError::Temporary(e.to_string()))?);
    }
    Ok(all)
}

pub(super) fn warn_port_taken(listener: &str, taken: u16, port: u16) {
    tracing::warn!(
        listener,
        taken,
        port,
        "The default port is taken; a free one is used"
    );
}

/// Accepts connections until `stop` is cancelled.
pub(super) fn serve(
    tasks: &TaskTracker,
    health: &Arc<Health>,
    clients: &Arc<Clients>,
    bound: Bound,
    stop: CancellationToken,
) {
    let listener = bound.listener();
    let transport = listener.transport.name();
    let context = ListenerContext {
        auth: listener.auth,
        name: listener.name.as_str().into(),
        transport,
        metrics: Arc::new(metrics().listener(&listener.name, transport)),
        webtransport: listener
            .webtransport
            .then(|| Arc::new(metrics().listener(&listener.name, Transport::WebTransport.name()))),
        mount: listener.mount.as_str().into(),
        ping_after: (listener.ping_interval).filter(|_| listener.transport.is_websocket()),
        // So that a client that keeps it is never silent for as long.
        keep_alive_max: bound.idle_timeout().map(|idle| idle / 3 * 2),
    };
    let clients = clients.clone();
    let (name, until) = (format!("listener {}", context.name), stop.clone());
    let handler = move |accepted| clients.clone().serve(context.clone(), accepted);
    let health = health.clone();
    tasks.spawn(keep_running(
        TaskKind::Listener,
        name,
        health,
        until,
        bound,
        move |bound| Box::pin(bound.serve(handler.clone(), stop.clone())),
    ));
}
