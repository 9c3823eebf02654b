//! After the core lost a filter, retained messages may have changed unseen: they are fetched again, and
//! what is new goes to those who have the filter. What is no longer there is not told: nobody may have
//! deleted it, the core may have lost it.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::mqtt::Message;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::delivery::fanout::Tally;
use crate::router::retained::Retained;
use crate::router::sessions::shard::Source;
use crate::router::types::Arrived;

/// Topics whose values are remembered at most, all together; past it a value is taken for new.
const KNOWN_MAX: usize = 200_000;

/// What those who have a filter know of its topics, while it is lost and until it is fetched again.
#[derive(Debug, Default)]
pub(in crate::router) struct Missed {
    filters: HashMap<FilterId, Known, RandomState>,
    /// Topics of all of them.
    topics: usize,
    /// At the last look nothing was lost: how often links had been lost until then.
    settled: Option<u64>,
    digests: RandomState,
}

/// By a topic's digest the digest of what it said last.
type Known = HashMap<u64, u64, RandomState>;

impl Missed {
    /// The link of a filter is away; its cache had these.
    pub fn begin<'a>(&mut self, number: FilterId, messages: impl Iterator<Item = &'a Message>) {
        let known = self.filters.entry(number).or_default();
        for message in messages {
            if self.topics >= KNOWN_MAX {
                return;
            }
            let topic = self.digests.hash_one(message.topic());
            let says = self.digests.hash_one(message.payload());
            self.topics += usize::from(known.insert(topic, says).is_none());
        }
    }

    /// Nothing was missed, or all that was is told.
    pub fn end(&mut self, number: FilterId) {
        if let Some(known) = self.filters.remove(&number) {
            self.topics -= known.len();
        }
    }

    /// Nobody waits for what was missed any more.
    pub fn clear(&mut self) {
        self.filters.clear();
        self.topics = 0;
    }

    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// A message came for filters that have it now.
    pub fn learn(&mut self, message: &Message, filters: &[FilterId]) {
        if self.filters.is_empty() {
            return;
        }
        for &number in filters {
            self.is_new(number, message);
        }
    }

    /// Whether those who have a filter do not know this yet; from now on they do.
    pub fn is_new(&mut self, number: FilterId, message: &Message) -> bool {
        let Some(known) = self.filters.get_mut(&number) else {
            return true;
        };
        let topic = self.digests.hash_one(message.topic());
        let says = self.digests.hash_one(message.payload());
        match known.get_mut(&topic) {
            Some(known) => std::mem::replace(known, says) != says,
            None => {
                if self.topics < KNOWN_MAX {
                    known.insert(topic, says);
                    self.topics += 1;
                }
                true
            }
        }
    }
}

impl Router {
    /// The link of these filters is away: what their caches know is what was told until now.
    pub(in crate::router) fn retained_missed(&self, numbers: &[FilterId]) {
        if self.config.retained_resync && self.retain_available() {
            let mut retained = self.retained.lock();
            numbers.iter().for_each(|n| retained.miss(*n));
        }
    }

    /// The core lost these filters: what they bring from now on is known, and nothing else but what
    /// their caches had.
    pub(in crate::router) fn retained_lost(&self, numbers: &[FilterId]) {
        if self.config.retained_resync && self.retain_available() {
            let mut retained = self.retained.lock();
            for number in numbers {
                retained.missed.begin(*number, [].iter());
            }
        }
    }

    /// Filters that were lost and not regained, nobody resyncs.
    pub(in crate::router) fn forget_missed(&self) {
        if self.retained.lock().missed.is_empty() {
            return;
        }
        let settled = self.data_settled().then(|| self.data_losses());
        let mut retained = self.retained.lock();
        // Twice in a row, without a loss in between: a filter that is regained just now is about to
        // be fetched.
        let still = settled.is_some() && settled == retained.missed.settled;
        retained.missed.settled = settled;
        if still && !retained.resyncs() {
            retained.missed.clear();
        }
    }

    /// The core kept these filters: nothing was missed.
    pub(in crate::router) fn nothing_missed(&self, numbers: &[FilterId]) {
        let mut retained = self.retained.lock();
        numbers.iter().for_each(|n| retained.missed.end(*n));
    }

