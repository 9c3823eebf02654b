//! Latencies in buckets of at most 3 % width, cheap enough to record each delivery.

use std::sync::atomic::{AtomicU64, Ordering};

/// Linear steps within each power of two.
const STEPS: usize = 32;

/// Powers of two covered above the linear beginning: up to about an hour in nanoseconds.
const POWERS: usize = 37;

/// A histogram of nanoseconds that many tasks fill.
#[derive(Debug)]
pub struct Histogram {
    buckets: Vec<AtomicU64>,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = (0..STEPS * (POWERS + 1))
            .map(|_| AtomicU64::new(0))
            .collect();
        Self {
            buckets,
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Records one value in nanoseconds.
    pub fn record(&self, ns: u64) {
        self.buckets[index(ns)].fetch_add(1, Ordering::Relaxed);
        if ns > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(ns, Ordering::Relaxed);
        }
    }

    /// The number of recorded values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    /// The largest value in nanoseconds.
    pub fn max(&self) -> u64 {
        self.max.load(Ordering::Relaxed)
    }

    /// The value below which this share (0 to 1) of all values lies, in nanoseconds; 0 if empty.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, bucket) in self.buckets.iter().enumerate() {
            seen += bucket.load(Ordering::Relaxed);
            if seen >= wanted {
                return upper(i).min(self.max());
            }
        }
        0
    }

    /// Forgets everything, at the end of a warm-up.
    pub fn clear(&self) {
        self.buckets
            .iter()
            .for_each(|b| b.store(0, Ordering::Relaxed));
        self.max.store(0, Ordering::Relaxed);
    }
}

fn index(ns: u64) -> usize {
    let steps = STEPS as u64;
    if ns < steps {
        return ns as usize;
    }
    // The five bits below the highest one choose the step.
    let power = ns.ilog2() as usize - STEPS.ilog2() as usize;
    let step = (ns >> power) as usize - STEPS;
    ((power + 1) * STEPS + step).min(STEPS * (POWERS + 1) - 1)
}

fn upper(index: usize) -> u64 {
    let (power, step) = (index / STEPS, (index % STEPS) as u64);
    if power == 0 {
        step
    } else {
        ((STEPS as u64 + step + 1) << (power - 1)) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near() {
        let h = Histogram::default();
        for ns in 1..=100_000u64 {
            h.record(ns * 10);
        }
        for (share, want) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.999, 999_000.0)] {
            let got = h.quantile(share) as f64;
            assert!((got / want - 1.0).abs() < 0.035, "{share}: {got}");
        }
        assert_eq!(
            (h.count(), h.max(), h.quantile(1.0)),
            (100_000, 1_000_000, 1_000_000)
        );
    }

    #[test]
    fn every_value_is_at_most_its_bucket_s_upper_end() {
        for power in 0..42 {
            for ns in [(1u64 << power) - 1, 1 << power, (1 << power) + 1] {
                assert!(
                    upper(index(ns)) >= ns && (ns < 32 || upper(index(ns) - 1) < ns),
                    "{ns}"
                );
            }
        }
        assert_eq!(index(u64::MAX), STEPS * (POWERS + 1) - 1);
    }
}
