//! Byte transports: listeners and connections over TCP, TLS, WebSocket, secure WebSocket, QUIC and
//! WebTransport, and the dialling side for links to a broker.
//!
//! This module knows bytes only. A [`Stream`] is one connection. It carries one or more byte streams
//! in both directions, each with a number: stream 0 is the control stream and always exists; streams
//! 1 to 15 are data streams that a client opened over QUIC or WebTransport.
//!
//! Each external library is named in one place: rustls in `tls/`, quinn in `quic.rs` and `quic/`,
//! tungstenite in `ws/` and `dial/ws.rs`, rcgen in `selfsigned.rs`, proxy-header in
//! `proxy/header.rs`.

mod closed;
mod detect;
pub mod dial;
mod error;
mod events;
mod forwarded;
pub mod limits;
pub mod listen;
mod proxy;
mod quic;
pub mod selfsigned;
mod stream;
mod tcp;
pub(crate) mod tls;
mod types;
mod ws;

pub use closed::{Closed, PeerCode, QuicError, ResetReason, Violation};
pub use detect::{Detected, detect};
pub use error::{
    AcceptError, CertificateFault, HandshakeError, LibraryError, RefusalReason, RequestError,
    WebTransportError,
};
pub use events::{Events, NoEvents};
pub use limits::{ConnectionCap, Handshakes, Limits, Permit, Unauthenticated};
pub use listen::{Accepted, BindError, Bound, ConnectionTask, Drain, bind};
pub use proxy::ProxyError;
pub use quic::{CapsuleError, QuicSecret};
pub use stream::Stream;
pub use tls::{
    ClientCertificate, ClientTls, Configs, Material, NameError, ServerTls, TlsError, Validity,
};
pub use types::{Arrivals, CloseHow, Recv, Traffic};

pub use crate::outbuf::OutBuf;
pub use ws::FrameError;
