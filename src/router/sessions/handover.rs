//! Filters that a client has just left while other subscriptions of it match the same messages.
//!
//! The copies of a left filter were those that its client got, so copies of the others were dropped.
//! On several links the copies of one message come at different times: a message may have had its
//! one copy given and have another to come, or have its other copy dropped and the one to come. So
//! a filter goes in three steps, each until every data link has brought what the core had sent on
//! it before: its copies are given as ever; then whichever copy comes first; then those of the
//! others. Copies are told apart by their content, and counted.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::mqtt::Message;
use crate::session::Unsubscribed;
use crate::topics::{FilterId, matches};

/// Filters that are on their way out in one shard, each with the filters that it was senior to. Past it
/// one goes at once.
const LEFT_MAX: usize = 16 * 1024;

/// Messages whose copies are counted in one shard. Past it those of a session are counted anew.
const COPIES_MAX: usize = 4096;

/// Whose copies are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Unsubscribed,
    Both,
    Kept,
    Over,
}

/// A filter on its way out.
#[derive(Debug)]
struct Leaving {
    left: Unsubscribed,
    step: Step,
    /// For each data link the number of the PINGREQ that is waited for; 0: answered.
    fences: SmallVec<[u64; 4]>,
}

/// What came of one message.
#[derive(Debug, Default)]
struct Copies {
    by: SmallVec<[(FilterId, u32); 2]>,
    given: u32,
}

/// The left filters of one session.
#[derive(Debug, Default)]
struct Leaver {
    filters: Vec<Leaving>,
    copies: HashMap<u64, Copies, RandomState>,
}

/// Those of one shard.
#[derive(Debug, Default)]
pub(in crate::router) struct Leavers {
    slots: HashMap<u32, Leaver, RandomState>,
    /// Slots that left a filter.
    filters: HashMap<FilterId, SmallVec<[u32; 2]>, RandomState>,
    /// All left filters, with those that they were senior to.
    left: usize,
    /// Messages whose copies are counted.
    copies: usize,
}

impl Leavers {
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A session left a filter. False: its reference is to be given back at once.
    pub fn leave(&mut self, slot: u32, left: &Unsubscribed) -> bool {
        let before = self.slots.get(&slot).map_or(0, |l| l.filters.len());
        if self.left + left.primary_over.len() + before >= LEFT_MAX {
            return false;
        }
        let filters = &mut self.slots.entry(slot).or_default().filters;
        let mut left = left.clone();
        // Those that went before it and were not senior to it were its juniors.
        let juniors = filters.iter().map(|l| &l.left);
        let juniors = juniors.filter(|l| !l.primary_over.contains(&left.filter));
        let juniors = juniors.filter(|l| l.filter != left.filter);
        left.primary_over.extend(juniors.map(|l| l.filter));
        self.left += weight(&left);
        let slots = self.filters.entry(left.filter).or_default();
        if !slots.contains(&slot) {
            slots.push(slot);
        }
        filters.push(Leaving {
            left,
            step: Step::Unsubscribed,
            fences: SmallVec::new(),
        });
        true
    }

    /// What a session left last waits for these PINGREQs of the data links.
    pub fn wait(&mut self, slot: u32, fences: &[u64]) {
        let leaver = self.slots.get_mut(&slot);
        let filters = leaver.into_iter().flat_map(|l| &mut l.filters);
        for leaving in filters.filter(|l| l.fences.is_empty()) {
            leaving.fences = fences.into();
        }
    }

    /// The session ended: the filters whose references are given back.
    pub fn forget(&mut self, slot: u32) -> Vec<FilterId> {
        let Some(leaver) = self.slots.remove(&slot) else {
            return Vec::new();
        };
        self.copies -= leaver.copies.len();
        let filters = leaver.filters.iter().map(|l| {
            self.left -= weight(&l.left);
            l.left.filter
        });
        let filters: Vec<FilterId> = filters.collect();
        for filter in &filters {
            self.no_longer(*filter, slot);
        }
        filters
    }

    fn no_longer(&mut self, filter: FilterId, slot: u32) {
        if let Some(slots) = self.filters.get_mut(&filter) {
            slots.retain(|s| *s != slot);
            if slots.is_empty() {
                self.filters.remove(&filter);
            }
        }
    }

