use std::sync::Arc;

use crate::mqtt::ReasonCode;
use crate::sim::testing::{PROBES, client, router, subscribe_handling, up};
use crate::time::Millis;
use crate::topics::FilterId;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::Machine;
use crate::upstream::link::retained::{REMEMBERED, RetainedLink};

/// A filter that is not fetched again, because nobody wants it any more, must not slow the others'
/// fetches for ever.
#[test]
fn a_suspect_that_nobody_wants_any_more_is_forgotten() {
    let router = router();
    let who = client(&router, "a");
    let mut link = RetainedLink::new(router.clone(), Arc::from(PROBES));
    let mut out = Vec::new();
    let mut fetches_of = |link: &mut RetainedLink, names: [&str; 2], now| {
        for name in names {
            subscribe_handling(&router, who, name, 0);
        }
        for subscribe in router.next_subscribes(0, 10) {
            router.suback(subscribe.filter, ReasonCode::SUCCESS, now);
        }
        link.poll(now, &mut out);
        link.fetches.len()
    };
    link.suspect(&[(FilterId::from_index(1000), "gone".into())], Millis::ZERO);
    link.connected(&up(false, 20), Millis::ZERO, &mut Vec::new());
    assert_eq!(fetches_of(&mut link, ["a", "b"], Millis::ZERO), 1);
    link.disconnected(&LinkEnd::Failover, Millis::ZERO);
    let later = Millis::ZERO + REMEMBERED;
    link.connected(&up(false, 20), later, &mut Vec::new());
    assert_eq!(
        link.fetches.iter().map(|f| f.filters.len()).sum::<usize>(),
        2
    );
    assert!(link.suspects.is_empty());
}
