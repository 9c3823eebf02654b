//! The broker's answers to our SUBSCRIBEs, and the clients that wait for them.

use crate::mqtt::{QoS, ReasonCode};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::filters::actions::{Actions, Answered, Confirmed, LinkSet};
use crate::router::sessions::subscriptions::Counts;
use crate::router::types::PendingGrant;

impl Router {
    /// The broker's SUBACK for a filter.
    pub fn suback(&self, filter: FilterId, code: ReasonCode, now: Millis) {
        let actions = self.filters.suback(filter, code, now);
        self.take_actions(actions, now);
    }

    /// The broker's UNSUBACK for a filter.
    pub fn unsuback(&self, filter: FilterId, now: Millis) {
        let actions = self.filters.unsuback(filter, now);
        self.take_actions(actions, now);
    }

    /// Takes the actions that are left after an answer of the broker.
    pub(super) fn take_actions(&self, actions: Actions, now: Millis) {
        self.wake_links(actions.wake);
        if !actions.forget_retained.is_empty() {
            self.retained.forget(actions.forget_retained.into_iter());
        }
        if let Some(regained) = actions.regained {
            if regained.has_readers && self.resyncs() {
                self.retained.resync(regained.filter, regained.has_inner);
            } else {
                self.retained.skip_resync(&self.filters, regained.filter);
            }
        }
        for outcome in actions.outcomes {
            if let Some(confirmed) = outcome.confirmed {
                self.confirm(confirmed);
            }
            self.settle_answered(outcome.answered, now);
        }
    }

    /// Answers the SUBSCRIBEs that have waited long enough for the broker.
    pub(super) fn tick_late(&self, now: Millis) {
        let accept = self.config.subscribe_accept;
        while let Some(answered) = self.filters.next_late(accept, now) {
            self.settle_answered(answered, now);
        }
    }

    /// The broker has granted a filter at last that clients were granted without its answer: their
    /// subscriptions count from now on.
    pub(super) fn confirm(&self, confirmed: Confirmed) {
        let Confirmed {
            filter,
            mask,
            granted,
        } = confirmed;
        for newly in self.sessions.confirm(filter, mask, granted) {
            let (_, wake) = self.filters.raise(&newly.overlapping, newly.qos, None);
            self.wake_links(wake);
        }
    }

    /// Tells the clients that waited for an answer.
    pub(super) fn settle_answered(&self, answered: Answered, now: Millis) {
        let Answered {
            code, confirmed, ..
        } = answered;
        for grant in answered.grants {
            if !grant.granted && code.is_error() {
                let (removed, due) = self.sessions.refuse(&grant, code, now);
                if removed {
                    let shard = grant.subscribe.session.shard;
                    self.retained
                        .cancel(grant.subscribe.session, std::iter::once(grant.filter));
                    self.filters.release(&[grant.filter], shard, now);
                }
                self.request_retained(due, now);
                continue;
            }
            let granted = QoS::from_u8(code.0).unwrap_or_default();
            // A grant that waited for another filter of its client is complete, whatever the answer.
            let counts = match (grant.granted, confirmed) {
                (true, _) => Counts::Already,
                (false, true) => Counts::FromNow {
                    asked: grant.qos,
                    granted,
                },
                (false, false) => Counts::Later,
            };
            let qos = match grant.granted {
                true => grant.qos,
                false => grant.qos.min(granted),
            };
            let grant = PendingGrant {
                qos,
                granted: true,
                ..grant
            };
            let raise = confirmed && grant.deadline > now;
            self.settle_granted(grant, counts, raise, now);
        }
    }

    /// Tells a client that its filter is granted, and gives it the retained messages behind the SUBACK; not
    /// before the broker has granted the client's overlapping filters at this QoS, with `raise`: then the
    /// client has not waited long enough yet.
    fn settle_granted(&self, grant: PendingGrant, counts: Counts, raise: bool, now: Millis) {
        let Some(granted) = self.sessions.grant(&grant, counts, raise, now) else {
            return;
        };
        let grant = PendingGrant {
            wait: granted.wait,
            ..grant
        };
        self.request_retained(granted.due, now);
        if !granted.overlapping.is_empty() {
            let (waits, wake) = self
                .filters
                .raise(&granted.overlapping, grant.qos, Some(grant));
            self.wake_links(wake);
            if !waits {
                let answers = [grant.answer()];
                let due = self.sessions.answer_all(&grant.subscribe, &answers);
                self.request_retained(due, now);
            }
        }
    }

    /// Wakes the tasks of links that have something to send.
    pub(super) fn wake_links(&self, links: LinkSet) {
        for link in links.iter() {
            self.data[link].raise();
        }
    }
}
