#![no_main]
//! A WebTransport session's own stream; the first byte says how it is cut.

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((step, bytes)) = data.split_first() {
        tidegate::transport::capsules(bytes, usize::from(*step) + 1);
    }
});
