//! Profiles that were found out: one holds for all links until CONNACK changes or it is too old.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::telemetry::metrics;

use crate::upstream::profile::{BrokerProfile, Capabilities, Source};

/// How long a profile is good for while CONNACK announces the same capabilities.
const GOOD_FOR: Duration = Duration::from_secs(3600);

/// The profile that was found out last.
#[derive(Debug, Default)]
pub(in crate::upstream) struct ProfileCache {
    /// Locked while the broker is probed, so that the other links wait for the result.
    entry: tokio::sync::Mutex<Option<CachedProfile>>,
    /// The profile of the entry, for readers that must not wait for a probe.
    current: Arc<Mutex<Option<Arc<BrokerProfile>>>>,
}

/// A profile with the conditions that it was found out under.
#[derive(Debug)]
struct CachedProfile {
    server: usize,
    found_at: Instant,
    profile: Arc<BrokerProfile>,
}

impl CachedProfile {
    fn fits(&self, server: usize, capabilities: &Capabilities) -> bool {
        self.server == server && self.profile.capabilities == *capabilities
    }

    /// Whether the cached profile says more of the same broker than a probe that was cut short.
    fn outlives(&self, server: usize, found: &BrokerProfile) -> bool {
        found.source == Source::Partly && self.fits(server, &found.capabilities)
    }
}

impl ProfileCache {
    /// The profile of the broker at `server` (an index into `upstream.servers`) that announced
    /// `capabilities`. `find` makes it if no cached profile fits. Calls wait for one another.
    ///
    /// # Errors
    /// The error of `find`; the cached profile stays.
    pub(crate) async fn get_or_find<F, E>(
        &self,
        server: usize,
        capabilities: &Capabilities,
        find: impl FnOnce() -> F,
    ) -> Result<Arc<BrokerProfile>, E>
    where
        F: Future<Output = Result<BrokerProfile, E>>,
    {
        let mut entry = self.entry.lock().await;
        if let Some(cached) = &*entry
            && cached.fits(server, capabilities)
            && cached.found_at.elapsed() < GOOD_FOR
        {
            return Ok(cached.profile.clone());
        }
        let found = find().await?;
        // Filters were placed by the cached profile. A probe that was cut short says nothing new
        // of the broker, which may have been slow; the next link that connects probes again.
        if let Some(cached) = &*entry
            && cached.outlives(server, &found)
        {
            return Ok(cached.profile.clone());
        }
        let profile = Arc::new(found);
        show(&profile);
        *self.current.lock() = Some(profile.clone());
        *entry = Some(CachedProfile {
            server,
            found_at: Instant::now(),
            profile: profile.clone(),
        });
        Ok(profile)
    }

    /// The present profile, for readers that must not wait; `None` before the first link connected.
    pub(crate) fn current(&self) -> Arc<Mutex<Option<Arc<BrokerProfile>>>> {
        self.current.clone()
    }
}

/// Sets the labels of `tidegate_broker_info`.
fn show(profile: &BrokerProfile) {
    let yes_or_no = |value: bool| if value { "yes" } else { "no" };
    metrics().broker_info([
        ("protocol", profile.capabilities.version.name()),
        ("source", profile.source.name()),
        ("mapping", profile.mapping().name()),
        ("identifiers", profile.quirks.identifiers.name()),
        ("retain_as_published", yes_or_no(profile.keeps_retain())),
        ("shared", profile.quirks.shared.name()),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{QoS, Version};

    const CAPABILITIES: Capabilities = Capabilities {
        version: Version::V5,
        identifiers: true,
        shared: true,
        receive_maximum: 100,
        maximum_qos: QoS::ExactlyOnce,
        maximum_packet_size: None,
        retain_available: true,
    };

    /// The source of the profile that the cache gives if a probe ends as `found`.
    async fn ask(
        cache: &ProfileCache,
        server: usize,
        capabilities: &Capabilities,
        found: Source,
    ) -> Source {
        let find = || async { Ok::<_, ()>(BrokerProfile::unseen(capabilities, found)) };
        let profile = cache.get_or_find(server, capabilities, find).await;
        profile.expect("the probe does not fail").source
    }

    #[tokio::test(start_paused = true)]
    async fn a_profile_holds_for_an_hour() {
        let cache = ProfileCache::default();
        assert!(cache.current().lock().is_none());
        assert_eq!(
            ask(&cache, 0, &CAPABILITIES, Source::Probed).await,
            Source::Probed
        );
        assert_eq!(
            ask(&cache, 0, &CAPABILITIES, Source::Connack).await,
            Source::Probed
        );
        tokio::time::advance(GOOD_FOR).await;
        assert_eq!(
            ask(&cache, 0, &CAPABILITIES, Source::Connack).await,
            Source::Connack
        );
        let current = cache.current().lock().clone();
        assert_eq!(current.map(|profile| profile.source), Some(Source::Connack));
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_cut_short_does_not_replace_the_profile_of_the_same_broker() {
        let cache = ProfileCache::default();
        let other = Capabilities {
            receive_maximum: 99,
            ..CAPABILITIES
        };
        ask(&cache, 1, &CAPABILITIES, Source::Probed).await;
        tokio::time::advance(GOOD_FOR).await;
        assert_eq!(
            ask(&cache, 1, &CAPABILITIES, Source::Partly).await,
            Source::Probed
        );
        assert_eq!(ask(&cache, 1, &other, Source::Partly).await, Source::Partly);
        ask(&cache, 1, &CAPABILITIES, Source::Probed).await;
        assert_eq!(
            ask(&cache, 0, &CAPABILITIES, Source::Partly).await,
            Source::Partly
        );
    }
}
