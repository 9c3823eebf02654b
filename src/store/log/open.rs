//! Reads a log after a restart, past damage, and goes on behind it.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::claims::Claims;
use super::disk::{Disk, read, write_all};
use super::files::{Contents, File};
use super::format::{HEADER_BYTES, Header, HeaderError, VERSION};
use super::position::Position;
use super::queue::{Mode, Queue, Start};
use super::reader::{Part, Record, SegmentReader};
use super::writer::{Begin, Failure, Segment, Writer, clean, tried};
use super::{Log, Options};

/// The most places of damage that a report names. More are counted.
const DAMAGES_MAX: usize = 1000;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The disk does not work.
    #[error("cannot {0}")]
    Disk(Failure),
    /// A segment is of another version of the format.
    #[error(
        "{file} has version {found} of the log's format, and this program reads version {VERSION}: use the program that wrote it"
    )]
    Version {
        /// The segment's file.
        file: String,
        /// Its version.
        found: u32,
    },
}

impl From<Failure> for OpenError {
    fn from(failure: Failure) -> Self {
        Self::Disk(failure)
    }
}

/// The kind of a damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DamageKind {
    /// Bytes that were on the disk: at least one record is lost, or one of a header's two copies.
    Content,
    /// The end of the last commit. A power cut in the middle of a commit leaves such bytes, and then
    /// nothing acknowledged is lost.
    Unfinished,
    /// A whole segment is missing.
    Missing,
}

/// A place where the log cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// How it came about, as far as the log shows.
    pub kind: DamageKind,
    /// Where it begins.
    pub position: Position,
    /// How many bytes cannot be read. 0: their number is not known.
    pub bytes: u32,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            position,
            bytes,
        } = self;
        match kind {
            DamageKind::Content => write!(f, "{position}: {bytes} damaged bytes"),
            DamageKind::Unfinished => {
                write!(
                    f,
                    "{position}: {bytes} bytes of a commit that is not complete"
                )
            }
            DamageKind::Missing => write!(f, "segment {:08} is missing", position.segment()),
        }
    }
}

/// What a replay found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The log was degraded when its process ended: it lacks records, so it may contradict what others
    /// were told.
    pub stale: bool,
    /// The number of segments.
    pub segments: u64,
    /// Their length, in bytes.
    pub bytes: u64,
    /// The number of intact records.
    pub records: u64,
    /// The places that cannot be read, in order: the first thousand.
    pub damages: Vec<Damage>,
    /// The number of places with damage of the kinds [`DamageKind::Content`] and [`DamageKind::Missing`].
    pub damaged: u64,
}

impl Report {
    fn damage(&mut self, kind: DamageKind, position: Position, bytes: u32) {
        self.damaged += u64::from(kind != DamageKind::Unfinished);
        if self.damages.len() < DAMAGES_MAX {
            self.damages.push(Damage {
                kind,
                position,
                bytes,
            });
        }
    }
}

/// A log before its records are read. Nothing on the disk is changed before [`Replayed::start`].
#[derive(Debug)]
pub struct Recovery<D: Disk> {
    disk: D,
    options: Options,
    contents: Contents,
    /// The headers of the segments, `None` where both copies are damaged.
    headers: Vec<Option<Header>>,
    claims: Arc<Claims>,
}

impl<D: Disk> Recovery<D> {
    /// Finds the log in a directory. An empty directory is an empty log.
    ///
    /// # Errors
    /// [`OpenError`] if the disk fails or the log is of another version.
    pub fn open(disk: D, options: Options) -> Result<Self, OpenError> {
        let names = tried("list", ".", disk.list())?;
        let contents = Contents::of(names.iter().map(String::as_str));
        let mut headers = Vec::new();
        for number in &contents.segments {
            let file = File::Segment(*number).name();
            let bytes = tried("read", &file, read(&disk, &file, HEADER_BYTES as usize))?;
            headers.push(match Header::decode(&bytes) {
                Ok(header) => Some(header).filter(|header| header.segment == *number),
                Err(HeaderError::Damaged) => None,
                Err(HeaderError::Version(found)) => {
                    return Err(OpenError::Version { file, found });
                }
            });
        }
        let first = contents.segments.first().copied();
        let first = first.unwrap_or(contents.unused);
        let next = Position::new(contents.unused, HEADER_BYTES);
        Ok(Self {
            disk,
            options,
            contents,
            headers,
            claims: Arc::new(Claims::new(first, next)),
        })
    }

