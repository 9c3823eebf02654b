use super::*;
use crate::router::types::{SessionRef, SubscribeRef};
use crate::session::Incarnation;

const GROUP: FilterId = FilterId(9);

fn filter() -> Filter {
    Filter::new("a/b".into())
}

/// A filter on link 0 whose SUBSCRIBE at `qos` is sent.
fn subscribing(qos: QoS) -> Filter {
    let mut filter = filter();
    filter.place_on(0);
    assert!(filter.request(qos));
    assert_eq!(filter.subscribe_sent(QoS::AtMostOnce), Some(qos));
    filter
}

/// A filter on link 0 that the broker has granted at `qos`.
fn active(qos: QoS) -> Filter {
    let mut filter = subscribing(qos);
    assert!(matches!(
        filter.suback(code(qos)),
        SubackOutcome::Granted { again: false, .. }
    ));
    filter
}

fn code(qos: QoS) -> ReasonCode {
    ReasonCode(qos as u8)
}

fn grant(qos: QoS, deadline: Millis) -> PendingGrant {
    PendingGrant {
        subscribe: SubscribeRef {
            session: SessionRef {
                shard: 0,
                slot: 0,
                slot_version: 0,
            },
            connection_no: 1,
            packet_id: 1,
            index: 0,
        },
        filter: FilterId(0),
        incarnation: Incarnation::nth(1),
        qos,
        granted: false,
        retained: false,
        wait: None,
        deadline,
    }
}

#[test]
fn the_first_request_queues_a_subscribe_and_others_wait_for_its_answer() {
    let mut filter = filter();
    assert!(filter.request(QoS::AtMostOnce));
    assert_eq!(filter.phase(), Phase::Pending);
    assert!(!filter.request(QoS::AtLeastOnce), "it is queued already");
    // The SUBSCRIBE is sent at the highest QoS that was asked for until then.
    assert_eq!(
        filter.subscribe_sent(QoS::AtMostOnce),
        Some(QoS::AtLeastOnce)
    );
    assert!(!filter.request(QoS::ExactlyOnce));
    assert_eq!(filter.subscribe_sent(QoS::AtMostOnce), None);
    let granted = SubackOutcome::Granted {
        asked: QoS::AtLeastOnce,
        again: true,
        presumed: false,
    };
    assert_eq!(filter.suback(code(QoS::AtLeastOnce)), granted);
    assert_eq!(filter.phase(), Phase::Active { raising: true });
    assert_eq!(
        filter.subscribe_sent(QoS::AtMostOnce),
        Some(QoS::ExactlyOnce)
    );
}

#[test]
fn a_subscribe_asks_for_the_floor_at_least() {
    let mut filter = filter();
    filter.request(QoS::AtMostOnce);
    assert_eq!(
        filter.subscribe_sent(QoS::AtLeastOnce),
        Some(QoS::AtLeastOnce)
    );
    assert_eq!(filter.wanted(), QoS::AtLeastOnce);
}

#[test]
fn an_active_filter_is_asked_for_again_only_at_a_higher_qos() {
    let mut filter = active(QoS::AtLeastOnce);
    assert!(!filter.request(QoS::AtLeastOnce));
    assert!(filter.grants(QoS::AtLeastOnce));
    assert!(filter.request(QoS::ExactlyOnce));
    assert!(!filter.request(QoS::ExactlyOnce), "once");
    assert!(filter.is_rising() && filter.is_active());
    // A client that asks for more waits for the answer; one that asks for less does not.
    assert!(!filter.grants(QoS::ExactlyOnce) && filter.grants(QoS::AtLeastOnce));
}

#[test]
fn a_client_is_granted_no_more_than_the_broker_granted() {
    let mut filter = subscribing(QoS::ExactlyOnce);
    assert!(!filter.grants(QoS::AtMostOnce));
    filter.suback(code(QoS::AtLeastOnce));
    assert!(filter.grants(QoS::ExactlyOnce), "there is nothing to await");
    assert_eq!(filter.grant(QoS::ExactlyOnce), QoS::AtLeastOnce);
    assert_eq!(filter.grant(QoS::AtMostOnce), QoS::AtMostOnce);
}

