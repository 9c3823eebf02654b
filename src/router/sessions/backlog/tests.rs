use proptest::prelude::*;

use super::*;
use crate::mqtt::{MessageSpec, Properties};
use crate::router::testing;

fn message(qos: QoS, size: usize) -> Message {
    Message::new(&MessageSpec {
        topic: "t",
        properties: Properties::default(),
        payload: &vec![b'x'; size],
        qos,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

fn limits(messages: usize, bytes: usize) -> SessionLimits {
    let router = testing::router();
    SessionLimits {
        queue_messages_max: messages,
        queue_bytes_max: bytes,
        ..router.limits().clone()
    }
}

fn push(backlog: &mut Backlog, limits: &SessionLimits, qos: QoS, size: usize) -> u64 {
    let number = backlog.arrived();
    for _ in 0..2 {
        backlog.keep(limits, &message(qos, size), None, 0, Millis::new(5));
    }
    number
}

fn numbers(backlog: &Backlog) -> Vec<u64> {
    backlog.since(0).map(|e| e.number).collect()
}

fn of(counts: &[(Reason, u64)]) -> Lost {
    let mut lost = Lost::default();
    for (reason, count) in counts {
        lost.add(*reason, *count);
    }
    lost
}

#[test]
fn a_full_backlog_drops_the_oldest_and_knows_how_many_each_sleeper_lost() {
    let (mut backlog, limits) = (Backlog::default(), limits(3, 1 << 20));
    backlog.add(&[Sleeper::new(4, 0, true)], None);
    for _ in 0..4 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    }
    backlog.add(&[Sleeper::new(2, 4, true)], None);
    push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    assert_eq!(numbers(&backlog), [2, 3, 4]);
    let slots: Vec<u32> = backlog.sleepers().map(|s| s.slot).collect();
    assert_eq!(slots, [2, 4]);
    let lost = |slot| backlog.sleeper(slot).map(|s| backlog.lost(s));
    assert_eq!(lost(4), Some(of(&[(Reason::Messages, 2)])));
    assert_eq!(lost(2), Some(Lost::default()));
    assert_eq!(backlog.count_since(4), 1);
}

#[test]
fn a_backlog_is_bounded_in_bytes() {
    let size = message(QoS::AtLeastOnce, 100).size();
    let (mut backlog, limits) = (Backlog::default(), limits(100, 3 * size));
    backlog.add(&[Sleeper::new(0, 0, true)], None);
    for _ in 0..5 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 100);
    }
    assert_eq!(numbers(&backlog), [2, 3, 4]);
    // One that is larger than the limit displaces nothing.
    push(&mut backlog, &limits, QoS::AtLeastOnce, 4 * size);
    assert_eq!(numbers(&backlog), [2, 3, 4]);
    assert_eq!(backlog.bytes, 3 * size);
    let lost = of(&[(Reason::Bytes, 3)]);
    assert_eq!(backlog.lost(&backlog.sleepers[0]), lost);
}

#[test]
fn messages_that_are_for_no_sleeper_are_counted_only() {
    let (mut backlog, limits) = (Backlog::default(), limits(100, 1 << 20));
    backlog.add(&[Sleeper::new(0, 0, false)], None);
    push(&mut backlog, &limits, QoS::ExactlyOnce, 1);
    backlog.add(&[Sleeper::new(1, 1, true)], None);
    push(&mut backlog, &limits, QoS::AtMostOnce, 1);
    push(&mut backlog, &limits, QoS::ExactlyOnce, 1);
    assert_eq!(numbers(&backlog), [2]);
    let lost = |at: usize| backlog.lost(&backlog.sleepers[at]);
    let unkept = [2, 1].map(|count| of(&[(Reason::Qos0, count)]));
    assert_eq!([lost(0), lost(1)], unkept);
    assert!(backlog.remove(1).is_some() && backlog.remove(1).is_none());
    push(&mut backlog, &limits, QoS::ExactlyOnce, 1);
    assert_eq!(numbers(&backlog), [2]);
}

#[test]
fn a_backlog_that_is_trimmed_names_the_budget() {
    let (mut backlog, limits) = (Backlog::default(), limits(4, 1 << 20));
    backlog.add(&[Sleeper::new(0, 0, true)], None);
    for _ in 0..5 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    }
    assert_eq!(backlog.trim(), 2);
    for _ in 0..3 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    }
    assert_eq!(numbers(&backlog), [4, 5, 6, 7]);
    let lost = of(&[(Reason::Messages, 2), (Reason::Budget, 2)]);
    assert_eq!(backlog.lost(&backlog.sleepers[0]), lost);
    assert_eq!(
        (
            backlog.trim(),
            backlog.trim(),
            backlog.trim(),
            backlog.trim()
        ),
        (2, 1, 1, 0)
    );
    assert_eq!(backlog.held(), Held::default());
}

