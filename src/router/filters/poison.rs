//! Filters for which the broker ends a link.
//!
//! A broker may close the connection instead of refusing a SUBSCRIBE. Filters whose SUBSCRIBE had no
//! answer when that happened are suspects. They wait behind all others, and are tried in small groups,
//! then alone. A filter that is alone when the link ends again is quarantined: its clients are refused,
//! and for a while the broker is not asked for it. Meanwhile these clients' other new filters are
//! refused for a short time, and then tried alone at once, so that nobody can end the link often.

use crate::mqtt::ReasonCode;
use crate::router::filters::Filters;
use crate::router::filters::actions::Actions;
use crate::router::filters::filter::Phase;
use crate::router::filters::links::UpstreamSubscribe;
use crate::router::filters::table::Table;
use crate::router::types::SessionRef;
use crate::telemetry::{clean, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

/// A suspect that is alone when the link ends for this time is the reason.
const ENDS_MAX: u8 = 2;
/// Suspects are tried in so many groups at first.
const GROUPS: usize = 16;

impl Table {
    /// A client waits for a filter that the broker does not have. Whether its client has to be refused,
    /// because filters of it have ended links.
    pub(super) fn is_refused(&mut self, id: FilterId, client: SessionRef, now: Millis) -> bool {
        let Some(filter) = self.get(id).filter(|f| f.phase() == Phase::Absent) else {
            return false;
        };
        let known = self.suspects.is_known(filter.name());
        let pauses = self.suspects.pauses(client, now);
        if (known || pauses.is_some())
            && let Some(filter) = self.get_mut(id)
        {
            filter.suspect();
        }
        pauses == Some(true)
    }

    /// Queues a filter for its SUBSCRIBE on a link.
    pub(super) fn queue_subscribe(&mut self, link: usize, id: FilterId) {
        match self.get(id).is_some_and(|f| f.ends() > 0) {
            true => self.suspects.push(link, id),
            false => self.subscribe_queue[link].push_back(id),
        }
        self.mark(id);
    }

    /// Queues a filter for its UNSUBSCRIBE on a link.
    pub(super) fn queue_unsubscribe(&mut self, link: usize, id: FilterId) {
        self.unsubscribe_queue[link].push_back(id);
        self.mark(id);
    }

    /// Takes the suspects that are to be tried on `link` next, while no other SUBSCRIBE is unanswered: a
    /// group of filters that were unanswered once when a link ended, or one that was so more often.
    pub(super) fn take_suspects(&mut self, link: usize) -> Vec<UpstreamSubscribe> {
        let group = (self.suspects.len(link) / GROUPS).max(1);
        let floor = self.floor;
        let mut taken = Vec::new();
        while taken.len() < group
            && let Some(id) = self.suspects.pop(link)
        {
            let Some(often) = self.get(id).map(|f| f.ends() >= ENDS_MAX) else {
                continue;
            };
            if (often && !taken.is_empty()) || !self.may_subscribe(link, id) {
                self.suspects.put_back(link, id);
                break;
            }
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
            if often {
                break;
            }
        }
        metrics().upstream_subscribes.increment(taken.len() as u64);
        taken
    }
}

impl Filters {
    /// The broker has ended a link while the SUBSCRIBEs for these filters had no answer. One that was
    /// alone for the second time is quarantined.
    pub(crate) fn subscribes_ended_link(&self, filters: &[FilterId], now: Millis) -> Actions {
        let mut table = self.write();
        let mut found = None;
        for id in filters {
            if let Some(filter) = table.get_mut(*id) {
                filter.suspect();
                if filters.len() == 1 && filter.ends() >= ENDS_MAX {
                    found = Some((*id, filter.name().clone(), filter.awaiting_clients()));
                }
            }
        }
        let Some((id, name, clients)) = found else {
            return Actions::default();
        };
        table.suspects.quarantine(&name, &clients, now);
        if let Some(filter) = table.get_mut(id) {
            filter.cleared();
        }
        drop(table);
        tracing::error!(
            filter = %clean(&name, 256),
            clients = clients.len(),
            "A filter was quarantined: the broker closed the connection each time it was subscribed"
        );
        self.suback(id, ReasonCode::NOT_AUTHORIZED, now)
    }
}
