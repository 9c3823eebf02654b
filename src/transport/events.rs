//! The events of one listener that its owner counts and logs.

use std::net::SocketAddr;

use crate::transport::error::{AcceptError, HandshakeError, RefusalReason};

/// Receives the events of one listener. Every method does nothing by default. They are called on
/// the accept path and must not block.
pub trait Events: Send + Sync {
    /// `accept` failed.
    fn accept_failed(&self, _error: &AcceptError) {}
    /// A connection was refused before its handshake.
    fn refused(&self, _reason: RefusalReason) {}
    /// A handshake failed.
    fn handshake_failed(&self, _peer: SocketAddr, _error: &HandshakeError) {}
    /// A load balancer's health check of a `ws` or `wss` listener was answered.
    fn health_checked(&self) {}
    /// A QUIC client was asked to prove its address (RFC 9000 section 8.1.2).
    fn retry_sent(&self) {}
    /// A unidirectional QUIC stream of a client was stopped.
    fn uni_stream_stopped(&self, _peer: SocketAddr) {}
    /// The address of a QUIC client changed (RFC 9000 section 9).
    fn migrated(&self, _from: SocketAddr, _to: SocketAddr) {}
}

/// Ignores all events.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEvents;

impl Events for NoEvents {}
