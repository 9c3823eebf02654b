//! The sessions' part of SUBSCRIBE: subscriptions join their session and begin to count, and clients
//! are answered. Each method takes the lock of the session's shard once.

use std::sync::Arc;

use crate::mqtt::{QoS, ReasonCode};
use crate::session::{
    CloseReason, Incarnation, RetainedDue, SUBSCRIPTION_BYTES, Session, Subscription, WaitNumber,
};
use crate::time::Millis;
use crate::topics::{FilterId, has_wildcard, overlaps};

use crate::router::account::Full;
use crate::router::handle::ConnectionHandle;
use crate::router::sessions::Sessions;
use crate::router::sessions::handover::Handovers;
use crate::router::sessions::members::Members;
use crate::router::sessions::shard::Shard;
use crate::router::sessions::slot::Slot;
use crate::router::types::{
    Answer, Due, Grant, OverlappingFilters, PendingGrant, RetainedRequest, SessionRef,
    SubscribeRef, Subscriber,
};

/// Up to this number, each of a session's subscriptions is looked for alone.
const REJOINED_SINGLY_MAX: usize = 8;

/// A subscription that has joined its session.
#[derive(Debug)]
pub(in crate::router) struct Joined {
    pub incarnation: Incarnation,
    /// It replaced a subscription on the same filter.
    pub replaced: bool,
    /// Retained messages are to follow the SUBACK.
    pub retained: bool,
    /// The wait of its live messages for them.
    pub wait: Option<WaitNumber>,
    /// Retained messages that are to follow now, because the SUBACK is written.
    pub due: Vec<Due>,
    /// Overlapping subscriptions that became active since the filter was admitted.
    pub late: Vec<FilterId>,
    /// The client has been answered.
    pub answered: bool,
}

/// Why a subscription does not join its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Unjoined {
    /// The connection is gone.
    Gone,
    /// The account of sessions has no room, or none for this client.
    Full(Full),
}

/// When a subscription that is granted begins to count.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) enum Counts {
    /// It does already.
    Already,
    /// From now on: the broker has granted `granted` to a client that asked for `asked`.
    FromNow { asked: QoS, granted: QoS },
    /// Once the broker answers. The messages until then are missed, which is a gap of the session.
    Later,
}

/// A filter that was granted to a client.
#[derive(Debug)]
pub(in crate::router) struct Granted {
    /// The client's active subscriptions that overlap it, if they have to be raised: the client has not
    /// been answered.
    pub overlapping: Vec<FilterId>,
    /// The wait of its live messages for the retained ones.
    pub wait: Option<WaitNumber>,
    /// Retained messages that are to follow now, because the SUBACK is written.
    pub due: Vec<Due>,
}

/// A subscription that counts from now on, and overlaps others of its session.
#[derive(Debug)]
pub(in crate::router) struct NewlyActive {
    pub qos: QoS,
    /// The client's other active subscriptions that overlap it.
    pub overlapping: Vec<FilterId>,
}

/// A task to be woken once the shard's lock is given back.
struct Waking {
    handle: Arc<ConnectionHandle>,
    end: Option<CloseReason>,
}

impl Waking {
    fn wake(self) {
        match self.end {
            Some(reason) => self.handle.close(reason),
            None => self.handle.raise(),
        }
    }
}

impl Sessions {
    /// The session that subscribes to a filter, with its subscriptions that overlap the filter. `None`:
    /// the connection is gone.
    pub(crate) fn subscriber(
        &self,
        subscribe: &SubscribeRef,
        filter: &str,
        shared: bool,
    ) -> Option<Subscriber> {
        let mut shard = self.shard(subscribe.session.shard);
        let slot = shard.subscriber(subscribe)?;
        let holder = slot.holder;
        if shared {
            let overlapping = OverlappingFilters::default();
            return Some(Subscriber {
                holder,
                overlapping,
            });
        }
        let wild = has_wildcard(filter);
        let all = slot.session.subscriptions().iter();
        let all = all.filter(|s| !s.shared && (s.wild || wild) && *s.name != *filter);
        let mut found = OverlappingFilters::default();
        for s in all.filter(|s| overlaps(&s.name, filter)) {
            found.all.push(s.filter);
            match s.active {
                true => found.active.push(s.filter),
                false => found.awaiting.push(s.filter),
            }
        }
        let given_up = shard.handovers.overlapping(subscribe.session.slot, filter);
        found.active.extend(given_up);
        Some(Subscriber {
            holder,
            overlapping: found,
        })
    }

