//! Finds out the broker's profile: from the cache, or by a probe on a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, timeout};

use crate::budget::Account;
use crate::config::{Probe, Protocol, Server};
use crate::mqtt::Version;
use crate::router::Router;
use crate::telemetry::metrics;
use crate::transport::dial::Dialed;

use crate::upstream::broker::{Broker, BrokerAccess, LinkContext};
use crate::upstream::connect::{ConnectError, connect_probe};
use crate::upstream::link::end::LinkEnd;
use crate::upstream::profile::probe::{ANSWER_TIME, PROBE_BYTES, probe};
use crate::upstream::profile::{BrokerProfile, Capabilities, Source};

/// The profile of the broker at the server of index `server`, which has just announced
/// `capabilities`. Probes it if no cached profile fits; meanwhile the probe's memory is charged to the
/// account of all queues.
///
/// # Errors
/// [`LinkEnd::OwnListener`]: it is not a broker, but this process.
pub(super) async fn profile_of(
    context: &LinkContext,
    server: usize,
    capabilities: &Capabilities,
) -> Result<Arc<BrokerProfile>, LinkEnd> {
    let (broker, router) = (&context.broker, &*context.router);
    let config = &broker.access.config;
    let find = || async {
        match config.probe {
            Probe::Off => Ok(BrokerProfile::unseen(capabilities, Source::Connack)),
            Probe::Auto => {
                let address = &config.servers[server];
                metrics().upstream_probes.increment(1);
                let begun = Instant::now();
                let _charged = Charged::new(router.queue_account());
                let profile = probe_beside_link(broker, router, address, capabilities).await?;
                log(address, &profile, begun.elapsed());
                Ok(profile)
            }
        }
    };
    broker
        .profiles
        .get_or_find(server, capabilities, find)
        .await
}

/// Why a broker cannot be probed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The configuration names no server.
    #[error("upstream.servers is empty")]
    NoServer,
    /// The connection could not be made.
    #[error(transparent)]
    Connect(ConnectError),
}

/// The memory of a probe that runs.
struct Charged<'a>(&'a Account);

impl<'a> Charged<'a> {
    fn new(account: &'a Account) -> Self {
        account.charge(PROBE_BYTES);
        Self(account)
    }
}

impl Drop for Charged<'_> {
    fn drop(&mut self) {
        self.0.release(PROBE_BYTES);
    }
}

/// Probes the first server of a configuration, for a person.
///
/// # Errors
/// See [`ProbeError`].
pub(crate) async fn probe_once(access: BrokerAccess) -> Result<BrokerProfile, ProbeError> {
    let broker = Broker::new(access);
    let config = &broker.access.config;
    let Some(server) = config.servers.first() else {
        return Err(ProbeError::NoServer);
    };
    let versions: &[Version] = match config.protocol {
        Protocol::Auto => &[Version::V5, Version::V311],
        Protocol::V5 => &[Version::V5],
        Protocol::V311 => &[Version::V311],
    };
    let mut refused = ConnectError::V5Refused;
    for version in versions {
        let connecting = connect_probe(&broker, server, *version);
        let connected = timeout(config.connect_timeout, connecting).await;
        match connected.unwrap_or(Err(ConnectError::Timeout)) {
            Ok(connection) => {
                let topic = probe_topic(&broker);
                return Ok(probe_over(&topic, connection).await);
            }
            Err(error @ ConnectError::V5Refused) => refused = error,
            Err(error) => return Err(ProbeError::Connect(error)),
        }
    }
    Err(ProbeError::Connect(refused))
}

/// Probes over a connection of its own, in the version that the links speak.
///
/// # Errors
/// [`LinkEnd::OwnListener`]: the probe came back to this process.
async fn probe_beside_link(
    broker: &Broker,
    router: &Router,
    server: &Server,
    capabilities: &Capabilities,
) -> Result<BrokerProfile, LinkEnd> {
    let connecting = connect_probe(broker, server, capabilities.version);
    let why = match timeout(ANSWER_TIME, connecting).await {
        Ok(Ok(connection)) => {
            let topic = probe_topic(broker);
            router.probe_begins(&topic);
            let profile = probe_over(&topic, connection).await;
            return match router.probe_ends(&topic) {
                true => Err(LinkEnd::OwnListener),
                false => Ok(profile),
            };
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no CONNACK for the probe's connection in time".into(),
    };
    let mut profile = BrokerProfile::unseen(capabilities, Source::Partly);
    profile.missing.push(why);
    Ok(profile)
}

/// The prefix of one probe's topics. Probes of several processes must not see each other's messages.
fn probe_topic(broker: &Broker) -> String {
    let nonce = getrandom::u64().unwrap_or_default();
    let access = &broker.access;
    format!("{}/{}/{nonce:016x}", access.config.probe_topic, access.node)
}

async fn probe_over(
    topic: &str,
    (mut io, rest, capabilities): (Dialed, BytesMut, Capabilities),
) -> BrokerProfile {
    probe(&mut io, &capabilities, topic, rest).await
}

fn log(server: &Server, profile: &BrokerProfile, took: Duration) {
    let quirks = &profile.quirks;
    tracing::info!(
        server = %server,
        software = profile.software.as_deref(),
        protocol = profile.capabilities.version.name(),
        mapping = profile.mapping().name(),
        identifiers = quirks.identifiers.name(),
        copies = quirks.copies.map(|copies| copies.name()),
        replaces = quirks.replaces,
        retain_as_published = quirks.retain_as_published,
        shared = quirks.shared.name(),
        window = quirks.window,
        nodelay = quirks.nodelay,
        took_ms = took.as_millis() as u64,
        "The broker was probed"
    );
    for missing in &profile.missing {
        tracing::warn!(
            server = %server,
            topic = "upstream.probe_topic",
            "The probe of the broker was cut short; every quirk that it did not see is assumed at its worst: {missing}"
        );
    }
}
