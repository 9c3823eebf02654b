#![no_main]
//! Packets of a connection whose version is known.
#[allow(dead_code)]
#[path = "../../tests/codec/properties/packets.rs"]
mod packets;

use tidegate::mqtt::{Receiver, Version};

libfuzzer_sys::fuzz_target!(|data: &[u8]| packets::stream(Version::V5, Receiver::Server, data));
