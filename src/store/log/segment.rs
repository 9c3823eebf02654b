//! Reads one segment of a log, judges its damage, and mends the end of the last one after a crash.

use std::ops::Range;

use super::disk::{Content, Disk, write_all};
use super::failure::{Failure, tried};
use super::files::File;
use super::format::{
    HEADER_BYTES, HEADER_COPIES_AT, Header, RECORD_HEAD_BYTES, filler, record_bytes,
};
use super::position::Position;
use super::reader::{Part, Record, SegmentReader};
use super::report::{Damage, DamageKind};

/// A segment of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) number: u32,
    /// The length of its file.
    pub(super) bytes: u64,
    /// It is damaged and has no readable record: its file is not deleted but set aside.
    pub(super) unreadable: bool,
}

/// The facts about a segment that the rest of the log tells.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) number: u32,
    pub(super) salt: u64,
    /// The segment's header, and whether both copies are intact.
    pub(super) header: Option<(Header, bool)>,
    /// Where its records end, if the next segment says so.
    pub(super) known_end: Option<u32>,
    /// Only the last segment may end with a commit that is not complete: a start mends it.
    pub(super) is_last: bool,
    /// The most bytes in one commit, unless it has a single record.
    pub(super) commit_bytes_max: u32,
}

/// The outcome of reading a segment.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) records: u64,
    /// The end of the last intact record, in bytes from the start of the segment.
    pub(super) records_end: u32,
    pub(super) damages: Vec<Damage>,
    last_commit: u32,
}

impl Outcome {
    /// Whether the segment is damaged, and no record of it could be read.
    pub(super) fn is_unreadable(&self) -> bool {
        let finished = |damage: &Damage| damage.kind != DamageKind::Unfinished;
        self.records == 0 && self.damages.iter().any(finished)
    }
}

/// Reads one segment, and hands its intact records to `visit`.
pub(super) fn read_segment(
    content: &Content,
    context: &Context,
    visit: &mut impl FnMut(Record<'_>),
) -> Outcome {
    let bytes = &content.bytes;
    let mut reader = SegmentReader::new(bytes, context.number, context.salt, context.known_end);
    let mut damaged = Vec::new();
    let mut records = 0;
    for part in reader.by_ref() {
        match part {
            Part::Record(record) => {
                records += 1;
                visit(record);
            }
            Part::Filler { .. } => {}
            Part::Damaged { position, bytes } => damaged.push((position.offset(), bytes)),
        }
    }
    let judge = Judge {
        content,
        context,
        last_commit: reader.last_commit(),
        data_end: reader.data_end(),
    };
    Outcome {
        records,
        records_end: reader.records_end(),
        damages: judge.damages(damaged, records),
        last_commit: reader.last_commit(),
    }
}

/// Tells damage from the end of a commit that is not complete.
struct Judge<'a> {
    content: &'a Content,
    context: &'a Context,
    last_commit: u32,
    /// Zeros follow.
    data_end: usize,
}

/// Whether damage at `place` is that of a range that the disk cannot read. An empty range is the whole
/// file.
fn is_in(place: &Range<usize>, unreadable: &[Range<usize>]) -> bool {
    let mut ranges = unreadable.iter();
    ranges.any(|range| range.is_empty() || range.start < place.end && place.start < range.end)
}

