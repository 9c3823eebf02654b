use proptest::prelude::*;

use super::*;
use crate::mqtt::{QoS, SubscribeOptions, has_wildcard};

fn subscription(filter: u32, name: &str) -> Subscription {
    Subscription {
        filter,
        name: name.into(),
        options: SubscribeOptions::default(),
        asked: QoS::AtMostOnce,
        identifier: 0,
        active: false,
        overlaps: 0,
        shared: name.starts_with("$share/"),
        wild: has_wildcard(name),
    }
}

/// Each subscription's number, and how many of the others clash with it.
fn clashes(session: &Session) -> Vec<(u32, u32)> {
    let all = session.subscriptions();
    let count = |s: &Subscription| {
        let others = all.iter().filter(|o| o.filter != s.filter);
        others.filter(|o| clash(s, o)).count() as u32
    };
    all.iter().map(|s| (s.filter, count(s))).collect()
}

const NAMES: &[&str] = &[
    "a",
    "a/b",
    "a/+",
    "+/b",
    "+",
    "#",
    "a/#",
    "b/#",
    "b",
    "$share/g/#",
    "$SYS/#",
    "+/+",
];

proptest! {
    #[test]
    fn overlaps_are_counted_whatever_comes_and_goes(
        steps in prop::collection::vec((0..NAMES.len() as u32, 0..4u8), 0..60),
    ) {
        let mut session = Session::new("c".into(), "p".into(), 1, 0);
        for (filter, step) in steps {
            match step {
                0 => drop(session.remove_subscription(filter)),
                1 => drop(session.leave_subscription(filter)),
                2 => drop(session.activate_subscription(filter)),
                _ => drop(session.add_subscription(subscription(filter, NAMES[filter as usize]))),
            }
            let counted = session.subscriptions().iter().map(|s| (s.filter, s.overlaps));
            prop_assert_eq!(counted.collect::<Vec<_>>(), clashes(&session));
        }
    }
}
