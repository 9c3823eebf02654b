//! Which segments contain records that are still needed.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::format::RECORD_HEAD_BYTES;
use super::position::Position;

/// A living record's hold on its segment, which is not deleted while it has claims. Plain data, so that
/// an owner can keep the segment alone and count the bytes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The record's segment.
    pub segment: u32,
    /// The record's size in the log, in bytes.
    pub bytes: u32,
}

impl Claim {
    /// The claim of a record at `position` whose body has `body_len` bytes.
    pub const fn new(position: Position, body_len: usize) -> Self {
        Self {
            segment: position.segment(),
            bytes: RECORD_HEAD_BYTES + body_len as u32,
        }
    }
}

/// The claims on all segments.
#[derive(Debug)]
pub struct Claims(Mutex<Table>);

#[derive(Debug)]
struct Table {
    segments: BTreeMap<u32, Living>,
    /// The bytes of all living records.
    bytes: u64,
    /// The first segment whose claims count.
    first: u32,
    /// Where the next record will be.
    next: Position,
}

/// The living records of a segment.
#[derive(Clone, Copy, Debug, Default)]
struct Living {
    records: u64,
    bytes: u64,
    /// Where the next record was to be at the last release: the record that replaces the released one is
    /// before it.
    released_at: Option<Position>,
}

impl Claims {
    pub(super) fn new(first: u32, next: Position) -> Self {
        Self(Mutex::new(Table {
            segments: BTreeMap::new(),
            bytes: 0,
            first,
            next,
        }))
    }

    /// Records that a record lives. [`append`](super::Log::append) does this itself; it is for the records
    /// that a replay found and their owner keeps.
    pub fn claim(&self, claim: Claim) {
        let mut table = self.0.lock();
        if claim.segment >= table.first {
            let living = table.segments.entry(claim.segment).or_default();
            living.records += 1;
            living.bytes += u64::from(claim.bytes);
            table.bytes += u64::from(claim.bytes);
        }
    }

    /// Records that a record is not needed any more. The record that takes its place, if any, must have
    /// been appended before. A claim on a deleted segment has no effect.
    pub fn release(&self, claim: Claim) {
        let table = &mut *self.0.lock();
        if let Some(living) = table.segments.get_mut(&claim.segment) {
            let bytes = u64::from(claim.bytes).min(living.bytes);
            living.records = living.records.saturating_sub(1);
            living.bytes -= bytes;
            living.released_at = Some(table.next);
            table.bytes -= bytes;
        }
    }

    /// The size of all living records, in bytes.
    pub fn living_bytes(&self) -> u64 {
        self.0.lock().bytes
    }

    pub(super) fn set_next(&self, next: Position) {
        self.0.lock().next = next;
    }

    /// Whether a segment has living records.
    pub(super) fn lives(&self, segment: u32) -> bool {
        let table = self.0.lock();
        let living = table.segments.get(&segment);
        living.is_some_and(|living| living.records > 0)
    }

    /// Whether nothing in a segment is needed, given that everything before `committed` is on the disk.
    pub(super) fn is_dead(&self, segment: u32, committed: Position) -> bool {
        let table = self.0.lock();
        table.segments.get(&segment).is_none_or(|living| {
            living.records == 0 && living.released_at.is_none_or(|at| at <= committed)
        })
    }

    /// Forgets the claims on segments before `first`.
    pub(super) fn begin_at(&self, first: u32) {
        let table = &mut *self.0.lock();
        table.first = table.first.max(first);
        let kept = table.segments.split_off(&table.first);
        let gone = std::mem::replace(&mut table.segments, kept);
        table.bytes -= gone.values().map(|living| living.bytes).sum::<u64>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIM: Claim = Claim {
        segment: 3,
        bytes: 20,
    };

    #[test]
    fn a_segment_is_dead_when_the_record_that_replaces_its_last_one_is_committed() {
        let at = |offset| Position::new(4, offset);
        let claims = Claims::new(1, at(100));
        assert!(claims.is_dead(3, at(0)));
        claims.claim(CLAIM);
        assert!(claims.lives(3) && !claims.is_dead(3, at(200)));
        claims.set_next(at(150));
        claims.release(CLAIM);
        assert!(!claims.lives(3));
        assert!(!claims.is_dead(3, at(149)), "the replacement may be lost");
        assert!(claims.is_dead(3, at(150)));
        assert_eq!(claims.living_bytes(), 0);
    }

    #[test]
    fn claims_on_deleted_segments_have_no_effect() {
        let claims = Claims::new(1, Position::new(4, 80));
        claims.claim(CLAIM);
        claims.claim(Claim::new(Position::new(4, 80), 9));
        assert_eq!(claims.living_bytes(), 40);
        claims.begin_at(4);
        claims.release(CLAIM);
        claims.claim(CLAIM);
        assert_eq!(claims.living_bytes(), 20);
        assert!(claims.lives(4) && !claims.lives(3));
    }
}
