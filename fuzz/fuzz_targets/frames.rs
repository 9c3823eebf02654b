#![no_main]
//! WebSocket frames; the first byte says how they are cut.

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((step, bytes)) = data.split_first() {
        tidegate::transport::frames(bytes, usize::from(*step) + 1);
    }
});
