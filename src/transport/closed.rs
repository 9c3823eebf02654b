//! Why a connection, or one of its streams, carries no more bytes.

use std::fmt;
use std::io;

use quinn::ConnectionError;

use crate::streams::StreamId;
use crate::transport::quic::capsules::CapsuleError;
use crate::transport::ws::frame::FrameError;

/// Why a connection, or one of its data streams, carries no more bytes. `Display` gives the reason
/// for a log line and contains no text that the peer chose.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The peer ended the byte stream in order. Whether MQTT was finished is for the caller to
    /// judge.
    #[error("closed by the peer")]
    Eof,
    /// The peer or the network broke the connection.
    #[error("connection lost: {0}")]
    Reset(ResetReason),
    /// The peer broke the rules of the transport.
    #[error("transport rules broken: {0}")]
    Violation(Violation),
    /// The peer reset more data streams than one connection may.
    #[error("more data streams were reset than one connection can have")]
    TooManyResets,
    /// A WebSocket message is larger than the limit that holds now.
    #[error("message larger than the limit")]
    TooLarge,
    /// Only the data stream of this number is gone, in both directions, and its number may be used
    /// again. The connection goes on.
    #[error("data stream reset by the peer")]
    StreamReset(StreamId),
    /// The operating system reported an error.
    #[error("{0}")]
    Io(io::Error),
}

/// What the peer or the network did to a connection.
#[derive(Debug, thiserror::Error)]
pub enum ResetReason {
    /// TCP RST.
    #[error("reset by the peer")]
    ByPeer,
    /// The system aborted the connection.
    #[error("aborted")]
    Aborted,
    /// The peer reads no more.
    #[error("broken pipe")]
    BrokenPipe,
    /// TCP gave up.
    #[error("timed out")]
    TimedOut,
    /// The socket takes no bytes.
    #[error("nothing can be written")]
    NothingWritten,
    /// RESET_STREAM on the control stream (RFC 9000 section 19.4).
    #[error("control stream reset by the peer with {0}")]
    ControlStreamReset(PeerCode),
    /// STOP_SENDING on the control stream (RFC 9000 section 19.5).
    #[error("control stream stopped by the peer with {0}")]
    ControlStreamStopped(PeerCode),
    /// The control stream was closed here already.
    #[error("control stream closed")]
    ControlStreamClosed,
    /// The peer closed the WebTransport session with this code.
    #[error("session closed by the peer with code {0}")]
    SessionClosed(u32),
    /// The peer reset the stream of its WebTransport session.
    #[error("session reset by the peer with {0}")]
    SessionReset(PeerCode),
    /// The stream of the WebTransport session was closed here already.
    #[error("session closed")]
    SessionGone,
    /// The peer closed the QUIC connection with a code of the application.
    #[error("closed by the peer with {0}")]
    ConnectionClosed(PeerCode),
    /// QUIC's idle timeout (RFC 9000 section 10.1).
    #[error("idle timeout")]
    IdleTimeout,
    /// The peer has lost the connection's state (RFC 9000 section 10.3).
    #[error("stateless reset")]
    StatelessReset,
    /// This side closed the QUIC connection.
    #[error("closed locally")]
    ClosedLocally,
    /// Another error of QUIC's.
    #[error("{0}")]
    Quic(Box<QuicError>),
}

/// Why QUIC ended a connection. `Display` contains no text that the peer chose.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", quic_text(.0))]
pub struct QuicError(ConnectionError);

impl From<ConnectionError> for QuicError {
    fn from(error: ConnectionError) -> Self {
        Self(error)
    }
}

fn quic_text(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            format!("closed by the peer with code {}", close.error_code)
        }
        ConnectionError::ConnectionClosed(close) => {
            format!("closed by the peer: {}", close.error_code)
        }
        other => other.to_string(),
    }
}

/// A code with which the peer ended a QUIC connection or stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCode {
    /// A code of the application.
    Application(u64),
    /// A code of HTTP/3 itself (RFC 9114 section 8.1).
    Http3(u64),
}

impl fmt::Display for PeerCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Application(code) => write!(f, "code {code}"),
            Self::Http3(code) => write!(f, "HTTP/3 code {code:#x}"),
        }
    }
}

/// Which rule of its transport the peer broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A rule of WebSocket. The close frame carries its code.
    #[error("{0}")]
    WebSocket(FrameError),
    /// A rule of WebTransport over HTTP/3.
    #[error("{0}")]
    WebTransport(CapsuleError),
}

impl From<io::Error> for Closed {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as K;
        match error.kind() {
            // A TLS peer that ends without close_notify reads as this.
            K::UnexpectedEof => Self::Eof,
            K::ConnectionReset => Self::Reset(ResetReason::ByPeer),
            K::ConnectionAborted => Self::Reset(ResetReason::Aborted),
            K::BrokenPipe => Self::Reset(ResetReason::BrokenPipe),
            K::TimedOut => Self::Reset(ResetReason::TimedOut),
            _ => Self::Io(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_has_room_for_a_reason() {
        // A connection keeps an `Option<Closed>` for all its life.
        assert!(size_of::<Option<Closed>>() <= 32);
    }
}