#[test]
fn a_refused_filter_is_absent_and_can_be_asked_for_again() {
    let mut filter = subscribing(QoS::AtLeastOnce);
    assert_eq!(
        filter.suback(ReasonCode::NOT_AUTHORIZED),
        SubackOutcome::Refused
    );
    assert_eq!(filter.phase(), Phase::Absent);
    assert!(!filter.is_granted() && !filter.is_rising());
    assert!(filter.request(QoS::AtMostOnce));
}

#[test]
fn a_refused_raise_leaves_the_filter_active_at_its_qos() {
    let mut filter = active(QoS::AtMostOnce);
    filter.request(QoS::AtLeastOnce);
    filter.subscribe_sent(QoS::AtMostOnce);
    assert_eq!(
        filter.suback(ReasonCode::QUOTA_EXCEEDED),
        SubackOutcome::Refused
    );
    assert_eq!(filter.phase(), Phase::Active { raising: false });
    assert_eq!(filter.granted(), QoS::AtMostOnce);
}

#[test]
fn an_answer_that_nobody_waits_for_changes_nothing() {
    let mut filter = active(QoS::AtLeastOnce);
    assert_eq!(filter.suback(code(QoS::AtMostOnce)), SubackOutcome::Stray);
    assert_eq!(filter.granted(), QoS::AtLeastOnce);
    assert_eq!(filter.unsuback(), Unsubacked::Stray);
    assert!(filter.is_active());
    let mut filter = self::filter();
    assert_eq!(filter.suback(code(QoS::AtMostOnce)), SubackOutcome::Stray);
    assert_eq!(filter.phase(), Phase::Absent);
}

#[test]
fn a_presumed_grant_counts_once_the_broker_answers() {
    let mut filter = subscribing(QoS::AtLeastOnce);
    filter.presume();
    assert!(filter.grants(QoS::AtLeastOnce) && !filter.is_confirmed());
    assert_eq!(filter.grant(QoS::AtMostOnce), QoS::AtMostOnce);
    let granted = SubackOutcome::Granted {
        asked: QoS::AtLeastOnce,
        again: false,
        presumed: true,
    };
    assert_eq!(filter.suback(code(QoS::AtLeastOnce)), granted);
    assert!(filter.is_confirmed() && !filter.is_presumed());
}

#[test]
fn a_presumed_grant_that_is_refused_is_remembered_until_the_broker_grants() {
    let mut filter = subscribing(QoS::AtLeastOnce);
    filter.presume();
    assert_eq!(
        filter.suback(ReasonCode::NOT_AUTHORIZED),
        SubackOutcome::Refused
    );
    assert!(!filter.is_granted() && filter.is_presumed());
    filter.request(QoS::AtLeastOnce);
    filter.subscribe_sent(QoS::AtMostOnce);
    assert!(matches!(
        filter.suback(code(QoS::AtLeastOnce)),
        SubackOutcome::Granted { presumed: true, .. }
    ));
}

#[test]
fn a_presumed_grant_stays_so_while_more_is_asked_for() {
    let mut filter = subscribing(QoS::AtMostOnce);
    filter.presume();
    filter.request(QoS::AtLeastOnce);
    assert!(matches!(
        filter.suback(code(QoS::AtMostOnce)),
        SubackOutcome::Granted {
            again: true,
            presumed: true,
            ..
        }
    ));
    assert!(filter.is_presumed());
}

#[test]
fn a_root_that_is_answered_ends_the_presumption_of_the_filters_below() {
    let mut filter = filter();
    filter.place_inside(FilterId(3));
    assert_eq!(filter.source(), Some(FilterId(3)));
    assert!(filter.is_active() && filter.link().is_none());
    assert!(!filter.outer_answered());
    filter.presume();
    assert!(filter.outer_answered());
    assert!(!filter.is_presumed());
}

