#![no_main]
//! A PROXY protocol header, version 1 or 2.

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::transport::header(data));
