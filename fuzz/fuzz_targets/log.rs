#![no_main]
//! Segments of the log: any bytes, and records with damage. The first two bytes say where the records end,
//! and how many bytes are records.

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&[low, high], rest)) = data.split_first_chunk() {
        let end = u16::from_le_bytes([low, high]);
        tidegate::log::segment(rest, (low % 2 == 0).then_some(end));
        let (bodies, damage) = rest.split_at(usize::from(end).min(rest.len()));
        tidegate::log::damaged(bodies, damage);
    }
});
