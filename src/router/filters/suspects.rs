//! Filters that the broker may have ended a link for, and the clients of those for which it has.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::router::types::SessionRef;
use crate::time::Millis;
use crate::topics::FilterId;

/// The first quarantine of a filter; each further one takes twice as long.
const QUARANTINE_MIN: Duration = Duration::from_secs(60);
/// The longest quarantine.
const QUARANTINE_MAX: Duration = Duration::from_secs(600);
/// The first pause of a client whose filter was quarantined; each further one takes twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a client is remembered after the last quarantine of a filter of it.
const CLIENT_REMEMBERED: Duration = Duration::from_secs(60);
/// Filters in quarantine, and clients, that are remembered.
const REMEMBERED_MAX: usize = 1024;

/// How often something was found, and when its latest wait ends.
#[derive(Clone, Copy, Debug)]
struct Offence {
    times: u32,
    until: Millis,
    forget_at: Millis,
}

/// The suspects of all links.
#[derive(Debug)]
pub(super) struct Suspects {
    /// For each link, the suspects to SUBSCRIBE.
    queue: Vec<VecDeque<FilterId>>,
    /// Filters in quarantine, by name.
    quarantined: BTreeMap<Arc<str>, Offence>,
    /// Clients whose filters were quarantined.
    clients: BTreeMap<SessionRef, Offence>,
}

impl Suspects {
    pub(super) fn new(links: usize) -> Self {
        Self {
            queue: vec![VecDeque::new(); links],
            quarantined: BTreeMap::default(),
            clients: BTreeMap::default(),
        }
    }

    /// A suspect is to be subscribed.
    pub(super) fn push(&mut self, link: usize, filter: FilterId) {
        self.queue[link].push_back(filter);
    }

    /// The suspect whose turn it is.
    pub(super) fn pop(&mut self, link: usize) -> Option<FilterId> {
        self.queue[link].pop_front()
    }

    /// A suspect that was taken has its turn later.
    pub(super) fn put_back(&mut self, link: usize, filter: FilterId) {
        self.queue[link].push_front(filter);
    }

    /// Suspects that are to be subscribed on a link.
    pub(super) fn len(&self, link: usize) -> usize {
        self.queue[link].len()
    }

    /// Whether a filter was in quarantine not long ago.
    pub(super) fn is_known(&self, name: &str) -> bool {
        self.quarantined.contains_key(name)
    }

    /// The link's requests begin again.
    pub(super) fn clear(&mut self, link: usize) {
        self.queue[link].clear();
    }

    /// Whether the broker is not to be asked for a filter now.
    pub(super) fn is_quarantined(&self, name: &str, now: Millis) -> bool {
        let quarantined = self.quarantined.get(name);
        quarantined.is_some_and(|offence| now < offence.until)
    }

    /// Whether the broker is not to be asked for new filters of a client now. `None`: it may be asked
    /// as for any client.
    pub(super) fn pauses(&self, client: SessionRef, now: Millis) -> Option<bool> {
        let offence = self.clients.get(&client)?;
        (now < offence.forget_at).then_some(now < offence.until)
    }

    pub(super) fn quarantine(&mut self, name: &Arc<str>, clients: &[SessionRef], now: Millis) {
        let until =
            |times: u32, min: Duration, max: Duration| now + (min * (1 << times.min(20))).min(max);
        forget(&mut self.quarantined, now);
        let times = self.quarantined.get(name).map_or(0, |o| o.times);
        let end = until(times, QUARANTINE_MIN, QUARANTINE_MAX);
        let offence = Offence {
            times: times + 1,
            until: end,
            forget_at: end + QUARANTINE_MAX,
        };
        self.quarantined.insert(name.clone(), offence);
        for client in clients {
            forget(&mut self.clients, now);
            let times = self.clients.get(client).map_or(0, |o| o.times);
            let offence = Offence {
                times: times + 1,
                until: until(times, PAUSE_MIN, PAUSE_MAX),
                forget_at: now + CLIENT_REMEMBERED,
            };
            self.clients.insert(*client, offence);
        }
    }
}

/// Makes room for another offence.
fn forget<K: Clone + Ord>(offences: &mut BTreeMap<K, Offence>, now: Millis) {
    offences.retain(|_, offence| now < offence.forget_at);
    if offences.len() >= REMEMBERED_MAX {
        let oldest = offences.iter().min_by_key(|(_, o)| o.forget_at);
        if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
            offences.remove(&oldest);
        }
    }
}