    /// Puts a subscription in force for its session. If it has a confirmed grant it is active at once;
    /// if nothing else has to come first, the client is answered. `raised` are the overlapping
    /// subscriptions from before. Where retained messages are to follow, its live messages wait for them
    /// from now on.
    ///
    /// # Errors
    /// [`Unjoined`]; nothing changed.
    pub(crate) fn join(
        &self,
        subscribe: &SubscribeRef,
        mut new: Subscription,
        grant: Option<Grant>,
        raised: &OverlappingFilters,
        now: Millis,
    ) -> Result<Joined, Unjoined> {
        let at = subscribe.session.slot;
        let mut shard = self.shard(subscribe.session.shard);
        shard.subscriber(subscribe).ok_or(Unjoined::Gone)?;
        self.wake(&mut shard, at);
        let slot = shard.subscriber(subscribe).ok_or(Unjoined::Gone)?;
        let room = (self.account.bytes).has_room(slot.holder, SUBSCRIPTION_BYTES as u64);
        if let Err(full) = room
            && slot.session.subscription(new.filter).is_none()
        {
            return Err(Unjoined::Full(full));
        }
        let scope = slot.session.connection_ref().and_then(|c| c.scope.as_ref());
        if let Some(scope) = scope {
            new.wild_below = Subscription::wild_below(&new.name, scope.mount.len());
        }
        let (filter, options, shared) = (new.filter, new.options, new.shared);
        let name = new.name.clone();
        let added = slot.session.add_subscription(new, &raised.all);
        let replaced = added.replaced;
        let incarnation = slot.session.incarnation;
        let mut late = Vec::new();
        if let Some(grant) = grant {
            if grant.confirmed {
                activate(&mut slot.session, filter, options.qos, grant.qos);
            } else if !replaced {
                // Messages until the broker's answer are missed.
                slot.session.gaps += 1;
            }
            if grant.qos > QoS::AtMostOnce && !shared {
                // Other filters cannot have come since, because the client's packets are taken in turn.
                late = slot.session.active_of(&raised.awaiting);
                let given_up = shard.handovers.overlapping(at, &name);
                late.extend(given_up.filter(|id| !raised.active.contains(id)));
            }
        }
        // A shared subscription gets no retained messages (MQTT 5 §4.8.2).
        let retained = !shared
            && (options.retain_handling == 0 || (options.retain_handling == 1 && !replaced));
        let mut joined = Joined {
            incarnation,
            replaced,
            retained,
            wait: None,
            due: Vec::new(),
            late,
            answered: false,
        };
        if !shared {
            shard.rejoin_with(at, filter, &added.newly_overlapping);
        }
        shard.hold(at);
        if retained && grant.is_some() {
            joined.wait = shard.begin_wait(at, filter, now);
        }
        // A member of a group is answered once it has joined the group.
        let complete = grant.filter(|g| g.behind.is_none());
        let complete = complete.filter(|_| !shared && joined.late.is_empty());
        let waking = complete.and_then(|grant| {
            joined.answered = true;
            let answer = Answer {
                index: subscribe.index,
                code: ReasonCode(grant.qos as u8),
                retained: retained.then_some((filter, joined.wait)),
            };
            let session = subscribe.session;
            let slot = shard.slots.get_mut(at as usize)?;
            answer_to(
                slot,
                session,
                subscribe.packet_id,
                &[answer],
                &mut joined.due,
            )
        });
        if joined.answered {
            shard.subscriptions_changed(at);
        }
        drop(shard);
        if let Some(waking) = waking {
            waking.wake();
        }
        Ok(joined)
    }

