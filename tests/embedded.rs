//! The embedded core, driven by exact packets in virtual time and by an
//! independent client over a real port.

#[path = "embedded/client.rs"]
mod client;
#[path = "embedded/faults.rs"]
mod faults;
#[path = "embedded/flows.rs"]
mod flows;
#[path = "embedded/foreign.rs"]
mod foreign;
#[path = "embedded/sessions.rs"]
mod sessions;
