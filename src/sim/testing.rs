//! What the machines' tests share: a router, a core's view of the bytes, a client.

use std::sync::{Arc, LazyLock};

use crate::client::connect::{Admission, Applicant};
use crate::client::machine::{self, Machine};
use crate::mqtt::{
    self, Alias, Decoder, Delivery, Message, MessageSpec, Packet, Properties, QoS, ReasonCode,
    Receiver, SubscribeOptions, Version,
};
use crate::router::handle::ConnectionHandle;
use crate::router::{
    BrokerFeatures, ClientPublish, Connect, Connected, LinkSession, Peer, Router, RouterConfig,
};
use crate::session::{ConnectionSpec, Policy, QueueFull, SessionLimits, SubscribeRequest};
use crate::store::Memory;
use crate::time::Millis;

use crate::upstream::RESERVED_KEY;
use crate::upstream::link::machine::Handshake;

/// A router with one link of each kind, whose D link has come up.
pub fn router() -> Arc<Router> {
    let router = Arc::new(Router::new(limits(), config(), &Memory));
    router.set_broker_features(&facts(), 0);
    router.data_link_up(0, LinkSession::New, true, 0);
    router
}

/// Limits that nothing reaches.
fn limits() -> SessionLimits {
    SessionLimits {
        receive_max: 1000,
        topic_alias_max: 0,
        packet_max: 1024 * 1024,
        queue_messages_max: 1000,
        queue_bytes_max: 1024 * 1024,
        queue_age_max: None,
        shared_redeliver_after: 30_000,
        will_grace: 0,
        presence: false,
        queue_full: QueueFull::Oldest,
        queue_qos0: false,
        output_buffer: Arc::new((64 * 1024).into()),
        subscriptions_max: 100,
        filter_bytes_max: 64 * 1024,
        topic_levels_max: 32,
        v3_publishes_max: 1000,
        expiry_max: u32::MAX,
        publish_account: Arc::default(),
        reserved_key: RESERVED_KEY,
        hasher: Default::default(),
    }
}

/// One link of each kind.
pub fn config() -> RouterConfig {
    RouterConfig {
        data_links: 1,
        shared_links: 1,
        roots: Vec::new(),
        local_groups: false,
        publish_links: 1,
        publish_links_max: 1,
        presence_topic: String::new(),
        started_at: 0,
        linger: 600_000,
        linger_busy_min: 60_000,
        filters_lingering_max: 1000,
        subscribe_wait: 10_000,
        subscribe_accept: true,
        publishes_waiting: 64 * 1024 * 1024,
        publishes_waiting_per_client: 64 * 1024 * 1024,
        retained_cache: 1024 * 1024,
        retained_resync: true,
        queues: 64 * 1024 * 1024,
        output: 64 * 1024 * 1024,
        write_stall: 60_000,
        hash_seed: 1,
    }
}

/// A core that can do everything.
pub fn facts() -> BrokerFeatures {
    BrokerFeatures {
        identifiers: true,
        properties: true,
        keeps_retain: true,
        shared: true,
        replaces: true,
        maximum_qos: QoS::ExactlyOnce,
        retain_available: true,
        packet_max: None,
    }
}

/// A router of this make; the core is not heard of yet.
pub fn router_of(config: RouterConfig) -> Arc<Router> {
    Arc::new(Router::new(limits(), config, &Memory))
}

/// The topic of probes.
pub const PROBES: &str = "tidegate/probe";

/// A link has connected.
pub fn up(session_present: bool, receive_maximum: u16) -> Handshake {
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
        fetch_qos: QoS::ExactlyOnce,
        fetch_quiet: 100,
    }
}

/// A connected MQTT 5 client whose session ends with the connection.
pub fn client(router: &Router, id: &str) -> Connected {
    connect(router, id, Version::V5, None, true, 0)
}

/// A connected client of any version, whose session is kept, perhaps with a will.
pub fn kept_client_of(
    router: &Router,
    id: &str,
    version: Version,
    will: Option<crate::session::Will>,
    now: Millis,
) -> Connected {
    connect(router, id, version, will, false, now)
}

