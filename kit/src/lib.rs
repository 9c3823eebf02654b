//! Judges for Tidegate: the tools with which tests and benchmarks drive and observe it.
//!
//! Nothing here shares code with the `tidegate` crate, so a mistake in its codec cannot hide itself.

pub mod audit;
pub mod bench;
pub mod certs;
pub mod client;
pub mod dial;
pub mod fleet;
pub mod link;
pub mod load;
pub mod metrics;
pub mod netem;
pub mod process;
pub mod quic;
pub mod recorder;
pub mod rng;
pub mod streams;
pub mod tcp_relay;
mod tickets;
pub mod udp_relay;
pub mod usage;
pub mod wire;
