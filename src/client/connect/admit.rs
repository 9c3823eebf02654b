//! Gives an authenticated client its session. Pure: simulations admit their clients here too.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::ANONYMOUS;
use crate::config;
use crate::mqtt::{
    Connack, Connect, Message, MessageSpec, Mounting, Property, QoS, ReasonCode, Version,
};
use crate::router::handle::ConnectionHandle;
use crate::router::{self, Caller, Peer, Refused, Router};
use crate::session::{ConnectionSpec, Policy, Scope, SessionKey, Will, keep_response_topic};
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;
use crate::topics::is_bridge_state;

use crate::client::connect::{Refusal, RefusalCause};
use crate::client::machine::Machine;

/// The least Maximum Packet Size that is announced, bytes.
const PACKET_MAX_MIN_BYTES: u32 = 256;

/// What decides about a client's session.
#[derive(Clone, Copy)]
pub struct Admission<'a> {
    /// The router that owns the sessions.
    pub router: &'a Router,
    /// What the client may do.
    pub policy: &'a dyn Policy,
    /// `[session]`.
    pub session: &'a config::Session,
    /// `[limits]`.
    pub limits: &'a config::Limits,
    /// The time of the CONNECT.
    pub now: Millis,
}

/// An authenticated client that has sent CONNECT.
#[derive(Clone, Debug)]
pub struct Applicant {
    /// The client identifier, assigned if the client sent none.
    pub client_id: Arc<str>,
    /// Who the session belongs to.
    pub owner: Arc<str>,
    /// What sets the client's topics and publishes apart; `None`: nothing.
    pub scope: Option<Arc<Scope>>,
    /// Bytes that the scope adds to each of the client's publishes, at most.
    pub added_bytes: u32,
    /// The longest Keep Alive that the transport allows; `None`: any.
    pub keep_alive_max: Option<Duration>,
    /// Where the client is connected from.
    pub peer: Arc<Peer>,
    /// Silence after which its WebSocket is pinged; `None`: it is never pinged.
    pub ping_after: Option<Duration>,
}

/// A client that has its session. CONNACK is in the session's output.
#[derive(Debug)]
pub struct Admitted {
    /// The connection.
    pub machine: Machine,
    /// Session Present [MQTT-3.2.2-3].
    pub present: bool,
    /// A live connection of the same session was ended.
    pub taken_over: bool,
    /// Session Expiry Interval in force.
    pub expiry_seconds: u32,
    /// Keep Alive in force, in seconds.
    pub keep_alive: Option<NonZeroU16>,
}

