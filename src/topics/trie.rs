//! An index of Topic Filters: from a Topic Name, or from another filter, to
//! the values of every stored filter that matches or overlaps it.
//!
//! Levels are interned once, edges live in one flat table keyed by
//! `(parent, level)`, and nodes in one arena, so a stored filter costs a few
//! tens of bytes beside its new level strings. A match walks only the nodes
//! whose whole prefix matches the topic, so filters that do not match add no
//! cost.

use std::num::NonZeroU32;

use crate::hashing::LookUp;
use smallvec::SmallVec;

/// The root of the filters whose first level does not begin with `$`.
const ROOT: NodeId = NodeId::at(0);
/// The root of the filters whose first level begins with `$`. A leading
/// wildcard is stored under `ROOT`, so it can never meet such a topic
/// [MQTT-4.7.2-1].
const DOLLAR_ROOT: NodeId = NodeId::at(1);
/// Tables smaller than this are not worth shrinking.
const SHRINK_FLOOR: usize = 1024;

/// A set of Topic Filters (MQTT 5 §4.7), each with one value.
///
/// Filters are expected to be valid and without a `$share/group/` prefix;
/// their depth is bounded by the caller. An invalid filter never panics. It
/// matches no topic, or only topics that equal its literal levels.
#[derive(Debug, Clone)]
pub struct FilterTrie<T> {
    nodes: Vec<Node<T>>,
    /// Head of the list of unused nodes, chained by `Node::next`.
    free: Option<NodeId>,
    edges: LookUp<(NodeId, LevelId), NodeId>,
    levels: Levels,
    len: usize,
}

impl<T: Copy> FilterTrie<T> {
    /// An empty set, which allocates two nodes.
    pub fn new() -> Self {
        FilterTrie {
            nodes: vec![Node::new(None, None), Node::new(None, None)],
            free: None,
            edges: LookUp::default(),
            levels: Levels::default(),
            len: 0,
        }
    }

    /// Number of stored filters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no filter is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Stores `v` for `filter` and returns the value it replaces.
    pub fn insert(&mut self, filter: &str, v: T) -> Option<T> {
        let (path, multi) = split_multi(filter);
        let mut node = root_of(filter);
        if let Some(path) = path {
            for level in path.split('/') {
                node = self.child_or_insert(node, level);
            }
        }
        let old = self.slot(node, multi).replace(v);
        self.len += usize::from(old.is_none());
        old
    }

    /// Removes `filter` and returns its value.
    pub fn remove(&mut self, filter: &str) -> Option<T> {
        let (path, multi) = split_multi(filter);
        let node = self.find(filter)?;
        let old = self.slot(node, multi).take()?;
        self.len -= 1;
        self.prune(node, path);
        Some(old)
    }

    /// The value of exactly this filter.
    pub fn get(&self, filter: &str) -> Option<T> {
        let node = self.node(self.find(filter)?);
        if split_multi(filter).1 {
            node.multi
        } else {
            node.value
        }
    }

    /// Calls `f` once with the value of each filter that matches `topic`, in
    /// no particular order.
    pub fn for_each_match(&self, topic: &str, mut f: impl FnMut(T)) {
        // All nodes whose path matches the levels read so far.
        let (mut here, mut next) = (Nodes::new(), Nodes::new());
        here.push(root_of(topic));
        for level in topic.split('/') {
            let id = self.levels.get(level);
            self.descend(&mut here, &mut next, id, &mut f);
            if here.is_empty() {
                return;
            }
        }
        for &n in &here {
            let node = self.node(n);
            if let Some(v) = node.value {
                f(v);
            }
            // "a/#" matches its parent "a" too (MQTT 5 §4.7.1.2).
            if let Some(v) = node.multi {
                f(v);
            }
        }
    }

    /// Calls `f` with the value of each stored filter that matches every topic
    /// which `filter` matches, `filter` itself included. Pairs that are equal
    /// only because no topic is empty, such as `#` and `+/#`, may be missed.
    pub fn for_each_cover(&self, filter: &str, mut f: impl FnMut(T)) {
        let (path, multi) = split_multi(filter);
        let (mut here, mut next) = (Nodes::new(), Nodes::new());
        here.push(root_of(filter));
        for level in path.into_iter().flat_map(|p| p.split('/')) {
            let id = match level {
                "+" => None,
                name => self.levels.get(name),
            };
            self.descend(&mut here, &mut next, id, &mut f);
            if here.is_empty() {
                return;
            }
        }
        for &n in &here {
            let node = self.node(n);
            if let Some(v) = node.value.filter(|_| !multi) {
                f(v);
            }
            if let Some(v) = node.multi {
                f(v);
            }
        }
    }

