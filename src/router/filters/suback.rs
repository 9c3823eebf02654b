//! The broker's answers to our SUBSCRIBEs and UNSUBSCRIBEs, and our own in their place.

use crate::mqtt::{QoS, ReasonCode};
use crate::router::filters::actions::{Actions, Answered, Confirmed, Outcome, Regained};
use crate::router::filters::filter::{Filter, SubackOutcome, Unsubacked};
use crate::router::filters::table::Table;
use crate::router::filters::{Filters, LOG_INTERVAL};
use crate::telemetry::{RateLimited, clean, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

static REFUSED: RateLimited = RateLimited::new(LOG_INTERVAL);

impl Filters {
    /// The broker's SUBACK for a filter.
    pub(crate) fn suback(&self, id: FilterId, code: ReasonCode, now: Millis) -> Actions {
        let mut table = self.write();
        let mut actions = Actions::default();
        let regained = table.regain(id);
        let Some(filter) = table.get_mut(id) else {
            return actions;
        };
        let (mut again, mut presumed, mut answered) = (false, false, QoS::ExactlyOnce);
        let mut refused = None;
        match filter.suback(code) {
            SubackOutcome::Stray => return actions,
            SubackOutcome::Refused => refused = Some(filter.name().clone()),
            SubackOutcome::Granted {
                asked,
                again: more,
                presumed: before,
            } => (answered, again, presumed) = (asked, more, before),
        }
        if again && let Some(link) = filter.link() {
            table.subscribe_queue[link].push_back(id);
            actions.wake.insert(link);
        }
        let has_below = |f: &Filter| f.is_root() || !f.groups().is_empty();
        let waiting = match !again && table.get(id).is_some_and(has_below) {
            true => table.take_awaiting_root(id),
            false => Vec::new(),
        };
        let outcome = table.outcome(id, answered, presumed, code);
        actions.outcomes.push(outcome);
        for below in waiting {
            let presumed = table.get_mut(below).is_some_and(Filter::root_answered);
            let outcome = table.outcome(below, QoS::ExactlyOnce, presumed, code);
            actions.outcomes.push(outcome);
        }
        if !code.is_error() {
            // Cached retained messages may be older than messages that were missed until now.
            actions.forget_retained = table.below(id).chain([id]).collect();
            actions.regained = regained.then(|| table.regained(id));
        }
        drop(table);
        if let Some(name) = refused
            && let Some(suppressed) = REFUSED.permit(now)
        {
            tracing::warn!(
                filter = %clean(&name, 256),
                reason = code.name(),
                suppressed,
                "The broker refused a filter"
            );
        }
        actions
    }

    /// The broker's UNSUBACK for a filter. A filter that is used again meanwhile is subscribed again.
    pub(crate) fn unsuback(&self, id: FilterId, now: Millis) -> Actions {
        let mut actions = Actions::default();
        let mut table = self.write();
        let Some(filter) = table.get_mut(id) else {
            return actions;
        };
        match filter.unsuback() {
            Unsubacked::Stray => {}
            Unsubacked::Again(qos) => {
                actions.wake.extend(filter.link());
                table.request(id, qos);
            }
            Unsubacked::Remove => {
                table.remove(id, now);
                actions.forget_retained.push(id);
            }
        }
        actions
    }

    /// The next SUBSCRIBEs that have waited long enough for the broker. They are granted if the broker
    /// has granted the filter, or if `accept` is set; the messages until the broker has it are missed.
    pub(crate) fn next_late(&self, accept: bool, now: Millis) -> Option<Answered> {
        loop {
            let mut table = self.write();
            let &(deadline, id) = table.deadlines.first()?;
            if deadline > now {
                return None;
            }
            table.deadlines.remove(&(deadline, id));
            let source = table.source(id);
            let active = table.get(source).filter(|f| f.is_active());
            let active = active.map(Filter::granted);
            let mut grants = Vec::new();
            if let Some(filter) = table.get_mut(id) {
                grants = filter.take_late(now);
                if active.is_none() && accept {
                    filter.presume();
                    if source != id {
                        table.awaiting_root.insert(id);
                    }
                }
            }
            drop(table);
            if grants.is_empty() {
                continue;
            }
            let code = match (active, accept) {
                (Some(granted), _) => ReasonCode(granted as u8),
                (None, true) => {
                    metrics().upstream_gaps.increment(1);
                    tracing::warn!(
                        clients = grants.len(),
                        "The broker did not answer a SUBSCRIBE in time; it is granted, and messages until the broker has the filter are missed"
                    );
                    ReasonCode::GRANTED_QOS_2
                }
                (None, false) => ReasonCode::UNSPECIFIED_ERROR,
            };
            return Some(Answered {
                grants,
                code,
                confirmed: active.is_some(),
            });
        }
    }
}

impl Table {
    /// The broker has answered for a filter. Whether it had lost the filter.
    fn regain(&mut self, id: FilterId) -> bool {
        let regained = self.lost.remove(id);
        if regained {
            let below: Vec<FilterId> = self.below(id).collect();
            self.lost.remove_all(&below);
        }
        regained
    }

    fn regained(&self, id: FilterId) -> Regained {
        // A local group gets no retained messages, and a fetch for it would become a member of it.
        let reads = |f: &Filter| f.mask() != 0 && !f.is_shared();
        let below = |id: FilterId| self.get(id).is_some_and(reads);
        Regained {
            filter: id,
            is_root: self.get(id).is_some_and(Filter::is_root),
            has_readers: below(id) || self.below(id).any(below),
        }
    }

    /// Takes the grants up to `answered` that wait on a filter which has an answer.
    fn outcome(
        &mut self,
        id: FilterId,
        answered: QoS,
        presumed: bool,
        code: ReasonCode,
    ) -> Outcome {
        let confirmed = presumed && !code.is_error();
        Outcome {
            confirmed: confirmed.then(|| Confirmed {
                filter: id,
                mask: self.get(id).map_or(0, Filter::mask),
                granted: QoS::from_u8(code.0).unwrap_or_default(),
            }),
            answered: Answered {
                grants: self.take_answered(id, answered),
                code,
                confirmed: true,
            },
        }
    }
}
