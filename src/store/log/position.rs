//! Places in the log.

use std::fmt;

/// A place in the log: the number of a segment, and an offset in bytes inside it. A later record has
/// a greater position, and a process uses no position twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(u64);

impl Position {
    /// The place `offset` bytes behind the start of a segment.
    pub const fn new(segment: u32, offset: u32) -> Self {
        Self((segment as u64) << 32 | offset as u64)
    }

    /// The number of the segment.
    pub const fn segment(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Bytes from the start of the segment.
    pub const fn offset(self) -> u32 {
        self.0 as u32
    }

    /// Segment and offset in one number, which grows with the position.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The place of a number of [`Position::as_u64`].
    pub const fn from_u64(number: u64) -> Self {
        Self(number)
    }

    /// The place `bytes` further in the same segment.
    pub(super) const fn plus(self, bytes: u32) -> Self {
        Self(self.0 + bytes as u64)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {:08}, offset {}", self.segment(), self.offset())
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment(), self.offset())
    }
}
