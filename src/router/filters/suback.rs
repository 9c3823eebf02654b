//! The core's answers to our SUBSCRIBEs, and those of clients that wait for them.

use smallvec::SmallVec;

use crate::mqtt::{QoS, ReasonCode};
use crate::telemetry::{RateLimited, clean};
use crate::time::Millis;
use crate::topics::{FilterId, overlaps};

use crate::router::Router;
use crate::router::filters::filter::{Phase, SubackOutcome};
use crate::router::filters::subscribe::LINE_EVERY;
use crate::router::filters::table::Table;
use crate::router::types::{PendingGrant, Reply, RetainedRequest, SessionRef};

static REFUSED: RateLimited = RateLimited::new(LINE_EVERY);

fn filter_has_below(table: &Table, number: FilterId) -> bool {
    table
        .get(number)
        .is_some_and(|f| f.is_root() || !f.groups().is_empty())
}

fn refused(filter: &str, code: ReasonCode, now: Millis) {
    if let Some(suppressed) = REFUSED.permit(now) {
        tracing::warn!(
            filter = %clean(filter, 256),
            reason = code.name(),
            suppressed,
            "The broker refused a filter"
        );
    }
}

impl Router {
    /// Other subscriptions of the client that overlap this one bring its messages as well: the core
    /// is to hold them at its QoS. The last for which that is not answered yet.
    pub(in crate::router) fn raise_overlapping(
        &self,
        session: SessionRef,
        number: FilterId,
        qos: QoS,
    ) -> Option<FilterId> {
        if qos == QoS::AtMostOnce {
            return None;
        }
        let others: Vec<FilterId> = {
            let mut shard = self.sessions.shard(session.shard);
            let session = &mut shard.get(session)?.session;
            let name = match session.subscription(number) {
                Some(s) if s.overlaps > 0 => s.name.clone(),
                _ => return None,
            };
            let all = session.subscriptions().iter();
            let others = all.filter(|s| s.filter != number && s.active && !s.shared);
            let others = others.filter(|s| overlaps(&s.name, &name));
            others.map(|s| s.filter).collect()
        };
        let mut last = None;
        let mut wake: SmallVec<[usize; 4]> = SmallVec::new();
        let mut table = self.table.write();
        for other in others {
            let source = table.source(other);
            let Some(filter) = table.get(source) else {
                continue;
            };
            if filter.wanted() < qos && filter.phase() != Phase::Absent {
                wake.extend(filter.link());
                table.request(source, qos);
            }
            let filter = table.get(source);
            let waits = filter.is_some_and(|f| f.is_rising() && f.granted() < qos);
            // Answers come in order: behind the last there is nothing left to wait for.
            last = waits.then_some(source).or(last);
        }
        drop(table);
        for link in wake {
            self.data[link].raise();
        }
        last
    }

    /// Lets a client's SUBSCRIBE wait for the SUBACK of another filter of the client. False: that
    /// filter has its answer.
    pub(in crate::router) fn wait_behind(&self, grant: PendingGrant, on: FilterId) -> bool {
        let mut table = self.table.write();
        let rising = table.get(on).is_some_and(|f| f.is_rising());
        if rising {
            table.await_suback(on, grant);
        }
        rising
    }

    /// The core's SUBACK for a filter, or our own word in its place.
    pub fn suback(&self, number: FilterId, code: ReasonCode, now: Millis) {
        let mut guessed = false;
        let regained;
        let (waiters, link, below) = {
            let mut table = self.table.write();
            regained = table.lost.remove(number);
            if regained {
                let below: Vec<FilterId> = table.below(number).collect();
                table.lost.remove_all(&below);
            }
            let Some(filter) = table.get_mut(number) else {
                return;
            };
            let mut qos = QoS::ExactlyOnce;
            let mut again = false;
            match filter.suback(code) {
                SubackOutcome::Stray => return,
                SubackOutcome::Refused => refused(filter.name(), code, now),
                SubackOutcome::Granted {
                    asked,
                    again: more,
                    presumed,
                } => (qos, again, guessed) = (asked, more, presumed),
            }
            let link = filter.link().filter(|_| again);
            if let Some(link) = link {
                table.subscribe_queue[link].push_back(number);
            }
            let below = match !again && filter_has_below(&table, number) {
                true => table.take_awaiting_root(number),
                false => Vec::new(),
            };
            (table.take_answered(number, qos), link, below)
        };
        if let Some(link) = link {
            self.data[link].raise();
        }
        if !code.is_error() {
            // What the cache knows may be older than what was missed until now.
            let inside: Vec<FilterId> = self.table.read().below(number).collect();
            self.retained.forget(inside.into_iter().chain([number]));
        }
        if regained && !code.is_error() {
            self.resync_retained(number);
        }
        if guessed {
            self.confirm(number, code);
        }
        self.settle_waiters(number, &waiters, code, true, now);
        for number in below {
            self.root_answered(number, code, now);
        }
    }

