//! The listeners: bound first, and served once nothing can fail any more.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::{Clients, ListenerContext};
use crate::config::{self, Config};
use crate::telemetry::metrics;
use crate::transport::{self, BindError, Bound, Kind, Limits, ListenSpec, Proxies};

use crate::runtime::certificates::Certificates;
use crate::runtime::convert;
use crate::runtime::error::StartError;

/// A listener that is bound and not served yet.
pub(super) struct BoundListener {
    pub(super) config: config::Listener,
    pub(super) bound: Bound,
}

/// Binds all listeners.
///
/// # Errors
/// [`StartError::Config`] for certificates that do not fit together, [`StartError::Temporary`] for
/// an address that cannot be bound.
pub(super) fn bind_all(
    config: &Config,
    certificates: &mut Certificates,
    limits: &Arc<Limits>,
) -> Result<Vec<BoundListener>, StartError> {
    let mut all = Vec::new();
    for listener in &config.listeners {
        let spec = ListenSpec {
            name: listener.name.clone(),
            transport: convert::kind(listener.transport),
            bind: listener.bind,
            paths: listener.paths.clone(),
            origins: listener.origins.clone(),
            proxies: Proxies {
                trusted: listener.trusted_proxies.clone(),
                protocol: listener.proxy_protocol,
                header: listener.real_ip_header,
            },
            tls: certificates.serve(&listener.tls, listener.early_data)?,
            webtransport: listener.webtransport,
        };
        all.push(BoundListener {
            config: listener.clone(),
            bound: bind(config, spec, limits)?,
        });
    }
    Ok(all)
}

/// Binds one listener. A first run, without a configuration file, takes a free port where the
/// default port is taken.
fn bind(config: &Config, spec: ListenSpec, limits: &Arc<Limits>) -> Result<Bound, StartError> {
    let failed = |e: BindError| StartError::Temporary(e.to_string());
    match transport::bind(spec.clone(), limits.clone()) {
        Err(BindError::AddrInUse { .. }) if config.source.is_none() => {
            let (name, taken) = (spec.name.clone(), spec.bind.port());
            let mut free = spec;
            free.bind.set_port(0);
            let bound = transport::bind(free, limits.clone()).map_err(failed)?;
            warn_port_taken(&name, taken, bound.local_addr().port());
            Ok(bound)
        }
        other => other.map_err(failed),
    }
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
    clients: &Arc<Clients>,
    listener: BoundListener,
    stop: CancellationToken,
) {
    let BoundListener {
        config: listener,
        bound,
    } = listener;
    let transport = listener.transport.name();
    let context = ListenerContext {
        auth: listener.auth,
        name: listener.name.as_str().into(),
        transport,
        metrics: Arc::new(metrics().listener(&listener.name, transport)),
        webtransport: listener
            .webtransport
            .then(|| Arc::new(metrics().listener(&listener.name, Kind::WebTransport.as_str()))),
        mount: listener.mount.as_str().into(),
        ping_after: match listener.ping_interval {
            Some(after) if listener.transport.is_websocket() => Some(after.as_millis() as u64),
            _ => None,
        },
    };
    let clients = clients.clone();
    let handler = move |accepted| clients.clone().serve(context.clone(), accepted);
    tasks.spawn(bound.serve(handler, stop));
}
