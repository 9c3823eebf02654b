//! Filters that lie inside another one get a subscription of their own, because nobody uses the outer
//! one any more and it is to be unsubscribed.
//!
//! While both are subscribed, on different links, each message has a copy on each. Exactly one of them
//! is to reach the clients, in the broker's order. So a move takes these steps:
//!
//! 1. The filter is subscribed on its own link. The outer filter goes on bringing the messages; copies
//!    on the own link are dropped.
//! 2. After the SUBACK a barrier on the own link passes. All messages published before it come by the
//!    outer link as well. Copies behind it are kept back, and dropped if the other copy has come.
//! 3. A barrier on the outer link passes, which was asked for after the first: everything published
//!    before it has come. From here on the filter is served by its own link: first the copies that were
//!    kept back, then new ones, except for copies that the outer link brought before.
//! 4. Another barrier on the own link passes: no such copy can follow, and the move is complete.
//!
//! Copies are told apart by content and counted. If there are too many, the move is given up, and tried
//! again later: nothing is lost, because the outer filter is still there.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::mqtt::{QoS, ReasonCode};
use crate::router::filters::Filters;
use crate::router::filters::actions::{Actions, Answered, Confirmed, LinkSet, Outcome, Released};
use crate::router::filters::copies::{Move, Step};
use crate::router::filters::filter::{Filter, LinkSession, Phase, Resumed, SubackOutcome};
use crate::router::filters::table::Table;
use crate::router::types::Arrived;
use crate::time::Millis;
use crate::topics::{FilterId, covers};

/// Filters that move at once.
const MOVES_MAX: usize = 1024;

/// Inner filters that are looked at before the table's lock is given back.
const LOOKED_AT_ONCE: usize = 1024;

/// How long the outer link brings the messages after the first barrier: messages may wait
/// at the broker behind a small window, and come after a barrier.
const OVERLAP: Duration = Duration::from_millis(500);

/// How long the own link's copies are compared after the change, for the same reason.
const COMPARED: Duration = Duration::from_secs(1);

/// How long a change waits if something is not ready yet.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Time between two looks at the inner filters of one that leaves.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a move that was refused or given up is not tried again.
const GIVEN_UP: Duration = Duration::from_secs(60);

impl Table {
    /// Nobody uses `outer`, and filters lie inside it: they get subscriptions of their own, as far as
    /// there are links for them.
    pub(super) fn leave(&mut self, outer: FilterId, now: Millis, released: &mut Released) {
        let leaving = self.leaving.entry(outer).or_default();
        if leaving.look_at > now {
            return;
        }
        leaving.look_at = now + LOOK_EVERY;
        let last = leaving.last.take();
        let inner = self.inner_of.get(&outer).into_iter().flatten();
        let behind = inner.filter(|id| last.is_none_or(|last| **id > last));
        let some: Vec<FilterId> = behind.take(LOOKED_AT_ONCE).copied().collect();
        if some.len() == LOOKED_AT_ONCE
            && let Some(leaving) = self.leaving.get_mut(&outer)
        {
            leaving.last = some.last().copied();
        }
        for id in some {
            let Some(filter) = self.get(id).filter(|_| self.moves.target(id).is_none()) else {
                continue;
            };
            if filter.idle_since().is_some() && !filter.is_awaited() {
                released.forget_retained.push(id);
                self.remove(id, now);
                continue;
            }
            // It moves once the question of its clients is answered.
            let rests = !filter.is_awaited() && !filter.is_presumed();
            let name = filter.name().clone();
            if !rests || self.lost.contains(id) || self.moves.all.len() >= MOVES_MAX {
                continue;
            }
            // A filter inside another one of them goes along with that one.
            let mut goes_along = false;
            self.inner.for_each_cover(&name, |other| {
                let beside = self.get(other).filter(|f| f.source() == Some(outer));
                goes_along |= other != id && beside.is_some_and(|f| f.idle_since().is_none());
            });
            if goes_along {
                continue;
            }
            let link = self.link_for(false, &name, now);
            if let Some(link) = link.or_else(|| self.another_link(false)) {
                self.begin_move(id, outer, link);
            }
        }
        released.wake |= self.take_woken();
    }

    /// If these topics lie inside a moving filter: the filter that still brings its messages. A filter on these
    /// topics goes along with the moving one.
    pub(super) fn outer_of_moving(&self, topics: &str) -> Option<FilterId> {
        let mut found = None;
        let moving = self.moves.all.values().map(|m| usize::from(m.to));
        let links: BTreeSet<usize> = moving.collect();
        for link in links {
            self.tries[link].for_each_cover(topics, |id| {
                let moves_here = self.moves.target(id) == Some(link);
                found = self
                    .moves
                    .all
                    .get(&id)
                    .filter(|_| moves_here)
                    .map(|m| m.outer)
                    .or(found);
            });
        }
        found
    }

