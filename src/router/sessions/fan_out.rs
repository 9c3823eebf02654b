//! Deliveries to the sessions of one shard.

use std::num::NonZeroU32;
use std::ops::Range;

use parking_lot::MutexGuard;

use crate::mqtt::{Message, QoS};
use crate::session::{Delivered, Offer, Primary, SessionLimits, hides};
use crate::time::Millis;
use crate::topics::{FilterId, matches};

use crate::router::lost::Loss;
use crate::router::sessions::Sessions;
use crate::router::sessions::came::{Came, Source};
use crate::router::sessions::pass::Pass;
use crate::router::sessions::primaries::{Primaries, Sought};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::tally::Tally;
use crate::router::sessions::waits::offer_in_turn;
use crate::router::types::{Arrived, RetainedRequest, SessionRef};

/// Deliveries, and messages into backlogs and out of them, after which a shard's lock is offered to others.
const CHUNK: usize = 512;

impl Sessions {
    /// Delivers the messages of a batch that a shard may have members for, in order. The shard's lock is
    /// offered to others in between.
    pub(crate) fn fan_out<'a>(
        &self,
        number: u16,
        batch: impl Iterator<Item = &'a Arrived>,
        now: Millis,
        tally: &mut Tally,
    ) {
        let mut shard = self.shard(number);
        let mut known = Primaries::default();
        for arrived in batch {
            let source = match arrived.skipped {
                false => Source::Live(arrived.origin_mark),
                true => Source::Skipped(arrived.origin_mark),
            };
            for filter in &arrived.filters {
                let came = Came {
                    message: &arrived.message,
                    filter: *filter,
                    source,
                    replayed: None,
                    now,
                };
                self.deliver(&mut shard, &came, &mut known, tally);
            }
        }
        self.end_noted(&mut shard, now, tally);
        drop(shard);
        tally.wake();
    }

    /// Delivers a message to the members of one filter in these shards, which are bits.
    pub(crate) fn deliver_to_shards(&self, mut shards: u64, came: &Came<'_>, tally: &mut Tally) {
        while shards != 0 {
            let number = shards.trailing_zeros() as u16;
            shards &= shards - 1;
            let mut shard = self.shard(number);
            self.deliver(&mut shard, came, &mut Primaries::default(), tally);
            self.end_noted(&mut shard, came.now, tally);
        }
    }

    /// Delivers a message to the members of one filter in a shard. Each time enough is done, the lock is
    /// offered to others; then the members may change, and those behind the last one that was visited
    /// are looked up anew.
    fn deliver(
        &self,
        shard: &mut MutexGuard<'_, Shard>,
        came: &Came<'_>,
        known: &mut Primaries,
        tally: &mut Tally,
    ) {
        let mut pass = Pass::default();
        let mut from = Some(0);
        while let Some(slot) = from {
            from = shard.fan_out(&self.limits, came, slot, &mut pass, known, tally);
            tally.targets += known.take_work();
            if tally.targets < CHUNK {
                continue;
            }
            tally.targets = 0;
            known.clear();
            self.charge(shard);
            if from.is_some() {
                shard.backlogs.suspend(came.filter);
            }
            MutexGuard::unlocked_fair(shard, || {
                #[cfg(test)]
                crate::router::locks::count(crate::router::locks::Lock::Shard);
                tally.wake();
                // The caller has locked the retained cache; the next tick enforces the budget.
                if came.source != Source::Fetched {
                    self.enforce_budget(came.now);
                }
            });
            if from.is_some() {
                shard.backlogs.resume(came.filter);
            }
        }
        shard.backlogs.complete();
    }

    /// Ends the sessions whose queue is full, and brings the accounts in line.
    fn end_noted(&self, shard: &mut Shard, now: Millis, tally: &mut Tally) {
        self.charge(shard);
        self.end_all_full(shard, std::mem::take(&mut tally.ended), now);
    }

    /// Ends sessions whose queue is full, named by slot and slot version.
    pub(super) fn end_all_full(&self, shard: &mut Shard, full: Vec<(u32, u32)>, now: Millis) {
        for (at, slot_version) in full {
            let slot = shard.slots.get(at as usize);
            if slot.is_some_and(|s| s.slot_version == slot_version) {
                self.end_full(shard, at, now);
            }
        }
    }
}

