//! The model client: what a device does by the specification, with a state of its own. It shares
//! the codec with the program under test, and nothing else.

mod receive;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tidegate::mqtt::{
    AckKind, Connect, QoS, ReasonCode, SubscribeOptions, Version, Will, encode_ack,
    encode_disconnect, encode_pingreq, encode_subscribe, encode_unsubscribe,
};
use tidegate::streams::StreamId;
use tidegate::time::Millis;

use tidegate_kit::rng::Rng;

/// What a device is like; fixed for a run.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub id: String,
    pub version: Version,
    /// Clean Start or Clean Session at each connect.
    pub clean: bool,
    /// Session Expiry Interval, seconds (MQTT 5).
    pub expiry: u32,
    pub receive_max: Option<u16>,
    pub packet_max: Option<u32>,
    pub alias_max: u16,
    pub keep_alive: u16,
    /// Sends its unacknowledged publishes again, marked DUP, to a session that does not know them.
    pub stubborn: bool,
    /// Counts its packet identifiers anew on each connection.
    pub counts_anew: bool,
    /// Its acknowledgements are late.
    pub lazy: bool,
    /// It does not count its publishes of QoS 1 against the server's Receive Maximum.
    pub miscounts: bool,
    /// Data streams that it uses at most, beside the control stream.
    pub streams: u8,
}

/// An application message that the device publishes.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub retain: bool,
    pub expiry: Option<u32>,
}

#[derive(Clone, Debug)]
struct InFlight {
    packet_id: u16,
    message: Outgoing,
    /// PUBREC came: PUBREL is sent again.
    released: bool,
    stream: StreamId,
}

/// The will of the next connection.
#[derive(Clone, Debug)]
pub(crate) struct WillSpec {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub delay: u32,
}

/// What the device saw.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    #[allow(dead_code, reason = "shown in traces")]
    Connack {
        #[allow(dead_code, reason = "shown by the trace of a failing seed")]
        present: bool,
    },
    /// `fresh`: handed to the application; not so for a QoS 2 copy that is already here.
    Message {
        topic: String,
        payload: Vec<u8>,
        qos: QoS,
        dup: bool,
        retain: bool,
        fresh: bool,
    },
    Disconnect(ReasonCode),
}

/// One stream of its connection.
#[derive(Default)]
struct Io {
    input: Vec<u8>,
    output: Vec<u8>,
    acks: Vec<u8>,
    aliases_out: Vec<String>,
    aliases_in: BTreeMap<u16, String>,
    /// It sends nothing more there.
    ended: bool,
}

pub(crate) struct Device {
    pub profile: Profile,
    pub connected: bool,
    /// The number of the connection it uses, or tries to.
    pub link: Option<u64>,
    pub last_sent: Millis,
    pub seen: Vec<Seen>,
    inflight: Vec<InFlight>,
    waiting: VecDeque<Outgoing>,
    received: BTreeSet<u16>,
    /// Packet identifiers of SUBSCRIBE and UNSUBSCRIBE under way, with their streams.
    requests: BTreeMap<u16, StreamId>,
    last_id: u16,
    io: BTreeMap<StreamId, Io>,
    /// Streams that it has reset, which the server has not noticed yet.
    resetting: BTreeSet<StreamId>,
    /// The server's Receive Maximum and Topic Alias Maximum.
    quota: usize,
    server_aliases: u16,
    trust: bool,
}

/// Publishes under way of a client that does not count.
const UNCOUNTED_WINDOW: usize = 60;
/// Publishes under way of a client that knows no Receive Maximum.
const V3_WINDOW: usize = 12;

impl Device {
    pub(crate) fn new(profile: Profile) -> Self {
        Self {
            profile,
            connected: false,
            link: None,
            last_sent: Millis::ZERO,
            seen: Vec::new(),
            inflight: Vec::new(),
            waiting: VecDeque::new(),
            received: BTreeSet::new(),
            requests: BTreeMap::new(),
            last_id: 0,
            io: BTreeMap::new(),
            resetting: BTreeSet::new(),
            quota: 0,
            server_aliases: 0,
            trust: false,
        }
    }

