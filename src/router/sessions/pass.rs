//! The way of one message through the members of one filter: the filter's backlog serves some members, and
//! others fall asleep. [`sleep`](super::sleep) has the rules.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::time::Duration;

use smallvec::SmallVec;

use crate::budget::QueueFull;
use crate::mqtt::QoS;
use crate::session::{Incarnation, Session, SessionLimits};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::accounts::Accounts;
use crate::router::sessions::backlog::Sleeper;
use crate::router::sessions::came::{Came, Source};
use crate::router::sessions::handover::Handovers;
use crate::router::sessions::members::{Member, Members};
use crate::router::sessions::slot::Slot;

/// The state that all backlogs of a shard share.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    /// The filters with a backlog.
    pub(super) filters: BTreeSet<FilterId>,
    /// Filters whose members have been visited for a message in part.
    pub(super) suspended: SmallVec<[FilterId; 2]>,
    /// Members that woke meanwhile.
    pub(super) woken: Vec<Woken>,
}

/// A member that woke while its filter's members were being visited.
#[derive(Clone, Copy, Debug)]
pub(super) struct Woken {
    filter: FilterId,
    slot: u32,
    /// Messages with lower numbers had arrived by then.
    number: u64,
}

impl Backlogs {
    /// The lock is given back before all members of a filter are visited.
    pub(super) fn suspend(&mut self, filter: FilterId) {
        self.suspended.push(filter);
    }

    /// The lock is taken again.
    pub(super) fn resume(&mut self, filter: FilterId) {
        if let Some(at) = self.suspended.iter().position(|f| *f == filter) {
            self.suspended.swap_remove(at);
        }
    }

    /// All members of a message's filter have been visited. The numbers of a filter begin anew with its next
    /// backlog, so its members that woke are forgotten even while passes of other filters go on.
    pub(super) fn complete(&mut self) {
        let suspended = &self.suspended;
        self.woken.retain(|w| suspended.contains(&w.filter));
    }

    /// Whether a member has got message `number` by the backlog, since it woke later.
    fn has_got(&self, filter: FilterId, slot: u32, number: u64) -> bool {
        let mut woken = self.woken.iter();
        woken.any(|w| w.filter == filter && w.slot == slot && w.number > number)
    }

    pub(super) fn woke(&mut self, filter: FilterId, slot: u32, number: u64) {
        if self.suspended.contains(&filter) {
            self.woken.push(Woken {
                filter,
                slot,
                number,
            });
        }
    }

    /// A member does not sleep in a filter any longer: drops the messages that were for nobody else, and the
    /// backlog after its last sleeper.
    pub(super) fn left(
        &mut self,
        filter: FilterId,
        members: &mut Members,
        accounts: &mut Accounts,
    ) {
        let Some(backlog) = &mut members.backlog else {
            return;
        };
        let before = backlog.held();
        backlog.drop_unowned();
        accounts.backlog_changed(before, backlog.held());
        if backlog.count() == 0 {
            self.filters.remove(&filter);
            members.backlog = None;
        }
    }

    /// The conditions under which members fall asleep in the next part of a pass. `None`: nobody does.
    pub(super) fn sleepy(
        &self,
        limits: &SessionLimits,
        came: &Came<'_>,
        pass: &Pass,
        members: &Members,
    ) -> Option<Sleepy> {
        let live = matches!(came.source, Source::Live(_));
        if !live || limits.queue_full != QueueFull::Oldest || self.suspended.contains(&came.filter)
        {
            return None;
        }
        let backlog = members.backlog.as_ref();
        let next = backlog.map(|b| b.next());
        if backlog
            .zip(pass.number)
            .is_some_and(|(b, number)| b.has_dropped(number))
        {
            return None;
        }
        // Other messages of the filter that came since are in the members' own queues.
        (next == pass.number.map(|number| number + 1)).then_some(Sleepy {
            number: pass.number,
            has_backlog: next.is_some(),
            queue_qos0: limits.queue_qos0,
            after: limits.sleep_after,
            now: came.now,
        })
    }
}

/// The way of one message through the members of one filter.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Its number in the filter's backlog, if it has one.
    pub(super) number: Option<u64>,
    /// A member of this part that could sleep, if it were not alone. It has got the message.
    pub(super) candidate: Option<Sleeper>,
    /// Members that fall asleep, by slot.
    pub(super) falling: Vec<Sleeper>,
    /// Those among them, and the candidate, that have No Local.
    pub(super) no_local: SmallVec<[(u32, Incarnation); 1]>,
    /// The end of the mounts of those from which topics are hidden.
    pub(super) wild_below: Option<NonZeroU16>,
}

/// The members that may fall asleep in one part of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sleepy {
    number: Option<u64>,
    has_backlog: bool,
    queue_qos0: bool,
    after: Duration,
    now: Millis,
}

impl Pass {
    /// Whether the backlog serves a member: it has got the message so, or falls asleep now.
    pub(super) fn serves(
        &mut self,
        backlogs: &Backlogs,
        handovers: &Handovers,
        sleepy: Option<Sleepy>,
        (filter, member, slot): (FilterId, &Member, &Slot),
    ) -> bool {
        let number = self.number.filter(|_| !backlogs.woken.is_empty());
        if number.is_some_and(|number| backlogs.has_got(filter, member.slot, number)) {
            return true;
        }
        let Some(sleepy) = sleepy.filter(|_| !slot.session.attached()) else {
            return false;
        };
        !handovers.concerns(member.slot) && self.lets_sleep(sleepy, member, &slot.session)
    }

    /// Whether a member without a client falls asleep. If so, it is noted.
    fn lets_sleep(&mut self, sleepy: Sleepy, member: &Member, session: &Session) -> bool {
        let can = member.settled && !member.overlaps;
        if !can || sleepy.now < session.since() + sleepy.after {
            return false;
        }
        let keeps = sleepy.queue_qos0 || member.qos > Some(QoS::AtMostOnce);
        self.wild_below = self.wild_below.or(member.wild_below);
        if member.no_local {
            self.no_local.push((member.slot, session.incarnation));
        }
        let sleeper = |cursor| {
            let sleeper = Sleeper::new(member.slot, cursor, keeps);
            match member.wild_below {
                Some(_) => sleeper.below_mount(),
                None => sleeper,
            }
        };
        // With a backlog that begins now, the message becomes its first.
        let from = sleepy.number.unwrap_or(0);
        if !sleepy.has_backlog && self.falling.is_empty() {
            match self.candidate.take() {
                Some(first) => self.falling.push(first),
                None => {
                    self.candidate = Some(sleeper(from + 1));
                    return false;
                }
            }
        }
        self.falling.push(sleeper(from));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_woke_are_forgotten_with_the_last_pass_of_their_filter() {
        let [first, second] = [FilterId(1), FilterId(2)];
        let mut backlogs = Backlogs::default();
        for filter in [first, second] {
            backlogs.suspend(filter);
            backlogs.woke(filter, 7, 500);
        }
        backlogs.resume(first);
        assert!(backlogs.has_got(first, 7, 499));
        backlogs.complete();
        assert!(!backlogs.has_got(first, 7, 0));
        assert!(backlogs.has_got(second, 7, 499) && !backlogs.has_got(second, 7, 500));
    }
}