    fn begin_move(&mut self, id: FilterId, outer: FilterId, link: usize) {
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        filter.begin_move();
        let name = filter.name().clone();
        self.used.insert(link);
        self.tries[link].insert(&name, id);
        self.subscribe_queue[link].push_back(id);
        self.mark(id);
        self.woken.insert(link);
        let begun = Move {
            outer,
            to: link as u8,
            step: Step::Subscribing,
            copies: Mutex::default(),
            overflow: AtomicBool::new(false),
        };
        self.moves.all.insert(id, begun);
    }

    /// The broker's SUBACK for a filter that moves. False: the filter does not move, or has its own
    /// link already.
    pub(super) fn move_answered(
        &mut self,
        id: FilterId,
        code: ReasonCode,
        actions: &mut Actions,
        now: Millis,
    ) -> bool {
        let Some(link) = self.moves.target(id) else {
            return false;
        };
        let Some(filter) = self.get_mut(id) else {
            return false;
        };
        match filter.suback(code) {
            SubackOutcome::Stray => {}
            SubackOutcome::Refused => {
                self.give_up(id, now);
                self.mark(id);
            }
            SubackOutcome::Granted {
                again, presumed, ..
            } => {
                let mask = filter.mask();
                if again {
                    self.subscribe_queue[link].push_back(id);
                    self.mark(id);
                    self.woken.insert(link);
                }
                if let Some(moving) = self.moves.all.get_mut(&id)
                    && moving.step == Step::Subscribing
                {
                    moving.step = Step::OwnBarrier(None);
                }
                self.mark(id);
                let confirmed = presumed.then(|| Confirmed {
                    filter: id,
                    mask,
                    granted: QoS::from_u8(code.0).unwrap_or_default(),
                });
                if confirmed.is_some() {
                    actions.outcomes.push(Outcome {
                        confirmed,
                        answered: Answered {
                            grants: Vec::new(),
                            code,
                            confirmed: true,
                        },
                    });
                }
            }
        }
        actions.wake |= self.take_woken();
        true
    }

    /// The outer filter stays, for a while at least.
    fn give_up(&mut self, id: FilterId, now: Millis) {
        let Some(moving) = self.moves.all.get_mut(&id) else {
            return;
        };
        let (outer, link) = (moving.outer, usize::from(moving.to));
        moving.step = Step::GivingUp;
        let moving = &self.moves.all[&id];
        self.moves.reset(moving);
        if let Some(leaving) = self.leaving.get_mut(&outer) {
            leaving.look_at = now + GIVEN_UP;
        }
        if self.get_mut(id).is_some_and(Filter::abort_move) {
            self.queue_unsubscribe(link, id);
            self.woken.insert(link);
        } else {
            self.gave_up(id);
        }
    }

    /// The broker does not have the own subscription of a filter whose move was given up. False: the
    /// filter's move was not given up.
    pub(super) fn gave_up(&mut self, id: FilterId) -> bool {
        let moving = self.moves.all.get(&id);
        let Some(moving) = moving.filter(|m| m.step == Step::GivingUp) else {
            return false;
        };
        let (outer, link) = (moving.outer, usize::from(moving.to));
        self.moves.forget(id);
        if let Some(name) = self.name_of(id) {
            self.take_off(link, id, &name);
        }
        if let Some(filter) = self.get_mut(id) {
            filter.place_inside(outer);
        }
        self.mark(id);
        true
    }

    /// A link is connected again: the filters that move to it repeat their requests if necessary.
    pub(super) fn moves_link_up(&mut self, link: usize, session: LinkSession) {
        let to_it = self
            .moves
            .all
            .iter()
            .filter(|(_, m)| usize::from(m.to) == link);
        let ids: Vec<FilterId> = to_it.map(|(id, _)| *id).collect();
        for id in ids {
            let kept = session == LinkSession::Resumed;
            match self.moves.all[&id].step {
                Step::GivingUp if session == LinkSession::New => {
                    self.gave_up(id);
                }
                Step::GivingUp => self.queue_unsubscribe(link, id),
                Step::Draining => {}
                Step::Comparing { .. } if kept => {}
                Step::Comparing { .. } => {
                    self.moves.forget(id);
                }
                Step::Subscribing
                | Step::OwnBarrier(_)
                | Step::Overlapping { .. }
                | Step::OuterBarrier(_) => {
                    let need = self.get_mut(id).map(|f| f.resume(session));
                    if matches!(need, Some(Resumed::Subscribe | Resumed::Regain)) {
                        self.subscribe_queue[link].push_back(id);
                        self.mark(id);
                    }
                    if !kept && let Some(moving) = self.moves.all.get_mut(&id) {
                        moving.step = Step::Subscribing;
                        let moving = &self.moves.all[&id];
                        self.moves.reset(moving);
                    }
                }
            }
        }
    }

