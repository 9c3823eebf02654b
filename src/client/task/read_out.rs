//! Reading out: every byte that has arrived is read before the connection is taken over, or ends because
//! it takes no more output. The client's DISCONNECT may be among the bytes.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{self, Poll, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use crate::client::end::End;
use crate::router::handle::Successors;
use crate::streams::{StreamId, StreamSet};
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

    /// Notes bytes that were read. Returns whether that was enough; `unread` are the streams that would
    /// be left unread at other times.
    pub(super) fn has_read(&mut self, bytes: usize, unread: StreamSet) -> bool {
        self.bytes += bytes;
        (self.quiet_turns, self.turn) = (0, None);
        let max = match unread.contains(StreamId::CONTROL) {
            true => UNREAD_BYTES_MAX,
            false => BYTES_MAX,
        };
        self.bytes >= max
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
