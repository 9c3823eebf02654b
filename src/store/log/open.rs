//! Reads a log after a restart, past damage, and goes on behind it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::claims::Claims;
use super::disk::{Content, Disk, read};
use super::failure::{Failure, tried};
use super::files::{Contents, File};
use super::format::{
    BODY_BYTES_MAX, HEADER_BYTES, Header, HeaderError, RECORD_HEAD_BYTES, VERSION,
};
use super::position::Position;
use super::queue::{Mode, Queue, Start};
use super::reader::Record;
use super::report::{Damage, DamageKind, Report};
use super::segment::{Context, Mend, Segment, read_segment};
use super::writer::{Begin, Writer, clean};
use super::{Log, Options};

/// The length of a segment whose only record is the largest one, in bytes.
const LARGEST_BYTES: usize = HEADER_BYTES as usize + RECORD_HEAD_BYTES as usize + BODY_BYTES_MAX;

/// The most bytes of a segment with several records: with the largest record behind it, offsets still have 32
/// bits.
const SEGMENT_BYTES_MAX: u32 = 1 << 30;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be read or written.
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

/// A log before its records are read. Nothing on the disk is changed before [`Replayed::start`].
#[derive(Debug)]
pub struct Recovery<D: Disk> {
    disk: D,
    /// With the salt of the log.
    options: Options,
    contents: Contents,
    /// The headers of the segments, and whether both copies are intact. `None` where both are damaged.
    headers: Vec<Option<(Header, bool)>>,
    claims: Arc<Claims>,
}

