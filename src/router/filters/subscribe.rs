//! Subscriptions of clients become references to filters; the first makes a SUBSCRIBE at the
//! core, the last begins its linger.

use std::num::NonZeroU32;

use smallvec::SmallVec;

use crate::mqtt::{QoS, ReasonCode};
use crate::session::{Incarnation, SubscribeRequest, Subscription, Unsubscribed};
use crate::telemetry::{RateLimited, clean};
use crate::time::Millis;
use crate::topics::{FilterId, has_wildcard, overlaps, split_shared};

use crate::router::Router;
use crate::router::filters::filter::Filter;
use crate::router::types::{PendingGrant, Reply, RetainedRequest, SessionRef};

/// Filters known at once, held or lingering.
pub(in crate::router) const FILTERS_MAX: usize = 1_000_000;

static OVERLAPPING: RateLimited = RateLimited::new(LINE_EVERY);
static NO_LOCAL: RateLimited = RateLimited::new(LINE_EVERY);
/// Repeats of a line are counted, not written, for this long.
pub(in crate::router) const LINE_EVERY: std::time::Duration = std::time::Duration::from_secs(1);

impl Router {
    /// Adds the subscriptions of one SUBSCRIBE. Filters that the core holds are granted at once;
    /// for others the answer follows the core's.
    pub fn subscribe(
        &self,
        session: SessionRef,
        connection_no: u64,
        packet_id: u16,
        identifier: Option<NonZeroU32>,
        wanted: &[SubscribeRequest],
        now: Millis,
    ) {
        let mut answers: Vec<(u16, ReasonCode)> = Vec::new();
        let mut granted: Vec<(FilterId, RetainedRequest, Reply)> = Vec::new();
        for want in wanted {
            let options = want.options;
            if options.no_local && !self.broker.properties() {
                if let Some(suppressed) = NO_LOCAL.permit(now) {
                    tracing::warn!(
                    filter = %clean(&want.filter, 256),
                    suppressed,
                    "A No Local subscription was refused: the core speaks MQTT 3.1.1, so a client's own publishes cannot be told apart"
                    );
                }
                answers.push((want.index, ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR));
                continue;
            }
            if self.too_long_or_many(&want.filter) {
                answers.push((want.index, ReasonCode::QUOTA_EXCEEDED));
                continue;
            }
            let shared = split_shared(&want.filter).is_some();
            if shared && !self.shares() {
                let code = ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED;
                answers.push((want.index, code));
                continue;
            }
            let near = match shared {
                true => Vec::new(),
                false => self.overlapping(session, &want.filter),
            };
            let (number, name) = {
                let mut table = self.table.write();
                let (number, name) = table.intern(&want.filter);
                if let Err(other) = table.place(number, self.hash(&want.filter), &near) {
                    if table.get(number).is_some_and(|f| f.mask() == 0) {
                        table.remove(number, now);
                    }
                    drop(table);
                    if let Some(suppressed) = OVERLAPPING.permit(now) {
                        tracing::warn!(
                        filter = %clean(&want.filter, 256),
                        overlaps = %clean(&other, 256),
                        suppressed,
                        "A SUBSCRIBE was refused: the core has no working subscription identifiers, and the filter overlaps one that is held on every data link"
                        );
                    }
                    answers.push((want.index, ReasonCode::QUOTA_EXCEEDED));
                    continue;
                }
                table.reference(number, session.shard);
                (number, name)
            };
            let subscription = Subscription {
                filter: number,
                name,
                options,
                asked: options.qos,
                identifier,
                active: false,
                overlaps: 0,
                shared,
                wild: has_wildcard(&want.filter),
                wild_below: 0,
            };
            let replaced = self.join(session, connection_no, subscription);
            let Some((replaced, incarnation)) = replaced else {
                // The connection is gone; so is the wish.
                let mut table = self.table.write();
                table.unreference(number, session.shard, now);
                continue;
            };
            let mut table = self.table.write();
            if replaced {
                table.unreference(number, session.shard, now);
            }
            // A shared subscription gets none (§4.8.2).
            let retained = !shared
                && (options.retain_handling == 0 || (options.retain_handling == 1 && !replaced));
            let source = table.source(number);
            let Some(filter) = table.get(source) else {
                continue;
            };
            let mut grant = PendingGrant {
                filter: number,
                session,
                incarnation,
                connection_no,
                packet_id,
                index: want.index,
                qos: options.qos,
                granted: false,
                retained,
                deadline: now + self.config.subscribe_wait,
            };
            if filter.grants(options.qos) {
                let qos = filter.grant(options.qos);
                let code = ReasonCode(qos as u8);
                let confirmed = filter.is_confirmed();
                drop(table);
                if confirmed {
                    self.activate(session, number, options.qos, code);
                }
                (grant.qos, grant.granted) = (qos, true);
                let behind = self.raise_overlapping(session, number, qos);
                if behind.is_some_and(|on| self.wait_behind(grant, on)) {
                    continue;
                }
                if retained {
                    let wants = RetainedRequest {
                        session,
                        incarnation,
                        qos,
                        identifier,
                    };
                    let reply = Reply {
                        session,
                        connection_no,
                        packet_id,
                        index: want.index,
                        code,
                    };
                    granted.push((number, wants, reply));
                } else {
                    answers.push((want.index, code));
                }
                continue;
            }
            table.await_suback(number, grant);
            if source != number {
                table.awaiting_root.insert(number);
            }
            // A root is subscribed at the highest QoS.
            table.request(source, options.qos);
            let link = table.get(source).and_then(Filter::link);
            drop(table);
            if let Some(link) = link {
                self.data[link].raise();
            }
        }
        self.sessions
            .answer_subscribe(session, connection_no, packet_id, &answers);
        for (number, wants, reply) in granted {
            self.request_retained(number, wants, reply, now);
        }
    }

