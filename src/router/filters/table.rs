//! The table of filters: which are held, for how many sessions, on which D link, and how far
//! their SUBSCRIBE at the core has come.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use smallvec::SmallVec;

use crate::mqtt::{QoS, ReasonCode};
use crate::session::Incarnation;
use crate::store::Identifiers;
use crate::time::Millis;
use crate::topics::{FilterId, split_shared};

use crate::router::filters::linger::Lingering;
use crate::router::filters::lost::Lost;
use crate::router::types::SessionRef;
use crate::topics::FilterTrie;

/// How far a filter is at the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum State {
    /// Not subscribed.
    Absent,
    /// To be subscribed when the link can.
    Pending,
    /// SUBSCRIBE sent.
    Subscribing,
    /// Held.
    Active,
    /// UNSUBSCRIBE to be sent, or sent.
    Unsubscribing,
}

/// A client that waits for the core's word on a filter.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct Waiter {
    pub session: SessionRef,
    /// Which session it is, should another take its place.
    pub incarnation: Incarnation,
    pub connection_no: u64,
    pub packet_id: u16,
    pub index: u16,
    pub qos: QoS,
    pub deadline: u64,
    /// The filter that it asked for, and what it was granted: it waits until an older overlapping
    /// one of the same client, whose copies it will get, is held at that QoS too.
    pub behind: Option<(FilterId, ReasonCode)>,
    /// Retained messages are wanted after the grant.
    pub retained: bool,
}

/// One filter.
#[derive(Debug)]
pub(in crate::router) struct Filter {
    pub name: Arc<str>,
    /// `$share/group/filter`.
    pub shared: bool,
    /// Held for good, by configuration.
    pub root: bool,
    /// The root that it lies in: nothing of it is at the core.
    pub rooted: Option<FilterId>,
    /// Groups of this node alone that get its messages.
    pub groups: Vec<FilterId>,
    /// The filter that such a group hangs on.
    pub plain: Option<FilterId>,
    /// D link; `ROOTED` below a root; `UNPLACED` until the core's habits are known.
    pub link: u8,
    pub state: State,
    /// It was held before the link was lost: those who ask are granted at once.
    pub held: bool,
    /// Granted to clients without the core's word: their subscriptions do not count yet.
    pub unconfirmed: bool,
    /// Asked from the core.
    pub wanted: QoS,
    /// A SUBSCRIBE was sent that the core may have, answered or not.
    pub sent: bool,
    /// QoS of the SUBSCRIBE that was sent last.
    pub asked: QoS,
    /// What the core granted.
    pub granted: QoS,
    /// A SUBSCRIBE at `wanted` is to be sent, or under way, on a filter that is already active.
    pub upgrading: bool,
    /// Shards that may have members.
    pub mask: u64,
    /// References per shard.
    references: SmallVec<[(u16, u32); 1]>,
    pub waiters: Vec<Waiter>,
    /// Since when nobody holds it; `u64::MAX`: somebody does.
    pub idle_since: u64,
    /// Messages that arrived for nobody since then.
    pub unread: AtomicU32,
}

impl Filter {
    /// A filter that nothing was done for yet.
    fn new(name: Arc<str>) -> Self {
        Self {
            shared: split_shared(&name).is_some(),
            name,
            root: false,
            rooted: None,
            groups: Vec::new(),
            plain: None,
            link: UNPLACED,
            state: State::Absent,
            held: false,
            unconfirmed: false,
            wanted: QoS::AtMostOnce,
            sent: false,
            asked: QoS::AtMostOnce,
            granted: QoS::AtMostOnce,
            upgrading: false,
            mask: 0,
            references: SmallVec::new(),
            waiters: Vec::new(),
            idle_since: u64::MAX,
            unread: AtomicU32::new(0),
        }
    }

    /// The filter without its share name.
    pub fn topics(&self) -> &str {
        match self.shared {
            true => split_shared(&self.name).map_or(&self.name, |(_, topics)| topics),
            false => &self.name,
        }
    }

    /// The core's word on what is wanted is still to come.
    pub fn is_rising(&self) -> bool {
        match self.state {
            State::Pending | State::Subscribing => true,
            State::Active => self.upgrading,
            State::Absent | State::Unsubscribing => false,
        }
    }

