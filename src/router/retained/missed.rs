//! The values that the subscribers of lost filters know.

use std::hash::BuildHasher;

use crate::hashing::{LookUp, LookUpHasher};
use crate::mqtt::Message;
use crate::topics::FilterId;

/// Topics whose values are remembered, of all filters together. Past it a value is taken for new.
const KNOWN_MAX: usize = 200_000;

/// The values that the subscribers of a lost filter know, until the filter is fetched again.
#[derive(Debug, Default)]
pub(super) struct Missed {
    filters: LookUp<FilterId, Known>,
    /// Topics of all of them.
    topics: usize,
    /// How often links had been lost at the last look, if no filter was lost then.
    pub settled: Option<u64>,
    /// Hashes topics and payloads.
    hasher: LookUpHasher,
}

/// The hash of each topic's last payload, by the hash of the topic.
type Known = LookUp<u64, u64>;

impl Missed {
    /// The link of a filter is away; its cache had these messages.
    pub(super) fn begin<'a>(
        &mut self,
        number: FilterId,
        messages: impl Iterator<Item = &'a Message>,
    ) {
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
    pub(super) fn end(&mut self, number: FilterId) {
        if let Some(known) = self.filters.remove(&number) {
            self.topics -= known.len();
        }
    }

    /// No filter waits for its missed values any more.
    pub(super) fn clear(&mut self) {
        self.filters.clear();
        self.topics = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// A message came for the subscribers of these filters.
    pub(super) fn learn(&mut self, message: &Message, filters: &[FilterId]) {
        if self.filters.is_empty() {
            return;
        }
        for &number in filters {
            self.is_new(number, message);
        }
    }

    /// Whether the subscribers of a filter do not know a value yet. From now on they do.
    pub(super) fn is_new(&mut self, number: FilterId, message: &Message) -> bool {
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
            expires_at: None,
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
