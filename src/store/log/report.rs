//! The state of a log, as a replay finds it.

use std::fmt;

use super::files::File;
use super::position::Position;

/// The most places of damage that a report names. More are counted.
const DAMAGES_MAX: usize = 1000;

/// The kind of a damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DamageKind {
    /// Bytes that were on the disk: at least one record is lost, or one of a header's two copies.
    Content,
    /// Bytes that the disk does not read.
    Unreadable,
    /// The end of the last commit. A power cut in the middle of a commit leaves such bytes, and then
    /// nothing acknowledged is lost.
    Unfinished,
    /// A whole segment is missing.
    Missing,
    /// A segment without a readable record that an earlier process has set aside.
    SetAside,
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

impl Damage {
    /// Damage of a whole segment.
    pub(super) const fn of_segment(kind: DamageKind, segment: u32) -> Self {
        Self {
            kind,
            position: Position::new(segment, 0),
            bytes: 0,
        }
    }
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
            DamageKind::Unreadable if *bytes == 0 => {
                write!(f, "{position}: the disk cannot read the file")
            }
            DamageKind::Unreadable => write!(f, "{position}: the disk cannot read {bytes} bytes"),
            DamageKind::Unfinished => {
                write!(
                    f,
                    "{position}: {bytes} bytes of a commit that is not complete"
                )
            }
            DamageKind::Missing => write!(f, "segment {:08} is missing", position.segment()),
            DamageKind::SetAside => {
                let segment = position.segment();
                write!(
                    f,
                    "segment {segment:08} has no readable record and is kept as {}",
                    File::Damaged(segment).name()
                )
            }
        }
    }
}

/// What a replay found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The log was degraded when its process ended: it lacks records, so it may contradict what others
    /// were told.
    pub stale: bool,
    /// Files with a segment's ending and a number that no log gives. They were not read.
    pub foreign: Vec<String>,
    /// The number of segments.
    pub segments: u64,
    /// Their length, in bytes.
    pub bytes: u64,
    /// The number of intact records.
    pub records: u64,
    /// The places that cannot be read: the first thousand.
    pub damages: Vec<Damage>,
    /// The number of places with damage of all kinds but [`DamageKind::Unfinished`].
    pub damaged: u64,
}

impl Report {
    pub(super) fn damage(&mut self, damage: Damage) {
        self.damaged += u64::from(damage.kind != DamageKind::Unfinished);
        if self.damages.len() < DAMAGES_MAX {
            self.damages.push(damage);
        }
    }
}
