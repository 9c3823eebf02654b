//! SUBSCRIBE and UNSUBSCRIBE of a client.
//!
//! Each filter of a SUBSCRIBE takes these steps; a step works under one lock and gives it back:
//!
//! 1. Shard of the session: find the client's subscriptions that overlap the filter. They decide which
//!    link is best for a new filter, and whose QoS has to rise with this one's.
//! 2. Table of filters: find or add the filter, place it on a link, and count the session's reference.
//!    If the broker has granted the filter, the client is granted it at once, and its overlapping
//!    subscriptions are raised to the QoS.
//! 3. Shard of the session: the subscription joins its session. With a grant it is active from here on,
//!    and the client is answered.
//! 4. Table of filters: without a grant, ask the broker, and let the SUBSCRIBE wait for the SUBACK. With
//!    a grant this step only happens if there is something to do: the subscription replaced another, or
//!    an overlapping one has yet to be raised.
//!
//! So a filter takes the lock of the shard and the lock of the table at most twice each. Three outcomes
//! continue elsewhere: retained messages, which follow the answer, are handed over in `retained`; a
//! SUBSCRIBE whose filter was answered between two steps continues in `suback`, as if it had waited;
//! and a member of a shared subscription joins its group between steps 3 and 4, and is answered after
//! that.

use std::num::NonZeroU32;

use smallvec::SmallVec;

use crate::mqtt::ReasonCode;
use crate::session::{SubscribeRequest, Subscription, Unsubscribed};
use crate::telemetry::{RateLimited, SubscribeRefusedReason, clean, metrics};
use crate::time::Millis;
use crate::topics::{FilterId, has_wildcard, split_shared};

use crate::router::account::Full;
use crate::router::filters::LOG_INTERVAL;
use crate::router::filters::actions::LinkSet;
use crate::router::filters::subscribe::{Admitted, Next, Refusal};
use crate::router::sessions::subscriptions::{Joined, Unjoined};
use crate::router::types::{Answer, PendingGrant, SessionRef, SubscribeRef, Subscriber};
use crate::router::{Caller, Router};

static OVERLAPPING: RateLimited = RateLimited::new(LOG_INTERVAL);
static NO_LOCAL: RateLimited = RateLimited::new(LOG_INTERVAL);
static FULL: RateLimited = RateLimited::new(LOG_INTERVAL);
static OVER_LIMIT: RateLimited = RateLimited::new(LOG_INTERVAL);

/// Bytes of a SUBSCRIBE to the broker beside its filter, at most.
const SUBSCRIBE_OVERHEAD_BYTES: usize = 32;

impl Router {
    /// Adds the subscriptions of one SUBSCRIBE, which its session names by `packet_id`. Filters that the
    /// broker has granted are granted at once; for others the answer follows the broker's.
    pub fn subscribe(
        &self,
        caller: Caller,
        packet_id: u16,
        identifier: Option<NonZeroU32>,
        requests: &[SubscribeRequest],
        now: Millis,
    ) {
        let subscribe = |index| SubscribeRef {
            session: caller.session,
            connection_no: caller.connection_no,
            packet_id,
            index,
        };
        let mut answers: Vec<Answer> = Vec::new();
        let mut wake = LinkSet::default();
        for request in requests {
            let index = request.index;
            let outcome = self.subscribe_to(subscribe(index), identifier, request, &mut wake, now);
            answers.extend(match outcome {
                Ok(None) => None,
                Ok(Some(grant)) => Some(grant.answer()),
                Err(code) => Some(Answer {
                    index,
                    code,
                    retained: None,
                }),
            });
        }
        // Once for all filters, so that a link puts many of them into a packet.
        self.wake_links(wake);
        let due = self.sessions.answer_all(&subscribe(0), &answers);
        self.request_retained(due, now);
    }

