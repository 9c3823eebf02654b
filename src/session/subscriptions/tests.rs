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

/// Puts a subscription in force.
fn add(session: &mut Session, new: Subscription) {
    let others = session.subscriptions().iter();
    let overlapping = others.filter(|o| o.filter != new.filter && o.overlaps_with(&new));
    let overlapping: Vec<FilterId> = overlapping.map(|o| o.filter).collect();
    session.add_subscription(new, &overlapping);
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

/// For each ended filter: whether others take over from it, and the overlapping filters over which it was
/// primary and that had not ended before.
fn handed_over(gone: &[Unsubscribed]) -> Vec<(FilterId, bool, Vec<FilterId>)> {
    let earlier = |at: usize| gone[..at].iter().map(|g| g.filter);
    let all = gone.iter().enumerate().map(|(at, g)| {
        let over = g.primary_over.as_ref();
        let others = (0..NAMES.len() as u32).map(FilterId);
        let others = others.filter(|f| crate::topics::overlaps(NAMES[f.index()], &g.name));
        let others = others.filter(|f| earlier(at).all(|gone| gone != *f));
        let others = others.filter(|f| over.is_some_and(|over| over.contains(*f)));
        (g.filter, over.is_some(), others.collect())
    });
    all.collect()
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
                add(&mut session, subscription(FilterId(*filter), name));
                if *granted {
                    session.activate_subscription(FilterId(*filter));
                }
            }
            session
        };
        let (mut one, mut all, mut many) = (begin(), begin(), begin());
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
        let together = handed_over(&all.end_subscriptions(&places));
        let in_turn: Vec<_> = filters.iter().flat_map(|f| end(&mut one, *f)).collect();
        prop_assert_eq!(&together, &handed_over(&in_turn));
        // As many filters end that not all pairs are compared: more than one comparison for each.
        let compared = many.end_compared(&places, places.len() * many.subscriptions.len() - usize::from(!places.is_empty()));
        prop_assert_eq!(&together, &handed_over(&compared));
        let left = |session: &Session| format!("{:?}", session.subscriptions());
        prop_assert_eq!(left(&one), left(&all));
        prop_assert_eq!(left(&one), left(&many));
        prop_assert!(overlap_counts(&all).into_iter().eq(all.subscriptions().iter().map(|s| (s.filter, s.overlaps))));
    }

    #[test]
    fn what_is_not_compared_counts_as_overlapping(
        steps in prop::collection::vec(0..NAMES.len() as u32, 0..12),
        ended in 0..12usize,
        comparisons in 0..8usize,
    ) {
        let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
        for filter in steps {
            add(&mut session, subscription(FilterId(filter), NAMES[filter as usize]));
            session.activate_subscription(FilterId(filter));
        }
        let places: Vec<usize> = (0..ended.min(session.subscriptions.len())).collect();
        let before = session.subscriptions.clone();
        let gone = session.end_compared(&places, comparisons);
        for (at, gone) in gone.iter().enumerate() {
            let later = before[at + 1..].iter();
            let later = later.filter(|s| s.overlaps_with(&before[at]));
            for later in later {
                prop_assert!(gone.primary_over.as_ref().is_some_and(|over| over.contains(later.filter)));
            }
        }
        let counted = session.subscriptions().iter().zip(overlap_counts(&session));
        for (s, (_, overlaps)) in counted {
            prop_assert!(s.overlaps >= overlaps);
        }
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
                _ => add(&mut session, subscription(FilterId(filter), NAMES[filter as usize])),
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

/// A filter that overlaps that of any other number.
fn overlapping(number: usize) -> String {
    let level = |at: usize| if number >> at & 1 == 1 { "+" } else { "a" };
    (0..12).map(level).collect::<Vec<_>>().join("/")
}

#[test]
fn the_comparisons_of_an_unsubscribe_grow_with_the_number_of_filters_only() {
    const COUNT: usize = 2000;
    // All filters, and every other one.
    for step in [1, 2] {
        let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
        let mut others = Vec::new();
        for n in 0..COUNT {
            let filter = FilterId(n as u32);
            session.add_subscription(subscription(filter, &overlapping(n)), &others);
            session.activate_subscription(filter);
            others.push(filter);
        }
        let places: Vec<usize> = (0..COUNT).step_by(step).collect();
        let mut gone = Vec::new();
        let comparisons = crate::topics::comparisons::made_by(|| {
            gone = session.end_subscriptions(&places);
        });
        assert!(comparisons <= 2 * COMPARED_EACH * COUNT, "{comparisons}");
        let handed_over = gone.iter().filter(|g| g.primary_over.is_some());
        assert!(handed_over.count() >= places.len() - 1);
    }
}

#[test]
fn the_options_of_all_subscriptions_follow_the_bridge_bit_of_the_connection() {
    let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
    for (number, name) in (1..).zip(["a/#", "$share/g/a"]) {
        session.add_subscription(subscription(FilterId(number), name), &[]);
    }
    let options = |session: &Session| {
        let all = session.subscriptions().iter().map(|s| s.options);
        all.map(|o| (o.no_local, o.retain_as_published))
            .collect::<Vec<_>>()
    };
    assert!(!session.set_bridge(false), "as before");
    assert!(session.set_bridge(true));
    assert_eq!(options(&session), [(true, true), (false, true)]);
    assert!(!session.set_bridge(true), "as before");
    assert!(session.set_bridge(false));
    assert_eq!(options(&session), [(false, false), (false, false)]);
}
