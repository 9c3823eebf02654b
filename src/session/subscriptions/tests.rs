use proptest::prelude::*;

use super::*;
use crate::session::Incarnation;
use crate::time::Millis;
use crate::topics::has_wildcard;

fn subscription(filter: FilterId, name: &str) -> Subscription {
    Subscription {
        filter,
        name: name.into(),
        options: SubscribeOptions::default(),
        asked: QoS::AtMostOnce,
        identifier: None,
        active: false,
        overlaps: 0,
        shared: name.starts_with("$share/"),
        wild: has_wildcard(name),
        wild_below: None,
    }
}

/// Each subscription's number, and how many of the others overlap it.
fn overlap_counts(session: &Session) -> Vec<(FilterId, u32)> {
    let all = session.subscriptions();
    let count = |s: &Subscription| {
        let others = all.iter().filter(|o| o.filter != s.filter);
        others.filter(|o| s.overlaps_with(o)).count() as u32
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

/// Ends the subscription on a filter, if there is one.
fn end(session: &mut Session, filter: FilterId) -> Vec<Unsubscribed> {
    let place = session
        .subscriptions
        .iter()
        .position(|s| s.filter == filter);
    session.end_subscriptions(place.as_slice())
}

proptest! {
    #[test]
    fn subscriptions_that_end_together_end_as_if_one_after_the_other(
        steps in prop::collection::vec((0..NAMES.len() as u32, any::<bool>()), 0..12),
        ended in prop::collection::vec(0..NAMES.len() as u32, 0..8),
    ) {
        let begin = || {
            let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
            for (filter, granted) in &steps {
                let name = NAMES[*filter as usize];
                session.add_subscription(subscription(FilterId(*filter), name));
                if *granted {
                    session.activate_subscription(FilterId(*filter));
                }
            }
            session
        };
        let (mut one, mut all) = (begin(), begin());
        let mut filters: Vec<FilterId> = Vec::new();
        for filter in ended.into_iter().map(FilterId) {
            let there = all.subscriptions.iter().any(|s| s.filter == filter);
            if there && !filters.contains(&filter) {
                filters.push(filter);
            }
        }
        let places = filters.iter().map(|filter| {
            let is = |s: &Subscription| s.filter == *filter;
            all.subscriptions.iter().position(is).expect("there")
        });
        let places: Vec<usize> = places.collect();
        let together = all.end_subscriptions(&places);
        let in_turn: Vec<_> = filters.iter().flat_map(|f| end(&mut one, *f)).collect();
        let shown = |gone: &[Unsubscribed]| format!("{gone:?}");
        prop_assert_eq!(shown(&together), shown(&in_turn));
        let left = |session: &Session| format!("{:?}", session.subscriptions());
        prop_assert_eq!(left(&one), left(&all));
        prop_assert!(overlap_counts(&all).into_iter().eq(all.subscriptions().iter().map(|s| (s.filter, s.overlaps))));
    }

    #[test]
    fn overlaps_are_counted_whatever_comes_and_goes(
        steps in prop::collection::vec((0..NAMES.len() as u32, 0..4u8), 0..60),
    ) {
        let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
        for (filter, step) in steps {
            match step {
                0 => drop(session.remove_subscription(FilterId(filter))),
                1 => drop(end(&mut session, FilterId(filter))),
                2 => drop(session.activate_subscription(FilterId(filter))),
                _ => drop(session.add_subscription(subscription(FilterId(filter), NAMES[filter as usize]))),
            }
            let counted = session.subscriptions().iter().map(|s| (s.filter, s.overlaps));
            prop_assert_eq!(counted.collect::<Vec<_>>(), overlap_counts(&session));
        }
    }
}

#[test]
fn the_primary_copy_has_the_highest_qos_of_all() {
    let mut subscriptions = [
        subscription(FilterId(1), "a"),
        subscription(FilterId(2), "a/#"),
    ];
    for (s, qos) in subscriptions
        .iter_mut()
        .zip([QoS::AtMostOnce, QoS::AtLeastOnce])
    {
        s.active = true;
        s.options.qos = qos;
    }
    for (lost, filter) in [(0, 1), (1, 2), (2, 1)] {
        let is_lost = |number| number == FilterId(lost);
        let found = crate::session::primary(&subscriptions, "a", false, is_lost, &mut Vec::new());
        let found = found.map(|s| (s.filter, s.qos));
        assert_eq!(
            found,
            Some((FilterId(filter), QoS::AtLeastOnce)),
            "lost: {lost}"
        );
    }
}