    /// A client's filter is granted. The client is answered, unless overlapping subscriptions have to be
    /// raised first, with `raise`. `None`: another session has taken the place of this one.
    pub(crate) fn grant(
        &self,
        grant: &PendingGrant,
        counts: Counts,
        raise: bool,
        now: Millis,
    ) -> Option<Granted> {
        let subscribe = &grant.subscribe;
        let at = subscribe.session.slot;
        let mut shard = self.shard(subscribe.session.shard);
        shard.incarnation(grant)?;
        self.wake(&mut shard, at);
        let slot = shard.incarnation(grant)?;
        match counts {
            Counts::Already => {}
            Counts::FromNow { asked, granted } => {
                activate(&mut slot.session, grant.filter, asked, granted);
            }
            Counts::Later => slot.session.gaps += 1,
        }
        let overlapping = match raise {
            true => shard.active_overlapping(at, grant.filter, grant.qos),
            false => Vec::new(),
        };
        if let Counts::FromNow { .. } = counts {
            shard.update_member(at, grant.filter);
        }
        let mut wait = grant.wait;
        let slot = shard.incarnation(grant)?;
        // On a later connection nothing waits, because the SUBACK does not come there.
        if !matches!(counts, Counts::Already)
            && grant.retained
            && slot.session.connection_no() == subscribe.connection_no
        {
            wait = shard.begin_wait(at, grant.filter, now);
        }
        let mut due = Vec::new();
        let mut waking = None;
        if overlapping.is_empty() {
            let answer = Answer {
                index: subscribe.index,
                code: ReasonCode(grant.qos as u8),
                retained: grant.retained.then_some((grant.filter, wait)),
            };
            let slot = shard.incarnation(grant)?;
            waking = answer_on(slot, subscribe, &[answer], &mut due);
        }
        shard.subscriptions_changed(at);
        drop(shard);
        if let Some(waking) = waking {
            waking.wake();
        }
        Some(Granted {
            overlapping,
            wait,
            due,
        })
    }

    /// A client's filter is refused: its subscription goes, and the client is answered. Returns whether
    /// there was a subscription, and the retained messages of other filters that are to follow now.
    pub(crate) fn refuse(
        &self,
        grant: &PendingGrant,
        code: ReasonCode,
        now: Millis,
    ) -> (bool, Vec<Due>) {
        let subscribe = &grant.subscribe;
        let mut due = Vec::new();
        let mut shard = self.shard(subscribe.session.shard);
        if shard.incarnation(grant).is_some() {
            self.wake(&mut shard, subscribe.session.slot);
            self.end_wait_in(&mut shard, subscribe.session.slot, grant.filter, now);
        }
        let Some(slot) = shard.incarnation(grant) else {
            return (false, due);
        };
        let removed = slot.session.remove_subscription(grant.filter).is_some();
        let answer = Answer {
            index: subscribe.index,
            code,
            retained: None,
        };
        let waking = answer_on(slot, subscribe, &[answer], &mut due);
        if removed {
            shard.leave(subscribe.session.slot, grant.filter);
            shard.hold(subscribe.session.slot);
        }
        shard.subscriptions_changed(subscribe.session.slot);
        drop(shard);
        if let Some(waking) = waking {
            waking.wake();
        }
        (removed, due)
    }

    /// Takes away a subscription of the session that sent a SUBSCRIBE. Whether there was one.
    pub(crate) fn end_subscription(
        &self,
        subscribe: &SubscribeRef,
        filter: FilterId,
        now: Millis,
    ) -> bool {
        let mut shard = self.shard(subscribe.session.shard);
        if shard.subscriber(subscribe).is_some() {
            self.wake(&mut shard, subscribe.session.slot);
            self.end_wait_in(&mut shard, subscribe.session.slot, filter, now);
        }
        let slot = shard.subscriber(subscribe);
        let ended = slot.and_then(|slot| slot.session.remove_subscription(filter));
        if ended.is_some() {
            shard.leave(subscribe.session.slot, filter);
            shard.hold(subscribe.session.slot);
            shard.subscriptions_changed(subscribe.session.slot);
        }
        ended.is_some()
    }