    /// Everything that was published before some moment has come by the outer link: from here on the
    /// filter, and those inside it, are served by its own link. False: something is not ready yet.
    fn change_over(&mut self, id: FilterId) -> bool {
        let Some((outer, link)) = self.moves.all.get(&id).map(|m| (m.outer, m.to)) else {
            return false;
        };
        let Some(name) = self.name_of(id) else {
            return false;
        };
        let mut along = Vec::new();
        self.inner.overlaps_any(&name, |other| {
            let beside = self.get(other).filter(|f| f.source() == Some(outer));
            let goes = beside.is_some_and(|f| covers(&name, f.name()));
            if goes && other != id && self.moves.target(other).is_none() {
                along.push(other);
            }
            false
        });
        let of = |id: &FilterId| self.get(*id);
        let wanted = along.iter().filter_map(of).map(Filter::wanted).max();
        let awaited = along
            .iter()
            .filter_map(of)
            .any(|f| f.is_awaited() || f.is_presumed());
        if let Some(wanted) = wanted {
            self.want(id, wanted);
        }
        let ready = self.get(id).is_some_and(|f| {
            f.phase() == Phase::Active { raising: false } && !f.is_awaited() && !f.is_presumed()
        });
        if !ready || awaited || self.lost.contains(id) {
            return false;
        }
        self.inner.remove(&name);
        self.take_inner(outer, id);
        if let Some(filter) = self.get_mut(id) {
            filter.place_on(link);
        }
        for other in along {
            self.take_inner(outer, other);
            self.put_inside(other, id);
        }
        true
    }
}

impl Filters {
    /// Whether filters move.
    pub(crate) fn is_moving(&self) -> bool {
        !self.read().moves.is_empty()
    }

    /// Lets time pass for the filters that move. `ask` asks for a barrier on a link and returns its
    /// number.
    pub(crate) fn tick_moves(&self, now: Millis, ask: impl Fn(usize) -> u64) -> LinkSet {
        if !self.is_moving() {
            return LinkSet::default();
        }
        let mut table = self.write();
        let ids: Vec<FilterId> = table.moves.all.keys().copied().collect();
        for id in ids {
            let Some(moving) = table.moves.all.get(&id) else {
                continue;
            };
            if moving.overflow.swap(false, Ordering::Relaxed) && table.moves.target(id).is_some() {
                table.give_up(id, now);
                continue;
            }
            let (outer, own) = (moving.outer, usize::from(moving.to));
            let step = match moving.step {
                Step::OwnBarrier(None) => Step::OwnBarrier(Some(ask(own))),
                Step::Overlapping { until } if until <= now => {
                    match table.get(outer).and_then(Filter::link) {
                        Some(link) => Step::OuterBarrier(ask(link)),
                        None => continue,
                    }
                }
                Step::Comparing {
                    until,
                    barrier: None,
                } if until <= now => Step::Comparing {
                    until,
                    barrier: Some(ask(own)),
                },
                _ => continue,
            };
            if let Some(moving) = table.moves.all.get_mut(&id) {
                moving.step = step;
            }
        }
        table.take_woken()
    }

    /// A barrier of a link has passed. Returns the filters whose copies that were kept back are to be
    /// delivered now, before anything else of that link.
    pub(crate) fn moves_passed(&self, link: usize, number: u64, now: Millis) -> Vec<FilterId> {
        let mut changed = Vec::new();
        if !self.is_moving() {
            return changed;
        }
        let mut table = self.write();
        let ids: Vec<FilterId> = table.moves.all.keys().copied().collect();
        for id in ids {
            let Some(moving) = table.moves.all.get(&id) else {
                continue;
            };
            let own = usize::from(moving.to) == link;
            let step = match moving.step {
                Step::OwnBarrier(Some(of)) if own && of <= number => Step::Overlapping {
                    until: now + OVERLAP,
                },
                Step::OuterBarrier(of)
                    if of <= number
                        && table.get(moving.outer).and_then(Filter::link) == Some(link) =>
                {
                    match table.change_over(id) {
                        true => {
                            changed.push(id);
                            Step::Draining
                        }
                        false => Step::Overlapping {
                            until: now + RETRY_AFTER,
                        },
                    }
                }
                Step::Comparing {
                    barrier: Some(of), ..
                } if own && of <= number => {
                    table.moves.forget(id);
                    continue;
                }
                _ => continue,
            };
            if let Some(moving) = table.moves.all.get_mut(&id) {
                moving.step = step;
            }
        }
        changed
    }

    /// Takes up to `max` copies of a filter that were kept back; none when all are delivered.
    pub(crate) fn take_kept(&self, id: FilterId, max: usize, now: Millis) -> Vec<Arrived> {
        let mut table = self.write();
        let Some(moving) = table.moves.all.get(&id) else {
            return Vec::new();
        };
        let mut copies = moving.copies.lock();
        let count = copies.kept.len().min(max);
        let kept: Vec<Arrived> = copies.kept.drain(..count).map(|(_, a)| a).collect();
        drop(copies);
        let bytes: usize = kept.iter().map(|a| a.message.size()).sum();
        table.moves.copies.fetch_sub(kept.len(), Ordering::Relaxed);
        table.moves.bytes.fetch_sub(bytes, Ordering::Relaxed);
        if kept.is_empty()
            && let Some(moving) = table.moves.all.get_mut(&id)
        {
            moving.step = Step::Comparing {
                until: now + COMPARED,
                barrier: None,
            };
        }
        kept
    }
}
