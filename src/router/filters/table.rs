//! The table of filters: by number, by name, by link and by time, with the queues of the links.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

use crate::mqtt::QoS;
use crate::router::account::SessionAccount;
use crate::router::filters::actions::LinkSet;
use crate::router::filters::copies::{Leaving, Moves};
use crate::router::filters::counts::{LinkCounts, UsedLinks};
use crate::router::filters::filter::{Filter, Placement};
use crate::router::filters::journal::FilterJournal;
use crate::router::filters::linger::Lingering;
use crate::router::filters::suspects::Suspects;
use crate::router::lost::Lost;
use crate::router::types::{PendingGrant, SessionRef};
use crate::store::Identifiers;
use crate::time::Millis;
use crate::topics::{FilterId, FilterTrie};

/// Filters at the broker beyond which a root is suggested for the first time.
const SUGGEST_AT: usize = 1000;

/// How long a filter's number is not given to another filter after its UNSUBACK.
pub(super) const TOMBSTONE: Duration = Duration::from_secs(10 * 60);

/// All filters.
#[derive(Debug)]
pub(in crate::router) struct Table {
    /// How many links there are, and may be.
    pub(super) counts: LinkCounts,
    /// The links that filters were placed on.
    pub(super) used: Arc<UsedLinks>,
    /// For each link, whether it is connected.
    pub(super) up: Arc<[AtomicBool]>,
    /// Links that have something to send since the last [`Table::take_woken`].
    pub(super) woken: LinkSet,
    /// By number; `None`: the number means none, and costs no more than a word while it rests.
    filters: Vec<Option<Box<Filter>>>,
    /// Charged for the filters that clients brought.
    pub(super) account: Arc<SessionAccount>,
    /// Which filter a number means, and when it may mean another.
    numbers: Box<dyn Identifiers>,
    /// Filters that nobody uses.
    pub(super) lingering: Lingering,
    /// For each link, the filters to SUBSCRIBE.
    pub(super) subscribe_queue: Vec<VecDeque<FilterId>>,
    /// Filters that the broker may have ended a link for.
    pub(super) suspects: Suspects,
    /// For each link, the filters to UNSUBSCRIBE.
    pub(super) unsubscribe_queue: Vec<VecDeque<FilterId>>,
    /// For each link, its filters; in use only when the broker has no Subscription Identifiers.
    pub(super) tries: Vec<FilterTrie<FilterId>>,
    /// Whether the broker has working Subscription Identifiers; `None`: it was never connected.
    pub identifiers: Option<bool>,
    /// With so many filters at the broker a root is suggested.
    pub(super) suggest_at: AtomicUsize,
    /// Shared subscriptions are shared out at this node.
    pub(super) local_groups: bool,
    /// Filters are subscribed at this QoS at least.
    pub(super) floor: QoS,
    /// The roots: wildcard filters of the configuration that cover clients' filters.
    pub roots: Vec<FilterId>,
    /// All filters that lie inside another one, whose subscription brings their messages.
    pub(super) inner: FilterTrie<FilterId>,
    /// The same filters, by the outer one.
    pub(super) inner_of: BTreeMap<FilterId, BTreeSet<FilterId>>,
    /// Those inner filters, and local groups, whose clients wait for the outer one's SUBACK.
    pub(super) awaiting_outer: BTreeSet<FilterId>,
    /// Outer filters that nobody uses, whose inner ones are moving to the broker.
    pub(super) leaving: BTreeMap<FilterId, Leaving>,
    /// Inner filters that are moving to the broker.
    pub(super) moves: Moves,
    /// Catch-all filters that the broker refused.
    pub(super) no_catch_all: BTreeSet<FilterId>,
    /// Filters that are gone, and filters that are released at the next tick if nobody uses them then. Shared ones do not
    /// linger, because the broker goes on sending us messages that other members of the group could
    /// have; nor do those beyond a client's share of the lingering filters.
    pub(super) release_soon: Vec<FilterId>,
    /// For each link, until when its loss puts its filters in doubt.
    pub(super) doubted_until: Vec<Option<Millis>>,
    /// Filters with clients that wait for a SUBACK, by the deadlines of their grants.
    pub(super) deadlines: BTreeSet<(Millis, FilterId)>,
    /// Filters that the broker had granted and has lost, until it grants them again.
    pub(super) lost: Arc<Lost>,
    /// Live messages of the broker keep RETAIN.
    pub(super) keeps_retain: bool,
    /// The records of the filters in the log. `None`: filters end with the process.
    pub(super) journal: Option<Box<FilterJournal>>,
}

