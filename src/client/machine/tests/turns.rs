//! A connection that sends many packets leaves others their turn.

use super::*;
use crate::mqtt::encode_disconnect;

const THREE: NonZeroU8 = NonZeroU8::new(3).expect("not 0");
const PING: [u8; 2] = [0xC0, 0];

/// A client with turns of three packets.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.limits.turn_packets = THREE;
    begin(&mut rig);
    rig.take();
    rig
}

fn begin(rig: &mut Rig) {
    let woken = rig.machine.woken(&rig.limits, Waker::noop());
    woken.expect("nothing ends it");
}

/// A turn. Returns how many PINGREQs were answered in it.
fn turn(rig: &mut Rig) -> usize {
    begin(rig);
    let reset = rig.on(Machine::resume).expect("it goes on");
    assert!(reset.is_none());
    rig.take().len() / 2
}

#[test]
fn a_turn_has_so_many_packets() {
    let mut rig = rig();
    rig.received(StreamId::CONTROL, &PING.repeat(8))
        .expect("it is legal");
    assert!(rig.machine.turn_is_over() && rig.machine.paused());
    assert_eq!(rig.take().len(), 6);
    // It takes nothing before its next turn, and nobody waits for anything else.
    rig.on(Machine::resume).expect("it goes on");
    assert!(rig.take().is_empty());
    let (session, connection_no) = (rig.machine.session, rig.machine.connection_no);
    let unread = |s: &mut crate::session::Session, _: &_| s.connection().map(|c| c.unread);
    let unread = rig.router.with(session, connection_no, unread);
    assert_eq!(unread, Some(Some(false)));
    assert_eq!(turn(&mut rig), 3);
    assert!(rig.machine.turn_is_over() && rig.machine.paused());
    assert_eq!(turn(&mut rig), 2);
    assert!(!rig.machine.turn_is_over() && !rig.machine.paused());
    // The next bytes belong to the same turn, on whichever stream they come.
    let (stream, publish) = (StreamId::new(2), publish(1, QoS::AtMostOnce));
    rig.received(stream, &publish).expect("it is legal");
    assert!(rig.machine.turn_is_over() && !rig.machine.paused());
    rig.received(stream, &publish).expect("it is legal");
    assert!(rig.machine.paused());
    let reset = rig.on(|machine, cx| machine.stream_closed(cx, stream));
    assert!(reset.is_none(), "its packets have arrived");
    assert_eq!(turn(&mut rig), 0);
    assert_eq!(rig.router.publishes_waiting(), 2);
    assert_eq!(rig.limits.input.used(), 0);
}

#[test]
fn packets_that_wait_for_their_turn_count_when_the_connection_is_lost() {
    let mut rig = rig();
    let mut bytes = PING.repeat(8);
    encode_disconnect(Version::V5, ReasonCode::SUCCESS, None, None, &mut bytes);
    rig.received(StreamId::CONTROL, &bytes)
        .expect("its DISCONNECT has to wait");
    let end = rig.on(Machine::take_rest).expect_err("DISCONNECT");
    assert!(end.discards_will(), "{end:?}");
}

#[test]
fn packets_do_not_wait_where_the_budget_for_them_is_used_up() {
    let mut rig = rig();
    rig.limits.input_max_bytes = 9;
    for (pings, taken) in [(7, 3), (8, 6)] {
        begin(&mut rig);
        rig.received(StreamId::CONTROL, &PING.repeat(pings))
            .expect("it is legal");
        assert_eq!(rig.take().len() / 2, taken);
        while rig.machine.paused() {
            turn(&mut rig);
        }
    }
}
