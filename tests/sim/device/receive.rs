//! What a device does with the packets that it receives.

use tidegate::mqtt::{
    AckKind, Connack, Decoder, Packet, Publish, QoS, ReasonCode, Receiver, Version, encode_ack,
};
use tidegate::streams::StreamId;

use tidegate_kit::rng::Rng;

use crate::device::{Device, Seen, V3_WINDOW};

impl Device {
    /// Takes bytes from the server.
    ///
    /// # Errors
    /// What the server did wrong.
    pub(crate) fn receive(
        &mut self,
        stream: StreamId,
        bytes: &[u8],
        rng: &mut Rng,
    ) -> Result<(), String> {
        let io = self.io(stream);
        io.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut io.input);
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
                    self.packet(stream, &packet, rng)?;
                }
                Ok(None) => break,
                Err(error) => return Err(format!("the server's bytes do not decode: {error}")),
            }
        }
        self.io(stream).input = input[at..].to_vec();
        Ok(())
    }

    /// Takes one packet from the server.
    fn packet(
        &mut self,
        stream: StreamId,
        packet: &Packet<'_>,
        rng: &mut Rng,
    ) -> Result<(), String> {
        if !self.connected && !matches!(packet, Packet::Connack(_)) {
            return Err(format!("before CONNACK came {packet:?} [MQTT-3.2.0-1]"));
        }
        let ended = self.io(stream).ended;
        match packet {
            // The device can't acknowledge on a stream that it ended. The server sends these
            // messages again on the control stream.
            Packet::Publish(p) if ended && p.qos > QoS::AtMostOnce => {
                if let Some(alias) = p.topic_alias.filter(|_| !p.topic.is_empty()) {
                    let known = &mut self.io(stream).aliases_in;
                    known.insert(alias, p.topic.to_owned());
                }
            }
            Packet::Pubrel(_) if ended => {}
            Packet::Connack(c) => self.connack(c, rng)?,
            Packet::Publish(p) => self.message(stream, p)?,
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
                self.ack(stream, AckKind::Pubrel, a.packet_id);
            }
            Packet::Pubcomp(a) => {
                self.done(a.packet_id, QoS::ExactlyOnce)?;
                self.send_waiting(rng);
            }
            Packet::Pubrel(a) => {
                self.received.remove(&a.packet_id);
                self.ack(stream, AckKind::Pubcomp, a.packet_id);
            }
            Packet::Suback(s) => {
                if self.requests.remove(&s.packet_id) != Some(stream) {
                    return Err(format!("SUBACK for {}, not asked for", s.packet_id));
                }
            }
            Packet::Unsuback(u) => {
                if self.requests.remove(&u.packet_id) != Some(stream) {
                    return Err(format!("UNSUBACK for {}, not asked for", u.packet_id));
                }
            }
            Packet::Disconnect(d) => self.seen.push(Seen::Disconnect(d.reason)),
            Packet::Pingresp => {}
            other => return Err(format!("a packet that no server sends: {other:?}")),
        }
        Ok(())
    }

    /// Takes CONNACK: the connection stands, and the device resumes its session.
    fn connack(&mut self, c: &Connack<'_>, rng: &mut Rng) -> Result<(), String> {
        let version = self.profile.version;
        if self.connected {
            return Err("a second CONNACK [MQTT-3.2.0-2]".into());
        }
        if c.reason.is_error() {
            return Err(format!("refused: {:?}", c.reason));
        }
        self.connected = true;
        // MQTT 3.1 has no Session Present: the client relies on the Clean Session it asked for.
        let present = c.session_present || version == Version::V31;
        self.seen.push(Seen::Connack { present });
        self.quota = match version {
            Version::V5 => c.receive_maximum.map_or(65_535, usize::from),
            _ => V3_WINDOW,
        };
        self.server_aliases = c.topic_alias_maximum.unwrap_or(0);
        self.resume(present, rng);
        Ok(())
    }

    /// Takes an application message and acknowledges it as its QoS demands.
    fn message(&mut self, stream: StreamId, p: &Publish<'_>) -> Result<(), String> {
        let topic = self.topic(stream, p)?;
        let mut fresh = true;
        match p.qos {
            QoS::AtMostOnce if p.dup => return Err("DUP at QoS 0 [MQTT-3.3.1-2]".into()),
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => self.ack(stream, AckKind::Puback, p.packet_id),
            QoS::ExactlyOnce => {
                fresh = self.received.insert(p.packet_id);
                self.ack(stream, AckKind::Pubrec, p.packet_id);
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
        Ok(())
    }

    /// The topic of a PUBLISH from the server; a Topic Alias is defined or looked up.
    fn topic(&mut self, stream: StreamId, p: &Publish<'_>) -> Result<String, String> {
        match p.topic_alias {
            None => Ok(p.topic.to_owned()),
            Some(alias) if alias > self.profile.alias_max => {
                Err("an alias above our maximum [MQTT-3.1.2-26]".into())
            }
            Some(alias) if p.topic.is_empty() => {
                let known = self.io(stream).aliases_in.get(&alias).cloned();
                known.ok_or_else(|| "an alias never defined [MQTT-3.3.2-7]".into())
            }
            Some(alias) => {
                let known = &mut self.io(stream).aliases_in;
                known.insert(alias, p.topic.to_owned());
                Ok(p.topic.to_owned())
            }
        }
    }

    /// Sends the unacknowledged packets again after CONNACK, in order [MQTT-4.4.0-1]. Without a
    /// session on the server only a stubborn device does so; others forget the packets.
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
        for at in 0..self.inflight.len() {
            self.inflight[at].stream = StreamId::CONTROL;
            self.again(at, rng);
        }
        self.send_waiting(rng);
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

    fn ack(&mut self, stream: StreamId, kind: AckKind, packet_id: u16) {
        let version = self.profile.version;
        encode_ack(
            version,
            kind,
            packet_id,
            ReasonCode::SUCCESS,
            None,
            &mut self.io(stream).acks,
        );
    }
}
