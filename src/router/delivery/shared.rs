//! Shared subscriptions (MQTT 5 §4.8.2): the broker sends each message once, to us; here one
//! member of the group gets it.

mod hand;

use parking_lot::Mutex;

use crate::hashing::LookUp;
use crate::mqtt::{Message, QoS};
use crate::session::{Incarnation, Redelivery, SessionLimits};
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::Sessions;
use crate::router::sessions::came::Replayed;
use crate::router::sessions::shard::Shard;
use crate::router::sessions::tally::Tally;
use crate::router::types::SessionRef;

/// The groups of shared subscriptions, by their filter.
#[derive(Debug, Default)]
pub(in crate::router) struct SharedGroups(Mutex<LookUp<FilterId, Group>>);

/// Connected members that are looked at for one that is free, and others for one that keeps the
/// message: what a message costs does not grow with its group.
const LOOK: usize = 128;

#[derive(Debug, Default)]
struct Group {
    /// First the members that were connected when they were looked at last, or came since.
    members: Vec<Member>,
    /// The number of connected members.
    here: usize,
    places: LookUp<SessionRef, usize>,
    /// The turn among the connected members.
    next: usize,
    /// The turn among the others.
    next_away: usize,
    /// With that many members, the group is searched for members that are gone.
    sweep_at: usize,
}

impl Group {
    fn join(&mut self, session: SessionRef, incarnation: Incarnation) {
        match self.places.get(&session) {
            Some(&at) => self.members[at].incarnation = incarnation,
            None => {
                self.places.insert(session, self.members.len());
                self.members.push(Member {
                    session,
                    incarnation,
                });
            }
        }
        self.came(session);
    }

    /// A member is connected.
    fn came(&mut self, session: SessionRef) {
        if let Some(&at) = self.places.get(&session)
            && at >= self.here
        {
            self.swap(at, self.here);
            self.here += 1;
        }
    }

    /// The connected member at a place is not connected any more. Another has its place.
    fn went(&mut self, at: usize) {
        self.here -= 1;
        self.swap(at, self.here);
    }

    fn remove(&mut self, mut at: usize) {
        if at < self.here {
            self.went(at);
            at = self.here;
        }
        let last = self.members.len() - 1;
        self.swap(at, last);
        if let Some(gone) = self.members.pop() {
            self.places.remove(&gone.session);
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.members.swap(a, b);
        for at in [a, b] {
            self.places.insert(self.members[at].session, at);
        }
    }

    /// Gives the turn to the member behind this one.
    fn pass(&mut self, session: SessionRef) {
        match self.places.get(&session) {
            Some(&at) if at < self.here => self.next = at + 1,
            Some(&at) => self.next_away = at - self.here + 1,
            None => {}
        }
    }
}

/// A session that joined. It may have unsubscribed since, or ended.
#[derive(Clone, Copy, Debug)]
struct Member {
    session: SessionRef,
    /// The session's incarnation when it joined: a clean start keeps its place in the shard.
    incarnation: Incarnation,
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

impl SharedGroups {
    /// The sessions that have joined these groups.
    pub(crate) fn members(&self, groups: &[FilterId]) -> Vec<SessionRef> {
        if groups.is_empty() {
            return Vec::new();
        }
        let all = self.0.lock();
        let groups = groups.iter().filter_map(|group| all.get(group));
        let members = groups.flat_map(|group| &group.members);
        members.map(|member| member.session).collect()
    }

    /// A session has subscribed to a group.
    pub(crate) fn join(
        &self,
        sessions: &Sessions,
        number: FilterId,
        session: SessionRef,
        incarnation: Incarnation,
    ) {
        let mut groups = self.0.lock();
        let group = groups.entry(number).or_default();
        if group.members.len() >= group.sweep_at && !group.places.contains_key(&session) {
            // Backwards: the members that take a place have been looked at.
            for at in (0..group.members.len()).rev() {
                let member = group.members[at];
                let mut shard = sessions.shard(member.session.shard);
                let fit = fit(&mut shard, &member, number, None, sessions.limits());
                drop(shard);
                if fit == Fit::Gone {
                    group.remove(at);
                }
            }
            group.sweep_at = (2 * group.members.len()).max(16);
        }
        group.join(session, incarnation);
    }

