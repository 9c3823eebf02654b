//! An append-only log of records on a disk.
//!
//! Its owner's memory is the truth; the log only has to be able to rebuild it. Records are opaque: a
//! kind and a body. [`Log::append`] gives a record its place, one [`Writer`] puts the waiting records
//! on the disk together, [`Log::wait`] ends when a record is there, and [`Recovery::replay`] reads the
//! records again after a restart. `docs/decisions/045-log.md` has the reasons.
//!
//! **Segments.** Records go into files of some megabytes. A record that its owner needs is *living* and
//! has a claim on its segment. Segments are deleted from the oldest on, when they have no claims: a later
//! record may cancel an earlier one, so the later one must not go first. When the log is larger than
//! twice its living records and four segments, the writer asks the owner to write the living records of
//! the oldest segment again, in bounded pieces.
//!
//! **Order of calls.** [`Recovery::open`], [`Recovery::replay`], [`Replayed::start`]; then
//! [`WriterThread::spawn`], or [`Writer::step`] again and again in a simulation.
//!
//! **What a crash may do.** Every record before [`Log::committed`] is read again, unless its segment was
//! deleted. Of the records behind it, any may be read again, also one behind another that is missing, but
//! in their order: records that need each other belong into one body. No other record is read.
//!
//! **A full or failing disk.** The log is then [degraded](Mode::Degraded): [`Log::append`] returns `None`,
//! waiting tasks go on, and the log is marked as stale. Every second the writer tries to write; when that
//! succeeds, it asks the owner for everything that lives, writes a fresh log from it, and deletes the old
//! one. A file whose sync failed is never written again.
//!
//! **Room.** A producer reserves room in bytes before it changes its state, and waits for it without a
//! lock; [`Log::append`] itself never waits. The bytes that wait for the writer are bounded by
//! [`Options::waiting_bytes_max`], or by one larger reservation, and by one piece of the owner's.

mod check;
mod claims;
pub mod disk;
mod failure;
mod files;
mod format;
mod open;
mod position;
mod queue;
mod reader;
mod report;
mod room;
mod segment;
mod thread;
mod writer;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

pub use check::{CheckError, check};
pub use claims::{Claim, Claims};
pub use failure::Failure;
pub use format::{BODY_BYTES_MAX, HEADER_BYTES, Header, HeaderError, RECORD_HEAD_BYTES, VERSION};
pub use open::{OpenError, Recovery, Replayed};
pub use position::Position;
pub use queue::Mode;
pub use reader::{Part, Record, SegmentReader};
pub use report::{Damage, DamageKind, Report};
pub use room::Room;
pub use thread::WriterThread;
pub use writer::{Owner, Pass, Piece, Progress, Sizes, Step, Writer};

use queue::Queue;

/// The log's directory inside a node's data directory.
pub const DIRECTORY: &str = "log";

/// The sizes of a log.
#[derive(Clone, Debug)]
pub struct Options {
    /// A segment ends before it would be larger, in bytes, unless it has a single record. A log takes at most
    /// 1 GiB.
    pub segment_bytes: u32,
    /// The most records in one commit.
    pub commit_records_max: u32,
    /// The most bytes in one commit, unless it has a single record. A log is read with at least the value with
    /// which it was written: more bytes at its end than one commit has are damage.
    pub commit_bytes_max: u32,
    /// The most bytes that producers may have reserved or waiting. A larger record waits until nothing
    /// else does.
    pub waiting_bytes_max: u32,
    /// The most bytes in a piece that the owner writes again, and one record.
    pub piece_bytes_max: u32,
    /// A random number, the salt of a new log's checksums.
    pub salt: u64,
}

impl Options {
    /// The sizes for a real disk.
    pub fn new(salt: u64) -> Self {
        Self {
            segment_bytes: 32 << 20,
            commit_records_max: 512,
            commit_bytes_max: 1 << 20,
            waiting_bytes_max: 8 << 20,
            piece_bytes_max: 256 << 10,
            salt,
        }
    }
}

