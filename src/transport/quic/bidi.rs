//! One stream of the client with both its halves, and what lies between
//! QUIC's streams and the streams: nothing for ALPN `mqtt`; in WebTransport a
//! few bytes at the beginning, and a numbering of the codes.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use quinn::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};
use web_transport_proto::{Frame, VarInt as Number, error_from_http3, error_to_http3};

/// H3_REQUEST_REJECTED (RFC 9114 section 8.1): the answer to a stream that is
/// none of the session's.
const REQUEST_REJECTED: VarInt = VarInt::from_u32(0x010b);
/// H3_NO_ERROR, by the same section.
pub(super) const NO_ERROR: VarInt = VarInt::from_u32(0x0100);

/// What lies between QUIC's streams and the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// Nothing (ALPN `mqtt`).
    Plain,
    /// WebTransport over HTTP/3 (ALPN `h3`).
    WebTransport {
        /// The number of the stream with the request; the session's streams
        /// begin with it.
        session: u64,
    },
}

impl Layer {
    /// The code on the wire for one of ours, in RESET_STREAM, STOP_SENDING and
    /// CONNECTION_CLOSE.
    pub(super) fn code(self, ours: u32) -> VarInt {
        match self {
            Self::Plain => VarInt::from_u32(ours),
            // All of these are below 2^47.
            Self::WebTransport { .. } => {
                VarInt::from_u64(error_to_http3(ours)).unwrap_or(REQUEST_REJECTED)
            }
        }
    }

    /// Whether the peer ended in peace.
    pub(super) fn is_normal(self, wire: VarInt) -> bool {
        match self {
            Self::Plain => wire == VarInt::from_u32(0),
            Self::WebTransport { .. } => wire == NO_ERROR || wire == self.code(0),
        }
    }

    /// A code of the peer's, for a log line.
    pub(super) fn shown(self, wire: VarInt) -> Code {
        match self {
            Self::Plain => Code::Ours(wire.into_inner()),
            Self::WebTransport { .. } => match error_from_http3(wire.into_inner()) {
                Some(code) => Code::Ours(code.into()),
                None => Code::Http3(wire.into_inner()),
            },
        }
    }
}

/// A code of the peer's.
pub(super) enum Code {
    /// Of the application.
    Ours(u64),
    /// Of HTTP/3 itself (RFC 9114 section 8.1).
    Http3(u64),
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(code) => write!(f, "code {code}"),
            Self::Http3(code) => write!(f, "HTTP/3 code {code:#x}"),
        }
    }
}

/// One stream of the client, both halves.
pub(super) struct Bidi {
    send: SendStream,
    recv: RecvStream,
    head: Head,
}

impl Bidi {
    pub(super) fn new(send: SendStream, recv: RecvStream, layer: Layer) -> Self {
        let head = match layer {
            Layer::Plain => Head::Read,
            Layer::WebTransport { session } => Head::Missing(Prefix::of(session)),
        };
        Self { send, recv, head }
    }

    /// Up to `buf` bytes; 0 is the end of the stream.
    ///
    /// # Errors
    /// `ClosedStream` also for one that is none of the session's; it is ended
    /// then.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<Result<usize, ReadError>> {
        ready!(self.poll_head(cx))?;
        self.recv.poll_read(cx, buf)
    }

    /// Reads what the layer has before the first byte.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ReadError>> {
        while let Head::Missing(prefix) = &mut self.head {
            let mut byte = [0];
            let done = match ready!(self.recv.poll_read(cx, &mut byte))? {
                0 => Err(()),
                _ => prefix.push(byte[0]),
            };
            match done {
                Ok(false) => {}
                Ok(true) => self.head = Head::Read,
                Err(()) => {
                    self.abort(REQUEST_REJECTED);
                    return Poll::Ready(Err(ReadError::ClosedStream));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, WriteError>> {
        Pin::new(&mut self.send).poll_write(cx, bytes)
    }

    /// Resolves when the peer has acknowledged all, or wants nothing more
    /// (STOP_SENDING, with its code).
    pub(super) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + Send + Sync + use<> {
        self.send.stopped()
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

enum Head {
    Read,
    Missing(Prefix),
}

/// The beginning of a session's stream: its type and the session's number
/// (draft-ietf-webtrans-http3 section 4.2), variable-length integers that need
/// not be in their shortest form.
struct Prefix {
    session: u64,
    bytes: [u8; 8],
    len: u8,
    typed: bool,
}

impl Prefix {
    const fn of(session: u64) -> Self {
        Self {
            session,
            bytes: [0; 8],
            len: 0,
            typed: false,
        }
    }

    /// Whether it is whole, and an error as soon as it is another one.
    fn push(&mut self, byte: u8) -> Result<bool, ()> {
        // A varint has eight bytes at most, and is taken below when it is whole.
        self.bytes[usize::from(self.len)] = byte;
        self.len += 1;
        let mut bytes = &self.bytes[..usize::from(self.len)];
        let Ok(number) = Number::decode(&mut bytes) else {
            return Ok(false);
        };
        let (expected, typed) = match self.typed {
            false => (Frame::WEBTRANSPORT.0.into_inner(), false),
            true => (self.session, true),
        };
        if number.into_inner() != expected {
            return Err(());
        }
        (self.len, self.typed) = (0, true);
        Ok(typed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(session: u64, bytes: &[u8]) -> Result<bool, ()> {
        let mut prefix = Prefix::of(session);
        let mut done = Ok(false);
        for byte in bytes {
            assert_eq!(done, Ok(false), "bytes behind the end");
            done = prefix.push(*byte);
        }
        done
    }

    #[test]
    fn the_beginning_of_a_stream() {
        assert_eq!(push(0, &[0x40, 0x41, 0]), Ok(true));
        assert_eq!(push(4, &[0x40, 0x41, 4]), Ok(true));
        assert_eq!(push(100, &[0x40, 0x41, 0x40, 100]), Ok(true));
        // Longer than needed, but the same numbers.
        let long = [0xc0, 0, 0, 0, 0, 0, 0, 0x41, 0xc0, 0, 0, 0, 0, 0, 0, 8];
        assert_eq!(push(8, &long), Ok(true));
        assert_eq!(push(8, &long[..15]), Ok(false));
        // HEADERS: a request of its own; another session; another frame.
        assert_eq!(push(0, &[0x01]), Err(()));
        assert_eq!(push(0, &[0x40, 0x41, 4]), Err(()));
        assert_eq!(push(0, &[0x40, 0x42]), Err(()));
    }

    #[test]
    fn codes_are_numbered_as_http3_wants_them() {
        let layer = Layer::WebTransport { session: 0 };
        // The draft's own figures: the range's first, and the gap at each 0x1f + 0x21.
        assert_eq!(layer.code(0).into_inner(), 0x52e4_a40f_a8db);
        assert_eq!(layer.code(u32::MAX).into_inner(), 0x52e5_ac98_3162);
        for code in [0, 1, 0x1d, 0x1e, 0x8e, u32::MAX] {
            let text = layer.shown(layer.code(code)).to_string();
            assert_eq!(text, format!("code {code}"));
        }
        assert_eq!(layer.shown(NO_ERROR).to_string(), "HTTP/3 code 0x100");
        assert!(layer.is_normal(NO_ERROR) && layer.is_normal(layer.code(0)));
        assert!(!layer.is_normal(VarInt::from_u32(0)) && !layer.is_normal(layer.code(1)));
        assert_eq!(
            Layer::Plain.shown(VarInt::from_u32(7)).to_string(),
            "code 7"
        );
        assert!(Layer::Plain.is_normal(VarInt::from_u32(0)));
    }
}
