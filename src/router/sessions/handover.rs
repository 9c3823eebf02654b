//! Handovers: filters that a client has just unsubscribed while other subscriptions of the client match
//! the same messages.
//!
//! The unsubscribed filter was the primary one: the client got its copies, and the copies of the
//! others were dropped. On several links the copies of one message come at different times. So one
//! copy of a message may have been delivered while another is still to come, or one may have been
//! dropped while the one to deliver is still to come. A handover therefore takes three steps, each
//! until every data link has brought everything that the broker had sent on it before: first the
//! copies of the unsubscribed filter are delivered, as before; then whichever copy comes first; then
//! the copies of the other filters. Copies are recognised by their content, and counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::hashing::LookUp;
use crate::mqtt::Message;
use crate::router::types::BarrierNumbers;
use crate::session::{GrantOrder, PrimaryOver, Unsubscribed};
use crate::topics::{FilterId, matches, overlaps};

/// The weight of all handovers of one shard: each counts one, and one for each filter that it came before;
/// the handovers of one UNSUBSCRIBE share these. Past it a filter goes at once.
const WEIGHT_MAX: usize = 32 * 1024;

/// Handovers of one session: all are looked at for each copy of a message. Past it a filter goes at once.
const HANDOVERS_MAX: usize = 256;

/// Messages whose copies are counted in one shard. Past it the counts of a session begin anew.
const COPIES_MAX: usize = 4096;

/// The copies that are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The copies of the unsubscribed filter.
    Unsubscribed,
    /// Whichever copy comes first.
    Both,
    /// The copies of the remaining filters.
    Remaining,
    /// The handover is complete.
    Complete,
}

/// One unsubscribed filter.
#[derive(Debug)]
struct Handover {
    gone: Unsubscribed,
    /// Filters that went before it by other UNSUBSCRIBEs and did not come before it, sorted: it was
    /// primary over these too.
    gone_before: Vec<FilterId>,
    step: Step,
    /// For each data link the barrier that has not passed yet. Empty until barriers are asked for.
    barriers: BarrierNumbers,
}

impl Handover {
    /// Whether the unsubscribed filter was primary over `filter`, if a message matches both.
    fn is_over(&self, filter: FilterId) -> bool {
        let later = self.gone.primary_over.as_ref();
        later.is_some_and(|later| later.contains(filter))
            || self.gone_before.binary_search(&filter).is_ok()
    }

    fn order(&self) -> Option<&Arc<GrantOrder>> {
        self.gone.primary_over.as_ref().map(PrimaryOver::order)
    }

    /// Whether both filters went by the same UNSUBSCRIBE.
    fn shares_order(&self, gone: &Unsubscribed) -> bool {
        let other = gone.primary_over.as_ref().map(PrimaryOver::order);
        let (Some(own), Some(other)) = (self.order(), other) else {
            return false;
        };
        Arc::ptr_eq(own, other)
    }
}

/// The copies of one message.
#[derive(Debug, Default)]
struct Copies {
    /// The copies that came, by the filter that brought them.
    by: SmallVec<[(FilterId, u32); 2]>,
    /// The copies that were delivered.
    given: u32,
}

/// The handovers of one session.
#[derive(Debug, Default)]
struct OfSession {
    handovers: Vec<Handover>,
    /// The topic of the last message (hashed), and the places of the handovers whose filters match it.
    matching: Option<(u64, Vec<u16>)>,
    weight: usize,
    /// By the hash of the message.
    copies: LookUp<u64, Copies>,
}

/// The handovers of one shard.
#[derive(Debug, Default)]
pub(in crate::router) struct Handovers {
    /// By slot.
    sessions: BTreeMap<u32, OfSession>,
    /// The slots with a handover from a filter.
    slots: LookUp<FilterId, SmallVec<[u32; 2]>>,
    /// The weight of all handovers.
    weight: usize,
    /// Messages whose copies are counted.
    copies: usize,
}

