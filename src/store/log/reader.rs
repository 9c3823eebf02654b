//! Reads the records of one segment from its bytes, past damaged ones.

use super::format::{HEADER_BYTES, Parsed, RECORD_HEAD_BYTES, parse};
use super::position::Position;

/// A record of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Where it is.
    pub position: Position,
    /// What it means to its owner.
    pub kind: u8,
    /// Its content.
    pub body: &'a [u8],
}

impl Record<'_> {
    /// Its size in the log, in bytes.
    pub fn bytes(&self) -> u32 {
        RECORD_HEAD_BYTES + self.body.len() as u32
    }
}

/// A part of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// An intact record.
    Record(Record<'a>),
    /// A hole of an interrupted commit that a start has filled.
    Filler {
        /// Where it begins.
        position: Position,
        /// How many bytes it has.
        bytes: u32,
    },
    /// Bytes that do not belong to an intact record.
    Damaged {
        /// Where they begin.
        position: Position,
        /// How many they are.
        bytes: u32,
    },
}

/// The end of the bytes that are not zeros.
fn data_end(bytes: &[u8]) -> usize {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut end = bytes.len();
    for chunk in bytes.rchunks(ZEROS.len()) {
        if *chunk != ZEROS[..chunk.len()] {
            let last = chunk.iter().rposition(|b| *b != 0);
            return end - chunk.len() + last.map_or(0, |at| at + 1);
        }
        end -= chunk.len();
    }
    0
}

/// Reads the parts of a segment in order.
#[derive(Debug)]
pub struct SegmentReader<'a> {
    bytes: &'a [u8],
    segment: u32,
    salt: u64,
    at: usize,
    /// Where the records end, if the next segment tells.
    known_end: Option<usize>,
    /// Zeros follow.
    data_end: usize,
    records_end: u32,
    last_commit: u32,
    done: bool,
}

impl<'a> SegmentReader<'a> {
    /// Reads `bytes`, the whole content of segment `segment`. `known_end` is the end of its records, in
    /// bytes from its start; without it, the records may end anywhere, and zeros follow them.
    pub fn new(bytes: &'a [u8], segment: u32, salt: u64, known_end: Option<u32>) -> Self {
        Self {
            bytes,
            segment,
            salt,
            at: HEADER_BYTES as usize,
            known_end: known_end.map(|end| end as usize),
            data_end: data_end(bytes),
            records_end: HEADER_BYTES,
            last_commit: HEADER_BYTES,
            done: false,
        }
    }

    /// The end of the last intact record that was read, in bytes from the start of the segment.
    pub fn records_end(&self) -> u32 {
        self.records_end
    }

    /// The end of the bytes that are not zeros, in bytes from the start of the segment.
    pub fn data_end(&self) -> usize {
        self.data_end
    }

    /// The start of the last commit whose first record was read: everything before it was on the disk
    /// when that commit began. In bytes from the start of the segment.
    pub fn last_commit(&self) -> u32 {
        self.last_commit
    }

    fn place(&self, at: usize) -> Position {
        Position::new(self.segment, at as u32)
    }

    fn end(&self) -> usize {
        self.known_end
            .map_or(self.bytes.len(), |end| end.min(self.bytes.len()))
    }

    fn parse(&self, at: usize) -> Parsed<'a> {
        parse(&self.bytes[at..self.end()], self.place(at), self.salt)
    }

    /// Whether the head of a record, or the end, is at this place.
    fn is_boundary(&self, at: usize) -> bool {
        at == self.end() || !matches!(self.parse(at), Parsed::BadHead)
    }

    /// The place of the first intact record or filler from `from` on. Zeros are never one, and a file may end
    /// with very many.
    fn next_intact(&self, from: usize) -> Option<usize> {
        (from..self.end().min(self.data_end))
            .find(|at| matches!(self.parse(*at), Parsed::Record { .. } | Parsed::Filler(_)))
    }

    fn damaged(&mut self, from: usize, to: usize) -> Part<'a> {
        self.at = to;
        Part::Damaged {
            position: self.place(from),
            bytes: (to - from) as u32,
        }
    }

    /// The part behind the last record: damage, or nothing.
    fn tail(&mut self) -> Option<Part<'a>> {
        self.done = true;
        let from = self.at;
        match self.known_end {
            Some(known) if from < known => Some(self.damaged(from, known)),
            None if from < self.data_end => Some(self.damaged(from, self.data_end)),
            _ => None,
        }
    }
}

impl<'a> Iterator for SegmentReader<'a> {
    type Item = Part<'a>;

    fn next(&mut self) -> Option<Part<'a>> {
        let from = self.at;
        if self.done {
            return None;
        }
        if from >= self.end() {
            return self.tail();
        }
        match self.parse(from) {
            Parsed::Record {
                kind,
                body,
                commit_start,
            } => {
                if commit_start {
                    self.last_commit = from as u32;
                }
                let record = Record {
                    position: self.place(from),
                    kind,
                    body,
                };
                self.at += record.bytes() as usize;
                self.records_end = self.at as u32;
                Some(Part::Record(record))
            }
            Parsed::Filler(bytes) => {
                self.at += bytes as usize;
                Some(Part::Filler {
                    position: self.place(from),
                    bytes,
                })
            }
            Parsed::BadBody(bytes) if self.is_boundary(from + bytes as usize) => {
                Some(self.damaged(from, from + bytes as usize))
            }
            // A length that is damaged does not tell where the next record is. The check of the head
            // makes it cheap to try each byte.
            Parsed::BadBody(_) | Parsed::BadHead => match self.next_intact(from + 1) {
                Some(next) => Some(self.damaged(from, next)),
                None => self.tail(),
            },
        }
    }
}