    /// The filters of a session that overlap a new one.
    fn overlapping(&self, session: SessionRef, filter: &str) -> Vec<FilterId> {
        if self.config.data_links < 2 {
            return Vec::new();
        }
        let mut shard = self.sessions.shard(session.shard);
        let Some(slot) = shard.get(session) else {
            return Vec::new();
        };
        let wild = has_wildcard(filter);
        let all = slot.session.subscriptions().iter();
        let all = all.filter(|s| !s.shared && (s.wild || wild));
        all.filter(|s| overlaps(&s.name, filter))
            .map(|s| s.filter)
            .collect()
    }

    /// The core would not take its SUBSCRIBE, or there are more filters than are kept.
    fn too_long_or_many(&self, filter: &str) -> bool {
        let packet_max = self.broker.packet_max() as usize;
        if filter.len() + 32 > packet_max {
            return true;
        }
        let table = self.table.read();
        table.len() >= FILTERS_MAX && !table.knows(filter)
    }

    /// Puts a subscription in force for its session. `None`: the connection is gone; else whether
    /// it replaced one on the same filter, and the session's mark.
    fn join(
        &self,
        session: SessionRef,
        connection_no: u64,
        mut new: Subscription,
    ) -> Option<(bool, Incarnation)> {
        let mut shard = self.sessions.shard(session.shard);
        let slot = shard.get(session)?;
        if slot.session.connection_no() != connection_no || slot.session.is_closed() {
            return None;
        }
        let scope = slot.session.connection_ref().and_then(|c| c.scope.as_ref());
        if let Some(scope) = scope {
            new.wild_below = Subscription::wild_below(&new.name, scope.mount.len());
        }
        let filter = new.filter;
        let replaced = slot.session.add_subscription(new).is_some();
        let incarnation = slot.session.incarnation;
        let added = slot.session.subscription(filter).cloned()?;
        if added.shared {
            drop(shard);
            self.groups
                .join(&self.sessions, filter, session, incarnation);
            return Some((replaced, incarnation));
        }
        if added.overlaps > 0 {
            shard.rejoin(session.slot);
        } else {
            shard.join(session.slot, &added);
        }
        Some((replaced, incarnation))
    }

    /// The core holds the filter at this QoS: the subscription counts from here on, at the QoS that
    /// was asked for last. Who asked for `asked` is told no more than that.
    pub(in crate::router) fn activate(
        &self,
        session: SessionRef,
        number: FilterId,
        asked: QoS,
        code: ReasonCode,
    ) {
        let mut shard = self.sessions.shard(session.shard);
        let Some(slot) = shard.get(session) else {
            return;
        };
        slot.session.activate_subscription(number);
        let Some(subscription) = slot.session.subscription(number) else {
            return;
        };
        let granted = QoS::from_u8(code.0).unwrap_or_default();
        if subscription.asked == asked {
            subscription.asked = asked.min(granted);
        }
        subscription.options.qos = subscription.asked.min(granted);
        let subscription = subscription.clone();
        if !subscription.shared {
            shard.join(session.slot, &subscription);
        }
    }

    /// A client unsubscribed; its session and shard have forgotten the filters already.
    pub fn unsubscribe(&self, session: SessionRef, filters: &[Unsubscribed], now: Millis) {
        let gone = filters.iter().filter(|left| left.primary_over.is_empty());
        let gone: SmallVec<[_; 8]> = gone.map(|left| (session, left.filter)).collect();
        self.give_up(&gone, now);
        if gone.len() < filters.len() {
            self.hand_over(session);
        }
    }

    /// Gives back references of clients that unsubscribed: what lingers of them is on their account.
    pub(in crate::router) fn give_up(&self, gone: &[(SessionRef, FilterId)], now: Millis) {
        if gone.is_empty() {
            return;
        }
        let (most, bytes) = (
            self.limits().subscriptions_max,
            self.limits().filter_bytes_max,
        );
        let mut table = self.table.write();
        for (session, filter) in gone {
            table.unreference(*filter, session.shard, now);
            table.charge(*filter, *session, most, bytes);
        }
    }

    /// Gives references back.
    pub(in crate::router) fn release(&self, filters: &[FilterId], shard: u16, now: Millis) {
        if filters.is_empty() {
            return;
        }
        let mut table = self.table.write();
        for filter in filters {
            table.unreference(*filter, shard, now);
        }
    }
}