impl Table {
    /// Tables for so many links. Filters that `numbers` knows linger from the start.
    pub(crate) fn new(
        numbers: Box<dyn Identifiers>,
        counts: LinkCounts,
        account: Arc<SessionAccount>,
    ) -> Self {
        let links = counts.all();
        let mut lingering = Lingering::default();
        let mut filters = Vec::new();
        for (at, name) in numbers.load().into_iter().enumerate() {
            filters.push(name.map(|name| {
                lingering.insert((Millis::ZERO, FilterId::from_index(at)), name.len());
                Box::new(Filter::idle(name, Millis::ZERO))
            }));
        }
        Self {
            used: Arc::new(UsedLinks::new(counts.data)),
            up: (0..links).map(|_| AtomicBool::new(false)).collect(),
            counts,
            woken: LinkSet::default(),
            filters,
            account,
            numbers,
            lingering,
            subscribe_queue: vec![VecDeque::new(); links],
            suspects: Suspects::new(links),
            unsubscribe_queue: vec![VecDeque::new(); links],
            tries: (0..links).map(|_| FilterTrie::new()).collect(),
            identifiers: None,
            suggest_at: AtomicUsize::new(SUGGEST_AT),
            local_groups: false,
            floor: QoS::AtMostOnce,
            roots: Vec::new(),
            inner: FilterTrie::new(),
            inner_of: BTreeMap::new(),
            awaiting_outer: BTreeSet::new(),
            leaving: BTreeMap::new(),
            moves: Moves::default(),
            no_catch_all: BTreeSet::new(),
            release_soon: Vec::new(),
            doubted_until: vec![None; links],
            deadlines: BTreeSet::new(),
            lost: Arc::default(),
            keeps_retain: true,
            journal: None,
        }
    }

    pub(crate) fn get(&self, id: FilterId) -> Option<&Filter> {
        self.filters.get(id.index())?.as_deref()
    }

    pub(crate) fn get_mut(&mut self, id: FilterId) -> Option<&mut Filter> {
        self.filters.get_mut(id.index())?.as_deref_mut()
    }

    /// Filters that are known, in use or lingering.
    pub(crate) fn len(&self) -> usize {
        self.numbers.count()
    }

