//! The thread that writes the log.

#![expect(
    clippy::disallowed_methods,
    reason = "the writer is a machine that is given the time, and this is its clock"
)]

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Log;
use super::disk::Disk;
use super::queue::Queue;
use super::writer::{Owner, Sizes, Step, Writer};
use crate::time::Millis;

/// The longest time for which the thread sleeps: claims are released without waking it.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// The thread that writes a log. When it ends, by [`stop`](Self::stop) or a panic, records are no longer
/// written, and waiting tasks go on. After a panic, the log is marked as stale.
#[derive(Debug)]
pub struct WriterThread {
    log: Log,
    thread: JoinHandle<()>,
}

impl WriterThread {
    /// Starts the thread. `report` is called after each step other than an idle one, with the time that
    /// the step took and the sizes of the log.
    ///
    /// # Errors
    /// The system's, if it has no thread.
    pub fn spawn<D: Disk + 'static>(
        writer: Writer<D>,
        mut owner: impl Owner + Send + 'static,
        mut report: impl FnMut(&Step, Duration, Sizes) + Send + 'static,
    ) -> io::Result<Self>
    where
        D::File: 'static,
    {
        let log = writer.log();
        let mut running = Running {
            queue: log.0.clone(),
            writer,
        };
        let thread = thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                let Running { queue, writer } = &mut running;
                let start = Instant::now();
                while !queue.is_stopped() {
                    let began = start.elapsed();
                    let now = Millis::ZERO + began;
                    let step = writer.step(&mut owner, now);
                    match step {
                        Step::Idle { until } => {
                            let longest =
                                until.map_or(SLEEP_MAX, |at| at.since(now).min(SLEEP_MAX));
                            queue.wait_for_work(longest);
                            // A producer has often more than one record.
                            thread::yield_now();
                        }
                        _ => report(&step, start.elapsed() - began, writer.sizes()),
                    }
                }
            })?;
        Ok(Self { log, thread })
    }

    /// Writes the records that wait, and ends the thread. Records that are appended from now on are not
    /// written, so busy producers do not delay the end. It waits for the disk, so it must not be called
    /// on a thread of the runtime.
    pub fn stop(self) {
        self.log.0.stop();
        // A panic has been logged, and the log has ended either way.
        let _ = self.thread.join();
    }
}

/// Ends the log when the thread ends.
struct Running<D: Disk> {
    queue: Arc<Queue>,
    writer: Writer<D>,
}

impl<D: Disk> Drop for Running<D> {
    fn drop(&mut self) {
        self.writer.end(thread::panicking());
    }
}
