//! The cost of matching a message while the number of other filters grows from 100 to 1,000,000:
//! two filters match, and each other filter belongs to one device.
//!
//! `cargo bench --bench matching`; shorter: `-- --warm-up-time 0.5 --measurement-time 2`.

use criterion::{BenchmarkId, Criterion};
use std::hint::black_box;
use tidegate::topics::FilterTrie;

fn main() {
    let mut c = Criterion::default().configure_from_args();
    let mut group = c.benchmark_group("matching");
    for filters in [100u32, 10_000, 100_000, 1_000_000] {
        let mut trie = FilterTrie::new();
        for n in 3..filters {
            trie.insert(&format!("fleet/{}/device/{n}/command", n % 100), n);
        }
        trie.insert("fleet/7/device/x/command", 0);
        trie.insert("fleet/+/device/+/alarm", 1);
        trie.insert("fleet/7/#", 2);
        let mut matched = Vec::with_capacity(8);
        trie.for_each_match("fleet/7/device/x/command", |n| matched.push(n));
        matched.sort_unstable();
        assert_eq!(matched, [0, 2]);
        group.bench_function(BenchmarkId::from_parameter(filters), |b| {
            b.iter(|| {
                matched.clear();
                trie.for_each_match(black_box("fleet/7/device/x/command"), |n| matched.push(n));
                black_box(matched.len())
            });
        });
    }
    group.finish();
    c.final_summary();
}
