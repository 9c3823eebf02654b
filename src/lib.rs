//! Tidegate: an MQTT proxy that owns its clients' sessions.
//!
//! Imports point one way: `mqtt` ← `session` ← `router` ← { `client`, `upstream` } ← `runtime`.
//! `transport` knows bytes only; `config`, `telemetry` and `limits` are leaves.

pub mod admin;
pub mod auth;
pub mod cli;
pub mod config;
pub mod limits;
pub mod mqtt;
pub mod router;
pub mod session;
pub mod telemetry;
pub mod upstream;
