#![no_main]
//! Packets of a connection whose version is known.

use tidegate::mqtt::{Receiver, Version};
use tidegate::properties::packets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| packets::stream(Version::V5, Receiver::Client, data));
