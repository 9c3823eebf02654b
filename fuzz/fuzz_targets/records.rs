#![no_main]
//! The records of sessions, filters and links in the log: any bytes as one record, and any records as a log.

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tidegate::session_records::body(data);
    tidegate::session_records::log(data);
});
