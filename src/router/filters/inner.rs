//! Filters that lie inside another one, whose subscription at the broker brings their messages: inside
//! a root, or, where the broker has no Subscription Identifiers, inside a client's filter. Which of
//! them a message is for is found here.

use std::sync::Arc;

use crate::mqtt::{QoS, ReasonCode};
use crate::router::filters::actions::{Answered, Outcome};
use crate::router::filters::filter::{Filter, Phase, Placement};
use crate::router::filters::table::Table;
use crate::router::lost::Loss;
use crate::router::types::Arrived;
use crate::time::Millis;
use crate::topics::FilterId;

impl Table {
    /// The filter whose subscription at the broker brings the messages of this one: the one in which
    /// it lies, or the filter itself.
    pub(crate) fn source(&self, id: FilterId) -> FilterId {
        match self.get(id).map(Filter::placement) {
            Some(Placement::Inside(outer)) => outer,
            Some(Placement::Local { plain }) => match self.get(plain).map(Filter::placement) {
                Some(Placement::Inside(outer)) => outer,
                _ => plain,
            },
            _ => id,
        }
    }

    /// Whether filters lie inside this one.
    pub(crate) fn has_inner(&self, id: FilterId) -> bool {
        self.inner_of.contains_key(&id)
    }

    /// The filters inside `outer`, and the local groups on these filters.
    pub(crate) fn below(&self, outer: FilterId) -> Vec<FilterId> {
        let mut all = Vec::new();
        for id in self.inner_of.get(&outer).into_iter().flatten() {
            all.push(*id);
            all.extend(self.get(*id).into_iter().flat_map(Filter::groups));
        }
        all
    }

    /// Adds the filters that lie inside filters of `ids`.
    pub(crate) fn add_below(&self, ids: &mut Vec<FilterId>) {
        if self.inner.is_empty() {
            return;
        }
        for at in 0..ids.len() {
            ids.extend(self.below(ids[at]));
        }
    }

    /// The filters inside `outer` that match a topic.
    pub(crate) fn match_inner(&self, outer: FilterId, topic: &str, mut f: impl FnMut(FilterId)) {
        if self.has_inner(outer) {
            self.inner.for_each_match(topic, |id| {
                if self.get(id).and_then(Filter::source) == Some(outer) {
                    f(id);
                }
            });
        }
    }

    /// Puts a filter inside another one.
    pub(super) fn put_inside(&mut self, id: FilterId, outer: FilterId) {
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        filter.place_inside(outer);
        let name = filter.name().clone();
        self.inner.insert(&name, id);
        self.inner_of.entry(outer).or_default().insert(id);
        self.mark_recorded(id);
    }

    /// A filter does not lie inside `outer` any more, so far as the index is concerned.
    pub(super) fn take_inner(&mut self, outer: FilterId, id: FilterId) {
        if let Some(inner) = self.inner_of.get_mut(&outer) {
            inner.remove(&id);
            if inner.is_empty() {
                self.inner_of.remove(&outer);
            }
        }
    }

    /// A filter on a data link inside which these topics lie, and which the broker has or is asked
    /// for. `fits` judges it further.
    pub(super) fn outer_of(
        &self,
        topics: &str,
        fits: impl Fn(FilterId, &Filter) -> bool,
    ) -> Option<FilterId> {
        let mut found = None;
        for link in 0..self.counts.data_max {
            self.tries[link].for_each_cover(topics, |id| {
                let outer = self.get(id).filter(|f| f.link() == Some(link));
                let serves =
                    |f: &&Filter| !matches!(f.phase(), Phase::Absent | Phase::Unsubscribing);
                let fits = outer.filter(serves).is_some_and(|f| fits(id, f));
                found = fits.then_some(id).or(found);
            });
            if found.is_some() {
                break;
            }
        }
        found
    }

    /// Somebody wants a filter at `qos`; the filter in which it lies may bring its messages.
    pub(super) fn want(&mut self, id: FilterId, qos: QoS) {
        if self.moves.target(id).is_some() {
            self.request(id, qos);
        } else if let Some(filter) = self.get_mut(id) {
            filter.want(qos);
        }
        // The plain filter of a local group may get a subscription of its own as well.
        if let Some(Placement::Local { plain }) = self.get(id).map(Filter::placement)
            && self.source(plain) != plain
        {
            self.want(plain, qos);
        }
    }

    /// Clients were granted a filter without the broker's answer for the one in which it lies. Their
    /// subscriptions count from that answer on.
    pub(super) fn presume_inner(&mut self, id: FilterId) {
        if self.source(id) != id
            && let Some(filter) = self.get_mut(id)
        {
            filter.presume();
            self.awaiting_outer.insert(id);
        }
    }

    /// Takes the filters inside `outer`, and its local groups, whose clients wait for its SUBACK.
    pub(crate) fn take_awaiting_outer(&mut self, outer: FilterId) -> Vec<FilterId> {
        if self.awaiting_outer.is_empty() {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.awaiting_outer);
        let inside = |id: &FilterId| *id != outer && self.source(*id) == outer;
        let (inside, others) = all.into_iter().partition::<Vec<_>, _>(inside);
        self.awaiting_outer = others.into_iter().collect();
        inside
    }

    /// The broker has answered for the filter in which this one lies; `settled`: it has granted it at the
    /// QoS that is wanted. Whether clients were granted this one before without that answer.
    pub(super) fn outer_answered(&mut self, id: FilterId, settled: bool) -> bool {
        self.get_mut(id).is_some_and(|filter| match settled {
            true => filter.outer_answered(),
            false => filter.is_presumed(),
        })
    }

