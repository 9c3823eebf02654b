//! Tidegate: an MQTT proxy that owns its clients' sessions.
//!
//! Imports point one way: `mqtt` ← `session` ← `router` ← { `client`, `upstream` } ← `runtime`.
//! `transport` knows bytes only, `store` records only; `config`, `telemetry`, `limits` and `clock`
//! are leaves.

pub mod admin;
pub mod auth;
pub(crate) mod backoff;
pub mod budget;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod embedded;
pub(crate) mod flow;
pub mod mqtt;
pub mod router;
pub mod runtime;
pub mod session;
#[cfg(test)]
pub(crate) mod sim;
pub mod store;
pub mod telemetry;
pub mod time;
pub mod topics;
pub mod transport;
pub mod upstream;
