//! A broker's profile as lines for a person.

use std::fmt;

use crate::upstream::profile::{BrokerProfile, WINDOW_PROBED};

const NOT_SEEN: &str = "not seen";

fn yes_or_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn seen(value: Option<bool>) -> &'static str {
    value.map_or(NOT_SEEN, yes_or_no)
}

impl fmt::Display for BrokerProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (capabilities, quirks) = (&self.capabilities, &self.quirks);
        let mut line = |name: &str, value: &str| writeln!(f, "{name:<24} {value}");
        line("software", self.software.as_deref().unwrap_or("not said"))?;
        line("protocol", capabilities.version.name())?;
        line("identifiers", quirks.identifiers.name())?;
        line("mapping", self.mapping().name())?;
        line(
            "copies on overlap",
            quirks.copies.map_or(NOT_SEEN, |copies| copies.name()),
        )?;
        line(
            "QoS on overlap",
            quirks.overlap_qos.map_or(NOT_SEEN, |qos| qos.name()),
        )?;
        line("resubscribe replaces", seen(quirks.replaces))?;
        line("retain handling", seen(quirks.retain_handling))?;
        line("retain as published", seen(quirks.retain_as_published))?;
        line("retained for wildcards", seen(quirks.retained_wildcard))?;
        line("retained end marker", seen(quirks.retained_marker))?;
        match quirks.retained_within {
            Some(ms) => line("retained came within", &format!("{ms} ms"))?,
            None => line("retained came within", NOT_SEEN)?,
        }
        line("shared subscriptions", quirks.shared.name())?;
        line("user properties", seen(quirks.properties))?;
        line("packets sent at once", seen(quirks.nodelay))?;
        match quirks.window {
            Some(w) if w >= WINDOW_PROBED => line("send window", &format!("{w} or more"))?,
            Some(w) => line("send window", &w.to_string())?,
            None => line("send window", NOT_SEEN)?,
        }
        line("receive maximum", &capabilities.receive_maximum.to_string())?;
        let maximum_qos = capabilities.maximum_qos as u8;
        line("maximum QoS", &maximum_qos.to_string())?;
        match capabilities.maximum_packet_size {
            Some(size) => line("maximum packet", &format!("{size} bytes"))?,
            None => line("maximum packet", "not limited")?,
        }
        line(
            "retained messages",
            yes_or_no(capabilities.retain_available),
        )?;
        for missing in &self.missing {
            line("missing", missing)?;
        }
        Ok(())
    }
}
