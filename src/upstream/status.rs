//! The state of each link, for logs, metrics and the admin API.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::telemetry::{LinkMetrics, metrics};

use crate::upstream::role::Role;

/// One link's status.
#[derive(Debug)]
pub(crate) struct LinkStatus {
    /// The link's name: the role's letter and the number.
    pub name: String,
    /// The link's role.
    pub role: Role,
    /// The link's number among the links of its role.
    pub number: usize,
    /// CONNECT packets sent.
    pub connects: AtomicU64,
    state: Mutex<LinkState>,
    /// Set at the first dial, so that a link that is not needed yet does not count as down.
    metrics: OnceLock<LinkMetrics>,
}

/// The part of a link's status that changes together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    /// The link is connected: CONNACK has arrived.
    pub up: bool,
    /// The server that was tried last.
    pub server: String,
    /// The protocol version of the last connection: `5` or `3.1.1`.
    pub protocol: Option<&'static str>,
    /// The broker's Receive Maximum.
    pub window: usize,
    /// Publishes without an acknowledgement.
    pub in_flight: usize,
    /// The age of the messages that the link brings.
    pub lag: Option<Duration>,
    /// Why the last connection ended or failed.
    pub last_error: Option<String>,
}

impl LinkStatus {
    /// The status of a link that has not been dialled.
    pub(super) fn new(role: Role, number: usize) -> Self {
        Self {
            name: role.link_name(number),
            role,
            number,
            connects: AtomicU64::new(0),
            state: Mutex::default(),
            metrics: OnceLock::new(),
        }
    }

    pub(super) fn metrics(&self) -> &LinkMetrics {
        let brings_messages = self.role.has_filters();
        self.metrics
            .get_or_init(|| metrics().link(&self.name, brings_messages))
    }

    /// Whether the link has ever been dialled.
    pub(crate) fn wanted(&self) -> bool {
        self.metrics.get().is_some()
    }

    /// A copy of the present state.
    pub(crate) fn state(&self) -> LinkState {
        self.state.lock().clone()
    }

    /// Notes that the link is about to be dialled for the first time.
    pub(super) fn starts(&self) {
        self.metrics().up.set(0.0);
    }

    /// Notes a connection that speaks this protocol version. Returns the server's address.
    pub(super) fn connected(&self, protocol: &'static str) -> String {
        self.metrics().up.set(1.0);
        let mut state = self.state.lock();
        state.up = true;
        state.protocol = Some(protocol);
        state.last_error = None;
        state.server.clone()
    }

    /// Notes the end of a connection.
    pub(super) fn disconnected(&self) {
        self.state.lock().up = false;
        self.metrics().up.set(0.0);
        self.set_window(0, 0);
    }

    /// Notes why the last connection ended or failed.
    pub(super) fn set_last_error(&self, error: String) {
        self.state.lock().last_error = Some(error);
    }

    /// Notes how many publishes wait for an acknowledgement, and how many may.
    pub(super) fn set_window(&self, in_flight: usize, window: usize) {
        let mut state = self.state.lock();
        if (state.in_flight, state.window) != (in_flight, window) {
            state.in_flight = in_flight;
            state.window = window;
            drop(state);
            self.metrics().window_used.set(in_flight as f64);
            self.metrics().window.set(window as f64);
        }
    }

    /// Notes the age of the messages that the link brings.
    pub(super) fn set_lag(&self, lag: Duration) {
        let mut state = self.state.lock();
        if state.lag != Some(lag) {
            state.lag = Some(lag);
            drop(state);
            if let Some(gauge) = &self.metrics().lag {
                gauge.set(lag.as_secs_f64());
            }
        }
    }

    /// Counts a CONNECT sent to `server`.
    pub(super) fn count_connect(&self, server: &str) {
        self.connects.fetch_add(1, Ordering::Relaxed);
        self.metrics().connects.increment(1);
        self.state.lock().server = server.to_owned();
    }
}
