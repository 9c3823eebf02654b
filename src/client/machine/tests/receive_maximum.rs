//! MQTT 5 clients that have more publishes unanswered than they were told.

use super::*;
use crate::router::publish::queue::Outgoing;
use crate::sim::testing::router_limited;

const CONTROL: StreamId = StreamId::CONTROL;

/// A client that is told a Receive Maximum of 2, and may have 5 publishes unanswered.
fn rig_of(config: RouterConfig) -> Rig {
    Rig::on_router(router_limited(config, |limits| {
        limits.receive_max = 2;
        limits.receive_max_hard = 5;
    }))
}

fn rig() -> Rig {
    rig_of(config())
}

fn publishes(ids: std::ops::RangeInclusive<u32>, qos: QoS) -> Vec<u8> {
    ids.flat_map(|id| publish(id, qos)).collect()
}

/// The publish link takes the next publish.
fn pop(rig: &Rig) -> Option<Outgoing> {
    rig.router.publish_queues(0, |queues| queues.pop())
}

/// The broker takes the next publish and answers it. Returns the publish's number.
fn answer_next(rig: &Rig) -> Option<String> {
    let outgoing = pop(rig)?;
    let answer = crate::router::Answered {
        session: outgoing.session,
        token: outgoing.token.expect("it has a QoS above 0"),
        reason: ReasonCode::SUCCESS,
        since: Millis::ZERO,
    };
    rig.router.answered(&[answer], rig.now);
    Some(String::from_utf8_lossy(outgoing.message.payload()).into_owned())
}

/// Answers everything, as often as the machine is woken. Returns the numbers of the publishes, and the
/// output.
fn answer_all(rig: &mut Rig) -> (Vec<String>, Vec<u8>) {
    let (mut all, mut output) = (Vec::new(), Vec::new());
    while let Some(number) = answer_next(rig) {
        all.push(number);
        assert!(rig.machine.handle().take(Waker::noop()), "it is woken");
        output.append(&mut rig.take());
        let reset = rig.on(Machine::resume).expect("it goes on");
        assert!(reset.is_none(), "{reset:?}");
    }
    output.append(&mut rig.take());
    (all, output)
}

#[test]
fn a_client_that_does_not_count_is_left_unread_until_it_has_answers() {
    let mut rig = rig();
    rig.take();
    let mut bytes = publishes(1..=5, QoS::AtLeastOnce);
    bytes.extend([0xC0, 0]);
    rig.received(CONTROL, &bytes).expect("five are allowed");
    assert!(rig.machine.paused());
    assert_eq!(rig.router.publishes_waiting(), 2);
    assert_eq!(rig.limits.input.used(), rig.machine.untaken(CONTROL) as u64);
    // Neither its silence nor the unread packet is held against it.
    rig.now = Millis::new(60_000);
    assert_eq!(rig.machine.deadline(), None);
    let (session, connection_no) = (rig.machine.session, rig.machine.connection_no);
    let unread = |s: &mut crate::session::Session, _: &_| s.connection().map(|c| c.unread);
    let unread = rig.router.with(session, connection_no, unread);
    assert_eq!(unread, Some(Some(true)));
    let (numbers, output) = answer_all(&mut rig);
    assert_eq!(numbers, ["1", "2", "3", "4", "5"]);
    assert!(!rig.machine.paused() && rig.limits.input.used() == 0);
    let answered = output.windows(2).any(|bytes| bytes == [0xD0, 0]);
    assert!(answered, "its PINGREQ is behind its publishes");
}

#[test]
fn a_client_that_waits_is_spared_when_others_use_up_the_budget_of_its_bytes() {
    let mut rig = rig();
    rig.take();
    let mut bytes = publishes(1..=3, QoS::AtLeastOnce);
    bytes.extend([0xC0, 0].repeat(4000));
    rig.received(CONTROL, &bytes).expect("there is room");
    assert!(rig.machine.paused());
    rig.limits.input_max_bytes = 0;
    rig.on(Machine::resume).expect("it only waits");
    answer_next(&rig);
    rig.on(Machine::resume).expect("its packets are taken");
    // Another read brings an incomplete packet.
    while rig.machine.paused() {
        let woken = rig.machine.woken(&rig.limits, Waker::noop());
        woken.expect("nothing ends it");
        rig.on(Machine::resume).expect("its packets are taken");
    }
    let incomplete = [&[0x30, 0xFF, 0x7F][..], &[0; 5000]].concat();
    let end = rig.received(CONTROL, &incomplete).expect_err("no room");
    assert!(matches!(end, End::InputBudget), "{end:?}");
}

#[test]
fn copies_are_not_counted_twice() {
    let mut rig = rig();
    rig.received(CONTROL, &publishes(1..=2, QoS::AtLeastOnce))
        .expect("they are allowed");
    let mut copies = publishes(1..=2, QoS::AtLeastOnce);
    let size = copies.len() / 2;
    (copies[0], copies[size]) = (copies[0] | 8, copies[size] | 8);
    let bytes = [publishes(3..=5, QoS::AtLeastOnce), copies].concat();
    rig.received(CONTROL, &bytes).expect("five are allowed");
    assert!(rig.machine.paused());
}