    /// Somebody holds it, or waits for a word on it.
    pub fn is_wanted(&self) -> bool {
        self.idle_since == u64::MAX || !self.waiters.is_empty()
    }
}

/// No D link chosen yet.
pub(in crate::router) const UNPLACED: u8 = u8::MAX;

/// On no link of its own: below a root.
pub(in crate::router) const ROOTED: u8 = u8::MAX - 1;

/// Filters at the core of which a first word is said.
const SUGGEST_AT: usize = 1000;

/// All filters.
#[derive(Debug)]
pub(in crate::router) struct Table {
    /// Links before this one are D links, the others for shared subscriptions.
    data_links: usize,
    /// By number; `None`: it means none, and costs no more than a word while it rests.
    filters: Vec<Option<Box<Filter>>>,
    /// Which filter a number means, and when it may mean another.
    numbers: Box<dyn Identifiers>,
    /// Filters nobody holds.
    pub lingering: Lingering,
    /// For each D link, the filters to SUBSCRIBE and to UNSUBSCRIBE.
    pub pending: Vec<VecDeque<FilterId>>,
    pub leaving: Vec<VecDeque<FilterId>>,
    /// For each D link without identifiers, its filters.
    pub tries: Vec<FilterTrie<FilterId>>,
    /// Whether the core has working identifiers; `None`: never connected.
    pub identifiers: Option<bool>,
    /// With so many filters at the core a root is suggested.
    pub suggest_at: AtomicUsize,
    /// Shared subscriptions are this node's affair.
    pub local_groups: bool,
    /// Filters are held at this QoS at least.
    pub floor: QoS,
    /// The roots.
    pub roots: Vec<FilterId>,
    /// All filters below roots.
    pub rooted: FilterTrie<FilterId>,
    /// Those of them with clients that wait for their root.
    pub rooted_waiting: BTreeSet<FilterId>,
    /// Filters that leave at the next tick if nobody holds them: shared ones do not linger, for the
    /// core goes on sending us what other members of the group could have; nor do those that are too
    /// many of one client.
    pub left: Vec<FilterId>,
    /// Filters with waiters, by deadline.
    pub held: BTreeSet<(u64, FilterId)>,
    /// Filters that were held before the core lost them, and are not again yet.
    pub lost: Arc<Lost>,
}

/// How long a filter number is not given to another filter after its UNSUBACK, milliseconds.
const TOMBSTONE: u64 = 10 * 60 * 1000;

impl Table {
    /// Tables for so many D links, and so many for shared subscriptions. Filters that `numbers` knows
    /// linger from the start.
    pub fn new(numbers: Box<dyn Identifiers>, data_links: usize, shared_links: usize) -> Self {
        let links = data_links + shared_links;
        let mut lingering = Lingering::default();
        let mut filters = Vec::new();
        for (at, name) in numbers.load().into_iter().enumerate() {
            let number = FilterId::from_index(at);
            filters.push(name.map(|name| {
                lingering.insert((0, number), name.len());
                Box::new(Filter {
                    idle_since: 0,
                    ..Filter::new(name)
                })
            }));
        }
        Self {
            data_links,
            filters,
            numbers,
            lingering,
            pending: vec![VecDeque::new(); links],
            leaving: vec![VecDeque::new(); links],
            tries: (0..links).map(|_| FilterTrie::new()).collect(),
            identifiers: None,
            suggest_at: AtomicUsize::new(SUGGEST_AT),
            local_groups: false,
            floor: QoS::AtMostOnce,
            roots: Vec::new(),
            rooted: FilterTrie::new(),
            rooted_waiting: BTreeSet::new(),
            left: Vec::new(),
            held: BTreeSet::new(),
            lost: Arc::default(),
        }
    }

    pub fn get(&self, number: FilterId) -> Option<&Filter> {
        self.filters.get(number.index())?.as_deref()
    }

    pub fn get_mut(&mut self, number: FilterId) -> Option<&mut Filter> {
        self.filters.get_mut(number.index())?.as_deref_mut()
    }