fn connect(
    router: &Router,
    id: &str,
    version: Version,
    will: Option<crate::session::Will>,
    clean: bool,
    now: Millis,
) -> Connected {
    let connect = Connect {
        client_id: id.into(),
        principal: "anonymous".into(),
        clean_start: clean,
        expiry: if clean { 0 } else { u32::MAX },
        spec: ConnectionSpec {
            version,
            receive_maximum: u16::MAX,
            maximum_packet_size: u32::MAX,
            topic_alias_maximum: 0,
            problem_information: true,
            keep_alive: 0,
            scope: None,
        },
        will,
        handle: Arc::new(ConnectionHandle::default()),
        peer: peer(),
    };
    router
        .connect(connect, now, |_, _| {})
        .expect("nobody else has the identifier")
}

fn peer() -> Arc<Peer> {
    Arc::new(Peer {
        listener: "test".into(),
        transport: "tcp",
        ping_after: None,
        address: ([127, 0, 0, 1], 1).into(),
    })
}

/// A client that may do everything.
struct Open;

impl Policy for Open {
    fn may_publish(&self, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str) -> bool {
        true
    }
}

static MACHINE_LIMITS: LazyLock<machine::Limits> = LazyLock::new(|| machine::Limits {
    input: Arc::default(),
    input_max_bytes: 64 * 1024 * 1024,
    packet_deadline: 10_000,
    write_stall: 60_000,
});

/// What a client's machine needs for one call; its client may do everything.
pub fn context(router: &Router, now: Millis) -> machine::Context<'_> {
    machine::Context {
        router,
        policy: &Open,
        limits: &MACHINE_LIMITS,
        now,
    }
}

/// The machine of a client that has sent this CONNECT.
pub fn admit(router: &Router, connect: &mqtt::Connect<'_>, now: Millis) -> Machine {
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
        peer: peer(),
    };
    let admitted = admission.admit(connect, applicant);
    admitted.expect("nothing speaks against it").machine
}

/// The machine of a connected client whose session is kept.
pub fn machine(router: &Router, id: &str, version: Version, now: Millis) -> Machine {
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
pub fn packet_of(router: &Router, client: Connected, bytes: &[u8], now: Millis) {
    let mut machine = Machine::new(&client, Arc::default(), Version::V5, u32::MAX, now);
    let reset = machine.received(&context(router, now), 0, bytes);
    assert!(reset.expect("it is legal").is_none());
    assert!(!machine.paused() && machine.deadline().is_none());
}

/// A PUBLISH as a client writes it, on the topic `t`; its payload is a number.
pub fn publish_packet(version: Version, packet_id: u16, number: u32, qos: QoS) -> Vec<u8> {
    let mut bytes = Vec::new();
    Delivery {
        version,
        dup: false,
        qos,
        retain: false,
        packet_id,
        alias: Alias::None,
        message_expiry: None,
        subscription_ids: &[],
        user_property: None,
        hidden: 0,
    }
    .encode(&numbered(number, qos), &mut bytes);
    bytes
}

fn numbered(number: u32, qos: QoS) -> Message {
    Message::new(&MessageSpec {
        topic: "t",
        properties: Properties::default(),
        payload: number.to_string().as_bytes(),
        qos,
        retain: false,
        expires_at: u64::MAX,
        strip_key: None,
        account: None,
    })
}

/// Hands a QoS 1 publish to the client's lane.
pub fn publish(router: &Router, client: Connected, number: u32) {
    publish_at(router, client, number, QoS::AtLeastOnce);
}

/// Hands a publish of this QoS to the client's lane.
pub fn publish_at(router: &Router, client: Connected, number: u32, qos: QoS) {
    let publish = ClientPublish {
        token: None,
        message: numbered(number, qos),
        origin_mark: None,
    };
    router.publish(client.session, client.publish_link, publish, 0);
}

/// Subscribes a client, without retained messages; the answer is the core's to give.
pub fn subscribe(router: &Router, client: Connected, filter: &str) {
    subscribe_handling(router, client, filter, 2);
}

/// Subscribes a client with this Retain Handling.
pub fn subscribe_handling(router: &Router, client: Connected, filter: &str, retain_handling: u8) {
    let wanted = SubscribeRequest {
        index: 0,
        filter: filter.into(),
        options: SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling,
        },
    };
    router.subscribe(client.session, client.connection_no, 1, None, &[wanted], 0);
}

/// What the core reads: a word for each packet, and the packet identifier.
pub fn read(out: &mut Vec<u8>) -> Vec<(String, u16)> {
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
pub fn ack(packet_id: u16) -> crate::mqtt::Ack<'static> {
    crate::mqtt::Ack {
        packet_id,
        reason: ReasonCode::SUCCESS,
        properties: Properties::default(),
    }
}
