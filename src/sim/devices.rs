//! The clients of the simulation: they subscribe, publish and acknowledge, on the control stream and on
//! data streams, and lose their connections.

use std::hash::BuildHasher;

use super::*;
use crate::sim::kept::Kept;
use crate::sim::wills::Wills;
use crate::streams::{StreamId, StreamSet};

/// No two of these filters match one topic: overlapping subscriptions do not sleep.
pub(crate) const DISJOINT: [&str; 7] = ["a", "a/b", "a/c", "b/b", "c", "c/d/e", "$share/g/c"];

/// The router's shards of sessions.
const SHARDS: u64 = 32;

/// A client.
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) version: Version,
    pub(crate) wills: Wills,
    /// The knowledge about its session.
    pub(crate) kept: Kept,
    pub(crate) machine: Option<ClientMachine>,
    pub(crate) last_id: u16,
    /// Its publishes without an acknowledgement.
    pub(crate) open: Vec<OpenPublish>,
    /// Its publishes of QoS 2 without PUBCOMP: packet identifier, stream of the PUBREL.
    pub(crate) releasing: Vec<(u16, StreamId)>,
    /// SUBSCRIBE packets without an answer.
    pub(crate) asked: Vec<Asked>,
    /// Messages that it has and whose acknowledgements were lost before they were sent, by packet
    /// identifier.
    pub(crate) unsure: BTreeMap<u16, u32>,
    /// UNSUBSCRIBE packets without an answer, with their filters.
    pub(crate) unsubscribing: Vec<(u16, String)>,
    /// Messages of QoS 2 that it has and that were not released, by packet identifier.
    pub(crate) receiving: BTreeMap<u16, u32>,
    /// A crash took its session, and it has not been told.
    pub(crate) begun_anew: bool,
    /// Until this time it does not connect.
    pub(crate) away_until: Millis,
    /// Data streams that it may use.
    pub(crate) streams: u64,
    pub(crate) wires: BTreeMap<StreamId, Wire>,
    /// The streams that its machine leaves unread.
    pub(crate) left_unread: StreamSet,
    pub(crate) traffic: Traffic,
}

/// A publish without an acknowledgement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenPublish {
    pub(crate) id: u16,
    pub(crate) number: u32,
    pub(crate) qos: QoS,
    pub(crate) stream: StreamId,
}

/// A SUBSCRIBE without an answer.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) id: u16,
    pub(crate) stream: StreamId,
    pub(crate) filters: Vec<(String, SubscribeOptions)>,
}

impl Device {
    pub(crate) fn new(id: String, rng: &mut Rng) -> Self {
        Self {
            id,
            version: match rng.chance(25) {
                true => Version::V311,
                false => Version::V5,
            },
            wills: Wills::default(),
            kept: Kept::default(),
            machine: None,
            last_id: 0,
            open: Vec::new(),
            releasing: Vec::new(),
            asked: Vec::new(),
            unsure: BTreeMap::new(),
            unsubscribing: Vec::new(),
            receiving: BTreeMap::new(),
            begun_anew: false,
            away_until: Millis::ZERO,
            streams: match rng.chance(40) {
                true => rng.between(1, STREAMS_MAX),
                false => 0,
            },
            wires: BTreeMap::new(),
            left_unread: StreamSet::EMPTY,
            traffic: Traffic::default(),
        }
    }
}

/// Client identifiers, whose sessions are in one shard if they are `together`.
pub(crate) fn names_of(router: &Router, together: bool) -> Vec<String> {
    let seed = &router.limits().hash_seed;
    let all = (0..).map(|n| format!("device-{n}"));
    let some = all.filter(|id| !together || seed.hash_one(id.as_str()).is_multiple_of(SHARDS));
    some.take(4).collect()
}

/// The number with which the payload of each message begins.
pub(crate) fn number_of(payload: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(payload);
    text.split(' ').next()?.parse().ok()
}

