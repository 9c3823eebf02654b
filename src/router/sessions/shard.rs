//! A shard: a part of all sessions, and for each filter its members among them.
//!
//! A shard is only touched under its mutex, for a short time, never over an await.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::Arc;

use foldhash::fast::RandomState;
use lru::LruCache;
use slab::Slab;

use crate::mqtt::{Message, QoS};
use crate::session::{
    Delivered, ENTRY_BYTES, Ended, Incarnation, Offer, Session, SessionLimits, Subscription, hides,
    primary,
};
use crate::time::Millis;
use crate::topics::{FilterId, matches};

use crate::router::delivery::fanout::Tally;
use crate::router::filters::lost::{Loss, Lost};
use crate::router::handle::ConnectionHandle;
use crate::router::sessions::handover::Leavers;
use crate::router::sessions::members::Members;
use crate::router::types::{Peer, RetainedRequest, SessionRef};

/// A session and what the router keeps beside it.
#[derive(Debug)]
pub(in crate::router) struct Slot {
    pub slot_version: u32,
    pub session: Session,
    pub handle: Option<Arc<ConnectionHandle>>,
    /// Where the client came from; for the admin API and the log.
    pub peer: Option<Arc<Peer>>,
    /// The wake-up for what waits in the output is under way.
    pub woken: bool,
    /// It is in the order of detached sessions.
    pub listed: bool,
    /// The P link of its publishes.
    pub publish_link: u8,
    /// The timer entry that stands for this session; `u64::MAX`: none.
    armed: u64,
    /// Entries charged to the account.
    charged: usize,
    /// Bytes of output that the connection's task took last, and has perhaps not written yet.
    pub taken: usize,
    /// When it took output of the control stream last, milliseconds, and how many bytes.
    pub taken_at: u64,
    pub offered: usize,
    /// Bytes of output charged to the account.
    charged_output: usize,
}

impl Slot {
    /// What is to be added to the accounts of entries and of output, in bytes.
    fn charge(&mut self) -> (i64, i64) {
        let entries = self.session.outbound().entries();
        let output = match self.session.connection_ref() {
            Some(connection) => connection.output_len() + self.taken,
            None => 0,
        };
        let more = (
            (entries as i64 - self.charged as i64) * ENTRY_BYTES as i64,
            output as i64 - self.charged_output as i64,
        );
        self.charged = entries;
        self.charged_output = output;
        more
    }
}

#[derive(Debug)]
pub(in crate::router) struct Shard {
    pub number: u16,
    pub slots: Slab<Box<Slot>>,
    pub by_id: HashMap<Arc<str>, u32, RandomState>,
    pub members: HashMap<FilterId, Members, RandomState>,
    /// Detached sessions, least recently connected last.
    pub detached: LruCache<u32, u64, RandomState>,
    timers: BTreeSet<(u64, u32)>,
    slot_version: u32,
    /// Bytes of queue entries to add to the account when the lock is given back.
    pub entry_bytes: i64,
    /// The same for output.
    pub output_bytes: i64,
    identifiers: Vec<u32>,
    lost: Arc<Lost>,
    /// Filters that overlapping ones of the same session take over from.
    pub leavers: Leavers,
}

impl Shard {
    pub fn new(number: u16, lost: Arc<Lost>) -> Self {
        Self {
            number,
            slots: Slab::new(),
            by_id: HashMap::default(),
            members: HashMap::default(),
            detached: LruCache::unbounded_with_hasher(RandomState::default()),
            timers: BTreeSet::new(),
            slot_version: 0,
            entry_bytes: 0,
            output_bytes: 0,
            identifiers: Vec::new(),
            lost,
            leavers: Leavers::default(),
        }
    }

