#![no_main]
//! Topic names and filters: three lines, two filters and a name.

use tidegate::properties::topics;

libfuzzer_sys::fuzz_target!(|data: &str| {
    let mut lines = data.splitn(3, '\n');
    let mut next = || lines.next().unwrap_or_default();
    topics::relations(next(), next(), next());
});
