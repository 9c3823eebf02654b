//! The links that carry the filters: what they have to send, and what their coming and going means.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::mqtt::{QoS, ReasonCode};
use crate::router::broker::BrokerFeatures;
use crate::router::filters::Filters;
use crate::router::filters::actions::{Actions, Answered};
use crate::router::filters::filter::{Filter, LinkSession, Phase, Resumed};
use crate::router::filters::table::Table;
use crate::router::lost::Loss;
use crate::telemetry::{clean, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

/// A SUBSCRIBE to send to the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSubscribe {
    /// The filter's number, from which its Subscription Identifier follows.
    pub filter: FilterId,
    /// The topic filter.
    pub name: Arc<str>,
    /// The QoS to ask for.
    pub qos: QoS,
}

/// The requests to send on a link now: first the UNSUBSCRIBEs, because a filter may be subscribed in the
/// place of one that it overlaps.
#[derive(Debug, Default)]
pub(crate) struct UpstreamRequests {
    /// The filters to unsubscribe.
    pub unsubscribes: Vec<(FilterId, Arc<str>)>,
    /// The filters to subscribe. None as long as filters wait to be unsubscribed.
    pub subscribes: Vec<UpstreamSubscribe>,
    /// Filters for which the broker may have ended the link. Nothing else is to be sent until the broker
    /// has answered.
    pub suspects: Vec<UpstreamSubscribe>,
}

impl UpstreamRequests {
    /// Whether nothing is to be sent.
    pub(crate) fn is_empty(&self) -> bool {
        self.unsubscribes.is_empty() && self.subscribes.is_empty() && self.suspects.is_empty()
    }
}

/// How long after the broker forgot one link's session the loss of another link may have to do with
/// it: a dead connection is found by an unanswered PINGREQ.
const DOUBT: Duration = Duration::from_secs(30);

/// The filters of a link that is connected again, those inside them included.
#[derive(Debug, Default)]
pub(in crate::router) struct LinkUp {
    /// All filters of the link.
    pub filters: Vec<FilterId>,
    /// Filters that the broker had granted and has lost, or may have.
    pub lost: Vec<FilterId>,
    /// Filters that the broker has kept.
    pub kept: Vec<FilterId>,
    /// What follows for filters that had yielded to others.
    pub actions: Actions,
    /// Shared subscriptions among the lost filters, and local groups that get messages of these.
    pub lost_groups: Vec<FilterId>,
    /// Messages may have been missed.
    pub gap: bool,
}

/// The filters after the broker's features have become known or changed.
#[derive(Debug)]
pub(in crate::router) struct Placed {
    /// Filters were placed before under other features, so all links must begin anew.
    pub changed: bool,
    /// SUBSCRIBEs of clients for filters that the broker cannot serve.
    pub refused: Vec<Answered>,
}

impl Table {
    /// Takes up to `max` filters whose SUBSCRIBE is to be sent on `link` now.
    fn take_subscribes(&mut self, link: usize, max: usize) -> Vec<UpstreamSubscribe> {
        let floor = self.floor;
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(id) = self.subscribe_queue[link].front().copied()
            && self.may_subscribe(link, id)
        {
            self.subscribe_queue[link].pop_front();
            let Some(filter) = self.get_mut(id) else {
                continue;
            };
            if let Some(qos) = filter.subscribe_sent(floor) {
                taken.push(UpstreamSubscribe {
                    filter: id,
                    name: filter.name().clone(),
                    qos,
                });
            }
        }
        metrics().upstream_subscribes.increment(taken.len() as u64);
        taken
    }

    /// Takes up to `max` filters whose UNSUBSCRIBE is to be sent on `link` now.
    fn take_unsubscribes(&mut self, link: usize, max: usize) -> Vec<(FilterId, Arc<str>)> {
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(id) = self.unsubscribe_queue[link].front().copied()
            && self.may_unsubscribe(link, id)
        {
            self.unsubscribe_queue[link].pop_front();
            if let Some(filter) = self.get(id)
                && filter.phase() == Phase::Unsubscribing
            {
                taken.push((id, filter.name().clone()));
            }
        }
        metrics()
            .upstream_unsubscribes
            .increment(taken.len() as u64);
        taken
    }
}

