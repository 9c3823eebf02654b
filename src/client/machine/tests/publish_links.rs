//! A client moves to another publish link, and its publishes stay in order.

use super::*;
use crate::mqtt::Connect;
use crate::router::Answered;
use crate::router::publish::queue::Outgoing;
use crate::sim::testing::admit;
use crate::time::Millis;

/// A client on a router whose publish links grow from one to two, and that would begin on the new one.
/// Its session ends with the connection.
fn rig() -> Rig {
    let mut rig = Rig::of(RouterConfig {
        publish_links_max: 2,
        ..config()
    });
    rig.router.publish_link_up(0, true, Millis::ZERO);
    let ids = (0..).map(|n| format!("client-{n}"));
    let mut machines = ids.map(|id| begin(&rig.router, &id, Millis::ZERO));
    let odd = |machine: &Machine| !machine.session.shard.is_multiple_of(2);
    let machine = machines.find(odd).expect("one in two is");
    drop(machines);
    rig.machine = machine;
    rig
}

/// A client connects with a clean start.
fn begin(router: &Router, client_id: &str, now: Millis) -> Machine {
    let connect = Connect {
        client_id,
        clean_start: true,
        ..Connect::default()
    };
    admit(router, &connect, now)
}

/// The client connects with a clean start while it is connected.
fn begin_anew(rig: &mut Rig) {
    let key = rig.router.session_key(rig.machine.session).expect("known");
    rig.machine = begin(&rig.router, key.client_id(), rig.now);
}

/// The connection ends, and the session with it.
fn leave(rig: &Rig) {
    let (session, connection_no) = (rig.machine.session, rig.machine.connection_no);
    assert!(
        rig.router
            .disconnected(session, connection_no, true, rig.now)
    );
}

/// The session ends, and the client begins another one.
fn come_back(rig: &mut Rig) {
    let key = rig.router.session_key(rig.machine.session).expect("known");
    leave(rig);
    rig.machine = begin(&rig.router, key.client_id(), rig.now);
}

fn pop(rig: &Rig, link: usize) -> Option<Outgoing> {
    rig.router.publish_queues(link, |queues| queues.pop())
}

/// The link takes everything from its queues, and the broker answers a PINGREQ behind it, if there is
/// one.
fn arrive(rig: &Rig, link: usize) -> bool {
    while pop(rig, link).is_some() {}
    let due = rig.router.publish_ping_due(link, rig.now);
    if due {
        rig.router.publish_ping_answered(link);
    }
    due
}

/// Another publish link is added, and used.
fn grow(rig: &Rig) {
    assert!(rig.router.add_publish_link());
    rig.router.publish_link_up(1, true, Millis::ZERO);
    assert_eq!(rig.router.publish_link(rig.machine.session), 0, "not yet");
    assert!(rig.router.publish_ping_due(0, rig.now));
    rig.router.publish_ping_answered(0);
    assert_eq!(rig.router.publish_link(rig.machine.session), 1);
}

fn send(rig: &mut Rig, id: u16, qos: QoS) -> u8 {
    rig.received(StreamId::CONTROL, &publish(id.into(), qos))
        .expect("it is legal");
    rig.machine.publish_link
}

#[test]
fn a_client_moves_once_its_publishes_have_arrived() {
    let mut rig = rig();
    rig.now = Millis::new(1000);
    send(&mut rig, 1, QoS::AtMostOnce);
    grow(&rig);
    assert_eq!(send(&mut rig, 2, QoS::AtMostOnce), 0, "the first one waits");
    assert!(arrive(&rig, 0), "the client asked whether it has arrived");
    assert_eq!(send(&mut rig, 3, QoS::AtLeastOnce), 1);
    assert_eq!(
        pop(&rig, 1).map(|o| o.message.qos()),
        Some(QoS::AtLeastOnce)
    );
    assert!(pop(&rig, 0).is_none());
}

#[test]
fn a_client_does_not_move_while_a_publish_has_no_answer() {
    let mut rig = rig();
    grow(&rig);
    rig.now = Millis::new(2000);
    assert_eq!(
        send(&mut rig, 1, QoS::AtLeastOnce),
        0,
        "it may have publishes of before"
    );
    let outgoing = pop(&rig, 0).expect("it waits");
    assert!(arrive(&rig, 0));
    rig.now = Millis::new(4000);
    assert_eq!(send(&mut rig, 2, QoS::AtMostOnce), 0, "one has no answer");
    let answer = Answered {
        session: outgoing.session,
        token: outgoing.token.expect("QoS 1 has one"),
        reason: ReasonCode::SUCCESS,
        since: Millis::ZERO,
    };
    rig.router.answered(&[answer], rig.now);
    assert_eq!(send(&mut rig, 3, QoS::AtMostOnce), 0, "QoS 0 is on its way");
    assert!(arrive(&rig, 0));
    assert_eq!(send(&mut rig, 4, QoS::AtMostOnce), 1);
}

#[test]
fn a_session_that_begins_anew_does_not_overtake_the_publishes_of_the_last_one() {
    let mut rig = rig();
    send(&mut rig, 1, QoS::ExactlyOnce);
    let outgoing = pop(&rig, 0).expect("it waits");
    grow(&rig);
    begin_anew(&mut rig);
    rig.now = Millis::new(2000);
    assert_eq!(send(&mut rig, 2, QoS::AtMostOnce), 0);
    assert!(
        !arrive(&rig, 0),
        "nobody asks while a publish has no answer"
    );
    assert_eq!(send(&mut rig, 3, QoS::AtMostOnce), 0);
    let answer = Answered {
        session: outgoing.session,
        token: outgoing.token.expect("QoS 2 has one"),
        reason: ReasonCode::SUCCESS,
        since: Millis::ZERO,
    };
    rig.router.answered(&[answer], rig.now);
    assert_eq!(send(&mut rig, 4, QoS::AtMostOnce), 0);
    assert!(arrive(&rig, 0));
    assert_eq!(send(&mut rig, 5, QoS::AtMostOnce), 1);
}

#[test]
fn a_session_that_ended_is_remembered_while_its_publishes_wait() {
    let mut rig = rig();
    let session = rig.machine.session;
    send(&mut rig, 1, QoS::AtMostOnce);
    come_back(&mut rig);
    assert_eq!(
        rig.machine.session, session,
        "so that they keep their queue"
    );
    grow(&rig);
    come_back(&mut rig);
    assert_eq!(send(&mut rig, 2, QoS::AtMostOnce), 0);
    arrive(&rig, 0);
    come_back(&mut rig);
    assert_eq!(rig.machine.session, session, "its link is not the new one");
}

#[test]
fn a_session_that_ended_is_forgotten_once_nothing_of_it_waits() {
    let mut rig = rig();
    let session = rig.machine.session;
    come_back(&mut rig);
    assert_ne!(rig.machine.session, session, "nothing of it waits");
    let session = rig.machine.session;
    send(&mut rig, 1, QoS::AtMostOnce);
    leave(&rig);
    let known = |rig: &Rig| rig.router.session_key(session).is_some();
    rig.router.tick(Millis::new(200_000));
    assert!(known(&rig), "its publish waits still");
    while pop(&rig, 0).is_some() {}
    rig.router.tick(Millis::new(300_000));
    assert!(known(&rig), "it is remembered a while longer");
    rig.router.tick(Millis::new(400_000));
    assert!(!known(&rig));
}
