//! The binary over real sockets, between real clients and a real mosquitto.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests spawn tasks, share state with threads, read clocks and print"
)]

mod durable;
mod flap;
mod hop;
mod quic_network;
mod restart;
mod rumqttc;
mod store;
mod takeover;

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Lets tests with a whole fleet of clients run alone: they would disturb each other's timing.
static MACHINE: RwLock<()> = RwLock::const_new(());

/// Returns the guard of a test that needs the machine for itself.
fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.blocking_write()
}

/// Returns the guard of a test that can run beside others of its kind.
async fn beside_others() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().await
}
