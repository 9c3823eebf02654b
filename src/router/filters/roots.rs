//! Roots: wildcard filters that the configuration keeps subscribed. A client's filter inside one costs
//! the broker nothing; which of these filters a message is for is found here.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use crate::router::filters::filter::Filter;
use crate::router::filters::table::Table;
use crate::telemetry::clean;
use crate::topics::{FilterId, covers};

/// With more filters at the broker no root is suggested any more.
const SUGGEST_UNTIL: usize = 100_000;

impl Table {
    /// Keeps a root subscribed from the first connection of its link on.
    pub(crate) fn add_root(&mut self, name: &str) {
        let (id, _) = self.intern(name);
        // A root that is known from an earlier process has begun to linger.
        if let Some(since) = self.get_mut(id).and_then(Filter::make_root) {
            self.lingering.remove((since, id));
        }
        self.roots.push(id);
    }

    /// Puts a filter below the root that it lies in. False: it lies in none.
    pub(super) fn place_below_root(&mut self, id: FilterId) -> bool {
        let placed = self.get(id).filter(|f| !f.is_root() && !f.is_shared());
        let Some(name) = placed.map(|f| f.name().clone()) else {
            return false;
        };
        let inside = |root: &&FilterId| self.get(**root).is_some_and(|r| covers(r.name(), &name));
        let Some(root) = self.roots.iter().find(inside).copied() else {
            return false;
        };
        if let Some(filter) = self.get_mut(id) {
            filter.place_below(root);
        }
        self.below_roots.insert(&name, id);
        true
    }

    /// The filter whose subscription at the broker brings the messages of this one: its root, or the
    /// filter itself.
    pub(crate) fn source(&self, id: FilterId) -> FilterId {
        self.get(id).and_then(Filter::source).unwrap_or(id)
    }

    /// The filters below `root`, and the local groups that hang on it; none if `root` is not a root.
    pub(crate) fn below(&self, root: FilterId) -> impl Iterator<Item = FilterId> {
        let is_root = self.get(root).is_some_and(Filter::is_root);
        let all = is_root.then(|| self.all()).into_iter().flatten();
        all.filter(move |(_, f)| f.source() == Some(root))
            .map(|(id, _)| id)
    }

    /// Adds the filters that are below those of `ids` which are roots.
    pub(crate) fn add_below(&self, ids: &mut Vec<FilterId>) {
        for at in 0..ids.len() {
            ids.extend(self.below(ids[at]));
        }
    }

    /// The filters below `root` that match a topic; none if `root` is not a root.
    pub(crate) fn match_root(&self, root: FilterId, topic: &str, f: impl FnMut(FilterId)) {
        if self.get(root).is_some_and(Filter::is_root) {
            self.below_roots.for_each_match(topic, f);
        }
    }

    /// Logs which root would spare the broker most of its filters, as their number grows.
    pub(crate) fn suggest_root(&self) {
        let at_broker = self.len().saturating_sub(self.below_roots.len());
        let known = self.suggest_at.load(Ordering::Relaxed);
        // Then it has been logged often enough, and counting takes its time.
        if at_broker < known || known > SUGGEST_UNTIL {
            return;
        }
        self.suggest_at.store(at_broker * 2, Ordering::Relaxed);
        let (root, filters) = self.best_root();
        if filters * 2 < at_broker {
            return;
        }
        tracing::warn!(
            filters = at_broker,
            inside = filters,
            "The broker has many filters: upstream.roots = [\"{}\"] would replace most of them by one, and bring all its messages here",
            clean(&root, 256)
        );
    }

    /// The narrowest filter of the form `a/b/#` that most filters at the broker lie in, and how many do.
    fn best_root(&self) -> (String, usize) {
        let names = || {
            let own = self
                .all()
                .map(|(_, f)| f)
                .filter(|f| f.source().is_none() && !f.is_shared() && !f.is_root());
            own.map(|f| &**f.name())
        };
        let mut root = String::new();
        let mut inside = 0;
        loop {
            let mut next: BTreeMap<&str, usize> = BTreeMap::new();
            for name in names() {
                let level = name
                    .strip_prefix(&root)
                    .and_then(|rest| rest.split_once('/'));
                let level = level.map(|(level, _)| level);
                if let Some(level) = level.filter(|l| !matches!(*l, "+" | "#" | "")) {
                    *next.entry(level).or_default() += 1;
                }
            }
            let Some((level, count)) = next.into_iter().max_by_key(|(_, count)| *count) else {
                break;
            };
            // A narrower root only while nearly all filters stay inside.
            if inside > 0 && count * 10 < inside * 9 {
                break;
            }
            root.push_str(level);
            root.push('/');
            inside = count;
        }
        (root + "#", inside)
    }

    /// Takes the filters below `root`, and the local groups of `root`, whose clients wait for its
    /// SUBACK.
    pub(crate) fn take_awaiting_root(&mut self, root: FilterId) -> Vec<FilterId> {
        if self.awaiting_root.is_empty() {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.awaiting_root);
        let below = |id: &FilterId| self.get(*id).is_some_and(|f| f.source() == Some(root));
        let (below, others) = all.into_iter().partition::<Vec<_>, _>(below);
        self.awaiting_root = others.into_iter().collect();
        below
    }
}
