//! When each link connected and ended, to compare them.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Links that end within this time of one another end together.
const TOGETHER: Duration = Duration::from_millis(50);

/// A link that connected so shortly before may have ended another.
const JUST: Duration = Duration::from_millis(200);

/// When each link last connected and ended.
#[derive(Debug, Default)]
pub(super) struct LinkTimes(Mutex<HashMap<String, Times>>);

#[derive(Clone, Copy, Debug)]
struct Times {
    connected_at: Instant,
    /// `None`: it is connected.
    ended_at: Option<Instant>,
}

/// The other links at the time when one ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Others {
    /// Links that were connected and stayed so.
    pub stayed: usize,
    /// The part of these links that had just connected.
    pub new: usize,
}

impl LinkTimes {
    /// A link has connected.
    pub(super) fn connected(&self, link: &str) {
        let times = Times {
            connected_at: Instant::now(),
            ended_at: None,
        };
        self.0.lock().insert(link.to_owned(), times);
    }

    /// A link's connection has ended.
    pub(super) fn ended(&self, link: &str) {
        if let Some(times) = self.0.lock().get_mut(link) {
            times.ended_at = Some(Instant::now());
        }
    }

    /// The other links when `link` ended.
    pub(super) fn others_at(&self, link: &str, ended_at: Instant) -> Others {
        let mut others = Others::default();
        let links = self.0.lock();
        for (_, times) in links.iter().filter(|(name, _)| *name != link) {
            let there = times.connected_at < ended_at + TOGETHER;
            if there && times.ended_at.is_none_or(|at| at > ended_at + TOGETHER) {
                others.stayed += 1;
                others.new += usize::from(times.connected_at + JUST > ended_at);
            }
        }
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn links_are_compared_at_the_time_of_an_end() {
        let times = LinkTimes::default();
        times.connected("d0");
        times.connected("p0");
        tokio::time::advance(SOON).await;
        times.connected("r0");
        let ended_at = Instant::now();
        times.ended("d0");
        assert_eq!(
            times.others_at("d0", ended_at),
            Others { stayed: 2, new: 1 }
        );
        times.ended("p0");
        assert_eq!(
            times.others_at("d0", ended_at),
            Others { stayed: 1, new: 1 }
        );
        tokio::time::advance(SOON).await;
        times.ended("r0");
        assert_eq!(
            times.others_at("d0", ended_at),
            Others { stayed: 1, new: 1 }
        );
    }
}
