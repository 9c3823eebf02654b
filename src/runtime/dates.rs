//! Certificates and revocation lists that expire soon or have expired.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::transport::Validity;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Something that expires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dated {
    /// The name of the `[[tls]]`.
    pub tls: String,
    /// `certificate` or `revocation list`.
    pub what: &'static str,
    /// Its file; `None` for a throw-away certificate, which is in memory only.
    pub file: Option<PathBuf>,
    pub validity: Validity,
}

/// How close the expiry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Near {
    Far,
    /// 14 days remain, or a third of the validity where that is less. A certificate that is renewed
    /// in time is never this close.
    Soon,
    /// 3 days remain, or a tenth of the validity where that is less.
    Close,
    Past,
}

impl Dated {
    pub(super) fn near(&self, now: SystemTime) -> Near {
        let Validity { from, until } = self.validity;
        let Ok(remaining) = until.duration_since(now) else {
            return Near::Past;
        };
        let whole = until.duration_since(from).unwrap_or_default();
        if remaining < (3 * DAY).min(whole / 10) {
            Near::Close
        } else if remaining < (14 * DAY).min(whole / 3) {
            Near::Soon
        } else {
            Near::Far
        }
    }

    /// One line for a person, without the date itself.
    pub(super) fn describe(&self, now: SystemTime) -> String {
        let whole_hours = |d: Duration| {
            let hours = Duration::from_secs(d.as_secs() / 3600 * 3600);
            humantime::format_duration(hours).to_string()
        };
        let what = self.what;
        let effect = match what {
            "certificate" => "clients refuse it",
            _ => "every client certificate is refused",
        };
        match self.validity.until.duration_since(now) {
            Ok(remaining) => format!("the {what} expires in {}", whole_hours(remaining)),
            Err(past) => format!(
                "the {what} expired {} ago: {effect}",
                whole_hours(past.duration())
            ),
        }
    }

    /// The file's path, or words in its place.
    pub(super) fn place(&self) -> String {
        match &self.file {
            Some(file) => file.display().to_string(),
            None => "(in memory; a restart makes a new one)".to_owned(),
        }
    }

    pub(super) fn until(&self) -> String {
        humantime::format_rfc3339_seconds(self.validity.until).to_string()
    }
}

/// The warnings that are in the log already, so that each is repeated once a day only.
#[derive(Default)]
pub(super) struct ExpiryLog(HashMap<(String, &'static str), (Near, SystemTime)>);

impl ExpiryLog {
    /// Logs the warnings that are due.
    pub(super) fn report(&mut self, all: &[Dated], now: SystemTime) {
        for dated in all {
            if let Some(near) = self.due(dated, now) {
                let (tls, until) = (&dated.tls, dated.until());
                let (file, text) = (dated.place(), dated.describe(now));
                match near {
                    Near::Past => tracing::error!(tls, file, until, "TLS: {text}"),
                    _ => tracing::warn!(tls, file, until, "TLS: {text}"),
                }
            }
        }
    }

    /// How close the expiry is, if a line about it is due now.
    fn due(&mut self, dated: &Dated, now: SystemTime) -> Option<Near> {
        let key = (dated.tls.clone(), dated.what);
        let near = dated.near(now);
        if near == Near::Far {
            self.0.remove(&key);
            return None;
        }
        let silent = self.0.get(&key).is_some_and(|(before, at)| {
            *before == near && now.duration_since(*at).is_ok_and(|since| since < DAY)
        });
        if silent {
            return None;
        }
        self.0.insert(key, (near, now));
        Some(near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dated(from: SystemTime, whole: Duration) -> Dated {
        Dated {
            tls: "default".to_owned(),
            what: "certificate",
            file: None,
            validity: Validity {
                from,
                until: from + whole,
            },
        }
    }

    #[test]
    fn near_depends_on_the_whole_time() {
        let from = SystemTime::UNIX_EPOCH;
        let hour = DAY / 24;
        for (whole, left, expected) in [
            (365 * DAY, 15 * DAY, Near::Far),
            (365 * DAY, 13 * DAY, Near::Soon),
            (365 * DAY, 2 * DAY, Near::Close),
            (365 * DAY, Duration::ZERO, Near::Close),
            (7 * DAY, 3 * DAY, Near::Far),
            (7 * DAY, 2 * DAY, Near::Soon),
            (7 * DAY, 16 * hour, Near::Close),
            (DAY, 9 * hour, Near::Far),
            (DAY, 7 * hour, Near::Soon),
            (DAY, 2 * hour, Near::Close),
        ] {
            let now = from + whole - left;
            assert_eq!(dated(from, whole).near(now), expected, "{whole:?} {left:?}");
        }
        let past = from + 366 * DAY;
        assert_eq!(dated(from, 365 * DAY).near(past), Near::Past);
    }

    #[test]
    fn it_is_said_once_a_day_and_when_it_gets_closer() {
        let from = SystemTime::UNIX_EPOCH + 1000 * DAY;
        let one = dated(from, 365 * DAY);
        let at = |days: u32| from + days * DAY + DAY / 2;
        let mut said = ExpiryLog::default();
        assert_eq!(said.due(&one, at(300)), None);
        assert_eq!(said.due(&one, at(352)), Some(Near::Soon));
        assert_eq!(said.due(&one, at(352) + DAY / 4), None);
        assert_eq!(said.due(&one, at(353)), Some(Near::Soon));
        assert_eq!(said.due(&one, at(362)), Some(Near::Close));
        assert_eq!(said.due(&one, at(365)), Some(Near::Past));
        let renewed = dated(at(365), 365 * DAY);
        assert_eq!(said.due(&renewed, at(365)), None);
        assert!(said.0.is_empty());
    }

    #[test]
    fn it_is_said_in_words() {
        let from = SystemTime::UNIX_EPOCH;
        let one = dated(from, 365 * DAY);
        let text = one.describe(from + 360 * DAY - Duration::from_secs(61));
        assert_eq!(text, "the certificate expires in 5days");
        let text = one.describe(from + 366 * DAY);
        assert_eq!(text, "the certificate expired 1day ago: clients refuse it");
    }
}
