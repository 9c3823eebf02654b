//! The cost of messages, and of an UNSUBSCRIBE, for one client with many overlapping filters of 100 levels:
//! the broker sends a copy of each message for each filter.
//!
//! `cargo bench --bench overlaps`

#![allow(clippy::print_stdout, reason = "it prints figures")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

use std::num::NonZeroU8;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use tidegate::client::connect::{Admission, Applicant};
use tidegate::client::machine::{Context, Limits, Machine};
use tidegate::config;
use tidegate::mqtt::{
    Connect, Message, MessageSpec, Properties, QoS, ReasonCode, SubscribeOptions, Version,
    encode_subscribe, encode_unsubscribe,
};
use tidegate::router::{Arrived, BrokerFeatures, LinkSession, Peer, Router, RouterConfig};
use tidegate::session::{Policy, QueueFull, SessionLimits};
use tidegate::store::Memory;
use tidegate::streams::StreamId;
use tidegate::time::{Millis, UnixMillis};
use tidegate::topics::FilterId;

const LEVELS: usize = 100;
const MESSAGES: u32 = 10;

struct Allowed;

impl Policy for Allowed {
    fn may_publish(&self, _: &str, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str, _: &str) -> bool {
        true
    }
}

fn main() {
    println!("filters  a message, ms  UNSUBSCRIBE of all, ms");
    for filters in [125, 250, 500, 1000, 2000] {
        let router = router();
        let machine_limits = Limits {
            input: Arc::default(),
            input_max_bytes: 1 << 30,
            packet_deadline: Duration::from_secs(10),
            write_stall: Duration::from_secs(60),
            turn_packets: NonZeroU8::MAX,
        };
        let cx = Context {
            router: &router,
            policy: &Allowed,
            limits: &machine_limits,
            now: Millis::ZERO,
        };
        let mut machine = admit(&router);
        let names: Vec<String> = (0..filters).map(filter).collect();
        let ids = subscribe(&cx, &mut machine, &names);
        assert_eq!(ids.len(), filters);
        let began = Instant::now();
        for number in 0..MESSAGES {
            let mut batch: Vec<Arrived> = ids.iter().map(|id| arrived(*id, number)).collect();
            router.fan_out(&mut batch, Millis::ZERO);
        }
        let message = began.elapsed() / MESSAGES;
        let mut bytes = Vec::new();
        let all = names.iter().map(String::as_str);
        encode_unsubscribe(Version::V5, 1, all, &mut bytes);
        let began = Instant::now();
        assert!(machine.woken(cx.limits, Waker::noop()).is_ok());
        assert!(machine.received(&cx, StreamId::CONTROL, &bytes).is_ok());
        let unsubscribe = began.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        println!(
            "{filters:7}  {:13.3}  {:22.3}",
            ms(message),
            ms(unsubscribe)
        );
    }
}

/// A filter that matches the topic, another one for each number.
fn filter(number: usize) -> String {
    let level = |at: usize| match at >= 20 || number >> at & 1 == 0 {
        true => "a",
        false => "+",
    };
    (0..LEVELS).map(level).collect::<Vec<_>>().join("/")
}

fn arrived(filter: FilterId, number: u32) -> Arrived {
    Arrived {
        message: Message::new(&MessageSpec {
            topic: &["a"; LEVELS].join("/"),
            properties: Properties::default(),
            payload: &number.to_be_bytes(),
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        }),
        filters: [filter].as_slice().into(),
        link: 0,
        origin_mark: None,
        skipped: false,
    }
}

/// Subscribes to all filters, which the broker grants. Returns their numbers.
fn subscribe(cx: &Context<'_>, machine: &mut Machine, names: &[String]) -> Vec<FilterId> {
    let mut ids = Vec::new();
    for some in names.chunks(100) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: 2,
        };
        let filters = some.iter().map(|name| (name.as_str(), options));
        let mut bytes = Vec::new();
        encode_subscribe(Version::V5, 1, None, filters, &mut bytes);
        assert!(machine.woken(cx.limits, Waker::noop()).is_ok());
        assert!(machine.received(cx, StreamId::CONTROL, &bytes).is_ok());
        for wanted in cx.router.next_subscribes(0, 1000) {
            let code = ReasonCode(wanted.qos as u8);
            cx.router.suback(wanted.filter, code, cx.now);
            ids.push(wanted.filter);
        }
    }
    ids
}

fn admit(router: &Router) -> Machine {
    let admission = Admission {
        router,
        policy: &Allowed,
        session: &config::Session::default(),
        limits: &config::Limits::default(),
        now: Millis::ZERO,
    };
    let applicant = Applicant {
        client_id: "client".into(),
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
        client_id: "client",
        ..Connect::default()
    };
    let admitted = admission.admit(&connect, applicant);
    assert!(admitted.is_ok());
    admitted.map_or_else(
        |_| unreachable!("it is admitted"),
        |admitted| admitted.machine,
    )
}

fn router() -> Arc<Router> {
    let mib = 1024 * 1024;
    let limits = SessionLimits {
        receive_max: 1000,
        receive_max_hard: 1000,
        topic_alias_max: 0,
        packet_max: 1024 * 1024,
        queue_messages_max: 1000,
        queue_bytes_max: 16 * mib,
        queue_age_max: None,
        shared_redeliver_after: Duration::from_secs(30),
        will_grace: Duration::ZERO,
        presence: false,
        queue_full: QueueFull::Oldest,
        queue_qos0: false,
        output_buffer: Arc::new((64 * 1024).into()),
        subscriptions_max: 10_000,
        filter_bytes_max: mib,
        topic_levels_max: LEVELS,
        v3_publishes_max: 1000,
        expiry_max: u32::MAX,
        publish_account: Arc::default(),
        reserved_key: "tidegate",
        hash_seed: tidegate::hashing::HashSeed::fixed(),
    };
    let config = RouterConfig {
        data_links: 1,
        data_links_max: 1,
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
        sessions: 1 << 30,
        queues: 64 * mib as u64,
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
