//! Members fall asleep and wake, and other messages arrive, between the parts in which a
//! message visits the members of a filter.

use std::num::NonZeroU16;

use proptest::prelude::*;

use super::*;
use crate::budget::Allowance;
use crate::hashing::HashSeed;
use crate::router::account::SessionAccount;
use crate::router::sessions::accounts::Accounts;
use crate::router::sessions::primaries::Primaries;

const FILTER: FilterId = FilterId(3);
const SESSIONS: usize = 8;
/// See `fan_out`.
const CHUNK: usize = 512;

/// Sessions without a client, with one subscription each.
struct Sleepers {
    shard: Shard,
    limits: SessionLimits,
    tally: Tally,
    messages: Vec<Message>,
}

impl Sleepers {
    fn new() -> Self {
        Self::of("t", None)
    }

    fn of(filter: &str, wild_below: Option<NonZeroU16>) -> Self {
        let output = Allowance::new(Arc::default(), 1 << 30, 1);
        let accounts = Accounts::new(0, output, Arc::default());
        let account = SessionAccount::new(1 << 20, 1, HashSeed::fixed());
        let holder = account.holder(None, testing::peer().address.ip());
        let mut shard = Shard::new(0, Arc::default(), Arc::new(account), accounts);
        for n in 0..SESSIONS {
            let incarnation = Incarnation::nth(n as u64);
            let key = format!("{n}").as_str().into();
            let session = Session::new(key, "p".into(), incarnation, Millis::ZERO);
            let slot = shard.insert(session, holder);
            let session = &mut shard.slots[slot as usize].session;
            let new = Subscription {
                filter: FILTER,
                name: filter.into(),
                options: options(QoS::AtLeastOnce),
                asked: QoS::AtLeastOnce,
                identifier: None,
                active: false,
                overlaps: 0,
                shared: false,
                wild: false,
                wild_below,
            };
            session.add_subscription(new, &[]);
            session.activate_subscription(FILTER);
            shard.rejoin(slot);
        }
        Self {
            shard,
            limits: testing::router().limits().clone(),
            tally: Tally::default(),
            messages: Vec::new(),
        }
    }

    /// A message visits the members, in parts of these sizes. `between` is called between them.
    fn bring(&mut self, parts: &[usize], between: impl FnMut(&mut Self)) {
        let message = message("t", &self.messages.len().to_string(), QoS::AtLeastOnce);
        self.messages.push(message.clone());
        self.bring_message(message, parts, between);
    }

    fn bring_message(
        &mut self,
        message: Message,
        parts: &[usize],
        mut between: impl FnMut(&mut Self),
    ) {
        let came = Came {
            message: &message,
            filter: FILTER,
            source: Source::Live(None),
            replayed: None,
            now: Millis::new(LATER),
        };
        let (mut pass, mut known) = (Pass::default(), Primaries::default());
        let mut parts = parts.iter().copied();
        let mut from = Some(0);
        while let Some(slot) = from {
            self.tally.targets = CHUNK - parts.next().unwrap_or(SESSIONS);
            let (limits, tally) = (&self.limits, &mut self.tally);
            from = self
                .shard
                .fan_out(limits, &came, slot, &mut pass, &mut known, tally);
            if from.is_some() {
                self.shard.backlogs.suspend(FILTER);
            }
            between(self);
            if from.is_some() {
                self.shard.backlogs.resume(FILTER);
            }
        }
        self.shard.backlogs.complete();
    }

    fn asleep(&self) -> usize {
        self.shard.asleep(FILTER).count()
    }

    /// Every session has every message once.
    fn judge(&mut self) {
        for slot in 0..SESSIONS as u32 {
            self.shard.wake(slot, &self.limits);
            let session = &self.shard.slots[slot as usize].session;
            assert_eq!(session.outbound().queued(), self.messages.len(), "{slot}");
            assert_eq!(session.gaps, 0, "{slot}");
        }
        for (number, message) in self.messages.iter().enumerate() {
            assert_eq!(message.refs(), SESSIONS + 1, "{number}");
        }
        assert!(self.shard.backlogs.filters.is_empty());
        assert!(self.shard.backlogs.woken.is_empty() && self.shard.backlogs.suspended.is_empty());
        assert_eq!(
            self.shard.members.get(&FILTER).map(|m| m.awake().len()),
            Some(SESSIONS)
        );
    }
}

#[test]
fn a_member_that_wakes_while_a_message_is_under_way_gets_it_once() {
    let mut sleepers = Sleepers::new();
    sleepers.bring(&[], |_| {});
    sleepers.bring(&[], |_| {});
    assert_eq!(sleepers.asleep(), SESSIONS);
    for slot in 2..6 {
        let limits = sleepers.limits.clone();
        sleepers.shard.wake(slot, &limits);
    }
    // They are visited in several parts, and two sleepers wake meanwhile.
    let mut sleeping = vec![0, 7];
    sleepers.bring(&[1, 1, 1], |s| {
        let limits = s.limits.clone();
        if let Some(slot) = sleeping.pop() {
            s.shard.wake(slot, &limits);
        }
    });
    sleepers.judge();
}

/// The mount of all members is `m/`, and their filter `#`.
#[test]
fn a_topic_that_is_hidden_from_all_members_is_not_kept_and_is_no_gap() {
    let mut sleepers = Sleepers::of("m/#", NonZeroU16::new(2));
    let hidden = message("m/$x", "hidden", QoS::AtLeastOnce);
    for _ in 0..3 {
        sleepers.bring_message(hidden.clone(), &[], |_| {});
        assert_eq!(hidden.refs(), 1, "before and after they fall asleep");
        sleepers.bring(&[], |_| {});
    }
    assert_eq!(sleepers.asleep(), SESSIONS);
    sleepers.judge();
}

/// The member alone says whether it can sleep, however many subscriptions its session has.
#[test]
fn subscriptions_are_not_searched_for_a_message() {
    let mut sleepers = Sleepers::new();
    for (_, slot) in &mut sleepers.shard.slots {
        slot.session.remove_subscription(FILTER);
    }
    sleepers.bring(&[], |_| {});
    assert_eq!(sleepers.asleep(), SESSIONS);
}

#[derive(Clone, Copy, Debug)]
enum Between {
    Wake(u32),
    /// A message of another link visits all members.
    Bring,
    Nothing,
}

fn between() -> impl Strategy<Value = Between> {
    prop_oneof![
        3 => (0..SESSIONS as u32).prop_map(Between::Wake),
        2 => Just(Between::Bring),
        2 => Just(Between::Nothing),
    ]
}

proptest! {
    #[test]
    fn every_member_gets_every_message_once_whoever_wakes_between_the_parts(
        passes in prop::collection::vec(
            (prop::collection::vec(1..4usize, 0..5), prop::collection::vec(between(), 5)),
            1..12,
        ),
    ) {
        let mut sleepers = Sleepers::new();
        for (parts, steps) in passes {
            let mut steps = steps.into_iter();
            sleepers.bring(&parts, |s| {
                let limits = s.limits.clone();
                match steps.next().unwrap_or(Between::Nothing) {
                    Between::Wake(slot) => s.shard.wake(slot, &limits),
                    Between::Bring => s.bring(&[], |_| {}),
                    Between::Nothing => {}
                }
            });
        }
        sleepers.judge();
    }
}
