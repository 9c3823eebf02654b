#![no_main]
//! The first packet of a connection.
#[allow(dead_code)]
#[path = "../../tests/codec/properties/packets.rs"]
mod packets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| packets::first(data));