impl Handovers {
    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// A session unsubscribed a filter that was primary over others. False: there are too many
    /// handovers, and its reference to the filter is to be given back at once.
    pub(crate) fn begin(&mut self, slot: u32, gone: &Unsubscribed) -> bool {
        let session = self.sessions.get(&slot);
        let known = session.map_or(&[][..], |s| s.handovers.as_slice());
        // It was primary over filters that went before it and were not primary over it.
        let earlier = known.iter().filter(|e| !e.shares_order(gone));
        let earlier = earlier.filter(|e| e.gone.filter != gone.filter && !e.is_over(gone.filter));
        let mut gone_before: Vec<FilterId> = earlier.map(|e| e.gone.filter).collect();
        gone_before.sort_unstable();
        let handover = Handover {
            gone: gone.clone(),
            gone_before,
            step: Step::Unsubscribed,
            barriers: BarrierNumbers::new(),
        };
        let weight = weight(known.last(), &handover);
        if known.len() >= HANDOVERS_MAX || self.weight + weight > WEIGHT_MAX {
            return false;
        }
        let session = self.sessions.entry(slot).or_default();
        session.matching = None;
        session.weight += weight;
        self.weight += weight;
        session.handovers.push(handover);
        let slots = self.slots.entry(gone.filter).or_default();
        if !slots.contains(&slot) {
            slots.push(slot);
        }
        true
    }

    /// Whether a session hands filters over.
    pub(crate) fn concerns(&self, slot: u32) -> bool {
        self.sessions.contains_key(&slot)
    }

    /// The handovers that a session began last wait for these barriers of the data links.
    pub(crate) fn wait(&mut self, slot: u32, barriers: &BarrierNumbers) {
        let session = self.sessions.get_mut(&slot);
        let handovers = session.into_iter().flat_map(|s| &mut s.handovers);
        for handover in handovers.filter(|h| h.barriers.is_empty()) {
            handover.barriers = barriers.clone();
        }
    }

    /// The session ended. Returns the filters whose references are given back.
    pub(crate) fn forget(&mut self, slot: u32) -> Vec<FilterId> {
        let Some(session) = self.sessions.remove(&slot) else {
            return Vec::new();
        };
        self.copies -= session.copies.len();
        self.weight -= session.weight;
        let filters: Vec<FilterId> = session.handovers.iter().map(|h| h.gone.filter).collect();
        for filter in &filters {
            self.no_longer(*filter, slot);
        }
        filters
    }

    fn no_longer(&mut self, filter: FilterId, slot: u32) {
        if let Some(slots) = self.slots.get_mut(&filter) {
            slots.retain(|s| *s != slot);
            if slots.is_empty() {
                self.slots.remove(&filter);
            }
        }
    }

    /// A data link's barrier has passed. Complete handovers are forgotten and added to `complete`, each
    /// by slot and filter; the others wait for the barriers that `next` asks for, one for each data link.
    pub(crate) fn passed(
        &mut self,
        link: usize,
        number: u64,
        complete: &mut Vec<(u32, FilterId)>,
        mut next: impl FnMut() -> BarrierNumbers,
    ) {
        let mut over: Vec<u32> = Vec::new();
        for (slot, session) in &mut self.sessions {
            for handover in &mut session.handovers {
                match handover.barriers.get_mut(link) {
                    Some(barrier) if barrier.is_none_or(|n| n <= number) => *barrier = None,
                    _ => continue,
                }
                if handover.barriers.iter().any(Option::is_some) {
                    continue;
                }
                handover.step = match handover.step {
                    Step::Unsubscribed => Step::Both,
                    Step::Both => Step::Remaining,
                    Step::Remaining | Step::Complete => {
                        over.push(*slot);
                        Step::Complete
                    }
                };
                if handover.step != Step::Complete {
                    handover.barriers = next();
                }
            }
        }
        for slot in over {
            let Some(session) = self.sessions.get_mut(&slot) else {
                continue;
            };
            let handovers = &mut session.handovers;
            let past = handovers.extract_if(.., |h| h.step == Step::Complete);
            let past: Vec<FilterId> = past.map(|h| h.gone.filter).collect();
            session.matching = None;
            let before = std::mem::replace(&mut session.weight, weight_of(&session.handovers));
            self.weight = self.weight + session.weight - before;
            let there = |filter| session.handovers.iter().any(|h| h.gone.filter == filter);
            let no_longer: Vec<FilterId> = past.iter().copied().filter(|f| !there(*f)).collect();
            if session.handovers.is_empty() {
                self.copies -= session.copies.len();
                self.sessions.remove(&slot);
            }
            for filter in no_longer {
                self.no_longer(filter, slot);
            }
            complete.extend(past.into_iter().map(|filter| (slot, filter)));
        }
    }

    /// The slots with a handover from a filter.
    pub(crate) fn of(&self, filter: FilterId) -> SmallVec<[u32; 2]> {
        self.slots.get(&filter).cloned().unwrap_or_default()
    }

