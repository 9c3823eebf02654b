//! Keeps the tasks running without which the process is of no use: links, listeners, timers.
//!
//! A task that ends by itself, or panics, is logged, counted and started again. While a task cannot
//! be kept running, the process is not healthy.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::backoff::{Backoff, worth_logging};
use crate::telemetry::{TaskKind, metrics};

/// A task that runs for this long works.
const STABLE: Duration = Duration::from_secs(10);
/// The waits before a task is started again.
const WAITS: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
/// A task that has ended this often, each time before [`STABLE`], cannot be kept running.
const ENDS_MAX: u64 = 5;

/// A future that a task boxes once for each of its runs.
pub(crate) type Run<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// The tasks that cannot be kept running now, by name.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failing: Mutex<BTreeSet<String>>,
}

impl Health {
    /// The names of the tasks that fail, in order. Empty: the process is healthy.
    pub(crate) fn failing(&self) -> Vec<String> {
        self.failing.lock().iter().cloned().collect()
    }

    fn set(&self, name: &str, fails: bool) {
        let mut failing = self.failing.lock();
        if fails {
            failing.insert(name.to_owned());
        } else {
            failing.remove(name);
        }
    }
}

/// Starts `run` again each time it ends, until `stop` is cancelled. `state` outlives the runs: a run
/// that panicked may have left it half changed. `name` is for the log and for [`Health`].
pub(crate) async fn keep_running<S>(
    kind: TaskKind,
    name: String,
    health: Arc<Health>,
    stop: CancellationToken,
    mut state: S,
    run: impl for<'a> Fn(&'a mut S) -> Run<'a>,
) {
    let mut waits = WAITS;
    loop {
        let ended = {
            let running = AssertUnwindSafe(async { run(&mut state).await }).catch_unwind();
            let mut running = pin!(running);
            match timeout(STABLE, &mut running).await {
                Ok(ended) => ended,
                Err(_) => {
                    waits.reset();
                    health.set(&name, false);
                    running.await
                }
            }
        };
        if stop.is_cancelled() {
            return;
        }
        let wait = waits.next_wait();
        metrics().tasks_ended[kind].increment(1);
        if worth_logging(waits.failures()) {
            tracing::error!(
                task = %kind,
                name,
                restarts = waits.failures(),
                wait_ms = wait.as_millis() as u64,
                "A task {} and is started again",
                match ended {
                    Ok(()) => "ended",
                    Err(_) => "panicked",
                }
            );
        }
        if waits.failures() >= ENDS_MAX {
            health.set(&name, true);
        }
        if stop.run_until_cancelled(sleep(wait)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(
        run: impl for<'a> Fn(&'a mut u32) -> Run<'a> + Send + 'static,
    ) -> (Arc<Health>, CancellationToken, impl Future<Output = ()>) {
        let (health, stop) = (Arc::<Health>::default(), CancellationToken::new());
        let name = "a timer".to_owned();
        let task = keep_running(TaskKind::Timer, name, health.clone(), stop.clone(), 0, run);
        (health, stop, task)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_or_returns_is_started_again_with_its_state() {
        let (health, stop, task) = start(|runs| {
            Box::pin(async {
                *runs += 1;
                match *runs {
                    1 => panic!("a test's panic"),
                    2 => {}
                    _ => std::future::pending().await,
                }
            })
        });
        let before = metrics().render();
        let stopped = async {
            sleep(Duration::from_secs(60)).await;
            assert!(health.failing().is_empty());
            stop.cancel();
        };
        let mut task = pin!(task);
        tokio::select! {
            () = &mut task => panic!("it ended before it was told to"),
            () = stopped => {}
        }
        assert_ne!(metrics().render(), before, "the ends are counted");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_at_once_each_time_makes_the_process_unhealthy_until_it_runs() {
        let (health, stop, task) = start(|runs| {
            Box::pin(async {
                *runs += 1;
                if *runs <= 8 {
                    panic!("a test's panic");
                }
                sleep(Duration::from_secs(3600)).await;
            })
        });
        let watched = async {
            sleep(Duration::from_millis(1400)).await;
            assert!(health.failing().is_empty(), "it has ended four times");
            sleep(Duration::from_millis(200)).await;
            assert_eq!(health.failing(), ["a timer"]);
            sleep(Duration::from_secs(60)).await;
            assert!(health.failing().is_empty(), "it runs");
            stop.cancel();
        };
        tokio::select! {
            () = task => panic!("it ended before it was told to"),
            () = watched => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_because_it_was_told_to_is_not_started_again() {
        let (health, stop, task) = start(|runs| {
            Box::pin(async {
                assert_eq!(*runs, 0, "started once");
                *runs += 1;
                sleep(Duration::from_secs(1)).await;
            })
        });
        stop.cancel();
        task.await;
        assert!(health.failing().is_empty());
    }
}
