#![no_main]
//! `Forwarded` and `X-Forwarded-For` lines of a client, before what its proxy adds.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::transport::hops(data));