impl Judge<'_> {
    /// All damage, in order. `damaged` are the places that the reader has found.
    fn damages(&self, damaged: Vec<(u32, u32)>, records: u64) -> Vec<Damage> {
        let number = self.context.number;
        let damage = |kind, offset, bytes| Damage {
            kind,
            position: Position::new(number, offset),
            bytes,
        };
        let unreadable = &self.content.unreadable;
        let named = unreadable.iter().map(|range| {
            damage(
                DamageKind::Unreadable,
                range.start as u32,
                range.len() as u32,
            )
        });
        let mut damages: Vec<Damage> = named.collect();
        if let Some(kind) = self.header(records) {
            damages.push(damage(kind, 0, HEADER_BYTES));
        }
        for (offset, bytes) in damaged {
            let place = offset as usize..(offset + bytes) as usize;
            if !is_in(&place, unreadable) {
                let kind = match self.may_be_unfinished(offset) {
                    true => DamageKind::Unfinished,
                    false => DamageKind::Content,
                };
                damages.push(damage(kind, offset, bytes));
            }
        }
        // A file that is larger than any segment is not read to its end.
        let read = self.content.bytes.len();
        let unread = self.content.len.saturating_sub(read as u64);
        if unread > 0 && self.context.known_end.is_none() {
            let unread = u32::try_from(unread).unwrap_or(u32::MAX);
            damages.push(damage(DamageKind::Content, read as u32, unread));
        }
        damages.sort_by_key(|damage| damage.position);
        damages
    }

    /// The damage of the header, if any.
    fn header(&self, records: u64) -> Option<DamageKind> {
        let is_intact = self.context.header.is_some_and(|(_, intact)| intact);
        if is_intact || is_in(&(0..HEADER_BYTES as usize), &self.content.unreadable) {
            return None;
        }
        let may_be_unfinished =
            self.last_commit <= HEADER_BYTES && self.may_be_unfinished(HEADER_BYTES);
        // A segment without any byte of a record has no header when the power failed, and needs none.
        let is_empty = match self.context.known_end {
            Some(end) => end <= HEADER_BYTES,
            None => records == 0 && self.data_end == 0 && may_be_unfinished,
        };
        if is_empty {
            return None;
        }
        Some(match may_be_unfinished {
            true => DamageKind::Unfinished,
            false => DamageKind::Content,
        })
    }

    /// Whether damage at `offset` may be the rest of one commit that was not complete. The header of a
    /// segment is written with its first commit.
    fn may_be_unfinished(&self, offset: u32) -> bool {
        if !self.context.is_last || offset < self.last_commit {
            return false;
        }
        let from = offset as usize;
        // A file of zeros alone is as long as its writes made it.
        let to = match self.data_end {
            0 => self.content.bytes.len(),
            end => end,
        };
        // A single record may be larger than a commit: its head tells.
        let rest = self.content.bytes.get(from..).unwrap_or_default();
        let position = Position::new(self.context.number, offset);
        let record = record_bytes(rest, position, self.context.salt).unwrap_or(0);
        to.saturating_sub(from) <= self.context.commit_bytes_max.max(record) as usize
    }
}

/// The bytes that a start writes at the end of the last segment. The process before may have died before it
/// synced its last commit, or when that had failed: then the system takes bytes to be on the disk that
/// are not. All earlier commits were on the disk before the last one began.
#[derive(Debug)]
pub(super) struct Mend {
    number: u32,
    /// The header, if the last commit is the first one: it may be as incomplete.
    header: Option<Header>,
    from: u32,
    bytes: Vec<u8>,
}

impl Mend {
    /// The last commit again, with fillers in its holes and zeros behind it. `previous_end` is the end of the
    /// records of the segment before this one.
    pub(super) fn new(
        content: &Content,
        context: &Context,
        outcome: &Outcome,
        previous_end: Option<u32>,
    ) -> Self {
        let from = outcome.last_commit;
        let records_end = outcome.records_end;
        let bytes = content.bytes.get(from as usize..).unwrap_or_default();
        let mut bytes = bytes.to_vec();
        let mut end = records_end - from;
        for damage in &outcome.damages {
            let offset = damage.position.offset();
            if damage.kind != DamageKind::Unfinished || offset < from {
                continue;
            }
            let at = (offset - from) as usize;
            let hole = &mut bytes[at..at + damage.bytes as usize];
            if offset < records_end && damage.bytes >= RECORD_HEAD_BYTES {
                hole.copy_from_slice(&filler(damage.position, damage.bytes, context.salt));
            } else {
                hole.fill(0);
                end = end.max(offset - from + damage.bytes);
            }
        }
        bytes.truncate(end as usize);
        let header = Header {
            segment: context.number,
            salt: context.salt,
            previous_end: match context.header {
                Some((header, _)) => header.previous_end,
                None => previous_end,
            },
        };
        Self {
            number: context.number,
            header: (from <= HEADER_BYTES).then_some(header),
            from,
            bytes,
        }
    }

    /// Writes the bytes and puts them on the disk.
    pub(super) fn write<D: Disk>(&self, disk: &D) -> Result<(), Failure> {
        let name = File::Segment(self.number).name();
        let file = tried("open", &name, disk.open_to_write(&name))?;
        if let Some(header) = &self.header {
            write_header(disk, &file, &name, header)?;
        }
        let written = write_all(disk, &file, u64::from(self.from), &self.bytes);
        tried("write", &name, written)?;
        tried("sync", &name, disk.sync_data(&file))?;
        tried("trim", &name, disk.trim(&file))
    }
}

/// Writes both copies of a segment's header.
pub(super) fn write_header<D: Disk>(
    disk: &D,
    file: &D::File,
    name: &str,
    header: &Header,
) -> Result<(), Failure> {
    let copy = header.encode();
    for at in HEADER_COPIES_AT {
        tried("write", name, write_all(disk, file, u64::from(at), &copy))?;
    }
    Ok(())
}
