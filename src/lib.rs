//! Tidegate: an MQTT proxy that owns its clients' sessions.
//!
//! Imports point one way: `mqtt` ← `session` ← `router` ← { `client`, `upstream` } ← `runtime`.
//! `transport` knows bytes only, `store` records only; `config`, `telemetry`, `budget` and `clock`
//! are leaves.

pub(crate) mod admin;
pub(crate) mod auth;
pub(crate) mod backoff;
pub mod budget;
pub mod cli;
pub mod client;
pub(crate) mod clock;
pub mod config;
pub mod embedded;
pub(crate) mod flow;
pub mod hashing;
pub mod mqtt;
pub mod outbuf;
mod qos;
pub mod router;
pub mod runtime;
pub mod session;
mod shares;
#[cfg(test)]
pub(crate) mod sim;
pub mod store;
pub mod streams;
pub(crate) mod supervise;
pub mod telemetry;
pub mod time;
pub mod topics;
pub mod transport;
pub(crate) mod upstream;