    /// A data link's PINGREQ was answered. Filters that came to the end of their last step are
    /// forgotten and added to `gone`, each with its slot; the others get what `next` tells for each link.
    pub fn passed(
        &mut self,
        link: usize,
        number: u64,
        gone: &mut Vec<(u32, FilterId)>,
        mut next: impl FnMut() -> SmallVec<[u64; 4]>,
    ) {
        let mut over: Vec<u32> = Vec::new();
        for (slot, leaver) in &mut self.slots {
            for leaving in &mut leaver.filters {
                match leaving.fences.get_mut(link) {
                    Some(fence) if *fence <= number => *fence = 0,
                    _ => continue,
                }
                if leaving.fences.iter().any(|fence| *fence > 0) {
                    continue;
                }
                leaving.step = match leaving.step {
                    Step::Unsubscribed => Step::Both,
                    Step::Both => Step::Kept,
                    Step::Kept | Step::Over => {
                        over.push(*slot);
                        Step::Over
                    }
                };
                if leaving.step != Step::Over {
                    leaving.fences = next();
                }
            }
        }
        for slot in over {
            let Some(leaver) = self.slots.get_mut(&slot) else {
                continue;
            };
            let past = leaver.filters.extract_if(.., |l| l.step == Step::Over);
            let past = past.map(|l| {
                self.left -= weight(&l.left);
                l.left.filter
            });
            let past: Vec<FilterId> = past.collect();
            let there = |filter| leaver.filters.iter().any(|l| l.left.filter == filter);
            let no_longer: Vec<FilterId> = past.iter().copied().filter(|f| !there(*f)).collect();
            if leaver.filters.is_empty() {
                self.copies -= leaver.copies.len();
                self.slots.remove(&slot);
            }
            for filter in no_longer {
                self.no_longer(filter, slot);
            }
            gone.extend(past.into_iter().map(|filter| (slot, filter)));
        }
    }

    /// The sessions that left a filter.
    pub fn of(&self, filter: FilterId) -> SmallVec<[u32; 2]> {
        self.filters.get(&filter).cloned().unwrap_or_default()
    }

    /// Whether a session may still be given a topic by a filter that it left.
    pub fn brings(&self, slot: u32, topic: &str) -> bool {
        let leaver = self.slots.get(&slot);
        let mut left = leaver.into_iter().flat_map(|l| &l.filters);
        left.any(|l| matches(&l.left.name, topic))
    }

    /// Whether a copy is given that came by filter `via`, where the senior of those that the
    /// session keeps is `senior`. `None`: none of the left filters concerns it.
    pub fn gives(
        &mut self,
        slot: u32,
        via: FilterId,
        senior: FilterId,
        message: &Message,
        own: bool,
        lost: impl Fn(FilterId) -> bool,
    ) -> Option<bool> {
        let leaver = self.slots.get_mut(&slot)?;
        let (mut concerned, mut blocked, mut counts) = (false, false, via == senior);
        let mut left = leaver.filters.iter().map(|l| &l.left);
        let own_role = left.find(|l| l.filter == via);
        for Leaving { left, step, .. } in &leaver.filters {
            if !left.primary_over.contains(&senior)
                || (own && left.no_local)
                // A copy that came by it shows that it was not.
                || (left.filter != via && lost(left.filter))
                || !matches(&left.name, message.topic())
            {
                continue;
            }
            concerned = true;
            if left.filter == via {
                counts |= *step != Step::Kept;
            } else if left.primary_over.contains(&via) {
                // One that was subscribed again is the other's junior, too.
                let junior = own_role.is_some_and(|own| own.primary_over.contains(&left.filter));
                blocked |= *step == Step::Unsubscribed && !junior;
            }
        }
        if !concerned {
            return None;
        }
        if self.copies >= COPIES_MAX {
            self.copies -= leaver.copies.len();
            leaver.copies = HashMap::default();
            if self.copies >= COPIES_MAX {
                // Others have it all: as without counting, one may come twice.
                return Some(counts && !blocked);
            }
        }
        let known = leaver.copies.len();
        let hasher = leaver.copies.hasher();
        let digest = hasher.hash_one((message.topic(), message.payload()));
        let copies = leaver.copies.entry(digest).or_default();
        let at = copies.by.iter().position(|(f, _)| *f == via);
        let at = at.unwrap_or_else(|| {
            copies.by.push((via, 0));
            copies.by.len() - 1
        });
        copies.by[at].1 += 1;
        let given = counts && !blocked && copies.by[at].1 > copies.given;
        copies.given += u32::from(given);
        self.copies += leaver.copies.len() - known;
        Some(given)
    }
}

