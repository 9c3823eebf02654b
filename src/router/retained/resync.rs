//! After the broker lost a filter, retained messages may have changed unseen: they are fetched again, and
//! new values go to all subscribers of the filter. A value that is no longer there is not reported:
//! perhaps no client deleted it, and the broker lost it.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::mqtt::Message;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::retained::cache::Cache;
use crate::router::retained::{RetainedMessages, Sources};
use crate::router::sessions::Sessions;
use crate::router::sessions::fan_out::Source;
use crate::router::sessions::tally::Tally;
use crate::router::types::Arrived;

/// Topics whose values are remembered, of all filters together. Past it a value is taken for new.
const KNOWN_MAX: usize = 200_000;

/// The values that the subscribers of a lost filter know, until the filter is fetched again.
#[derive(Debug, Default)]
pub(super) struct Missed {
    filters: HashMap<FilterId, Known, RandomState>,
    /// Topics of all of them.
    topics: usize,
    /// How often links had been lost at the last look, if no filter was lost then.
    settled: Option<u64>,
    /// Hashes topics and payloads.
    hasher: RandomState,
}

/// The hash of each topic's last payload, by the hash of the topic.
type Known = HashMap<u64, u64, RandomState>;

impl Missed {
    /// The link of a filter is away; its cache had these messages.
    pub fn begin<'a>(&mut self, number: FilterId, messages: impl Iterator<Item = &'a Message>) {
        let known = self.filters.entry(number).or_default();
        for message in messages {
            if self.topics >= KNOWN_MAX {
                return;
            }
            let topic = self.hasher.hash_one(message.topic());
            let payload = self.hasher.hash_one(message.payload());
            self.topics += usize::from(known.insert(topic, payload).is_none());
        }
    }

    /// Nothing was missed, or the subscribers have got every new value.
    pub fn end(&mut self, number: FilterId) {
        if let Some(known) = self.filters.remove(&number) {
            self.topics -= known.len();
        }
    }

    /// No filter waits for its missed values any more.
    pub fn clear(&mut self) {
        self.filters.clear();
        self.topics = 0;
    }

    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// A message came for the subscribers of these filters.
    pub fn learn(&mut self, message: &Message, filters: &[FilterId]) {
        if self.filters.is_empty() {
            return;
        }
        for &number in filters {
            self.is_new(number, message);
        }
    }

    /// Whether the subscribers of a filter do not know a value yet. From now on they do.
    pub fn is_new(&mut self, number: FilterId, message: &Message) -> bool {
        let Some(known) = self.filters.get_mut(&number) else {
            return true;
        };
        let topic = self.hasher.hash_one(message.topic());
        let payload = self.hasher.hash_one(message.payload());
        match known.get_mut(&topic) {
            Some(known) => std::mem::replace(known, payload) != payload,
            None => {
                if self.topics < KNOWN_MAX {
                    known.insert(topic, payload);
                    self.topics += 1;
                }
                true
            }
        }
    }
}

impl RetainedMessages {
    /// The link of these filters is away: their subscribers know the values in the caches.
    pub fn link_lost(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        filters.iter().for_each(|filter| cache.miss(*filter));
    }

    /// The broker lost these filters: their subscribers know the values in the caches, and from now on
    /// those that the filters bring.
    pub fn filters_lost(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        for filter in filters {
            cache.missed.begin(*filter, [].iter());
        }
    }

    /// The broker kept these filters: nothing was missed.
    pub fn nothing_missed(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        filters.iter().for_each(|filter| cache.missed.end(*filter));
    }

    /// Forgets the values of filters that were lost and are not regained, for which there is no resync.
    /// `settled` returns how often links were lost, if no filter is lost now.
    pub fn forget_missed(&self, settled: impl FnOnce() -> Option<u64>) {
        if self.cache.lock().missed.is_empty() {
            return;
        }
        let settled = settled();
        let mut cache = self.cache.lock();
        // Twice in a row, without a loss in between: a filter that is regained just now is about to
        // be fetched.
        let still = settled.is_some() && settled == cache.missed.settled;
        cache.missed.settled = settled;
        if still && !cache.resyncs() {
            cache.missed.clear();
        }
    }

    /// The broker has a filter again that it had lost: it is fetched for all its subscribers.
    pub fn resync(&self, filter: FilterId, is_root: bool) {
        self.cache.lock().resync(filter, is_root);
        self.waker.raise();
    }

    /// The broker has a filter again that it had lost, and nobody is to get the values missed.
    pub fn skip_resync(&self, sources: &impl Sources, filter: FilterId) {
        self.cache.lock().resynced(sources, filter);
    }
}

/// Gives messages that were fetched anew to all subscribers of the filter that do not know them, like
/// live messages. Called with the cache locked, so that no newer message is overtaken.
pub(super) fn hand_missed(
    sessions: &Sessions,
    sources: &impl Sources,
    cache: &mut Cache,
    filter: FilterId,
    messages: &[Message],
    now: Millis,
) {
    let mut tally = Tally::default();
    for message in messages {
        let mut filters: SmallVec<[(FilterId, u64); 4]> = SmallVec::new();
        sources.receivers(filter, message.topic(), &mut |f, mask| {
            filters.push((f, mask))
        });
        for (filter, mask) in filters {
            if !cache.missed.is_new(filter, message)
                // A newer message comes by this filter too.
                || cache.is_ahead(filter, message, now)
            {
                continue;
            }
            sessions.deliver_to_shards(mask, message, filter, Source::Fetched, now, &mut tally);
        }
    }
    tally.wake();
    tally.flush();
}

impl Cache {
    /// The subscribers of a filter, and of those below it, have got every new value.
    pub(super) fn resynced(&mut self, sources: &impl Sources, filter: FilterId) {
        self.missed.end(filter);
        sources.below(filter, &mut |below| self.missed.end(below));
    }

    /// The subscribers of the message's filters know it.
    pub(super) fn learn(&mut self, arrived: &Arrived) {
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
    fn a_changed_value_is_new_once() {
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
    fn a_live_value_is_known() {
        let mut missed = Missed::default();
        missed.begin(FilterId(7), [].iter());
        missed.learn(&message("a", "1"), &[FilterId(7), FilterId(9)]);
        assert!(!missed.is_new(FilterId(7), &message("a", "1")));
        assert!(missed.is_new(FilterId(9), &message("a", "1")));
    }

    #[test]
    fn remembered_values_are_bounded_and_given_back() {
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