    /// Moves `here` to the nodes one level deeper: the children by `+`, and by `level`, which is `None` where
    /// no filter has such a level. Calls `f` with the values of `#` below the nodes.
    fn descend(
        &self,
        here: &mut Nodes,
        next: &mut Nodes,
        level: Option<LevelId>,
        f: &mut impl FnMut(T),
    ) {
        for &n in here.iter() {
            let node = self.node(n);
            if let Some(v) = node.multi {
                f(v);
            }
            next.extend(node.plus);
            next.extend(self.child(n, level));
        }
        std::mem::swap(here, next);
        next.clear();
    }

    /// Calls `f` with the value of each stored filter that shares at least
    /// one topic with `filter`, `filter` itself included, until `f` returns
    /// true. Returns whether it did.
    pub fn overlaps_any(&self, filter: &str, mut f: impl FnMut(T) -> bool) -> bool {
        let (path, multi) = split_multi(filter);
        let steps: SmallVec<[Step; 16]> = path
            .into_iter()
            .flat_map(|p| p.split('/'))
            .map(|l| {
                if l == "+" {
                    Step::Plus
                } else {
                    Step::Level(self.levels.get(l))
                }
            })
            .collect();
        // "+" and "/#" would meet only in the empty topic, which does not exist
        // [MQTT-4.7.3-1]: the slots where one would find the other.
        let (empty_multi, empty_value) = match filter {
            "+" => (self.child(ROOT, self.levels.get("")), None),
            "/#" => (None, self.node(ROOT).plus),
            _ => (None, None),
        };
        // Children are walked by their sibling links, so the stack is as deep
        // as the trie and not as wide.
        let mut stack: SmallVec<[Visit; 32]> = SmallVec::new();
        stack.push(Visit {
            node: root_of(filter),
            at: 0,
            siblings: false,
        });
        while let Some(Visit {
            node: n,
            at,
            siblings,
        }) = stack.pop()
        {
            let node = self.node(n);
            if siblings && let Some(node) = node.next {
                stack.push(Visit {
                    node,
                    at,
                    siblings: true,
                });
            }
            // A stored `…/#` matches any further levels, and its own prefix too.
            if Some(n) != empty_multi && node.multi.is_some_and(&mut f) {
                return true;
            }
            let step = steps.get(at);
            if step.is_none() {
                if Some(n) != empty_value && node.value.is_some_and(&mut f) {
                    return true;
                }
                if !multi {
                    continue;
                }
            }
            // Below the `#` of `filter` the step stays behind the last one.
            let below = if step.is_some() { at + 1 } else { at };
            if let Some(node) = node.plus {
                stack.push(Visit {
                    node,
                    at: below,
                    siblings: false,
                });
            }
            match step {
                Some(Step::Level(id)) => {
                    if let Some(node) = self.child(n, *id) {
                        stack.push(Visit {
                            node,
                            at: below,
                            siblings: false,
                        });
                    }
                }
                Some(Step::Plus) | None => {
                    if let Some(node) = node.first {
                        stack.push(Visit {
                            node,
                            at: below,
                            siblings: true,
                        });
                    }
                }
            }
        }
        false
    }

    fn node(&self, node: NodeId) -> &Node<T> {
        &self.nodes[node.index()]
    }

    fn node_mut(&mut self, node: NodeId) -> &mut Node<T> {
        &mut self.nodes[node.index()]
    }

    fn slot(&mut self, node: NodeId, multi: bool) -> &mut Option<T> {
        let node = self.node_mut(node);
        if multi {
            &mut node.multi
        } else {
            &mut node.value
        }
    }

    /// The child of `parent` by an interned level. No node has a level that is not interned.
    fn child(&self, parent: NodeId, level: Option<LevelId>) -> Option<NodeId> {
        let level = level?;
        self.node(parent).first?;
        self.edges.get(&(parent, level)).copied()
    }

    fn find(&self, filter: &str) -> Option<NodeId> {
        let mut node = root_of(filter);
        if let (Some(path), _) = split_multi(filter) {
            for level in path.split('/') {
                node = if level == "+" {
                    self.node(node).plus?
                } else {
                    *self.edges.get(&(node, self.levels.get(level)?))?
                };
            }
        }
        Some(node)
    }

    fn child_or_insert(&mut self, parent: NodeId, level: &str) -> NodeId {
        if level == "+" {
            if let Some(plus) = self.node(parent).plus {
                return plus;
            }
            let child = self.alloc(Node::new(Some(parent), None));
            self.node_mut(parent).plus = Some(child);
            return child;
        }
        if let Some(known) = self.child(parent, self.levels.get(level)) {
            return known;
        }
        let id = self.levels.acquire(level);
        let first = self.node(parent).first;
        let mut node = Node::new(Some(parent), Some(id));
        node.next = first;
        let child = self.alloc(node);
        if let Some(first) = first {
            self.node_mut(first).prev = Some(child);
        }
        self.node_mut(parent).first = Some(child);
        self.edges.insert((parent, id), child);
        child
    }

    fn alloc(&mut self, node: Node<T>) -> NodeId {
        let Some(at) = self.free else {
            self.nodes.push(node);
            return NodeId::at(self.nodes.len() as u32 - 1);
        };
        self.free = self.node(at).next;
        *self.node_mut(at) = node;
        at
    }

