//! The types with which a connection's bytes are passed to and from it.

use crate::streams::StreamId;

/// The result of one successful [`Stream::poll_recv`](crate::transport::Stream::poll_recv).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recv {
    /// The stream.
    pub stream: StreamId,
    /// How many bytes were appended; 0 only where `finished` is true.
    pub bytes: usize,
    /// The peer has ended its direction of this data stream in order. Answers can still be sent
    /// until [`Stream::finish_stream`](crate::transport::Stream::finish_stream); after that the
    /// number may be used again.
    pub finished: bool,
}

/// Bytes that wait to be sent on one stream.
#[derive(Debug, Default)]
pub struct OutBuf {
    /// The bytes; more may be appended at any time.
    pub buf: Vec<u8>,
    /// How many of them the transport has taken.
    pub at: usize,
}

/// A buffer with a larger capacity is freed once its bytes are written.
const KEPT_CAPACITY_BYTES: usize = 16 * 1024;

impl OutBuf {
    /// Whether the transport has taken everything.
    pub fn is_empty(&self) -> bool {
        self.at >= self.buf.len()
    }

    /// The bytes that the transport has not taken yet.
    pub fn rest(&self) -> &[u8] {
        self.buf.get(self.at..).unwrap_or_default()
    }

    /// Drops the written bytes, and the allocation if it is large.
    pub(crate) fn reset(&mut self) {
        self.at = 0;
        if self.buf.capacity() > KEPT_CAPACITY_BYTES {
            self.buf = Vec::new();
        } else {
            self.buf.clear();
        }
    }
}

/// Whether bytes or an end have arrived at the machine that were not received yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrivals {
    /// Everything was received.
    None,
    /// They have, and the task will be woken for them.
    Some,
    /// The transport cannot tell.
    Unknown,
}

/// Counters of a QUIC connection, from which the caller can tell whether the network carries
/// anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames sent that the peer has to acknowledge, retransmissions included.
    pub sent: u64,
    /// Acknowledgements received.
    pub acknowledged: u64,
}

/// How we end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseHow {
    /// An ordinary end: WebSocket 1000, QUIC application code 0.
    Normal,
    /// The peer broke the protocol: WebSocket 1002 (or the code of the violation that was found),
    /// QUIC application code 1.
    Protocol,
    /// The limit is reached: WebSocket 1013, QUIC application code 2.
    Overload,
    /// The process is shutting down: WebSocket 1001, QUIC application code 0.
    GoingAway,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_buffers_are_kept_and_large_ones_freed() {
        let mut out = OutBuf {
            buf: Vec::with_capacity(1024),
            at: 0,
        };
        out.buf.extend_from_slice(b"abc");
        out.at = 3;
        assert!(out.is_empty());
        out.reset();
        assert_eq!((out.buf.capacity(), out.at), (1024, 0));
        out.buf = vec![0; KEPT_CAPACITY_BYTES + 1];
        out.reset();
        assert_eq!(out.buf.capacity(), 0);
    }
}
