//! A deterministic simulation of sessions: model clients over lossy links, the real router and
//! its sessions, a model broker, a virtual clock. Each seed is another run; an oracle judges what
//! goes in and out at the edges.
//!
//! `TIDEGATE_SEEDS=100000` runs more, `SEED=n` one with a trace.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "traces are printed"
)]

mod actions;
mod broker;
mod claim;
mod device;
mod downlink;
mod edge;
mod gaps;
mod inbound;
mod ledger;
mod oracle;
mod packets;
mod pipe;
mod setup;
mod trace;
mod world;

use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};

use world::{Report, run};

const SEEDS: u64 = 2500;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn judge(seed: u64, trace: bool) -> Result<Report, String> {
    catch_unwind(|| run(seed, trace)).unwrap_or_else(|_| Err("it panicked; see above".into()))
}

#[test]
fn sessions_hold_their_promises_under_any_schedule() {
    if let Some(seed) = number("SEED") {
        match judge(seed, true) {
            Ok(report) => eprintln!("{report:?}"),
            Err(error) => panic!("seed {seed}: {error}"),
        }
        return;
    }
    let seeds = number("TIDEGATE_SEEDS").unwrap_or(SEEDS);
    let from = number("TIDEGATE_FIRST_SEED").unwrap_or(0);
    let next = AtomicU64::new(from);
    let failed = parking_lot::Mutex::new(Vec::new());
    let totals = [const { AtomicU64::new(0) }; 4];
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + seeds || failed.lock().len() >= 20 {
                        return;
                    }
                    match judge(seed, false) {
                        Ok(r) => {
                            let of = [r.connects, r.delivered, r.forwarded, r.asleep];
                            for (total, n) in totals.iter().zip(of) {
                                total.fetch_add(n, Ordering::Relaxed);
                            }
                        }
                        Err(error) => failed.lock().push((seed, error)),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    for (seed, error) in &failed {
        eprintln!("SEED={seed} cargo test --test sim -- --nocapture\n    {error}\n");
    }
    let [connects, delivered, forwarded, asleep] = totals.map(AtomicU64::into_inner);
    eprintln!(
        "{seeds} seeds: {connects} connects, {delivered} delivered, {forwarded} forwarded, {asleep} asleep"
    );
    assert!(
        failed.is_empty(),
        "seeds failed: {:?}",
        failed.iter().map(|f| f.0).collect::<Vec<_>>()
    );
    assert!(
        connects.min(delivered).min(forwarded) > seeds && (seeds < 100 || asleep > seeds / 10),
        "the runs are empty"
    );
}

#[test]
fn one_seed_gives_one_trace() {
    let record = |seed| trace::recorded(|| drop(judge(seed, true)));
    for seed in 0..20 {
        let (once, again) = (record(seed), record(seed));
        assert!(once.lines().count() > 50, "seed {seed} says little: {once}");
        let differs = once.lines().zip(again.lines()).find(|(a, b)| a != b);
        assert!(
            once == again,
            "seed {seed} runs in two ways: {differs:?}; a map is not keyed from the seed"
        );
    }
}
