//! The byte transports over loopback, with independent clients: tungstenite, tokio-rustls and quinn in
//! their client roles, and raw sockets.

mod accept;
mod common;
mod dial;
mod quic;
mod webtransport;
mod ws;
