//! The protocol of one connection to an embedded broker.

use std::sync::Arc;
use std::time::Duration;

use crate::embedded::quirks::{RefuseV5, Shared};
use crate::embedded::state::{ConnectionHandle, State};
use crate::mqtt::{
    AckKind, Connack, Connect, Decoder, Disconnect, Error, MAX_PACKET_BYTES, Message, MessageSpec,
    Packet, Publish, QoS, ReasonCode, Receiver, Subscribe, Unsubscribe, Version, decode_connect,
    encode_ack, encode_disconnect, encode_pingresp, encode_suback, encode_unsuback,
};
use crate::time::Deadline;

/// Bytes of waiting packets that are sent before a PINGREQ is answered.
const PING_OUTPUT_BYTES: usize = 8 * 1024 * 1024;

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The client sent DISCONNECT. `will` says whether its will is due.
    Disconnected { will: bool },
    /// The broker ends it, and tells an MQTT 5 client the reason. The will is due.
    Refused(ReasonCode),
    /// CONNECT was refused, and the answer has been encoded.
    NotConnected,
    /// The session belongs to another connection now, or the broker dropped this one.
    Superseded,
}

/// The protocol state of one connection, before and after CONNECT.
#[derive(Default)]
pub(crate) struct Protocol {
    /// `None` before CONNECT.
    pub(crate) connected: Option<Connected>,
    /// PUBACK, PUBCOMP and refusing PUBREC packets in the output that is not being written yet. The
    /// client cannot have seen them, so their publishes still use the Receive Maximum.
    pub(crate) unseen_acks: usize,
}

/// A connection with a session.
pub(crate) struct Connected {
    pub(crate) session: u32,
    pub(crate) version: Version,
    /// Keep Alive; `None`: off.
    pub(crate) keep_alive: Option<Duration>,
    decoder: Decoder,
    /// The Receive Maximum that CONNACK announced, or 65,535.
    receive_max: u16,
    aliases: Vec<Option<Box<str>>>,
}