impl Shard {
    /// Whether a session gets a topic by a subscription on another filter as well, be it one that it
    /// has just given up.
    pub(crate) fn has_another(
        &mut self,
        session: SessionRef,
        filter: FilterId,
        topic: &str,
    ) -> bool {
        if self.handovers.brings(session.slot, topic) {
            return true;
        }
        let subscriptions = self.get(session).map(|slot| slot.session.subscriptions());
        let mut others = subscriptions.into_iter().flatten();
        others.any(|s| {
            let other = s.filter != filter && s.active && !s.shared;
            other && matches(&s.name, topic) && !s.hides(topic)
        })
    }

    /// Hands a retained message to one new subscription.
    pub(crate) fn hand(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        filter: FilterId,
        request: &RetainedRequest,
        tally: &mut Tally,
    ) {
        if self.get(request.session).is_some() {
            self.wake(request.session.slot, limits);
        }
        let Some((slot, accounts)) = self.with_accounts(request.session) else {
            return;
        };
        // It may have unsubscribed meanwhile, or started anew.
        let same = slot.session.incarnation == request.incarnation;
        let subscription = slot.session.subscription(filter).filter(|_| same);
        if subscription.is_none_or(|s| s.hides(message.topic())) {
            return;
        }
        // The client gets values in the order in which the broker took them. The live message is as new,
        // because fetched ones follow the barrier of their data link.
        if slot.session.defers_retained(message.topic()) {
            return;
        }
        let identifier = request.identifier.map(NonZeroU32::get);
        let qos = request.qos.min(message.qos());
        let stream = slot.session.stream_of(filter);
        let offer = Offer {
            message,
            qos,
            retain: true,
            ids: identifier.as_slice(),
            group: None,
            stream,
            fetched: true,
            position: accounts.position,
        };
        accounts.offer(slot, request.session.slot, limits, now, &offer, tally);
        self.settle(request.session.slot);
    }

    /// Offers a message to members of one filter: from slot `from` on, as many as may be visited before the
    /// lock is offered to others. Returns the slot to go on with, if there are more. Sleepers have live
    /// messages by the backlog and are visited for others only. Members that join or leave meanwhile have
    /// slots of their own, so each member is visited at most once, and each that was there all the time
    /// exactly once. The connections to wake and the sessions to end are added to `tally`.
    pub(super) fn fan_out(
        &mut self,
        limits: &SessionLimits,
        came: &Came<'_>,
        from: u32,
        pass: &mut Pass,
        known: &mut Primaries,
        tally: &mut Tally,
    ) -> Option<u32> {
        if from == 0 {
            tally.targets += self.begin_pass(limits, came, pass);
        }
        let room = CHUNK.saturating_sub(tally.targets).max(1);
        let visited = match came.source {
            // The common case ends where `visit` finds the end.
            Source::Live(_) if self.handovers.is_empty() => from..u32::MAX,
            _ => from..self.end_of_part(came, from, room),
        };
        if !self.handovers.is_empty() {
            // A session that gives up the filter between two parts is visited in either way.
            self.fan_out_unsubscribed(limits, came, visited.clone(), known, tally);
        }
        let next = self.visit(limits, came, (visited, room), pass, known, tally);
        self.fall_asleep(limits, came, pass);
        next
    }