    /// The filters that a session unsubscribed and whose copies are delivered instead of copies
    /// of `filter`.
    pub(crate) fn standing_in_for(&self, slot: u32, filter: FilterId) -> SmallVec<[FilterId; 2]> {
        let session = self.sessions.get(&slot);
        let handovers = session.into_iter().flat_map(|s| &s.handovers);
        let gone = handovers.filter(|h| h.gone.filter != filter && h.is_over(filter));
        gone.map(|h| h.gone.filter).collect()
    }

    /// The filters that a session unsubscribed, whose copies it may still be given, and that overlap
    /// `filter`.
    pub(crate) fn overlapping(&self, slot: u32, filter: &str) -> impl Iterator<Item = FilterId> {
        let session = self.sessions.get(&slot);
        let gone = session.into_iter().flat_map(|s| &s.handovers);
        gone.map(|h| &h.gone)
            .filter(move |gone| *gone.name != *filter && overlaps(&gone.name, filter))
            .map(|gone| gone.filter)
    }

    /// Whether a session may still be given a topic by a filter that it unsubscribed.
    pub(crate) fn brings(&self, slot: u32, topic: &str) -> bool {
        let session = self.sessions.get(&slot);
        let mut handovers = session.into_iter().flat_map(|s| &s.handovers);
        handovers.any(|h| matches(&h.gone.name, topic))
    }

    /// Whether the copy that came by filter `via` is delivered, where `primary` is the primary filter
    /// among the remaining ones. The copy of an unsubscribed filter that is `lost` is not waited for,
    /// but it may come all the same. `None`: no handover of the session concerns the message.
    pub(crate) fn gives(
        &mut self,
        slot: u32,
        via: FilterId,
        primary: FilterId,
        message: &Message,
        own: bool,
        lost: impl Fn(FilterId) -> bool,
    ) -> Option<bool> {
        let session = self.sessions.get_mut(&slot)?;
        let (mut concerned, mut blocked, mut counts) = (false, false, via == primary);
        let mut all = session.handovers.iter();
        let own_role = all.find(|h| h.gone.filter == via);
        let topic = session.copies.digest(message.topic());
        let places = match &session.matching {
            Some((of, places)) if *of == topic => places,
            _ => {
                let all = session.handovers.iter().zip(0..);
                let all = all.filter(|(h, _)| matches(&h.gone.name, message.topic()));
                let places = all.map(|(_, place)| place).collect();
                &session.matching.insert((topic, places)).1
            }
        };
        let matching = places.iter().map(|at| &session.handovers[usize::from(*at)]);
        for handover in matching {
            let Handover { gone, step, .. } = handover;
            if (own && gone.no_local) || !handover.is_over(primary) {
                continue;
            }
            concerned = true;
            if gone.filter == via {
                counts |= *step != Step::Remaining;
            } else if handover.is_over(via) && !lost(gone.filter) {
                // One that was subscribed again was the other's primary, too.
                let both = own_role.is_some_and(|own| own.is_over(gone.filter));
                blocked |= *step == Step::Unsubscribed && !both;
            }
        }
        if !concerned {
            return None;
        }
        if self.copies >= COPIES_MAX {
            self.copies -= session.copies.len();
            session.copies = LookUp::default();
            if self.copies >= COPIES_MAX {
                // The counts of others fill the table: as without counting, one may come twice.
                return Some(counts && !blocked);
            }
        }
        let known = session.copies.len();
        let digest = session.copies.digest((message.topic(), message.payload()));
        let copies = session.copies.entry(digest).or_default();
        let at = copies.by.iter().position(|(f, _)| *f == via);
        let at = at.unwrap_or_else(|| {
            copies.by.push((via, 0));
            copies.by.len() - 1
        });
        copies.by[at].1 += 1;
        let given = counts && !blocked && copies.by[at].1 > copies.given;
        copies.given += u32::from(given);
        self.copies += session.copies.len() - known;
        Some(given)
    }
}

/// The weight of a handover behind the one that began `before` it.
fn weight(before: Option<&Handover>, handover: &Handover) -> usize {
    let shares = before.is_some_and(|before| before.shares_order(&handover.gone));
    let order = handover.order().filter(|_| !shares);
    1 + handover.gone_before.len() + order.map_or(0, |order| order.filters())
}

