#![no_main]
//! The first packet of a connection.

use tidegate::properties::packets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| packets::first(data));
