//! Writes log lines in a thread of its own, so that a task that logs never waits for the reader of
//! the log, and never fails because of it.
//!
//! Lines wait in a buffer that is bounded in bytes. A line that finds no room is dropped and
//! counted, and so are the lines that the sink does not take. `tracing-appender` is not used: it
//! bounds lines instead of bytes, and does not count the lines that the sink refuses.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::MakeWriter;

use crate::telemetry::{LogDropReason, metrics};

/// Bytes of lines that wait while the sink takes none: thousands of lines.
pub(super) const BUFFER_MAX_BYTES: usize = 1024 * 1024;
/// Memory that an empty buffer keeps, bytes.
const BUFFER_KEPT_BYTES: usize = 64 * 1024;
/// The wait before another attempt where the sink is non-blocking and full.
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// A handle on the thread that writes log lines.
#[derive(Clone, Debug)]
pub(super) struct LogWriter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified when lines have arrived, and when all lines are written.
    changed: Condvar,
    buffer_max_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Whole lines that the thread has not taken.
    buffer: Vec<u8>,
    /// The thread is writing lines that it has taken.
    writing: bool,
    /// Lines that were dropped since the last line that the sink took.
    dropped: u64,
}

impl State {
    fn is_idle(&self) -> bool {
        self.buffer.is_empty() && !self.writing
    }
}

impl LogWriter {
    /// Starts the thread, which writes to `sink` until the process ends. At most `buffer_max_bytes`
    /// wait for it.
    ///
    /// # Errors
    /// The system has no room for another thread.
    pub(super) fn start(
        sink: impl Write + Send + 'static,
        buffer_max_bytes: usize,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            buffer_max_bytes,
        });
        let thread = std::thread::Builder::new().name("tidegate-log".to_owned());
        thread.spawn({
            let shared = shared.clone();
            move || write_lines(&shared, sink)
        })?;
        Ok(Self { shared })
    }

    /// Queues whole lines, or drops and counts them where the buffer has no room.
    pub(super) fn push(&self, lines: &[u8]) {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        if state.buffer.len() + lines.len() > shared.buffer_max_bytes {
            let dropped = count_lines(lines);
            state.dropped += dropped;
            drop(state);
            metrics().log_lines_dropped[LogDropReason::BufferFull].increment(dropped);
            return;
        }
        let was_empty = state.buffer.is_empty();
        state.buffer.extend_from_slice(lines);
        drop(state);
        if was_empty {
            shared.changed.notify_all();
        }
    }

    /// Waits until all queued lines are written, for at most `patience`. Returns whether they are.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let mut state = self.shared.state.lock();
        let waiting = |state: &mut State| !state.is_idle();
        let waited = self
            .shared
            .changed
            .wait_while_for(&mut state, waiting, patience);
        !waited.timed_out()
    }
}

/// Gives the sink everything that is queued, for ever.
fn write_lines(shared: &Shared, mut sink: impl Write) {
    let mut lines = Vec::new();
    loop {
        {
            let mut state = shared.state.lock();
            state.writing = false;
            if state.buffer.is_empty() {
                shared.changed.notify_all();
            }
            while state.buffer.is_empty() {
                shared.changed.wait(&mut state);
            }
            std::mem::swap(&mut state.buffer, &mut lines);
            state.writing = true;
        }
        let refused = write_all(&mut sink, &lines);
        if refused > 0 {
            metrics().log_lines_dropped[LogDropReason::WriteFailed].increment(refused);
        }
        let dropped = {
            let mut state = shared.state.lock();
            state.dropped += refused;
            match refused {
                0 => std::mem::take(&mut state.dropped),
                _ => 0,
            }
        };
        if dropped > 0 {
            tracing::warn!(
                dropped,
                "Log lines were dropped: their reader was too slow, or away"
            );
        }
        lines.clear();
        lines.shrink_to(BUFFER_KEPT_BYTES);
    }
}

