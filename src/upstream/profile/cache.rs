//! Profiles that were found out: one holds for all links until CONNACK changes or it is too old.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::telemetry::metrics;

use crate::upstream::profile::{BrokerProfile, Capabilities, Source};

/// How long a profile is good for while CONNACK announces the same capabilities.
const GOOD_FOR: Duration = Duration::from_secs(3600);

/// The profile that was found out last.
#[derive(Debug, Default)]
pub(in crate::upstream) struct ProfileCache {
    state: Mutex<State>,
    /// The profile of the entry, for readers that must not wait for a probe.
    current: Arc<Mutex<Option<Arc<BrokerProfile>>>>,
}

#[derive(Debug, Default)]
struct State {
    entry: Option<CachedProfile>,
    /// The probe that runs.
    probe: Option<Probe>,
}

/// A probe that runs. Links that want the same profile wait for it; others do not.
#[derive(Debug)]
struct Probe {
    server: usize,
    capabilities: Capabilities,
    found: Arc<OnceCell<Arc<BrokerProfile>>>,
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
    /// `capabilities`. `find` makes it if no cached profile fits. Calls for the same profile wait for one
    /// another, unless an older profile of it is known.
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
        let probe = {
            let mut state = self.state.lock();
            let running = (state.probe.as_ref())
                .filter(|probe| probe.server == server && probe.capabilities == *capabilities)
                .map(|probe| probe.found.clone());
            if let Some(cached) = &state.entry
                && cached.fits(server, capabilities)
                && (cached.found_at.elapsed() < GOOD_FOR || running.is_some())
            {
                return Ok(cached.profile.clone());
            }
            running.unwrap_or_else(|| {
                let found = Arc::new(OnceCell::new());
                state.probe = Some(Probe {
                    server,
                    capabilities: *capabilities,
                    found: found.clone(),
                });
                found
            })
        };
        // If the link that probes is dropped or fails, another takes its place.
        let finding = probe.get_or_try_init(|| async {
            let found = find().await?;
            Ok(self.keep(server, found, &probe))
        });
        finding.await.cloned()
    }

    /// Keeps a profile that was found out by `probe`. Returns the profile to use.
    fn keep(
        &self,
        server: usize,
        found: BrokerProfile,
        probe: &Arc<OnceCell<Arc<BrokerProfile>>>,
    ) -> Arc<BrokerProfile> {
        let mut state = self.state.lock();
        if (state.probe.as_ref()).is_some_and(|running| Arc::ptr_eq(&running.found, probe)) {
            state.probe = None;
        }
        // Filters were placed by the cached profile. A probe that was cut short says nothing new
        // of the broker, which may have been slow; the next link that connects probes again.
        if let Some(cached) = &state.entry
            && cached.outlives(server, &found)
        {
            return cached.profile.clone();
        }
        let profile = Arc::new(found);
        show(&profile);
        *self.current.lock() = Some(profile.clone());
        state.entry = Some(CachedProfile {
            server,
            found_at: Instant::now(),
            profile: profile.clone(),
        });
        profile
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

    /// A probe takes six seconds.
    async fn slow(cache: Arc<ProfileCache>) -> Source {
        let find = || async {
            tokio::time::sleep(Duration::from_secs(6)).await;
            Ok::<_, ()>(BrokerProfile::unseen(&CAPABILITIES, Source::Probed))
        };
        let found = cache.get_or_find(0, &CAPABILITIES, find).await;
        found.expect("it is found").source
    }

    #[tokio::test(start_paused = true)]
    #[expect(clippy::disallowed_methods, reason = "they end with the test")]
    async fn links_wait_for_a_probe_only_if_nothing_is_known() {
        let cache = Arc::new(ProfileCache::default());
        let begun = Instant::now();
        let probing = tokio::spawn(slow(cache.clone()));
        let waiting = tokio::spawn(slow(cache.clone()));
        tokio::time::sleep(Duration::from_millis(1)).await;
        // Links to another server do not wait.
        let other = ask(&cache, 1, &CAPABILITIES, Source::Partly).await;
        assert_eq!(other, Source::Partly);
        assert!(begun.elapsed() < Duration::from_secs(1));
        // The link that probes is dropped: the other probes.
        probing.abort();
        assert_eq!(waiting.await.expect("it ends"), Source::Probed);
        assert!(begun.elapsed() < Duration::from_secs(13));
        tokio::time::advance(GOOD_FOR).await;
        let begun = Instant::now();
        let again = tokio::spawn(slow(cache.clone()));
        tokio::time::sleep(Duration::from_millis(1)).await;
        let known = ask(&cache, 0, &CAPABILITIES, Source::Connack).await;
        assert_eq!(known, Source::Probed, "the old profile");
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert_eq!(again.await.expect("it ends"), Source::Probed);
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
