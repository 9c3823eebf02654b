//! The parts of a WebTransport session besides its streams.

use std::task::{Context, Poll, ready};

use quinn::{ReadError, RecvStream, SendStream};

use crate::transport::closed::{Closed, ResetReason, Violation};
use crate::transport::quic::bidi::Layer;
use crate::transport::quic::capsules::{self, Capsules, Found};
use crate::transport::quic::close::{CloseCode, lost};
use crate::transport::tcp::with_scratch;

/// Streams of HTTP/3 that a client may have beside its control stream: QPACK's two, and one of a type
/// that is not known.
const HTTP_STREAMS_MAX: usize = 3;

/// A session that was accepted.
pub(super) struct Session {
    /// Taken when the session ends.
    send: Option<SendStream>,
    recv: RecvStream,
    capsules: Capsules,
    /// Found in the bytes behind the request.
    found: Found,
    http: HttpStreams,
}

/// The streams of HTTP/3, which ends the connection when one of them ends.
pub(super) struct HttpStreams {
    pub _ours: SendStream,
    pub _theirs: RecvStream,
    pub others: Vec<RecvStream>,
}

impl Session {
    /// `send` and `recv` are the stream of the request, and `rest` are the bytes behind it.
    pub(super) fn new(send: SendStream, recv: RecvStream, rest: &[u8], http: HttpStreams) -> Self {
        let mut capsules = Capsules::default();
        Self {
            send: Some(send),
            recv,
            found: capsules.feed(rest),
            capsules,
            http,
        }
    }

    /// Keeps a stream of HTTP/3 open. A client has two of QPACK's; more are dropped, which stops them.
    pub(super) fn keep(&mut self, stream: RecvStream) {
        if self.http.others.len() < HTTP_STREAMS_MAX {
            self.http.others.push(stream);
        }
    }

    /// Resolves when the peer has ended the session.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>, layer: Layer) -> Poll<Closed> {
        loop {
            match std::mem::replace(&mut self.found, Found::Nothing) {
                Found::Nothing => {}
                Found::Closed(0) => return Poll::Ready(Closed::Eof),
                Found::Closed(code) => {
                    return Poll::Ready(Closed::Reset(ResetReason::SessionClosed(code)));
                }
                Found::Broken(error) => {
                    return Poll::Ready(Closed::Violation(Violation::WebTransport(error)));
                }
            }
            let Self { recv, capsules, .. } = self;
            let read = with_scratch(|scratch| {
                recv.poll_read(cx, scratch)
                    .map_ok(|n| (n, capsules.feed(&scratch[..n])))
            });
            match ready!(read) {
                // Without a capsule it means the same as code 0.
                Ok((0, _)) => return Poll::Ready(Closed::Eof),
                Ok((_, found)) => self.found = found,
                Err(ReadError::ConnectionLost(error)) => {
                    return Poll::Ready(lost(&error, layer));
                }
                Err(ReadError::Reset(code)) => {
                    let code = layer.peer_code(code);
                    return Poll::Ready(Closed::Reset(ResetReason::SessionReset(code)));
                }
                Err(_) => return Poll::Ready(Closed::Reset(ResetReason::SessionGone)),
            }
        }
    }

    /// Ends the session with `code`; resolves when the peer has the code, or can no longer get it.
    pub(super) fn end(
        &mut self,
        code: CloseCode,
    ) -> impl Future<Output = ()> + Send + Sync + use<> {
        let send = self.send.take();
        async move {
            let Some(mut send) = send else {
                return;
            };
            let close = capsules::close(code.number());
            if send.write_all(&close).await.is_ok() {
                // Fails only if the client has stopped the stream, which ends the session.
                let _ = send.finish();
                let _ = send.stopped().await;
            }
        }
    }
}
