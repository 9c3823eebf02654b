//! Puts records on the disk: commits, deletes and rewrites segments, and returns from a full or failing
//! disk. A machine without threads and clock: each step does one thing, and waits for the disk.

mod fresh;
mod reclaim;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{Disk, remove, write_all};
use super::failure::{Failure, tried};
use super::files::{Contents, File};
use super::format::HEADER_BYTES;
use super::position::Position;
use super::queue::{Commit, Mode, Queue};
use super::segment::{Segment, write_header};
use super::{Life, Log, Refused};
use crate::time::Millis;

use fresh::Degraded;
use reclaim::Reclaim;

/// The time between two attempts to write to a full or failing disk.
const PROBE: Duration = Duration::from_secs(1);

/// The memory whose records are in the log.
pub trait Owner {
    /// A pass begins: the calls of [`write`](Self::write) that follow belong to it. A pass that was not
    /// done is over.
    fn begin(&mut self, pass: Pass);

    /// Appends the next living records of the pass to `piece` until it is [full](Piece::is_full), and
    /// releases the claims that they had. What a record says and its place in the log must go together:
    /// if other threads append records of the same session, hold the lock under which they do.
    fn write(&mut self, piece: &mut Piece<'_>) -> Progress;
}

/// The living records that are written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Records with a claim on this segment or an earlier one.
    Until(u32),
    /// All records.
    All,
}

/// How far a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There are more records.
    More,
    /// All records of the pass were appended.
    Done,
}

/// A bounded number of records that the owner writes again.
#[derive(Debug)]
pub struct Piece<'a> {
    queue: &'a Queue,
    bytes_left: usize,
    records_left: u32,
    first_segment: u32,
}

impl<'a> Piece<'a> {
    /// A piece of a log whose first segment is `first_segment`.
    fn new(queue: &'a Queue, first_segment: u32) -> Self {
        Self {
            queue,
            first_segment,
            bytes_left: queue.options.piece_bytes_max as usize,
            records_left: queue.options.commit_records_max,
        }
    }

    /// The first segment of the log: records in earlier ones are not in this log.
    pub fn first_segment(&self) -> u32 {
        self.first_segment
    }

    /// Whether no further record should be appended.
    pub fn is_full(&self) -> bool {
        self.bytes_left == 0 || self.records_left == 0
    }

    /// Appends a living record, as [`Log::append`] does, without room of the producers.
    ///
    /// # Errors
    /// [`Refused::TooLarge`].
    pub fn append(&mut self, kind: u8, body: &[&[u8]]) -> Result<Option<Position>, Refused> {
        let len = body.iter().map(|part| part.len()).sum();
        let position = self.queue.append(kind, body, Life::Living, None)?;
        self.bytes_left = self.bytes_left.saturating_sub(Log::record_bytes(len));
        self.records_left = self.records_left.saturating_sub(1);
        Ok(position)
    }
}

/// The outcome of a step.
#[derive(Debug)]
pub enum Step {
    /// There was nothing to do. In degraded mode, the next attempt is due at `until`.
    Idle {
        /// When a further step can do something although nothing was appended.
        until: Option<Millis>,
    },
    /// Records were put on the disk.
    Committed {
        /// How many.
        records: u32,
        /// Their size in the log, in bytes.
        bytes: u64,
    },
    /// The owner appended living records again.
    Rewritten,
    /// Segments that nothing needs were deleted.
    Deleted {
        /// All segments up to this one are gone.
        last: u32,
    },
    /// A segment could not be deleted. It is tried again after some time.
    NotDeleted(Failure),
    /// The log became degraded.
    Degraded(Failure),
    /// The log stays degraded: an attempt to write failed.
    StillDegraded(Failure),
    /// The disk can be written, and a fresh log was begun.
    Returning,
    /// The fresh log is complete: records are durable again.
    Returned,
}

/// The sizes of a log on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// The number of segments.
    pub segments: u64,
    /// Their length, in bytes.
    pub bytes: u64,
    /// The size of the living records, in bytes.
    pub living_bytes: u64,
}

/// Writes the records that were appended to a [`Log`].
#[derive(Debug)]
pub struct Writer<D: Disk> {
    disk: D,
    queue: Arc<Queue>,
    /// The segment that is written, and its file.
    open: Option<(u32, D::File)>,
    /// All segments of the log, the oldest first.
    segments: VecDeque<Segment>,
    /// The log's first segment, which is in the name of its mark.
    first: u32,
    phase: Phase,
    reclaim: Reclaim,
    /// Whether it is the turn of deleting and rewriting, which alternate with commits.
    upkeep_due: bool,
}

#[derive(Debug)]
enum Phase {
    Durable,
    Degraded(Degraded),
    /// A fresh log is being written.
    Returning(Returning),
}

#[derive(Debug)]
struct Returning {
    /// Its first segment.
    first: u32,
    /// The segments of the old log.
    old: VecDeque<Segment>,
    /// The owner has appended everything.
    done: bool,
    /// Where the owner's last piece ends.
    piece_end: Position,
    /// The wait after a failure.
    wait: Duration,
}