impl Admission<'_> {
    /// Judges the will, settles the limits of the connection, and takes the session from the router.
    ///
    /// # Errors
    /// The client is refused, and nothing changed.
    pub fn admit(&self, connect: &Connect<'_>, applicant: Applicant) -> Result<Admitted, Refusal> {
        if connect.bridge && !self.router.no_local_available() {
            return Err(Refusal::new(RefusalCause::Bridge));
        }
        let will = self.will(connect, applicant.scope.as_deref())?;
        let version = connect.version;
        let asked = match version {
            Version::V5 => connect.session_expiry.unwrap_or(0),
            _ if connect.clean_start => 0,
            _ => whole_seconds(self.session.expiry_v3),
        };
        let expiry = asked.min(whole_seconds(self.session.expiry_max));
        let keep_alive = self.keep_alive(connect, applicant.keep_alive_max);
        // 0 as in the protocol: none.
        let keep_alive_seconds = keep_alive.map_or(0, NonZeroU16::get);
        // Room for the bytes that are added to each publish.
        let packet_max = self.router.packet_max();
        let packet_max = packet_max.saturating_sub(applicant.added_bytes);
        let packet_max = packet_max.max(PACKET_MAX_MIN_BYTES);
        let maximum_qos = self.router.maximum_qos();
        let client_id = applicant.client_id;
        let mount = applicant.scope.as_deref().map_or("", |s| &s.mount);
        let connack = Connack {
            session_present: false,
            reason: ReasonCode::SUCCESS,
            session_expiry: (version == Version::V5 && expiry != asked).then_some(expiry),
            receive_maximum: Some(self.limits.receive_max),
            maximum_qos: (maximum_qos < QoS::ExactlyOnce).then_some(maximum_qos),
            retain_available: (!self.router.retain_available()).then_some(false),
            maximum_packet_size: Some(packet_max),
            assigned_client_id: connect.client_id.is_empty().then_some(&*client_id),
            topic_alias_maximum: Some(self.limits.topic_alias_max),
            shared_subscription_available: (!self.router.shares()).then_some(false),
            server_keep_alive: (keep_alive_seconds != connect.keep_alive)
                .then_some(keep_alive_seconds),
            ..Connack::default()
        };
        let key = SessionKey::new(&client_id, mount);
        let handle = Arc::new(ConnectionHandle::new(applicant.ping_after));
        let scope = applicant.scope.clone();
        let request = router::Connect {
            key,
            anonymous: *applicant.owner == *ANONYMOUS,
            principal: applicant.owner,
            clean_start: connect.clean_start,
            expiry,
            spec: ConnectionSpec {
                version,
                bridge: connect.bridge,
                receive_maximum: connect.receive_maximum.unwrap_or(u16::MAX),
                maximum_packet_size: connect.maximum_packet_size,
                topic_alias_maximum: connect.topic_alias_maximum,
                keep_alive,
                scope: applicant.scope,
            },
            will,
            handle: handle.clone(),
            peer: applicant.peer,
        };
        let connected = self.router.connect(request, self.now, |present, out| {
            let session_present = present;
            Connack {
                session_present,
                ..connack
            }
            .encode(version, out);
        });
        let connected = connected.map_err(|refused| {
            Refusal::new(match refused {
                Refused::Principal => RefusalCause::OtherPrincipal,
                Refused::Full(full) => RefusalCause::SessionMemory(full),
                Refused::NotKept(full) => RefusalCause::NewSession(full),
            })
        })?;
        let machine = Machine::new(&connected, handle, version, packet_max);
        if connected.present && self.policy.may_have_changed() {
            self.revoke_forbidden(machine.caller(), scope.as_deref());
        }
        Ok(Admitted {
            machine,
            present: connected.present,
            taken_over: connected.taken_over,
            expiry_seconds: expiry,
            keep_alive,
        })
    }

    /// Ends the subscriptions of a resumed session that its client would not be granted any more. They
    /// are judged without the lock of their session, because there may be many.
    fn revoke_forbidden(&self, caller: Caller, scope: Option<&Scope>) {
        let (session, connection_no) = (caller.session, caller.connection_no);
        let filters = self.router.with(session, connection_no, |session, _| {
            let all = session.subscriptions().iter();
            all.map(|s| s.name.clone()).collect::<Vec<_>>()
        });
        let mut forbidden = filters.unwrap_or_default();
        forbidden.retain(|whole| match scope {
            None => !self.policy.may_subscribe("", whole),
            Some(scope) => {
                let filter = scope.client_filter(whole);
                !self.policy.may_subscribe(&scope.mount, &filter)
            }
        });
        if forbidden.is_empty() {
            return;
        }
        let mut effects = Vec::new();
        self.router.feed(
            session,
            connection_no,
            &mut effects,
            |session, _, _, effects| {
                session.revoke(&forbidden, effects);
            },
        );
        self.router.apply(caller, effects, self.now);
    }

    /// The will, judged as the publish that it will be.
    fn will(&self, connect: &Connect<'_>, scope: Option<&Scope>) -> Result<Option<Will>, Refusal> {
        let Some(will) = &connect.will else {
            return Ok(None);
        };
        let policy = self.policy;
        let (mount, sender) = scope.map_or(("", &[][..]), |s| (&*s.mount, &*s.sender));
        if is_bridge_state(will.topic) && !policy.may_publish(mount, will.topic) {
            metrics().messages_dropped[DropReason::Acl].increment(1);
            return Ok(None);
        }
        if will.qos > policy.maximum_qos() {
            return Err(Refusal::new(RefusalCause::WillQos));
        }
        if will.retain && !policy.retain_available() {
            return Err(Refusal::new(RefusalCause::WillRetain));
        }
        let limits = self.router.limits();
        if !limits.allows_levels(mount, will.topic) {
            return Err(Refusal::new(RefusalCause::WillTopicLevels));
        }
        if !policy.may_publish(mount, will.topic) {
            return Err(Refusal::new(RefusalCause::WillForbidden));
        }
        let response_topic = will.properties.iter().find_map(|property| match property {
            Property::ResponseTopic(topic) => Some(topic),
            _ => None,
        });
        let response_topic = keep_response_topic(response_topic, mount, limits, policy)
            .map_err(|code| Refusal::new(RefusalCause::WillResponseTopic(code)))?;
        if mount.len() + will.topic.len() > usize::from(u16::MAX) {
            return Err(Refusal::new(RefusalCause::WillTopicBytes));
        }
        let spec = MessageSpec {
            topic: will.topic,
            properties: will.properties,
            payload: will.payload,
            qos: will.qos,
            retain: will.retain,
            // The expiry counts from the will's publication; see the session.
            expires_at: None,
            strip_key: Some(limits.reserved_key),
            account: None,
        };
        let mounting = Mounting {
            mount,
            sender,
            response_topic,
        };
        let message = Message::mounted(&spec, &mounting);
        Ok(Some(Will::new(message, will.delay, will.message_expiry)))
    }

    /// The Keep Alive in force, in seconds: the client's, or ours where it may be overridden
    /// [MQTT-3.1.2-21].
    fn keep_alive(
        &self,
        connect: &Connect<'_>,
        transport_max: Option<Duration>,
    ) -> Option<NonZeroU16> {
        let asked = NonZeroU16::new(connect.keep_alive);
        if connect.version < Version::V5 {
            return asked;
        }
        let seconds = |limit: Option<Duration>| NonZeroU16::new(limit?.as_secs() as u16);
        let limits = [seconds(self.session.keepalive_max), seconds(transport_max)];
        let max = limits.into_iter().flatten().min();
        let granted = asked
            .or_else(|| seconds(self.session.keepalive_default))
            .or(max)?;
        Some(max.map_or(granted, |max| granted.min(max)))
    }
}

fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::testing;

    /// The Keep Alive in force after a CONNECT that asks for `asked` seconds.
    fn granted(version: Version, asked: u16, session: &config::Session, max: Option<u64>) -> u16 {
        let admission = Admission {
            router: &testing::router(),
            policy: &testing::Open,
            session,
            limits: &config::Limits::default(),
            now: Millis::ZERO,
        };
        let connect = Connect {
            version,
            keep_alive: asked,
            ..Connect::default()
        };
        let max = max.map(Duration::from_secs);
        let granted = admission.keep_alive(&connect, max);
        granted.map_or(0, NonZeroU16::get)
    }

    #[test]
    fn mqtt_5_clients_get_a_keep_alive_where_the_transport_ends_silent_connections() {
        let any = config::Session::default();
        for (asked, expected) in [(0, 600), (30, 30), (600, 600), (601, 600), (u16::MAX, 600)] {
            assert_eq!(granted(Version::V5, asked, &any, Some(600)), expected);
            assert_eq!(granted(Version::V5, asked, &any, None), asked);
            // They cannot be told.
            assert_eq!(granted(Version::V311, asked, &any, Some(600)), asked);
        }
        let own = config::Session {
            keepalive_max: Some(Duration::from_secs(300)),
            keepalive_default: Some(Duration::from_secs(60)),
            ..any
        };
        for (asked, expected) in [(0, 60), (30, 30), (600, 300)] {
            assert_eq!(granted(Version::V5, asked, &own, Some(600)), expected);
        }
        assert_eq!(granted(Version::V5, 0, &own, Some(50)), 50);
    }
}
