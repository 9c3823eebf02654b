//! Promises that the oracle must not find broken, and promises that it must.

use crate::mqtt::{QoS, ReasonCode, SubscribeOptions};
use crate::sim::kept::Survival;
use crate::sim::oracle::{Conditions, Oracle};
use crate::sim::seen::Got;
use crate::streams::StreamId;
use crate::time::Millis;

const CONTROL: StreamId = StreamId::CONTROL;

/// An oracle of two clients and a quiet broker. Client 0 is a member of a shared group at QoS 1, client
/// 1 at `other`.
fn group_of(other: QoS) -> Oracle {
    let mut oracle = Oracle::new(Conditions {
        clients_v5: vec![true; 2],
        stormy: false,
        refuses: true,
        data_links: 1,
        lowest_qos: false,
        small_window: false,
    });
    for (n, qos) in [(0, QoS::AtLeastOnce), (1, other)] {
        let options = SubscribeOptions {
            qos,
            ..SubscribeOptions::default()
        };
        let filter = "$share/g/a";
        oracle.subscribes(
            n,
            (1, CONTROL),
            &[(filter.to_owned(), options)],
            Millis::new(10),
        );
        oracle.granted(n, 1, filter, qos as u8, Millis::new(20));
    }
    oracle
}

/// The fault that the oracle finds if nobody receives a message of QoS 1 and client 1 loses its connection.
fn missing(other: QoS, unread: bool, lost_at: u64) -> Option<String> {
    let mut oracle = group_of(other);
    oracle.published(0, 1, "a", QoS::AtLeastOnce, false, Millis::new(100));
    oracle.acknowledged(0, 1, ReasonCode::SUCCESS, Millis::new(120));
    oracle.lost(1, unread, Millis::new(lost_at));
    oracle.settle(Millis::new(5000), &[]);
    oracle.first_fault()
}

#[test]
fn a_group_may_lose_a_message_with_the_unread_output_of_a_qos_0_member() {
    assert_eq!(missing(QoS::AtMostOnce, true, 130), None);
    assert!(missing(QoS::AtMostOnce, true, 90).is_some());
    assert!(missing(QoS::AtMostOnce, false, 130).is_some());
    assert!(missing(QoS::AtLeastOnce, true, 130).is_some());
}

/// A client subscribes long after a retained message was published, and receives it like a live one.
#[test]
fn a_late_subscriber_receives_a_retained_message_after_a_loss() {
    for lost in [false, true] {
        let mut oracle = group_of(QoS::AtLeastOnce);
        oracle.published(0, 1, "b", QoS::AtLeastOnce, true, Millis::new(100));
        oracle.acknowledged(0, 1, ReasonCode::SUCCESS, Millis::new(120));
        let options = SubscribeOptions::default();
        oracle.subscribes(
            1,
            (2, CONTROL),
            &[("b".to_owned(), options)],
            Millis::new(8000),
        );
        if lost {
            oracle.restarted(Millis::new(8100), false);
        }
        let got = Got {
            number: 1,
            qos: QoS::AtMostOnce,
            retain: false,
            dup: false,
            stream: CONTROL,
            at: Millis::new(8200),
        };
        oracle.received(1, "b", got);
        assert_eq!(oracle.first_fault().is_none(), lost);
    }
}

/// The broker takes a message late, and loses its sessions before a link has fetched the message.
#[test]
fn a_message_may_be_lost_with_a_session_soon_after_its_acknowledgement() {
    for (lost_at, excused) in [(4000, true), (6000, false)] {
        let mut oracle = group_of(QoS::AtLeastOnce);
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            ..SubscribeOptions::default()
        };
        oracle.subscribes(
            1,
            (2, CONTROL),
            &[("b".to_owned(), options)],
            Millis::new(10),
        );
        oracle.granted(1, 2, "b", 1, Millis::new(20));
        oracle.published(0, 1, "b", QoS::AtLeastOnce, false, Millis::new(100));
        oracle.acknowledged(0, 1, ReasonCode::SUCCESS, Millis::new(3000));
        oracle.restarted(Millis::new(lost_at), false);
        oracle.settle(Millis::new(9000), &[]);
        assert_eq!(oracle.first_fault().is_none(), excused);
    }
}

