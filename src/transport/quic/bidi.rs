//! Both halves of one stream of a client, and the layer between QUIC and MQTT: none with ALPN `mqtt`;
//! WebTransport adds a few bytes at the beginning of a stream, and numbers the codes anew.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use quinn::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};
use web_transport_proto::{Frame, VarInt as Number, error_from_http3, error_to_http3};

use crate::transport::closed::PeerCode;

/// H3_REQUEST_REJECTED (RFC 9114 section 8.1): the answer to a stream that does not belong to the
/// session.
const REQUEST_REJECTED: VarInt = VarInt::from_u32(0x010b);
/// H3_NO_ERROR (RFC 9114 section 8.1).
pub(super) const NO_ERROR: VarInt = VarInt::from_u32(0x0100);

/// The layer between QUIC and MQTT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// None (ALPN `mqtt`).
    Plain,
    /// WebTransport over HTTP/3 (ALPN `h3`).
    WebTransport {
        /// The identifier of the request's stream, with which the session's streams begin.
        session: u64,
    },
}

impl Layer {
    /// The code on the wire for a code of ours, in RESET_STREAM, STOP_SENDING and CONNECTION_CLOSE.
    pub(super) fn code(self, ours: u32) -> VarInt {
        match self {
            Self::Plain => VarInt::from_u32(ours),
            // All of these codes are below 2^47.
            Self::WebTransport { .. } => {
                VarInt::from_u64(error_to_http3(ours)).unwrap_or(REQUEST_REJECTED)
            }
        }
    }

    /// Whether the code means an ordinary end.
    pub(super) fn is_normal(self, wire: VarInt) -> bool {
        match self {
            Self::Plain => wire == VarInt::from_u32(0),
            Self::WebTransport { .. } => wire == NO_ERROR || wire == self.code(0),
        }
    }

    /// The meaning of a code that the peer sent.
    pub(super) fn peer_code(self, wire: VarInt) -> PeerCode {
        match self {
            Self::Plain => PeerCode::Application(wire.into_inner()),
            Self::WebTransport { .. } => match error_from_http3(wire.into_inner()) {
                Some(code) => PeerCode::Application(code.into()),
                None => PeerCode::Http3(wire.into_inner()),
            },
        }
    }
}

/// Both halves of one stream of a client.
pub(super) struct Bidi {
    send: SendStream,
    recv: RecvStream,
    head: StreamHead,
}

impl Bidi {
    pub(super) fn new(send: SendStream, recv: RecvStream, layer: Layer) -> Self {
        let head = match layer {
            Layer::Plain => StreamHead::Read,
            Layer::WebTransport { session } => StreamHead::Missing(Prefix::of(session)),
        };
        Self { send, recv, head }
    }

    /// Reads into `buf`; 0 bytes are the end of the stream.
    ///
    /// # Errors
    /// `ClosedStream` also for a stream that does not belong to the session, which is aborted.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<Result<usize, ReadError>> {
        ready!(self.poll_head(cx))?;
        self.recv.poll_read(cx, buf)
    }

    /// Reads the bytes with which the layer begins a stream.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ReadError>> {
        while let StreamHead::Missing(prefix) = &mut self.head {
            let mut byte = [0];
            let done = match ready!(self.recv.poll_read(cx, &mut byte))? {
                0 => Err(()),
                _ => prefix.push(byte[0]),
            };
            match done {
                Ok(false) => {}
                Ok(true) => self.head = StreamHead::Read,
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

    /// Resolves when the peer has acknowledged everything, or reads no more (STOP_SENDING, with its
    /// code).
    pub(super) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<VarInt>, StoppedError>> + Send + Sync + use<> {
        self.send.stopped()
    }

    /// Sends FIN; resolves when the peer has acknowledged everything, or no longer can.
    pub(super) fn finish(&mut self) -> impl Future<Output = ()> + Send + Sync + use<> {
        // Fails only if the stream is finished or reset already.
        let _ = self.send.finish();
        let stopped = self.send.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// Ends both directions with `code`, which is the code on the wire.
    pub(super) fn abort(&mut self, code: VarInt) {
        // Each fails only if that direction has ended already.
        let _ = self.send.reset(code);
        let _ = self.recv.stop(code);
    }
}

enum StreamHead {
    Read,
    Missing(Prefix),
}

/// The beginning of a session's stream: its type and the session's identifier
/// (draft-ietf-webtrans-http3 section 4.2), as variable-length integers, which may be longer than
/// needed.
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

    /// Whether the prefix is complete; an error as soon as it is a different one.
    fn push(&mut self, byte: u8) -> Result<bool, ()> {
        // A varint has at most eight bytes, and is taken below when it is complete.
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
    fn the_prefix_of_a_stream_is_recognized() {
        assert_eq!(push(0, &[0x40, 0x41, 0]), Ok(true));
        assert_eq!(push(4, &[0x40, 0x41, 4]), Ok(true));
        assert_eq!(push(100, &[0x40, 0x41, 0x40, 100]), Ok(true));
        // The same numbers, longer than needed.
        let long = [0xc0, 0, 0, 0, 0, 0, 0, 0x41, 0xc0, 0, 0, 0, 0, 0, 0, 8];
        assert_eq!(push(8, &long), Ok(true));
        assert_eq!(push(8, &long[..15]), Ok(false));
        // HEADERS of another request; another session; another frame.
        assert_eq!(push(0, &[0x01]), Err(()));
        assert_eq!(push(0, &[0x40, 0x41, 4]), Err(()));
        assert_eq!(push(0, &[0x40, 0x42]), Err(()));
    }

    #[test]
    fn codes_are_mapped_into_the_range_of_http3() {
        let layer = Layer::WebTransport { session: 0 };
        // The draft's example values.
        assert_eq!(layer.code(0).into_inner(), 0x52e4_a40f_a8db);
        assert_eq!(layer.code(u32::MAX).into_inner(), 0x52e5_ac98_3162);
        for code in [0, 1, 0x1d, 0x1e, 0x8e, u32::MAX] {
            let text = layer.peer_code(layer.code(code)).to_string();
            assert_eq!(text, format!("code {code}"));
        }
        assert_eq!(layer.peer_code(NO_ERROR).to_string(), "HTTP/3 code 0x100");
        assert!(layer.is_normal(NO_ERROR) && layer.is_normal(layer.code(0)));
        assert!(!layer.is_normal(VarInt::from_u32(0)) && !layer.is_normal(layer.code(1)));
        assert_eq!(
            Layer::Plain.peer_code(VarInt::from_u32(7)).to_string(),
            "code 7"
        );
        assert!(Layer::Plain.is_normal(VarInt::from_u32(0)));
    }
}
