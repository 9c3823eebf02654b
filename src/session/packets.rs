//! What each packet from the client does to its session.

use std::hash::BuildHasher;
use std::sync::Arc;

use crate::mqtt::{
    Ack, AckKind, Disconnect, Message, MessageSpec, Packet, Property, Publish, QoS, ReasonCode,
    Version, encode_ack, encode_pingresp, has_discouraged,
};
use crate::time::Millis;
use crate::topics::matches;

use crate::session::connection::{Connection, Scope};
use crate::session::inbound::{Answer, Arrival, Incoming};
use crate::session::incarnation::Incarnation;
use crate::session::{CloseReason, Effect, Policy, Session, SessionLimits, Subscription};

impl Session {
    /// Takes one packet that arrived on `stream` (0: the control stream). What it asks of the router
    /// is appended to `effects`, in order. Subscriptions are the router's to add: before the next
    /// packet is judged, an [`Effect::Subscribe`] is to be carried out.
    ///
    /// # Errors
    /// [`CloseReason`]: the connection must end; `effects` so far stand.
    pub fn packet(
        &mut self,
        stream: u8,
        packet: &Packet<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        now: Millis,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Err(CloseReason::NotConnected);
        };
        connection.last_seen = now;
        match packet {
            Packet::Publish(p) => self.publish(stream, p, limits, policy, now, effects),
            Packet::Puback(a) => {
                self.outbound.acknowledged(a.packet_id, now);
                Ok(())
            }
            Packet::Pubrec(a) => self.pubrec(stream, a, now),
            Packet::Pubrel(a) => self.pubrel(stream, a),
            Packet::Pubcomp(a) => {
                self.outbound.completed(a.packet_id);
                Ok(())
            }
            Packet::Subscribe(s) => self.subscribe(stream, s, limits, policy, effects),
            Packet::Unsubscribe(u) => self.unsubscribe(stream, u, effects),
            Packet::Pingreq => {
                encode_pingresp(connection.output_on(stream));
                Ok(())
            }
            Packet::Disconnect(d) => self.disconnect(d, limits),
            Packet::Connect(_) => Err(CloseReason::SecondConnect),
            Packet::Auth(_) => Err(CloseReason::AuthWithoutMethod),
            _ => Err(CloseReason::ServerPacket),
        }
    }

    fn publish(
        &mut self,
        stream: u8,
        publish: &Publish<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        now: Millis,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let aliased: Arc<str>;
        let mut topic = publish.topic;
        if let Some(alias) = publish.topic_alias {
            if alias > limits.topic_alias_max {
                return Err(CloseReason::TopicAliasAboveMaximum);
            }
            aliased = connection.resolve_alias(stream, alias, publish.topic)?;
            topic = &aliased;
        }
        if topic.split('/').count() > limits.topic_levels_max {
            return Err(CloseReason::TopicLevels);
        }
        let v5 = connection.version == Version::V5;
        if v5 && publish.qos > policy.maximum_qos() {
            return Err(CloseReason::QosNotSupported);
        }
        if v5 && publish.retain && !policy.retain_available() {
            return Err(CloseReason::RetainNotSupported);
        }
        let mut token = None;
        if publish.qos > QoS::AtMostOnce {
            let open_max = match connection.version {
                Version::V5 => usize::from(limits.receive_max),
                // Its socket is left unread before that.
                _ => limits.v3_publishes_max * 4,
            };
            let incoming = Incoming {
                packet_id: publish.packet_id,
                stream,
                dup: publish.dup,
                qos: publish.qos,
                digest: limits.hasher.hash_one((topic, publish.payload)),
            };
            match self
                .inbound
                .get_or_insert_default()
                .arrive(&incoming, open_max)
            {
                Arrival::New(new) => token = Some(new),
                Arrival::Joined => return Ok(()),
                Arrival::Answered(reason) => {
                    let answer = Answer {
                        packet_id: publish.packet_id,
                        stream,
                        qos: publish.qos,
                    };
                    write_answer(connection, &answer, reason);
                    return Ok(());
                }
                Arrival::Received => {
                    let (version, out) = (connection.version, connection.output_on(stream));
                    let (kind, id) = (AckKind::Pubrec, publish.packet_id);
                    encode_ack(version, kind, id, ReasonCode::SUCCESS, None, out);
                    return Ok(());
                }
                Arrival::TooMany => {
                    return Err(CloseReason::ReceiveMaximumExceeded);
                }
            }
        }
        let none = Scope::default();
        let scope = connection.scope.clone();
        let scope = scope.as_deref().unwrap_or(&none);
        let refused = if has_discouraged(topic) {
            // Legal, but a core may close the connection that all share for it (§1.5.4).
            Some(ReasonCode::TOPIC_NAME_INVALID)
        } else if publish.properties.iter().any(|p| has_discouraged_text(&p)) {
            Some(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR)
        } else if scope.mount.len() + topic.len() > usize::from(u16::MAX) {
            Some(ReasonCode::TOPIC_NAME_INVALID)
        } else if !policy.may_publish(topic) {
            Some(ReasonCode::NOT_AUTHORIZED)
        } else {
            None
        };
        if let Some(reason) = refused {
            self.refused_publishes += 1;
            // 3.x has no negative answer: acknowledged, and not forwarded.
            if let Some(token) = token
                && let Some(answer) = self
                    .inbound
                    .as_mut()
                    .and_then(|i| i.answer(token, reason, true))
            {
                write_answer(connection, &answer, reason);
            }
            return Ok(());
        }
        let spec = MessageSpec {
            topic,
            properties: publish.properties,
            payload: publish.payload,
            qos: publish.qos,
            retain: publish.retain,
            expires_at: publish
                .message_expiry
                .map_or(u64::MAX, |s| now + u64::from(s) * 1000),
            strip_key: Some(limits.reserved_key),
            account: Some(limits.publish_account.clone()),
        };
        let message = Message::mounted(&spec, &scope.mount, &scope.sender);
        let origin_mark = self.origin_mark(message.topic());
        effects.push(Effect::Publish {
            token,
            message,
            origin_mark,
        });
        Ok(())
    }

    fn pubrec(&mut self, stream: u8, ack: &Ack<'_>, now: Millis) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        if ack.reason.is_error() {
            self.outbound.acknowledged(ack.packet_id, now);
            return Ok(());
        }
        let reason = if self.outbound.received(ack.packet_id, stream) {
            ReasonCode::SUCCESS
        } else {
            ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
        };
        let version = connection.version;
        let out = connection.output_on(stream);
        encode_ack(version, AckKind::Pubrel, ack.packet_id, reason, None, out);
        Ok(())
    }

    fn pubrel(&mut self, stream: u8, ack: &Ack<'_>) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let reason = if self
            .inbound
            .as_mut()
            .is_some_and(|i| i.release(stream, ack.packet_id))
        {
            ReasonCode::SUCCESS
        } else {
            ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
        };
        let version = connection.version;
        let out = connection.output_on(stream);
        encode_ack(version, AckKind::Pubcomp, ack.packet_id, reason, None, out);
        Ok(())
    }

    /// The origin mark of a publish by this client on `topic`: only where a No Local subscription of
    /// the client matches [MQTT-3.8.3-3].
    pub fn origin_mark(&self, topic: &str) -> Option<Incarnation> {
        let hides = |s: &Subscription| s.options.no_local && matches(&s.name, topic);
        let hidden = self.subscriptions.iter().any(hides);
        hidden.then_some(self.incarnation)
    }

    fn disconnect(
        &mut self,
        disconnect: &Disconnect<'_>,
        limits: &SessionLimits,
    ) -> Result<(), CloseReason> {
        if let Some(expiry) = disconnect.session_expiry {
            if self.expiry == 0 && expiry != 0 {
                return Err(CloseReason::ExpirySetOnDisconnect);
            }
            self.expiry = expiry.min(limits.expiry_max);
        }
        if disconnect.reason != ReasonCode::SUCCESS {
            // The client's own reason (0x04 and above): the will goes out, nothing is sent back.
            return Err(CloseReason::DisconnectWithWill);
        }
        if self.will.take().is_some() {
            self.phase.discard_will();
        }
        Err(CloseReason::Disconnect)
    }
}

fn has_discouraged_text(property: &Property<'_>) -> bool {
    match property {
        Property::UserProperty(key, value) => has_discouraged(key) || has_discouraged(value),
        Property::ContentType(text) | Property::ResponseTopic(text) => has_discouraged(text),
        _ => false,
    }
}

/// PUBACK or PUBREC for a publish that the core answered.
pub(super) fn write_answer(connection: &mut Connection, answer: &Answer, reason: ReasonCode) {
    let kind = match answer.qos {
        QoS::ExactlyOnce => AckKind::Pubrec,
        _ => AckKind::Puback,
    };
    let version = connection.version;
    let out = connection.output_on(answer.stream);
    encode_ack(version, kind, answer.packet_id, reason, None, out);
}
