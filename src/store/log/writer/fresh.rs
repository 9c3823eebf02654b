//! Degraded mode, and the return from it: a fresh log from the owner's memory.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::disk::{Disk, remove, write_all};
use super::super::failure::{Failure, tried};
use super::super::files::File;
use super::super::queue::{Commit, Mode};
use super::super::segment::Segment;
use super::reclaim::Reclaim;
use super::{Owner, PROBE, Pass, Phase, Piece, Progress, Returning, Step, Writer, clean};
use crate::time::Millis;

/// The longest time between two attempts, when writing a fresh log fails again and again.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// The bytes that an attempt writes.
const PROBE_BYTES: [u8; 4096] = [0; 4096];

#[derive(Debug)]
pub(super) struct Degraded {
    /// Whether the log is marked as stale on the disk.
    marked: bool,
    /// When the next attempt is due.
    next_probe: Millis,
    /// The wait after the next fresh log that fails.
    wait: Duration,
    /// The fresh log's first segment.
    unused: u32,
    /// The failure with which the log began degraded, until a step tells it.
    failure: Option<Failure>,
}

impl Degraded {
    /// The state of a stale log at the start.
    pub(super) fn at_start(unused: u32) -> Self {
        Self {
            marked: true,
            next_probe: Millis::ZERO,
            wait: PROBE,
            unused,
            failure: None,
        }
    }
}

impl<D: Disk> Writer<D> {
    /// Stops writing after a failure. `failed` is the commit that could not be written.
    pub(super) fn degrade(
        &mut self,
        failure: Failure,
        failed: Option<Commit>,
        now: Millis,
    ) -> Step {
        // This file is never written or synced again.
        self.open = None;
        let wait = match std::mem::replace(&mut self.phase, Phase::Durable) {
            Phase::Returning(returning) => {
                self.segments = returning.old;
                (returning.wait * 2).min(WAIT_MAX)
            }
            _ => PROBE,
        };
        // Before tasks go on that wait for records: after a crash, the log must be known to lack them.
        let marked = self.mark_stale().is_ok();
        self.reclaim = Reclaim::default();
        // Records may have been appended until now: their places are not used again.
        let next = self.queue.stop_writing(Mode::Degraded, failed);
        let unused = next.segment().max(self.first) + 1;
        self.phase = Phase::Degraded(Degraded {
            marked,
            next_probe: now + wait,
            wait,
            unused,
            failure: None,
        });
        Step::Degraded(failure)
    }

    /// The disk failed at the start: records are not written, so the log on the disk will lack them.
    pub(super) fn begin_degraded(&mut self, failure: Failure) {
        let is_marked = self.mark_stale().is_ok();
        if let Phase::Degraded(degraded) = &mut self.phase {
            degraded.marked = is_marked;
            degraded.failure = Some(failure);
        }
    }

    /// Marks the log on the disk as one that lacks records. A fresh log that has not taken its place must
    /// not count after a crash either, although its last change of a name may have happened.
    pub(super) fn mark_stale(&self) -> Result<(), Failure> {
        let stale = File::Stale(self.first).name();
        let names = tried("list", ".", self.disk.list())?;
        for name in &names {
            if let Some(File::Live(first)) = File::of(name) {
                let other = match first == self.first {
                    true => stale.clone(),
                    false => File::New(first).name(),
                };
                tried("rename", name, self.disk.rename(name, &other))?;
            }
        }
        let live = File::Live(self.first).name();
        if !names.contains(&live) && !names.contains(&stale) {
            tried("create", &stale, self.disk.create(&stale))?;
        }
        tried("sync", ".", self.disk.sync_names())
    }

    pub(super) fn degraded(&mut self, owner: &mut dyn Owner, now: Millis) -> Step {
        let Phase::Degraded(degraded) = &mut self.phase else {
            unreachable!("the caller has looked");
        };
        if let Some(failure) = degraded.failure.take() {
            degraded.next_probe = now + PROBE;
            return Step::Degraded(failure);
        }
        if now < degraded.next_probe {
            return Step::Idle {
                until: Some(degraded.next_probe),
            };
        }
        let (marked, first, wait) = (degraded.marked, degraded.unused, degraded.wait);
        match self.begin_fresh(marked, first) {
            Ok(()) => {
                self.queue.begin_fresh(first);
                owner.begin(Pass::All);
                self.phase = Phase::Returning(Returning {
                    first,
                    old: std::mem::take(&mut self.segments),
                    done: false,
                    piece_end: self.queue.next(),
                    wait,
                });
                Step::Returning
            }
            Err(failure) => {
                let marked = marked || self.mark_stale().is_ok();
                if let Phase::Degraded(degraded) = &mut self.phase {
                    degraded.marked = marked;
                    degraded.next_probe = now + PROBE;
                }
                Step::StillDegraded(failure)
            }
        }
    }

    /// Tries whether the disk can be written, and marks the segments from `first` on as a log that is not
    /// complete.
    fn begin_fresh(&self, marked: bool, first: u32) -> Result<(), Failure> {
        if !marked {
            self.mark_stale()?;
        }
        clean(&self.disk)?;
        let name = File::Probe.name();
        let file = tried("create", &name, self.disk.create(&name))?;
        let room = u64::from(self.queue.options.segment_bytes);
        tried("reserve room for", &name, self.disk.reserve(&file, room))?;
        let written = write_all(&self.disk, &file, 0, &PROBE_BYTES[..self.probe_bytes()]);
        tried("write", &name, written)?;
        tried("sync", &name, self.disk.sync_data(&file))?;
        tried("remove", &name, remove(&self.disk, &name))?;
        let new = File::New(first).name();
        tried("create", &new, self.disk.create(&new))?;
        tried("sync", ".", self.disk.sync_names())
    }

    fn probe_bytes(&self) -> usize {
        PROBE_BYTES
            .len()
            .min(self.queue.options.segment_bytes as usize)
    }

    pub(super) fn returning(&mut self, owner: &mut dyn Owner, now: Millis) -> Step {
        let committed = self.queue.written_to();
        let Phase::Returning(returning) = &mut self.phase else {
            unreachable!("the caller has looked");
        };
        if returning.piece_end <= committed {
            if returning.done {
                return self.complete(now);
            }
            let mut piece = Piece::new(&self.queue, returning.first);
            returning.done = owner.write(&mut piece) == Progress::Done;
            returning.piece_end = self.queue.next();
            return Step::Rewritten;
        }
        match self.queue.take() {
            Some(commit) => self.commit(commit, now),
            None => Step::Idle { until: None },
        }
    }

    /// The fresh log takes the place of the old one.
    fn complete(&mut self, now: Millis) -> Step {
        let Phase::Returning(returning) = &self.phase else {
            unreachable!("the caller has looked");
        };
        let first = returning.first;
        if let Err(failure) = self.replace_old(first, &returning.old) {
            return self.degrade(failure, None, now);
        }
        self.phase = Phase::Durable;
        self.first = first;
        self.queue.claims.begin_at(first);
        self.queue.complete();
        self.reclaim.garbage = true;
        self.upkeep_due = true;
        Step::Returned
    }

    /// Calls the log that begins with segment `first` the one that counts.
    fn replace_old(&self, first: u32, old: &VecDeque<Segment>) -> Result<(), Failure> {
        // The old segments are deleted from then on.
        for segment in old.iter().filter(|segment| segment.unreadable) {
            self.delete(*segment)?;
        }
        let (new, live) = (File::New(first).name(), File::Live(first).name());
        tried("rename", &new, self.disk.rename(&new, &live))?;
        tried("sync", ".", self.disk.sync_names())
    }
}