    /// A session is connected again that has subscribed to these groups.
    pub(crate) fn members_came(&self, numbers: &[FilterId], session: SessionRef) {
        let mut groups = self.0.lock();
        for number in numbers {
            if let Some(group) = groups.get_mut(number) {
                group.came(session);
            }
        }
    }

    /// Forgets the groups of filters that are gone. To be called while the table of filters is locked, so
    /// that a client that subscribes anew is in the next group.
    pub(crate) fn forget(&self, numbers: &[FilterId]) {
        if numbers.is_empty() {
            return;
        }
        let mut groups = self.0.lock();
        for number in numbers {
            groups.remove(number);
        }
    }

    /// Gives a message to one member: the next in turn that is free, else the next that is
    /// connected, else the next.
    pub(crate) fn share(
        &self,
        sessions: &Sessions,
        number: FilterId,
        message: &Message,
        now: Millis,
        tally: &mut Tally,
    ) {
        let mut groups = self.0.lock();
        let Some(group) = groups.get_mut(&number) else {
            metrics().messages_dropped[DropReason::NoReceiver].increment(1);
            return;
        };
        let member = match share_connected(sessions, group, number, message, now, tally) {
            Ok(()) => return,
            Err(busy) => busy.or_else(|| next_away(sessions, group, number, message.qos())),
        };
        match member {
            Some(member) => {
                group.pass(member.session);
                let mut shard = sessions.shard(member.session.shard);
                hand(sessions, &mut shard, &member, number, message, now, tally);
            }
            // All members are gone, and the broker does not know yet.
            None => metrics().messages_dropped[DropReason::NoReceiver].increment(1),
        }
    }

    /// Gives a member a message of an earlier process, if it is owed it.
    pub(crate) fn restore(
        &self,
        sessions: &Sessions,
        (number, session): (FilterId, SessionRef),
        message: &Message,
        replayed: Replayed,
        now: Millis,
        tally: &mut Tally,
    ) {
        let mut shard = sessions.shard(session.shard);
        shard.restore_shared(
            sessions.limits(),
            now,
            message,
            (number, session),
            replayed,
            tally,
        );
        sessions.charge(&mut shard);
    }

