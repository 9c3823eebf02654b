//! Listeners: binding, accepting, and transport handshakes. Each handshake runs in its own task with
//! a deadline, so that no connection waits for another's.

mod accept;
mod bind;
pub(super) mod listener;

pub use bind::{BindError, Bound, Drain, bind};
pub use listener::{Accepted, ConnectionTask};