    /// Whether a filter is known.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.numbers.known(name).is_some()
    }

    /// The filter that is this topic.
    pub(crate) fn exact(&self, topic: &str) -> Option<FilterId> {
        self.numbers.known(topic)
    }

    /// Whether the number meant a filter that is gone: its late messages are for nobody.
    pub(crate) fn is_tombstone(&self, id: FilterId) -> bool {
        matches!(self.filters.get(id.index()), Some(None))
    }

    /// The filters of one link that match `topic`.
    pub(crate) fn match_topic(&self, link: usize, topic: &str, mut f: impl FnMut(FilterId)) {
        if self.identifiers == Some(false) {
            self.tries[link].for_each_match(topic, f);
            return;
        }
        for (id, filter) in self.of_link(link) {
            if crate::topics::matches(filter.topics(), topic) {
                f(id);
            }
        }
    }

    /// All filters with their numbers, in the order of these.
    pub(crate) fn all(&self) -> impl Iterator<Item = (FilterId, &Filter)> {
        let all = self.filters.iter().enumerate();
        all.filter_map(|(at, f)| Some((FilterId::from_index(at), f.as_deref()?)))
    }

    /// The filters that have a subscription of their own on one link.
    pub(crate) fn of_link(&self, link: usize) -> impl Iterator<Item = (FilterId, &Filter)> {
        self.all().filter(move |(_, f)| f.link() == Some(link))
    }

    /// The filter's number, new or known.
    pub(crate) fn intern(&mut self, name: &str) -> (FilterId, Arc<str>) {
        let (id, name) = self.numbers.number(name);
        let at = id.index();
        if at >= self.filters.len() {
            self.filters.resize_with(at + 1, || None);
        }
        self.filters[at].get_or_insert_with(|| Box::new(Filter::new(name.clone())));
        (id, name)
    }

    /// Takes over the numbers of an earlier process: the ones of filters, and the ones at rest. The filters that
    /// are known already are forgotten.
    pub(super) fn take_over_numbers(
        &mut self,
        filters: Vec<(FilterId, Arc<str>)>,
        rests: Vec<(Millis, FilterId)>,
    ) {
        self.filters.clear();
        let count = self.numbers.take_over(filters, rests);
        self.filters.resize_with(count, || None);
    }

    /// Puts a filter at its number.
    pub(super) fn put(&mut self, id: FilterId, filter: Filter) {
        if let Some(place) = self.filters.get_mut(id.index()) {
            *place = Some(Box::new(filter));
        }
    }

    /// A filter lies inside `outer` since the broker's properties have changed: the broker is to have
    /// that one at the filter's QoS.
    pub(super) fn ask_again(&mut self, id: FilterId, outer: FilterId) {
        let Some(filter) = self.get(id) else {
            return;
        };
        if !filter.is_wanted() {
            return;
        }
        let qos = filter.wanted();
        self.request(outer, qos);
        self.await_outer_again(id);
    }

    /// Queues the SUBSCRIBE of a filter that has moved to another link.
    pub(crate) fn queue_moved(&mut self, id: FilterId) {
        if let Some(filter) = self.get_mut(id)
            && filter.moved()
            && let Some(link) = filter.link()
        {
            self.queue_subscribe(link, id);
        }
    }

    /// One more subscription of a session in `shard`.
    pub(crate) fn reference(&mut self, id: FilterId, shard: u16) {
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        if let Some(since) = filter.reference(shard) {
            self.lingering.remove((since, id));
            self.leaving.remove(&id);
        }
    }

    /// One subscription of a session in `shard` less; the last begins the linger.
    pub(crate) fn unreference(&mut self, id: FilterId, shard: u16, now: Millis) {
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        if filter.unreference(shard, now) {
            let (shared, bytes) = (filter.is_shared(), filter.name().len());
            if shared {
                self.release_soon.push(id);
            }
            self.lingering.insert((now, id), bytes);
        }
    }

    /// A client unsubscribed from a filter. If nobody else uses the filter, it lingers on the
    /// client's account, which may have so many filters and bytes; the oldest make room.
    pub(crate) fn charge(&mut self, id: FilterId, client: SessionRef, most: usize, bytes: usize) {
        let Some(since) = self.get(id).and_then(Filter::idle_since) else {
            return;
        };
        let surplus = (self.lingering).charge((since, id), client, most, bytes);
        self.release_soon.extend(surplus);
    }

    /// Asks the broker for a filter at `qos`, if it is not asked already. A filter without a link is
    /// queued once it gets one.
    pub(crate) fn request(&mut self, id: FilterId, qos: QoS) {
        let qos = qos.max(self.floor);
        let target = self.moves.target(id);
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        if filter.request(qos)
            && let Some(link) = target.or(filter.link())
        {
            self.queue_subscribe(link, id);
            self.woken.insert(link);
        }
    }

    /// Takes the links that have something to send.
    pub(super) fn take_woken(&mut self) -> LinkSet {
        std::mem::take(&mut self.woken)
    }

    /// Removes a filter that nobody uses and that is not at the broker; its number rests. The next tick
    /// forgets its group and its retained messages.
    pub(crate) fn remove(&mut self, id: FilterId, now: Millis) {
        let Some(filter) = self.filters.get_mut(id.index()).and_then(Option::take) else {
            return;
        };
        self.give_back(&filter);
        self.release_soon.push(id);
        self.lost.remove(id);
        self.leaving.remove(&id);
        self.awaiting_outer.remove(&id);
        self.numbers.release(filter.name(), now, now + TOMBSTONE);
        if let Some(journal) = &mut self.journal {
            journal.remove(id, now, now + TOMBSTONE);
        }
        if let Some(since) = filter.idle_since() {
            self.lingering.remove((since, id));
        }
        match filter.placement() {
            Placement::Inside(outer) => {
                self.inner.remove(filter.name());
                self.take_inner(outer, id);
            }
            Placement::Local { plain } => self.remove_local(id, plain, now),
            Placement::Link(link) => self.take_off(usize::from(link), id, filter.topics()),
            Placement::Unplaced => {}
        }
    }

    /// Lets a client's SUBSCRIBE wait for the SUBACK of filter `on`.
    pub(crate) fn await_suback(&mut self, on: FilterId, grant: PendingGrant) {
        if let Some(filter) = self.get_mut(on) {
            filter.await_suback(grant);
            self.deadlines.insert((grant.deadline, on));
        }
    }

    /// Takes the grants that wait on a filter for this QoS or less.
    pub(crate) fn take_answered(&mut self, id: FilterId, qos: QoS) -> Vec<PendingGrant> {
        let Some(filter) = self.get_mut(id) else {
            return Vec::new();
        };
        let answered = filter.take_answered(qos);
        for grant in &answered {
            self.deadlines.remove(&(grant.deadline, id));
        }
        // Grants that wait on may have the same deadlines.
        if let Some(filter) = self.filters.get(id.index()).and_then(Option::as_ref) {
            self.deadlines.extend(filter.deadlines().map(|at| (at, id)));
        }
        answered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::types::SubscribeRef;
    use crate::session::Incarnation;
    use crate::store::{Memory, Store};

    fn account() -> Arc<SessionAccount> {
        let seed = crate::hashing::HashSeed::fixed();
        Arc::new(SessionAccount::new(1 << 20, 100, seed))
    }

    #[test]
    fn a_filter_that_the_store_knows_keeps_its_number() {
        let mut numbers = Memory.identifiers();
        for name in ["a", "b", "c"] {
            numbers.number(name);
        }
        numbers.release("b", Millis::ZERO, Millis::ZERO + TOMBSTONE);
        let mut table = Table::new(numbers, LinkCounts::fixed(1, 1), account());
        assert!(table.knows("a") && !table.knows("b"));
        assert_eq!(table.get(FilterId(2)).map(|f| &**f.name()), Some("c"));
        assert!(
            table.is_tombstone(FilterId(1)),
            "late messages of it are for nobody"
        );
        assert_eq!(table.intern("c").0, FilterId(2));
        assert_eq!(table.intern("b").0, FilterId(3), "its old number rests");
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn a_filter_that_the_store_knows_lingers_until_it_is_used() {
        let mut numbers = Memory.identifiers();
        for name in ["a", "b", "root/#"] {
            numbers.number(name);
        }
        let mut table = Table::new(numbers, LinkCounts::fixed(1, 1), account());
        table.add_root("root/#");
        table.reference(FilterId(1), 0);
        let lingering: Vec<_> = table.lingering.behind(None).collect();
        assert_eq!(lingering, [((Millis::ZERO, FilterId(0)), 1)]);
        assert!(!table.get(FilterId(0)).is_some_and(Filter::is_wanted));
        assert!(table.get(FilterId(1)).is_some_and(Filter::is_wanted));
        assert!(table.get(FilterId(2)).is_some_and(Filter::is_wanted));
    }

    #[test]
    fn the_number_of_a_removed_filter_rests() {
        let mut table = Table::new(Memory.identifiers(), LinkCounts::fixed(1, 1), account());
        for name in ["a", "b"] {
            table.intern(name);
        }
        table.remove(FilterId(0), Millis::new(5));
        assert!(table.is_tombstone(FilterId(0)) && !table.knows("a"));
        assert_eq!(table.intern("c").0, FilterId(2));
        table.remove(FilterId(1), Millis::new(4) + TOMBSTONE);
        assert_eq!(table.intern("d").0, FilterId(3));
        table.remove(FilterId(2), Millis::new(5) + TOMBSTONE);
        assert_eq!(table.intern("e").0, FilterId(0));
        assert!(!table.is_tombstone(FilterId(0)));
    }

    #[test]
    fn a_grant_that_waits_for_more_keeps_a_deadline_that_others_had_too() {
        let grant = |qos, deadline| PendingGrant {
            subscribe: SubscribeRef {
                session: SessionRef {
                    shard: 0,
                    slot: 0,
                    slot_version: 0,
                },
                connection_no: 0,
                packet_id: 1,
                index: 0,
            },
            filter: FilterId(0),
            incarnation: Incarnation::nth(0),
            qos,
            granted: false,
            retained: false,
            wait: None,
            deadline,
        };
        let id = FilterId(0);
        let mut table = Table::new(Memory.identifiers(), LinkCounts::fixed(1, 1), account());
        table.intern("a");
        table.await_suback(id, grant(QoS::AtLeastOnce, Millis::new(10)));
        table.await_suback(id, grant(QoS::ExactlyOnce, Millis::new(10)));
        table.await_suback(id, grant(QoS::AtLeastOnce, Millis::new(20)));
        assert_eq!(table.take_answered(id, QoS::AtLeastOnce).len(), 2);
        assert_eq!(
            table.deadlines.iter().collect::<Vec<_>>(),
            [&(Millis::new(10), id)]
        );
        assert_eq!(table.take_answered(id, QoS::ExactlyOnce).len(), 1);
        assert!(table.deadlines.is_empty());
    }

    #[test]
    fn a_resting_number_costs_one_word() {
        assert_eq!(size_of::<Option<Box<Filter>>>(), size_of::<usize>());
        let mut table = Table::new(Memory.identifiers(), LinkCounts::fixed(1, 1), account());
        table.intern("a");
        assert_eq!(size_of_val(&table.filters[0]), size_of::<usize>());
    }
}
