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