    /// Filters known, held or lingering.
    pub fn len(&self) -> usize {
        self.numbers.count()
    }

    /// Whether a filter is known.
    pub fn knows(&self, name: &str) -> bool {
        self.numbers.knows(name)
    }

    /// Whether a number meant a filter that is gone: what still comes for it is for nobody.
    pub fn is_tombstone(&self, number: FilterId) -> bool {
        matches!(self.filters.get(number.index()), Some(None))
    }

    /// The filters of one link that match `topic`.
    pub fn match_topic(&self, link: usize, topic: &str, mut f: impl FnMut(FilterId)) {
        if self.identifiers == Some(false) {
            self.tries[link].for_each_match(topic, f);
            return;
        }
        for (number, filter) in self.of_link(link as u8) {
            if crate::topics::matches(filter.topics(), topic) {
                f(number);
            }
        }
    }

    /// All filters.
    pub fn all(&self) -> impl Iterator<Item = &Filter> {
        self.filters.iter().flatten().map(|f| &**f)
    }

    /// Numbers and filters of one link.
    pub fn of_link(&self, link: u8) -> impl Iterator<Item = (FilterId, &Filter)> {
        self.filters
            .iter()
            .enumerate()
            .filter_map(|(n, f)| Some((FilterId::from_index(n), f.as_deref()?)))
            .filter(move |(_, f)| f.link == link)
    }

    /// All numbers that there may be filters of.
    pub fn numbers(&self) -> impl Iterator<Item = FilterId> + use<> {
        (0..self.filters.len()).map(FilterId::from_index)
    }

    /// The filter's number, new or known.
    pub fn intern(&mut self, name: &str) -> (FilterId, Arc<str>) {
        let (number, name) = self.numbers.number(name);
        let at = number.index();
        if at >= self.filters.len() {
            self.filters.resize_with(at + 1, || None);
        }
        self.filters[at].get_or_insert_with(|| Box::new(Filter::new(name.clone())));
        (number, name)
    }

    /// Chooses the D link. With identifiers that of one of `near`, which overlap it for the same
    /// client, so that their copies come in one order; else by hash. Without, the first on which the filter
    /// overlaps no other; the error names one it overlaps.
    pub fn place(
        &mut self,
        number: FilterId,
        hash: u64,
        near: &[FilterId],
    ) -> Result<(), Arc<str>> {
        let Some(filter) = self.get(number) else {
            return Ok(());
        };
        if filter.link != UNPLACED {
            return Ok(());
        }
        if filter.shared && self.local_groups {
            return self.take_local(number, hash);
        }
        if self.take_root(number) {
            return Ok(());
        }
        let (Some(identifiers), Some(filter)) = (self.identifiers, self.get(number)) else {
            return Ok(());
        };
        let (name, shared) = (filter.name.clone(), filter.shared);
        let links = match shared {
            true => self.data_links..self.pending.len(),
            false => 0..self.data_links,
        };
        let topics = filter.topics().to_owned();
        let neighbour = near.iter().find_map(|n| self.get(self.source(*n)));
        let neighbour = neighbour.map(|f| f.link);
        let mut link = match neighbour {
            Some(link) if links.contains(&usize::from(link)) => usize::from(link),
            _ => links.start + (hash % links.len() as u64) as usize,
        };
        if !identifiers {
            let mut clash = None;
            let free = links.into_iter().find(|link| {
                !self.tries[*link].overlaps_any(&topics, |other| {
                    clash = Some(other);
                    true
                })
            });
            match (free, clash) {
                (Some(free), _) => link = free,
                (None, clash) => {
                    let other = clash.and_then(|n| self.get(n)).map(|f| f.name.clone());
                    return Err(other.unwrap_or_else(|| name.clone()));
                }
            }
            self.tries[link].insert(&topics, number);
        }
        if let Some(filter) = self.get_mut(number) {
            filter.link = link as u8;
        }
        Ok(())
    }

