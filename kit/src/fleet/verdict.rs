//! The judgement over a fleet at the end of its run.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use super::{Arrivals, SPEAKERS, Shared, Tally};

/// The judgement over a fleet.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// Every broken promise, in words; empty for a pass.
    pub faults: Vec<String>,
    /// The clients that these faults name, each once.
    pub clients: Vec<usize>,
    /// Flaps that were completed.
    pub flaps: u64,
    /// The number of those flaps after which the session was present.
    pub resumes: u64,
    /// Connects that the client had to try again.
    pub retries: u64,
    /// Deliveries to kept sessions and to clean ones, each counted once.
    pub deliveries: [u64; 2],
    /// Legal duplicates.
    pub duplicates: u64,
    /// Publishes of the clients, and how often they were sent again with DUP.
    pub said: [u64; 2],
}

impl Verdict {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} flaps, {} with the session present; {} connects tried again",
            self.flaps, self.resumes, self.retries
        )?;
        let [kept, clean] = self.deliveries;
        let more = self.duplicates;
        writeln!(
            f,
            "{kept} deliveries to kept sessions and {more} again with DUP; {clean} to clean"
        )?;
        writeln!(
            f,
            "{} publishes of the clients, {} sent again",
            self.said[0], self.said[1]
        )?;
        for fault in &self.faults {
            writeln!(f, "FAULT: {fault}")?;
        }
        Ok(())
    }
}

/// Messages that a client should have received and did not.
pub(super) fn lost(shared: &Shared, tally: &Tally) -> u64 {
    let plan = &shared.plan;
    let of = |speaker: usize| {
        plan.topics_of(tally.number).map(|topic| {
            let stream = plan.stream(speaker, topic);
            tally
                .audit
                .lost(stream, shared.sent[stream as usize].load(Relaxed))
        })
    };
    (0..SPEAKERS).flat_map(of).sum()
}

pub(super) fn judge(
    shared: &Shared,
    tallies: &[Arc<Mutex<Tally>>],
    arrivals: &Arrivals,
    wills: &[String],
) -> Verdict {
    let mut v = Verdict {
        faults: shared.faults.lock().expect("a push does not panic").clone(),
        flaps: shared.flaps.load(Relaxed),
        resumes: shared.resumes.load(Relaxed),
        retries: shared.retries.load(Relaxed),
        ..Verdict::default()
    };
    v.said[1] = shared.resent.load(Relaxed);
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for tally in tallies {
        let tally = tally.lock().expect("bookkeeping does not panic");
        let name = format!("client {} ({:?})", tally.number, tally.kind);
        let kept = tally.kind.keeps_session();
        v.deliveries[usize::from(!kept)] += tally.audit.fresh;
        v.duplicates += tally.audit.duplicates;
        v.said[0] += tally.said;
        for (stream, seq, fault) in tally.audit.faults.iter().take(3) {
            v.faults
                .push(format!("{name}: stream {stream} seq {seq}: {fault}"));
        }
        for (kind, n) in &tally.audit.fault_counts {
            *kinds.entry(kind).or_default() += n;
        }
        if kept {
            let missing = lost(shared, &tally);
            if missing > 0 {
                v.faults.push(format!("{name}: {missing} messages lost"));
            }
        }
        if tally.kind.resends() {
            let stream = shared.plan.up_stream(tally.number);
            let missing = arrivals.of(tally.kind).lost(stream, tally.said);
            if missing > 0 {
                v.faults.push(format!(
                    "{name}: {missing} of its publishes never reached the broker"
                ));
            }
            if tally.unacknowledged > 0 {
                let open = tally.unacknowledged;
                v.faults
                    .push(format!("{name}: {open} of its publishes not acknowledged"));
            }
        }
    }
    let first = shared.plan.up_stream(0);
    for (stream, seq, fault) in arrivals.kept.faults.iter().chain(&arrivals.clean.faults) {
        let client = stream.wrapping_sub(first);
        v.faults
            .push(format!("at the broker: client {client} seq {seq}: {fault}"));
    }
    for will in wills {
        let client = will.rsplit('/').next().unwrap_or_default();
        v.faults
            .push(format!("the will of client {client} fired: {will}"));
    }
    for fault in &v.faults {
        // All faults of one client begin with the same words.
        let number = fault
            .split("client ")
            .nth(1)
            .and_then(|t| t.split(' ').next());
        if let Some(Ok(number)) = number.map(str::parse)
            && !v.clients.contains(&number)
        {
            v.clients.push(number);
        }
    }
    if !kinds.is_empty() {
        v.faults.push(format!("deliveries in all: {kinds:?}"));
    }
    v
}
