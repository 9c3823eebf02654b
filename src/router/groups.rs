//! Shared subscriptions (MQTT 5 §4.8.2): the core sends each message once, to us; here one
//! member of the group gets it.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::mqtt::{Message, QoS};
use crate::session::{Delivered, Offer, Orphan, SessionLimits};
use crate::telemetry::{DropReason as DropCause, metrics};

use super::fanout::Tally;
use super::shard::Shard;
use super::{Router, SessionRef};

/// The groups, by the number of their filter.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<u32, Group, RandomState>);

#[derive(Debug, Default)]
struct Group {
    members: Vec<Member>,
    /// Whose turn it is.
    next: usize,
    /// With that many members, those that are gone are looked for.
    sweep_at: usize,
}

/// A session that joined; it may have left without a word.
#[derive(Clone, Copy, Debug)]
struct Member {
    session: SessionRef,
    /// The session's own mark: a clean start keeps its place.
    tag: u64,
}

/// How well a member could take a message now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// Not a member any more.
    Gone,
    /// Its client is away, and at QoS 0 nothing waits for it.
    Deaf,
    /// Its client is away: it waits in the queue.
    Away,
    /// Connected, and its window or output is full.
    Busy,
    /// It is written at once.
    Free,
}

impl Router {
    /// A session has subscribed to a group.
    pub(super) fn join_group(&self, number: u32, session: SessionRef, tag: u64) {
        let mut groups = self.groups.lock();
        let group = groups.0.entry(number).or_default();
        if let Some(known) = group.members.iter_mut().find(|m| m.session == session) {
            known.tag = tag;
            return;
        }
        if group.members.len() >= group.sweep_at {
            let there = |m: &Member| {
                let shard = &self.shards[usize::from(m.session.shard)];
                fit(&mut shard.lock(), m, number, None, &self.limits) != Fit::Gone
            };
            group.members.retain(there);
            group.sweep_at = (2 * group.members.len()).max(16);
        }
        group.members.push(Member { session, tag });
    }

    /// Filters that are gone have no group.
    pub(super) fn forget_groups(&self, numbers: &[u32]) {
        if numbers.is_empty() {
            return;
        }
        let mut groups = self.groups.lock();
        for number in numbers {
            groups.0.remove(number);
        }
    }

    /// Gives a message to one member: the next in turn that is free, else the next that is
    /// connected, else the next.
    pub(super) fn share(&self, number: u32, message: &Message, now: u64, tally: &mut Tally) {
        let mut groups = self.groups.lock();
        let Some(group) = groups.0.get_mut(&number) else {
            metrics().messages_dropped[DropCause::NoReceiver].increment(1);
            return;
        };
        let count = group.members.len();
        let mut best: Option<(Fit, usize)> = None;
        let mut gone = false;
        for turn in 0..count {
            let at = (group.next + turn) % count;
            let member = group.members[at];
            let mut shard = self.shards[usize::from(member.session.shard)].lock();
            let fit = fit(
                &mut shard,
                &member,
                number,
                Some(message.qos()),
                &self.limits,
            );
            gone |= fit == Fit::Gone;
            if fit == Fit::Free {
                group.next = at + 1;
                self.hand_shared(&mut shard, &member, number, message, now, tally);
                drop(shard);
                if gone {
                    self.sweep(group, number);
                }
                return;
            }
            if fit > Fit::Gone && best.is_none_or(|(known, _)| fit > known) {
                best = Some((fit, at));
            }
        }
        match best {
            Some((_, at)) => {
                group.next = at + 1;
                let member = group.members[at];
                let mut shard = self.shards[usize::from(member.session.shard)].lock();
                self.hand_shared(&mut shard, &member, number, message, now, tally);
            }
            // All members are gone, and the core does not know yet.
            None => metrics().messages_dropped[DropCause::NoReceiver].increment(1),
        }
        if gone {
            self.sweep(group, number);
        }
    }

    fn sweep(&self, group: &mut Group, number: u32) {
        group.members.retain(|m| {
            let shard = &self.shards[usize::from(m.session.shard)];
            fit(&mut shard.lock(), m, number, None, &self.limits) != Fit::Gone
        });
    }

    fn hand_shared(
        &self,
        shard: &mut Shard,
        member: &Member,
        number: u32,
        message: &Message,
        now: u64,
        tally: &mut Tally,
    ) {
        let full = shard.hand_shared(&self.limits, now, message, number, member.session, tally);
        self.charge_entries(shard);
        if full {
            self.end_full_session(shard, member.session.slot, now);
        }
    }

    /// Messages of members that ended, or are away for long, go to others.
    pub(super) fn share_again(&self, orphans: Vec<Orphan>, now: u64) {
        if orphans.is_empty() {
            return;
        }
        metrics().shared_redelivered.increment(orphans.len() as u64);
        let mut tally = Tally::default();
        for orphan in &orphans {
            self.share(orphan.filter, &orphan.message, now, &mut tally);
        }
        tally.wake();
        tally.flush();
    }
}

/// `qos`: of the message that is to be given.
fn fit(
    shard: &mut Shard,
    member: &Member,
    number: u32,
    qos: Option<QoS>,
    limits: &SessionLimits,
) -> Fit {
    let Some(slot) = shard.get(member.session) else {
        return Fit::Gone;
    };
    let session = &mut slot.session;
    let granted = session.subscription(number).map(|s| s.options.qos);
    let Some(granted) = granted.filter(|_| session.tag == member.tag && !session.is_ghost()) else {
        return Fit::Gone;
    };
    let lost = granted == QoS::AtMostOnce && qos.is_some_and(|q| q > granted) && !limits.queue_qos0;
    match (session.attached(), session.outbound().has_backlog()) {
        (false, _) if lost => Fit::Deaf,
        (false, _) => Fit::Away,
        (true, true) => Fit::Busy,
        (true, false) => match session.window_free(limits) {
            true => Fit::Free,
            false => Fit::Busy,
        },
    }
}

impl Shard {
    /// Delivers to one member of a group. True: its queue is full, and the session is to end.
    fn hand_shared(
        &mut self,
        limits: &SessionLimits,
        now: u64,
        message: &Message,
        number: u32,
        session: SessionRef,
        tally: &mut Tally,
    ) -> bool {
        let Some(slot) = self.get(session) else {
            return false;
        };
        let Some(subscription) = slot.session.subscription(number) else {
            return false;
        };
        let identifier = subscription.identifier;
        let options = subscription.options;
        let qos: QoS = options.qos.min(message.qos());
        let one = [identifier];
        let offer = Offer {
            message,
            qos,
            retain: options.retain_as_published && message.retain(),
            ids: if identifier == 0 { &[] } else { &one },
            group: Some(number),
            lane: slot.session.lane_of(number),
            fetched: false,
        };
        let outcome = slot.session.deliver(limits, now, &offer);
        let full = outcome == Delivered::EndSession;
        tally.outcome(slot, outcome);
        self.settle(session.slot);
        full
    }
}
