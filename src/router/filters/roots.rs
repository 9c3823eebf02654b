//! Roots: filters that the configuration holds at the core for good. A client's filter inside one
//! costs the core nothing; which of them a message is for is found here.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crate::mqtt::QoS;
use crate::telemetry::clean;
use crate::topics::{FilterId, covers};

use crate::router::filters::table::{ROOTED, State, Table};

/// With more filters at the core no root is suggested any more.
const SUGGEST_UNTIL: usize = 100_000;

impl Table {
    /// Holds a root from the first connection of its link on.
    pub fn add_root(&mut self, name: &str) {
        let (number, _) = self.intern(name);
        if let Some(filter) = self.get_mut(number) {
            filter.root = true;
            filter.wanted = QoS::ExactlyOnce;
            filter.state = State::Pending;
            // One that is known from before has begun to linger.
            let idle = std::mem::replace(&mut filter.idle_since, u64::MAX);
            self.lingering.remove((idle, number));
        }
        self.roots.push(number);
    }

    /// Puts a filter below the root that it lies in, if there is one.
    pub fn take_root(&mut self, number: FilterId) -> bool {
        let Some(filter) = self.get(number).filter(|f| !f.root && !f.shared) else {
            return false;
        };
        let name = filter.name.clone();
        let inside = |root: &&FilterId| self.get(**root).is_some_and(|r| covers(&r.name, &name));
        let Some(root) = self.roots.iter().find(inside).copied() else {
            return false;
        };
        if let Some(filter) = self.get_mut(number) {
            filter.rooted = Some(root);
            filter.link = ROOTED;
            // It is at the core as long as its root is.
            filter.state = State::Active;
        }
        self.rooted.insert(&name, number);
        true
    }

    /// The filter that stands for this one at the core: its root, or itself.
    pub fn source(&self, number: FilterId) -> FilterId {
        let root = self.get(number).and_then(|f| f.rooted);
        root.unwrap_or(number)
    }

    /// The filters below `number`, if that is a root.
    pub fn below(&self, number: FilterId) -> impl Iterator<Item = FilterId> {
        let root = self.get(number).is_some_and(|filter| filter.root);
        let all = root.then(|| self.numbers()).into_iter().flatten();
        all.filter(move |n| self.get(*n).is_some_and(|f| f.rooted == Some(number)))
    }

    /// Adds the filters below root `number` that match a topic.
    pub fn match_root(&self, number: FilterId, topic: &str, f: impl FnMut(FilterId)) {
        if self.get(number).is_some_and(|filter| filter.root) {
            self.rooted.for_each_match(topic, f);
        }
    }

    /// As filters at the core grow, says which root would spare it most of them.
    pub fn suggest_root(&self) {
        let at_core = self.len().saturating_sub(self.rooted.len());
        let known = self.suggest_at.load(Ordering::Relaxed);
        // Beyond that it has been said often enough, and counting takes its time.
        if at_core < known || known > SUGGEST_UNTIL {
            return;
        }
        self.suggest_at.store(at_core * 2, Ordering::Relaxed);
        let (root, filters) = self.best_root();
        if filters * 2 < at_core {
            return;
        }
        tracing::warn!(
            filters = at_core,
            inside = filters,
            "The core holds many filters: upstream.roots = [\"{}\"] would hold most of them as one, and bring all its messages here",
            clean(&root, 256)
        );
    }

    /// The narrowest filter `a/b/#` that most filters at the core lie in, and how many do.
    fn best_root(&self) -> (String, usize) {
        let names = || {
            let own = self
                .all()
                .filter(|f| f.rooted.is_none() && !f.shared && !f.root);
            own.map(|f| &*f.name)
        };
        let mut root = String::new();
        let mut inside = 0;
        loop {
            let mut next: HashMap<&str, usize> = HashMap::new();
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
            // Narrower only while nearly all that it holds stays inside.
            if inside > 0 && count * 10 < inside * 9 {
                break;
            }
            root.push_str(level);
            root.push('/');
            inside = count;
        }
        (root + "#", inside)
    }

    /// Filters below a root with clients that wait for the core's word on it.
    pub fn take_waiting(&mut self, root: FilterId) -> Vec<FilterId> {
        if self.rooted_waiting.is_empty() {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.rooted_waiting);
        let of_it = |n: &FilterId| self.get(*n).is_some_and(|f| f.rooted == Some(root));
        let (mine, others): (Vec<FilterId>, Vec<FilterId>) = all.into_iter().partition(of_it);
        self.rooted_waiting = others.into_iter().collect();
        mine
    }
}
