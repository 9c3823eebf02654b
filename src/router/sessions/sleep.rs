//! Members of filters fall asleep and wake.
//!
//! A member sleeps in a filter while its client is away. Then the filter's messages are kept once for all
//! sleeping members of a shard, in the filter's [`Backlog`], and a message costs the same however many
//! members sleep. The rules:
//!
//! - A member falls asleep when a message finds its session without a client for [`SessionLimits::sleep_after`]. That
//!   message is the first of its own in the backlog. A backlog begins with two members, because for one
//!   its own queue is as good.
//! - The members of overlapping subscriptions do not sleep: which copy of a message a session gets depends on
//!   the time at which the copies come.
//! - A session wakes when its client comes back: before its connection begins, its messages move from
//!   all backlogs into its own queue, where the limits of a queue apply. It wakes too when one of its
//!   subscriptions is changed by a late answer of the broker.
//! - While the lock of the shard is given back between two parts of a filter's members, nobody falls
//!   asleep in this filter. A member that wakes meanwhile has got the message by the backlog.
//! - Retained messages that were fetched never enter a backlog. They go into the queues of the sleepers.

pub(super) mod memory;

use std::ops::Range;

use crate::mqtt::QoS;
use crate::session::{Incarnation, Kept, Session, SessionLimits, Subscription};
use crate::telemetry::metrics;
use crate::topics::FilterId;

use crate::router::sessions::backlog::{Backlog, Entry, Lost, Reason, Sleeper};
use crate::router::sessions::came::{Came, Source};
use crate::router::sessions::members::Member;
use crate::router::sessions::pass::Pass;
use crate::router::sessions::shard::Shard;
use crate::router::sessions::slot::Slot;
use crate::router::sessions::{Sessions, shed};

/// The messages that backlogs have for one session: the newest ones.
#[derive(Debug)]
struct Gathered {
    kept: Vec<Kept>,
    /// The messages that find room in the session's queue.
    max: usize,
    /// As many messages are known from this position on.
    from: u64,
    lost: Lost,
}

impl Gathered {
    fn new(max: usize) -> Self {
        Self {
            kept: Vec::new(),
            max: max.max(1),
            from: 0,
            lost: Lost::default(),
        }
    }

    /// Adds a sleeper's messages in one backlog.
    fn add(
        &mut self,
        backlog: &Backlog,
        sleeper: &Sleeper,
        (session, subscription): (&Session, &Subscription),
        limits: &SessionLimits,
    ) {
        self.lost.add_all(backlog.lost(sleeper));
        // The newest first, so that few are taken in vain.
        for entry in backlog.since(sleeper.cursor()).rev() {
            match owed(entry, session, subscription, limits) {
                Owed::Kept(_) if entry.position < self.from => {
                    self.lost.add(Reason::Messages, 1);
                }
                Owed::Kept(qos) => {
                    let options = subscription.options;
                    let kept = Kept {
                        message: entry.message.clone(),
                        qos,
                        retain: options.retain_as_published && entry.message.retain(),
                        identifier: subscription.identifier,
                        at: entry.at,
                        position: entry.position,
                    };
                    self.kept.push(kept);
                    if self.kept.len() >= 2 * self.max {
                        self.cut();
                    }
                }
                Owed::Unkept => self.lost.add(Reason::Qos0, 1),
                Owed::Nothing => {}
            }
        }
    }

    /// Drops the oldest messages, which find no room.
    fn cut(&mut self) {
        let many = self.kept.len().saturating_sub(self.max);
        if many > 0 {
            let (_, first, _) = self
                .kept
                .select_nth_unstable_by_key(many, |kept| kept.position);
            self.from = first.position;
            self.kept.drain(..many);
            self.lost.add(Reason::Messages, many as u64);
        }
    }

    /// Takes the messages, in the order of their arrival.
    fn take(&mut self) -> Vec<Kept> {
        self.cut();
        let mut kept = std::mem::take(&mut self.kept);
        kept.sort_unstable_by_key(|kept| kept.position);
        kept
    }
}

/// The part of one message that a sleeper is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    /// The message at this QoS.
    Kept(QoS),
    /// A message of QoS 0, which is not kept for it.
    Unkept,
    /// It is not for this client.
    Nothing,
}

fn owed(
    entry: &Entry,
    session: &Session,
    subscription: &Subscription,
    limits: &SessionLimits,
) -> Owed {
    let own = entry.origin_mark == Some(session.incarnation);
    if own && subscription.options.no_local || subscription.hides(entry.message.topic()) {
        return Owed::Nothing;
    }
    match subscription.options.qos.min(entry.message.qos()) {
        QoS::AtMostOnce if !limits.queue_qos0 => Owed::Unkept,
        qos => Owed::Kept(qos),
    }
}

/// The messages in backlogs that one session is owed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backlogged {
    pub(super) messages: usize,
    pub(super) bytes: usize,
    /// Messages that were dropped. Each will be a gap.
    pub(super) gaps: u64,
}

