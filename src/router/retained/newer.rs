//! Notes which filters brought a newer value of a topic than the cached ones of others, and looks it up.

use std::hash::BuildHasher;

use smallvec::SmallVec;

use crate::mqtt::Message;
use crate::router::retained::cache::{Cache, State};
use crate::router::types::Arrived;
use crate::time::Millis;
use crate::topics::FilterId;

impl Cache {
    /// Notes that a live message is ahead of the filters that did not bring it, and not of the others.
    pub(super) fn note_ahead(&mut self, arrived: &Arrived, now: Millis) {
        if self.known.is_empty() {
            return;
        }
        let name = arrived.message.topic();
        let topic = self.hasher.hash_one(name);
        let mut by: SmallVec<[FilterId; 2]> = arrived.filters.clone();
        by.sort_unstable();
        let is_other = |filter: FilterId| by.binary_search(&filter).is_err();
        // Of many filters on a topic, each is known by the copy before the next one's: the index is not
        // searched for each.
        let last = self.ahead.topics.get(&topic);
        let others = last.is_some_and(|last| {
            let mut last = last.by.iter();
            last.any(|filter| is_other(*filter) && self.is_known(*filter))
        }) || self.known.overlaps_any(name, is_other);
        self.ahead.forget(topic);
        if !others {
            return;
        }
        if !self.ahead.has_room(by.len(), now) {
            return self.forget_others(name, &by);
        }
        let payload = self.hasher.hash_one(arrived.message.payload());
        self.ahead.note(topic, payload, by, now);
    }

    /// Too many topics are noted for another one: filters that match it and did not bring the message are
    /// fetched again when asked for.
    fn forget_others(&mut self, topic: &str, by: &[FilterId]) {
        let mut matching: SmallVec<[FilterId; 8]> = SmallVec::new();
        self.known.for_each_match(topic, |n| matching.push(n));
        for number in matching {
            if by.binary_search(&number).is_ok() {
                continue;
            }
            if let Some(cached) = self.filters.get_mut(&number) {
                cached.stale = true;
                if cached.state == State::Complete {
                    self.drop_filter(number);
                }
            }
        }
    }

    fn is_known(&self, number: FilterId) -> bool {
        let cached = self.filters.get(&number);
        cached.is_some_and(|cached| cached.name.is_some())
    }

    /// Whether a newer value may have reached a session that has other subscriptions on the topic.
    pub(super) fn is_ahead(&self, number: FilterId, message: &Message, now: Millis) -> bool {
        if self.ahead.topics.is_empty() {
            return false;
        }
        let known = self.filters.get(&number).filter(|c| c.name.is_some());
        let last = self.ahead.topics.get(&self.topic(message));
        let (Some(known), Some(last)) = (known, last) else {
            return false;
        };
        last.until > now
            && last.event > known.known_since
            && last.by.binary_search(&number).is_err()
            && last.payload != self.hasher.hash_one(message.payload())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::CacheAccounts;
    use crate::mqtt::{MessageSpec, Properties, QoS};
    use crate::router::retained::ahead::{AHEAD_FOR, AHEAD_MAX};
    use crate::router::retained::cache::tests::{arrived, complete};
    use crate::router::retained::cache::{Cached, Requests};

    #[test]
    fn another_filter_is_ahead_until_its_own_copy_comes_or_time_passes() {
        let mut cache = complete();
        let older = arrived("a/b", &[FilterId(7)]).message.clone();
        cache.note_ahead(&arrived("a/b", &[FilterId(9)]), Millis::ZERO);
        assert!(
            !cache.is_ahead(FilterId(7), &older, Millis::ZERO),
            "it says the same"
        );
        let mut newer = arrived("a/b", &[FilterId(9)]);
        newer.message = Message::new(&MessageSpec {
            topic: "a/b",
            properties: Properties::default(),
            payload: b"y",
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        cache.note_ahead(&newer, Millis::ZERO);
        assert!(cache.is_ahead(FilterId(7), &older, Millis::ZERO));
        assert!(!cache.is_ahead(FilterId(7), &older, Millis::ZERO + AHEAD_FOR));
        newer.filters = [FilterId(7)].as_slice().into();
        cache.note_ahead(&newer, Millis::ZERO);
        assert!(!cache.is_ahead(FilterId(7), &older, Millis::ZERO));
        assert!(cache.ahead.topics.is_empty());
    }

    #[test]
    fn a_filter_that_others_are_too_far_ahead_of_is_forgotten() {
        let mut cache = complete();
        for n in 0..AHEAD_MAX {
            cache.note_ahead(&arrived(&format!("a/{n}"), &[FilterId(9)]), Millis::ZERO);
        }
        assert_eq!(cache.ahead.topics.len(), AHEAD_MAX);
        assert!(cache.filters.contains_key(&FilterId(7)));
        cache.note_ahead(&arrived("a/more", &[FilterId(9)]), Millis::ZERO);
        assert!(cache.filters.is_empty() && cache.known.is_empty());
    }

    #[test]
    fn topics_whose_time_has_passed_make_room() {
        let mut cache = complete();
        let later = Millis::ZERO + AHEAD_FOR;
        for (n, now) in
            (0..=AHEAD_MAX).zip(std::iter::repeat_n(Millis::ZERO, AHEAD_MAX).chain([later]))
        {
            cache.note_ahead(&arrived(&format!("a/{n}"), &[FilterId(9)]), now);
        }
        assert_eq!(cache.ahead.topics.len(), 1);
        assert!(cache.filters.contains_key(&FilterId(7)));
    }

    #[test]
    fn copies_of_a_message_by_many_filters_are_noted_without_a_search_for_each() {
        let mut cache = Cache::new(1000, CacheAccounts::default());
        for n in 0..200 {
            let mut cached = Cached::queued(Requests::default());
            let name = format!("a/{}", ["+", "b"][n % 2]) + &"/+".repeat(n / 2);
            cached.state = State::Complete;
            cache.known.insert(&name, FilterId(n as u32));
            cached.name = Some(name.as_str().into());
            cache.filters.insert(FilterId(n as u32), cached);
        }
        let newer = |by: &[FilterId]| arrived("a/b", by);
        cache.note_ahead(&newer(&[FilterId(0)]), Millis::ZERO);
        let older = Message::new(&MessageSpec {
            topic: "a/b",
            properties: Properties::default(),
            payload: b"older",
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let ahead =
            |cache: &Cache| [0, 1].map(|n| cache.is_ahead(FilterId(n), &older, Millis::ZERO));
        assert_eq!(ahead(&cache), [false, true]);
        cache.note_ahead(&newer(&[FilterId(1)]), Millis::ZERO);
        assert_eq!(ahead(&cache), [true, false]);
        cache.note_ahead(&newer(&[FilterId(1), FilterId(0)]), Millis::ZERO);
        assert_eq!(ahead(&cache), [false, false]);
        assert!(cache.ahead.topics.is_empty());
    }
}
