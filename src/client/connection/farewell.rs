//! How a connection ends: what is left for the client still reaches it, then why it ended.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::time::timeout;

use crate::mqtt::{ReasonCode, Version, encode_disconnect};
use crate::session::CloseReason;
use crate::telemetry::{DisconnectReason, clean, metrics};

use crate::client::connection::{Connection, End};

/// How long a client is given to take what is left for it.
const GOODBYE: Duration = Duration::from_secs(1);

impl Connection<'_> {
    /// Ends the connection, at the router and at the client.
    pub(super) async fn depart(mut self, end: End) {
        if matches!(
            end.label,
            DisconnectReason::Normal | DisconnectReason::NormalWithWill
        ) {
            poll_fn(|cx| {
                self.read_on(cx);
                Poll::Ready(())
            })
            .await;
        }
        self.take_rest(&end);
        let session_ended = self.clients.router.disconnected(
            self.session,
            self.connection_no,
            // A drain fires no wills.
            end.normal || end.label == DisconnectReason::Draining,
            self.clients.clock.now(),
        );
        metrics().disconnects[end.label].increment(1);
        tracing::info!(
            client_id = clean(&self.identity.client_id, 64),
            principal = clean(&self.identity.principal, 64),
            listener = &*self.place.listener,
            transport = self.place.transport,
            peer = %self.stream.peer_addr(),
            reason = %end.label,
            code = end.code.0,
            session_ended,
            "Connection ended: {}",
            end.why
        );
        let _ = timeout(GOODBYE, self.goodbye(&end)).await;
    }

    /// The session has another connection, or none: the wake says why.
    pub(super) fn replaced(&self) -> End {
        let reason = self.wake.closing();
        End::from_close(reason.unwrap_or(CloseReason::SessionEnded))
    }

    /// What the session wrote for this connection still goes out before its end is told.
    fn take_rest(&mut self, end: &End) {
        if matches!(end.label, DisconnectReason::Closed | DisconnectReason::Io) {
            return;
        }
        let mut rest = Vec::new();
        let now = self.clients.clock.now();
        let router = &self.clients.router;
        if let Some(side) = router.take_output(self.session, self.connection_no, &mut rest, now) {
            self.out.buf.append(&mut rest);
            self.give_lanes(side);
        }
    }

    /// What is left in the output, DISCONNECT where one is due, and the transport's own end.
    async fn goodbye(&mut self, end: &End) {
        if matches!(end.label, DisconnectReason::Closed | DisconnectReason::Io) {
            return;
        }
        if self.version == Version::V5 && end.code != ReasonCode::SUCCESS {
            encode_disconnect(self.version, end.code, None, None, &mut self.out.buf);
        }
        if !self.out.is_empty()
            && poll_fn(|cx| self.stream.poll_send(cx, 0, &mut self.out))
                .await
                .is_err()
        {
            return;
        }
        // What the data streams take at once.
        poll_fn(|cx| {
            for lane in &mut self.lanes {
                let _ = self.stream.poll_send(cx, lane.number, &mut lane.out);
            }
            Poll::Ready(())
        })
        .await;
        poll_fn(|cx| self.stream.poll_close(cx, end.how)).await;
    }
}