    /// The slot before which a part of a filter's members ends.
    fn end_of_part(&self, came: &Came<'_>, from: u32, room: usize) -> u32 {
        let members = self.members.get(&came.filter);
        let awake = members.and_then(|m| m.part(from..u32::MAX, room).1);
        let asleep = match came.source {
            Source::Live(_) => None,
            _ => self.asleep_from(came.filter, from, room),
        };
        let ends = awake.into_iter().chain(asleep);
        ends.min().unwrap_or(u32::MAX)
    }

    /// Offers a message to the members of one filter in these slots, up to `room` of them. Returns the
    /// slot to go on with, if there are more.
    fn visit(
        &mut self,
        limits: &SessionLimits,
        came: &Came<'_>,
        (visited, room): (Range<u32>, usize),
        pass: &mut Pass,
        known: &mut Primaries,
        tally: &mut Tally,
    ) -> Option<u32> {
        let &Came {
            message,
            filter,
            source,
            replayed,
            now,
        } = came;
        let asleep = self.asleep_in(came, &visited);
        let Self {
            slots,
            members,
            identifiers,
            accounts,
            lost,
            handovers,
            backlogs,
            journal,
            ..
        } = self;
        let end = (visited.end < u32::MAX).then_some(visited.end);
        let Some(members) = members.get(&filter) else {
            return end;
        };
        let (awake, next) = members.part(visited, room);
        let sleepy = backlogs.sleepy(limits, came, pass, members);
        let loss_of = lost.look();
        let is_lost = |filter| loss_of(filter).is_some();
        tally.targets += awake.len() + asleep.len();
        for member in awake.iter().chain(&asleep) {
            let Some(slot) = slots.get_mut(member.slot as usize) else {
                continue;
            };
            let Some(mut qos) = member.qos else {
                continue;
            };
            let own = source.is_own(&slot.session);
            // A topic is checked to be text each time that it is asked for.
            let hidden =
                || member.wild_below.is_some() && hides(member.wild_below, message.topic());
            if member.no_local && own || hidden() {
                continue;
            }
            let mut sleepy = sleepy;
            let mut unlimited = false;
            if let Some(replayed) = replayed {
                let progress = journal.as_ref().and_then(|j| j.progress.get(&member.slot));
                let Some(progress) = progress.filter(|p| p.owes(replayed)) else {
                    continue;
                };
                unlimited = progress.connected;
                sleepy = sleepy.filter(|_| !unlimited);
            }
            if pass.serves(backlogs, handovers, sleepy, (filter, member, slot)) {
                continue;
            }
            let mut retain = member.retain_as_published;
            if member.overlaps {
                let sought = Sought {
                    slot: member.slot,
                    subscriptions: slot.session.subscriptions(),
                    topic: message.topic(),
                    own,
                };
                let primary = primary_by(filter, sought, &loss_of, known, identifiers);
                let Some(primary) = primary else {
                    continue;
                };
                (qos, retain) = (primary.qos, primary.retain);
            }
            // Fetched messages are not copies of messages that the data links bring at that time,
            // so the steps of a handover do not apply.
            if !handovers.is_empty()
                && source != Source::Fetched
                && handovers.gives(member.slot, filter, filter, message, own, is_lost)
                    == Some(false)
            {
                continue;
            }
            if let Source::Skipped(_) = source {
                slot.session.gaps += 1;
                continue;
            }
            let one = member.identifier.map(NonZeroU32::get);
            let offer = Offer {
                message,
                qos: qos.min(message.qos()),
                retain: retain && message.retain(),
                ids: match member.overlaps {
                    true => identifiers,
                    false => one.as_slice(),
                },
                group: None,
                stream: slot.session.stream_of(filter),
                fetched: source == Source::Fetched,
                position: accounts.position,
            };
            if replayed.is_some() && (unlimited || offer.qos == QoS::AtMostOnce) {
                if offer.qos > QoS::AtMostOnce {
                    slot.session.outbound_mut().restore_later(now, &offer);
                }
                continue;
            }
            let at = (member.slot, filter);
            let outcome = match member.waits || member.overlaps {
                true => offer_in_turn(accounts, slot, at, limits, now, &offer, tally),
                false => accounts.offer(slot, member.slot, limits, now, &offer, tally),
            };
            if outcome == Delivered::EndSession {
                tally.ended.push((member.slot, slot.slot_version));
            }
        }
        next.or(end)
    }

