//! The collector of problems, with the checks that many keys share.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use crate::config::document::Document;
use crate::config::error::Problem;

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
/// The keep alives that MQTT can carry, except 0.
pub(super) const KEEPALIVE: RangeInclusive<Duration> = SECOND..=Duration::from_secs(65535);

pub(super) struct Checker<'a, 'd> {
    pub(super) doc: &'a Document<'d>,
    pub(super) problems: &'a mut Vec<Problem>,
}

impl Checker<'_, '_> {
    pub(super) fn say(&mut self, key: &str, message: impl Into<String>) {
        self.problems.push(Problem {
            line: self.doc.line(key),
            key: Some(key.to_owned()),
            message: message.into(),
        });
    }

    pub(super) fn range<T: PartialOrd + Display>(
        &mut self,
        key: &str,
        value: T,
        range: RangeInclusive<T>,
    ) {
        if !range.contains(&value) {
            let (least, most) = (range.start(), range.end());
            self.say(
                key,
                format!("{value} is out of range; allowed: {least} to {most}"),
            );
        }
    }

    pub(super) fn range_time(
        &mut self,
        key: &str,
        value: Duration,
        range: RangeInclusive<Duration>,
    ) {
        if !range.contains(&value) {
            let text = humantime::format_duration;
            let (least, most) = (text(*range.start()), text(*range.end()));
            let value = text(value);
            self.say(
                key,
                format!("{value} is out of range; allowed: {least} to {most}"),
            );
        }
    }

    pub(super) fn whole_seconds(&mut self, key: &str, value: Duration) {
        if value.subsec_nanos() != 0 {
            self.say(key, "MQTT counts it in seconds; write whole seconds");
        }
    }

    /// Reads a byte, so that a directory and a missing right are found too.
    pub(super) fn readable(&mut self, key: &str, path: &Path) {
        let read =
            std::fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut [0]));
        if let Err(error) = read {
            self.say(key, format!("{} cannot be read: {error}", path.display()));
        }
    }

    pub(super) fn name(&mut self, key: &str, name: &str) {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
            self.say(
                key,
                format!("{name:?} is no name; allowed: 1 to 64 of A-Z a-z 0-9 - _ ."),
            );
        }
    }
}
