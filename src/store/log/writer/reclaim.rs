//! Deletes segments that nothing needs, and has the oldest one's living records written again when the
//! log is much larger than they are.

use std::io;

use super::super::disk::{Disk, remove};
use super::super::failure::{Failure, tried};
use super::super::files::File;
use super::super::position::Position;
use super::super::segment::Segment;
use super::{Owner, PROBE, Pass, Piece, Progress, Step, Writer, clean};
use crate::time::Millis;

/// A smaller segment counts as this part of a full one, so that restarts do not make segments without
/// end.
const SMALLEST_PART: u64 = 16;
/// The log may be larger than twice its living records by this many segments.
const SPARE_SEGMENTS: u64 = 4;

#[derive(Debug, Default)]
pub(super) struct Reclaim {
    /// The segment whose living records are being written again.
    pass: Option<u32>,
    /// Where the owner's last piece ends.
    piece_end: Option<Position>,
    /// No pass begins before the log has this size, since the last one did not free its segment.
    not_before_bytes: u64,
    /// A deletion failed: it is tried again then.
    retry_at: Option<Millis>,
    /// Files of an old log may be left.
    pub(super) garbage: bool,
}

impl<D: Disk> Writer<D> {
    /// Deletes or rewrites a part of the log, if that is due.
    pub(super) fn upkeep(&mut self, owner: &mut dyn Owner, now: Millis) -> Option<Step> {
        if self.reclaim.retry_at.is_none_or(|at| at <= now) {
            self.reclaim.retry_at = None;
            if self.reclaim.garbage {
                return Some(self.delete_garbage(now));
            }
            let oldest = self.segments.front().filter(|_| self.segments.len() > 1);
            let committed = self.queue.written_to();
            if let Some(segment) = oldest.copied()
                && self.queue.claims.is_dead(segment.number, committed)
            {
                return Some(self.delete_oldest(segment, now));
            }
        }
        self.rewrite(owner)
    }

    fn delete_garbage(&mut self, now: Millis) -> Step {
        match clean(&self.disk) {
            Ok(()) => {
                self.reclaim.garbage = false;
                Step::Deleted {
                    last: self.first.saturating_sub(1),
                }
            }
            Err(failure) => self.not_deleted(failure, now),
        }
    }

    fn delete_oldest(&mut self, segment: Segment, now: Millis) -> Step {
        if let Err(failure) = self.delete(segment) {
            return self.not_deleted(failure, now);
        }
        let segment = segment.number;
        // The next segment may cancel records of this one, so this one must be gone before that one is.
        if let Err(failure) = tried("sync", ".", self.disk.sync_names()) {
            return self.degrade(failure, None, now);
        }
        self.segments.pop_front();
        self.queue.claims.begin_at(segment + 1);
        self.reclaim.not_before_bytes = 0;
        if self.reclaim.pass.is_some_and(|pass| pass <= segment) {
            self.reclaim.pass = None;
        }
        Step::Deleted { last: segment }
    }

    /// Removes a segment's name, or changes it if the segment has only damage, which an operator may want
    /// to look at.
    pub(super) fn delete(&self, segment: Segment) -> Result<(), Failure> {
        let name = File::Segment(segment.number).name();
        if !segment.unreadable {
            return tried("remove", &name, remove(&self.disk, &name));
        }
        let kept = File::Damaged(segment.number).name();
        match self.disk.rename(&name, &kept) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => tried("rename", &name, result),
        }
    }

    fn not_deleted(&mut self, failure: Failure, now: Millis) -> Step {
        self.reclaim.retry_at = Some(now + PROBE);
        Step::NotDeleted(failure)
    }

    fn rewrite(&mut self, owner: &mut dyn Owner) -> Option<Step> {
        let committed = self.queue.written_to();
        if self.reclaim.piece_end.is_some_and(|end| end > committed) {
            return None;
        }
        if self.reclaim.pass.is_none() {
            let segment = self.segment_to_rewrite()?;
            self.reclaim.pass = Some(segment);
            owner.begin(Pass::Until(segment));
        }
        let mut piece = Piece::new(&self.queue, self.first);
        let progress = owner.write(&mut piece);
        self.reclaim.piece_end = Some(self.queue.next());
        if progress == Progress::Done {
            self.reclaim.pass = None;
            let full = u64::from(self.queue.options.segment_bytes);
            self.reclaim.not_before_bytes = self.size() + full;
        }
        Some(Step::Rewritten)
    }

    /// The oldest segment, if the log is too large and has others.
    fn segment_to_rewrite(&self) -> Option<u32> {
        let full = u64::from(self.queue.options.segment_bytes);
        let living = self.queue.claims.living_bytes();
        let size = self.size();
        let oldest = self.segments.front().filter(|_| self.segments.len() > 1)?;
        let due =
            size > 2 * living + SPARE_SEGMENTS * full && (size >= self.reclaim.not_before_bytes);
        (due && self.queue.claims.lives(oldest.number)).then_some(oldest.number)
    }

    /// The size of the log, in bytes.
    fn size(&self) -> u64 {
        let least = u64::from(self.queue.options.segment_bytes) / SMALLEST_PART;
        let sizes = self.segments.iter().map(|segment| segment.bytes.max(least));
        sizes.sum()
    }
}
