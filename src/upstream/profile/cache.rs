//! What is known of the core: probed once for all links, and again when its CONNACK changes.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, timeout};

use crate::config::{Probe, Protocol, Server};
use crate::mqtt::Version;
use crate::telemetry::metrics;
use crate::transport::dial::Dialed;

use crate::upstream::Core;
use crate::upstream::connect::{Attempt, Established, connect_probe};
use crate::upstream::profile::probe::{PROBE_TIME, probe};
use crate::upstream::profile::{BrokerProfile, Capabilities, Source};

/// How long a record is good for while CONNACK says the same.
const GOOD_FOR: Duration = Duration::from_secs(3600);

/// The record and what it was made of.
#[derive(Debug)]
pub(crate) struct Known {
    server: usize,
    capabilities: Capabilities,
    at: Instant,
    profile: Arc<BrokerProfile>,
}

impl Known {
    fn is_of(&self, server: usize, capabilities: &Capabilities) -> bool {
        self.server == server && self.capabilities == *capabilities
    }

    /// Whether it is still the better record of the same core.
    fn outlives(&self, server: usize, capabilities: &Capabilities, seen: &BrokerProfile) -> bool {
        seen.source == Source::Partly && self.is_of(server, capabilities)
    }
}

/// Gives a link that came up what is known of the core, probing it first if need be.
pub(in crate::upstream) async fn learn(core: &Core, server: usize, established: &mut Established) {
    let profile = recall(core, server, &established.capabilities).await;
    let (up, facts) = (&mut established.up, &mut established.facts);
    up.identifiers = profile.identifiers.usable();
    up.keeps_retain = profile.keeps_retain();
    up.fetch_qos = profile.fetch_qos();
    up.fetch_quiet = profile.fetch_quiet();
    facts.identifiers = up.identifiers;
    facts.keeps_retain = up.keeps_retain;
    facts.properties = profile.keeps_properties();
    facts.shared = profile.shares();
    facts.replaces = profile.replaces();
}

async fn recall(core: &Core, server: usize, capabilities: &Capabilities) -> Arc<BrokerProfile> {
    // Other links wait for the one that probes.
    let mut known = core.known.lock().await;
    if let Some(known) = &*known
        && known.is_of(server, capabilities)
        && known.at.elapsed() < GOOD_FOR
    {
        return known.profile.clone();
    }
    let address = &core.config.servers[server];
    let profile = Arc::new(match core.config.probe {
        Probe::Off => BrokerProfile::unseen(capabilities, Source::Connack),
        Probe::Auto => {
            metrics().upstream_probes.increment(1);
            let profile = seen(core, address, capabilities).await;
            say(address, &profile);
            // Filters are held by what was seen before: less is no news of the core, which may have
            // been slow just now. The next link that comes up looks again.
            if let Some(known) = &*known
                && known.outlives(server, capabilities, &profile)
            {
                return known.profile.clone();
            }
            profile
        }
    });
    count(&profile);
    *core.profile.lock() = Some(profile.clone());
    *known = Some(Known {
        server,
        capabilities: *capabilities,
        at: Instant::now(),
        profile: profile.clone(),
    });
    profile
}

/// Connects as a link would, and probes; for a person.
///
/// # Errors
/// Why the core cannot be reached.
pub(in crate::upstream) async fn probe_once(core: &Core) -> Result<BrokerProfile, String> {
    let Some(server) = core.config.servers.first() else {
        return Err("upstream.servers is empty".into());
    };
    let versions: &[Version] = match core.config.protocol {
        Protocol::Auto => &[Version::V5, Version::V311],
        Protocol::V5 => &[Version::V5],
        Protocol::V311 => &[Version::V311],
    };
    let mut why = String::new();
    for version in versions {
        let connected = connect_probe(core, server, *version);
        match timeout(core.config.connect_timeout, connected).await {
            Ok(Ok(connected)) => return Ok(look(core, connected).await),
            Ok(Err(Attempt::NoV5)) => why = "it does not speak MQTT 5".into(),
            Ok(Err(Attempt::Failed(failed))) => return Err(failed.why),
            Err(_) => return Err("no CONNACK within upstream.connect_timeout".into()),
        }
    }
    Err(why)
}

type Connected = (Dialed, BytesMut, Capabilities);

async fn look(core: &Core, (mut io, rest, capabilities): Connected) -> BrokerProfile {
    let nonce = getrandom::u32().unwrap_or_default();
    let topic = format!("{}/{}/{nonce:08x}", core.config.probe_topic, core.node);
    probe(&mut io, &capabilities, &topic, rest).await
}

/// One probe, over a connection of its own.
async fn seen(core: &Core, server: &Server, capabilities: &Capabilities) -> BrokerProfile {
    let version = match capabilities.version_5 {
        true => Version::V5,
        false => Version::V311,
    };
    let why = match timeout(PROBE_TIME, connect_probe(core, server, version)).await {
        Ok(Ok(connected)) => return look(core, connected).await,
        Ok(Err(Attempt::Failed(failed))) => failed.why,
        Ok(Err(Attempt::NoV5)) => "it does not speak MQTT 5 now".into(),
        Err(_) => "no CONNACK for the probe's connection in time".into(),
    };
    let mut profile = BrokerProfile::unseen(capabilities, Source::Partly);
    profile.missing.push(why);
    profile
}

fn say(server: &Server, profile: &BrokerProfile) {
    tracing::info!(
        server = %server,
        software = profile.software.as_deref(),
        mapping = profile.mapping(),
        identifiers = ?profile.identifiers,
        copies = ?profile.copies,
        replaces = ?profile.replaces,
        retain_as_published = ?profile.retain_as_published,
        shared = ?profile.shared,
        window = ?profile.window,
        "The core was probed"
    );
    for missing in &profile.missing {
        tracing::warn!(
            server = %server,
            topic = "upstream.probe_topic",
            "The probe of the core was cut short; what was not seen is assumed at its worst: {missing}"
        );
    }
}

fn count(profile: &BrokerProfile) {
    let word = |v: &dyn std::fmt::Debug| format!("{v:?}").to_lowercase();
    let yes = |v: bool| if v { "yes" } else { "no" }.to_owned();
    metrics().core_info([
        ("protocol", profile.protocol.to_owned()),
        ("source", word(&profile.source)),
        ("mapping", profile.mapping().to_owned()),
        ("identifiers", word(&profile.identifiers)),
        ("retain_as_published", yes(profile.keeps_retain())),
        ("shared", word(&profile.shared)),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_cut_short_is_no_news_of_a_core_that_is_known() {
        let capabilities = Capabilities {
            version_5: true,
            identifiers: true,
            shared: true,
            receive_maximum: 100,
            maximum_qos: 2,
            maximum_packet_size: None,
            retain_available: true,
        };
        let seen = |source| BrokerProfile::unseen(&capabilities, source);
        let known = Known {
            server: 1,
            capabilities,
            at: Instant::now(),
            profile: Arc::new(seen(Source::Probed)),
        };
        assert!(known.outlives(1, &capabilities, &seen(Source::Partly)));
        assert!(!known.outlives(1, &capabilities, &seen(Source::Probed)));
        assert!(!known.outlives(0, &capabilities, &seen(Source::Partly)));
        let other = Capabilities {
            receive_maximum: 99,
            ..capabilities
        };
        assert!(!known.outlives(1, &other, &seen(Source::Partly)));
    }
}