    /// One more subscription of a session in `shard`.
    pub fn reference(&mut self, number: FilterId, shard: u16) {
        let Some(filter) = self.get_mut(number) else {
            return;
        };
        filter.mask |= 1 << shard;
        match filter.references.iter_mut().find(|(s, _)| *s == shard) {
            Some((_, count)) => *count += 1,
            None => filter.references.push((shard, 1)),
        }
        let idle = std::mem::replace(&mut filter.idle_since, u64::MAX);
        filter.unread.store(0, Ordering::Relaxed);
        if idle != u64::MAX {
            self.lingering.remove((idle, number));
        }
    }

    /// One less; the last begins the linger.
    pub fn unreference(&mut self, number: FilterId, shard: u16, now: Millis) {
        let Some(filter) = self.get_mut(number) else {
            return;
        };
        if let Some(at) = filter.references.iter().position(|(s, _)| *s == shard) {
            filter.references[at].1 -= 1;
            if filter.references[at].1 == 0 {
                filter.references.swap_remove(at);
                filter.mask &= !(1 << shard);
            }
        }
        if filter.references.is_empty()
            && filter.groups.is_empty()
            && filter.idle_since == u64::MAX
            && !filter.root
        {
            filter.idle_since = now;
            let (shared, bytes) = (filter.shared, filter.name.len());
            if shared {
                self.left.push(number);
            }
            self.lingering.insert((now, number), bytes);
        }
    }

    /// It was this client's UNSUBSCRIBE after which nobody holds a filter, if that is so. Of those
    /// that linger on its account, so many filters and bytes may; the oldest make room.
    pub fn given_up(&mut self, number: FilterId, client: SessionRef, most: usize, bytes: usize) {
        let Some(since) = self.get(number).map(|f| f.idle_since) else {
            return;
        };
        let gone = (self.lingering).give_up((since, number), client, most, bytes);
        self.left.extend(gone);
    }

    /// Queues the SUBSCRIBE, if it is not under way at this QoS.
    pub fn ask(&mut self, number: FilterId, qos: QoS) {
        let qos = qos.max(self.floor);
        let Some(filter) = self.get_mut(number) else {
            return;
        };
        let higher = qos > filter.wanted;
        filter.wanted = filter.wanted.max(qos);
        let link = filter.link as usize;
        let queue = match filter.state {
            State::Absent => {
                filter.state = State::Pending;
                true
            }
            // SUBSCRIBE again once the answer is there.
            State::Pending | State::Subscribing | State::Unsubscribing => false,
            State::Active => {
                let again = higher && !filter.upgrading;
                filter.upgrading |= again;
                again
            }
        };
        if queue && link < self.pending.len() {
            self.pending[link].push_back(number);
        }
    }

    /// Forgets a filter that is neither held nor at the core; its number rests.
    pub fn bury(&mut self, number: FilterId, now: Millis) {
        let Some(filter) = self.filters.get_mut(number.index()).and_then(Option::take) else {
            return;
        };
        self.lost.remove(number);
        self.numbers.release(&filter.name, now, now + TOMBSTONE);
        self.lingering.remove((filter.idle_since, number));
        if filter.rooted.is_some() && !filter.shared {
            self.rooted.remove(&filter.name);
        }
        if let Some(plain) = filter.plain {
            self.leave_local(number, plain, now);
        }
        if let Some(trie) = self.tries.get_mut(filter.link as usize)
            && self.identifiers == Some(false)
        {
            trie.remove(filter.topics());
        }
    }

    /// Those who wait on a filter for this QoS or less.
    pub fn take_waiters(&mut self, number: FilterId, qos: QoS) -> Vec<Waiter> {
        let Some(filter) = self.get_mut(number) else {
            return Vec::new();
        };
        let all = std::mem::take(&mut filter.waiters).into_iter();
        let (waiters, others): (Vec<Waiter>, Vec<Waiter>) = all.partition(|w| w.qos <= qos);
        for w in &waiters {
            self.held.remove(&(w.deadline, number));
        }
        // They may have the same deadlines.
        let kept = others.iter().map(|w| (w.deadline, number));
        self.held.extend(kept);
        if let Some(filter) = self.get_mut(number) {
            filter.waiters = others;
        }
        waiters
    }

