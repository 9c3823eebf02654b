//! The end of the process: no new clients, connected clients are told, and pending publishes are
//! answered, all within the grace period.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::Clients;
use crate::config::Durability;
use crate::session::CloseReason;
use crate::transport::{CloseHow, ConnectionCap, Drain};
use crate::upstream::Upstream;

use crate::runtime::error::StartError;

/// The signals that end the process.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals over; before that, they end the process at once.
    pub(super) fn new() -> Result<Self, StartError> {
        let failed = |e: std::io::Error| StartError::Internal(format!("signals: {e}"));
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    /// Runs the drain, unless another signal ends it at once.
    pub(super) async fn drain_unless_asked_again(&mut self, drain: impl Future<Output = ()>) {
        tokio::select! {
            () = drain => {}
            _ = self.terminate.recv() => tracing::warn!("SIGTERM again: the drain is cut short"),
            _ = self.interrupt.recv() => tracing::warn!("SIGINT again: the drain is cut short"),
        }
    }

    /// Waits for one of them.
    pub(super) async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = self.interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
    }
}

/// Everything that a drain ends.
pub(super) struct Running {
    pub durability: Durability,
    pub grace: Duration,
    pub clients: Arc<Clients>,
    pub upstream: Upstream,
    pub cap: Arc<ConnectionCap>,
    pub stop_accepting: CancellationToken,
    pub stop_links: CancellationToken,
    pub drains: Vec<Drain>,
    pub tasks: TaskTracker,
}

/// Pause between two looks at the state of a drain.
const STEP: Duration = Duration::from_millis(20);
/// Fewest clients that are told in one step. Telling all at once would send them to the other nodes
/// at once.
const TOLD_PER_STEP_MIN: usize = 200;

/// Ends everything within the grace period.
pub(super) async fn drain(running: Running) {
    let began = Instant::now();
    let deadline = began + running.grace;
    running.clients.drain();
    running.stop_accepting.cancel();
    let router = running.clients.router.clone();
    let totals = router.totals();
    tracing::info!(
        connections = running.cap.used(),
        sessions = totals.attached + totals.detached,
        grace_ms = running.grace.as_millis() as u64,
        "Draining: no new connections; clients are told"
    );
    // Half of the grace period is for telling clients, the rest for pending publishes.
    let steps = (running.grace / 2).as_millis() / STEP.as_millis();
    let per_step = TOLD_PER_STEP_MIN.max(running.cap.used() / (steps.max(1) as usize) + 1);
    while running.cap.used() > 0 && Instant::now() < deadline {
        router.close_some(CloseReason::ShuttingDown, per_step);
        sleep(STEP).await;
    }
    // Give unacknowledged publishes the rest of the grace period to be answered.
    while router.publishes_waiting() + running.upstream.in_flight() > 0 && Instant::now() < deadline
    {
        sleep(STEP).await;
    }
    for drain in &running.drains {
        drain.close(CloseHow::GoingAway);
    }
    running.stop_links.cancel();
    running.tasks.close();
    let last = deadline.max(Instant::now() + Duration::from_secs(2));
    if timeout_at(last, running.tasks.wait()).await.is_err() {
        tracing::warn!("Not all tasks ended within the grace period");
    }
    let totals = router.totals();
    tracing::info!(
        sessions = totals.attached + totals.detached,
        messages = totals.queue_messages,
        publishes = router.publishes_waiting(),
        took_ms = began.elapsed().as_millis() as u64,
        "{}",
        match running.durability {
            Durability::Memory =>
                "Drained: with store.durability = \"memory\" these sessions and messages end with the process",
            Durability::Disk =>
                "Drained: the sessions and their messages are kept on the disk, and publishes that wait for the broker end with the process",
        }
    );
}
