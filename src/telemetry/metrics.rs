//! The metrics, as handles: each is registered once, and counting is then one atomic operation.
//!
//! Names follow the Prometheus conventions: base units, and `_total` on counters. Labels have a
//! bounded set of values, so no label holds a client identifier or a topic.

mod labels;

use std::sync::OnceLock;
use std::time::Duration;

use crate::qos::QoS;
use ::metrics::Recorder as _;
use ::metrics::{Counter, Gauge, Histogram, Key, KeyName, Label as KeyLabel, Level, Metadata};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

pub use labels::{
    AcceptErrorReason, DeferReason, DeniedAction, DisconnectReason, DropReason, HandshakeReason,
    Label, LinkDownReason, LogDropReason, MemoryAccount, RefusedReason, ReloadResult,
    SessionEndReason, SessionState, StreamReason, SubscribeRefusedReason, TaskKind,
    UpstreamTlsReason,
};

/// Upper bounds of the histograms' buckets, from a local hop to the point where a person gives up.
const BUCKETS_SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// How often [`upkeep`] empties the histograms' buffers.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// The metrics of the process, made at first use.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(Metrics::new)
}

/// Bounds the memory of histograms between scrapes. Runs until it is dropped.
pub async fn upkeep() {
    let mut every = tokio::time::interval(UPKEEP_EVERY);
    loop {
        every.tick().await;
        metrics().recorder.handle().run_upkeep();
    }
}

/// One metric with one bounded label, as a handle per value.
#[derive(Debug)]
pub struct Family<L: Label, H> {
    handles: Box<[H]>,
    label: std::marker::PhantomData<L>,
}

impl<L: Label, H> std::ops::Index<L> for Family<L, H> {
    type Output = H;
    fn index(&self, value: L) -> &H {
        &self.handles[value.index()]
    }
}

/// The handles of one listener.
#[derive(Clone, Debug)]
pub struct ListenerMetrics {
    /// Connections open now.
    pub connections_open: Gauge,
    /// Connections accepted.
    pub connections: Counter,
}

/// The handles of one link to the broker.
#[derive(Debug)]
pub struct LinkMetrics {
    /// 1 from CONNACK until the end of the link, else 0.
    pub up: Gauge,
    /// Unacknowledged publishes.
    pub window_used: Gauge,
    /// The broker's Receive Maximum.
    pub window: Gauge,
    /// The age of the messages that the link brings, in seconds; `None`: it brings none.
    pub lag: Option<Gauge>,
    /// CONNECTs sent.
    pub connects: Counter,
    /// Ends of the link, by reason.
    pub disconnects: Family<LinkDownReason, Counter>,
}

