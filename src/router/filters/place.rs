//! Where the messages of a filter come from: the choice of its link, or of the filter in which it lies.
//!
//! Where the broker has no Subscription Identifiers, a link and a topic have to tell the filter. So no
//! two filters on a link overlap. A filter takes the first of these places that there is:
//!
//! 1. inside a filter in use that covers it (a shared subscription cannot: it is a group of its own);
//! 2. a link in use on which it overlaps nothing;
//! 3. a link in use on which it overlaps only filters that nobody uses: they are unsubscribed;
//! 4. inside a filter that lingers;
//! 5. another link;
//! 6. inside the catch-all filter (`#`, or `$name/#`) on a link that is kept free for it.
//!
//! So another client's filter does not cause a refusal, as long as links can be added.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::mqtt::QoS;
use crate::router::filters::actions::LinkSet;
use crate::router::filters::filter::{Filter, Phase, Placement, Release};
use crate::router::filters::table::Table;
use crate::telemetry::{RateLimited, clean};
use crate::time::Millis;
use crate::topics::{FilterId, FilterTrie};

/// Filters that yield at most, so that a filter becomes free for another one.
const YIELDING_MAX: usize = 1000;

/// Repeats of the warning about the catch-all filter are counted, and not written, for this long.
static CATCH_ALL: RateLimited = RateLimited::new(Duration::from_secs(60));

impl Table {
    /// Chooses where the filter's messages come from, unless that is chosen already or the broker is
    /// not known yet. With Subscription Identifiers it is the link of one of `near`, which overlap the
    /// filter for the same client, so that their copies come in one order; else `hash` decides.
    ///
    /// # Errors
    /// Every place is taken: the name of a filter that it overlaps there.
    pub(crate) fn place(
        &mut self,
        id: FilterId,
        hash: u64,
        near: &[FilterId],
        now: Millis,
    ) -> Result<(), Arc<str>> {
        let Some(filter) = self.get(id) else {
            return Ok(());
        };
        if filter.placement() != Placement::Unplaced {
            return Ok(());
        }
        if filter.is_shared() && self.local_groups {
            return self.place_locally(id, hash, now);
        }
        if self.place_in_root(id) {
            return Ok(());
        }
        let (Some(identifiers), Some(filter)) = (self.identifiers, self.get(id)) else {
            return Ok(());
        };
        if !identifiers {
            return self.place_disjoint(id, now);
        }
        let shared = filter.is_shared();
        let neighbour = near.iter().find_map(|n| self.get(self.source(*n)));
        let neighbour = neighbour.and_then(Filter::link);
        let neighbour = neighbour.filter(|link| (*link >= self.counts.data_max) == shared);
        let links = match shared {
            true => LinkSet::from_iter(self.counts.of_shared(true)),
            false => self.open_data_links(),
        };
        let nth = (hash % links.len().max(1) as u64) as usize;
        if let Some(link) = neighbour.or_else(|| links.iter().nth(nth)) {
            self.put_on(id, link);
        }
        Ok(())
    }

    /// The data links that new filters are placed on where the broker has Subscription Identifiers: the
    /// first ones, and added ones once they are connected, because the broker may not take more
    /// connections. Asks for another link when the filters have become many: some brokers go through
    /// all subscriptions of a connection for each new one.
    fn open_data_links(&mut self) -> LinkSet {
        let filters = self.len();
        let wanted = self.counts.data_for(filters);
        let before = self.used.want_data(wanted);
        if wanted > before {
            self.woken.extend(before..wanted);
            tracing::info!(
                links = wanted,
                filters,
                "Another data link is opened, because there are many filters"
            );
        }
        let is_open =
            |link: &usize| *link < self.counts.data || self.up[*link].load(Ordering::Acquire);
        (0..wanted).filter(is_open).collect()
    }