/// The state with which a writer begins.
pub(super) struct Begin<D: Disk> {
    pub(super) disk: D,
    pub(super) queue: Arc<Queue>,
    pub(super) segments: VecDeque<Segment>,
    pub(super) first: u32,
    /// A number that no segment had, for the fresh log of a stale one.
    pub(super) unused: u32,
    /// Why the log begins degraded, if the disk failed.
    pub(super) failure: Option<Failure>,
}

impl<D: Disk> Writer<D> {
    pub(super) fn new(begin: Begin<D>) -> Self {
        let phase = match begin.queue.mode() {
            Mode::Durable => Phase::Durable,
            _ => Phase::Degraded(Degraded::at_start(begin.unused)),
        };
        let mut writer = Self {
            disk: begin.disk,
            queue: begin.queue,
            open: None,
            segments: begin.segments,
            first: begin.first,
            phase,
            reclaim: Reclaim::default(),
            upkeep_due: true,
        };
        if let Some(failure) = begin.failure {
            writer.begin_degraded(failure);
        }
        writer
    }

    /// The side for producers.
    pub fn log(&self) -> Log {
        Log(self.queue.clone())
    }

    /// Ends the log. After a panic, a step was cut short, and records may be missing.
    pub(super) fn end(&self, panicked: bool) {
        if panicked {
            // A disk that does not even change a name leaves a log without the mark.
            let _ = self.mark_stale();
        }
        self.queue.end(!panicked);
    }

    /// The sizes on the disk.
    pub fn sizes(&self) -> Sizes {
        let old = match &self.phase {
            Phase::Returning(returning) => Some(&returning.old),
            _ => None,
        };
        let all = || old.into_iter().flatten().chain(&self.segments);
        Sizes {
            segments: all().count() as u64,
            bytes: all().map(|segment| segment.bytes).sum(),
            living_bytes: self.queue.claims.living_bytes(),
        }
    }

    /// Does one thing that is due at the time `now`: a commit, or the deletion of a segment, or a piece of
    /// the owner's records, or an attempt to return from degraded mode.
    pub fn step(&mut self, owner: &mut dyn Owner, now: Millis) -> Step {
        match self.phase {
            Phase::Durable => self.durable(owner, now),
            Phase::Degraded(_) => self.degraded(owner, now),
            Phase::Returning(_) => self.returning(owner, now),
        }
    }

    fn durable(&mut self, owner: &mut dyn Owner, now: Millis) -> Step {
        if std::mem::take(&mut self.upkeep_due)
            && !self.queue.is_stopping()
            && let Some(step) = self.upkeep(owner, now)
        {
            return step;
        }
        match self.queue.take() {
            Some(commit) => {
                self.upkeep_due = true;
                self.commit(commit, now)
            }
            None if self.queue.is_stopping() => Step::Idle { until: None },
            None => {
                let step = self.upkeep(owner, now);
                step.unwrap_or(Step::Idle { until: None })
            }
        }
    }

    fn commit(&mut self, commit: Commit, now: Millis) -> Step {
        match self.write(&commit) {
            Ok(()) => {
                let step = Step::Committed {
                    records: commit.records,
                    bytes: commit.bytes.len() as u64,
                };
                self.queue.committed(commit);
                step
            }
            Err(failure) => self.degrade(failure, Some(commit), now),
        }
    }

    fn write(&mut self, commit: &Commit) -> Result<(), Failure> {
        let number = commit.position.segment();
        let name = File::Segment(number).name();
        if let Some(header) = &commit.header {
            self.close();
            let file = tried("create", &name, self.disk.create(&name))?;
            self.segments.push_back(Segment {
                number,
                bytes: u64::from(HEADER_BYTES),
                unreadable: false,
            });
            let room = u64::from(self.queue.options.segment_bytes);
            tried("reserve room for", &name, self.disk.reserve(&file, room))?;
            write_header(&self.disk, &file, &name, header)?;
            self.open = Some((number, file));
        }
        let (_, file) = self.open.as_ref().expect("the first commit opens it");
        let offset = u64::from(commit.position.offset());
        let written = write_all(&self.disk, file, offset, &commit.bytes);
        tried("write", &name, written)?;
        tried("sync", &name, self.disk.sync_data(file))?;
        if commit.header.is_some() {
            tried("sync", ".", self.disk.sync_names())?;
        }
        if let Some(segment) = self.segments.back_mut() {
            segment.bytes = u64::from(commit.end().offset());
        }
        Ok(())
    }

    /// Closes the segment that is written.
    fn close(&mut self) {
        if let Some((_, file)) = self.open.take() {
            // A file system that fails here keeps room that nobody uses; the next write will tell.
            let _ = self.disk.trim(&file);
        }
    }
}

/// Removes files that do not count. A file is removed before the one that says that it does not count.
pub(super) fn clean<D: Disk>(disk: &D) -> Result<(), Failure> {
    let names = tried("list", ".", disk.list())?;
    let garbage = Contents::of(names.iter().map(String::as_str)).garbage;
    let is_segment = |file: &File| matches!(file, File::Segment(_));
    let (segments, marks): (Vec<_>, Vec<_>) = garbage.into_iter().partition(is_segment);
    for files in [segments, marks] {
        for file in &files {
            let name = file.name();
            tried("remove", &name, remove(disk, &name))?;
        }
        if !files.is_empty() {
            tried("sync", ".", disk.sync_names())?;
        }
    }
    Ok(())
}