/// A client asks for a filter twice, on two streams. The refusal of the first request arrives behind the
/// grant of the second one, which stays.
#[test]
fn a_late_refusal_ends_no_subscription_of_a_later_request() {
    for (packet_ids, allowed) in [([1, 2], true), ([2, 1], false)] {
        let mut oracle = group_of(QoS::AtLeastOnce);
        let filters = [("b".to_owned(), SubscribeOptions::default())];
        let [refused, granted] = packet_ids;
        oracle.subscribes(1, (1, CONTROL), &filters, Millis::new(30));
        oracle.subscribes(1, (2, CONTROL), &filters, Millis::new(40));
        oracle.granted(1, granted, "b", 0, Millis::new(50));
        oracle.granted(1, refused, "b", 0x97, Millis::new(60));
        oracle.published(0, 1, "b", QoS::AtLeastOnce, false, Millis::new(100));
        let got = Got {
            number: 1,
            qos: QoS::AtMostOnce,
            retain: false,
            dup: false,
            stream: CONTROL,
            at: Millis::new(120),
        };
        oracle.received(1, "b", got);
        assert_eq!(oracle.first_fault().is_none(), allowed);
    }
}

/// An oracle of two clients over a disk. Client 1 has a subscription on `a`.
fn subscribed() -> Oracle {
    let mut oracle = group_of(QoS::AtLeastOnce);
    let options = SubscribeOptions {
        qos: QoS::ExactlyOnce,
        ..SubscribeOptions::default()
    };
    let at = Millis::new(30);
    oracle.subscribes(1, (2, CONTROL), &[("a".to_owned(), options)], at);
    oracle.granted(1, 2, "a", 2, at);
    oracle
}

/// The first fault in a session that a crash at 1 s has left.
fn restored(oracle: &mut Oracle, survival: Survival, found: Option<&[&str]>) -> Option<String> {
    let all = [Survival::Survives, survival];
    oracle.crashed(Some(Millis::ZERO), &all, Millis::new(1000));
    let at_qos = |name: &&str| {
        let qos = if *name == "a" {
            QoS::ExactlyOnce
        } else {
            QoS::AtLeastOnce
        };
        ((*name).to_owned(), qos)
    };
    let found = found.map(|names| names.iter().map(at_qos).collect::<Vec<_>>());
    oracle.judge_restored(1, survival, found.as_deref());
    oracle.first_fault()
}

#[test]
fn a_crash_leaves_the_session_and_the_subscriptions_that_were_acknowledged() {
    let group = "$share/g/a";
    fn judge(survival: Survival, found: Option<&[&str]>) -> Option<String> {
        restored(&mut subscribed(), survival, found)
    }
    assert_eq!(judge(Survival::Survives, Some(&[group, "a"])), None);
    assert!(judge(Survival::Survives, Some(&[group])).is_some(), "lost");
    assert!(
        judge(Survival::Survives, Some(&[group, "a", "b"])).is_some(),
        "invented"
    );
    assert!(judge(Survival::Survives, None).is_some(), "no session");
    assert!(judge(Survival::Ends, Some(&[group, "a"])).is_some(), "back");
    assert_eq!(judge(Survival::Ends, None), None);
    assert_eq!(judge(Survival::Unknown, None), None);
    assert_eq!(judge(Survival::Unknown, Some(&["a"])), None);
}

#[test]
fn a_crash_may_bring_back_a_subscription_whose_end_was_neither_acknowledged_nor_long_ago() {
    for (at, told, may_be_back) in [(990, false, true), (990, true, false), (500, false, false)] {
        for found in [&["$share/g/a"][..], &["$share/g/a", "a"]] {
            let mut oracle = subscribed();
            oracle.unsubscribes(1, "a", Millis::new(at));
            if told {
                oracle.unsubscribed(1, "a");
            }
            let fault = restored(&mut oracle, Survival::Survives, Some(found));
            assert_eq!(
                fault.is_none(),
                found.len() == 1 || may_be_back,
                "{at} {told}"
            );
        }
    }
}

#[test]
fn a_publish_of_qos_2_that_was_acknowledged_long_before_a_crash_never_comes_twice() {
    for (acknowledged_at, twice) in [(120, false), (5200, true)] {
        let mut oracle = subscribed();
        oracle.published(0, 1, "a", QoS::ExactlyOnce, false, Millis::new(100));
        let get = |oracle: &mut Oracle, at| {
            let got = Got {
                number: 1,
                qos: QoS::ExactlyOnce,
                retain: false,
                dup: false,
                stream: CONTROL,
                at: Millis::new(at),
            };
            oracle.received(1, "a", got);
        };
        get(&mut oracle, 130);
        oracle.crashed(
            Some(Millis::ZERO),
            &[Survival::Survives; 2],
            Millis::new(5000),
        );
        oracle.has_filters(Millis::new(5100));
        get(&mut oracle, 5300);
        // The group may have its copy, too, but not a third one is possible.
        get(&mut oracle, 5400);
        oracle.acknowledged(0, 1, ReasonCode::SUCCESS, Millis::new(acknowledged_at));
        oracle.settle(Millis::new(9000), &[]);
        assert_eq!(
            oracle.first_fault().is_none(),
            twice,
            "{:?}",
            oracle.first_fault()
        );
    }
}
