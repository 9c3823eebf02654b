//! Helpers of the tests of links and of client machines, beside those of the router.

use std::num::NonZeroU8;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use crate::client::connect::{Admission, Applicant};
use crate::client::machine::{self, Machine};
use crate::mqtt::{
    self, Alias, Decoder, Delivery, Message, Packet, Properties, QoS, ReasonCode, Receiver, Version,
};
use crate::router::{Connected, LinkSession, Router};
use crate::session::Policy;
use crate::streams::StreamId;
use crate::time::Millis;
use crate::upstream::link::machine::Handshake;

pub(crate) use crate::router::testing::*;

/// The topic of probes.
pub(crate) const PROBES: &str = "tidegate/probe";

/// A link has connected.
pub(crate) fn up(session_present: bool, receive_maximum: u16) -> Handshake {
    Handshake {
        version: Version::V5,
        session: match session_present {
            true => LinkSession::Resumed,
            false => LinkSession::New,
        },
        receive_maximum,
        packet_max: None,
        identifiers: true,
        keeps_retain: true,
        quick_ack: false,
        fetch_qos: QoS::ExactlyOnce,
        filters_in_packet: 8,
        window: None,
        fetch_quiet: Duration::from_millis(100),
    }
}

/// A client that may do everything.
pub(crate) struct Open;

impl Policy for Open {
    fn may_publish(&self, _: &str, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str, _: &str) -> bool {
        true
    }
}

static MACHINE_LIMITS: LazyLock<machine::Limits> = LazyLock::new(|| machine::Limits {
    input: Arc::default(),
    input_max_bytes: 64 * 1024 * 1024,
    packet_deadline: Duration::from_secs(10),
    write_stall: Duration::from_secs(60),
    turn_packets: NonZeroU8::MAX,
});

/// What a client's machine needs for one call; its client may do everything.
pub(crate) fn context(router: &Router, now: Millis) -> machine::Context<'_> {
    machine::Context {
        router,
        policy: &Open,
        limits: &MACHINE_LIMITS,
        now,
    }
}

/// The machine of a client that has sent this CONNECT.
pub(crate) fn admit(router: &Router, connect: &mqtt::Connect<'_>, now: Millis) -> Machine {
    let admission = Admission {
        router,
        policy: &Open,
        session: &Default::default(),
        limits: &Default::default(),
        now,
    };
    let applicant = Applicant {
        client_id: connect.client_id.into(),
        owner: "anonymous".into(),
        scope: None,
        added_bytes: 0,
        keep_alive_max: None,
        peer: peer(),
        ping_after: None,
    };
    let admitted = admission.admit(connect, applicant);
    admitted.expect("nothing speaks against it").machine
}

/// The machine of a connected client whose session is kept.
pub(crate) fn machine(router: &Router, id: &str, version: Version, now: Millis) -> Machine {
    let connect = mqtt::Connect {
        version,
        client_id: id,
        clean_start: false,
        session_expiry: (version == Version::V5).then_some(u32::MAX),
        ..mqtt::Connect::default()
    };
    admit(router, &connect, now)
}

/// Packets of an MQTT 5 client, and everything that follows from them.
pub(crate) fn packet_of(router: &Router, client: Connected, bytes: &[u8], now: Millis) {
    let mut machine = Machine::new(&client, Arc::default(), Version::V5, u32::MAX);
    let reset = machine.received(&context(router, now), StreamId::CONTROL, bytes);
    assert!(reset.expect("it is legal").is_none());
    assert!(!machine.paused() && machine.deadline().is_none());
}

/// A PUBLISH as a client writes it, on the topic `t`; its payload is a number.
pub(crate) fn publish_packet(version: Version, packet_id: u16, number: u32, qos: QoS) -> Vec<u8> {
    publish_of(version, packet_id, &numbered(number, qos))
}

/// A message as a client publishes it.
pub(crate) fn publish_of(version: Version, packet_id: u16, message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    Delivery {
        version,
        dup: false,
        qos: message.qos(),
        retain: message.retain(),
        packet_id,
        alias: Alias::None,
        message_expiry: None,
        subscription_ids: &[],
        user_property: None,
        hidden: 0,
    }
    .encode(message, &mut bytes);
    bytes
}

/// The packets that the broker reads: a word for each, and the packet identifier.
pub(crate) fn read(out: &mut Vec<u8>) -> Vec<(String, u16)> {
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let mut seen = Vec::new();
    let mut at = 0;
    while let Some((packet, used)) = decoder.next(&out[at..]).expect("what we send is legal") {
        at += used;
        seen.push(match packet {
            Packet::Publish(p) => {
                let dup = if p.dup { " dup" } else { "" };
                let text = String::from_utf8_lossy(p.payload);
                (format!("publish {text}{dup}"), p.packet_id)
            }
            Packet::Puback(a) => ("puback".into(), a.packet_id),
            Packet::Pubrec(a) => ("pubrec".into(), a.packet_id),
            Packet::Pubrel(a) => ("pubrel".into(), a.packet_id),
            Packet::Subscribe(s) => ("subscribe".into(), s.packet_id),
            other => (format!("{other:?}"), 0),
        });
    }
    assert_eq!(at, out.len(), "whole packets only");
    out.clear();
    seen
}

/// An acknowledgement without a reason.
pub(crate) fn ack(packet_id: u16) -> crate::mqtt::Ack<'static> {
    crate::mqtt::Ack {
        packet_id,
        reason: ReasonCode::SUCCESS,
        properties: Properties::default(),
    }
}