    /// The core's word on the root of a filter that clients wait for.
    fn root_answered(&self, number: FilterId, code: ReasonCode, now: Millis) {
        let (waiters, guessed) = {
            let mut table = self.table.write();
            let waiters = table.take_answered(number, QoS::ExactlyOnce);
            let filter = table.get_mut(number);
            (waiters, filter.is_some_and(|f| f.root_answered()))
        };
        if guessed && !code.is_error() {
            self.confirm(number, code);
        }
        self.settle_waiters(number, &waiters, code, true, now);
    }

    /// The core has a filter at last that clients were granted without it.
    fn confirm(&self, number: FilterId, code: ReasonCode) {
        let mask = self.table.read().get(number).map_or(0, |f| f.mask());
        let granted = QoS::from_u8(code.0).unwrap_or_default();
        let mut newly = Vec::new();
        for shard in self.sessions.shards().filter(|n| mask & (1 << n) != 0) {
            let mut shard = self.sessions.shard(shard);
            shard.confirm(number, granted, &mut newly);
        }
        for (session, qos) in newly {
            self.raise_overlapping(session, number, qos);
        }
    }

    /// Tells those who waited. A refusal takes their subscription away. Not `confirmed`: the core
    /// has not said it.
    pub(in crate::router) fn settle_waiters(
        &self,
        number: FilterId,
        waiters: &[PendingGrant],
        code: ReasonCode,
        confirmed: bool,
        now: Millis,
    ) {
        for waiter in waiters {
            if !self.is_of(waiter) {
                continue;
            }
            // Its own filter was granted before; what held it back is over, one way or another.
            if waiter.granted {
                let granted = ReasonCode(waiter.qos as u8);
                self.settle_waiter(waiter.filter, waiter, granted, confirmed, now);
                continue;
            }
            if code.is_error() {
                let removed = {
                    let mut shard = self.sessions.shard(waiter.session.shard);
                    let removed = match shard.get(waiter.session) {
                        Some(slot) => slot.session.remove_subscription(number).is_some(),
                        None => false,
                    };
                    if removed {
                        shard.leave(waiter.session.slot, number);
                    }
                    removed
                };
                if removed {
                    self.release(&[number], waiter.session.shard, now);
                }
                self.sessions.answer_subscribe(
                    waiter.session,
                    waiter.connection_no,
                    waiter.packet_id,
                    &[(waiter.index, code)],
                );
                continue;
            }
            let granted = ReasonCode(code.0.min(waiter.qos as u8));
            if confirmed {
                self.activate(waiter.session, number, waiter.qos, code);
            }
            self.settle_waiter(number, waiter, granted, confirmed, now);
        }
    }

    /// Tells one that waited what it is granted, and gives it the retained messages; not before
    /// its overlapping filters are held at this QoS.
    fn settle_waiter(
        &self,
        number: FilterId,
        waiter: &PendingGrant,
        granted: ReasonCode,
        confirmed: bool,
        now: Millis,
    ) {
        let qos = QoS::from_u8(granted.0).unwrap_or_default();
        if confirmed && waiter.deadline > now {
            let behind = self.raise_overlapping(waiter.session, number, qos);
            let waits = PendingGrant {
                granted: true,
                qos,
                ..*waiter
            };
            if behind.is_some_and(|on| self.wait_behind(waits, on)) {
                return;
            }
        }
        let identifier = {
            let mut shard = self.sessions.shard(waiter.session.shard);
            let slot = shard.get(waiter.session).filter(|_| waiter.retained);
            slot.and_then(|s| s.session.subscription(number))
                .map(|s| s.identifier)
        };
        let PendingGrant {
            session,
            connection_no,
            packet_id,
            index,
            ..
        } = *waiter;
        let Some(identifier) = identifier else {
            self.sessions
                .answer_subscribe(session, connection_no, packet_id, &[(index, granted)]);
            return;
        };
        let wants = RetainedRequest {
            session,
            incarnation: waiter.incarnation,
            qos,
            identifier,
        };
        let reply = Reply {
            session,
            connection_no,
            packet_id,
            index,
            code: granted,
        };
        self.request_retained(number, wants, reply, now);
    }

    /// Whether the session that waits is still the same: a clean start keeps its place.
    fn is_of(&self, waiter: &PendingGrant) -> bool {
        let mut shard = self.sessions.shard(waiter.session.shard);
        let slot = shard.get(waiter.session);
        slot.is_some_and(|s| s.session.incarnation == waiter.incarnation)
    }
}