impl Filters {
    /// Places the filters for a broker with these features. `retain_changed`: live messages kept
    /// RETAIN before and do not now, or the reverse. `None`: all filters are where they belong.
    pub(crate) fn place_all(
        &self,
        features: &BrokerFeatures,
        retain_changed: bool,
        now: Millis,
    ) -> Option<Placed> {
        let mut table = self.write();
        table.floor = match features.replaces {
            true => QoS::AtMostOnce,
            false => features.maximum_qos,
        };
        table.keeps_retain = features.keeps_retain;
        if table.identifiers == Some(features.identifiers) && !retain_changed {
            return None;
        }
        let changed = table.identifiers.replace(features.identifiers).is_some();
        if changed {
            tracing::error!(
                identifiers = features.identifiers,
                retain_as_published = features.keeps_retain,
                "The broker changed whether it has subscription identifiers, or whether live messages keep RETAIN; all filters are subscribed anew"
            );
        }
        let mut refused = Vec::new();
        for id in table.unplace_all() {
            let Some(filter) = table.get(id) else {
                continue;
            };
            // All links begin anew: there is nothing to unsubscribe.
            if filter.phase() == Phase::Unsubscribing && !filter.is_wanted() {
                table.remove(id, now);
                continue;
            }
            // A filter of an earlier process takes no link from others before somebody wants it.
            if !features.identifiers && filter.phase() == Phase::Absent && !filter.is_wanted() {
                continue;
            }
            let name = filter.name().clone();
            let code = if filter.is_shared() && !features.shared && !self.config.local_groups {
                ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
            } else if let Err(other) = table.place(id, self.hash(&name), &[], now) {
                tracing::error!(
                    filter = %clean(&name, 256),
                    overlaps = %clean(&other, 256),
                    "A filter cannot be served: the broker has no working subscription identifiers, and the filter overlaps another on every data link"
                );
                ReasonCode::QUOTA_EXCEEDED
            } else {
                table.queue_moved(id);
                if let Some(source) = table.get(id).and_then(Filter::source) {
                    table.ask_again(id, source);
                }
                continue;
            };
            if let Some(filter) = table.get_mut(id) {
                filter.unservable();
            }
            table.mark(id);
            table.lost.remove(id);
            refused.push(Answered {
                grants: table.take_answered(id, QoS::ExactlyOnce),
                code,
                confirmed: false,
            });
        }
        Some(Placed { changed, refused })
    }

    /// Requests for up to `max` filters to send on `link` now. `answered`: no earlier request of the link
    /// waits for the broker, so that suspects may be tried.
    pub(crate) fn next_requests(
        &self,
        link: usize,
        max: usize,
        answered: bool,
    ) -> UpstreamRequests {
        // With one lock: another thread may let a filter yield to another one at any time, and puts both
        // into the queues then.
        let mut table = self.write();
        let unsubscribes = table.take_unsubscribes(link, max);
        let rest = max - unsubscribes.len();
        let subscribes = match table.unsubscribe_queue[link].is_empty() {
            true => table.take_subscribes(link, rest),
            false => Vec::new(),
        };
        let idle = answered && unsubscribes.is_empty() && subscribes.is_empty();
        let suspects = match idle {
            true => table.take_suspects(link),
            false => Vec::new(),
        };
        UpstreamRequests {
            unsubscribes,
            subscribes,
            suspects,
        }
    }

    /// Up to `max` filters whose SUBSCRIBE is to be sent on `link` now.
    pub(crate) fn next_subscribes(&self, link: usize, max: usize) -> Vec<UpstreamSubscribe> {
        self.write().take_subscribes(link, max)
    }

    /// Whether a SUBSCRIBE or an UNSUBSCRIBE may have to be sent on `link`.
    pub(crate) fn has_requests(&self, link: usize) -> bool {
        let table = self.read();
        !table.subscribe_queue[link].is_empty()
            || !table.unsubscribe_queue[link].is_empty()
            || table.suspects.len(link) > 0
    }

    /// Up to `max` filters whose UNSUBSCRIBE is to be sent on `link` now.
    pub(crate) fn next_unsubscribes(&self, link: usize, max: usize) -> Vec<(FilterId, Arc<str>)> {
        self.write().take_unsubscribes(link, max)
    }