    fn place_disjoint(&mut self, id: FilterId, now: Millis) -> Result<(), Arc<str>> {
        let Some(filter) = self.get(id) else {
            return Ok(());
        };
        let topics: Arc<str> = filter.topics().into();
        let (shared, root) = (filter.is_shared(), filter.is_root());
        let has_outer = !shared && !root;
        let outer = has_outer.then(|| self.outer_of(&topics, |o, f| o != id && !f.is_unused()));
        if let Some(outer) = outer.flatten() {
            self.put_inside(id, outer);
            return Ok(());
        }
        if has_outer && let Some(outer) = self.outer_of_moving(&topics) {
            self.put_inside(id, outer);
            return Ok(());
        }
        if let Some(link) = self.link_for(shared, &topics, now) {
            self.put_on(id, link);
            return Ok(());
        }
        let lingers = |o, leaving: bool| o != id && self.leaving.contains_key(&o) == leaving;
        let outer = has_outer.then(|| self.outer_of(&topics, |o, _| lingers(o, false)));
        if let Some(outer) = outer.flatten() {
            self.put_inside(id, outer);
            return Ok(());
        }
        if let Some(link) = self.another_link(shared) {
            self.put_on(id, link);
            tracing::info!(
                links = self.used.below(self.counts.all()).iter().count(),
                filter = %clean(&topics, 256),
                "Another link for filters is opened: the broker has no working subscription identifiers, and the filter overlaps others"
            );
            return Ok(());
        }
        let outer = has_outer.then(|| self.outer_of(&topics, |o, _| lingers(o, true)));
        let outer = outer.flatten();
        let outer = outer.or_else(|| has_outer.then(|| self.catch_all(&topics, now)).flatten());
        match outer {
            // It is the catch-all filter itself.
            Some(outer) if outer == id => return Ok(()),
            Some(outer) => {
                self.put_inside(id, outer);
                return Ok(());
            }
            None => {}
        }
        Err(self.in_the_way(shared, &topics).unwrap_or(topics))
    }

    /// A link in use for a filter of these topics: one on which it overlaps nothing, or nothing that
    /// is used. The unused ones yield.
    pub(super) fn link_for(&mut self, shared: bool, topics: &str, now: Millis) -> Option<usize> {
        let links = match shared {
            true => self.counts.of_shared(false),
            false => self.counts.of_data(),
        };
        let used: Vec<usize> = links.filter(|link| self.used.contains(*link)).collect();
        let is_free = |link: &&usize| !self.tries[**link].overlaps_any(topics, |_| true);
        if let Some(link) = used.iter().find(is_free) {
            return Some(*link);
        }
        used.into_iter()
            .find(|link| self.make_room(*link, topics, now))
    }

    /// A link that is not in use yet.
    pub(super) fn another_link(&self, shared: bool) -> Option<usize> {
        let mut links = match shared {
            true => self.counts.of_shared(false),
            false => self.counts.of_data(),
        };
        links.find(|link| !self.used.contains(*link))
    }

    /// Puts a filter on a link.
    pub(super) fn put_on(&mut self, id: FilterId, link: usize) {
        self.used.insert(link);
        if self.identifiers == Some(false)
            && let Some(topics) = self.get(id).map(|f| f.topics().to_owned())
        {
            self.tries[link].insert(&topics, id);
        }
        if let Some(filter) = self.get_mut(id) {
            filter.place_on(link as u8);
        }
    }

    /// Takes a filter out of the filters that decide about placements on a link.
    pub(super) fn take_off(&mut self, link: usize, id: FilterId, topics: &str) {
        // A filter that yielded may have made room for another group on the same topics.
        if self.tries[link].get(topics) == Some(id) {
            self.tries[link].remove(topics);
        }
    }

    /// Whether a filter has yielded its link to others, and may not be subscribed there again.
    pub(super) fn has_yielded(&self, id: FilterId) -> bool {
        let filter = self.get(id).filter(|_| self.identifiers == Some(false));
        filter.is_some_and(|f| {
            let link = f.link();
            link.is_some_and(|link| self.tries[link].get(f.topics()) != Some(id))
        })
    }