    /// What a client is granted that asked for `qos`.
    pub fn grant(&self, number: FilterId, qos: QoS) -> ReasonCode {
        // Without the core's word, what it was asked for.
        let granted = self
            .get(self.source(number))
            .map_or(qos, |f| match f.unconfirmed {
                true => f.wanted.min(qos),
                false => f.granted.min(qos),
            });
        ReasonCode(granted as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Memory, Store};

    #[test]
    fn what_the_store_knows_keeps_its_number() {
        let mut numbers = Memory.identifiers();
        for name in ["a", "b", "c"] {
            numbers.number(name);
        }
        numbers.release("b", 0, TOMBSTONE);
        let mut table = Table::new(numbers, 1, 1);
        assert!(table.knows("a") && !table.knows("b"));
        assert_eq!(table.get(FilterId(2)).map(|f| &*f.name), Some("c"));
        assert!(
            table.is_tombstone(FilterId(1)),
            "late messages of it are for nobody"
        );
        assert_eq!(table.intern("c").0, FilterId(2));
        assert_eq!(table.intern("b").0, FilterId(3), "its old number rests");
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn what_the_store_knows_lingers_until_somebody_wants_it() {
        let mut numbers = Memory.identifiers();
        for name in ["a", "b", "root/#"] {
            numbers.number(name);
        }
        let mut table = Table::new(numbers, 1, 1);
        table.add_root("root/#");
        table.reference(FilterId(1), 0);
        let lingering: Vec<_> = table.lingering.behind(None).collect();
        assert_eq!(lingering, [((0, FilterId(0)), 1)]);
        assert!(!table.get(FilterId(0)).is_some_and(Filter::is_wanted));
        assert!(table.get(FilterId(1)).is_some_and(Filter::is_wanted));
        assert!(table.get(FilterId(2)).is_some_and(Filter::is_wanted));
    }

    #[test]
    fn a_buried_filter_is_forgotten_and_its_number_rests() {
        let mut table = Table::new(Memory.identifiers(), 1, 1);
        for name in ["a", "b"] {
            table.intern(name);
        }
        table.bury(FilterId(0), 5);
        assert!(table.is_tombstone(FilterId(0)) && !table.knows("a"));
        assert_eq!(table.intern("c").0, FilterId(2));
        table.bury(FilterId(1), 4 + TOMBSTONE);
        assert_eq!(table.intern("d").0, FilterId(3));
        table.bury(FilterId(2), 5 + TOMBSTONE);
        assert_eq!(table.intern("e").0, FilterId(0));
        assert!(!table.is_tombstone(FilterId(0)));
    }

    #[test]
    fn who_waits_for_more_keeps_the_deadline_that_others_had_too() {
        let waiter = |qos, deadline| Waiter {
            session: SessionRef {
                shard: 0,
                slot: 0,
                slot_version: 0,
            },
            incarnation: Incarnation::nth(0),
            connection_no: 0,
            packet_id: 1,
            index: 0,
            qos,
            deadline,
            behind: None,
            retained: false,
        };
        let waiters = [
            waiter(QoS::AtLeastOnce, 10),
            waiter(QoS::ExactlyOnce, 10),
            waiter(QoS::AtLeastOnce, 20),
        ];
        let mut table = Table::new(Memory.identifiers(), 1, 1);
        table.intern("a");
        table
            .held
            .extend(waiters.iter().map(|w| (w.deadline, FilterId(0))));
        table
            .get_mut(FilterId(0))
            .expect("known")
            .waiters
            .extend(waiters);
        assert_eq!(table.take_waiters(FilterId(0), QoS::AtLeastOnce).len(), 2);
        assert_eq!(table.held.iter().collect::<Vec<_>>(), [&(10, FilterId(0))]);
        assert_eq!(table.take_waiters(FilterId(0), QoS::ExactlyOnce).len(), 1);
        assert!(table.held.is_empty());
    }

    #[test]
    fn a_number_that_rests_costs_a_word() {
        assert_eq!(size_of::<Option<Box<Filter>>>(), size_of::<usize>());
        let mut table = Table::new(Memory.identifiers(), 1, 1);
        table.intern("a");
        assert_eq!(size_of_val(&table.filters[0]), size_of::<usize>());
    }
}