    /// The core has a filter again that it had lost: it is fetched for all who have it.
    pub(in crate::router) fn resync_retained(&self, number: FilterId) {
        let (read, root) = {
            let table = self.table.read();
            // A group gets none, and whoever fetched for it would be a member of it.
            let read = |n: FilterId| {
                table
                    .get(n)
                    .is_some_and(|f| f.mask() != 0 && !f.is_shared())
            };
            let root = table.get(number).is_some_and(|f| f.is_root());
            (read(number) || table.below(number).any(read), root)
        };
        if read && self.config.retained_resync && self.retain_available() {
            self.retained.lock().resync(number, root);
            self.fetch.raise();
        } else {
            self.resynced(&mut self.retained.lock(), number);
        }
    }

    /// All that was missed by a filter, and by those below it, is told.
    pub(in crate::router) fn resynced(&self, retained: &mut Retained, number: FilterId) {
        retained.missed.end(number);
        let table = self.table.read();
        table.below(number).for_each(|n| retained.missed.end(n));
    }

    /// Gives what was fetched anew to all who have the filter and do not know it, as if it had come
    /// just now. Called with the cache locked: nothing newer is passed by.
    pub(in crate::router) fn hand_missed(
        &self,
        retained: &mut Retained,
        number: FilterId,
        messages: &[Message],
        now: Millis,
    ) {
        let mut tally = Tally::default();
        for message in messages {
            let mut filters: SmallVec<[(FilterId, u64); 4]> = SmallVec::new();
            {
                let table = self.table.read();
                let mut with_mask = |n: FilterId| {
                    filters.extend(table.get(n).map(|f| (n, f.mask())));
                };
                with_mask(number);
                table.match_root(number, message.topic(), with_mask);
            }
            for (filter, mut mask) in filters {
                if !retained.missed.is_new(filter, message)
                    // What is newer comes by this filter too.
                    || retained.is_ahead(filter, message, now)
                {
                    continue;
                }
                while mask != 0 {
                    let index = mask.trailing_zeros() as usize;
                    mask &= mask - 1;
                    let mut shard = self.shards[index].lock();
                    shard.fan_out(
                        &self.limits,
                        now,
                        message,
                        filter,
                        Source::Fetched,
                        &mut tally,
                    );
                    let ended = std::mem::take(&mut tally.ended);
                    for (slot, _) in ended {
                        self.end_full_session(&mut shard, slot, now);
                    }
                    self.charge_entries(&mut shard);
                }
            }
        }
        tally.wake();
        tally.flush();
    }
}

impl Retained {
    /// A live message with RETAIN is known to those who have its filters.
    pub(in crate::router) fn learn(&mut self, arrived: &Arrived) {
        self.missed.learn(&arrived.message, &arrived.filters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties, QoS};

    fn message(topic: &str, payload: &str) -> Message {
        Message::new(&MessageSpec {
            topic,
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        })
    }

    #[test]
    fn what_changed_is_new_once() {
        let mut missed = Missed::default();
        let known = [message("a", "1"), message("b", "1")];
        missed.begin(FilterId(7), known.iter());
        assert!(!missed.is_new(FilterId(7), &message("a", "1")));
        assert!(missed.is_new(FilterId(7), &message("b", "2")));
        assert!(!missed.is_new(FilterId(7), &message("b", "2")));
        assert!(missed.is_new(FilterId(7), &message("c", "1")));
        assert!(
            missed.is_new(FilterId(8), &message("a", "1")),
            "nothing is known"
        );
    }

    #[test]
    fn what_came_live_is_known() {
        let mut missed = Missed::default();
        missed.begin(FilterId(7), [].iter());
        missed.learn(&message("a", "1"), &[FilterId(7), FilterId(9)]);
        assert!(!missed.is_new(FilterId(7), &message("a", "1")));
        assert!(missed.is_new(FilterId(9), &message("a", "1")));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_given_back() {
        let mut missed = Missed::default();
        missed.begin(FilterId(7), [].iter());
        for n in 0..KNOWN_MAX + 10 {
            missed.learn(&message(&n.to_string(), "1"), &[FilterId(7)]);
        }
        assert_eq!(missed.topics, KNOWN_MAX);
        assert!(missed.is_new(FilterId(7), &message(&KNOWN_MAX.to_string(), "1")));
        missed.end(FilterId(7));
        assert_eq!((missed.topics, missed.filters.len()), (0, 0));
    }
}