impl Protocol {
    /// Takes all whole packets of `input` and appends the answers to `out`. Returns the bytes consumed,
    /// and how the connection ended if it did.
    pub(crate) fn feed(
        &mut self,
        st: &mut State,
        handle: &Arc<ConnectionHandle>,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> (usize, Option<End>) {
        let mut at = 0;
        if self.connected.is_none() {
            match self.connect(st, handle, input, out) {
                Ok(n) => at = n,
                Err(end) => return (0, Some(end)),
            }
        }
        let Some(connected) = &mut self.connected else {
            return (0, None);
        };
        if !st.owns(connected.session, handle) {
            return (at, Some(End::Superseded));
        }
        loop {
            match connected.decoder.next(&input[at..]) {
                Ok(None) => return (at, None),
                Ok(Some((packet, n))) => {
                    at += n;
                    if let Err(end) = connected.handle(st, packet, &mut self.unseen_acks, out) {
                        return (at, Some(end));
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "the embedded broker refuses a packet");
                    return (at, Some(End::Refused(error.reason_code())));
                }
            }
        }
    }

    fn connect(
        &mut self,
        st: &mut State,
        handle: &Arc<ConnectionHandle>,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<usize, End> {
        let max = st.options.max_packet.unwrap_or(MAX_PACKET_BYTES as u32);
        let (connect, n) = match decode_connect(input, max) {
            Ok(None) => return Ok(0),
            Ok(Some(found)) => found,
            Err(error) => {
                refuse_bytes(&error, input, out);
                return Err(End::NotConnected);
            }
        };
        let refused = |version, reason, out: &mut Vec<u8>| {
            let connack = Connack {
                reason,
                ..Connack::default()
            };
            connack.encode(version, out);
            End::NotConnected
        };
        let version = connect.version;
        if let Err(reason) = acceptable(st, &connect) {
            let like = match st.options.quirks().refuse_v5 {
                RefuseV5::ReturnCode => Version::V311,
                _ => version,
            };
            return Err(refused(like, reason, out));
        }
        let attached = match st.attach(&connect, handle) {
            Ok(attached) => attached,
            Err(reason) => return Err(refused(version, reason, out)),
        };
        let options = &st.options;
        let quirks = options.quirks();
        let receive_max = quirks.small_window.map(|w| w.max(1));
        let connack = Connack {
            session_present: attached.present,
            receive_maximum: receive_max,
            maximum_qos: (options.max_qos < QoS::ExactlyOnce).then_some(options.max_qos),
            retain_available: (!options.retain_available).then_some(false),
            maximum_packet_size: options.max_packet,
            assigned_client_id: attached.assigned.as_deref(),
            topic_alias_maximum: Some(options.topic_alias_max),
            subscription_ids_available: quirks.no_ids.then_some(false),
            shared_subscription_available: (quirks.shared == Shared::Refused).then_some(false),
            ..Connack::default()
        };
        connack.encode(version, out);
        let aliases = match version {
            Version::V5 => options.topic_alias_max,
            _ => 0,
        };
        self.connected = Some(Connected {
            session: attached.session,
            version,
            keep_alive: (connect.keep_alive > 0)
                .then(|| Duration::from_secs(connect.keep_alive.into())),
            decoder: Decoder {
                version,
                receiver: Receiver::Server,
                max,
            },
            receive_max: receive_max.unwrap_or(u16::MAX),
            aliases: vec![None; usize::from(aliases)],
        });
        Ok(n)
    }
}

impl Connected {
    fn handle(
        &mut self,
        st: &mut State,
        packet: Packet<'_>,
        unseen_acks: &mut usize,
        out: &mut Vec<u8>,
    ) -> Result<(), End> {
        let key = self.session;
        let wrong = |_| End::Refused(ReasonCode::PROTOCOL_ERROR);
        match packet {
            Packet::Publish(publish) => self.publish(st, &publish, unseen_acks, out)?,
            Packet::Puback(ack) => {
                let sending = &mut st.sessions[key as usize].out;
                sending.puback(ack.packet_id).map_err(wrong)?;
            }
            Packet::Pubrec(ack) => {
                let sending = &mut st.sessions[key as usize].out;
                let reason = sending.pubrec(ack.packet_id, ack.reason).map_err(wrong)?;
                if let Some(reason) = reason {
                    encode_ack(
                        self.version,
                        AckKind::Pubrel,
                        ack.packet_id,
                        reason,
                        None,
                        out,
                    );
                }
            }
            Packet::Pubcomp(ack) => {
                let sending = &mut st.sessions[key as usize].out;
                sending.pubcomp(ack.packet_id).map_err(wrong)?;
            }
            Packet::Pubrel(ack) => {
                let known = st.sessions[key as usize].received.remove(&ack.packet_id);
                let reason = if known {
                    ReasonCode::SUCCESS
                } else {
                    ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
                };
                *unseen_acks += usize::from(known);
                encode_ack(
                    self.version,
                    AckKind::Pubcomp,
                    ack.packet_id,
                    reason,
                    None,
                    out,
                );
            }
            Packet::Subscribe(subscribe) => self.subscribe(st, &subscribe, out)?,
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(st, &unsubscribe, out),
            Packet::Pingreq => {
                // The answer shows that all earlier messages were sent.
                st.pump(key, out, PING_OUTPUT_BYTES);
                encode_pingresp(out);
            }
            Packet::Disconnect(disconnect) => return Err(disconnected(st, key, &disconnect)),
            // A second CONNECT [MQTT-3.1.0-2]; AUTH without a method
            // [MQTT-4.12.0-6]; the rest only a server sends.
            _ => return Err(End::Refused(ReasonCode::PROTOCOL_ERROR)),
        }
        Ok(())
    }

    fn publish(
        &mut self,
        st: &mut State,
        publish: &Publish<'_>,
        unseen_acks: &mut usize,
        out: &mut Vec<u8>,
    ) -> Result<(), End> {
        if publish.qos > st.options.max_qos {
            return Err(End::Refused(ReasonCode::QOS_NOT_SUPPORTED));
        }
        if publish.retain && !st.options.retain_available && self.version == Version::V5 {
            return Err(End::Refused(ReasonCode::RETAIN_NOT_SUPPORTED));
        }
        let (key, version) = (self.session, self.version);
        let receive_max = usize::from(self.receive_max);
        let topic = self.topic(publish)?;
        let received = &mut st.sessions[key as usize].received;
        if publish.qos == QoS::ExactlyOnce && received.contains(&publish.packet_id) {
            // It was sent again, and has been delivered already [MQTT-4.3.3-10].
            let (id, reason) = (publish.packet_id, ReasonCode::SUCCESS);
            encode_ack(version, AckKind::Pubrec, id, reason, None, out);
            return Ok(());
        }
        if publish.qos != QoS::AtMostOnce && received.len() + *unseen_acks >= receive_max {
            return Err(End::Refused(ReasonCode::RECEIVE_MAXIMUM_EXCEEDED));
        }
        if publish.qos == QoS::ExactlyOnce {
            received.insert(publish.packet_id);
        }
        let expires_at = publish
            .message_expiry
            .map(|seconds| Deadline::after_seconds(st.now, seconds));
        let message = Message::new(&MessageSpec {
            topic,
            properties: publish.properties,
            payload: publish.payload,
            qos: publish.qos,
            retain: publish.retain,
            expires_at,
            strip_key: None,
            account: Some(st.account.clone()),
        });
        let reason = if st.publish(key, &message) {
            ReasonCode::SUCCESS
        } else {
            ReasonCode::NO_MATCHING_SUBSCRIBERS
        };
        let id = publish.packet_id;
        match publish.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => {
                *unseen_acks += 1;
                encode_ack(version, AckKind::Puback, id, reason, None, out);
            }
            QoS::ExactlyOnce => encode_ack(version, AckKind::Pubrec, id, reason, None, out),
        }
        Ok(())
    }

    /// The topic of a PUBLISH, which may be given by its alias (MQTT 5 §3.3.2.3.4).
    fn topic<'a>(&'a mut self, publish: &Publish<'a>) -> Result<&'a str, End> {
        let Some(alias) = publish.topic_alias else {
            return Ok(publish.topic);
        };
        let invalid = End::Refused(ReasonCode::TOPIC_ALIAS_INVALID);
        let at = usize::from(alias).checked_sub(1).ok_or(invalid)?;
        let slot = self.aliases.get_mut(at).ok_or(invalid)?;
        if !publish.topic.is_empty() {
            if slot.as_deref() != Some(publish.topic) {
                *slot = Some(publish.topic.into());
            }
            return Ok(publish.topic);
        }
        let unknown = End::Refused(ReasonCode::PROTOCOL_ERROR);
        slot.as_deref().ok_or(unknown)
    }

    fn subscribe(
        &mut self,
        st: &mut State,
        subscribe: &Subscribe<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), End> {
        st.counts.subscribes += 1;
        let id = subscribe.subscription_id;
        let codes: Vec<u8> = subscribe
            .filters()
            .map(|(filter, options)| st.subscribe(self.session, filter, options, id).0)
            .collect();
        // 3.1 has no code for a refusal.
        if self.version == Version::V31 && codes.iter().any(|&c| ReasonCode(c).is_error()) {
            return Err(End::Refused(ReasonCode::UNSPECIFIED_ERROR));
        }
        encode_suback(self.version, subscribe.packet_id, &codes, out);
        Ok(())
    }

    fn unsubscribe(&mut self, st: &mut State, unsubscribe: &Unsubscribe<'_>, out: &mut Vec<u8>) {
        st.counts.unsubscribes += 1;
        let codes: Vec<u8> = unsubscribe
            .filters()
            .map(|filter| match st.unsubscribe(self.session, filter) {
                true => ReasonCode::SUCCESS.0,
                false => ReasonCode::NO_SUBSCRIPTION_EXISTED.0,
            })
            .collect();
        encode_unsuback(self.version, unsubscribe.packet_id, &codes, out);
    }
}

/// Appends the DISCONNECT that tells an MQTT 5 client the reason (§3.14). A 3.x client only sees the
/// connection close.
pub(crate) fn encode_end(version: Version, reason: ReasonCode, out: &mut Vec<u8>) {
    if version == Version::V5 {
        encode_disconnect(version, reason, None, None, out);
    }
}

fn disconnected(st: &mut State, key: u32, disconnect: &Disconnect<'_>) -> End {
    let session = &mut st.sessions[key as usize];
    if let Some(expiry) = disconnect.session_expiry {
        // DISCONNECT cannot keep a session that was to end with its connection (§3.14.2.2.2).
        if session.expiry == 0 && expiry != 0 {
            return End::Refused(ReasonCode::PROTOCOL_ERROR);
        }
        session.expiry = expiry;
    }
    End::Disconnected {
        will: disconnect.reason != ReasonCode::NORMAL_DISCONNECTION,
    }
}

/// `Err` if the options forbid something that a CONNECT asks for.
fn acceptable(st: &State, connect: &Connect<'_>) -> Result<(), ReasonCode> {
    let options = &st.options;
    if connect.version == Version::V5 && options.quirks().refuse_v5 != RefuseV5::No {
        return Err(ReasonCode::UNSUPPORTED_PROTOCOL_VERSION);
    }
    if connect.authentication_method.is_some() {
        return Err(ReasonCode::BAD_AUTHENTICATION_METHOD);
    }
    if let Some(will) = &connect.will {
        // [MQTT-3.2.2-12], [MQTT-3.2.2-13]
        if will.qos > options.max_qos {
            return Err(ReasonCode::QOS_NOT_SUPPORTED);
        }
        if will.retain && !options.retain_available {
            return Err(ReasonCode::RETAIN_NOT_SUPPORTED);
        }
    }
    Ok(())
}

/// Answers a first packet that is not an acceptable CONNECT, where the protocol has a form for it.
fn refuse_bytes(error: &Error, input: &[u8], out: &mut Vec<u8>) {
    let version = match error {
        // Newer than MQTT 5 or older than 3.1: every client reads the form of 3.1.1.
        Error::UnsupportedVersion { .. } => Version::V311,
        _ if begins_v5(input) => Version::V5,
        _ => return,
    };
    let connack = Connack {
        reason: error.reason_code(),
        ..Connack::default()
    };
    connack.encode(version, out);
}

/// Whether these bytes begin a CONNECT of MQTT 5, even one that does not decode.
fn begins_v5(input: &[u8]) -> bool {
    const CONNECT: u8 = 0x10;
    const CONTINUED: u8 = 0x80;
    let Some((&first, rest)) = input.split_first() else {
        return false;
    };
    let last_length_byte = rest.iter().take(4).position(|byte| byte & CONTINUED == 0);
    first & 0xF0 == CONNECT
        && last_length_byte.is_some_and(|at| rest[at + 1..].starts_with(b"\0\x04MQTT\x05"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_a_connect_shows_before_the_rest_of_it() {
        let connect = b"\x10\x0E\0\x04MQTT\x05\x02\0\x3C\0\0\x01c";
        assert!(!begins_v5(&connect[..8]));
        assert!(begins_v5(&connect[..9]));
        assert!(begins_v5(b"\x10\x80\x01\0\x04MQTT\x05"));
        assert!(!begins_v5(b"\x10\x0E\0\x04MQTT\x04"));
        assert!(!begins_v5(b"\xC0\0"));
        assert!(!begins_v5(b"\x10\xFF\xFF\xFF\xFF\0\x04MQTT\x05"));
        assert!(!begins_v5(b""));
    }
}
