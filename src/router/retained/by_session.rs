//! A small map by session.

use std::collections::BTreeMap;

use crate::router::types::SessionRef;

/// A map by session. Most filters have one subscriber while they are fetched: an empty map allocates
/// nothing, and one entry no more than itself.
#[derive(Debug)]
pub(super) struct BySession<T>(Option<Box<Entries<T>>>);

#[derive(Debug)]
enum Entries<T> {
    One(SessionRef, T),
    Many(BTreeMap<SessionRef, T>),
}

impl<T> Default for BySession<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Copy> BySession<T> {
    /// A map of one entry.
    pub(super) fn of(session: SessionRef, value: T) -> Self {
        Self(Some(Box::new(Entries::One(session, value))))
    }

    /// Adds an entry, which takes the place of an earlier one of the session.
    pub(super) fn insert(&mut self, session: SessionRef, value: T) {
        match self.0.as_deref_mut() {
            None => *self = Self::of(session, value),
            Some(Entries::One(of, earlier)) if *of == session => *earlier = value,
            Some(entries @ Entries::One(..)) => {
                if let Entries::One(of, other) = entries {
                    let both = [(*of, *other), (session, value)];
                    *entries = Entries::Many(BTreeMap::from(both));
                }
            }
            Some(Entries::Many(map)) => {
                map.insert(session, value);
            }
        }
    }

    /// Takes out the entry of a session, if there is one.
    pub(super) fn remove(&mut self, session: SessionRef) {
        self.take_where(|of| of == session);
    }

    /// Takes out the entries of the sessions that `f` names.
    pub(super) fn take_where(&mut self, f: impl Fn(SessionRef) -> bool) -> Vec<(SessionRef, T)> {
        let (taken, remains) = match self.0.as_deref_mut() {
            None => return Vec::new(),
            Some(Entries::One(of, _)) if !f(*of) => return Vec::new(),
            Some(Entries::One(of, value)) => (vec![(*of, *value)], false),
            Some(Entries::Many(map)) => {
                let taken = map.extract_if(.., |of, _| f(*of)).collect();
                (taken, !map.is_empty())
            }
        };
        if !remains {
            self.0 = None;
        }
        taken
    }

    /// Adds the entries of another map, which take the place of earlier ones.
    pub(super) fn append(&mut self, other: &mut Self) {
        let added = std::mem::take(other);
        match self.0 {
            None => *self = added,
            Some(_) => added.iter().for_each(|(of, value)| self.insert(of, value)),
        }
    }

    /// Whether a session has an entry.
    pub(super) fn contains(&self, session: SessionRef) -> bool {
        match self.0.as_deref() {
            None => false,
            Some(Entries::One(of, _)) => *of == session,
            Some(Entries::Many(map)) => map.contains_key(&session),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// All entries.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SessionRef, T)> {
        let (one, many) = match self.0.as_deref() {
            None => (None, None),
            Some(Entries::One(of, value)) => (Some((*of, *value)), None),
            Some(Entries::Many(map)) => (None, Some(map)),
        };
        let many = many.into_iter().flatten();
        one.into_iter().chain(many.map(|(of, value)| (*of, *value)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn session(slot: u32) -> SessionRef {
        SessionRef {
            shard: 0,
            slot,
            slot_version: 0,
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0..5u8, 0..4u32, any::<u8>()), 0..40)) {
            let mut map = BySession::default();
            let mut known = BTreeMap::new();
            for (step, slot, value) in steps {
                let of = session(slot);
                match step {
                    0 | 1 => {
                        map.insert(of, value);
                        known.insert(of, value);
                    }
                    2 => {
                        map.remove(of);
                        known.remove(&of);
                    }
                    3 => {
                        let taken = map.take_where(|s| s.slot > slot);
                        let other = known.extract_if(.., |s, _| s.slot > slot);
                        prop_assert!(taken.into_iter().eq(other));
                    }
                    _ => {
                        map.append(&mut BySession::of(of, value));
                        known.insert(of, value);
                    }
                }
                prop_assert_eq!(map.is_empty(), known.is_empty());
                prop_assert_eq!(map.contains(of), known.contains_key(&of));
                prop_assert!(map.iter().eq(known.iter().map(|(of, value)| (*of, *value))));
            }
        }
    }
}
