//! The node of a run: its router and links, as they are configured, and the broker's profile.

use super::*;
use crate::time::UnixMillis;

/// The configuration of a node, which each of its processes has.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) config: RouterConfig,
    pub(crate) version: Version,
    pub(crate) output_buffer: usize,
    pub(crate) sleep_after: Duration,
}

impl Setup {
    /// The router of a process that starts at this time of the run.
    pub(crate) fn router(&self, started_at: Millis) -> Arc<Router> {
        let config = RouterConfig {
            started_at: UnixMillis::new(started_at.as_u64()),
            ..self.config.clone()
        };
        router_limited(config, |limits| {
            limits.output_buffer = Arc::new(self.output_buffer.into());
            limits.sleep_after = self.sleep_after;
        })
    }

    /// The links of a process: data links, shared links, publish links, the retained link. `process` is a
    /// number that no other process of the run has.
    pub(crate) fn links(&self, router: &Arc<Router>, process: u64) -> Vec<SimLink> {
        let RouterConfig {
            data_links,
            data_links_max,
            shared_links_max,
            publish_links,
            ..
        } = self.config;
        let mut links: Vec<SimLink> = Vec::new();
        let mut add = |name: String, machine: Box<dyn Machine>| {
            let role = name.as_bytes()[0];
            links.push(SimLink {
                name,
                machine,
                data: matches!(role, b'd' | b's'),
                retained: role == b'r',
                publishes: role == b'p',
                number: None,
                waits: None,
                version: self.version,
                begun: false,
                restored: false,
                announced: false,
                clears: process > 1 && role != b'r',
                unanswered: false,
                redial_at: Millis::ZERO,
                conn: None,
            });
        };
        let all = data_links_max + shared_links_max;
        for n in 0..all {
            let machine = DataLink::new(router.clone(), n, process, PROBES.into(), &Memory);
            let name = if n < data_links_max {
                format!("d{n}")
            } else {
                format!("s{}", n - data_links_max)
            };
            add(name, Box::new(machine));
        }
        for n in 0..publish_links {
            let machine = PublishLink::new(router.clone(), n, process);
            add(format!("p{n}"), Box::new(machine));
        }
        let machine = RetainedLink::new(router.clone(), PROBES.into());
        add("r0".into(), Box::new(machine));
        for (n, link) in links.iter_mut().enumerate().take(all) {
            link.number = Some(n);
            if let Some(restored) = router.restored_link(n) {
                (link.begun, link.restored) = (true, true);
                link.unanswered = restored.in_doubt;
            }
        }
        let later = (data_links..data_links_max).chain(data_links_max + 1..all);
        for n in later {
            links[n].waits = Some(n);
        }
        links
    }
}

/// The profile that a probe finds of a broker with these quirks.
pub(crate) fn profile_of(version: Version, quirks: &[Quirk]) -> BrokerProfile {
    let v5 = version == Version::V5;
    let has = |quirk: Quirk| quirks.contains(&quirk);
    let capabilities = Capabilities::of(
        version,
        &Connack {
            subscription_ids_available: has(Quirk::NoIds).then_some(false),
            ..Connack::default()
        },
    );
    let mut profile = BrokerProfile::unseen(&capabilities, Source::Probed);
    let seen = &mut profile.quirks;
    if seen.identifiers == Identifiers::Assumed {
        seen.identifiers = Identifiers::Working;
    }
    seen.replaces = Some(!has(Quirk::TwoQueues));
    seen.retain_handling = Some(v5);
    seen.retain_as_published = Some(v5 && !has(Quirk::NoRap));
    seen.retained_within = Some(if has(Quirk::LateRetained) { 300 } else { 10 });
    seen.shared = match has(Quirk::DeadShared) {
        true => SharedSubscriptions::Dead,
        false => SharedSubscriptions::Alive,
    };
    seen.properties = Some(v5);
    // Over 3.1.1, retained messages are fetched as from a broker whose window was not seen.
    seen.window = match has(Quirk::SmallWindow) {
        true => Some(10),
        false => v5.then_some(WINDOW_PROBED),
    };
    profile
}
