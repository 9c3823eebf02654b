//! The model client: what a device does by the specification, with a state of its own. It shares
//! the codec with the program under test, and nothing else.

use std::collections::{BTreeSet, HashMap, VecDeque};

use tidegate::mqtt::{
    AckKind, Connect, Decoder, Packet, QoS, ReasonCode, Receiver, SubscribeOptions, Version, Will,
    encode_ack, encode_disconnect, encode_pingreq, encode_subscribe, encode_unsubscribe,
};
use tidegate::time::Millis;

use tidegate_kit::rng::Rng;

/// What a device is like; fixed for a run.
#[derive(Clone, Debug)]
pub struct Profile {
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
}

/// An application message that the device publishes.
#[derive(Clone, Debug)]
pub struct Outgoing {
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
    /// PUBREC came: PUBREL is what is sent again.
    released: bool,
}

/// The will of the next connection.
#[derive(Clone, Debug)]
pub struct WillSpec {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub delay: u32,
}

/// What the device saw.
#[derive(Clone, Debug)]
pub enum Seen {
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

pub struct Device {
    pub profile: Profile,
    pub connected: bool,
    /// The number of the connection it uses, or tries to.
    pub link: Option<u64>,
    pub last_sent: u64,
    pub seen: Vec<Seen>,
    inflight: Vec<InFlight>,
    waiting: VecDeque<Outgoing>,
    received: BTreeSet<u16>,
    /// Packet identifiers of SUBSCRIBE and UNSUBSCRIBE under way.
    requests: BTreeSet<u16>,
    last_id: u16,
    input: Vec<u8>,
    output: Vec<u8>,
    acks: Vec<u8>,
    /// The server's Receive Maximum and Topic Alias Maximum.
    quota: usize,
    server_aliases: u16,
    aliases_out: Vec<String>,
    aliases_in: HashMap<u16, String>,
    trust: bool,
}

/// Publishes under way of a client that knows no Receive Maximum.
const V3_WINDOW: usize = 12;

impl Device {
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            connected: false,
            link: None,
            last_sent: 0,
            seen: Vec::new(),
            inflight: Vec::new(),
            waiting: VecDeque::new(),
            received: BTreeSet::new(),
            requests: BTreeSet::new(),
            last_id: 0,
            input: Vec::new(),
            output: Vec::new(),
            acks: Vec::new(),
            quota: 0,
            server_aliases: 0,
            aliases_out: Vec::new(),
            aliases_in: HashMap::new(),
            trust: false,
        }
    }

    /// Begins a connection; CONNECT is in the output.
    pub fn connect(&mut self, link: u64, clean: bool, will: Option<&WillSpec>, now: Millis) {
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
        connect.encode(&mut self.output);
    }

    /// The connection is gone.
    pub fn lost(&mut self) {
        self.link = None;
        self.connected = false;
        self.input.clear();
        self.output.clear();
        self.acks.clear();
        self.aliases_in.clear();
        self.aliases_out.clear();
        self.requests.clear();
        if self.profile.counts_anew {
            self.last_id = 0;
        }
    }

    /// Publishes, now or when the quota allows.
    pub fn publish(&mut self, message: Outgoing, rng: &mut Rng) {
        self.waiting.push_back(message);
        self.send_waiting(rng);
    }

    pub fn subscribe(&mut self, filters: &[(&str, SubscribeOptions)], id: Option<u32>) {
        let packet_id = self.free_id();
        self.requests.insert(packet_id);
        encode_subscribe(
            self.profile.version,
            packet_id,
            id,
            filters.iter().copied(),
            &mut self.output,
        );
    }

    pub fn unsubscribe(&mut self, filters: &[&str]) {
        let packet_id = self.free_id();
        self.requests.insert(packet_id);
        encode_unsubscribe(
            self.profile.version,
            packet_id,
            filters.iter().copied(),
            &mut self.output,
        );
    }

    pub fn disconnect(&mut self, reason: ReasonCode, expiry: Option<u32>) {
        encode_disconnect(self.profile.version, reason, expiry, None, &mut self.output);
    }

    pub fn ping(&mut self) {
        encode_pingreq(&mut self.output);
    }

    /// What is to be sent now.
    pub fn take_output(&mut self, now: Millis, acks: bool) -> Vec<u8> {
        if acks {
            self.output.append(&mut self.acks);
        }
        if !self.output.is_empty() {
            self.last_sent = now;
        }
        std::mem::take(&mut self.output)
    }

    /// Nothing of its own is under way.
    pub fn idle(&self) -> bool {
        self.inflight.is_empty() && self.waiting.is_empty() && self.acks.is_empty()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Takes bytes from the server.
    ///
    /// # Errors
    /// What the server did wrong.
    pub fn receive(&mut self, bytes: &[u8], rng: &mut Rng) -> Result<(), String> {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let decoder = Decoder {
            version: self.profile.version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut at = 0;
        loop {
            match decoder.next(&input[at..]) {
                Ok(Some((packet, size))) => {
                    at += size;
                    self.packet(&packet, rng)?;
                }
                Ok(None) => break,
                Err(error) => return Err(format!("the server's bytes do not decode: {error}")),
            }
        }
        self.input = input[at..].to_vec();
        Ok(())
    }

    fn packet(&mut self, packet: &Packet<'_>, rng: &mut Rng) -> Result<(), String> {
        if !self.connected && !matches!(packet, Packet::Connack(_)) {
            return Err(format!("before CONNACK came {packet:?} [MQTT-3.2.0-1]"));
        }
        let version = self.profile.version;
        match packet {
            Packet::Connack(c) => {
                if self.connected {
                    return Err("a second CONNACK [MQTT-3.2.0-2]".into());
                }
                if c.reason.is_error() {
                    return Err(format!("refused: {:?}", c.reason));
                }
                self.connected = true;
                // 3.1 does not say it: the client relies on what it asked for.
                let present = c.session_present || version == Version::V31;
                self.seen.push(Seen::Connack { present });
                self.quota = match version {
                    Version::V5 => c.receive_maximum.map_or(65_535, usize::from),
                    _ => V3_WINDOW,
                };
                self.server_aliases = c.topic_alias_maximum.unwrap_or(0);
                self.resume(present, rng);
            }
            Packet::Publish(p) => {
                let topic = match p.topic_alias {
                    None => p.topic.to_owned(),
                    Some(alias) if alias > self.profile.alias_max => {
                        return Err("an alias above our maximum [MQTT-3.1.2-26]".into());
                    }
                    Some(alias) if p.topic.is_empty() => {
                        let known = self.aliases_in.get(&alias);
                        known
                            .ok_or("an alias never defined [MQTT-3.3.2-7]")?
                            .clone()
                    }
                    Some(alias) => {
                        self.aliases_in.insert(alias, p.topic.to_owned());
                        p.topic.to_owned()
                    }
                };
                let mut fresh = true;
                match p.qos {
                    QoS::AtMostOnce if p.dup => return Err("DUP at QoS 0 [MQTT-3.3.1-2]".into()),
                    QoS::AtMostOnce => {}
                    QoS::AtLeastOnce => self.ack(AckKind::Puback, p.packet_id),
                    QoS::ExactlyOnce => {
                        fresh = self.received.insert(p.packet_id);
                        self.ack(AckKind::Pubrec, p.packet_id);
                    }
                }
                self.seen.push(Seen::Message {
                    topic,
                    payload: p.payload.to_vec(),
                    qos: p.qos,
                    dup: p.dup,
                    retain: p.retain,
                    fresh,
                });
            }
            Packet::Puback(a) => {
                self.done(a.packet_id, QoS::AtLeastOnce)?;
                self.send_waiting(rng);
            }
            Packet::Pubrec(a) if a.reason.is_error() => {
                self.done(a.packet_id, QoS::ExactlyOnce)?;
                self.send_waiting(rng);
            }
            Packet::Pubrec(a) => {
                let known = self
                    .inflight
                    .iter_mut()
                    .find(|f| f.packet_id == a.packet_id);
                let known = known.ok_or_else(|| format!("PUBREC for unknown {}", a.packet_id))?;
                known.released = true;
                self.ack(AckKind::Pubrel, a.packet_id);
            }
            Packet::Pubcomp(a) => {
                self.done(a.packet_id, QoS::ExactlyOnce)?;
                self.send_waiting(rng);
            }
            Packet::Pubrel(a) => {
                self.received.remove(&a.packet_id);
                self.ack(AckKind::Pubcomp, a.packet_id);
            }
            Packet::Suback(s) => {
                if !self.requests.remove(&s.packet_id) {
                    return Err(format!("SUBACK for {}, not asked for", s.packet_id));
                }
            }
            Packet::Unsuback(u) => {
                if !self.requests.remove(&u.packet_id) {
                    return Err(format!("UNSUBACK for {}, not asked for", u.packet_id));
                }
            }
            Packet::Disconnect(d) => self.seen.push(Seen::Disconnect(d.reason)),
            Packet::Pingresp => {}
            other => return Err(format!("a packet that no server sends: {other:?}")),
        }
        Ok(())
    }

    /// After CONNACK: what is unacknowledged, in order [MQTT-4.4.0-1], or nothing.
    fn resume(&mut self, present: bool, rng: &mut Rng) {
        if !present || !self.trust {
            // [MQTT-3.2.2-5]
            self.received.clear();
            if self.profile.stubborn {
                self.inflight.retain(|f| !f.released);
            } else {
                self.inflight.clear();
            }
        }
        for i in 0..self.inflight.len() {
            let InFlight {
                packet_id,
                message,
                released,
            } = self.inflight[i].clone();
            if released {
                let version = self.profile.version;
                encode_ack(
                    version,
                    AckKind::Pubrel,
                    packet_id,
                    ReasonCode::SUCCESS,
                    None,
                    &mut self.output,
                );
            } else {
                self.write(&message, packet_id, true, rng);
            }
        }
        self.send_waiting(rng);
    }

    fn send_waiting(&mut self, rng: &mut Rng) {
        if !self.connected {
            return;
        }
        while let Some(front) = self.waiting.front() {
            if front.qos > QoS::AtMostOnce && self.inflight.len() >= self.quota {
                return;
            }
            let Some(message) = self.waiting.pop_front() else {
                return;
            };
            let mut packet_id = 0;
            if message.qos > QoS::AtMostOnce {
                packet_id = self.free_id();
                self.inflight.push(InFlight {
                    packet_id,
                    message: message.clone(),
                    released: false,
                });
            }
            self.write(&message, packet_id, false, rng);
        }
    }

    fn done(&mut self, packet_id: u16, qos: QoS) -> Result<(), String> {
        let at = self.inflight.iter().position(|f| f.packet_id == packet_id);
        let at = at.ok_or_else(|| format!("an acknowledgement for unknown {packet_id}"))?;
        if self.inflight[at].message.qos != qos {
            return Err(format!("the wrong acknowledgement for {packet_id}"));
        }
        self.inflight.remove(at);
        Ok(())
    }

    fn ack(&mut self, kind: AckKind, packet_id: u16) {
        let version = self.profile.version;
        encode_ack(
            version,
            kind,
            packet_id,
            ReasonCode::SUCCESS,
            None,
            &mut self.acks,
        );
    }

    fn free_id(&mut self) -> u16 {
        loop {
            // A small space, so that identifiers come round often.
            self.last_id = self.last_id % 200 + 1;
            let id = self.last_id;
            if !self.requests.contains(&id) && self.inflight.iter().all(|f| f.packet_id != id) {
                return id;
            }
        }
    }

    fn write(&mut self, m: &Outgoing, packet_id: u16, dup: bool, rng: &mut Rng) {
        let mut body = Vec::new();
        let mut topic = m.topic.as_str();
        let mut properties = Vec::new();
        if self.profile.version == Version::V5 {
            if let Some(seconds) = m.expiry {
                properties.push(0x02);
                properties.extend_from_slice(&seconds.to_be_bytes());
            }
            let known = self.aliases_out.iter().position(|t| *t == m.topic);
            let mut alias = None;
            if let Some(index) = known {
                alias = Some(index + 1);
                if rng.chance(80) {
                    topic = "";
                }
            } else if self.aliases_out.len() < usize::from(self.server_aliases) && rng.chance(60) {
                self.aliases_out.push(m.topic.clone());
                alias = Some(self.aliases_out.len());
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
        if self.profile.version == Version::V5 {
            assert!(properties.len() < 128);
            body.push(properties.len() as u8);
            body.extend_from_slice(&properties);
        }
        body.extend_from_slice(&m.payload);
        let flags = u8::from(dup) << 3 | (m.qos as u8) << 1 | u8::from(m.retain);
        self.output.push(0x30 | flags);
        let mut length = body.len();
        loop {
            let byte = (length % 128) as u8;
            length /= 128;
            self.output.push(byte | if length > 0 { 0x80 } else { 0 });
            if length == 0 {
                break;
            }
        }
        self.output.extend_from_slice(&body);
    }
}