fn weight(left: &Unsubscribed) -> usize {
    1 + left.primary_over.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{MessageSpec, Properties, QoS};

    fn message(payload: &str) -> Message {
        Message::new(&MessageSpec {
            topic: "a/b",
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        })
    }

    fn old(filter: FilterId, name: &str, primary_over: &[FilterId]) -> Unsubscribed {
        Unsubscribed {
            filter,
            name: name.into(),
            no_local: false,
            primary_over: primary_over.to_vec(),
        }
    }

    /// Filter 1, which was senior to filter 9, is left.
    fn left() -> Leavers {
        let mut leavers = Leavers::default();
        assert!(leavers.leave(7, &old(FilterId(1), "a/#", &[FilterId(9)])));
        leavers.wait(7, &[1, 1]);
        leavers
    }

    fn gives(leavers: &mut Leavers, via: FilterId, payload: &str) -> bool {
        let given = leavers.gives(7, via, FilterId(9), &message(payload), false, |_| false);
        // Without left filters the senior's copy is given.
        given.unwrap_or(via == FilterId(9))
    }

    /// Both data links' PINGREQs are answered.
    fn step(leavers: &mut Leavers, number: u64) -> Vec<FilterId> {
        let mut gone = Vec::new();
        for link in 0..2 {
            let next = || SmallVec::from_slice(&[number + 1, number + 1]);
            leavers.passed(link, number, &mut gone, next);
        }
        gone.into_iter().map(|(_, filter)| filter).collect()
    }

    #[test]
    fn a_message_is_given_once_wherever_its_copies_fall() {
        // The step in which the copy of the left filter comes, and that of the kept one.
        for (left_at, kept_at) in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)] {
            for left_first in [true, false] {
                let mut leavers = left();
                let mut given = 0;
                for now in 0..3 {
                    let mut both = [(left_at, 1), (kept_at, 9)];
                    if !left_first {
                        both.reverse();
                    }
                    for (_, via) in both.iter().filter(|(at, _)| *at == now) {
                        given += u32::from(gives(&mut leavers, FilterId(*via), "on"));
                    }
                    let gone = step(&mut leavers, now + 1);
                    assert_eq!(gone.is_empty(), now < 2);
                }
                assert_eq!(given, 1, "{left_at} {kept_at} {left_first}");
                assert!(leavers.is_empty());
            }
        }
    }

    #[test]
    fn what_comes_by_a_filter_that_was_thought_lost_is_given() {
        let mut leavers = left();
        // The kept one's copy came while nobody doubted.
        assert!(!gives(&mut leavers, FilterId(9), "on"));
        let lost = |filter| filter == FilterId(1);
        let given = leavers.gives(7, FilterId(1), FilterId(9), &message("on"), false, lost);
        assert_eq!(given, Some(true));
    }

    #[test]
    fn a_second_filter_that_is_left_does_not_set_the_first_back() {
        let mut leavers = Leavers::default();
        leavers.leave(7, &old(FilterId(1), "a/#", &[FilterId(5), FilterId(9)]));
        leavers.wait(7, &[1, 1]);
        step(&mut leavers, 1);
        step(&mut leavers, 2);
        // Its copies are not given any more; now those of the next go, too.
        assert!(!gives(&mut leavers, FilterId(1), "x"));
        leavers.leave(7, &old(FilterId(5), "a/+", &[FilterId(9)]));
        leavers.wait(7, &[3, 3]);
        assert!(!gives(&mut leavers, FilterId(9), "x"));
        assert!(gives(&mut leavers, FilterId(5), "x"));
        assert_eq!(step(&mut leavers, 3), [FilterId(1)]);
        assert!(step(&mut leavers, 4).is_empty());
        assert!(gives(&mut leavers, FilterId(9), "y"));
        assert!(!gives(&mut leavers, FilterId(5), "y"));
        assert_eq!(step(&mut leavers, 5), [FilterId(5)]);
    }

    #[test]
    fn a_filter_left_twice_is_given_back_twice() {
        let mut leavers = left();
        step(&mut leavers, 1);
        // Subscribed again as the junior of 9, the senior of 8, and left again.
        assert!(leavers.leave(7, &old(FilterId(1), "a/#", &[FilterId(8)])));
        leavers.wait(7, &[2, 2]);
        let mut to =
            |senior| leavers.gives(7, FilterId(1), senior, &message("x"), false, |_| false);
        assert_eq!((to(FilterId(8)), to(FilterId(9))), (Some(true), Some(true)));
        assert!(step(&mut leavers, 2).is_empty());
        assert_eq!(step(&mut leavers, 3), [FilterId(1)]);
        assert_eq!(leavers.of(FilterId(1)).as_slice(), [7]);
        assert_eq!(step(&mut leavers, 4), [FilterId(1)]);
        assert!(leavers.is_empty() && leavers.of(FilterId(1)).is_empty());
    }

    #[test]
    fn the_same_content_sent_twice_is_given_twice() {
        let mut leavers = left();
        step(&mut leavers, 1);
        let given = [1, 1, 9, 9].map(|via| gives(&mut leavers, FilterId(via), "on"));
        assert_eq!(given, [true, true, false, false]);
    }

    #[test]
    fn left_filters_concern_only_what_they_were_senior_to() {
        let mut leavers = left();
        let hidden = Unsubscribed {
            no_local: true,
            ..old(FilterId(2), "+/b", &[FilterId(8)])
        };
        assert!(leavers.leave(7, &hidden));
        let mut given = |senior, own| {
            leavers.gives(7, senior, senior, &message("x"), own, |lost| {
                lost == FilterId(1)
            })
        };
        assert_eq!(
            given(FilterId(9), false),
            None,
            "what is lost brings nothing"
        );
        assert_eq!(given(FilterId(7), false), None);
        assert_eq!(given(FilterId(8), true), None, "nor No Local one's own");
        assert_eq!(given(FilterId(8), false), Some(false));
        assert_eq!(leavers.forget(7), [1, 2].map(FilterId));
        assert!(leavers.is_empty() && leavers.of(FilterId(1)).is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded_and_given_back() {
        let mut leavers = left();
        // Each is senior to one, and to those that one left before.
        let more = (20..2000).filter(|n| leavers.leave(7, &old(FilterId(*n), "x", &[FilterId(9)])));
        let more = more.count();
        assert!((150..200).contains(&more), "{more}");
        assert!(leavers.left <= LEFT_MAX);
        assert!(!leavers.leave(
            8,
            &old(
                FilterId(1),
                "a/#",
                &vec![FilterId(9); LEFT_MAX - leavers.left]
            )
        ));
        assert!(leavers.leave(8, &old(FilterId(1), "a/#", &[FilterId(9)])));
        for n in 0..COPIES_MAX + 10 {
            gives(&mut leavers, FilterId(1), &n.to_string());
        }
        assert!(leavers.copies <= COPIES_MAX);
        let counted: usize = leavers.slots.values().map(|l| l.copies.len()).sum();
        assert_eq!(leavers.copies, counted);
        assert_eq!(leavers.forget(7).len(), more + 1);
        leavers.forget(8);
        assert_eq!((leavers.left, leavers.copies), (0, 0));
        assert!(leavers.is_empty() && leavers.filters.is_empty());
    }

    #[test]
    fn where_others_count_all_copies_none_is_lost() {
        let mut leavers = left();
        assert!(leavers.leave(8, &old(FilterId(1), "a/#", &[FilterId(9)])));
        for n in 0..COPIES_MAX {
            gives(&mut leavers, FilterId(1), &n.to_string());
        }
        let mut of_8 = |via| leavers.gives(8, via, FilterId(9), &message("x"), false, |_| false);
        assert_eq!(
            (of_8(FilterId(1)), of_8(FilterId(9))),
            (Some(true), Some(false))
        );
    }
}
