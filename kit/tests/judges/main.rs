//! The judges are judged.

mod client;
mod wire;
