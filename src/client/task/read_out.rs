//! Reading out: every byte that has arrived is read before the connection is taken over, or ends because
//! it takes no more output. The client's DISCONNECT may be among the bytes.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{self, Poll, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use crate::client::end::End;
use crate::router::handle::Successors;
use crate::streams::StreamSet;
use crate::transport::Arrivals;

/// The most bytes that are read: more than a system keeps for a socket by default.
const BYTES_MAX: usize = 8 * 1024 * 1024;
/// The most bytes that are read from a client that does not read its own output, since the answers
/// wait in memory.
const UNREAD_BYTES_MAX: usize = 256 * 1024;
/// How often the runtime must have looked for events without a new byte, where the transport cannot
/// tell whether bytes have arrived: datagrams wake the library's socket, and that wakes its connection.
const QUIET_TURNS: u8 = 3;
/// When the runtime has certainly looked for events once more.
const TURN: Duration = Duration::from_millis(10);

/// The bytes that were read from a client although it does not read its own output. They count over all
/// CONNECTs that ask for the rest of its bytes, until it has taken its output.
#[derive(Debug, Default)]
pub(super) struct ReadPast(usize);

impl ReadPast {
    /// Notes bytes that were read; `unread` are the streams that would be left unread at other times.
    pub(super) fn has_read(&mut self, bytes: usize, unread: StreamSet) {
        self.0 = match unread.is_empty() {
            true => 0,
            false => self.0.saturating_add(bytes),
        };
    }

    /// Whether no more may be read while output of these streams waits.
    pub(super) fn is_enough(&self, unread: StreamSet) -> bool {
        !unread.is_empty() && self.0 >= UNREAD_BYTES_MAX
    }
}

/// A connection that is read out.
#[derive(Debug, Default)]
pub(super) struct ReadOut {
    /// They go on when this is dropped.
    successors: Successors,
    /// The connection ends with this when it is read out.
    end: Option<End>,
    /// Bytes that were read.
    bytes: usize,
    /// Turns of the runtime without a new byte.
    quiet_turns: u8,
    turn: Option<Pin<Box<Sleep>>>,
}

impl ReadOut {
    /// Adds CONNECTs that wait for the rest of the bytes.
    pub(super) fn begin(this: &mut Option<Box<Self>>, successors: Successors) {
        let this = this.get_or_insert_default();
        this.successors.append(successors);
        (this.quiet_turns, this.turn) = (0, None);
    }

    /// The connection takes no more output: it ends with `end` when it is read out.
    pub(super) fn before(this: &mut Option<Box<Self>>, end: End) {
        this.get_or_insert_default().end.get_or_insert(end);
    }

    /// Whether nothing more can be sent.
    pub(super) fn is_last(&self) -> bool {
        self.end.is_some()
    }

    /// Ends the connection if it was read out for its end.
    ///
    /// # Errors
    /// The connection's end.
    pub(super) fn finish(this: &mut Option<Box<Self>>) -> Result<(), End> {
        let end = this.take().and_then(|mut this| this.end.take());
        end.map_or(Ok(()), Err)
    }

    /// Notes bytes that were read. Returns whether that was enough.
    pub(super) fn has_read(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        (self.quiet_turns, self.turn) = (0, None);
        self.bytes >= BYTES_MAX
    }

    /// A read is pending. Ready: nothing more had arrived.
    pub(super) fn poll_quiet(
        &mut self,
        cx: &mut task::Context<'_>,
        arrivals: Arrivals,
    ) -> Poll<()> {
        match arrivals {
            Arrivals::None => return Poll::Ready(()),
            Arrivals::Some => return Poll::Pending,
            Arrivals::Unknown => {}
        }
        while self.quiet_turns < QUIET_TURNS {
            let turn = self.turn.get_or_insert_with(|| Box::pin(sleep(TURN)));
            ready!(turn.as_mut().poll(cx));
            self.turn = None;
            self.quiet_turns += 1;
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_takes_no_output_is_read_past_the_bound_once_however_often_it_connects_anew() {
        for unread in [StreamSet::ALL, StreamSet::DATA] {
            let mut past = ReadPast::default();
            for _ in 0..4 {
                assert!(!past.is_enough(unread));
                past.has_read(UNREAD_BYTES_MAX / 4, unread);
            }
            assert!(past.is_enough(unread));
            assert!(!past.is_enough(StreamSet::EMPTY), "it takes its output");
            past.has_read(1, StreamSet::EMPTY);
            assert!(!past.is_enough(unread));
        }
    }
}
