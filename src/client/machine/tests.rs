mod levels;
mod publish_links;
mod receive_maximum;
mod turns;

use std::time::Duration;

use super::*;
use crate::mqtt::{
    Ack, AckKind, Packet, Properties, QoS, Receiver, SubscribeOptions, encode_pingreq,
    encode_subscribe,
};
use crate::router::RouterConfig;
use crate::session::Policy;
use crate::sim::testing::{config, facts, kept_client_of, machine, publish_packet, router_of};
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::StreamReason;

struct Open;

impl Policy for Open {
    fn may_publish(&self, _: &str, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str, _: &str) -> bool {
        true
    }
}

/// A machine with its router, at a time of its own.
struct Rig {
    router: Arc<Router>,
    limits: Limits,
    machine: Machine,
    now: Millis,
}

impl Rig {
    fn new() -> Self {
        Self::of(config())
    }

    fn of(config: RouterConfig) -> Self {
        Self::on_router(router_of(config))
    }

    fn on_router(router: Arc<Router>) -> Self {
        router.set_broker_features(&facts(), Millis::ZERO);
        router.data_link_up(0, crate::router::LinkSession::New, true, Millis::ZERO);
        let machine = machine(&router, "client", Version::V5, Millis::ZERO);
        Self {
            router,
            limits: limits(),
            machine,
            now: Millis::ZERO,
        }
    }