    /// Frees `node` and its ancestors while they are unused. `path` is
    /// the path of `node`, read from its end for the level names.
    fn prune(&mut self, mut node: NodeId, path: Option<&str>) {
        let mut levels = path.into_iter().flat_map(|p| p.rsplit('/'));
        while let Some(parent) = self.node(node).parent {
            let n = self.node(node);
            if n.value.is_some() || n.multi.is_some() || n.first.is_some() || n.plus.is_some() {
                break;
            }
            let (id, next, prev) = (n.level, n.next, n.prev);
            let level = levels.next().unwrap_or_default();
            match id {
                None => self.node_mut(parent).plus = None,
                Some(id) => {
                    self.edges.remove(&(parent, id));
                    self.levels.release(level);
                    match prev {
                        None => self.node_mut(parent).first = next,
                        Some(prev) => self.node_mut(prev).next = next,
                    }
                    if let Some(next) = next {
                        self.node_mut(next).prev = prev;
                    }
                }
            }
            *self.node_mut(node) = Node {
                next: self.free,
                ..Node::new(None, None)
            };
            self.free = Some(node);
            node = parent;
        }
        self.edges.shrink(SHRINK_FLOOR);
        if self.len == 0 {
            *self = Self::new();
        }
    }
}

impl<T: Copy> Default for FilterTrie<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The nodes whose paths match the same levels.
type Nodes = SmallVec<[NodeId; 16]>;

/// A node's place in the arena. `Option<NodeId>` takes four bytes; a node has many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct NodeId(NonZeroU32);

impl NodeId {
    const fn at(index: u32) -> Self {
        // One more, so that the place 0 is not zero.
        Self(NonZeroU32::MIN.saturating_add(index))
    }

    const fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// The number of an interned level, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LevelId(NonZeroU32);

const _: () = assert!(size_of::<Node<u32>>() == 40);

#[derive(Debug, Clone, Copy)]
struct Node<T> {
    /// Value of the filter that ends here.
    value: Option<T>,
    /// Value of the filter that is this path and `/#`.
    multi: Option<T>,
    /// `None` at a root.
    parent: Option<NodeId>,
    /// Interned level; `None` at a root and at a `+` node.
    level: Option<LevelId>,
    /// The `+` child.
    plus: Option<NodeId>,
    /// The first literal child; `next` and `prev` chain its siblings.
    first: Option<NodeId>,
    next: Option<NodeId>,
    prev: Option<NodeId>,
}

impl<T> Node<T> {
    fn new(parent: Option<NodeId>, level: Option<LevelId>) -> Self {
        Node {
            value: None,
            multi: None,
            parent,
            level,
            plus: None,
            first: None,
            next: None,
            prev: None,
        }
    }
}

/// One level of a filter that is looked for.
enum Step {
    /// `None`: no stored filter has the level.
    Level(Option<LevelId>),
    Plus,
}

struct Visit {
    node: NodeId,
    /// Index of the step that is to match below `node`.
    at: usize,
    /// Whether the siblings that follow are to be visited too.
    siblings: bool,
}

/// Level strings, each stored once and counted by the nodes that bear it.
#[derive(Debug, Clone, Default)]
struct Levels {
    by_name: LookUp<Box<str>, Level>,
    unused: Vec<LevelId>,
    /// How many numbers were given.
    given: u32,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    id: LevelId,
    refs: u32,
}

impl Levels {
    fn get(&self, name: &str) -> Option<LevelId> {
        self.by_name.get(name).map(|l| l.id)
    }

    fn acquire(&mut self, name: &str) -> LevelId {
        if let Some(level) = self.by_name.get_mut(name) {
            level.refs += 1;
            return level.id;
        }
        let id = self.unused.pop().unwrap_or_else(|| {
            let id = LevelId(NonZeroU32::MIN.saturating_add(self.given));
            self.given += 1;
            id
        });
        self.by_name.insert(name.into(), Level { id, refs: 1 });
        id
    }

    fn release(&mut self, name: &str) {
        let Some(level) = self.by_name.get_mut(name) else {
            return;
        };
        level.refs -= 1;
        if level.refs == 0 {
            self.unused.push(level.id);
            self.by_name.remove(name);
            self.by_name.shrink(SHRINK_FLOOR);
        }
    }
}

fn root_of(filter: &str) -> NodeId {
    if filter.starts_with('$') {
        DOLLAR_ROOT
    } else {
        ROOT
    }
}

/// The path before a final `#`, and whether there was one; `None` for `#`
/// alone, whose path has no level at all.
fn split_multi(filter: &str) -> (Option<&str>, bool) {
    match filter.strip_suffix('#') {
        Some("") => (None, true),
        Some(rest) => match rest.strip_suffix('/') {
            Some(path) => (Some(path), true),
            None => (Some(filter), false),
        },
        None => (Some(filter), false),
    }
}

#[cfg(test)]
mod tests;
