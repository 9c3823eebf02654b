//! Tests of the judges.

mod client;
mod wire;