#[test]
fn a_filter_stays_granted_while_its_link_is_away() {
    let mut filter = active(QoS::AtLeastOnce);
    assert_eq!(filter.resume(LinkSession::New), Resumed::Regain);
    assert_eq!(filter.phase(), Phase::Pending);
    assert!(filter.is_granted() && filter.is_confirmed());
    // It is under way to the same QoS, so nobody waits.
    assert!(filter.grants(QoS::AtLeastOnce));
}

#[test]
fn a_resumed_session_keeps_what_was_granted_and_repeats_what_was_under_way() {
    let mut rests = active(QoS::AtMostOnce);
    assert_eq!(rests.resume(LinkSession::Resumed), Resumed::Rests);
    rests.request(QoS::AtLeastOnce);
    assert_eq!(rests.resume(LinkSession::Resumed), Resumed::Subscribe);
    assert_eq!(rests.phase(), Phase::Active { raising: true });
    let mut doubtful = active(QoS::AtMostOnce);
    assert_eq!(doubtful.resume(LinkSession::Doubtful), Resumed::Regain);
    let mut under_way = subscribing(QoS::AtMostOnce);
    assert_eq!(under_way.resume(LinkSession::Resumed), Resumed::Subscribe);
    assert_eq!(under_way.phase(), Phase::Pending);
    assert_eq!(filter().resume(LinkSession::New), Resumed::Rests);
}

#[test]
fn an_unsubscribe_that_was_under_way_is_repeated_unless_the_session_is_new() {
    let unsubscribing = || {
        let mut filter = active(QoS::AtMostOnce);
        filter.reference(1);
        assert!(filter.unreference(1, Millis::new(10)));
        assert_eq!(filter.release(), Release::Unsubscribe(0));
        filter
    };
    let mut filter = unsubscribing();
    assert_eq!(filter.resume(LinkSession::Resumed), Resumed::Unsubscribe);
    assert_eq!(filter.resume(LinkSession::Doubtful), Resumed::Unsubscribe);
    assert_eq!(filter.resume(LinkSession::New), Resumed::Remove);
    let mut filter = unsubscribing();
    filter.reference(1);
    assert_eq!(filter.resume(LinkSession::New), Resumed::Subscribe);
}

#[test]
fn a_filter_is_released_by_an_unsubscribe_if_the_broker_may_have_it() {
    assert_eq!(filter().release(), Release::Remove);
    assert_eq!(subscribing(QoS::AtMostOnce).release(), Release::Later);
    let mut unsubscribing = active(QoS::AtMostOnce);
    assert_eq!(unsubscribing.release(), Release::Unsubscribe(0));
    assert!(!unsubscribing.is_granted());
    assert_eq!(unsubscribing.release(), Release::Later);
    let mut pending = filter();
    pending.place_on(0);
    pending.request(QoS::AtMostOnce);
    assert_eq!(pending.release(), Release::Remove, "nothing was sent");
    let mut regained = active(QoS::AtMostOnce);
    regained.resume(LinkSession::Doubtful);
    assert_eq!(regained.release(), Release::Unsubscribe(0));
    let mut lost = active(QoS::AtMostOnce);
    lost.resume(LinkSession::New);
    assert_eq!(lost.release(), Release::Remove);
    let mut awaited = active(QoS::AtMostOnce);
    awaited.await_suback(grant(QoS::AtMostOnce, Millis::new(10)));
    assert_eq!(awaited.release(), Release::Later);
    let mut below = filter();
    below.place_inside(FilterId(3));
    assert_eq!(below.release(), Release::Remove);
}

#[test]
fn a_filter_that_is_used_again_is_subscribed_again_after_its_unsuback() {
    let mut filter = active(QoS::AtLeastOnce);
    filter.reference(0);
    filter.unreference(0, Millis::new(10));
    filter.release();
    filter.reference(0);
    assert!(!filter.request(QoS::AtMostOnce), "the UNSUBACK comes first");
    assert_eq!(filter.unsuback(), Unsubacked::Again(QoS::AtLeastOnce));
    assert!(filter.request(QoS::AtLeastOnce));
    let mut filter = active(QoS::AtLeastOnce);
    filter.reference(0);
    filter.unreference(0, Millis::new(10));
    filter.release();
    assert_eq!(filter.unsuback(), Unsubacked::Remove);
}