#[test]
fn one_publish_past_the_hard_limit_ends_the_connection() {
    for (before, after) in [(0, 6), (2, 4), (1, 5)] {
        let mut rig = rig();
        rig.received(CONTROL, &publishes(1..=before, QoS::AtLeastOnce))
            .expect("they are allowed");
        let rest = publishes(before + 1..=before + after, QoS::AtLeastOnce);
        let end = rig.received(CONTROL, &rest).expect_err("one too many");
        assert_eq!(end.code(), ReasonCode::RECEIVE_MAXIMUM_EXCEEDED);
        assert!(!rig.machine.paused());
    }
}

#[test]
fn the_announced_number_is_the_limit_of_qos_2() {
    let mut rig = rig();
    rig.received(CONTROL, &publishes(1..=2, QoS::ExactlyOnce))
        .expect("they are allowed");
    let end = rig
        .received(CONTROL, &publish(3, QoS::ExactlyOnce))
        .expect_err("one too many");
    assert_eq!(end.code(), ReasonCode::RECEIVE_MAXIMUM_EXCEEDED);
}

#[test]
fn a_client_is_read_while_only_its_pubrel_makes_room() {
    let mut rig = rig();
    rig.take();
    rig.received(CONTROL, &publishes(1..=2, QoS::ExactlyOnce))
        .expect("they are allowed");
    assert_eq!(answer_next(&rig).as_deref(), Some("1"));
    rig.received(CONTROL, &publish(3, QoS::AtLeastOnce))
        .expect("it is allowed");
    assert!(!rig.machine.paused());
    rig.received(CONTROL, &publish(4, QoS::AtLeastOnce))
        .expect("it is allowed");
    assert!(rig.machine.paused(), "the answer to 3 makes room");
    assert_eq!(answer_all(&mut rig).0, ["2", "3", "4"]);
    assert!(!rig.machine.paused());
}

#[test]
fn publishes_of_data_streams_wait_too_and_are_not_lost_with_the_end_of_their_stream() {
    let mut rig = rig();
    rig.received(CONTROL, &publishes(1..=2, QoS::AtLeastOnce))
        .expect("they are allowed");
    let stream = StreamId::new(4);
    let bytes = [
        publishes(3..=4, QoS::AtLeastOnce),
        publish(5, QoS::AtMostOnce),
    ]
    .concat();
    let reset = rig.received(stream, &bytes).expect("they are allowed");
    assert!(reset.is_none() && rig.machine.paused());
    let reset = rig.on(|machine, cx| machine.stream_closed(cx, stream));
    assert!(reset.is_none(), "its packets are complete: {reset:?}");
    assert!(!rig.on(|machine, cx| machine.finish(cx, stream)));
    for number in ["1", "2"] {
        assert_eq!(answer_next(&rig).as_deref(), Some(number));
        assert!(rig.on(Machine::resume).expect("it goes on").is_none());
    }
    assert!(!rig.machine.paused());
    assert_eq!(answer_next(&rig).as_deref(), Some("3"));
    assert!(!rig.on(|machine, cx| machine.finish(cx, stream)), "4 waits");
    assert_eq!(answer_next(&rig).as_deref(), Some("4"));
    let last = pop(&rig).expect("the last one waits");
    assert_eq!(last.message.payload(), b"5");
    rig.machine
        .transmit(&rig.router, rig.now)
        .expect("it has the session");
    rig.machine.output(stream).buf.clear();
    assert!(rig.on(|machine, cx| machine.finish(cx, stream)));
}

#[test]
fn a_stream_that_ends_within_a_packet_is_reset_once_its_publishes_are_taken() {
    let mut rig = rig();
    let stream = StreamId::new(4);
    let mut bytes = publishes(1..=3, QoS::AtLeastOnce);
    bytes.pop();
    bytes.splice(0..0, publishes(4..=5, QoS::AtLeastOnce));
    rig.received(stream, &bytes).expect("they are allowed");
    assert!(rig.machine.paused());
    let reset = rig.on(|machine, cx| machine.stream_closed(cx, stream));
    assert!(reset.is_none());
    answer_next(&rig);
    answer_next(&rig);
    let reset = rig.on(Machine::resume).expect("the connection goes on");
    let reset = reset.expect("the stream does not");
    assert_eq!(reset.reason, StreamReason::Incomplete);
    assert!(!rig.machine.paused());
}

#[test]
fn publishes_that_are_refused_make_room_without_a_wake_up() {
    let mut rig = rig_of(RouterConfig {
        publishes_waiting: 0,
        ..config()
    });
    rig.take();
    rig.received(CONTROL, &publishes(1..=5, QoS::AtLeastOnce))
        .expect("they are allowed");
    assert!(rig.machine.paused());
    for _ in 0..2 {
        rig.on(Machine::resume).expect("it goes on");
    }
    assert!(!rig.machine.paused());
    let (bytes, mut at, mut refused) = (rig.take(), 0, 0);
    let decoder = crate::mqtt::Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    while let Some((packet, size)) = decoder.next(&bytes[at..]).expect("it is legal") {
        let quota = |a: &Ack<'_>| a.reason == ReasonCode::QUOTA_EXCEEDED;
        refused += usize::from(matches!(&packet, Packet::Puback(a) if quota(a)));
        at += size;
    }
    assert_eq!(refused, 5);
}
