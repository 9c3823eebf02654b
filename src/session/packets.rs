//! What each packet from the client does to its session.

use std::borrow::Cow;
use std::hash::BuildHasher;
use std::sync::Arc;

use crate::mqtt::{
    Ack, AckKind, Disconnect, Message, MessageSpec, Packet, Property, Publish, QoS, ReasonCode,
    Subscribe, Unsubscribe, Version, encode_ack, encode_pingresp, encode_suback, encode_unsuback,
    has_discouraged, matches, split_shared,
};

use super::connection::{Connection, NOWHERE, PendingSubscribe, Scope};
use super::inbound::{Answer, Arrival, Incoming};
use super::senior::clash;
use super::{Close, Effect, Left, Policy, Session, SessionLimits, Subscription, Wanted};

impl Session {
    /// Takes one packet that arrived on `lane` (0: the control stream). What it asks of the router
    /// is appended to `effects`, in order. Subscriptions are the router's to add: before the next
    /// packet is judged, an [`Effect::Subscribe`] is to be carried out.
    ///
    /// # Errors
    /// [`Close`]: the connection must end; `effects` so far stand.
    pub fn packet(
        &mut self,
        lane: u8,
        packet: &Packet<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        now: u64,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Err(protocol("the session has no connection"));
        };
        connection.last_seen = now;
        match packet {
            Packet::Publish(p) => self.publish(lane, p, limits, policy, now, effects),
            Packet::Puback(a) => {
                self.outbound.acknowledged(a.packet_id, now);
                Ok(())
            }
            Packet::Pubrec(a) => self.pubrec(lane, a, now),
            Packet::Pubrel(a) => self.pubrel(lane, a),
            Packet::Pubcomp(a) => {
                self.outbound.completed(a.packet_id);
                Ok(())
            }
            Packet::Subscribe(s) => self.subscribe(lane, s, limits, policy, effects),
            Packet::Unsubscribe(u) => self.unsubscribe(lane, u, effects),
            Packet::Pingreq => {
                encode_pingresp(connection.lane(lane));
                Ok(())
            }
            Packet::Disconnect(d) => self.disconnect(d, limits),
            Packet::Connect(_) => Err(protocol("a second CONNECT [MQTT-3.1.0-2]")),
            Packet::Auth(_) => Err(protocol("AUTH without an authentication method")),
            _ => Err(protocol("a packet that only servers send")),
        }
    }

    fn publish(
        &mut self,
        lane: u8,
        publish: &Publish<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        now: u64,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Ok(());
        };
        let aliased: Arc<str>;
        let mut topic = publish.topic;
        if let Some(alias) = publish.topic_alias {
            if alias > limits.topic_alias_max {
                return Err(close(
                    ReasonCode::TOPIC_ALIAS_INVALID,
                    "a topic alias above our maximum [MQTT-3.3.2-9]",
                ));
            }
            aliased = connection.resolve_alias(lane, alias, publish.topic)?;
            topic = &aliased;
        }
        if topic.split('/').count() > limits.topic_levels_max {
            return Err(close(
                ReasonCode::TOPIC_NAME_INVALID,
                "a topic with more levels than limits.topic_levels_max",
            ));
        }
        let v5 = connection.version == Version::V5;
        if v5 && publish.qos > policy.maximum_qos() {
            return Err(close(
                ReasonCode::QOS_NOT_SUPPORTED,
                "a QoS above the announced maximum [MQTT-3.2.2-11]",
            ));
        }
        if v5 && publish.retain && !policy.retain_available() {
            return Err(close(
                ReasonCode::RETAIN_NOT_SUPPORTED,
                "RETAIN where the core keeps none [MQTT-3.2.2-14]",
            ));
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
                lane,
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
                        lane,
                        qos: publish.qos,
                    };
                    write_answer(connection, &answer, reason);
                    return Ok(());
                }
                Arrival::Received => {
                    let (version, out) = (connection.version, connection.lane(lane));
                    let (kind, id) = (AckKind::Pubrec, publish.packet_id);
                    encode_ack(version, kind, id, ReasonCode::SUCCESS, None, out);
                    return Ok(());
                }
                Arrival::TooMany => {
                    return Err(close(
                        ReasonCode::RECEIVE_MAXIMUM_EXCEEDED,
                        "more unanswered publishes than our Receive Maximum",
                    ));
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
        let tag = self.own_tag(message.topic());
        effects.push(Effect::Publish {
            token,
            message,
            tag,
        });
        Ok(())
    }

    fn pubrec(&mut self, lane: u8, ack: &Ack<'_>, now: u64) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Ok(());
        };
        if ack.reason.is_error() {
            self.outbound.acknowledged(ack.packet_id, now);
            return Ok(());
        }
        let reason = if self.outbound.received(ack.packet_id, lane) {
            ReasonCode::SUCCESS
        } else {
            ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
        };
        let version = connection.version;
        let out = connection.lane(lane);
        encode_ack(version, AckKind::Pubrel, ack.packet_id, reason, None, out);
        Ok(())
    }

    fn pubrel(&mut self, lane: u8, ack: &Ack<'_>) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Ok(());
        };
        let reason = if self
            .inbound
            .as_mut()
            .is_some_and(|i| i.release(lane, ack.packet_id))
        {
            ReasonCode::SUCCESS
        } else {
            ReasonCode::PACKET_IDENTIFIER_NOT_FOUND
        };
        let version = connection.version;
        let out = connection.lane(lane);
        encode_ack(version, AckKind::Pubcomp, ack.packet_id, reason, None, out);
        Ok(())
    }

    fn subscribe(
        &mut self,
        lane: u8,
        subscribe: &Subscribe<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Ok(());
        };
        let id = subscribe.packet_id;
        let pending = &connection.pending;
        if pending.iter().any(|p| p.lane == lane && p.packet_id == id) {
            return Err(protocol(
                "a packet identifier that is in use [MQTT-2.2.1-3]",
            ));
        }
        let taken = |key: &u16| pending.iter().any(|p| p.key == *key);
        let key = std::iter::once(id).chain(0..).find(|key| !taken(key));
        let key = key.unwrap_or(id);
        let mut codes = Vec::new();
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut fresh = 0;
        let mut bytes: usize = self.subscriptions.iter().map(|s| s.name.len()).sum();
        for (index, (filter, options)) in subscribe.filters().enumerate() {
            let scope = connection.scope.as_deref();
            let whole = match scope.map(|s| s.filter(filter)) {
                None => Some(Cow::Borrowed(filter)),
                Some(whole) => whole.map(Cow::Owned),
            };
            let at_core = whole.as_deref().unwrap_or(filter);
            let known = self.subscriptions.iter().any(|s| *s.name == *at_core);
            let plain = split_shared(filter).map_or(filter, |(_, plain)| plain);
            let refused = if connection.pending.len() >= PENDING_MAX {
                Some(ReasonCode::QUOTA_EXCEEDED)
            } else if whole.is_none()
                || has_discouraged(filter)
                || plain.split('/').count() > limits.topic_levels_max
            {
                Some(ReasonCode::TOPIC_FILTER_INVALID)
            } else if !policy.may_subscribe(filter) {
                Some(ReasonCode::NOT_AUTHORIZED)
            } else if !known
                && (self.subscriptions.len() + fresh >= limits.subscriptions_max
                    || bytes + filter.len() > limits.filter_bytes_max)
            {
                Some(ReasonCode::QUOTA_EXCEEDED)
            } else {
                None
            };
            // Replaced by the answer of each filter that passed.
            codes.push(refused.unwrap_or(ReasonCode::UNSPECIFIED_ERROR).0);
            if refused.is_none() {
                if !known {
                    fresh += 1;
                    bytes += filter.len();
                }
                wanted.push(Wanted {
                    index: index as u16,
                    filter: at_core.into(),
                    options,
                });
            }
        }
        connection.forget_refused();
        for wanted in &wanted {
            connection.bind(&wanted.filter, lane);
        }
        connection.pending.push(PendingSubscribe {
            key,
            packet_id: id,
            lane,
            waiting: wanted.len() as u16,
            codes,
        });
        if wanted.is_empty() {
            return self.finish_subscribe(key);
        }
        effects.push(Effect::Subscribe {
            packet_id: key,
            identifier: subscribe.subscription_id.unwrap_or(0),
            wanted,
        });
        Ok(())
    }

    /// The outcome for one filter of a SUBSCRIBE, named as in [`Effect::Subscribe`]; the SUBACK goes
    /// out with the last.
    ///
    /// # Errors
    /// [`Close`]: MQTT 3.1 has no code for a refusal.
    pub fn subscribed(
        &mut self,
        packet_id: u16,
        index: u16,
        code: ReasonCode,
    ) -> Result<(), Close> {
        let all = self.connection.iter_mut().flat_map(|c| &mut c.pending);
        let Some(pending) = all.into_iter().find(|p| p.key == packet_id) else {
            return Ok(());
        };
        if let Some(slot) = pending.codes.get_mut(usize::from(index)) {
            *slot = code.0;
        }
        pending.waiting = pending.waiting.saturating_sub(1);
        if pending.waiting == 0 {
            return self.finish_subscribe(packet_id);
        }
        Ok(())
    }

    fn finish_subscribe(&mut self, key: u16) -> Result<(), Close> {
        let Some(connection) = self.connection.as_deref_mut() else {
            return Ok(());
        };
        let due = |p: &PendingSubscribe| p.key == key;
        let Some(at) = connection.pending.iter().position(due) else {
            return Ok(());
        };
        let pending = connection.pending.swap_remove(at);
        let version = connection.version;
        if version == Version::V31 && pending.codes.iter().any(|c| *c >= 0x80) {
            return Err(close(
                ReasonCode::NOT_AUTHORIZED,
                "a refused filter, which MQTT 3.1 cannot be told",
            ));
        }
        if pending.lane == NOWHERE {
            return Ok(());
        }
        let out = connection.lane(pending.lane);
        encode_suback(version, pending.packet_id, &pending.codes, out);
        Ok(())
    }

    /// Puts a subscription in force, or replaces the one on the same filter [MQTT-3.8.4-3].
    /// Returns the one it replaced.
    pub fn add_subscription(&mut self, mut new: Subscription) -> Option<Subscription> {
        if let Some(connection) = &mut self.connection {
            connection.numbered(&new.name, new.filter);
        }
        if let Some(old) = self
            .subscriptions
            .iter_mut()
            .find(|s| s.filter == new.filter)
        {
            new.overlaps = old.overlaps;
            new.active = old.active;
            return Some(std::mem::replace(old, new));
        }
        for other in &mut self.subscriptions {
            if clash(other, &new) {
                other.overlaps = true;
                new.overlaps = true;
            }
        }
        // Most have one: room for four would be the larger part of a session.
        if self.subscriptions.is_empty() {
            self.subscriptions.reserve_exact(1);
        }
        self.subscriptions.push(new);
        None
    }

    /// The core granted it: behind those that it granted before. Whether it had not until now.
    pub fn activate_subscription(&mut self, filter: u32) -> bool {
        let all = &mut self.subscriptions;
        let Some(at) = all.iter().position(|s| s.filter == filter && !s.active) else {
            return false;
        };
        let mut granted = all.remove(at);
        granted.active = true;
        let behind = all.iter().position(|s| !s.active).unwrap_or(all.len());
        all.insert(behind, granted);
        true
    }

    /// The subscription on a filter number.
    pub fn subscription(&mut self, filter: u32) -> Option<&mut Subscription> {
        self.subscriptions.iter_mut().find(|s| s.filter == filter)
    }

    /// Takes a subscription away.
    pub fn remove_subscription(&mut self, filter: u32) -> Option<Subscription> {
        let at = self.subscriptions.iter().position(|s| s.filter == filter)?;
        let removed = self.subscriptions.remove(at);
        if let Some(connection) = &mut self.connection {
            connection.bind(&removed.name, 0);
        }
        if removed.overlaps {
            for i in 0..self.subscriptions.len() {
                if !clash(&self.subscriptions[i], &removed) {
                    continue;
                }
                let still = (0..self.subscriptions.len())
                    .any(|j| i != j && clash(&self.subscriptions[i], &self.subscriptions[j]));
                self.subscriptions[i].overlaps = still;
            }
        }
        Some(removed)
    }

    /// The mark of what this client publishes on `topic`: its own, if a No Local subscription is to
    /// know it again; else 0.
    pub fn own_tag(&self, topic: &str) -> u64 {
        let hides = |s: &Subscription| s.options.no_local && matches(&s.name, topic);
        match self.subscriptions.iter().any(hides) {
            true => self.tag,
            false => 0,
        }
    }

    /// Takes a subscription away that its client gave up.
    fn leave_subscription(&mut self, filter: u32) -> Option<Left> {
        let all = &self.subscriptions;
        let at = all.iter().position(|s| s.filter == filter)?;
        let (left, younger) = (&all[at], &all[at + 1..]);
        let mut senior_over = Vec::new();
        if left.active && left.overlaps {
            let over = younger.iter().filter(|s| s.active && clash(s, left));
            senior_over.extend(over.map(|s| s.filter));
        }
        let left = self.remove_subscription(filter)?;
        Some(Left {
            filter,
            name: left.name,
            no_local: left.options.no_local,
            senior_over,
        })
    }

    fn unsubscribe(
        &mut self,
        lane: u8,
        unsubscribe: &Unsubscribe<'_>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Close> {
        let mut codes = Vec::new();
        let mut filters = Vec::new();
        let scope = self.connection.as_ref().and_then(|c| c.scope.clone());
        for filter in unsubscribe.filters() {
            let whole = scope.as_ref().and_then(|s| s.filter(filter));
            let at_core = whole.as_deref().unwrap_or(filter);
            let number = self
                .subscriptions
                .iter()
                .find(|s| *s.name == *at_core)
                .map(|s| s.filter);
            codes.push(match number {
                Some(_) => ReasonCode::SUCCESS.0,
                None => ReasonCode::NO_SUBSCRIPTION_EXISTED.0,
            });
            if let Some(number) = number {
                filters.extend(self.leave_subscription(number));
            }
        }
        if let Some(connection) = self.connection.as_deref_mut() {
            let version = connection.version;
            let out = connection.lane(lane);
            encode_unsuback(version, unsubscribe.packet_id, &codes, out);
        }
        if !filters.is_empty() {
            effects.push(Effect::Unsubscribe { filters });
        }
        Ok(())
    }

    fn disconnect(
        &mut self,
        disconnect: &Disconnect<'_>,
        limits: &SessionLimits,
    ) -> Result<(), Close> {
        if let Some(expiry) = disconnect.session_expiry {
            if self.expiry == 0 && expiry != 0 {
                return Err(protocol(
                    "DISCONNECT sets an expiry that CONNECT had at zero",
                ));
            }
            self.expiry = expiry.min(limits.expiry_max);
        }
        if disconnect.reason.0 == 0 && self.will.take().is_some() {
            self.will_discarded = true;
        }
        Err(Close {
            reason: if disconnect.reason.0 == 0 {
                ReasonCode::SUCCESS
            } else {
                // The client's own reason (0x04 and above): the will goes out, nothing is sent back.
                ReasonCode::DISCONNECT_WITH_WILL_MESSAGE
            },
            why: "DISCONNECT",
        })
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
    let out = connection.lane(answer.lane);
    encode_ack(version, kind, answer.packet_id, reason, None, out);
}

/// SUBSCRIBEs of one client that may wait for the core.
const PENDING_MAX: usize = 100;

fn close(reason: ReasonCode, why: &'static str) -> Close {
    Close { reason, why }
}

fn protocol(why: &'static str) -> Close {
    close(ReasonCode::PROTOCOL_ERROR, why)
}