    /// Begins a connection; CONNECT is in the output.
    pub(crate) fn connect(&mut self, link: u64, clean: bool, will: Option<&WillSpec>, now: Millis) {
        self.lost();
        self.link = Some(link);
        self.last_sent = now;
        self.trust = !clean;
        let v5 = self.profile.version == Version::V5;
        let p = &self.profile;
        let connect = Connect {
            version: p.version,
            clean_start: clean,
            keep_alive: p.keep_alive,
            client_id: &p.id,
            session_expiry: v5.then_some(p.expiry),
            receive_maximum: p.receive_max.filter(|_| v5),
            maximum_packet_size: p.packet_max.filter(|_| v5),
            topic_alias_maximum: if v5 { p.alias_max } else { 0 },
            will: will.map(|w| Will {
                qos: w.qos,
                retain: false,
                topic: &w.topic,
                payload: &w.payload,
                delay: if v5 { w.delay } else { 0 },
                message_expiry: None,
                properties: Default::default(),
            }),
            ..Connect::default()
        };
        let mut bytes = Vec::new();
        connect.encode(&mut bytes);
        self.io(StreamId::CONTROL).output = bytes;
    }

    /// The connection is gone.
    pub(crate) fn lost(&mut self) {
        self.link = None;
        self.connected = false;
        self.io.clear();
        self.resetting.clear();
        self.requests.clear();
        if self.profile.counts_anew {
            self.last_id = 0;
        }
    }

    /// Publishes, now or when the quota allows.
    pub(crate) fn publish(&mut self, message: Outgoing, rng: &mut Rng) {
        self.waiting.push_back(message);
        self.send_waiting(rng);
    }

    pub(crate) fn subscribe(
        &mut self,
        filters: &[(&str, SubscribeOptions)],
        id: Option<u32>,
        stream: StreamId,
    ) {
        let packet_id = self.free_id();
        self.requests.insert(packet_id, stream);
        let version = self.profile.version;
        encode_subscribe(
            version,
            packet_id,
            id,
            filters.iter().copied(),
            &mut self.io(stream).output,
        );
    }

    pub(crate) fn unsubscribe(&mut self, filters: &[&str], stream: StreamId) {
        let packet_id = self.free_id();
        self.requests.insert(packet_id, stream);
        let version = self.profile.version;
        encode_unsubscribe(
            version,
            packet_id,
            filters.iter().copied(),
            &mut self.io(stream).output,
        );
    }

    pub(crate) fn disconnect(&mut self, reason: ReasonCode, expiry: Option<u32>) {
        let version = self.profile.version;
        encode_disconnect(
            version,
            reason,
            expiry,
            None,
            &mut self.io(StreamId::CONTROL).output,
        );
    }

    pub(crate) fn ping(&mut self) {
        encode_pingreq(&mut self.io(StreamId::CONTROL).output);
    }

    fn io(&mut self, stream: StreamId) -> &mut Io {
        self.io.entry(stream).or_default()
    }

    /// The stream for something new: any that it may send on.
    pub(crate) fn any_stream(&mut self, rng: &mut Rng) -> StreamId {
        if self.profile.streams == 0 || !self.connected {
            return StreamId::CONTROL;
        }
        let stream = StreamId::new(rng.below(u64::from(self.profile.streams) + 1) as u8);
        let ended = self.io.get(&stream).is_some_and(|io| io.ended);
        match ended || self.resetting.contains(&stream) {
            true => StreamId::CONTROL,
            false => stream,
        }
    }

    /// A data stream that is in use and that it may end.
    pub(crate) fn open_stream(&self, rng: &mut Rng) -> Option<StreamId> {
        let open = self
            .io
            .iter()
            .filter(|(n, io)| **n != StreamId::CONTROL && !io.ended);
        let open: Vec<StreamId> = open.map(|(n, _)| *n).collect();
        (!open.is_empty()).then(|| rng.pick(&open))
    }

    /// Ends its direction of a stream. It must not, while it has a message of QoS 2 under way there.
    pub(crate) fn end_stream(&mut self, stream: StreamId) -> bool {
        let mut inflight = self.inflight.iter();
        if inflight.any(|f| f.stream == stream && f.message.qos == QoS::ExactlyOnce) {
            return false;
        }
        let io = self.io(stream);
        io.ended = true;
        io.acks.clear();
        true
    }

    /// Aborts a stream in both directions. What it had there is sent again once the server knows.
    pub(crate) fn reset_stream(&mut self, stream: StreamId) {
        self.io.remove(&stream);
        self.resetting.insert(stream);
        self.requests.retain(|_, on| *on != stream);
    }

    /// A stream is gone, and the server knows.
    pub(crate) fn stream_gone(&mut self, stream: StreamId, rng: &mut Rng) {
        self.reset_stream(stream);
        self.resetting.remove(&stream);
        for at in 0..self.inflight.len() {
            if self.inflight[at].stream == stream {
                self.inflight[at].stream = StreamId::CONTROL;
                self.again(at, rng);
            }
        }
    }