macro_rules! metrics {
    ($(
        $(#[doc = $help:literal])+
        $kind:ident $field:ident = $name:literal $( by $label:ty )? ;
    )+) => {
        /// The handles. The documentation of a field is the metric's help text.
        pub struct Metrics {
            recorder: PrometheusRecorder,
            rejected: Box<[OnceLock<Counter>; 256]>,
            broker_info: parking_lot::Mutex<Option<Gauge>>,
            $( $(#[doc = $help])+ pub $field: handle_type!($kind $($label)?), )+
        }

        impl Metrics {
            /// A set of its own, for tests; the process's is [`metrics()`].
            pub fn new() -> Self {
                let recorder = recorder();
                $( describe(&recorder, stringify!($kind), $name, concat!($($help),+)); )+
                let this = Self {
                    $( $field: handle!(&recorder, $kind, $name $(, $label)?), )+
                    rejected: Box::new([const { OnceLock::new() }; 256]),
                    broker_info: parking_lot::Mutex::new(None),
                    recorder,
                };
                this.describe_dynamic();
                this
            }
        }
    };
}

macro_rules! handle_type {
    (counter) => { Counter };
    (gauge) => { Gauge };
    (histogram) => { Histogram };
    (counter $label:ty) => { Family<$label, Counter> };
    (gauge $label:ty) => { Family<$label, Gauge> };
}

macro_rules! handle {
    ($recorder:expr, counter, $name:literal) => {
        counter($recorder, $name, Vec::new())
    };
    ($recorder:expr, gauge, $name:literal) => {
        gauge($recorder, $name, Vec::new())
    };
    ($recorder:expr, histogram, $name:literal) => {
        $recorder.register_histogram(&Key::from_static_name($name), &METADATA)
    };
    ($recorder:expr, counter, $name:literal, $label:ty) => {
        family($recorder, $name, &[], counter)
    };
    ($recorder:expr, gauge, $name:literal, $label:ty) => {
        family($recorder, $name, &[], gauge)
    };
}

metrics! {
    #[doc = "Connections that got no session, by reason."]
    counter connects_refused = "tidegate_connects_refused_total" by RefusedReason;
    #[doc = "Logins, publishes and subscriptions that were denied, by action."]
    counter denied = "tidegate_denied_total" by DeniedAction;
    #[doc = "Filters of SUBSCRIBEs that were refused without asking the broker, by reason."]
    counter subscribes_refused = "tidegate_subscribes_refused_total" by SubscribeRefusedReason;
    #[doc = "Connections with a session that ended, by reason."]
    counter disconnects = "tidegate_disconnects_total" by DisconnectReason;
    #[doc = "Sessions now, with and without a connection."]
    gauge sessions = "tidegate_sessions" by SessionState;
    #[doc = "Sessions ended, by reason."]
    counter sessions_ended = "tidegate_sessions_ended_total" by SessionEndReason;
    #[doc = "Reconnects that the broker did not notice: the session or its filters at the broker were still there."]
    counter flaps_absorbed = "tidegate_flaps_absorbed_total";
    #[doc = "Connects that took over a session with a live connection."]
    counter takeovers = "tidegate_takeovers_total";
    #[doc = "Application messages received from clients."]
    counter messages_received = "tidegate_messages_received_total" by QoS;
    #[doc = "Application messages sent to clients, redeliveries included."]
    counter messages_delivered = "tidegate_messages_delivered_total" by QoS;
    #[doc = "Bytes of MQTT packets received from clients."]
    counter bytes_received = "tidegate_bytes_received_total";
    #[doc = "Bytes of MQTT packets sent to clients."]
    counter bytes_sent = "tidegate_bytes_sent_total";
    #[doc = "Deliveries and publishes that were dropped, by reason."]
    counter messages_dropped = "tidegate_messages_dropped_total" by DropReason;
    #[doc = "Response Topics to which their client may not publish."]
    counter response_topics_denied = "tidegate_response_topics_denied_total";
    #[doc = "Publishes that had to wait, or were answered 0x97 (Quota exceeded), by reason."]
    counter publishes_deferred = "tidegate_publishes_deferred_total" by DeferReason;
    #[doc = "Bytes that are charged for sessions and filters: memory.sessions."]
    gauge session_bytes = "tidegate_session_bytes";
    #[doc = "Filters in the table, in use or lingering."]
    gauge filters = "tidegate_filters";
    #[doc = "1 while sessions cannot be written to the disk, else 0."]
    gauge durability_degraded = "tidegate_durability_degraded";
    #[doc = "Records of sessions written to the disk."]
    counter store_records = "tidegate_store_records_total";
    #[doc = "Seconds in which records that were written together reached the disk."]
    histogram store_commit_seconds = "tidegate_store_commit_seconds";
    #[doc = "Bytes of the log of sessions on the disk."]
    gauge store_bytes = "tidegate_store_bytes";
    #[doc = "Bytes of the log of sessions that a restart needs."]
    gauge store_living_bytes = "tidegate_store_living_bytes";
    #[doc = "Seconds that the start took to read the log of sessions and to begin its sessions."]
    gauge store_replay_seconds = "tidegate_store_replay_seconds";
    #[doc = "Damaged places of the log of sessions, found at the start."]
    counter store_damaged = "tidegate_store_damaged_total";
    #[doc = "Bytes of messages in the queues of all sessions, and of the tables that recognise their publishes."]
    gauge queue_bytes = "tidegate_queue_bytes";
    #[doc = "Bytes of output that wait for the clients' sockets, without shared parts of messages."]
    gauge output_bytes = "tidegate_output_bytes";
    #[doc = "Messages in the queues of all sessions."]
    gauge queue_messages = "tidegate_queue_messages";
    #[doc = "Bytes of publishes that wait for the broker."]
    gauge publishes_waiting_bytes = "tidegate_publishes_waiting_bytes";
    #[doc = "Publishes that wait for the broker."]
    gauge publishes_waiting = "tidegate_publishes_waiting";
    #[doc = "Messages of shared subscriptions given to another member, because the first one's session ended or was away for too long."]
    counter shared_redelivered = "tidegate_shared_redelivered_total";
    #[doc = "Bytes of the retained cache."]
    gauge retained_cache_bytes = "tidegate_retained_cache_bytes";
    #[doc = "Bytes of the messages of the embedded broker."]
    gauge embedded_broker_bytes = "tidegate_embedded_broker_bytes";
    #[doc = "Probes of the broker, each over a connection of its own."]
    counter upstream_probes = "tidegate_upstream_probes_total";
    #[doc = "Filters whose retained messages are being fetched or will be fetched."]
    gauge retained_fetches_pending = "tidegate_retained_fetches_pending";
    #[doc = "Fetches of retained messages from the broker."]
    counter retained_fetches = "tidegate_retained_fetches_total";
    #[doc = "Filters subscribed at the broker."]
    counter upstream_subscribes = "tidegate_upstream_subscribes_total";
    #[doc = "Filters unsubscribed at the broker."]
    counter upstream_unsubscribes = "tidegate_upstream_unsubscribes_total";
    #[doc = "Publishes sent to the broker."]
    counter upstream_publishes = "tidegate_upstream_publishes_total" by QoS;
    #[doc = "Publishes received from the broker."]
    counter upstream_received = "tidegate_upstream_received_total" by QoS;
    #[doc = "Periods in which messages of the broker may have been missed."]
    counter upstream_gaps = "tidegate_upstream_gaps_total";
    #[doc = "Publishes of the broker with a subscription identifier that belongs to no filter."]
    counter upstream_unknown_subscription_ids = "tidegate_upstream_unknown_subscription_ids_total";
    #[doc = "Publishes that the broker sent again after a reconnect, and that were not delivered a second time."]
    counter upstream_redeliveries_suppressed = "tidegate_upstream_redeliveries_suppressed_total";
    #[doc = "TLS failures toward the broker, by reason."]
    counter upstream_tls_errors = "tidegate_upstream_tls_errors_total" by UpstreamTlsReason;
    #[doc = "Errors when accepting connections, by reason."]
    counter accept_errors = "tidegate_accept_errors_total" by AcceptErrorReason;
    #[doc = "Connections that failed before their first MQTT packet, by reason."]
    counter handshakes_failed = "tidegate_handshakes_failed_total" by HandshakeReason;
    #[doc = "Reloads of certificates, keys, client authorities and revocation lists, by result."]
    counter tls_reloads = "tidegate_tls_reloads_total" by ReloadResult;
    #[doc = "QUIC connections that continued from another address."]
    counter quic_migrations = "tidegate_quic_migrations_total";
    #[doc = "QUIC clients that had to prove their address first, because many handshakes were under way."]
    counter quic_retries = "tidegate_quic_retries_total";
    #[doc = "Data streams that were reset while their connection continued, by reason."]
    counter quic_streams_reset = "tidegate_quic_streams_reset_total" by StreamReason;
    #[doc = "Health checks answered on ws and wss listeners."]
    counter health_checks = "tidegate_health_checks_total";
    #[doc = "Wills published."]
    counter wills_published = "tidegate_wills_published_total";
    #[doc = "Wills cancelled by a resumed session or a normal end."]
    counter wills_cancelled = "tidegate_wills_cancelled_total";
    #[doc = "Time from a client's publish to its acknowledgement, in seconds."]
    histogram publish_ack_seconds = "tidegate_publish_ack_seconds";
    #[doc = "Time from a delivery to the client's acknowledgement, in seconds."]
    histogram delivery_ack_seconds = "tidegate_delivery_ack_seconds";
    #[doc = "Time from accept to CONNACK, in seconds."]
    histogram connect_seconds = "tidegate_connect_seconds";
    #[doc = "Bytes that each memory account may hold."]
    gauge memory_budget_bytes = "tidegate_memory_budget_bytes" by MemoryAccount;
    #[doc = "Log lines that were not written, by reason."]
    counter log_lines_dropped = "tidegate_log_lines_dropped_total" by LogDropReason;
    #[doc = "Panics: faults of Tidegate itself."]
    counter panics = "tidegate_panics_total";
    #[doc = "Tasks that ended or panicked and were started again, by kind."]
    counter tasks_ended = "tidegate_tasks_ended_total" by TaskKind;
    #[doc = "User and system CPU time of the process, in whole seconds."]
    counter process_cpu_seconds = "process_cpu_seconds_total";
    #[doc = "Open file descriptors."]
    gauge process_open_fds = "process_open_fds";
    #[doc = "Limit on open file descriptors; 0: unlimited."]
    gauge process_max_fds = "process_max_fds";
    #[doc = "Start time of the process, in seconds since 1970."]
    gauge process_start_time_seconds = "process_start_time_seconds";
    #[doc = "Resident memory of the process, in bytes."]
    gauge process_resident_memory_bytes = "process_resident_memory_bytes";
    #[doc = "Virtual memory of the process, in bytes."]
    gauge process_virtual_memory_bytes = "process_virtual_memory_bytes";
}

const CONNECTIONS_OPEN: &str = "tidegate_connections_open";
const CONNECTIONS: &str = "tidegate_connections_total";
const LINK_UP: &str = "tidegate_upstream_link_up";
const WINDOW_USED: &str = "tidegate_upstream_window_used";
const WINDOW: &str = "tidegate_upstream_window";
const LAG: &str = "tidegate_upstream_lag_seconds";
const LINK_CONNECTS: &str = "tidegate_upstream_connects_total";
const LINK_DISCONNECTS: &str = "tidegate_upstream_disconnects_total";
const TLS_CERTIFICATE: &str = "tidegate_tls_certificate_expiry_timestamp_seconds";
const TLS_CRL: &str = "tidegate_tls_crl_expiry_timestamp_seconds";
const REJECTED: &str = "tidegate_packets_rejected_total";
const HEAP_BYTES: &str = "tidegate_heap_bytes";
const BUILD_INFO: &str = "tidegate_build_info";
const BROKER_INFO: &str = "tidegate_broker_info";

static HEAP: OnceLock<fn() -> usize> = OnceLock::new();

/// Shows `live`, the live heap in bytes, as a gauge, in builds whose allocator counts.
pub fn count_heap(live: fn() -> usize) {
    // There is one allocator, so a second call changes nothing.
    let _ = HEAP.set(live);
}

impl Metrics {
    /// The handles of a listener. Each call with the same name returns the same series.
    pub fn listener(&self, name: &str, transport: &'static str) -> ListenerMetrics {
        let labels = || {
            vec![
                KeyLabel::new("listener", name.to_owned()),
                KeyLabel::new("transport", transport),
            ]
        };
        ListenerMetrics {
            connections_open: gauge(&self.recorder, CONNECTIONS_OPEN, labels()),
            connections: counter(&self.recorder, CONNECTIONS, labels()),
        }
    }

    /// The handles of a link, which brings messages to clients or not. Each call with the same name returns
    /// the same series.
    pub fn link(&self, name: &str, brings_messages: bool) -> LinkMetrics {
        let link = [KeyLabel::new("link", name.to_owned())];
        LinkMetrics {
            lag: brings_messages.then(|| gauge(&self.recorder, LAG, link.to_vec())),
            up: gauge(&self.recorder, LINK_UP, link.to_vec()),
            window_used: gauge(&self.recorder, WINDOW_USED, link.to_vec()),
            window: gauge(&self.recorder, WINDOW, link.to_vec()),
            connects: counter(&self.recorder, LINK_CONNECTS, link.to_vec()),
            disconnects: family(&self.recorder, LINK_DISCONNECTS, &link, counter),
        }
    }

    /// Shows when the certificate of a `[[tls]]` and the first of its revocation lists expire, in
    /// seconds since 1970.
    pub fn tls_expiry(&self, name: &str, certificate: f64, crl: Option<f64>) {
        let labels = || vec![KeyLabel::new("tls", name.to_owned())];
        gauge(&self.recorder, TLS_CERTIFICATE, labels()).set(certificate);
        if let Some(crl) = crl {
            gauge(&self.recorder, TLS_CRL, labels()).set(crl);
        }
    }

    /// Shows the present broker profile as labels, and the one before it as past. The names and
    /// values must be bounded.
    pub fn broker_info<const N: usize>(&self, labels: [(&'static str, &'static str); N]) {
        let labels = labels.map(|(name, value)| KeyLabel::new(name, value));
        let now = gauge(&self.recorder, BROKER_INFO, labels.to_vec());
        let mut shown = self.broker_info.lock();
        if let Some(before) = shown.replace(now.clone()) {
            before.set(0.0);
        }
        now.set(1.0);
    }

    /// Counts a packet that was answered with an MQTT 5 reason code, or a packet of a 3.x client
    /// that would have been; `name` is the code's name in the specification.
    pub fn packet_rejected(&self, code: u8, name: &'static str) {
        self.rejected[usize::from(code)]
            .get_or_init(|| {
                let labels = vec![
                    KeyLabel::new("code", format!("0x{code:02x}")),
                    KeyLabel::from_static_parts("reason", name),
                ];
                counter(&self.recorder, REJECTED, labels)
            })
            .increment(1);
    }

    /// The Prometheus text exposition.
    pub fn render(&self) -> String {
        if let Some(heap) = HEAP.get() {
            gauge(&self.recorder, HEAP_BYTES, Vec::new()).set(heap() as f64);
        }
        self.read_process();
        self.recorder.handle().render()
    }

    fn read_process(&self) {
        let process = metrics_process::collector::collect();
        if let Some(seconds) = process.cpu_seconds_total {
            self.process_cpu_seconds.absolute(seconds as u64);
        }
        for (gauge, value) in [
            (&self.process_open_fds, process.open_fds),
            (&self.process_max_fds, process.max_fds),
            (&self.process_start_time_seconds, process.start_time_seconds),
            (
                &self.process_resident_memory_bytes,
                process.resident_memory_bytes,
            ),
            (
                &self.process_virtual_memory_bytes,
                process.virtual_memory_bytes,
            ),
        ] {
            if let Some(value) = value {
                gauge.set(value as f64);
            }
        }
    }

    fn describe_dynamic(&self) {
        let about = [
            ("gauge", CONNECTIONS_OPEN, "Client connections open now."),
            ("counter", CONNECTIONS, "Client connections accepted."),
            ("gauge", LINK_UP, "1 while the link to the broker is up."),
            (
                "gauge",
                WINDOW_USED,
                "Publishes that the broker has not acknowledged.",
            ),
            ("gauge", WINDOW, "The broker's Receive Maximum."),
            (
                "gauge",
                LAG,
                "Age of the messages that the link brings, in seconds.",
            ),
            (
                "counter",
                LINK_CONNECTS,
                "CONNECT packets sent to the broker.",
            ),
            (
                "counter",
                LINK_DISCONNECTS,
                "Ends of links to the broker, by reason.",
            ),
            (
                "counter",
                REJECTED,
                "Packets of clients that broke a rule or a limit.",
            ),
            (
                "gauge",
                TLS_CERTIFICATE,
                "Expiry of the certificate, in seconds since 1970.",
            ),
            (
                "gauge",
                TLS_CRL,
                "Expiry of the first revocation list to expire, in seconds since 1970.",
            ),
            ("gauge", BUILD_INFO, "1, with the version as label."),
            (
                "gauge",
                BROKER_INFO,
                "1 for the broker's present profile, as labels; 0 for earlier ones.",
            ),
        ];
        for (kind, name, help) in about {
            describe(&self.recorder, kind, name, help);
        }
        let version = KeyLabel::from_static_parts("version", env!("CARGO_PKG_VERSION"));
        gauge(&self.recorder, BUILD_INFO, vec![version]).set(1.0);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

static METADATA: Metadata<'static> = Metadata::new("tidegate", Level::INFO, None);

/// A recorder of our own instead of the global one: the handles work from their first use, in any
/// order of start, and each test has its own set.
fn recorder() -> PrometheusRecorder {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS_SECONDS)
        .expect("the bounds are not empty")
        .build_recorder()
}

fn describe(recorder: &PrometheusRecorder, kind: &str, name: &'static str, help: &'static str) {
    let (name, help) = (KeyName::from_const_str(name), help.trim().into());
    match kind {
        "counter" => recorder.describe_counter(name, None, help),
        "gauge" => recorder.describe_gauge(name, None, help),
        _ => recorder.describe_histogram(name, None, help),
    }
}

fn counter(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<KeyLabel>) -> Counter {
    recorder.register_counter(&Key::from_parts(name, labels), &METADATA)
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<KeyLabel>) -> Gauge {
    recorder.register_gauge(&Key::from_parts(name, labels), &METADATA)
}

fn family<L: Label, H>(
    recorder: &PrometheusRecorder,
    name: &'static str,
    fixed: &[KeyLabel],
    make: fn(&PrometheusRecorder, &'static str, Vec<KeyLabel>) -> H,
) -> Family<L, H> {
    let handles = L::ALL.iter().map(|value| {
        let mut labels = fixed.to_vec();
        labels.push(KeyLabel::from_static_parts(L::NAME, value.name()));
        make(recorder, name, labels)
    });
    Family {
        handles: handles.collect(),
        label: std::marker::PhantomData,
    }
}

#[cfg(test)]
mod tests;