#[test]
fn a_filter_moves_to_another_link_if_it_was_wanted_on_the_first() {
    let mut filter = active(QoS::AtMostOnce);
    filter.unplace();
    assert!(!filter.moved(), "it has no link yet");
    filter.place_on(3);
    assert!(filter.moved());
    assert_eq!((filter.phase(), filter.link()), (Phase::Pending, Some(3)));
    assert!(filter.is_granted());
    let mut absent = self::filter();
    absent.place_on(3);
    assert!(!absent.moved());
}

#[test]
fn a_filter_that_no_link_can_take_is_not_granted() {
    let mut filter = active(QoS::AtMostOnce);
    filter.unservable();
    assert_eq!(filter.phase(), Phase::Absent);
    assert!(!filter.is_granted());
}

#[test]
fn a_filter_is_idle_once_its_last_user_is_gone() {
    let mut filter = filter();
    assert!(filter.is_wanted(), "it is about to be used");
    assert_eq!(filter.reference(5), None);
    filter.reference(5);
    filter.reference(7);
    assert_eq!(filter.mask(), 1 << 5 | 1 << 7);
    assert!(!filter.unreference(5, Millis::new(10)));
    assert!(!filter.unreference(7, Millis::new(20)));
    assert_eq!(filter.mask(), 1 << 5);
    assert!(filter.unreference(5, Millis::new(30)));
    assert_eq!(
        (filter.mask(), filter.idle_since()),
        (0, Some(Millis::new(30)))
    );
    filter.count_unread();
    assert_eq!((filter.unread(), filter.is_wanted()), (1, false));
    assert_eq!(filter.reference(5), Some(Millis::new(30)));
    assert_eq!((filter.unread(), filter.idle_since()), (0, None));
}

#[test]
fn a_local_group_keeps_its_plain_filter_in_use() {
    let mut filter = filter();
    filter.add_group(GROUP);
    filter.add_group(GROUP);
    assert_eq!(filter.groups(), [GROUP]);
    filter.reference(0);
    assert!(!filter.unreference(0, Millis::new(10)), "the group uses it");
    assert!(filter.remove_group(GROUP, Millis::new(20)));
    assert_eq!(filter.add_group(GROUP), Some(Millis::new(20)));
    let mut group = Filter::new("$share/g/a/b".into());
    assert_eq!((group.is_shared(), group.topics()), (true, "a/b"));
    group.place_locally(FilterId(1));
    assert_eq!(group.source(), Some(FilterId(1)));
    assert!(group.is_active());
}

#[test]
fn a_root_is_never_idle() {
    let mut root = Filter::idle("a/#".into(), Millis::ZERO);
    assert_eq!(root.make_root(), Some(Millis::ZERO));
    assert!(root.is_root() && root.is_wanted());
    root.reference(0);
    assert!(!root.unreference(0, Millis::new(10)));
    assert_eq!(root.wanted(), QoS::ExactlyOnce);
    root.place_on(0);
    assert!(root.moved(), "it is subscribed as soon as it has a link");
}

#[test]
fn grants_are_answered_up_to_a_qos_and_when_they_are_late() {
    let mut filter = filter();
    for (qos, deadline) in [
        (QoS::AtMostOnce, 10),
        (QoS::ExactlyOnce, 20),
        (QoS::AtLeastOnce, 30),
    ] {
        filter.await_suback(grant(qos, Millis::new(deadline)));
    }
    assert!(filter.is_awaited());
    assert_eq!(filter.take_answered(QoS::AtMostOnce).len(), 1);
    assert_eq!(
        filter.deadlines().collect::<Vec<_>>(),
        [20, 30].map(Millis::new)
    );
    assert!(filter.take_late(Millis::new(19)).is_empty());
    assert_eq!(filter.take_late(Millis::new(20)).len(), 1);
    assert_eq!(filter.take_answered(QoS::ExactlyOnce).len(), 1);
    assert!(!filter.is_awaited());
    assert_eq!(filter.awaiting_suback.capacity(), 0, "no room is kept");
}