    /// Offers a message to sessions in these slots that gave up the filter by which it came, and have
    /// others that match it.
    fn fan_out_unsubscribed(
        &mut self,
        limits: &SessionLimits,
        came: &Came<'_>,
        slots: Range<u32>,
        known: &mut Primaries,
        tally: &mut Tally,
    ) {
        let &Came {
            message,
            filter,
            source,
            replayed: _,
            now,
        } = came;
        let loss_of = self.lost.look();
        let is_lost = |filter| loss_of(filter).is_some();
        let is_gone = |filter| loss_of(filter) == Some(Loss::Sure);
        for at in self.handovers.of(filter) {
            if !slots.contains(&at) {
                continue;
            }
            let Some(slot) = self.slots.get_mut(at as usize) else {
                continue;
            };
            tally.targets += 1;
            let own = source.is_own(&slot.session);
            let sought = Sought {
                slot: at,
                subscriptions: slot.session.subscriptions(),
                topic: message.topic(),
                own,
            };
            let handovers = &mut self.handovers;
            let mut doubted = true;
            let Some(found) = known.filter(sought, doubted, &loss_of) else {
                continue;
            };
            // A session that still has the filter gets its turn with the members.
            if found == filter {
                continue;
            }
            let mut gives = match source {
                // It may be known to be new by this filter only.
                Source::Fetched => Some(handovers.standing_in_for(at, found).contains(&filter)),
                Source::Live(_) | Source::Skipped(_) => {
                    handovers.gives(at, filter, found, message, own, is_lost)
                }
            };
            if gives.is_none()
                && let Some(sure) = known.filter(sought, false, &loss_of)
                && sure != found
            {
                // The broker may have lost the primary filter, or not. If it has not, that filter's
                // copy is still to come, and this one is delivered in its place.
                doubted = false;
                gives = handovers.gives(at, filter, sure, message, own, is_gone);
            }
            if gives != Some(true) {
                continue;
            }
            let whole = known.whole(sought, doubted, &loss_of, &mut self.identifiers);
            let Some(primary) = whole else {
                continue;
            };
            if let Source::Skipped(_) = source {
                slot.session.gaps += 1;
                continue;
            }
            let offer = Offer {
                message,
                qos: primary.qos.min(message.qos()),
                retain: primary.retain && message.retain(),
                ids: &self.identifiers,
                group: None,
                stream: slot.session.stream_of(primary.filter),
                fetched: source == Source::Fetched,
                position: self.accounts.position,
            };
            let (accounts, by) = (&mut self.accounts, (at, primary.filter));
            let outcome = offer_in_turn(accounts, slot, by, limits, now, &offer, tally);
            if outcome == Delivered::EndSession {
                tally.ended.push((at, slot.slot_version));
            }
        }
    }
}

/// A session's primary subscription for a topic, if it is the one on `filter`: then the copy that
/// came by `filter` is the one to deliver. `identifiers` becomes the Subscription Identifiers of all
/// subscriptions that match.
fn primary_by(
    filter: FilterId,
    sought: Sought<'_>,
    loss_of: &impl Fn(FilterId) -> Option<Loss>,
    known: &mut Primaries,
    identifiers: &mut Vec<u32>,
) -> Option<Primary> {
    let mut doubted = true;
    let mut found = known.filter(sought, doubted, loss_of)?;
    if found != filter && loss_of(filter) == Some(Loss::Doubtful) {
        doubted = false;
        found = known.filter(sought, doubted, loss_of)?;
    }
    if found != filter {
        return None;
    }
    known.whole(sought, doubted, loss_of, identifiers)
}

#[cfg(test)]
mod tests;
