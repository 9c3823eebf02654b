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
        if table.move_answered(id, code, &mut actions, now) {
            return actions;
        }
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
            actions.wake.insert(link);
            table.queue_subscribe(link, id);
        }
        table.mark(id);
        if refused.is_some() {
            // The filters inside it are not refused for that. Nothing brought their messages.
            actions.forget_retained = table.below(id);
            let inner = table.place_inner_of_refused(id, now);
            actions.outcomes.extend(inner);
        }
        let waiting = table.take_awaiting_outer(id);
        let outcome = table.outcome(id, answered, presumed, code);
        actions.outcomes.push(outcome);
        let settled = !again && !code.is_error();
        if settled {
            answered = QoS::ExactlyOnce;
        }
        for below in waiting {
            let presumed = table.outer_answered(below, settled);
            let outcome = table.outcome(below, answered, presumed, code);
            actions.outcomes.push(outcome);
            if !settled {
                table.await_outer_again(below);
            }
        }
        if !code.is_error() {
            // Cached retained messages may be older than messages that were missed until now.
            actions.forget_retained = table.below(id);
            actions.forget_retained.push(id);
            actions.regained = regained.then(|| table.regained(id));
        }
        actions.wake |= table.take_woken();
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
        if !table.gave_up(id) {
            table.unsubscribed(id, now, &mut actions);
        }
        actions.wake |= table.take_woken();
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
                        table.awaiting_outer.insert(id);
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
    /// The broker does not have a filter any more that was to be unsubscribed. If it is used again
    /// meanwhile, it is subscribed again: on another link, if it has yielded this one to others.
    pub(super) fn unsubscribed(&mut self, id: FilterId, now: Millis, actions: &mut Actions) {
        let yielded = self.has_yielded(id);
        let has_inner = self.has_inner(id);
        let Some(filter) = self.get_mut(id) else {
            return;
        };
        let wanted = filter.wanted();
        match filter.unsuback() {
            Unsubacked::Stray => {}
            Unsubacked::Again(_) if yielded => {
                // Nothing brought its messages for a while, and there may be no SUBACK to come.
                actions.forget_retained.push(id);
                actions.outcomes.extend(self.place_anew(id, now));
            }
            Unsubacked::Again(qos) => self.request(id, qos),
            // Others have been placed inside it since it yielded.
            Unsubacked::Remove if has_inner && yielded => {
                actions.outcomes.extend(self.place_anew(id, now));
            }
            Unsubacked::Remove if has_inner => self.request(id, wanted),
            Unsubacked::Remove => {
                self.remove(id, now);
                actions.forget_retained.push(id);
            }
        }
    }

    /// The broker has answered for a filter. Whether it had lost the filter.
    fn regain(&mut self, id: FilterId) -> bool {
        let regained = self.lost.remove(id);
        if regained {
            self.lost.remove_all(&self.below(id));
        }
        regained
    }

    fn regained(&self, id: FilterId) -> Regained {
        // A local group gets no retained messages, and a fetch for it would become a member of it.
        let reads = |f: &Filter| f.mask() != 0 && !f.is_shared();
        let below = |id: FilterId| self.get(id).is_some_and(reads);
        Regained {
            filter: id,
            has_inner: self.get(id).is_some_and(Filter::is_root) || self.has_inner(id),
            has_readers: below(id) || self.below(id).into_iter().any(below),
        }
    }

    /// Takes the grants up to `answered` that wait on a filter which has an answer.
    pub(super) fn outcome(
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