pub(crate) fn message(topic: &str, payload: &str, qos: QoS, retain: bool) -> crate::mqtt::Message {
    crate::mqtt::Message::new(&crate::mqtt::MessageSpec {
        topic,
        properties: Properties::default(),
        payload: payload.as_bytes(),
        qos,
        retain,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

impl World {
    /// Sends the publishes of a stream that is gone again, on the control stream: those without an
    /// acknowledgement, and PUBREL for those without PUBCOMP [MQTT-4.4.0-1].
    pub(crate) fn send_again(&mut self, n: usize, gone: StreamId) {
        for at in 0..self.devices[n].open.len() {
            let open = &mut self.devices[n].open[at];
            if open.stream != gone {
                continue;
            }
            open.stream = StreamId::CONTROL;
            let OpenPublish {
                id, number, qos, ..
            } = *open;
            let topic = self.oracle.topic_of(number);
            let retain = self.oracle.is_retained(number);
            let payload = self.payload(number);
            self.poisons_sent += u32::from(self.oracle.is_poison(number));
            let bytes = self.encode(n, id, &message(topic, &payload, qos, retain), true);
            self.send(n, StreamId::CONTROL, bytes);
        }
        for at in 0..self.devices[n].releasing.len() {
            let (id, stream) = self.devices[n].releasing[at];
            if stream == gone {
                self.devices[n].releasing[at].1 = StreamId::CONTROL;
                self.acknowledge(n, StreamId::CONTROL, AckKind::Pubrel, id, None);
            }
        }
    }

    pub(crate) fn next_id(&mut self, n: usize) -> u16 {
        let device = &mut self.devices[n];
        device.last_id = device.last_id.checked_add(1).unwrap_or(1);
        device.last_id
    }

    pub(crate) fn subscribe(&mut self, n: usize) {
        let id = self.next_id(n);
        let v5 = self.devices[n].version == Version::V5;
        let mut filters = Vec::new();
        for _ in 0..self.rng.between(1, 2) {
            let filter = self.rng.pick(self.filters);
            if filters.iter().any(|(f, _): &(String, _)| f == filter) {
                continue;
            }
            let shared = filter.starts_with("$share");
            let options = SubscribeOptions {
                qos: self
                    .rng
                    .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]),
                no_local: v5 && !shared && self.profile.keeps_properties() && self.rng.chance(15),
                retain_as_published: false,
                retain_handling: if v5 { self.rng.below(3) as u8 } else { 0 },
            };
            filters.push((filter.to_owned(), options));
        }
        let stream = self.any_stream(n);
        let asked = Asked {
            id,
            stream,
            filters,
        };
        self.ask(n, asked);
    }

    fn any_stream(&mut self, n: usize) -> StreamId {
        let stream = self.devices[n].any_stream(&mut self.rng);
        self.exercised.streams += u64::from(!stream.is_control());
        stream
    }

    pub(crate) fn ask(&mut self, n: usize, asked: Asked) {
        let Asked {
            id,
            stream,
            filters,
        } = &asked;
        let mut bytes = Vec::new();
        let all = filters.iter().map(|(f, o)| (f.as_str(), *o));
        encode_subscribe(self.devices[n].version, *id, None, all, &mut bytes);
        trace!(
            self,
            "{n} subscribes {id} on stream {stream} {:?}",
            filters.iter().map(|(f, o)| (f, o.qos)).collect::<Vec<_>>()
        );
        self.oracle.subscribes(n, (*id, *stream), filters, self.now);
        let stream = *stream;
        self.devices[n].asked.push(asked);
        self.send(n, stream, bytes.into());
    }

    pub(crate) fn unsubscribe(&mut self, n: usize) {
        let Some(filter) = self.oracle.any_filter(n, &mut self.rng) else {
            return;
        };
        // A SUBSCRIBE without an answer would be answered after the UNSUBSCRIBE.
        if self.devices[n]
            .asked
            .iter()
            .any(|asked| asked.filters.iter().any(|(f, _)| *f == filter))
        {
            return;
        }
        let id = self.next_id(n);
        let mut bytes = Vec::new();
        encode_unsubscribe(
            self.devices[n].version,
            id,
            std::iter::once(filter.as_str()),
            &mut bytes,
        );
        let stream = self.any_stream(n);
        trace!(self, "{n} unsubscribes {filter} on stream {stream}");
        self.oracle.unsubscribes(n, &filter, self.now);
        self.devices[n].unsubscribing.push((id, filter));
        self.send(n, stream, bytes.into());
    }

    pub(crate) fn publish(&mut self, n: usize) {
        let topic = self.rng.pick(&TOPICS);
        let qos = self
            .rng
            .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]);
        self.number += 1;
        let number = self.number;
        let id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.next_id(n),
        };
        // Only one client publishes retained messages on each topic, so that their order is known.
        let retain = TOPICS.iter().position(|t| *t == topic) == Some(n) && self.rng.chance(50);
        self.oracle
            .published(n, number, topic, qos, retain, self.now);
        let mut poison = false;
        let stream = self.any_stream(n);
        if qos > QoS::AtMostOnce {
            self.devices[n].open.push(OpenPublish {
                id,
                number,
                qos,
                stream,
            });
            poison = self.poisonous && self.rng.chance(5);
        }
        if poison {
            self.oracle.set_poison(number);
            self.poisons_sent += 1;
        }
        trace!(
            self,
            "{n} publishes {number} on {topic} at {qos:?} on stream {stream}{}",
            match (poison, retain) {
                (true, _) => ", poison",
                (_, true) => ", retained",
                _ => "",
            }
        );
        let payload = self.payload(number);
        let packet = self.encode(n, id, &message(topic, &payload, qos, retain), false);
        self.send(n, stream, packet);
    }

    /// The payload of a message: its number, and in some runs a lot behind it.
    fn payload(&self, number: u32) -> String {
        let padding = match self.large && number.is_multiple_of(3) {
            true => LARGE_BYTES,
            false => 0,
        };
        match padding {
            0 => number.to_string(),
            padding => format!("{number} {}", "p".repeat(padding)),
        }
    }

    fn encode(&self, n: usize, id: u16, message: &crate::mqtt::Message, dup: bool) -> Outgoing {
        let mut bytes = Vec::new();
        crate::mqtt::Delivery {
            version: self.devices[n].version,
            dup,
            qos: message.qos(),
            retain: message.retain(),
            packet_id: id,
            alias: crate::mqtt::Alias::None,
            message_expiry: None,
            subscription_ids: &[],
            user_property: None,
            hidden: 0,
        }
        .encode(message, &mut bytes);
        bytes.into()
    }

    /// A client acknowledges a packet, perhaps a message.
    fn acknowledge(
        &mut self,
        n: usize,
        stream: StreamId,
        kind: AckKind,
        id: u16,
        number: Option<u32>,
    ) {
        let mut bytes = Vec::new();
        let version = self.devices[n].version;
        encode_ack(version, kind, id, ReasonCode::SUCCESS, None, &mut bytes);
        let packet = Outgoing {
            bytes,
            acknowledges: number.map(|number| (id, number)),
        };
        self.send(n, stream, packet);
    }

    /// A client takes a packet.
    pub(crate) fn packet(&mut self, n: usize, stream: StreamId, packet: &Packet<'_>) {
        let ended = self.devices[n].has_ended(stream);
        match packet {
            // It cannot answer there: the messages come again on the control stream.
            Packet::Publish(p) if ended && p.qos > QoS::AtMostOnce => {}
            Packet::Pubrel(_) if ended => {}
            Packet::Publish(p) => self.got(n, stream, p),
            Packet::Pubrel(a) => {
                self.devices[n].receiving.remove(&a.packet_id);
                self.acknowledge(n, stream, AckKind::Pubcomp, a.packet_id, None);
            }
            Packet::Pubrec(a) => {
                self.done(n, a.packet_id, a.reason);
                if !a.reason.is_error() {
                    let releasing = &mut self.devices[n].releasing;
                    releasing.retain(|(id, _)| *id != a.packet_id);
                    releasing.push((a.packet_id, stream));
                    self.acknowledge(n, stream, AckKind::Pubrel, a.packet_id, None);
                }
            }
            Packet::Pubcomp(a) => {
                let releasing = &mut self.devices[n].releasing;
                releasing.retain(|(id, _)| *id != a.packet_id);
            }
            Packet::Puback(a) => self.done(n, a.packet_id, a.reason),
            Packet::Suback(s) => {
                let asked = &mut self.devices[n].asked;
                let Some(at) = asked.iter().position(|a| a.id == s.packet_id) else {
                    return;
                };
                let Asked { filters, .. } = asked.remove(at);
                self.devices[n].kept.acknowledged();
                trace!(
                    self,
                    "{n} is granted {:?} {:?} to {}",
                    filters.iter().map(|f| &f.0).collect::<Vec<_>>(),
                    s.codes,
                    s.packet_id
                );
                for ((filter, _), code) in filters.iter().zip(s.codes) {
                    let id = s.packet_id;
                    self.oracle.granted(n, id, filter, *code, self.now);
                }
            }
            Packet::Connack(c) => self.greeted(n, c.session_present),
            Packet::Unsuback(u) => {
                let waiting = &mut self.devices[n].unsubscribing;
                let Some(at) = waiting.iter().position(|(id, _)| *id == u.packet_id) else {
                    return;
                };
                let (_, filter) = waiting.remove(at);
                trace!(self, "{n} has unsubscribed {filter}");
                self.devices[n].kept.acknowledged();
                self.oracle.unsubscribed(n, &filter);
            }
            _ => {}
        }
    }

    fn got(&mut self, n: usize, stream: StreamId, p: &Publish<'_>) {
        let number = number_of(p.payload).expect("a number of ours");
        let unsure = &mut self.devices[n].unsure;
        let known = p.dup && unsure.get(&p.packet_id) == Some(&number);
        unsure.remove(&p.packet_id);
        trace!(
            self,
            "{n} gets {number} at {:?} on stream {stream}{}{}{}",
            p.qos,
            if p.dup { " dup" } else { "" },
            if p.retain { " retained" } else { "" },
            if known { ", which it has" } else { "" },
        );
        if !known {
            let got = Got {
                number,
                qos: p.qos,
                retain: p.retain,
                dup: p.dup,
                stream,
                at: self.now,
            };
            self.oracle.received(n, p.topic, got);
        }
        if p.qos == QoS::ExactlyOnce
            && let Some(other) = self.devices[n].receiving.insert(p.packet_id, number)
            && other != number
        {
            let id = p.packet_id;
            self.oracle.fault(format!(
                "{n} got {number} with packet identifier {id}, which {other} has"
            ));
        }
        let kind = match p.qos {
            QoS::AtMostOnce => return,
            QoS::AtLeastOnce => AckKind::Puback,
            QoS::ExactlyOnce => AckKind::Pubrec,
        };
        self.acknowledge(n, stream, kind, p.packet_id, Some(number));
    }

    pub(crate) fn done(&mut self, n: usize, id: u16, reason: ReasonCode) {
        let open = &mut self.devices[n].open;
        let Some(at) = open.iter().position(|open| open.id == id) else {
            return;
        };
        let OpenPublish { number, .. } = open.remove(at);
        trace!(self, "{n} has the answer to {number}: {reason:?}");
        self.oracle.acknowledged(n, number, reason, self.now);
    }
}