    /// Hands messages of members that ended, or are away for long, to others.
    pub(crate) fn redeliver(
        &self,
        sessions: &Sessions,
        redeliveries: Vec<Redelivery>,
        now: Millis,
    ) {
        if redeliveries.is_empty() {
            return;
        }
        metrics()
            .shared_redelivered
            .increment(redeliveries.len() as u64);
        let mut tally = Tally::default();
        for delivery in &redeliveries {
            let (filter, message) = (delivery.filter, &delivery.message);
            self.share(sessions, filter, message, now, &mut tally);
        }
        tally.wake();
        tally.flush();
    }
}

/// Gives a message to the next connected member that is free.
///
/// # Errors
/// The next connected member, if none is free.
fn share_connected(
    sessions: &Sessions,
    group: &mut Group,
    number: FilterId,
    message: &Message,
    now: Millis,
    tally: &mut Tally,
) -> Result<(), Option<Member>> {
    let mut busy = None;
    let mut looked = 0;
    let mut at = group.next;
    // Members that are found gone or away are not looked at again.
    while looked < group.here.min(LOOK) {
        at = if at < group.here { at } else { 0 };
        let member = group.members[at];
        let mut shard = sessions.shard(member.session.shard);
        let qos = Some(message.qos());
        match fit(&mut shard, &member, number, qos, sessions.limits()) {
            Fit::Gone => group.remove(at),
            Fit::Deaf | Fit::Away => group.went(at),
            Fit::Busy => {
                busy = busy.or(Some(member));
                looked += 1;
                at += 1;
            }
            Fit::Free => {
                group.next = at + 1;
                hand(sessions, &mut shard, &member, number, message, now, tally);
                return Ok(());
            }
        }
    }
    Err(busy)
}

/// The next member whose client is away: one that keeps the message, if there is one.
fn next_away(sessions: &Sessions, group: &mut Group, number: FilterId, qos: QoS) -> Option<Member> {
    let mut deaf = None;
    let mut looked = 0;
    let mut turn = group.next_away;
    while looked < (group.members.len() - group.here).min(LOOK) {
        turn = if group.here + turn < group.members.len() {
            turn
        } else {
            0
        };
        let member = group.members[group.here + turn];
        let mut shard = sessions.shard(member.session.shard);
        match fit(&mut shard, &member, number, Some(qos), sessions.limits()) {
            Fit::Gone => group.remove(group.here + turn),
            Fit::Deaf => {
                deaf = deaf.or(Some(member));
                looked += 1;
                turn += 1;
            }
            // It may have come just now.
            Fit::Away | Fit::Busy | Fit::Free => return Some(member),
        }
    }
    deaf
}

/// Hands a message to one member.
fn hand(
    sessions: &Sessions,
    shard: &mut Shard,
    member: &Member,
    number: FilterId,
    message: &Message,
    now: Millis,
    tally: &mut Tally,
) {
    let full = shard.hand_shared(
        sessions.limits(),
        now,
        message,
        number,
        member.session,
        tally,
    );
    sessions.charge(shard);
    if full {
        sessions.end_full(shard, member.session.slot, now);
    }
}

/// How well a member could take a message of this QoS now.
fn fit(
    shard: &mut Shard,
    member: &Member,
    number: FilterId,
    qos: Option<QoS>,
    limits: &SessionLimits,
) -> Fit {
    let Some(slot) = shard.get(member.session) else {
        return Fit::Gone;
    };
    let session = &mut slot.session;
    let granted = session.subscription(number).map(|s| s.options.qos);
    let Some(granted) =
        granted.filter(|_| session.incarnation == member.incarnation && !session.is_closed())
    else {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::mqtt::{MessageSpec, Properties, ReasonCode, Version};
    use crate::router::filters::filter::Phase;
    use crate::router::testing;
    use crate::router::{Connected, Router};
    use crate::session::Unsubscribed;

    const FILTER: &str = "$share/g/t";

    fn session(slot: u32) -> SessionRef {
        SessionRef {
            shard: 0,
            slot,
            slot_version: 1,
        }
    }

    proptest! {
        #[test]
        fn members_keep_their_places(steps in prop::collection::vec((0..8u32, 0..4u8), 0..60)) {
            let mut group = Group::default();
            let mut here: Vec<u32> = Vec::new();
            let mut all: Vec<u32> = Vec::new();
            for (slot, step) in steps {
                let at = group.places.get(&session(slot)).copied();
                match step {
                    0 => {
                        group.join(session(slot), Incarnation::nth(0));
                        here.push(slot);
                        all.push(slot);
                    }
                    1 => {
                        group.came(session(slot));
                        here.extend(all.contains(&slot).then_some(slot));
                    }
                    2 => {
                        if let Some(at) = at.filter(|at| *at < group.here) {
                            group.went(at);
                        }
                        here.retain(|s| *s != slot);
                    }
                    _ => {
                        if let Some(at) = at {
                            group.remove(at);
                        }
                        here.retain(|s| *s != slot);
                        all.retain(|s| *s != slot);
                    }
                }
                for known in [&mut here, &mut all] {
                    known.sort_unstable();
                    known.dedup();
                }
                let mut slots: Vec<u32> = group.members.iter().map(|m| m.session.slot).collect();
                let mut first = slots[..group.here].to_vec();
                first.sort_unstable();
                slots.sort_unstable();
                prop_assert_eq!((&first, &slots), (&here, &all));
                prop_assert_eq!(group.places.len(), all.len());
                for (session, at) in group.places.all() {
                    prop_assert_eq!(group.members[*at].session, *session);
                }
            }
        }
    }

    /// A client that is in the group, and its number.
    fn member(router: &Router, id: &str) -> (Connected, FilterId) {
        let client = testing::kept_client_of(router, id, Version::V5, None, Millis::new(1));
        testing::subscribe(router, client, FILTER);
        let number = router.filters.table().write().intern(FILTER).0;
        for wanted in router.next_subscribes(router.shared_link(0), 10) {
            router.suback(wanted.filter, ReasonCode(1), Millis::new(1));
        }
        (client, number)
    }

    fn share(router: &Router, number: FilterId) {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: b"x",
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let (groups, sessions) = (&router.groups, &router.sessions);
        groups.share(
            sessions,
            number,
            &message,
            Millis::new(1),
            &mut Tally::default(),
        );
    }

    /// Deliveries that a client has not acknowledged, or that wait for it.
    fn has(router: &Router, id: &str) -> usize {
        let session = router.session(&id.into()).expect("it is there");
        session.in_flight + session.queue_messages
    }

    fn shared_router() -> Arc<Router> {
        let router = testing::router();
        router.data_link_up(1, crate::router::LinkSession::New, true, Millis::ZERO);
        router
    }

    #[test]
    fn members_that_are_away_are_not_looked_at_while_others_are_here() {
        let router = shared_router();
        let mut number = FilterId(0);
        for n in 0..200 {
            let (client, group) = member(&router, &format!("away{n}"));
            router.disconnected(client.session, client.connection_no, true, Millis::new(1));
            number = group;
        }
        member(&router, "a");
        let here = || {
            router
                .groups
                .0
                .lock()
                .get(&number)
                .expect("it is a group")
                .here
        };
        share(&router, number);
        share(&router, number);
        assert_eq!((has(&router, "a"), here()), (2, 1));
        testing::kept_client_of(&router, "away7", Version::V5, None, Millis::new(1));
        assert_eq!(here(), 2);
        for _ in 0..8 {
            share(&router, number);
        }
        assert_eq!((has(&router, "a"), has(&router, "away7")), (6, 4));
    }

    #[test]
    fn members_that_are_away_get_messages_in_turn_when_nobody_is_here() {
        let router = shared_router();
        let clients = ["a", "b", "c"].map(|id| member(&router, id));
        for (client, _) in clients {
            router.disconnected(client.session, client.connection_no, true, Millis::new(1));
        }
        for _ in 0..6 {
            share(&router, clients[0].1);
        }
        assert_eq!(["a", "b", "c"].map(|id| has(&router, id)), [2, 2, 2]);
    }

    #[test]
    fn a_group_is_gone_before_anybody_can_subscribe_anew() {
        for _ in 0..20 {
            let router = shared_router();
            let (client, number) = member(&router, "a");
            let left = Unsubscribed {
                filter: number,
                name: FILTER.into(),
                no_local: false,
                primary_over: None,
            };
            router.with(client.session, client.connection_no, |s, _| {
                s.remove_subscription(number)
            });
            router.unsubscribe(client.session, &[left], Millis::new(1));
            let mut groups = router.groups.0.lock();
            std::thread::scope(|scope| {
                scope.spawn(|| router.tick(Millis::new(1)));
                loop {
                    let table = router.filters.table().try_read();
                    let state = table.as_ref().and_then(|t| Some(t.get(number)?.phase()));
                    if state == Some(Phase::Unsubscribing) {
                        break assert!(!groups.contains_key(&number));
                    }
                    let locked = table.is_none();
                    drop(table);
                    if locked {
                        parking_lot::MutexGuard::unlocked(&mut groups, std::thread::yield_now);
                    }
                }
                drop(groups);
            });
        }
    }
}
