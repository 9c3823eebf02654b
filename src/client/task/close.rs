//! How a connection ends: the rest of its output still reaches the client, then the reason.

use std::cell::RefCell;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::task::{self, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::time::timeout;

use crate::client::end::End;
use crate::client::machine::Remains;
use crate::client::task::{SCRATCH, Task};
use crate::client::{LOGGED_CHARS, connection_lines};
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::{RateLimited, clean, metrics};
use crate::transport::{CloseHow, Closed, Stream};

static ENDS: RateLimited = connection_lines();

/// How long a client is given to take the rest of its output.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// Reads that follow a DISCONNECT: bytes that arrived on data streams before it are not lost.
const LAST_READS_MAX: usize = 256;

/// Ends the connection, at the router and at the client. Its session has no connection afterwards,
/// whatever happens.
pub(super) async fn close(task: Task<'_>, end: End) {
    let (clients, caller) = (task.clients, task.machine.caller());
    let closing = AssertUnwindSafe(task.close(end)).catch_unwind();
    if closing.await.is_err() {
        let (session, connection_no) = (caller.session, caller.connection_no);
        let now = clients.clock.now();
        clients
            .router
            .disconnected(session, connection_no, false, now);
    }
}

impl Task<'_> {
    async fn close(mut self, mut end: End) {
        if let End::Transport(_) = end
            && let Err(earlier) = self.take_rest()
        {
            end = earlier;
        }
        if end.is_by_client() {
            poll_fn(|cx| {
                self.read_data_streams(cx);
                Poll::Ready(())
            })
            .await;
        }
        let Self {
            clients,
            mut socket,
            identity,
            peer,
            machine,
            read_out,
            read_past: _,
            now,
        } = self;
        let remains = machine.ended(&clients.router, &end, now);
        // CONNECTs that wait for this connection must not wait for its last output.
        drop(read_out);
        metrics().disconnects[end.label()].increment(1);
        if let Some(suppressed) = ENDS.permit(now) {
            tracing::info!(
                client_id = clean(&identity.client_id, LOGGED_CHARS),
                principal = clean(&identity.principal, LOGGED_CHARS),
                listener = &*peer.listener,
                transport = peer.transport,
                peer = %socket.current_peer().unwrap_or(peer.address),
                reason = %end.label(),
                code = end.code().0,
                session_ended = remains.session_ended,
                suppressed,
                "Connection ended: {end}"
            );
        }
        if !end.is_lost() || socket.owes_close() {
            let _ = timeout(CLOSE_WAIT, send_rest(&mut socket, remains, end.how())).await;
        }
    }

    /// Streams keep no order with each other: packets that arrived on data streams with or before
    /// the client's DISCONNECT still count.
    fn read_data_streams(&mut self, cx: &mut task::Context<'_>) {
        if !self.socket.has_data_streams() {
            return;
        }
        self.socket.pause_streams(StreamSet::EMPTY);
        let mut scratch = SCRATCH.with(RefCell::take);
        for _ in 0..LAST_READS_MAX {
            scratch.clear();
            match self.socket.poll_recv(cx, &mut scratch) {
                Poll::Ready(Ok(recv)) if !recv.stream.is_control() => {
                    let received = self.received(recv.stream, &scratch);
                    if received.and_then(|()| self.take_rest()).is_err() {
                        break;
                    }
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(Closed::StreamReset(number))) => {
                    self.on_machine(|machine, cx| machine.stream_ended(cx, number));
                }
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        SCRATCH.with(|s| s.replace(scratch));
    }
}

/// Sends the last output, and closes the transport.
async fn send_rest(socket: &mut Stream, mut remains: Remains, how: CloseHow) {
    let output = &mut remains.output;
    if !output.is_empty()
        && poll_fn(|cx| socket.poll_send(cx, StreamId::CONTROL, output))
            .await
            .is_err()
    {
        return;
    }
    // The data streams get what they take at once.
    poll_fn(|cx| {
        for (number, output) in &mut remains.streams {
            let _ = socket.poll_send(cx, *number, output);
        }
        Poll::Ready(())
    })
    .await;
    poll_fn(|cx| socket.poll_close(cx, how)).await;
}
