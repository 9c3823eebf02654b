//! `tidegate probe`: one look at the core, as text for a person.

use std::fmt::Write as _;

use crate::config::Config;
use crate::upstream::{Reach, probe_once};

use crate::runtime::{StartError, client_tls, embedded, upstream_packet_max};

/// Probes the first server of a configuration.
///
/// # Errors
/// [`StartError`]: TLS settings, or a core that cannot be reached.
pub async fn probe(config: &Config) -> Result<String, StartError> {
    let reach = Reach {
        config: config.upstream.clone(),
        node: config.node.id.clone(),
        packet_max: upstream_packet_max(config),
        tls: client_tls(config)?,
        embedded: embedded(config),
    };
    let profile = probe_once(reach).await.map_err(StartError::Temporary)?;
    let mut text = profile.to_string();
    let advice = profile.advice();
    if !advice.is_empty() {
        text.push_str("\nWorth a look in the core's settings:\n");
    }
    for line in advice {
        // Writing to a String does not fail.
        let _ = writeln!(text, "- {line}");
    }
    Ok(text)
}
