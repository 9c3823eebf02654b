//! Roots: filters that the configuration holds at the core for good. A client's filter inside one
//! costs the core nothing; which of them a message is for is found here.

use crate::mqtt::{QoS, covers};

use super::table::{ROOTED, State, Table};

impl Table {
    /// Holds a root from the first connection of its link on.
    pub fn add_root(&mut self, name: &str) {
        let (number, _) = self.intern(name);
        if let Some(filter) = self.get_mut(number) {
            filter.root = true;
            filter.wanted = QoS::ExactlyOnce;
            filter.state = State::Pending;
        }
        self.roots.push(number);
    }

    /// Puts a filter below the root that it lies in, if there is one.
    pub fn take_root(&mut self, number: u32) -> bool {
        let Some(filter) = self.get(number).filter(|f| !f.root && !f.shared) else {
            return false;
        };
        let name = filter.name.clone();
        let inside = |root: &&u32| self.get(**root).is_some_and(|r| covers(&r.name, &name));
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
    pub fn source(&self, number: u32) -> u32 {
        let root = self.get(number).and_then(|f| f.rooted);
        root.unwrap_or(number)
    }

    /// Adds the filters below root `number` that match a topic.
    pub fn match_root(&self, number: u32, topic: &str, f: impl FnMut(u32)) {
        if self.get(number).is_some_and(|filter| filter.root) {
            self.rooted.for_each_match(topic, f);
        }
    }

    /// Filters below a root with clients that wait for the core's word on it.
    pub fn take_waiting(&mut self, root: u32) -> Vec<u32> {
        if self.rooted_waiting.is_empty() {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.rooted_waiting);
        let of_it = |n: &u32| self.get(*n).is_some_and(|f| f.rooted == Some(root));
        let (mine, others): (Vec<u32>, Vec<u32>) = all.into_iter().partition(of_it);
        self.rooted_waiting = others.into_iter().collect();
        mine
    }
}
