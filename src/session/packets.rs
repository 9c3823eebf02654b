//! The packets of the client, except SUBSCRIBE and UNSUBSCRIBE.

use std::hash::BuildHasher;
use std::sync::Arc;

use crate::mqtt::{
    Ack, AckKind, Disconnect, Message, MessageSpec, Mounting, Packet, Property, Publish, QoS,
    ReasonCode, Version, encode_ack, encode_pingresp, has_discouraged,
};
use crate::streams::StreamId;
use crate::time::{Deadline, Millis};
use crate::topics::{is_bridge_state, matches};

use crate::session::connection::{Connection, Scope};
use crate::session::inbound::{Answer, Arrival, Inbound, Incoming, OpenMax, Token};
use crate::session::incarnation::Incarnation;
use crate::session::phase::Online;
use crate::session::{
    CloseReason, Effect, Policy, ResponseTopic, Session, SessionLimits, Subscription,
};

impl Session {
    /// Takes one packet that arrived on `stream` (0: the control stream), and appends what it asks
    /// of the router to `effects`, in order. Call [`Session::pump`] after the last packet of a batch.
    /// After a SUBSCRIBE, the effects must be carried out before the next packet is taken: the router
    /// adds the subscriptions.
    ///
    /// # Errors
    /// The connection must end for this reason. The effects appended so far are still to be carried
    /// out.
    pub fn packet(
        &mut self,
        stream: StreamId,
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
                self.outbound_mut().acknowledged(a.packet_id, now);
                Ok(())
            }
            Packet::Pubrec(a) => self.pubrec(stream, a, now),
            Packet::Pubrel(a) => self.pubrel(stream, a),
            Packet::Pubcomp(a) => {
                self.outbound_mut().completed(a.packet_id);
                Ok(())
            }
            Packet::Subscribe(s) => self.subscribe(stream, s, limits, policy, effects),
            Packet::Unsubscribe(u) => self.unsubscribe(stream, u, limits, now, effects),
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
        stream: StreamId,
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
            aliased = connection.aliases.resolve(stream, alias, publish.topic)?;
            topic = &aliased;
        }
        check_announced(publish, connection.version, policy)?;
        let mut token = None;
        if publish.qos > QoS::AtMostOnce {
            token = self.arrive(stream, publish, topic, limits)?;
            if token.is_none() {
                return Ok(());
            }
        }
        let none = Scope::default();
        let scope = self.phase.connection().and_then(|c| c.scope.clone());
        let scope = scope.as_deref().unwrap_or(&none);
        let response_topic = match permit(publish, topic, scope, limits, policy) {
            Ok(kept) => kept,
            Err(reason) => {
                self.refuse(token, reason);
                return Ok(());
            }
        };
        let expiry = publish.message_expiry;
        let spec = MessageSpec {
            topic,
            properties: publish.properties,
            payload: publish.payload,
            qos: publish.qos,
            retain: publish.retain,
            expires_at: expiry.map(|seconds| Deadline::after_seconds(now, seconds)),
            strip_key: Some(limits.reserved_key),
            account: Some(limits.publish_account.clone()),
        };
        let mounting = Mounting {
            mount: &scope.mount,
            sender: &scope.sender,
            response_topic,
        };
        let message = Message::mounted(&spec, &mounting);
        let origin_mark = self.origin_mark(|| message.topic());
        effects.push(Effect::Publish {
            token,
            message,
            origin_mark,
        });
        Ok(())
    }

    /// Whether a publish of an MQTT 5 client is to wait unread until the broker has answered one before
    /// it, because the client has as many unanswered as we announced. Many clients do not count.
    pub fn defers(&self, stream: StreamId, publish: &Publish<'_>, limits: &SessionLimits) -> bool {
        let full = |i: &Inbound| i.is_full(stream, publish.packet_id, limits.receive_max.into());
        // A copy with DUP takes no place of its own.
        publish.qos > QoS::AtMostOnce
            && !publish.dup
            && self.version == Version::V5
            && self.inbound.as_deref().is_some_and(full)
    }

    /// A publish of QoS 1 or 2: its token if it is to be forwarded, `None` if it is one that we have
    /// had before, which is answered here as far as it can be.
    fn arrive(
        &mut self,
        stream: StreamId,
        publish: &Publish<'_>,
        topic: &str,
        limits: &SessionLimits,
    ) -> Result<Option<Token>, CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(None);
        };
        let open_max = match connection.version {
            Version::V5 => OpenMax {
                announced: limits.receive_max.into(),
                hard: limits.receive_max_hard(),
            },
            // The client's socket is left unread well before.
            _ => OpenMax {
                announced: limits.v3_publishes_max * 4,
                hard: limits.v3_publishes_max * 4,
            },
        };
        let incoming = Incoming {
            packet_id: publish.packet_id,
            stream,
            dup: publish.dup,
            qos: publish.qos,
            digest: limits.hash_seed.hash_one((topic, publish.payload)),
        };
        let inbound = self
            .inbound
            .get_or_insert_with(|| Box::new(Inbound::new(limits.hash_seed)));
        match inbound.arrive(&incoming, open_max) {
            Arrival::New(token) => return Ok(Some(token)),
            Arrival::Joined => {}
            Arrival::Answered(reason) => {
                let answer = Answer {
                    packet_id: publish.packet_id,
                    stream,
                    qos: publish.qos,
                };
                write_answer(connection, &answer, reason);
            }
            Arrival::Received => {
                let (version, out) = (connection.version, connection.output_on(stream));
                let (kind, id) = (AckKind::Pubrec, publish.packet_id);
                encode_ack(version, kind, id, ReasonCode::SUCCESS, None, out);
            }
            Arrival::TooMany => return Err(CloseReason::ReceiveMaximumExceeded),
        }
        Ok(None)
    }

    /// A publish is not forwarded. MQTT 3 has no negative answer, so there it is acknowledged.
    fn refuse(&mut self, token: Option<Token>, reason: ReasonCode) {
        match reason {
            // The state of a bridge is denied without telling it.
            ReasonCode::NOT_AUTHORIZED | ReasonCode::SUCCESS => self.refused_publishes.denied += 1,
            _ => self.refused_publishes.invalid += 1,
        }
        let inbound = self.inbound.as_mut().zip(token);
        let answer = inbound.and_then(|(inbound, token)| inbound.answer(token, reason, true));
        if let (Some(answer), Some(connection)) = (answer, self.phase.connection_mut()) {
            write_answer(connection, &answer, reason);
        }
    }

    fn pubrec(&mut self, stream: StreamId, ack: &Ack<'_>, now: Millis) -> Result<(), CloseReason> {
        let Some(online) = self.phase.online_mut() else {
            return Ok(());
        };
        let Online {
            connection,
            outbound,
        } = online;
        if ack.reason.is_error() {
            outbound.acknowledged(ack.packet_id, now);
            return Ok(());
        }
        let reason = if outbound.received(ack.packet_id, stream) {
            connection.commit_first();
            ReasonCode::SUCCESS
        } else {
            ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
        };
        let version = connection.version;
        let out = connection.output_on(stream);
        encode_ack(version, AckKind::Pubrel, ack.packet_id, reason, None, out);
        Ok(())
    }

    fn pubrel(&mut self, stream: StreamId, ack: &Ack<'_>) -> Result<(), CloseReason> {
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
    pub fn origin_mark<'a>(&self, topic: impl Fn() -> &'a str) -> Option<Incarnation> {
        let hides = |s: &Subscription| s.options.no_local && matches(&s.name, topic());
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

/// Whether a publish keeps to the abilities of the broker that CONNACK announced.
fn check_announced(
    publish: &Publish<'_>,
    version: Version,
    policy: &dyn Policy,
) -> Result<(), CloseReason> {
    let v5 = version == Version::V5;
    if v5 && publish.qos > policy.maximum_qos() {
        return Err(CloseReason::QosNotSupported);
    }
    if v5 && publish.retain && !policy.retain_available() {
        return Err(CloseReason::RetainNotSupported);
    }
    Ok(())
}

/// Whether a publish is passed on, and then whether its Response Topic is passed on with it.
///
/// # Errors
/// The reason code of its acknowledgement; with MQTT 3, which has none, it is not forwarded. The state of
/// a bridge is dropped without telling it, because the bridge might give up.
fn permit(
    publish: &Publish<'_>,
    topic: &str,
    scope: &Scope,
    limits: &SessionLimits,
    policy: &dyn Policy,
) -> Result<bool, ReasonCode> {
    let mount = &*scope.mount;
    if !limits.allows_levels(mount, topic) {
        return Err(ReasonCode::TOPIC_NAME_INVALID);
    }
    // Discouraged characters are legal, but a broker may close the connection that all clients share
    // because of them (§1.5.4).
    if has_discouraged(topic) {
        return Err(ReasonCode::TOPIC_NAME_INVALID);
    }
    let mut response_topic = None;
    for property in publish.properties.iter() {
        if has_discouraged_text(&property) {
            return Err(ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
        }
        if let Property::ResponseTopic(topic) = property {
            response_topic = Some(topic);
        }
    }
    if mount.len() + topic.len() > usize::from(u16::MAX) {
        return Err(ReasonCode::TOPIC_NAME_INVALID);
    }
    if !policy.may_publish(mount, topic) {
        return Err(match is_bridge_state(topic) {
            true => ReasonCode::SUCCESS,
            false => ReasonCode::NOT_AUTHORIZED,
        });
    }
    keep_response_topic(response_topic, mount, limits, policy)
}

/// Whether a Response Topic is passed on.
///
/// # Errors
/// The reason code with which its publish is refused.
pub(crate) fn keep_response_topic(
    topic: Option<&str>,
    mount: &str,
    limits: &SessionLimits,
    policy: &dyn Policy,
) -> Result<bool, ReasonCode> {
    let Some(topic) = topic else {
        return Ok(true);
    };
    match policy.response_topic(mount, topic) {
        // A longer one is not a topic, and nobody can publish to one with more levels.
        ResponseTopic::Mounted => Ok(mount.len() + topic.len() <= usize::from(u16::MAX)
            && limits.allows_levels(mount, topic)),
        ResponseTopic::Removed => Ok(false),
        ResponseTopic::Refused => Err(ReasonCode::NOT_AUTHORIZED),
    }
}

fn has_discouraged_text(property: &Property<'_>) -> bool {
    match property {
        Property::UserProperty(key, value) => has_discouraged(key) || has_discouraged(value),
        Property::ContentType(text) | Property::ResponseTopic(text) => has_discouraged(text),
        _ => false,
    }
}

/// PUBACK or PUBREC for a publish that the broker answered.
pub(super) fn write_answer(connection: &mut Connection, answer: &Answer, reason: ReasonCode) {
    let kind = match answer.qos {
        QoS::ExactlyOnce => AckKind::Pubrec,
        _ => AckKind::Puback,
    };
    let version = connection.version;
    let out = connection.output_on(answer.stream);
    encode_ack(version, kind, answer.packet_id, reason, None, out);
}
