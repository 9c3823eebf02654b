//! A router and its clients, for benches of the pure modules.

#![allow(dead_code, reason = "each bench uses a part")]

use std::num::NonZeroU8;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tidegate::client::connect::{Admission, Applicant};
use tidegate::client::machine::{Context, Limits, Machine};
use tidegate::config;
use tidegate::mqtt::{Connect, QoS, Version};
use tidegate::router::{BrokerFeatures, LinkSession, Peer, Router, RouterConfig};
use tidegate::session::{Policy, QueueFull, SLEEP_AFTER, SessionLimits};
use tidegate::store::Memory;
use tidegate::time::{Millis, UnixMillis};

/// A client may do everything.
pub(crate) struct Allowed;

impl Policy for Allowed {
    fn may_publish(&self, _: &str, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str, _: &str) -> bool {
        true
    }
}

static LIMITS: LazyLock<Limits> = LazyLock::new(|| Limits {
    input: Arc::default(),
    input_max_bytes: 1 << 30,
    packet_deadline: Duration::from_secs(10),
    write_stall: Duration::from_secs(60),
    turn_packets: NonZeroU8::MAX,
});

/// The context of one call of a machine.
pub(crate) fn context(router: &Router, now: Millis) -> Context<'_> {
    Context {
        router,
        policy: &Allowed,
        limits: &LIMITS,
        now,
    }
}

/// A client's machine, once it is admitted; its session is kept.
pub(crate) fn admit(router: &Router, client_id: &str) -> Machine {
    let admission = Admission {
        router,
        policy: &Allowed,
        session: &config::Session::default(),
        limits: &config::Limits::default(),
        now: Millis::ZERO,
    };
    let applicant = Applicant {
        client_id: client_id.into(),
        owner: "someone".into(),
        scope: None,
        added_bytes: 0,
        keep_alive_max: None,
        ping_after: None,
        peer: Arc::new(Peer {
            listener: "bench".into(),
            transport: "tcp",
            address: ([127, 0, 0, 1], 1).into(),
        }),
    };
    let connect = Connect {
        version: Version::V5,
        client_id,
        clean_start: false,
        session_expiry: Some(u32::MAX),
        ..Connect::default()
    };
    let admitted = admission.admit(&connect, applicant);
    assert!(admitted.is_ok());
    admitted.map_or_else(
        |_| unreachable!("it is admitted"),
        |admitted| admitted.machine,
    )
}

/// A router whose data link is up.
pub(crate) fn router() -> Arc<Router> {
    let mib = 1024 * 1024;
    let limits = SessionLimits {
        receive_max: 1000,
        receive_max_hard: 1000,
        topic_alias_max: 0,
        packet_max: 1024 * 1024,
        queue_messages_max: 1000,
        queue_bytes_max: 16 * mib,
        queue_age_max: None,
        sleep_after: SLEEP_AFTER,
        shared_redeliver_after: Duration::from_secs(30),
        will_grace: Duration::ZERO,
        presence: false,
        queue_full: QueueFull::Oldest,
        queue_qos0: false,
        output_buffer: Arc::new((64 * 1024).into()),
        subscriptions_max: 10_000,
        filter_bytes_max: mib,
        topic_levels_max: 100,
        v3_publishes_max: 1000,
        expiry_max: u32::MAX,
        publish_account: Arc::default(),
        reserved_key: "tidegate",
        hash_seed: tidegate::hashing::HashSeed::fixed(),
    };
    let config = RouterConfig {
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
        filters_lingering_max: 10_000,
        subscribe_wait: Duration::from_secs(10),
        subscribe_accept: true,
        publishes_waiting: 64 * mib as u64,
        publishes_waiting_per_client: 64 * mib,
        retained_cache: mib,
        retained_resync: true,
        sessions: 1 << 40,
        queues: 1 << 30,
        output: 64 * mib as u64,
        write_stall: Duration::from_secs(60),
        evict_after: None,
    };
    let router = Arc::new(Router::new(limits, config, &Memory));
    let features = BrokerFeatures {
        identifiers: true,
        properties: true,
        keeps_retain: true,
        shared: true,
        replaces: true,
        maximum_qos: QoS::ExactlyOnce,
        retain_available: true,
        packet_max: None,
    };
    router.set_broker_features(&features, Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}
