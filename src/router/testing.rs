//! Helpers of the tests of the router and of everything above it: a router, and its clients.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{Message, MessageSpec, Properties, QoS, SubscribeOptions, Version};
use crate::outbuf::OutBuf;
use crate::router::handle::ConnectionHandle;
use crate::router::{
    BrokerFeatures, Caller, ClientPublish, Connect, Connected, LinkSession, Peer, Refused, Router,
    RouterConfig, SessionRef,
};
use crate::session::{
    ConnectionSpec, QueueFull, SLEEP_AFTER, SessionLimits, SubscribeRequest, Will,
};
use crate::store::Memory;
use crate::streams::StreamSet;
use crate::time::{Millis, UnixMillis};

/// A router with one link of each kind, whose data link has come up.
pub(crate) fn router() -> Arc<Router> {
    let router = Arc::new(Router::new(limits(), config(), &Memory));
    router.set_broker_features(&facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// Limits that nothing reaches.
fn limits() -> SessionLimits {
    SessionLimits {
        receive_max: 1000,
        receive_max_hard: 1000,
        topic_alias_max: 0,
        packet_max: 1024 * 1024,
        queue_messages_max: 1000,
        queue_bytes_max: 1024 * 1024,
        queue_age_max: None,
        sleep_after: SLEEP_AFTER,
        shared_redeliver_after: Duration::from_secs(30),
        will_grace: Duration::ZERO,
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
        reserved_key: "tidegate",
        hash_seed: crate::hashing::HashSeed::fixed(),
    }
}

/// One link of each kind.
pub(crate) fn config() -> RouterConfig {
    RouterConfig {
        data_links: 1,
        data_links_max: 1,
        data_link_filters: 2000,
        shared_links: 1,
        shared_links_max: 1,
        roots: Vec::new(),
        local_groups: false,
        publish_links: 1,
        publish_links_max: 1,
        presence_topic: None,
        started_at: UnixMillis::default(),
        linger: Duration::from_secs(600),
        linger_busy_min: Duration::from_secs(60),
        filters_lingering_max: 1000,
        subscribe_wait: Duration::from_secs(10),
        subscribe_accept: true,
        publishes_waiting: 64 * 1024 * 1024,
        publishes_waiting_per_client: 64 * 1024 * 1024,
        retained_cache: 1024 * 1024,
        retained_resync: true,
        sessions: 64 * 1024 * 1024,
        queues: 64 * 1024 * 1024,
        output: 64 * 1024 * 1024,
        write_stall: Duration::from_secs(60),
        evict_after: None,
    }
}

/// A broker that can do everything.
pub(crate) fn facts() -> BrokerFeatures {
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

/// A router with this configuration, which has not heard of the broker yet.
pub(crate) fn router_of(config: RouterConfig) -> Arc<Router> {
    Arc::new(Router::new(limits(), config, &Memory))
}

/// [`router_of`] with other limits of sessions.
pub(crate) fn router_limited(
    config: RouterConfig,
    change: impl FnOnce(&mut SessionLimits),
) -> Arc<Router> {
    let mut limits = limits();
    change(&mut limits);
    Arc::new(Router::new(limits, config, &Memory))
}

/// A connected MQTT 5 client whose session ends with the connection.
pub(crate) fn client(router: &Router, id: &str) -> Connected {
    connect(router, id, Version::V5, None, true, Millis::ZERO)
}

/// A connected client of any version, whose session is kept, perhaps with a will.
pub(crate) fn kept_client_of(
    router: &Router,
    id: &str,
    version: Version,
    will: Option<Will>,
    now: Millis,
) -> Connected {
    connect(router, id, version, will, false, now)
}

fn connect(
    router: &Router,
    id: &str,
    version: Version,
    will: Option<Will>,
    clean: bool,
    now: Millis,
) -> Connected {
    router
        .connect(request(id, version, will, clean), now, |_, _| {})
        .expect("nobody else has the identifier")
}

/// The CONNECT of an anonymous client.
fn request(id: &str, version: Version, will: Option<Will>, clean: bool) -> Connect {
    Connect {
        key: id.into(),
        principal: "anonymous".into(),
        anonymous: true,
        clean_start: clean,
        expiry: if clean { 0 } else { u32::MAX },
        spec: ConnectionSpec {
            version,
            bridge: false,
            receive_maximum: u16::MAX,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            keep_alive: None,
            scope: None,
        },
        will,
        handle: Arc::new(ConnectionHandle::default()),
        peer: peer(),
    }
}

/// Connects an MQTT 5 client whose session is kept, of this principal and from this address.
pub(crate) fn connect_from(
    router: &Router,
    id: &str,
    principal: Option<&str>,
    address: &str,
    will: Option<Will>,
) -> Result<Connected, Refused> {
    let connect = request_from(id, principal, address, will);
    router.connect(connect, Millis::ZERO, |_, _| {})
}

/// The CONNECT of [`connect_from`].
pub(crate) fn request_from(
    id: &str,
    principal: Option<&str>,
    address: &str,
    will: Option<Will>,
) -> Connect {
    let address: IpAddr = address.parse().expect("an address");
    Connect {
        principal: principal.unwrap_or("anonymous").into(),
        anonymous: principal.is_none(),
        peer: Arc::new(Peer {
            address: (address, 1).into(),
            ..Peer::clone(&peer())
        }),
        ..request(id, Version::V5, will, false)
    }
}

/// The far end of a TCP connection.
pub(crate) fn peer() -> Arc<Peer> {
    Arc::new(Peer {
        listener: "test".into(),
        transport: "tcp",
        address: ([127, 0, 0, 1], 1).into(),
    })
}

impl Router {
    /// Fills up the output of a connection with one stream, and takes it. `empty` is exchanged for the
    /// bytes. `None`: the connection is not the session's any more.
    pub(crate) fn take_output(
        &self,
        session: SessionRef,
        connection_no: u64,
        empty: &mut Vec<u8>,
        now: Millis,
    ) -> Option<()> {
        let mut output = OutBuf::from(std::mem::take(empty));
        let all = (StreamSet::ALL, (0, 0));
        self.take_streams(session, connection_no, all, &mut output, now)?;
        *empty = output.to_vec();
        Some(())
    }
}

/// A message on the topic `t` whose payload is a number.
pub(crate) fn numbered(number: u32, qos: QoS) -> Message {
    Message::new(&MessageSpec {
        topic: "t",
        properties: Properties::default(),
        payload: number.to_string().as_bytes(),
        qos,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

/// Hands a QoS 1 publish to the client's publish queue.
pub(crate) fn publish(router: &Router, client: Connected, number: u32) {
    publish_at(router, client, number, QoS::AtLeastOnce);
}

/// Hands a publish of this QoS to the client's publish queue.
pub(crate) fn publish_at(router: &Router, client: Connected, number: u32, qos: QoS) {
    let publish = ClientPublish {
        token: None,
        message: numbered(number, qos),
        origin_mark: None,
    };
    router.publish(client.session, client.publish_link, publish, Millis::ZERO);
}

/// Subscribes a client, without retained messages. The broker has yet to answer.
pub(crate) fn subscribe(router: &Router, client: Connected, filter: &str) {
    subscribe_handling(router, client, filter, 2);
}

/// Subscribes a client with this Retain Handling.
pub(crate) fn subscribe_handling(
    router: &Router,
    client: Connected,
    filter: &str,
    retain_handling: u8,
) {
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
    let caller = Caller {
        session: client.session,
        connection_no: client.connection_no,
        publish_link: client.publish_link,
    };
    router.subscribe(caller, 1, None, &[wanted], Millis::ZERO);
}