    /// Writes the outcome of filters of one SUBSCRIBE. Returns the retained messages that are to follow
    /// now.
    pub(crate) fn answer_all(&self, subscribe: &SubscribeRef, answers: &[Answer]) -> Vec<Due> {
        let mut due = Vec::new();
        if answers.is_empty() {
            return due;
        }
        let mut shard = self.shard(subscribe.session.shard);
        let slot = shard.get(subscribe.session);
        let waking = slot.and_then(|slot| answer_on(slot, subscribe, answers, &mut due));
        shard.subscriptions_changed(subscribe.session.slot);
        drop(shard);
        if let Some(waking) = waking {
            waking.wake();
        }
        due
    }

    /// The broker has confirmed a filter that was granted without its answer: the subscriptions on it
    /// in the shards of `mask` count from now on. Returns the subscriptions that overlap others.
    pub(crate) fn confirm(&self, filter: FilterId, mask: u64, granted: QoS) -> Vec<NewlyActive> {
        let mut newly = Vec::new();
        for number in self.shards().filter(|n| mask & (1 << n) != 0) {
            self.shard(number).confirm(filter, granted, &mut newly);
        }
        newly
    }
}

impl Shard {
    /// The session of a SUBSCRIBE, if the connection that sent it is its current one.
    fn subscriber(&mut self, subscribe: &SubscribeRef) -> Option<&mut Slot> {
        let slot = self.get(subscribe.session)?;
        let current = slot.session.connection_no() == subscribe.connection_no;
        (current && !slot.session.is_closed()).then_some(slot)
    }

    /// The session of a grant, unless a clean start has put another in its place.
    fn incarnation(&mut self, grant: &PendingGrant) -> Option<&mut Slot> {
        self.get(grant.subscribe.session)
            .filter(|slot| slot.session.incarnation == grant.incarnation)
    }

    /// Puts the members in line with a new subscription of a session, and with others whose overlap marks
    /// have changed.
    fn rejoin_with(&mut self, slot: u32, filter: FilterId, marked: &[FilterId]) {
        if marked.len() > REJOINED_SINGLY_MAX {
            return self.rejoin(slot);
        }
        for filter in marked.iter().chain([&filter]) {
            self.update_member(slot, *filter);
        }
    }

    /// Puts the members in line with one subscription of a session.
    fn update_member(&mut self, slot: u32, filter: FilterId) {
        let Self { slots, members, .. } = self;
        let s = slots.get_mut(slot as usize);
        let subscription = s.and_then(|s| s.session.subscription(filter));
        if let Some(subscription) = subscription.filter(|s| !s.shared) {
            members.entry(filter).or_default().join(slot, subscription);
        }
    }

    /// See [`active_overlapping`].
    fn active_overlapping(&self, slot: u32, filter: FilterId, qos: QoS) -> Vec<FilterId> {
        let s = self.slots.get(slot as usize);
        s.map_or_else(Vec::new, |s| {
            active_overlapping(&s.session, &self.handovers, slot, filter, qos)
        })
    }

    fn confirm(&mut self, filter: FilterId, granted: QoS, newly: &mut Vec<NewlyActive>) {
        let Self {
            slots,
            members,
            handovers,
            ..
        } = self;
        for member in (members.get_mut(&filter).into_iter()).flat_map(Members::awake_mut) {
            let Some(slot) = slots.get_mut(member.slot as usize) else {
                continue;
            };
            let newly_active = slot.session.activate_subscription(filter);
            let Some(subscription) = slot.session.subscription(filter) else {
                continue;
            };
            let qos = subscription.asked.min(granted);
            if newly_active || subscription.options.qos < qos {
                subscription.options.qos = qos;
                member.update(subscription);
            }
            let overlapping = match newly_active {
                true => active_overlapping(&slot.session, handovers, member.slot, filter, qos),
                false => Vec::new(),
            };
            if !overlapping.is_empty() {
                newly.push(NewlyActive { qos, overlapping });
            }
        }
    }
}