    /// Subscribes to one filter. Returns the grant, if the client is still to be told of it. Adds the links
    /// that have something to send to `wake`.
    ///
    /// # Errors
    /// The code of a refusal.
    fn subscribe_to(
        &self,
        subscribe: SubscribeRef,
        identifier: Option<NonZeroU32>,
        request: &SubscribeRequest,
        wake: &mut LinkSet,
        now: Millis,
    ) -> Result<Option<PendingGrant>, ReasonCode> {
        let shared = split_shared(&request.filter).is_some();
        self.check(request, shared, now)?;
        let subscriber = self
            .sessions
            .subscriber(&subscribe, &request.filter, shared);
        let Some(subscriber) = subscriber else {
            return Ok(None);
        };
        let admitted = self
            .admit(&subscribe, request, &subscriber, now)
            .inspect_err(|_| self.end_unserved(&subscribe, &request.filter, now))?;
        *wake |= admitted.wake;
        let filter = admitted.filter;
        let subscription = Subscription {
            filter,
            name: admitted.name.clone(),
            options: request.options,
            asked: request.options.qos,
            identifier,
            active: false,
            overlaps: 0,
            shared,
            wild: has_wildcard(&request.filter),
            wild_below: None,
        };
        let (sessions, grant) = (&self.sessions, admitted.grant);
        let overlapping = &subscriber.overlapping;
        let mut joined = match sessions.join(&subscribe, subscription, grant, overlapping, now) {
            Ok(joined) => joined,
            Err(unjoined) => {
                // This session does not want the filter any more.
                let shard = subscribe.session.shard;
                self.filters.release(&[filter], shard, now);
                return match unjoined {
                    Unjoined::Gone => Ok(None),
                    Unjoined::Full(full) => {
                        let reason = SubscribeRefusedReason::SessionMemory;
                        Err(self.refuse_full(&subscribe, request, (full, reason), now))
                    }
                };
            }
        };
        if shared {
            let (session, incarnation) = (subscribe.session, joined.incarnation);
            self.groups.join(sessions, filter, session, incarnation);
        }
        let pending = PendingGrant {
            subscribe,
            filter,
            incarnation: joined.incarnation,
            qos: grant.map_or(request.options.qos, |g| g.qos),
            granted: grant.is_some(),
            retained: joined.retained,
            wait: joined.wait,
            deadline: now + self.config.subscribe_wait,
        };
        self.request_retained(std::mem::take(&mut joined.due), now);
        Ok(self.settle_join(pending, &admitted, &joined, wake, now))
    }