/// The weight of handovers in the order in which they began.
fn weight_of(handovers: &[Handover]) -> usize {
    let before = std::iter::once(None).chain(handovers.iter().map(Some));
    let pairs = before.zip(handovers);
    pairs
        .map(|(before, handover)| weight(before, handover))
        .sum()
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
            expires_at: None,
            strip_key: None,
            account: None,
        })
    }

    fn gone(filter: FilterId, name: &str, primary_over: &[FilterId]) -> Unsubscribed {
        Unsubscribed {
            filter,
            name: name.into(),
            no_local: false,
            primary_over: over(filter, primary_over),
        }
    }

    /// A filter that comes before others.
    fn over(filter: FilterId, others: &[FilterId]) -> Option<PrimaryOver> {
        let filters = std::iter::once(filter).chain(others.iter().copied());
        let order = Arc::new(GrantOrder::new(filters));
        (!others.is_empty()).then(|| PrimaryOver::new(&order, 0))
    }

    /// Filter 1, which was primary over filter 9, is unsubscribed.
    fn begun() -> Handovers {
        let mut handovers = Handovers::default();
        assert!(handovers.begin(7, &gone(FilterId(1), "a/#", &[FilterId(9)])));
        handovers.wait(7, &numbers(1));
        handovers
    }

    fn gives(handovers: &mut Handovers, via: FilterId, payload: &str) -> bool {
        let given = handovers.gives(7, via, FilterId(9), &message(payload), false, |_| false);
        // Without handovers the copy of the primary filter is delivered.
        given.unwrap_or(via == FilterId(9))
    }

    fn numbers(number: u64) -> BarrierNumbers {
        [Some(number), Some(number)].into_iter().collect()
    }

    /// The barriers of both data links pass.
    fn step(handovers: &mut Handovers, number: u64) -> Vec<FilterId> {
        let mut complete = Vec::new();
        for link in 0..2 {
            let next = || numbers(number + 1);
            handovers.passed(link, number, &mut complete, next);
        }
        complete.into_iter().map(|(_, filter)| filter).collect()
    }

    #[test]
    fn a_message_is_delivered_once_wherever_its_copies_fall() {
        // The step in which the copy of the unsubscribed filter comes, and that of the remaining one.
        for (gone_at, remaining_at) in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)] {
            for gone_first in [true, false] {
                let mut handovers = begun();
                let mut given = 0;
                for now in 0..3 {
                    let mut both = [(gone_at, 1), (remaining_at, 9)];
                    if !gone_first {
                        both.reverse();
                    }
                    for (_, via) in both.iter().filter(|(at, _)| *at == now) {
                        given += u32::from(gives(&mut handovers, FilterId(*via), "on"));
                    }
                    let complete = step(&mut handovers, now + 1);
                    assert_eq!(complete.is_empty(), now < 2);
                }
                assert_eq!(given, 1, "{gone_at} {remaining_at} {gone_first}");
                assert!(handovers.is_empty());
            }
        }
    }

    #[test]
    fn a_copy_by_a_filter_that_was_thought_lost_is_delivered() {
        let mut handovers = begun();
        // The copy of the remaining filter came while nothing was in doubt.
        assert!(!gives(&mut handovers, FilterId(9), "on"));
        let lost = |filter| filter == FilterId(1);
        let given = handovers.gives(7, FilterId(1), FilterId(9), &message("on"), false, lost);
        assert_eq!(given, Some(true));
    }

    #[test]
    fn a_second_handover_does_not_set_the_first_back() {
        let mut handovers = Handovers::default();
        handovers.begin(7, &gone(FilterId(1), "a/#", &[FilterId(5), FilterId(9)]));
        handovers.wait(7, &numbers(1));
        step(&mut handovers, 1);
        step(&mut handovers, 2);
        // Its copies are not delivered any more; now the next filter goes, too.
        assert!(!gives(&mut handovers, FilterId(1), "x"));
        handovers.begin(7, &gone(FilterId(5), "a/+", &[FilterId(9)]));
        handovers.wait(7, &numbers(3));
        assert!(!gives(&mut handovers, FilterId(9), "x"));
        assert!(gives(&mut handovers, FilterId(5), "x"));
        assert_eq!(step(&mut handovers, 3), [FilterId(1)]);
        assert!(step(&mut handovers, 4).is_empty());
        assert!(gives(&mut handovers, FilterId(9), "y"));
        assert!(!gives(&mut handovers, FilterId(5), "y"));
        assert_eq!(step(&mut handovers, 5), [FilterId(5)]);
    }

    #[test]
    fn a_filter_unsubscribed_twice_is_given_back_twice() {
        let mut handovers = begun();
        step(&mut handovers, 1);
        // Subscribed again, primary over 8 only, and unsubscribed again.
        assert!(handovers.begin(7, &gone(FilterId(1), "a/#", &[FilterId(8)])));
        handovers.wait(7, &numbers(2));
        let mut to =
            |primary| handovers.gives(7, FilterId(1), primary, &message("x"), false, |_| false);
        assert_eq!((to(FilterId(8)), to(FilterId(9))), (Some(true), Some(true)));
        assert!(step(&mut handovers, 2).is_empty());
        assert_eq!(step(&mut handovers, 3), [FilterId(1)]);
        assert_eq!(handovers.of(FilterId(1)).as_slice(), [7]);
        assert_eq!(step(&mut handovers, 4), [FilterId(1)]);
        assert!(handovers.is_empty() && handovers.of(FilterId(1)).is_empty());
    }

    #[test]
    fn the_same_content_sent_twice_is_delivered_twice() {
        let mut handovers = begun();
        step(&mut handovers, 1);
        let given = [1, 1, 9, 9].map(|via| gives(&mut handovers, FilterId(via), "on"));
        assert_eq!(given, [true, true, false, false]);
    }

    #[test]
    fn a_handover_concerns_only_filters_that_it_was_primary_over() {
        let mut handovers = begun();
        let hidden = Unsubscribed {
            no_local: true,
            ..gone(FilterId(2), "+/b", &[FilterId(8)])
        };
        assert!(handovers.begin(7, &hidden));
        let mut given = |primary, own| {
            handovers.gives(7, primary, primary, &message("x"), own, |lost| {
                lost == FilterId(1)
            })
        };
        assert_eq!(
            given(FilterId(9), false),
            Some(true),
            "a lost filter is not waited for"
        );
        assert_eq!(given(FilterId(7), false), None);
        assert_eq!(
            given(FilterId(8), true),
            None,
            "nor does a No Local filter bring own messages"
        );
        assert_eq!(given(FilterId(8), false), Some(false));
        assert_eq!(handovers.forget(7), [1, 2].map(FilterId));
        assert!(handovers.is_empty() && handovers.of(FilterId(1)).is_empty());
    }

    #[test]
    fn handovers_are_bounded_and_given_back() {
        let mut handovers = begun();
        // Each went by an UNSUBSCRIBE of its own, and is primary over all that went before it.
        let more =
            (20..2000).filter(|n| handovers.begin(7, &gone(FilterId(*n), "x", &[FilterId(9)])));
        let more = more.count();
        assert!((200..HANDOVERS_MAX).contains(&more), "{more}");
        assert!(handovers.weight <= WEIGHT_MAX);
        assert!(!handovers.begin(
            8,
            &gone(
                FilterId(1),
                "a/#",
                &vec![FilterId(9); WEIGHT_MAX - handovers.weight]
            )
        ));
        assert!(handovers.begin(8, &gone(FilterId(1), "a/#", &[FilterId(9)])));
        for n in 0..COPIES_MAX + 10 {
            gives(&mut handovers, FilterId(1), &n.to_string());
        }
        assert!(handovers.copies <= COPIES_MAX);
        let counted: usize = handovers.sessions.values().map(|l| l.copies.len()).sum();
        assert_eq!(handovers.copies, counted);
        assert_eq!(handovers.forget(7).len(), more + 1);
        handovers.forget(8);
        assert_eq!((handovers.weight, handovers.copies), (0, 0));
        assert!(handovers.is_empty() && handovers.slots.is_empty());
    }

    #[test]
    fn a_lost_filter_is_not_waited_for_and_brings_no_second_copy() {
        let mut handovers = begun();
        let mut gives = |via, payload| {
            let lost = |filter| filter == FilterId(1);
            handovers.gives(7, via, FilterId(9), &message(payload), false, lost)
        };
        assert_eq!(
            gives(FilterId(9), "a"),
            Some(true),
            "the other may not come"
        );
        assert_eq!(gives(FilterId(1), "a"), Some(false), "it came all the same");
        assert_eq!(gives(FilterId(1), "b"), Some(true));
        assert_eq!(gives(FilterId(9), "b"), Some(false));
    }

    #[test]
    fn without_room_for_counts_no_message_is_lost() {
        let mut handovers = begun();
        assert!(handovers.begin(8, &gone(FilterId(1), "a/#", &[FilterId(9)])));
        for n in 0..COPIES_MAX {
            gives(&mut handovers, FilterId(1), &n.to_string());
        }
        let mut of_8 = |via| handovers.gives(8, via, FilterId(9), &message("x"), false, |_| false);
        assert_eq!(
            (of_8(FilterId(1)), of_8(FilterId(9))),
            (Some(true), Some(false))
        );
    }
}