/// Whether a record's owner will need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It has a [`Claim`] from now on, which its owner releases.
    Living,
    /// It is needed only to judge earlier records, such as the end of a session.
    Passing,
}

/// Whether a record is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is on the disk.
    Durable,
    /// The log is degraded: work goes on from memory.
    Degraded,
    /// The log has ended, and its process does so too.
    Closed,
}

/// Why a record was not appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The body has this many bytes, more than [`BODY_BYTES_MAX`].
    #[error("a record of {0} bytes is too large")]
    TooLarge(usize),
    /// The room that was reserved is smaller than the record.
    #[error("the record has {needed} bytes, and {reserved} were reserved")]
    NoRoom {
        /// The record's size.
        needed: usize,
        /// The rest of the reserved room.
        reserved: usize,
    },
}

/// The side of the log that records are appended to. Clones are the same log.
#[derive(Clone, Debug)]
pub struct Log(Arc<Queue>);

impl Log {
    /// The size of a record in the log, in bytes.
    pub const fn record_bytes(body_len: usize) -> usize {
        RECORD_HEAD_BYTES as usize + body_len
    }

    /// Reserves room for records of `bytes` bytes together, [heads](Self::record_bytes) included, and
    /// waits while too many bytes wait for the writer. A reservation of more than
    /// [`Options::waiting_bytes_max`] waits until nothing else does, and is at most as large as the largest
    /// record. Waiting producers get room in their order. Do not hold a lock over the await.
    pub async fn reserve(&self, bytes: usize) -> Room {
        self.0.rooms.reserve(bytes).await
    }

    /// Reserves room for records of `bytes` bytes together, heads included, if it is there now.
    pub fn try_reserve(&self, bytes: usize) -> Option<Room> {
        self.0.rooms.try_reserve(bytes)
    }

    /// Appends a record: a kind and a body, which is given in parts. It never waits, so it may be called
    /// under a lock, and records are in the log in the order of the calls. `room` pays for the record.
    ///
    /// Returns the record's place. `None`: the log is degraded or has ended, and the record is not
    /// written.
    ///
    /// # Errors
    /// [`Refused`] if the record is too large for a log or for `room`.
    pub fn append(
        &self,
        room: &mut Room,
        kind: u8,
        body: &[&[u8]],
        life: Life,
    ) -> Result<Option<Position>, Refused> {
        let needed = Self::record_bytes(queue::body_len(body)?);
        let taken = room.share_of(needed).ok_or_else(|| Refused::NoRoom {
            needed,
            reserved: room.bytes(),
        })?;
        let position = self.0.append(kind, body, life, Some(taken))?;
        if position.is_some() {
            room.leave(needed, taken);
        }
        Ok(position)
    }

    /// Everything before this place is on the disk, and will be read after a crash. `None`: the log is not
    /// [durable](Mode::Durable), or was not when it ended.
    pub fn committed(&self) -> Option<Position> {
        self.0.committed_to()
    }

    /// Whether records are written.
    pub fn mode(&self) -> Mode {
        self.0.mode()
    }

    /// Waits until the record at `position` is on the disk, or the log is degraded or has ended.
    pub fn wait(&self, position: Position) -> Wait<'_> {
        Wait {
            queue: &self.0,
            position,
            waiter: None,
        }
    }

    /// The claims of living records.
    pub fn claims(&self) -> &Arc<Claims> {
        &self.0.claims
    }
}

/// Ends when a record is on the disk; see [`Log::wait`].
#[derive(Debug)]
#[must_use = "a future does nothing unless it is polled"]
pub struct Wait<'a> {
    queue: &'a Queue,
    position: Position,
    waiter: Option<u64>,
}

impl Future for Wait<'_> {
    type Output = Durability;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Durability> {
        let this = self.get_mut();
        this.queue.poll_wait(this.position, &mut this.waiter, cx)
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter {
            self.queue.stop_waiting(self.position, waiter);
        }
    }
}

#[cfg(test)]
mod tests;
