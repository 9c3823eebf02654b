//! One stream of the client with both its halves, and what lies between
//! QUIC's streams and the lanes: nothing.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};

/// What lies between QUIC's streams and the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// Nothing (ALPN `mqtt`).
    Plain,
}

impl Layer {
    /// The code on the wire for one of ours, in RESET_STREAM, STOP_SENDING and
    /// CONNECTION_CLOSE.
    pub(super) fn code(self, ours: u32) -> VarInt {
        match self {
            Self::Plain => VarInt::from_u32(ours),
        }
    }

    /// A code of the peer's, for a log line.
    pub(super) fn shown(self, wire: VarInt) -> impl fmt::Display {
        match self {
            Self::Plain => format!("code {wire}"),
        }
    }
}

/// One stream of the client, both halves.
pub(super) struct Bidi {
    send: SendStream,
    recv: RecvStream,
}

impl Bidi {
    pub(super) fn new(send: SendStream, recv: RecvStream, layer: Layer) -> Self {
        match layer {
            Layer::Plain => Self { send, recv },
        }
    }

    /// Up to `buf` bytes; 0 is the end of the stream.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<Result<usize, ReadError>> {
        self.recv.poll_read(cx, buf)
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, WriteError>> {
        Pin::new(&mut self.send).poll_write(cx, bytes)
    }

    /// FIN; resolves when the peer has acknowledged all, or cannot any more.
    pub(super) fn finish(&mut self) -> impl Future<Output = ()> + Send + Sync + use<> {
        // Fails only if it is finished or reset already.
        let _ = self.send.finish();
        let stopped = self.send.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// Ends both directions with `code` as it is on the wire.
    pub(super) fn abort(&mut self, code: VarInt) {
        // Both fail only if that direction has ended already.
        let _ = self.send.reset(code);
        let _ = self.recv.stop(code);
    }
}