#[test]
fn numbers_beyond_32_bits_are_kept() {
    for cursor in [0, u64::from(u32::MAX), 1 << 32, (1 << 48) - 1] {
        assert_eq!(Sleeper::new(1, cursor, true).cursor(), cursor);
    }
}

#[test]
fn messages_that_are_for_no_sleeper_any_longer_are_dropped() {
    let (mut backlog, limits) = (Backlog::default(), limits(4, 1 << 20));
    backlog.add(&[Sleeper::new(0, 0, true), Sleeper::new(1, 0, true)], None);
    for slot in 2..4 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
        let next = backlog.next();
        backlog.add(&[Sleeper::new(slot, next, true)], None);
    }
    push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    let mut left = |slot| {
        backlog.remove(slot);
        backlog.drop_unowned();
        numbers(&backlog)
    };
    assert_eq!(left(0), [0, 1, 2]);
    assert_eq!(left(3), [0, 1, 2]);
    assert_eq!(left(1), [1, 2]);
    assert!(left(2).is_empty());
    assert_eq!(backlog.held(), Held::default());
}

#[test]
fn each_lost_message_has_the_reason_for_which_it_was_dropped() {
    let (mut backlog, mut limits) = (Backlog::default(), limits(3, 1 << 20));
    limits.queue_age_max = Some(std::time::Duration::from_millis(10));
    let slots = |from: u32, cursor| [Sleeper::new(from, cursor, true)];
    backlog.add(&slots(0, 0), None);
    // Numbers 0 to 6.
    for kept in [true, false, true, true, false, true, true] {
        let qos = [QoS::AtMostOnce, QoS::AtLeastOnce][usize::from(kept)];
        push(&mut backlog, &limits, qos, 1);
    }
    let lost = |backlog: &Backlog, slot| backlog.sleeper(slot).map(|s| backlog.lost(s));
    let first = [(Reason::Messages, 2), (Reason::Qos0, 2)];
    assert_eq!(lost(&backlog, 0), Some(of(&first)));
    let next = backlog.next();
    backlog.add(&slots(1, next), None);
    push(&mut backlog, &limits, QoS::AtMostOnce, 1);
    assert_eq!(backlog.trim(), 2);
    let more = [
        (Reason::Messages, 2),
        (Reason::Qos0, 3),
        (Reason::Budget, 2),
    ];
    assert_eq!(lost(&backlog, 0), Some(of(&more)));
    assert_eq!(lost(&backlog, 1), Some(of(&[(Reason::Qos0, 1)])));
    push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    backlog.purge(&limits, Millis::new(20));
    assert_eq!(numbers(&backlog).len(), 0);
    // Those of the first sleeper are two, and one is the second one's. Its reasons are estimated.
    let aged = [more[0], more[1], more[2], (Reason::Age, 2)];
    assert_eq!(lost(&backlog, 0), Some(of(&aged)));
    assert_eq!(lost(&backlog, 1).map(|lost| lost.sum()), Some(2));
    // With the first sleeper its part of the numbers goes.
    backlog.remove(0);
    backlog.drop_unowned();
    assert_eq!(lost(&backlog, 1).map(|lost| lost.sum()), Some(2));
    assert_eq!(backlog.front.sum(), 0);
}

/// Metrics are read while a million clients sleep.
#[test]
fn messages_of_sleepers_are_counted_without_a_look_at_each_of_them() {
    let (mut backlog, limits) = (Backlog::default(), limits(3, 1 << 20));
    backlog.add(&[Sleeper::new(0, 0, true), Sleeper::new(1, 1, true)], None);
    push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    assert_eq!((backlog.owed_at_once(), backlog.owed()), (None, 1));
    for count in [3, 5, 6] {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
        assert_eq!(backlog.owed(), count);
    }
    assert_eq!(backlog.owed_at_once(), Some(6));
}

/// A message is offered again when members fall asleep with it.
#[test]
fn a_message_that_finds_new_sleepers_is_kept_or_dropped_once() {
    let limits = limits(3, 1 << 20);
    let keep = |backlog: &mut Backlog| {
        let message = message(QoS::AtLeastOnce, 1);
        backlog.keep(&limits, &message, None, 0, Millis::ZERO);
    };
    // The first member has got the message, and the second one is owed none of QoS 1.
    let mut backlog = Backlog::default();
    backlog.arrived();
    backlog.add(&[Sleeper::new(0, 1, true), Sleeper::new(1, 0, false)], None);
    keep(&mut backlog);
    assert!(numbers(&backlog).is_empty());
    for _ in 0..5 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    }
    let lost = of(&[(Reason::Messages, 2)]);
    assert_eq!(backlog.lost(&backlog.sleepers[0]), lost);
    // Its only reader is gone before another one comes.
    let mut backlog = Backlog::default();
    backlog.add(&[Sleeper::new(0, 0, true), Sleeper::new(1, 0, false)], None);
    let number = push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    backlog.remove(0);
    backlog.drop_unowned();
    assert!(numbers(&backlog).is_empty() && !backlog.has_dropped(number));
    backlog.add(&[Sleeper::new(2, number, true)], None);
    keep(&mut backlog);
    assert_eq!(numbers(&backlog), [number]);
    // It was dropped for the budget.
    backlog.trim();
    assert!(backlog.has_dropped(number));
    keep(&mut backlog);
    assert!(numbers(&backlog).is_empty());
}