impl Sessions {
    /// Wakes a session: its messages move from all backlogs into its own queue.
    pub(super) fn wake(&self, shard: &mut Shard, at: u32) {
        if shard.slots.get(at as usize).is_some_and(|s| s.asleep > 0) {
            shard.wake(at, &self.limits);
            self.charge(shard);
        }
    }
}

impl Shard {
    /// A message of a filter arrives. The members that sleep have it by the backlog. Returns how many
    /// messages were put into the backlog, or taken out of it.
    pub(super) fn begin_pass(
        &mut self,
        limits: &SessionLimits,
        came: &Came<'_>,
        pass: &mut Pass,
    ) -> usize {
        self.now = self.now.max(came.now);
        let Source::Live(origin_mark) = came.source else {
            return 0;
        };
        if self.backlogs.filters.is_empty() {
            return 0;
        }
        let backlog = self
            .members
            .get(&came.filter)
            .and_then(|m| m.backlog.as_ref());
        let Some(backlog) = backlog else {
            return 0;
        };
        // A backlog does not know whose message it was that it does not keep.
        if let Some(publisher) = backlog.publisher(origin_mark)
            && self.is_incarnation(publisher, origin_mark)
        {
            let woken = self.wake_in(publisher, Some(came.filter), limits);
            return woken + self.keep_live(limits, came, origin_mark, pass);
        }
        self.keep_live(limits, came, origin_mark, pass)
    }

    /// Whether the session in a slot has this origin mark.
    fn is_incarnation(&self, at: u32, origin_mark: Option<Incarnation>) -> bool {
        let slot = self.slots.get(at as usize);
        slot.is_some_and(|slot| Some(slot.session.incarnation) == origin_mark)
    }

    /// A live message goes into the backlog of its filter, or wakes the only sleeper. Returns how many messages
    /// were put into the backlog, or taken out of it.
    fn keep_live(
        &mut self,
        limits: &SessionLimits,
        came: &Came<'_>,
        origin_mark: Option<Incarnation>,
        pass: &mut Pass,
    ) -> usize {
        let members = self.members.get(&came.filter);
        let Some(backlog) = members.and_then(|m| m.backlog.as_ref()) else {
            return 0;
        };
        if let Some(lone) = backlog.lone() {
            return self.wake_in(lone, Some(came.filter), limits);
        }
        if backlog.hides(came.message) {
            return 0;
        }
        self.accounts.position += 1;
        let position = self.accounts.position;
        let backlog = self
            .members
            .get_mut(&came.filter)
            .and_then(|m| m.backlog.as_mut());
        if let Some(backlog) = backlog {
            let before = backlog.held();
            pass.number = Some(backlog.arrived());
            backlog.keep(limits, came.message, origin_mark, position, came.now);
            self.accounts.backlog_changed(before, backlog.held());
        }
        1
    }

    /// The members that were noted in a part of a pass fall asleep.
    pub(super) fn fall_asleep(&mut self, limits: &SessionLimits, came: &Came<'_>, pass: &mut Pass) {
        let falling = std::mem::take(&mut pass.falling);
        let no_local = std::mem::take(&mut pass.no_local);
        // Between the parts it may be back.
        pass.candidate = None;
        if falling.is_empty() {
            return;
        }
        let Source::Live(origin_mark) = came.source else {
            return;
        };
        let Some(members) = self.members.get_mut(&came.filter) else {
            return;
        };
        members.leave_all(falling.iter().map(|s| s.slot));
        if members.backlog.is_none() {
            self.backlogs.filters.insert(came.filter);
        }
        let backlog = members.backlog.get_or_insert_default();
        let before = backlog.held();
        pass.number.get_or_insert_with(|| backlog.arrived());
        backlog.add(&falling, pass.wild_below);
        for (slot, origin_mark) in no_local {
            if falling.iter().any(|s| s.slot == slot) {
                backlog.hide_own(slot, origin_mark);
            }
        }
        // Perhaps it was for no sleeper when it arrived.
        self.accounts.position += 1;
        let position = self.accounts.position;
        backlog.keep(limits, came.message, origin_mark, position, came.now);
        self.accounts.backlog_changed(before, backlog.held());
        for sleeper in &falling {
            if let Some(slot) = self.slots.get_mut(sleeper.slot as usize) {
                slot.asleep += 1;
                if slot.session.outbound().entries() == 0 {
                    self.accounts.charge(slot);
                    self.accounts.unlist(slot, sleeper.slot);
                }
            }
        }
    }

    /// The sleepers in these slots that a message visits: none if it is live.
    pub(super) fn asleep_in(&self, came: &Came<'_>, slots: &Range<u32>) -> Vec<Member> {
        if let Source::Live(_) = came.source {
            return Vec::new();
        }
        let members = self.members.get(&came.filter);
        let Some(backlog) = members.and_then(|m| m.backlog.as_ref()) else {
            return Vec::new();
        };
        let member = |sleeper: &Sleeper| {
            let session = &self.slots.get(sleeper.slot as usize)?.session;
            let mut all = session.subscriptions().iter();
            let subscription = all.find(|s| s.filter == came.filter)?;
            Some(Member::of(sleeper.slot, subscription))
        };
        backlog
            .sleepers_in(slots.clone())
            .filter_map(member)
            .collect()
    }