    /// Refuses filters that the broker cannot have.
    fn check(
        &self,
        request: &SubscribeRequest,
        shared: bool,
        now: Millis,
    ) -> Result<(), ReasonCode> {
        if request.options.no_local && !self.broker.properties() {
            if let Some(suppressed) = NO_LOCAL.permit(now) {
                tracing::warn!(
                    filter = %clean(&request.filter, 256),
                    suppressed,
                    "A No Local subscription was refused: the broker speaks MQTT 3.1.1, so a client's own publishes cannot be told apart"
                );
            }
            count_refused(SubscribeRefusedReason::NotSupported);
            return Err(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
        }
        let bytes = request.filter.len() + SUBSCRIBE_OVERHEAD_BYTES;
        if bytes > self.broker.packet_max() as usize {
            count_refused(SubscribeRefusedReason::TooLarge);
            return Err(ReasonCode::QUOTA_EXCEEDED);
        }
        if shared && !self.shares() {
            count_refused(SubscribeRefusedReason::NotSupported);
            return Err(ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED);
        }
        Ok(())
    }

    fn admit(
        &self,
        subscribe: &SubscribeRef,
        request: &SubscribeRequest,
        subscriber: &Subscriber,
        now: Millis,
    ) -> Result<Admitted, ReasonCode> {
        let (qos, shard) = (request.options.qos, subscribe.session.shard);
        let admitted = self
            .filters
            .admit(&request.filter, qos, shard, subscriber, now);
        match admitted {
            Ok(admitted) => Ok(admitted),
            Err(Refusal::Quarantined) => {
                count_refused(SubscribeRefusedReason::Quarantined);
                Err(ReasonCode::NOT_AUTHORIZED)
            }
            Err(Refusal::Full(full, reason)) => {
                Err(self.refuse_full(subscribe, request, (full, reason), now))
            }
            Err(Refusal::Overlaps(other)) => {
                count_refused(SubscribeRefusedReason::Overlaps);
                if let Some(suppressed) = OVERLAPPING.permit(now) {
                    tracing::warn!(
                        filter = %clean(&request.filter, 256),
                        overlaps = %clean(&other, 256),
                        suppressed,
                        "A SUBSCRIBE was refused: the broker has no working subscription identifiers, and the filter overlaps another one on every data link"
                    );
                }
                Err(ReasonCode::QUOTA_EXCEEDED)
            }
        }
    }

    /// Counts and logs that a limit refuses a filter, or the client's share of it. Returns the reason
    /// code.
    fn refuse_full(
        &self,
        subscribe: &SubscribeRef,
        request: &SubscribeRequest,
        (full, reason): (Full, SubscribeRefusedReason),
        now: Millis,
    ) -> ReasonCode {
        count_refused(reason);
        if let Some(suppressed) = FULL.permit(now) {
            let key = self.sessions.key(subscribe.session);
            let client_id = key.as_ref().map_or("", |key| key.client_id());
            let limit = match reason {
                SubscribeRefusedReason::Filters => "the table of filters is full",
                _ => "memory.sessions is used up: raise it, or end sessions that nobody needs",
            };
            tracing::warn!(
                client_id = clean(client_id, 256),
                filter = %clean(&request.filter, 256),
                used_up = %full,
                suppressed,
                "A SUBSCRIBE was refused: {limit}"
            );
        }
        ReasonCode::QUOTA_EXCEEDED
    }

    /// Counts and logs filters that a session refused because of its client's limits.
    pub(super) fn subscribe_over_limit(&self, session: SessionRef, filters: usize, now: Millis) {
        let reason = SubscribeRefusedReason::ClientLimit;
        metrics().subscribes_refused[reason].increment(filters as u64);
        if let Some(suppressed) = OVER_LIMIT.permit(now) {
            let key = self.sessions.key(session);
            let client_id = key.as_ref().map_or("", |key| key.client_id());
            tracing::warn!(
                client_id = clean(client_id, 256),
                filters,
                suppressed,
                "Filters of a client were refused: it has limits.subscriptions_per_client_max subscriptions, too many bytes of filters, or too many SUBSCRIBEs that wait"
            );
        }
    }

    /// A client is refused a filter. It may have been granted the filter before, without the broker's
    /// answer. That subscription ends if nothing brings its messages: the client does not expect any.
    fn end_unserved(&self, subscribe: &SubscribeRef, filter: &str, now: Millis) {
        if let Some(filter) = self.filters.unserved(filter)
            && self.sessions.end_subscription(subscribe, filter, now)
        {
            let shard = subscribe.session.shard;
            self.retained
                .cancel(subscribe.session, std::iter::once(filter));
            self.filters.release(&[filter], shard, now);
        }
    }

    /// Takes the last step with a subscription that has joined its session. Returns the grant, if the
    /// client is still to be told of it.
    fn settle_join(
        &self,
        pending: PendingGrant,
        admitted: &Admitted,
        joined: &Joined,
        wake: &mut LinkSet,
        now: Millis,
    ) -> Option<PendingGrant> {
        let grant = admitted.grant;
        let complete = grant.is_some_and(|g| g.confirmed && g.behind.is_none());
        if !complete || joined.replaced || !joined.late.is_empty() {
            let (replaced, late) = (joined.replaced, &joined.late);
            let settled = self.filters.joined(&pending, grant, replaced, late, now);
            *wake |= settled.wake;
            if let Some(confirmed) = settled.confirmed {
                self.confirm(confirmed);
            }
            match settled.next {
                Next::Await => return None,
                Next::Answered(answered) => {
                    self.settle_answered(answered, now);
                    return None;
                }
                Next::Answer => {}
            }
        }
        (!joined.answered).then_some(pending)
    }

    /// A client unsubscribed; its session and shard have forgotten the filters already.
    pub fn unsubscribe(&self, session: SessionRef, filters: &[Unsubscribed], now: Millis) {
        self.retained
            .cancel(session, filters.iter().map(|u| u.filter));
        let gone = filters.iter().filter(|u| u.primary_over.is_none());
        let gone: SmallVec<[(SessionRef, FilterId); 8]> =
            gone.map(|u| (session, u.filter)).collect();
        self.filters.unsubscribed(&gone, now);
        if gone.len() < filters.len() {
            self.hand_over(session);
        }
    }
}

fn count_refused(reason: SubscribeRefusedReason) {
    metrics().subscribes_refused[reason].increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{QoS, SubscribeOptions, Version, encode_unsubscribe};
    use crate::router::Connected;
    use crate::router::locks;
    use crate::router::testing;
    use crate::sim::testing::packet_of;

    /// How often the locks of the shard and of the table are taken for this SUBSCRIBE.
    fn locks_of(router: &Router, client: Connected, filter: &str, qos: QoS) -> (usize, usize) {
        let request = SubscribeRequest {
            index: 0,
            filter: filter.into(),
            options: SubscribeOptions {
                qos,
                retain_handling: 2,
                ..SubscribeOptions::default()
            },
        };
        let caller = Caller {
            session: client.session,
            connection_no: client.connection_no,
            publish_link: client.publish_link,
        };
        locks::taken_by(|| router.subscribe(caller, 1, None, &[request], Millis::ZERO))
    }

    fn grant_all(router: &Router) {
        for link in 0..2 {
            for wanted in router.next_subscribes(link, 10) {
                router.suback(wanted.filter, ReasonCode(wanted.qos as u8), Millis::ZERO);
            }
        }
    }

    #[test]
    fn a_filter_takes_the_locks_of_shard_and_table_at_most_twice_each() {
        let router = testing::router();
        let [a, b] = ["a", "b"].map(|id| testing::client(&router, id));
        let qos = QoS::AtLeastOnce;
        assert_eq!(locks_of(&router, a, "x/+", qos), (2, 2), "it is new");
        grant_all(&router);
        assert_eq!(locks_of(&router, b, "x/+", qos), (2, 1), "it is granted");
        assert_eq!(locks_of(&router, b, "x/+", qos), (2, 2), "it is replaced");
        assert_eq!(locks_of(&router, a, "x/1", qos), (2, 2));
        grant_all(&router);
        assert_eq!(
            locks_of(&router, b, "x/1", qos),
            (2, 1),
            "it overlaps another"
        );
        let higher = QoS::ExactlyOnce;
        assert_eq!(locks_of(&router, a, "x/#", higher), (2, 2));
        grant_all(&router);
        let behind = locks_of(&router, b, "x/#", higher);
        assert_eq!(behind, (2, 2), "it waits for an overlapping one");
        let shared = locks_of(&router, a, "$share/g/x", qos);
        assert_eq!(shared, (2, 2), "it joins a group");
    }
    /// A client gives up the filter whose copies it gets, and at once subscribes to more: until the
    /// handover is over it still gets those copies, so the broker is to send them at the new QoS.
    #[test]
    fn a_filter_in_handover_is_raised_to_the_qos_of_an_overlapping_subscription() {
        let router = testing::router();
        let [a, b] = ["a", "b"].map(|id| testing::client(&router, id));
        for filter in ["#", "x/+"] {
            locks_of(&router, a, filter, QoS::ExactlyOnce);
            grant_all(&router);
        }
        for filter in ["x/#", "#"] {
            locks_of(&router, b, filter, QoS::AtLeastOnce);
            grant_all(&router);
        }
        let mut bytes = Vec::new();
        encode_unsubscribe(Version::V5, 2, std::iter::once("x/#"), &mut bytes);
        packet_of(&router, b, &bytes, Millis::ZERO);
        let mut seen = Vec::new();
        router.take_output(b.session, b.connection_no, &mut seen, Millis::ZERO);
        locks_of(&router, b, "x/+", QoS::ExactlyOnce);
        let mut suback = |router: &Router| {
            router.take_output(b.session, b.connection_no, &mut seen, Millis::ZERO);
            seen.first() == Some(&0x90)
        };
        assert!(!suback(&router), "it waits for the other filter");
        let raised = router.next_subscribes(0, 10);
        let raised: Vec<_> = raised.iter().map(|w| (&*w.name, w.qos)).collect();
        assert_eq!(raised, [("x/#", QoS::ExactlyOnce)]);
    }
}