/// Writes lines, and returns the number of lines that the sink did not take.
fn write_all(sink: &mut impl Write, mut lines: &[u8]) -> u64 {
    while !lines.is_empty() {
        match sink.write(lines) {
            Ok(0) => return count_lines(lines),
            Ok(written) => lines = &lines[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process may have made the file that it shares with this one non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_to_retry(),
            Err(_) => return count_lines(lines),
        }
    }
    0
}

#[expect(
    clippy::disallowed_methods,
    reason = "the thread of the log is not one of the runtime's"
)]
fn wait_to_retry() {
    std::thread::sleep(RETRY_AFTER);
}

fn count_lines(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The subscriber writes each event with one call.
impl Write for LogWriter {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.push(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A sink that announces each write and takes it when the test says how much of it.
    struct Gated {
        offered: SyncSender<Vec<u8>>,
        answers: Receiver<io::Result<usize>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.offered.send(bytes.to_vec()).expect("the test waits");
            let answer = self.answers.recv().expect("the test answers");
            answer.map(|n| n.min(bytes.len()))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated(max: usize) -> (LogWriter, Receiver<Vec<u8>>, SyncSender<io::Result<usize>>) {
        let (offered, offers) = sync_channel(0);
        let (answers, taken) = sync_channel(0);
        let sink = Gated {
            offered,
            answers: taken,
        };
        let writer = LogWriter::start(sink, max).expect("a thread");
        (writer, offers, answers)
    }

    #[test]
    fn a_sink_that_takes_nothing_blocks_nobody_and_the_buffer_is_bounded() {
        let (writer, offers, answers) = gated(10);
        writer.push(b"first\n");
        assert_eq!(offers.recv_timeout(PATIENCE).expect("offered"), b"first\n");
        // The thread is inside the write; ten bytes have room, the eleventh has none.
        writer.push(b"12345\n");
        writer.push(b"789\n");
        writer.push(b"x\n");
        assert_eq!(writer.shared.state.lock().dropped, 1);
        assert!(!writer.flush(Duration::from_millis(1)));
        answers.send(Ok(6)).expect("it waits");
        let rest = offers.recv_timeout(PATIENCE).expect("offered");
        assert_eq!(rest, b"12345\n789\n");
        answers.send(Ok(100)).expect("it waits");
        assert!(writer.flush(PATIENCE));
        assert_eq!(writer.shared.state.lock().dropped, 0);
    }

    #[test]
    fn a_part_that_is_refused_is_dropped_and_later_lines_are_written() {
        let (writer, offers, answers) = gated(100);
        writer.push(b"one\ntwo\n");
        assert_eq!(offers.recv_timeout(PATIENCE).expect("offered").len(), 8);
        answers.send(Ok(4)).expect("it waits");
        let rest = offers.recv_timeout(PATIENCE).expect("offered");
        assert_eq!(rest, b"two\n");
        answers
            .send(Err(io::ErrorKind::WouldBlock.into()))
            .expect("it waits");
        assert_eq!(offers.recv_timeout(PATIENCE).expect("offered"), rest);
        answers
            .send(Err(io::ErrorKind::BrokenPipe.into()))
            .expect("it waits");
        assert!(writer.flush(PATIENCE));
        assert_eq!(writer.shared.state.lock().dropped, 1);
        writer.push(b"three\n");
        assert_eq!(offers.recv_timeout(PATIENCE).expect("offered"), b"three\n");
        answers.send(Ok(100)).expect("it waits");
        assert!(writer.flush(PATIENCE));
        assert_eq!(writer.shared.state.lock().dropped, 0);
    }

    #[test]
    fn a_large_buffer_is_not_kept() {
        let (writer, offers, answers) = gated(BUFFER_MAX_BYTES);
        writer.push(&[b'\n'; BUFFER_MAX_BYTES]);
        offers.recv_timeout(PATIENCE).expect("offered");
        answers.send(Ok(BUFFER_MAX_BYTES)).expect("it waits");
        assert!(writer.flush(PATIENCE));
        for _ in 0..2 {
            writer.push(b"x\n");
            offers.recv_timeout(PATIENCE).expect("offered");
            answers.send(Ok(2)).expect("it waits");
            assert!(writer.flush(PATIENCE));
        }
        let kept = writer.shared.state.lock().buffer.capacity();
        assert!(kept <= BUFFER_KEPT_BYTES, "{kept}");
    }
}