    /// Sends one of its publishes again, on the control stream.
    fn again(&mut self, at: usize, rng: &mut Rng) {
        let InFlight {
            packet_id,
            message,
            released,
            ..
        } = self.inflight[at].clone();
        if released {
            let version = self.profile.version;
            let (kind, code) = (AckKind::Pubrel, ReasonCode::SUCCESS);
            encode_ack(
                version,
                kind,
                packet_id,
                code,
                None,
                &mut self.io(StreamId::CONTROL).output,
            );
        } else {
            self.write(&message, packet_id, true, StreamId::CONTROL, rng);
        }
    }

    /// The bytes to be sent now, by stream.
    pub(crate) fn take_output(&mut self, now: Millis, acks: bool) -> Vec<(StreamId, Vec<u8>)> {
        let mut all = Vec::new();
        for (stream, io) in &mut self.io {
            if acks {
                io.output.append(&mut io.acks);
            }
            if !io.output.is_empty() {
                self.last_sent = now;
                all.push((*stream, std::mem::take(&mut io.output)));
            }
        }
        all
    }

    /// Nothing of its own is under way.
    pub(crate) fn idle(&self) -> bool {
        let acks = self.io.values().all(|io| io.acks.is_empty());
        self.inflight.is_empty() && self.waiting.is_empty() && acks
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.len()
    }

    fn send_waiting(&mut self, rng: &mut Rng) {
        if !self.connected {
            return;
        }
        while let Some(front) = self.waiting.front() {
            if !self.may_send(front.qos) {
                return;
            }
            let Some(message) = self.waiting.pop_front() else {
                return;
            };
            let mut packet_id = 0;
            let stream = self.any_stream(rng);
            if message.qos > QoS::AtMostOnce {
                packet_id = self.free_id();
                self.inflight.push(InFlight {
                    packet_id,
                    message: message.clone(),
                    released: false,
                    stream,
                });
            }
            self.write(&message, packet_id, false, stream, rng);
        }
    }

    /// Whether the server's Receive Maximum leaves room, as far as the device counts.
    fn may_send(&self, qos: QoS) -> bool {
        let miscounts = self.profile.miscounts && self.profile.version == Version::V5;
        match qos {
            QoS::AtMostOnce => true,
            _ if !miscounts => self.inflight.len() < self.quota,
            _ if self.inflight.len() >= UNCOUNTED_WINDOW => false,
            QoS::AtLeastOnce => true,
            QoS::ExactlyOnce => {
                let all = self.inflight.iter();
                all.filter(|f| f.message.qos == qos).count() < self.quota
            }
        }
    }

    fn free_id(&mut self) -> u16 {
        loop {
            // A small space, so that identifiers come round often.
            self.last_id = self.last_id % 200 + 1;
            let id = self.last_id;
            if !self.requests.contains_key(&id) && self.inflight.iter().all(|f| f.packet_id != id) {
                return id;
            }
        }
    }

    fn write(&mut self, m: &Outgoing, packet_id: u16, dup: bool, stream: StreamId, rng: &mut Rng) {
        let (version, server_aliases) = (self.profile.version, self.server_aliases);
        let io = self.io(stream);
        let mut body = Vec::new();
        let mut topic = m.topic.as_str();
        let mut properties = Vec::new();
        if version == Version::V5 {
            if let Some(seconds) = m.expiry {
                properties.push(0x02);
                properties.extend_from_slice(&seconds.to_be_bytes());
            }
            let known = io.aliases_out.iter().position(|t| *t == m.topic);
            let mut alias = None;
            if let Some(index) = known {
                alias = Some(index + 1);
                if rng.chance(80) {
                    topic = "";
                }
            } else if io.aliases_out.len() < usize::from(server_aliases) && rng.chance(60) {
                io.aliases_out.push(m.topic.clone());
                alias = Some(io.aliases_out.len());
            }
            if let Some(alias) = alias {
                properties.push(0x23);
                properties.extend_from_slice(&(alias as u16).to_be_bytes());
            }
        }
        body.extend_from_slice(&(topic.len() as u16).to_be_bytes());
        body.extend_from_slice(topic.as_bytes());
        if m.qos > QoS::AtMostOnce {
            body.extend_from_slice(&packet_id.to_be_bytes());
        }
        if version == Version::V5 {
            assert!(properties.len() < 128);
            body.push(properties.len() as u8);
            body.extend_from_slice(&properties);
        }
        body.extend_from_slice(&m.payload);
        let flags = u8::from(dup) << 3 | (m.qos as u8) << 1 | u8::from(m.retain);
        io.output.push(0x30 | flags);
        let mut length = body.len();
        loop {
            let byte = (length % 128) as u8;
            length /= 128;
            io.output.push(byte | if length > 0 { 0x80 } else { 0 });
            if length == 0 {
                break;
            }
        }
        io.output.extend_from_slice(&body);
    }
}