    /// The claims of the log's records: the owner claims the records that it keeps while they are
    /// replayed.
    pub fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// Hands all intact records to `visit`, in the order in which they were appended. Segments are read one
    /// after the other, each into memory as a whole.
    ///
    /// # Errors
    /// [`OpenError::Disk`] if a segment cannot be read.
    pub fn replay(self, mut visit: impl FnMut(Record<'_>)) -> Result<Replayed<D>, OpenError> {
        let mut report = Report {
            stale: self.contents.stale,
            ..Report::default()
        };
        let salt = self.headers.iter().flatten().map(|h| h.salt).next();
        let salt = salt.unwrap_or(self.options.salt);
        let mut segments = VecDeque::new();
        let mut last = None;
        let numbers = &self.contents.segments;
        for (at, &number) in numbers.iter().enumerate() {
            if let Some(before) = at.checked_sub(1).map(|before| numbers[before]) {
                for missing in before + 1..number {
                    report.damage(DamageKind::Missing, Position::new(missing, 0), 0);
                }
            }
            let next = numbers.get(at + 1).filter(|next| **next == number + 1);
            let known_end = next.and_then(|_| self.headers[at + 1]?.previous_end);
            let file = File::Segment(number).name();
            let bytes = tried("read", &file, read(&self.disk, &file, usize::MAX))?;
            let read = replay_segment(&bytes, number, salt, known_end, &mut report, &mut visit);
            if at + 1 == numbers.len() {
                last = Some(LastCommit {
                    from: read.start,
                    bytes: bytes.get(read).unwrap_or_default().to_vec(),
                });
            }
            let bytes = bytes.len() as u64;
            report.segments += 1;
            report.bytes += bytes;
            segments.push_back(Segment { number, bytes });
        }
        Ok(Replayed {
            disk: self.disk,
            options: self.options,
            contents: self.contents,
            claims: self.claims,
            salt,
            segments,
            last,
            report,
        })
    }
}

/// Reads one segment. Returns the place of its last commit, in bytes from its start.
fn replay_segment(
    bytes: &[u8],
    number: u32,
    salt: u64,
    known_end: Option<u32>,
    report: &mut Report,
    visit: &mut impl FnMut(Record<'_>),
) -> Range<usize> {
    // A segment without any byte of a record has no header when the power failed.
    let began = bytes.iter().take(HEADER_BYTES as usize).any(|b| *b != 0);
    let copies = Header::copies_intact(bytes);
    let has_header = known_end.map_or(began, |end| end > HEADER_BYTES);
    if has_header && copies != [true, true] {
        let kind = match known_end.is_some() || bytes.len() > HEADER_BYTES as usize {
            true => DamageKind::Content,
            false => DamageKind::Unfinished,
        };
        report.damage(kind, Position::new(number, 0), HEADER_BYTES);
    }
    let mut reader = SegmentReader::new(bytes, number, salt, known_end);
    let mut damages = Vec::new();
    let mut count = 0u64;
    for part in reader.by_ref() {
        match part {
            Part::Record(record) => {
                count += 1;
                visit(record);
            }
            Part::Damaged { position, bytes } => damages.push((position, bytes)),
        }
    }
    report.records += count;
    for (position, bytes) in damages {
        let may_be_unfinished = known_end.is_none() && position.offset() >= reader.last_commit();
        let kind = match may_be_unfinished {
            true => DamageKind::Unfinished,
            false => DamageKind::Content,
        };
        report.damage(kind, position, bytes);
    }
    // The header is written with the first commit.
    let from = Some(reader.last_commit()).filter(|from| *from > HEADER_BYTES);
    from.unwrap_or(0) as usize..reader.records_end() as usize
}

/// The last commit of a segment.
#[derive(Debug)]
struct LastCommit {
    /// Where it begins, in bytes from the start of the segment.
    from: usize,
    bytes: Vec<u8>,
}

/// A log whose records were read.
#[derive(Debug)]
pub struct Replayed<D: Disk> {
    disk: D,
    options: Options,
    contents: Contents,
    claims: Arc<Claims>,
    salt: u64,
    segments: VecDeque<Segment>,
    /// The last commit of the last segment.
    last: Option<LastCommit>,
    /// The state of the log.
    pub report: Report,
}

impl<D: Disk> Replayed<D> {
    /// Makes the log ready to be appended to. Records go into a new segment, never behind the end of an
    /// old one. A log that was degraded still is: the writer's first steps write a fresh one from memory.
    ///
    /// # Errors
    /// [`OpenError::Disk`] if the disk cannot be written.
    pub fn start(mut self) -> Result<(Log, Writer<D>), OpenError> {
        let last = self.segments.back().zip(self.last.take());
        let last_end = last.as_ref().map(|(_, last)| last.from + last.bytes.len());
        if let Some((segment, last)) = last {
            // The process that wrote it may have died before it synced it, or when that had failed: then
            // the system takes bytes to be on the disk that are not. Writing them again makes sure. All
            // earlier commits were on the disk before this one began.
            let name = File::Segment(segment.number).name();
            let file = tried("open", &name, self.disk.open_to_write(&name))?;
            let written = write_all(&self.disk, &file, last.from as u64, &last.bytes);
            tried("write", &name, written)?;
            tried("sync", &name, self.disk.sync_data(&file))?;
            tried("trim", &name, self.disk.trim(&file))?;
        }
        clean(&self.disk)?;
        let segment = self.contents.unused;
        let first = self.contents.first.unwrap_or(segment);
        let mark = match self.contents.stale {
            true => File::Stale(first),
            false => File::Live(first),
        };
        let names = tried("list", ".", self.disk.list())?;
        if !names.contains(&mark.name()) {
            tried("create", &mark.name(), self.disk.create(&mark.name()))?;
        }
        tried("sync", ".", self.disk.sync_names())?;
        let follows = self
            .segments
            .back()
            .is_some_and(|s| s.number + 1 == segment);
        let start = Start {
            mode: match self.contents.stale {
                true => Mode::Degraded,
                false => Mode::Durable,
            },
            segment,
            previous_end: last_end.filter(|_| follows).map(|end| end as u32),
            salt: self.salt,
        };
        self.options.salt = self.salt;
        let queue = Arc::new(Queue::new(self.options, self.claims, start));
        let writer = Writer::new(Begin {
            disk: self.disk,
            queue,
            segments: self.segments,
            first,
            unused: segment,
        });
        Ok((writer.log(), writer))
    }
}