#[test]
fn a_backlog_gives_back_the_memory_of_messages_that_have_left() {
    let (mut backlog, limits) = (Backlog::default(), limits(1000, 1 << 20));
    backlog.add(&[Sleeper::new(0, 0, true)], None);
    for _ in 0..1000 {
        push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    }
    let next = backlog.next();
    backlog.add(&[Sleeper::new(1, next, true)], None);
    push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
    backlog.remove(0);
    backlog.drop_unowned();
    assert_eq!(backlog.entries.len(), 1);
    assert!(backlog.entries.capacity() < 10);
}

#[test]
fn members_that_leave_are_taken_out_together() {
    let mut backlog = Backlog::default();
    let all: Vec<Sleeper> = (0..100).map(|slot| Sleeper::new(slot, 0, true)).collect();
    backlog.add(&all, None);
    let place = |backlog: &Backlog| (backlog.count(), backlog.sleepers.len());
    for slot in 0..50 {
        assert!(backlog.remove(slot).is_some() && backlog.remove(slot).is_none());
    }
    assert_eq!(place(&backlog), (50, 100));
    backlog.remove(70);
    assert_eq!(place(&backlog), (49, 49));
    assert!(backlog.sleepers.capacity() < 100);
    // One of them falls asleep again before it is taken out.
    backlog.remove(71);
    backlog.add(&[Sleeper::new(71, 9, true)], None);
    assert_eq!(backlog.sleeper(71).map(Sleeper::cursor), Some(9));
    assert_eq!(place(&backlog), (49, 49));
}

proptest! {
    #[test]
    fn the_first_message_is_for_a_sleeper(
        steps in prop::collection::vec((0..6u8, 0..10u32, any::<bool>()), 0..100),
    ) {
        let (mut backlog, mut limits) = (Backlog::default(), limits(5, 1 << 20));
        limits.queue_age_max = Some(std::time::Duration::from_millis(1));
        let mut known = std::collections::BTreeSet::new();
        for (step, slot, keeps) in steps {
            match step {
                0 if backlog.sleeper(slot).is_none() => {
                    let next = backlog.next();
                    backlog.add(&[Sleeper::new(slot, next, keeps)], None);
                    known.insert(slot);
                }
                1 => {
                    prop_assert_eq!(backlog.remove(slot).is_some(), known.remove(&slot));
                    backlog.drop_unowned();
                }
                2 if keeps => {
                    backlog.trim();
                }
                3 if keeps => backlog.purge(&limits, Millis::new(6)),
                // The member falls asleep with this message, perhaps after others have left.
                4 => {
                    let number = push(&mut backlog, &limits, QoS::AtLeastOnce, 1);
                    if keeps && let Some(first) = known.pop_first() {
                        backlog.remove(first);
                        backlog.drop_unowned();
                    } else if slot == 9 {
                        backlog.trim();
                    }
                    if !backlog.has_dropped(number) && known.insert(slot) {
                        backlog.add(&[Sleeper::new(slot, number, slot != 3)], None);
                        let message = message(QoS::AtLeastOnce, 1);
                        backlog.keep(&limits, &message, None, 0, Millis::new(5));
                    }
                }
                _ => {
                    let qos = [QoS::AtMostOnce, QoS::AtLeastOnce][usize::from(slot > 2)];
                    push(&mut backlog, &limits, qos, 1);
                }
            }
            prop_assert!(backlog.sleepers().map(|s| s.slot).eq(known.iter().copied()));
            prop_assert_eq!(backlog.count(), known.len());
            prop_assert_eq!(backlog.behind(slot, 1), known.range(slot..).nth(1).copied());
            prop_assert_eq!(backlog.open, known.len());
            prop_assert_eq!(backlog.keeping(), backlog.keepers().count());
            let owed = backlog.keepers().map(|s| backlog.count_since(s.cursor()));
            prop_assert_eq!(backlog.owed(), owed.sum::<usize>());
            for s in backlog.keepers() {
                let all = backlog.lost(s).sum() + backlog.count_since(s.cursor()) as u64;
                prop_assert_eq!(all, backlog.next() - s.cursor());
            }
            let cursors = backlog.sleepers().filter(|s| s.keeps).map(Sleeper::cursor);
            match (cursors.min(), backlog.since(0).next()) {
                (Some(lowest), Some(first)) => prop_assert!(lowest <= first.number),
                (None, Some(_)) => prop_assert!(false, "a message is for nobody"),
                (_, None) => {}
            }
        }
    }
}