    /// The slot of the sleeper behind the first `max` sleepers of a filter from slot `from` on.
    pub(super) fn asleep_from(&self, filter: FilterId, from: u32, max: usize) -> Option<u32> {
        let backlog = self.members.get(&filter)?.backlog.as_ref()?;
        backlog.behind(from, max)
    }

    /// The slots of the members that sleep in a filter.
    pub(super) fn asleep(&self, filter: FilterId) -> impl Iterator<Item = u32> {
        let members = self.members.get(&filter);
        let backlog = members.and_then(|m| m.backlog.as_ref());
        let sleepers = backlog.into_iter().flat_map(|b| b.sleepers());
        sleepers.map(|s| s.slot)
    }

    /// Wakes a session: its messages move from all backlogs into its own queue.
    pub(super) fn wake(&mut self, at: u32, limits: &SessionLimits) {
        self.wake_in(at, None, limits);
    }

    /// Wakes a session in one filter, or in all. Returns the number of its messages.
    fn wake_in(&mut self, at: u32, filter: Option<FilterId>, limits: &SessionLimits) -> usize {
        let Self {
            slots,
            members,
            backlogs,
            accounts,
            ..
        } = self;
        let Some(slot) = slots.get_mut(at as usize).filter(|s| s.asleep > 0) else {
            return 0;
        };
        let Slot {
            session, asleep, ..
        } = &mut **slot;
        let mut gathered = Gathered::new(session.outbound().live_max(limits));
        let plain = session.subscriptions().iter().filter(|s| !s.shared);
        for subscription in plain.filter(|s| filter.is_none_or(|filter| filter == s.filter)) {
            if *asleep == 0 {
                break;
            }
            let Some(members) = members.get_mut(&subscription.filter) else {
                continue;
            };
            let Some(backlog) = &mut members.backlog else {
                continue;
            };
            let Some(sleeper) = backlog.remove(at) else {
                continue;
            };
            *asleep -= 1;
            backlogs.woke(subscription.filter, at, backlog.next());
            gathered.add(backlog, &sleeper, (session, subscription), limits);
            backlogs.left(subscription.filter, members, accounts);
            members.join(at, subscription);
        }
        let kept = gathered.take();
        let count = kept.len();
        if !kept.is_empty() {
            session.outbound_mut().take_kept(limits, self.now, kept);
        }
        let lost = gathered.lost;
        slot.session.gaps += count_lost(lost);
        shed(slot);
        if !slot.session.attached() && slot.session.outbound().queued() > 0 {
            self.accounts.list(slot, at);
        }
        self.settle(at);
        count
    }

    /// A member that sleeps leaves its filter, with its session. Returns how many messages end with it.
    pub(super) fn leave_asleep(&mut self, at: u32, filter: FilterId) -> usize {
        let Self {
            slots,
            members,
            backlogs,
            accounts,
            ..
        } = self;
        let Some(members) = members.get_mut(&filter) else {
            return 0;
        };
        let Some(backlog) = &mut members.backlog else {
            return 0;
        };
        let Some(sleeper) = backlog.remove(at) else {
            return 0;
        };
        if let Some(slot) = slots.get_mut(at as usize) {
            slot.asleep -= 1;
        }
        let messages = match sleeper.keeps {
            true => backlog.count_since(sleeper.cursor()),
            false => 0,
        };
        backlogs.left(filter, members, accounts);
        messages
    }

    /// The messages that backlogs have for a session. Looks at each of them.
    pub(super) fn backlogged(&self, at: u32, slot: &Slot, limits: &SessionLimits) -> Backlogged {
        let mut all = Backlogged::default();
        if slot.asleep == 0 {
            return all;
        }
        for subscription in slot.session.subscriptions().iter().filter(|s| !s.shared) {
            let members = self.members.get(&subscription.filter);
            let backlog = members.and_then(|m| m.backlog.as_ref());
            let Some((backlog, sleeper)) = backlog.and_then(|b| Some((b, b.sleeper(at)?))) else {
                continue;
            };
            all.gaps += backlog.lost(sleeper).sum();
            for entry in backlog.since(sleeper.cursor()) {
                match owed(entry, &slot.session, subscription, limits) {
                    Owed::Kept(_) => {
                        all.messages += 1;
                        all.bytes += entry.message.size();
                    }
                    Owed::Unkept => all.gaps += 1,
                    Owed::Nothing => {}
                }
            }
        }
        all
    }
}

/// Counts messages that a sleeper lost. Returns their number.
fn count_lost(lost: Lost) -> u64 {
    for (reason, count) in lost.by_label().filter(|(_, count)| *count > 0) {
        metrics().messages_dropped[reason].increment(count);
    }
    lost.sum()
}

#[cfg(test)]
mod tests;
