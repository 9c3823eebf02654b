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

    /// Puts a filter inside the root that it lies in. False: it lies in none.
    pub(super) fn place_in_root(&mut self, id: FilterId) -> bool {
        let placed = self.get(id).filter(|f| !f.is_root() && !f.is_shared());
        let Some(name) = placed.map(|f| f.name().clone()) else {
            return false;
        };
        let inside = |root: &&FilterId| self.get(**root).is_some_and(|r| covers(r.name(), &name));
        let Some(root) = self.roots.iter().find(inside).copied() else {
            return false;
        };
        self.put_inside(id, root);
        true
    }

    /// Logs which root would spare the broker most of its filters, as their number grows.
    pub(crate) fn suggest_root(&self) {
        let at_broker = self.len().saturating_sub(self.inner.len());
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
}