    fn on<R>(&mut self, call: impl FnOnce(&mut Machine, &Context<'_>) -> R) -> R {
        let cx = Context {
            router: &self.router,
            policy: &Open,
            limits: &self.limits,
            now: self.now,
        };
        call(&mut self.machine, &cx)
    }

    fn received(&mut self, stream: StreamId, bytes: &[u8]) -> Result<Option<StreamReset>, End> {
        self.on(|machine, cx| machine.received(cx, stream, bytes))
    }

    /// Takes the output of all streams, as a transport does that takes everything.
    fn take(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while self
            .machine
            .transmit(&self.router, self.now)
            .expect("it has the session")
        {
            all.append(&mut self.machine.output(StreamId::CONTROL).buf);
            self.machine.sent(0, true, self.now);
        }
        all
    }
}

fn limits() -> Limits {
    Limits {
        input: Arc::default(),
        input_max_bytes: 1 << 20,
        packet_deadline: Duration::from_secs(1),
        write_stall: Duration::from_secs(60),
        turn_packets: NonZeroU8::MAX,
    }
}

fn subscribe(filter: &str) -> Vec<u8> {
    let mut packet = Vec::new();
    let options = SubscribeOptions {
        // Retained messages would be waited for.
        retain_handling: 2,
        ..SubscribeOptions::default()
    };
    let filters = std::iter::once((filter, options));
    encode_subscribe(Version::V5, 1, None, filters, &mut packet);
    packet
}

fn publish(number: u32, qos: QoS) -> Vec<u8> {
    publish_packet(Version::V5, number as u16, number, qos)
}

#[test]
fn an_incomplete_packet_ends_the_connection_at_its_deadline() {
    let mut rig = Rig::new();
    assert_eq!(rig.machine.deadline(), None);
    let packet = publish(1, QoS::AtLeastOnce);
    rig.received(StreamId::CONTROL, &packet[..3])
        .expect("it may go on");
    assert_eq!(rig.machine.deadline(), Some(Millis::new(1000)));
    rig.now = Millis::new(999);
    rig.on(Machine::expired).expect("it has a millisecond yet");
    rig.now = Millis::new(1000);
    let end = rig.on(Machine::expired).expect_err("it is late");
    assert!(matches!(end, End::PacketDeadline), "{end:?}");
}

#[test]
fn an_incomplete_packet_on_a_data_stream_ends_that_stream() {
    let mut rig = Rig::new();
    let packet = publish(1, QoS::AtLeastOnce);
    rig.received(StreamId::new(3), &packet[..3])
        .expect("it may go on");
    rig.now = Millis::new(1000);
    let reset = rig
        .on(Machine::expired)
        .expect("the connection goes on")
        .expect("its stream does not");
    let (stream, reason) = (reset.stream, reset.reason);
    assert_eq!(
        (stream, reason),
        (StreamId::new(3), StreamReason::PacketDeadline)
    );
    assert_eq!(
        (rig.machine.streams(), rig.machine.deadline()),
        (StreamSet::EMPTY, None)
    );
    assert_eq!(rig.limits.input.used(), 0);
}

/// The first bytes of a PUBLISH of 1,000,000 bytes.
const LARGE: &[u8] = b"\x30\xC0\x84\x3D\0\x01t\0";

/// Gives 8 KiB of a large packet each 900 ms, for a minute, and then a byte each 900 ms. Returns how long
/// the packet had time after the last 8 KiB.
fn uploaded(rig: &mut Rig, stream: StreamId) -> Duration {
    let mut bytes = LARGE.to_vec();
    bytes.resize(8 * 1024, 0);
    let reset = rig.received(stream, &bytes).expect("it may go on");
    assert!(reset.is_none());
    bytes.fill(0);
    for _ in 0..70 {
        rig.now += Duration::from_millis(900);
        assert!(rig.on(Machine::expired).expect("bytes flow").is_none());
        rig.received(stream, &bytes).expect("bytes flow");
    }
    let last = rig.now;
    while let Ok(None) = rig.on(Machine::expired) {
        rig.now += Duration::from_millis(900);
        rig.received(stream, &[0]).expect("it may go on");
    }
    rig.now.since(last)
}

#[test]
fn a_large_packet_has_a_second_more_for_each_8_kib() {
    for stream in [StreamId::CONTROL, StreamId::new(3)] {
        let mut rig = Rig::new();
        // 71 s and the first second, less the 63 s that have passed.
        let (most, least) = (Duration::from_secs(10), Duration::from_secs(9));
        let more = uploaded(&mut rig, stream);
        assert!((least..most).contains(&more), "{stream}: {more:?}");
    }
}

#[test]
fn the_bytes_of_a_large_packet_are_a_sign_of_life() {
    let connect = crate::mqtt::Connect {
        client_id: "uploader",
        keep_alive: 2,
        ..crate::mqtt::Connect::default()
    };
    let mut rig = Rig::new();
    rig.machine = crate::sim::testing::admit(&rig.router, &connect, rig.now);
    let mut bytes = LARGE.to_vec();
    bytes.resize(8 * 1024, 0);
    for _ in 0..10 {
        rig.received(StreamId::CONTROL, &bytes)
            .expect("it may go on");
        bytes.fill(0);
        rig.now += Duration::from_millis(2900);
        rig.router.tick(rig.now);
        rig.machine
            .woken(&rig.limits, Waker::noop())
            .expect("it is there");
    }
    // Less than 8 KiB in three seconds are not enough.
    rig.received(StreamId::CONTROL, &bytes[1..])
        .expect("it may go on");
    rig.now += Duration::from_millis(3100);
    rig.router.tick(rig.now);
    let end = rig
        .machine
        .woken(&rig.limits, Waker::noop())
        .expect_err("it is silent");
    assert_eq!(end.label(), crate::telemetry::DisconnectReason::KeepAlive);
}

#[test]
fn a_publish_behind_a_subscribe_waits_for_its_answer() {
    let mut rig = Rig::new();
    let bytes = [subscribe("a"), publish(1, QoS::AtLeastOnce)].concat();
    rig.received(StreamId::CONTROL, &bytes)
        .expect("it is legal");
    assert!(rig.machine.paused());
    rig.on(Machine::resume).expect("it waits");
    assert!(rig.machine.paused());
    assert_eq!(rig.router.publishes_waiting(), 0);
    let wanted = rig.router.next_subscribes(0, 10);
    rig.router
        .suback(wanted[0].filter, ReasonCode(0), Millis::ZERO);
    // Time stands still for a packet that we do not read.
    rig.now = Millis::new(5000);
    rig.on(Machine::resume).expect("it goes on");
    assert!(!rig.machine.paused());
    assert_eq!(rig.router.publishes_waiting(), 1);
    rig.on(Machine::expired).expect("nothing is incomplete");
}

#[test]
fn a_packet_of_the_control_stream_resets_a_data_stream() {
    let mut rig = Rig::new();
    let mut ping = Vec::new();
    encode_pingreq(&mut ping);
    let reset = rig
        .received(StreamId::new(2), &ping)
        .expect("the connection goes on");
    let reset = reset.expect("the stream does not");
    assert_eq!(reset.reason, StreamReason::Protocol);
    rig.received(StreamId::CONTROL, &ping)
        .expect("it belongs there");
    assert!(rig.take().ends_with(&[0xD0, 0]));
}

#[test]
fn a_client_that_reads_nothing_is_left_unread() {
    let mut rig = Rig::new();
    assert!(
        rig.machine
            .transmit(&rig.router, Millis::ZERO)
            .expect("CONNACK")
    );
    let offered = rig.machine.output(StreamId::CONTROL).len();
    rig.machine.sent(offered, false, Millis::ZERO);
    let pings: Vec<u8> = [0xC0, 0].repeat(BACKLOG_MAX_BYTES / 2);
    rig.received(StreamId::CONTROL, &pings)
        .expect("it is legal");
    while rig.machine.paused() {
        let woken = rig.machine.woken(&rig.limits, Waker::noop());
        woken.expect("nothing ends it");
        rig.on(Machine::resume).expect("it goes on");
    }
    assert_eq!(rig.on(Machine::unread), StreamSet::EMPTY);
    rig.received(StreamId::CONTROL, &[0xC0, 0, 0xC0])
        .expect("it is legal");
    assert_eq!(rig.on(Machine::unread), StreamSet::ALL);
    assert_eq!(rig.machine.deadline(), None, "its time stands still");
    rig.now = Millis::new(5000);
    rig.machine.output(StreamId::CONTROL).buf.clear();
    rig.machine.sent(0, true, Millis::new(5000));
    rig.take();
    assert_eq!(rig.on(Machine::unread), StreamSet::EMPTY);
    assert_eq!(rig.machine.deadline(), Some(Millis::new(6000)));
}

#[test]
fn nothing_goes_before_connack() {
    let mut rig = Rig::new();
    kept_client_of(&rig.router, "client", Version::V5, None, Millis::ZERO);
    let woken = rig.machine.woken(&rig.limits, Waker::noop());
    let end = woken.expect_err("taken over");
    assert_eq!(end.code(), ReasonCode::SESSION_TAKEN_OVER);
    let remains = rig.machine.ended(&rig.router, &end, Millis::ZERO);
    assert!(remains.output.is_empty());
}

#[test]
fn a_client_is_told_why_its_connection_ends() {
    let mut rig = Rig::new();
    rig.take();
    let end = rig
        .received(StreamId::CONTROL, &[0xF0, 0])
        .expect_err("AUTH is not offered");
    let remains = rig.machine.ended(&rig.router, &end, Millis::ZERO);
    let decoder = crate::mqtt::Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    let packet = decoder.next(remains.output.rest());
    let told = matches!(packet, Ok(Some((Packet::Disconnect(d), _))) if d.reason == end.code());
    assert!(told, "{packet:?}");
}

#[test]
fn a_stream_that_its_client_ended_is_finished_once_it_has_its_answers() {
    let mut rig = Rig::new();
    let packet = publish(7, QoS::AtLeastOnce);
    rig.received(StreamId::new(4), &packet)
        .expect("it is legal");
    assert!(
        rig.on(|m, cx| m.stream_closed(cx, StreamId::new(4)))
            .is_none()
    );
    assert!(
        !rig.on(|m, cx| m.finish(cx, StreamId::new(4))),
        "PUBACK is due"
    );
    let outgoing = rig
        .router
        .publish_queues(0, |queues| queues.pop())
        .expect("it waits");
    let answer = crate::router::Answered {
        session: outgoing.session,
        token: outgoing.token.expect("QoS 1 has one"),
        reason: ReasonCode::SUCCESS,
        since: Millis::ZERO,
    };
    rig.router.answered(&[answer], Millis::ZERO);
    assert!(
        rig.machine
            .transmit(&rig.router, Millis::ZERO)
            .expect("PUBACK")
    );
    let mut puback = Vec::new();
    let ack = Ack {
        packet_id: 7,
        reason: ReasonCode::SUCCESS,
        properties: Properties::default(),
    };
    let (kind, id) = (AckKind::Puback, ack.packet_id);
    crate::mqtt::encode_ack(Version::V5, kind, id, ack.reason, None, &mut puback);
    assert_eq!(
        std::mem::take(&mut rig.machine.output(StreamId::new(4)).buf),
        puback
    );
    assert!(rig.on(|m, cx| m.finish(cx, StreamId::new(4))));
    assert_eq!(rig.machine.streams(), StreamSet::EMPTY);
}

#[test]
fn an_idle_machine_is_small() {
    assert!(size_of::<Machine>() <= 160, "{}", size_of::<Machine>());
}