    /// A link is connected; `first`: for the first time.
    pub(crate) fn link_up(
        &self,
        link: usize,
        session: LinkSession,
        first: bool,
        now: Millis,
    ) -> LinkUp {
        let resumed = session == LinkSession::Resumed;
        let mut up = LinkUp::default();
        self.up[link].store(true, Ordering::Release);
        let mut table = self.write();
        let first = table.journal_link_up(link, session) && first;
        table.doubted_until[link] = None;
        if session == LinkSession::New && !first {
            self.doubt_others(link, &mut table, now);
        }
        up.filters = table.of_link(link).map(|(id, _)| id).collect();
        table.subscribe_queue[link].clear();
        table.suspects.clear(link);
        let mut new = Vec::new();
        table.unsubscribe_queue[link].clear();
        table.moves_link_up(link, session);
        for id in up.filters.clone() {
            let yielded = table.has_yielded(id);
            let Some(filter) = table.get_mut(id) else {
                continue;
            };
            if yielded {
                // Others have its place on the link.
                match session {
                    LinkSession::New => table.unsubscribed(id, now, &mut up.actions),
                    _ => table.queue_unsubscribe(link, id),
                }
                continue;
            }
            let need = filter.resume(session);
            if resumed && filter.is_active() {
                up.kept.push(id);
            }
            match need {
                Resumed::Rests => {}
                Resumed::Subscribe => new.push(id),
                Resumed::Regain => {
                    up.lost.push(id);
                    table.queue_subscribe(link, id);
                }
                Resumed::Unsubscribe => table.queue_unsubscribe(link, id),
                // Others may have been placed inside it, so that it is subscribed again.
                Resumed::Remove => table.unsubscribed(id, now, &mut up.actions),
            }
        }
        // Behind the filters that the broker is known to grant.
        for id in new {
            table.queue_subscribe(link, id);
        }
        // Even with the session kept, QoS 0 messages of the gap are gone, retained or not.
        up.gap = !first && !resumed && !up.filters.is_empty();
        // The filters inside another one are lost with it.
        for filters in [&mut up.filters, &mut up.lost, &mut up.kept] {
            table.add_below(filters);
        }
        for id in &up.lost {
            if let Some(filter) = table.get(*id) {
                let own = filter.is_shared().then_some(*id);
                up.lost_groups.extend(own.iter().chain(filter.groups()));
            }
        }
        let loss = match session {
            LinkSession::Doubtful => Loss::Doubtful,
            LinkSession::New | LinkSession::Resumed => Loss::Sure,
        };
        for id in &up.lost {
            table.lost.insert(*id, loss);
        }
        up.actions.wake |= table.take_woken();
        // The doubt of the time when the link was away is over.
        table.lost.remove_all(&up.kept);
        up
    }

    /// The broker has forgotten a link's session. It may have forgotten those of other data links too,
    /// if these are away, and copies that arrive meanwhile through filters of this link must not be
    /// dropped for copies of theirs. A link that seems to be up may be dead, and go down soon.
    fn doubt_others(&self, link: usize, table: &mut Table, now: Millis) {
        for other in (0..self.config.links.data_max).filter(|n| *n != link) {
            if self.up[other].load(Ordering::Acquire) {
                table.doubted_until[other] = Some(now + DOUBT);
            } else {
                table.doubt(other);
            }
        }
    }

    /// A link is lost. Returns its filters, those inside them included.
    pub(crate) fn link_down(&self, link: usize, now: Millis) -> Vec<FilterId> {
        self.up[link].store(false, Ordering::Release);
        self.losses.fetch_add(1, Ordering::AcqRel);
        let table = self.write();
        if table.doubted_until[link].is_some_and(|until| now < until) {
            table.doubt(link);
        }
        let mut filters = table.of_link(link).map(|(id, _)| id).collect();
        table.add_below(&mut filters);
        filters
    }

    /// Whether a link is connected.
    pub(crate) fn is_up(&self, link: usize) -> bool {
        self.up[link].load(Ordering::Acquire)
    }

    /// Whether every data link is up and has its filters again: every message that is published now
    /// arrives.
    pub(crate) fn is_complete(&self) -> bool {
        let mut links = self.data_links_used().iter();
        links.all(|link| self.is_up(link)) && self.lost.is_empty()
    }

    /// How often a link was lost: the same number before and after means that the broker was there all
    /// the time.
    pub(crate) fn link_losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    /// A link of any role was lost on which the broker had answered everything.
    pub(crate) fn lost_unprovoked(&self) {
        self.unprovoked.fetch_add(1, Ordering::AcqRel);
    }

    /// How often that happened.
    pub(crate) fn unprovoked_losses(&self) -> u64 {
        self.unprovoked.load(Ordering::Acquire)
    }

    /// Filters on a link.
    pub(crate) fn count_on(&self, link: usize) -> usize {
        let table = self.read();
        let there = table
            .of_link(link)
            .filter(|(_, f)| f.phase() != Phase::Absent);
        there.count() + table.moves.count_to(link)
    }
}

impl Table {
    /// The broker may have forgotten the filters of a link.
    fn doubt(&self, link: usize) {
        let active = self.of_link(link).filter(|(_, f)| f.is_active());
        let mut ids: Vec<FilterId> = active.map(|(id, _)| id).collect();
        self.add_below(&mut ids);
        for id in ids {
            self.lost.insert(id, Loss::Doubtful);
        }
    }
}