    pub fn insert(&mut self, session: Session) -> u32 {
        self.slot_version = self.slot_version.wrapping_add(1);
        let id = session.client_id.clone();
        let slot = self.slots.insert(Box::new(Slot {
            slot_version: self.slot_version,
            session,
            handle: None,
            peer: None,
            woken: false,
            listed: false,
            publish_link: 0,
            armed: u64::MAX,
            charged: 0,
            taken: 0,
            taken_at: 0,
            offered: 0,
            charged_output: 0,
        })) as u32;
        self.by_id.insert(id, slot);
        slot
    }

    pub fn reference(&self, slot: u32) -> SessionRef {
        SessionRef {
            shard: self.number,
            slot,
            slot_version: self.slots[slot as usize].slot_version,
        }
    }

    pub fn get(&mut self, reference: SessionRef) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(reference.slot as usize)?;
        (slot.slot_version == reference.slot_version).then_some(&mut **slot)
    }

    /// Removes a session; its subscriptions must be gone.
    pub fn remove(&mut self, slot: u32) {
        if !self.slots.contains(slot as usize) {
            return;
        }
        let removed = self.slots.remove(slot as usize);
        self.by_id.remove(&removed.session.client_id);
        self.detached.pop(&slot);
        self.timers.remove(&(removed.armed, slot));
        self.entry_bytes -= (removed.charged * ENTRY_BYTES) as i64;
        self.output_bytes -= removed.charged_output as i64;
    }

    /// Brings account and timer in line with the session after it was worked on.
    pub fn settle(&mut self, slot: u32) {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let (entries, output) = s.charge();
        self.entry_bytes += entries;
        self.output_bytes += output;
        // Later deadlines are found when the earlier one fires.
        let deadline = s.session.deadline().unwrap_or(u64::MAX);
        if deadline < s.armed {
            self.timers.remove(&(s.armed, slot));
            s.armed = deadline;
            self.timers.insert((deadline, slot));
        }
    }

    /// The next session whose timer has fired.
    pub fn fired(&mut self, now: Millis) -> Option<u32> {
        let &(at, slot) = self.timers.first()?;
        if at > now {
            return None;
        }
        self.timers.pop_first();
        if let Some(s) = self.slots.get_mut(slot as usize) {
            s.armed = u64::MAX;
        }
        Some(slot)
    }

    /// Puts the members in line with one subscription of a session.
    pub fn join(&mut self, slot: u32, s: &Subscription) {
        self.members.entry(s.filter).or_default().join(slot, s);
    }

    /// The core has a filter: the subscriptions on it that did not count yet do now.
    ///
    /// `newly`: sessions with overlapping filters whose subscription counts from here on.
    pub fn confirm(&mut self, filter: FilterId, granted: QoS, newly: &mut Vec<(SessionRef, QoS)>) {
        let shard = self.number;
        let Self { slots, members, .. } = self;
        for member in (members.get_mut(&filter).into_iter()).flat_map(Members::all_mut) {
            let Some(slot) = slots.get_mut(member.slot as usize) else {
                continue;
            };
            let newly_active = slot.session.activate_subscription(filter);
            let Some(subscription) = slot.session.subscription(filter) else {
                continue;
            };
            let granted = subscription.asked.min(granted);
            if newly_active || subscription.options.qos < granted {
                subscription.options.qos = granted;
                member.qos = Some(granted);
            }
            if newly_active && subscription.overlaps > 0 {
                let reference = SessionRef {
                    shard,
                    slot: member.slot,
                    slot_version: slot.slot_version,
                };
                newly.push((reference, granted));
            }
        }
    }

    /// Takes a session out of a filter's members.
    pub fn leave(&mut self, slot: u32, filter: FilterId) {
        if let Some(members) = self.members.get_mut(&filter) {
            members.leave(slot);
            if members.all().is_empty() {
                self.members.remove(&filter);
            }
        }
    }

    /// Overlap marks may have changed for all of a session's subscriptions.
    pub fn rejoin(&mut self, slot: u32) {
        let Self { slots, members, .. } = self;
        let Some(s) = slots.get(slot as usize) else {
            return;
        };
        for s in s.session.subscriptions().iter().filter(|s| !s.shared) {
            members.entry(s.filter).or_default().join(slot, s);
        }
    }

    /// Takes all subscriptions of a session; returns their filters.
    pub fn release(&mut self, slot: u32) -> Vec<FilterId> {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return Vec::new();
        };
        let taken = s.session.take_subscriptions();
        let mut filters = self.leavers.forget(slot);
        for s in taken {
            self.leave(slot, s.filter);
            filters.push(s.filter);
        }
        filters
    }

    /// After a connection ended: marks the session detached, or removes it.
    pub fn detached(
        &mut self,
        slot: u32,
        ended: &Ended,
        now: Millis,
        remember_until: u64,
    ) -> Vec<FilterId> {
        let Some(s) = self.slots.get_mut(slot as usize) else {
            return Vec::new();
        };
        s.handle = None;
        s.woken = false;
        if !ended.session {
            s.listed = true;
            self.detached.put(slot, now);
            self.settle(slot);
            return Vec::new();
        }
        self.finish(slot, remember_until)
    }

    /// A session ended: its filters; it is remembered while that is of use.
    pub fn finish(&mut self, slot: u32, remember_until: u64) -> Vec<FilterId> {
        let filters = self.release(slot);
        self.detached.pop(&slot);
        match self.slots.get_mut(slot as usize) {
            Some(s) if s.session.worth_remembering() => {
                s.session.remember_until(remember_until);
                self.settle(slot);
            }
            _ => {
                self.settle(slot);
                self.remove(slot);
            }
        }
        filters
    }

    /// Takes a session out of the order in which queues are evicted.
    pub fn unlist(&mut self, slot: u32) {
        self.detached.pop(&slot);
        if let Some(s) = self.slots.get_mut(slot as usize) {
            s.listed = false;
        }
    }

    /// Whether a session gets a topic by a subscription on another filter as well, be it one that it
    /// has just left.
    pub fn has_another(&mut self, session: SessionRef, filter: FilterId, topic: &str) -> bool {
        if self.leavers.brings(session.slot, topic) {
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
    pub fn hand(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        filter: FilterId,
        want: &RetainedRequest,
        tally: &mut Tally,
    ) {
        let Some(slot) = self.get(want.session) else {
            return;
        };
        // It may have unsubscribed meanwhile, or started anew.
        let same = slot.session.incarnation == want.incarnation;
        let subscription = slot.session.subscription(filter).filter(|_| same);
        if subscription.is_none_or(|s| s.hides(message.topic())) {
            return;
        }
        let identifier = want.identifier.map(NonZeroU32::get);
        let qos = want.qos.min(message.qos());
        let stream = slot.session.stream_of(filter);
        let outcome = slot.session.deliver(
            limits,
            now,
            &Offer {
                message,
                qos,
                retain: true,
                ids: identifier.as_slice(),
                group: None,
                stream,
                fetched: true,
            },
        );
        tally.outcome(slot, outcome);
        self.settle(want.session.slot);
    }

    /// Offers a message to the members of one filter. Sessions that came to have output are
    /// added to `wakes`, sessions to be ended to `ended`.
    pub fn fan_out(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        filter: FilterId,
        source: Source,
        tally: &mut Tally,
    ) {
        if !self.leavers.is_empty() {
            self.fan_out_left(limits, now, message, filter, source, tally);
        }
        let Self {
            slots,
            members,
            identifiers,
            entry_bytes,
            output_bytes,
            detached,
            lost,
            leavers,
            ..
        } = self;
        let Some(members) = members.get(&filter).map(Members::all) else {
            return;
        };
        let loss_of = lost.look();
        let is_lost = |filter| loss_of(filter).is_some();
        tally.targets += members.len();
        for member in members {
            let Some(slot) = slots.get_mut(member.slot as usize) else {
                continue;
            };
            let Some(mut qos) = member.qos else {
                continue;
            };
            let own = source.is_own(&slot.session);
            if member.no_local && own || hides(member.wild_below, message.topic()) {
                continue;
            }
            let one;
            let mut retain = member.retain_as_published;
            let ids: &[u32] = if member.overlaps {
                let subscriptions = slot.session.subscriptions();
                let mut found = primary(subscriptions, message.topic(), own, is_lost, identifiers);
                if found.is_some_and(|s| s.filter != filter)
                    && loss_of(filter) == Some(Loss::Doubtful)
                {
                    let gone = |filter| loss_of(filter) == Some(Loss::Sure);
                    found = primary(subscriptions, message.topic(), own, gone, identifiers);
                }
                match found {
                    Some(primary) if primary.filter == filter => {
                        qos = primary.qos;
                        retain = primary.retain;
                    }
                    _ => continue,
                }
                identifiers
            } else {
                one = member.identifier.map(NonZeroU32::get);
                one.as_slice()
            };
            if !leavers.is_empty()
                && leavers.gives(member.slot, filter, filter, message, own, is_lost) == Some(false)
            {
                continue;
            }
            let offer = Offer {
                message,
                qos: qos.min(message.qos()),
                retain: retain && message.retain(),
                ids,
                group: None,
                stream: slot.session.stream_of(filter),
                fetched: source == Source::Fetched,
            };
            let charged = offer_to(slot, member.slot, limits, now, &offer, detached, tally);
            *entry_bytes += charged.0;
            *output_bytes += charged.1;
        }
    }

    /// Offers a message to sessions that left the filter by which it came, and have others that
    /// match it.
    fn fan_out_left(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        filter: FilterId,
        source: Source,
        tally: &mut Tally,
    ) {
        let loss_of = self.lost.look();
        let is_lost = |filter| loss_of(filter).is_some();
        let topic = message.topic();
        for at in self.leavers.of(filter) {
            let Some(slot) = self.slots.get_mut(at as usize) else {
                continue;
            };
            let own = source.is_own(&slot.session);
            let subscriptions = slot.session.subscriptions();
            let primary = primary(subscriptions, topic, own, is_lost, &mut self.identifiers);
            let Some(primary) = primary else {
                continue;
            };
            // As one that is kept, its turn comes with the members.
            if primary.filter == filter
                || self
                    .leavers
                    .gives(at, filter, primary.filter, message, own, is_lost)
                    != Some(true)
            {
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
            };
            let charged = offer_to(slot, at, limits, now, &offer, &mut self.detached, tally);
            self.entry_bytes += charged.0;
            self.output_bytes += charged.1;
        }
    }
}

/// Where a message that is fanned out comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Source {
    /// From the broker as a live message, with the origin mark of its publisher.
    Live(Option<Incarnation>),
    /// A retained message that was fetched. Its publisher is unknown, so No Local hides it.
    Fetched,
}

impl Source {
    /// Whether No Local hides the message from `session`.
    fn is_own(self, session: &Session) -> bool {
        match self {
            Self::Live(origin_mark) => origin_mark == Some(session.incarnation),
            Self::Fetched => true,
        }
    }
}

/// Offers a message to one session; what its accounts change by.
fn offer_to(
    slot: &mut Slot,
    at: u32,
    limits: &SessionLimits,
    now: Millis,
    offer: &Offer<'_>,
    detached: &mut LruCache<u32, u64, RandomState>,
    tally: &mut Tally,
) -> (i64, i64) {
    let outcome = slot.session.deliver(limits, now, offer);
    let charged = slot.charge();
    if outcome == Delivered::Queued && !slot.listed && !slot.session.attached() {
        // It left the order because it was the oldest, or had nothing: the oldest again.
        slot.listed = true;
        detached.put(at, slot.session.since);
        detached.demote(&at);
    }
    if outcome == Delivered::EndSession {
        tally.ended.push((at, slot.slot_version));
    }
    tally.outcome(slot, outcome);
    charged
}