impl<D: Disk> Recovery<D> {
    /// Finds the log in a directory. An empty directory is an empty log.
    ///
    /// # Errors
    /// [`OpenError`] if the directory cannot be read or the log is of another version.
    pub fn open(disk: D, mut options: Options) -> Result<Self, OpenError> {
        options.segment_bytes = options.segment_bytes.min(SEGMENT_BYTES_MAX);
        let names = tried("list", ".", disk.list())?;
        let contents = Contents::of(names.iter().map(String::as_str));
        let mut headers = Vec::new();
        for number in &contents.segments {
            let file = File::Segment(*number).name();
            let content = tried("read", &file, read(&disk, &file, HEADER_BYTES as usize))?;
            headers.push(match Header::decode(&content.bytes) {
                Ok(read) => Some(read).filter(|(header, _)| header.segment == *number),
                Err(HeaderError::Damaged) => None,
                Err(HeaderError::Version(found)) => {
                    return Err(OpenError::Version { file, found });
                }
            });
        }
        if let Some((header, _)) = headers.iter().flatten().next() {
            options.salt = header.salt;
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

    /// Whether the directory contains a file of a log.
    pub(super) fn has_log(&self) -> bool {
        self.contents.first.is_some()
    }

    /// The claims of the log's records: the owner claims the records that it keeps while they are
    /// replayed.
    pub fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// Hands all intact records to `visit`, in the order in which they were appended. Segments are read one
    /// after the other, each into memory as a whole. Damage does not end the replay: it is in the
    /// [report](Replayed::report).
    ///
    /// # Errors
    /// [`OpenError::Disk`] if a file cannot be opened, or reading fails otherwise than by damage.
    pub fn replay(self, mut visit: impl FnMut(Record<'_>)) -> Result<Replayed<D>, OpenError> {
        let mut report = self.report();
        let mut segments = VecDeque::new();
        let mut mend = None;
        let mut previous_end = None;
        for at in 0..self.contents.segments.len() {
            let context = self.context(at, &mut report);
            let number = context.number;
            let content = self.read(&context)?;
            let outcome = read_segment(&content, &context, &mut visit);
            if context.is_last && !outcome.is_unreadable() {
                let follows = segments.back().map(|last: &Segment| last.number + 1) == Some(number);
                let previous_end = previous_end.filter(|_| follows);
                mend = Some(Mend::new(&content, &context, &outcome, previous_end));
            }
            report.records += outcome.records;
            report.segments += 1;
            report.bytes += content.len;
            previous_end = (!outcome.is_unreadable()).then_some(outcome.records_end);
            segments.push_back(Segment {
                number,
                bytes: content.len,
                unreadable: outcome.is_unreadable(),
            });
            for damage in outcome.damages {
                report.damage(damage);
            }
        }
        Ok(Replayed {
            disk: self.disk,
            options: self.options,
            contents: self.contents,
            claims: self.claims,
            segments,
            mend,
            last_end: previous_end,
            report,
        })
    }

    /// A report before any segment is read.
    fn report(&self) -> Report {
        let mut report = Report {
            stale: self.contents.stale,
            foreign: self.contents.foreign.clone(),
            ..Report::default()
        };
        for number in &self.contents.set_aside {
            report.damage(Damage::of_segment(DamageKind::SetAside, *number));
        }
        report
    }

    /// The facts about the segment at `at` in the order of the log. Segments missing before it are
    /// reported.
    fn context(&self, at: usize, report: &mut Report) -> Context {
        let numbers = &self.contents.segments;
        let number = numbers[at];
        if let Some(before) = at.checked_sub(1).map(|before| numbers[before]) {
            for missing in before + 1..number {
                report.damage(Damage::of_segment(DamageKind::Missing, missing));
            }
        }
        let follows = numbers.get(at + 1) == Some(&(number + 1));
        let next = self.headers.get(at + 1).filter(|_| follows);
        Context {
            number,
            salt: self.options.salt,
            header: self.headers[at],
            known_end: next.and_then(|next| next.as_ref()?.0.previous_end),
            is_last: at + 1 == numbers.len(),
            commit_bytes_max: self.options.commit_bytes_max,
        }
    }

    fn read(&self, context: &Context) -> Result<Content, OpenError> {
        let file = File::Segment(context.number).name();
        let largest = LARGEST_BYTES.max(self.options.segment_bytes as usize);
        let known_end = context.known_end.map_or(largest, |end| end as usize);
        let content = read(&self.disk, &file, known_end.min(largest));
        Ok(tried("read", &file, content)?)
    }
}

/// A log whose records were read.
#[derive(Debug)]
pub struct Replayed<D: Disk> {
    disk: D,
    options: Options,
    contents: Contents,
    claims: Arc<Claims>,
    segments: VecDeque<Segment>,
    /// The end of the last segment.
    mend: Option<Mend>,
    /// Where the records of the last segment end.
    last_end: Option<u32>,
    /// The state of the log.
    pub report: Report,
}

impl<D: Disk> Replayed<D> {
    /// Makes the log ready to be appended to. Records go into a new segment, never behind the end of an
    /// old one. A log that was degraded still is: the writer's first steps write a fresh one from memory.
    ///
    /// If the disk fails or is full, the log begins degraded, and the writer's first step tells why.
    ///
    /// # Errors
    /// [`OpenError::Disk`] if the directory must not be written.
    pub fn start(self) -> Result<(Log, Writer<D>), OpenError> {
        let segment = self.contents.unused;
        let first = self.contents.first.unwrap_or(segment);
        let failure = match self.prepare(first) {
            Ok(()) => None,
            Err(failure) if is_forbidden(&failure.error) => return Err(failure.into()),
            Err(failure) => Some(failure),
        };
        let last = self.segments.back();
        let follows = last.is_some_and(|last| last.number + 1 == segment);
        let start = Start {
            mode: match self.contents.stale || failure.is_some() {
                true => Mode::Degraded,
                false => Mode::Durable,
            },
            segment,
            previous_end: self.last_end.filter(|_| follows),
        };
        let queue = Arc::new(Queue::new(self.options, self.claims, start));
        let writer = Writer::new(Begin {
            disk: self.disk,
            queue,
            segments: self.segments,
            first,
            unused: segment.max(first + 1),
            failure,
        });
        Ok((writer.log(), writer))
    }

    /// Changes the disk before records are written. `first` is the log's first segment.
    fn prepare(&self, first: u32) -> Result<(), Failure> {
        if let Some(mend) = &self.mend {
            mend.write(&self.disk)?;
        }
        clean(&self.disk)?;
        let mark = match self.contents.stale {
            true => File::Stale(first),
            false => File::Live(first),
        };
        let names = tried("list", ".", self.disk.list())?;
        if !names.contains(&mark.name()) {
            tried("create", &mark.name(), self.disk.create(&mark.name()))?;
        }
        tried("sync", ".", self.disk.sync_names())
    }
}

/// Whether an error says that the process must not write, other than that it cannot now.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}
