//! Shared subscriptions of an embedded broker (MQTT 5 §4.8.2).

use slab::Slab;
use smallvec::SmallVec;

use crate::topics::FilterTrie;

use crate::embedded::subscription::Member;

/// All groups, by the filter behind the share name.
#[derive(Default)]
pub(crate) struct SharedGroups {
    trie: FilterTrie<u32>,
    filters: Slab<SharedFilter>,
}

struct SharedFilter {
    name: Box<str>,
    groups: Vec<Group>,
}

struct Group {
    name: Box<str>,
    members: Vec<Member>,
    /// Whose turn it is.
    next: usize,
}

impl SharedGroups {
    /// Adds a member, or replaces its subscription.
    pub(crate) fn join(&mut self, group: &str, filter: &str, member: Member) {
        let at = match self.trie.get(filter) {
            Some(at) => at,
            None => {
                let entry = SharedFilter {
                    name: filter.into(),
                    groups: Vec::new(),
                };
                let at = self.filters.insert(entry) as u32;
                self.trie.insert(filter, at);
                at
            }
        };
        let groups = &mut self.filters[at as usize].groups;
        let known = groups.iter().position(|g| *g.name == *group);
        let index = known.unwrap_or_else(|| {
            groups.push(Group {
                name: group.into(),
                members: Vec::new(),
                next: 0,
            });
            groups.len() - 1
        });
        let members = &mut groups[index].members;
        match members.iter_mut().find(|m| m.session == member.session) {
            Some(old) => *old = member,
            None => members.push(member),
        }
    }

    /// Takes a member out.
    pub(crate) fn leave(&mut self, group: &str, filter: &str, session: u32) {
        let Some(at) = self.trie.get(filter) else {
            return;
        };
        let entry = &mut self.filters[at as usize];
        for of in entry.groups.iter_mut().filter(|g| *g.name == *group) {
            of.members.retain(|m| m.session != session);
        }
        entry.groups.retain(|g| !g.members.is_empty());
        if entry.groups.is_empty() {
            let entry = self.filters.remove(at as usize);
            self.trie.remove(&entry.name);
        }
    }

    /// Picks one member of each group whose filter matches: the next in turn, and a `connected` one
    /// if there is any.
    pub(crate) fn pick(
        &mut self,
        topic: &str,
        connected: impl Fn(u32) -> bool,
    ) -> SmallVec<[Member; 2]> {
        let mut picked = SmallVec::new();
        let filters = &mut self.filters;
        self.trie.for_each_match(topic, |at| {
            for group in &mut filters[at as usize].groups {
                let count = group.members.len();
                let turn = |n: usize| (group.next + n) % count;
                let here = |n: &usize| connected(group.members[turn(*n)].session);
                let at = turn((0..count).find(here).unwrap_or(0));
                group.next = at + 1;
                picked.push(group.members[at]);
            }
        });
        picked
    }
}