    /// Unsubscribes the filters on a link that overlap these topics, if nobody uses any of them and none
    /// awaits its SUBACK. Returns whether the link is free of them then.
    fn make_room(&mut self, link: usize, topics: &str, now: Millis) -> bool {
        let mut yielding = Vec::new();
        let blocked = self.tries[link].overlaps_any(topics, |id| {
            let known = self.get(id);
            let yields = |f: &Filter| {
                let is_idle = f.is_unused() && !f.is_awaited() && !f.is_root();
                let may_yield = f.phase() != Phase::Subscribing;
                is_idle && may_yield && f.link() == Some(link) && f.idle_since().is_some()
            };
            yielding.push(id);
            !known.is_some_and(yields) || self.has_inner(id) || yielding.len() > YIELDING_MAX
        });
        if blocked {
            return false;
        }
        for id in yielding {
            let Some(filter) = self.get_mut(id) else {
                continue;
            };
            let (since, topics) = (filter.idle_since(), filter.topics().to_owned());
            match filter.release() {
                Release::Unsubscribe(_) => {
                    if let Some(since) = since {
                        self.lingering.remove((since, id));
                    }
                    self.queue_unsubscribe(link, id);
                    self.woken.insert(link);
                    // The next tick forgets its group once it is gone.
                    self.release_soon.push(id);
                    self.take_off(link, id, &topics);
                }
                Release::Remove => self.remove(id, now),
                // Its UNSUBSCRIBE waits or is under way, and goes ahead of the other one's SUBSCRIBE.
                Release::Later => self.take_off(link, id, &topics),
            }
        }
        true
    }

    /// The filter inside which all topics lie that begin like these, on the link that is kept free for
    /// it.
    fn catch_all(&mut self, topics: &str, now: Millis) -> Option<FilterId> {
        let link = self.counts.catch_all()?;
        let first = topics.split('/').next().unwrap_or_default();
        let name = match first.starts_with('$') {
            true => format!("{first}/#"),
            false => "#".to_owned(),
        };
        let (id, _) = self.intern(&name);
        if self.no_catch_all.contains(&id) {
            return None;
        }
        let filter = self.get_mut(id)?;
        if filter.placement() == Placement::Unplaced {
            if filter.make_idle() {
                self.lingering.insert((Millis::ZERO, id), name.len());
            }
            self.put_on(id, link);
        }
        self.get(id)?.link()?;
        self.request(id, QoS::AtMostOnce);
        self.woken.insert(link);
        if let Some(suppressed) = CATCH_ALL.permit(now) {
            tracing::warn!(
                filter = %clean(&name, 256),
                overlapping = %clean(topics, 256),
                suppressed,
                "All messages of the broker are fetched: it has no working subscription identifiers, and more filters overlap one another than there are data links"
            );
        }
        Some(id)
    }

    /// The name of a filter that keeps these topics from a link.
    fn in_the_way(&self, shared: bool, topics: &str) -> Option<Arc<str>> {
        let mut links = match shared {
            true => self.counts.of_shared(false),
            false => self.counts.of_data(),
        };
        let mut other = None;
        self.tries[links.next()?].overlaps_any(topics, |id| {
            other = Some(id);
            true
        });
        other.and_then(|id| self.name_of(id))
    }

    /// Takes every filter off its link, because the broker's properties have changed, and returns
    /// these filters, broad filters first, because they may cover the others. All links begin anew.
    pub(crate) fn unplace_all(&mut self) -> Vec<FilterId> {
        for trie in &mut self.tries {
            *trie = FilterTrie::new();
        }
        for (link, queue) in self.subscribe_queue.iter_mut().enumerate() {
            queue.clear();
            self.suspects.clear(link);
        }
        self.moves.clear();
        self.leaving.clear();
        self.no_catch_all.clear();
        let in_root = |f: &Filter| {
            f.source()
                .is_some_and(|o| self.get(o).is_some_and(Filter::is_root))
        };
        let is_local = |f: &Filter| matches!(f.placement(), Placement::Local { .. });
        let placed = self.all().filter(|(_, f)| !in_root(f) && !is_local(f));
        let mut ids: Vec<FilterId> = placed.map(|(id, _)| id).collect();
        for id in &ids {
            let Some(filter) = self.get_mut(*id) else {
                continue;
            };
            let (outer, name) = (filter.source(), filter.name().clone());
            filter.unplace();
            if let Some(outer) = outer {
                self.inner.remove(&name);
                self.take_inner(outer, *id);
                self.awaiting_outer.remove(id);
            }
        }
        ids.sort_by_cached_key(|id| (self.get(*id).map(breadth), *id));
        ids
    }
}

/// Sorts filters that cover others before these.
pub(super) fn breadth(filter: &Filter) -> (bool, usize, bool, usize) {
    let levels = || filter.topics().split('/');
    let literal = levels().filter(|l| !matches!(*l, "+" | "#")).count();
    let multi = filter.topics().ends_with('#');
    (!filter.is_root(), literal, !multi, levels().count())
}

#[cfg(test)]
mod tests;