/// The broker has granted a filter: the subscription counts from here on, at the QoS that was asked
/// for last. A client that asked for `asked` was told no more than `granted`.
fn activate(session: &mut Session, filter: FilterId, asked: QoS, granted: QoS) {
    session.activate_subscription(filter);
    let Some(subscription) = session.subscription(filter) else {
        return;
    };
    if subscription.asked == asked {
        subscription.asked = asked.min(granted);
    }
    subscription.options.qos = subscription.asked.min(granted);
}

/// The filters whose copies a session may get in place of copies of `filter`, if copies of `filter` may come
/// above QoS 0: the active subscriptions that overlap it, and subscriptions that were just given up.
fn active_overlapping(
    session: &Session,
    handovers: &Handovers,
    slot: u32,
    filter: FilterId,
    qos: QoS,
) -> Vec<FilterId> {
    let all = session.subscriptions();
    // From the end: it is one of the latest.
    let own = all.iter().rfind(|s| s.filter == filter && !s.shared);
    let Some(own) = own.filter(|_| qos > QoS::AtMostOnce) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    if own.overlaps > 0 {
        let others = all
            .iter()
            .filter(|s| s.filter != filter && s.active && !s.shared);
        let others = others.filter(|s| overlaps(&s.name, &own.name));
        found.extend(others.map(|s| s.filter));
    }
    found.extend(handovers.overlapping(slot, &own.name));
    found
}

/// Writes the outcome of filters of a SUBSCRIBE, if the connection that sent it is the current one.
/// The retained messages that are to follow now are added to `due`.
fn answer_on(
    slot: &mut Slot,
    subscribe: &SubscribeRef,
    answers: &[Answer],
    due: &mut Vec<Due>,
) -> Option<Waking> {
    let session = subscribe.session;
    // Another connection's SUBSCRIBE may have the same packet identifier.
    if slot.session.connection_no() == subscribe.connection_no {
        return answer_to(slot, session, subscribe.packet_id, answers, due);
    }
    let retained = answers
        .iter()
        .filter_map(|answer| retained_due(slot, answer));
    let retained: Vec<RetainedDue> = retained.collect();
    let incarnation = slot.session.incarnation;
    due.extend(
        retained
            .into_iter()
            .map(|r| request(session, incarnation, r)),
    );
    None
}

/// The request that follows a SUBACK.
pub(super) fn request(session: SessionRef, incarnation: Incarnation, due: RetainedDue) -> Due {
    let request = RetainedRequest {
        session,
        incarnation,
        qos: due.qos,
        identifier: due.identifier,
        wait: due.wait,
    };
    (due.filter, request)
}

fn retained_due(slot: &mut Slot, answer: &Answer) -> Option<RetainedDue> {
    let (filter, wait) = answer.retained?;
    Some(RetainedDue {
        filter,
        qos: QoS::from_u8(answer.code.0)?,
        identifier: slot.session.subscription(filter)?.identifier,
        wait,
    })
}

/// Writes the outcome of filters of a SUBSCRIBE into the connection's output. The retained messages that
/// are to follow now are added to `due`.
fn answer_to(
    slot: &mut Slot,
    session: SessionRef,
    packet_id: u16,
    answers: &[Answer],
    due: &mut Vec<Due>,
) -> Option<Waking> {
    let mut end = None;
    let incarnation = slot.session.incarnation;
    let unanswered = slot.session.subscribes_unanswered();
    for answer in answers {
        let retained = retained_due(slot, answer);
        let (index, code) = (answer.index, answer.code);
        match slot.session.subscribed(packet_id, index, code, retained) {
            Ok(now) => due.extend(now.into_iter().map(|r| request(session, incarnation, r))),
            Err(reason) => end = Some(reason),
        }
    }
    if end.is_none() && slot.session.subscribes_unanswered() == unanswered {
        // Other filters of the SUBSCRIBE are not answered yet.
        return None;
    }
    slot.woken = true;
    let handle = slot.handle.clone()?;
    Some(Waking { handle, end })
}