    /// A filter goes on waiting for the one in which it lies: clients still wait for its SUBACK, or
    /// have subscriptions that do not count yet, or not at their QoS.
    pub(super) fn await_outer_again(&mut self, id: FilterId) {
        let waits = self
            .get(id)
            .is_some_and(|f| f.is_awaited() || f.is_presumed());
        if waits {
            self.awaiting_outer.insert(id);
        }
    }

    /// The broker has refused `outer`. Unless that is a root or is still subscribed, the filters inside
    /// it are placed anew. Returns answers for clients that wait for them.
    pub(super) fn place_inner_of_refused(&mut self, outer: FilterId, now: Millis) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let refused = self
            .get(outer)
            .filter(|f| f.phase() == Phase::Absent && !f.is_root());
        let Some(refused) = refused else {
            return outcomes;
        };
        if refused.link().is_some() && refused.link() == self.counts.catch_all() {
            self.no_catch_all.insert(outer);
        }
        let inner = self.inner_of.get(&outer).cloned().unwrap_or_default();
        for id in inner {
            let Some(name) = self.get(id).map(|f| f.name().clone()) else {
                continue;
            };
            self.inner.remove(&name);
            self.take_inner(outer, id);
            if self.get(id).is_some_and(|f| f.mask() != 0) {
                self.lost.insert(id, Loss::Sure);
            }
            if let Some(link) = self.moves.forget(id) {
                // Its own SUBSCRIBE is under way already, or has been answered.
                if let Some(filter) = self.get_mut(id) {
                    filter.place_on(link);
                    if filter.is_active() {
                        self.lost.remove(id);
                    }
                }
                continue;
            }
            outcomes.extend(self.place_anew(id, now));
        }
        outcomes
    }

    /// Places a filter that has no place any more, and asks the broker for it if that is needed.
    /// Returns answers for clients that wait for it, or for a local group on it, if there are any
    /// already.
    pub(super) fn place_anew(&mut self, id: FilterId, now: Millis) -> Vec<Outcome> {
        let Some(filter) = self.get_mut(id) else {
            return Vec::new();
        };
        filter.unplace();
        if self.place(id, 0, &[], now).is_err() {
            self.lost.remove(id);
            if let Some(filter) = self.get_mut(id) {
                filter.unservable();
            }
            self.mark_recorded(id);
            return vec![self.unconfirmed(id, ReasonCode::QUOTA_EXCEEDED)];
        }
        let source = self.source(id);
        if source == id {
            if let Some(filter) = self.get_mut(id) {
                filter.begin_move();
                if let Some(link) = filter.link() {
                    self.queue_subscribe(link, id);
                    self.woken.insert(link);
                }
            }
            return Vec::new();
        }
        self.lost.remove(id);
        let groups = self.get(id).map(|f| f.groups().to_vec());
        let all = std::iter::once(id).chain(groups.unwrap_or_default());
        all.filter_map(|id| self.ask_outer(id, source)).collect()
    }

    /// Asks the broker for `outer`, in which a filter has come to lie. Returns an answer for clients that
    /// wait for the inner one, or that were granted it without an answer, if there is one already.
    fn ask_outer(&mut self, id: FilterId, outer: FilterId) -> Option<Outcome> {
        let qos = self.get(id)?.wanted();
        self.request(outer, qos);
        self.woken.extend(self.get(outer).and_then(Filter::link));
        let outer = self.get(outer)?;
        let code = ReasonCode(outer.granted() as u8);
        if outer.grants(qos) {
            if !outer.is_confirmed() {
                // A lower QoS was presumed for others.
                let code = ReasonCode(outer.grant(qos) as u8);
                self.presume_inner(id);
                return Some(self.unconfirmed(id, code));
            }
            let presumed = self.outer_answered(id, true);
            self.awaiting_outer.remove(&id);
            return Some(self.outcome(id, QoS::ExactlyOnce, presumed, code));
        }
        // The broker sends its messages already if only a higher QoS is to come.
        let is_active = outer.is_active();
        self.awaiting_outer.insert(id);
        let presumed = is_active && self.outer_answered(id, false);
        presumed.then(|| self.outcome(id, QoS::AtMostOnce, true, code))
    }

    /// An answer of our own to all clients that wait for a filter.
    fn unconfirmed(&mut self, id: FilterId, code: ReasonCode) -> Outcome {
        Outcome {
            confirmed: None,
            answered: Answered {
                grants: self.take_answered(id, QoS::ExactlyOnce),
                code,
                confirmed: false,
            },
        }
    }

    /// Whether any filter lies inside another one.
    pub(crate) fn has_inner_filters(&self) -> bool {
        !self.inner.is_empty()
    }

    /// Whether any filter moves.
    pub(crate) fn is_moving(&self) -> bool {
        !self.moves.is_empty()
    }

    /// See [`Moves::own_copy`](crate::router::filters::copies::Moves::own_copy).
    pub(crate) fn own_copy(&self, id: FilterId, arrived: &Arrived) -> bool {
        self.moves.own_copy(id, arrived)
    }

    /// See [`Moves::outer_copy`](crate::router::filters::copies::Moves::outer_copy).
    pub(crate) fn outer_copy(&self, id: FilterId, arrived: &Arrived) {
        self.moves.outer_copy(id, arrived);
    }

    /// The name of a filter.
    pub(super) fn name_of(&self, id: FilterId) -> Option<Arc<str>> {
        self.get(id).map(|f| f.name().clone())
    }
}
