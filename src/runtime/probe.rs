//! `tidegate probe`: the broker's behaviour, as text for a person.

use std::fmt::Write as _;

use crate::config::Config;
use crate::upstream::probe_once;

use crate::runtime::convert;
use crate::runtime::error::StartError;

/// Probes the first server of a configuration.
///
/// # Errors
/// [`StartError::Config`] for TLS settings, [`StartError::Temporary`] for a broker that cannot be
/// reached.
pub async fn probe(config: &Config) -> Result<String, StartError> {
    let access = convert::broker_access(config)?;
    let profile = probe_once(access).await;
    let profile = profile.map_err(|error| StartError::Temporary(error.to_string()))?;
    let mut text = profile.to_string();
    let advice = profile.advice();
    if !advice.is_empty() {
        text.push_str("\nWorth a look in the broker's settings:\n");
    }
    for line in advice {
        // Writing to a String does not fail.
        let _ = writeln!(text, "- {line}");
    }
    Ok(text)
}
