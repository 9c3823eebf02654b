//! Records that wait for the writer, and tasks that wait for records.
//!
//! A record gets its place when it is appended, so the queue decides which records make up a commit
//! and where a segment ends. The writer takes one commit after the other.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crc32c::crc32c_append;
use parking_lot::{Condvar, Mutex};

use super::claims::{Claim, Claims};
use super::format::{BODY_BYTES_MAX, HEADER_BYTES, Header, RECORD_HEAD_BYTES, RecordHead};
use super::position::Position;
use super::room::Rooms;
use super::{Durability, Life, Options, Refused};

/// A record whose body has this size is a commit of its own: its body is copied before the queue is locked,
/// and never again.
const LARGE_BYTES: usize = 256 * 1024;

/// Whether appended records reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Records are durable once they are committed.
    Durable,
    /// The disk is full or fails: records are not written.
    Degraded,
    /// A fresh log is being written: records are written, but count only once it is complete.
    Returning,
    /// The writer has ended: records are not written.
    Closed,
}

/// Records that are written together, all into one segment.
#[derive(Debug)]
pub(super) struct Commit {
    /// Where the first one is.
    pub(super) position: Position,
    /// The header of the segment, if the first record is the segment's first.
    pub(super) header: Option<Header>,
    pub(super) bytes: Vec<u8>,
    pub(super) records: u32,
    /// The bytes of room that the records take.
    room: usize,
    /// Its only record is large: nothing is added, since that would copy it.
    is_full: bool,
}

impl Commit {
    /// The place behind the last record.
    pub(super) fn end(&self) -> Position {
        self.position.plus(self.bytes.len() as u32)
    }
}

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Wakes the writer's thread.
    wake: Condvar,
    pub(super) rooms: Rooms,
    pub(super) claims: Arc<Claims>,
    pub(super) options: Options,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// Where the next record will be, if the segment has room for it.
    next: Position,
    /// Whether a record was placed in the segment of `next`.
    begun: bool,
    /// The end of the segment before the one of `next`.
    previous_end: Option<u32>,
    commits: VecDeque<Commit>,
    /// Everything before it is on the disk.
    committed: Position,
    waiting: BTreeMap<(Position, u64), Waker>,
    next_waiter: u64,
    /// The log was durable when its writer ended.
    ended_durable: bool,
    /// The writer is to end when nothing waits for it. Producers' records are not written any more.
    stopping: bool,
    /// A buffer of an earlier commit.
    buffer: Vec<u8>,
}

/// Where a log goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub(super) mode: Mode,
    pub(super) segment: u32,
    pub(super) previous_end: Option<u32>,
}

impl Queue {
    pub(super) fn new(options: Options, claims: Arc<Claims>, start: Start) -> Self {
        let next = Position::new(start.segment, HEADER_BYTES);
        claims.set_next(next);
        Self {
            state: Mutex::new(State {
                mode: start.mode,
                next,
                begun: false,
                previous_end: start.previous_end,
                commits: VecDeque::new(),
                committed: next,
                waiting: BTreeMap::new(),
                next_waiter: 0,
                ended_durable: false,
                stopping: false,
                buffer: Vec::new(),
            }),
            wake: Condvar::new(),
            rooms: Rooms::new(options.waiting_bytes_max),
            claims,
            options,
        }
    }

    /// Adds a record, which takes `room` bytes of the producers' room; `None`: it is the writer's own. Returns
    /// `None` if records are not written now.
    pub(super) fn append(
        &self,
        kind: u8,
        body: &[&[u8]],
        life: Life,
        room: Option<usize>,
    ) -> Result<Option<Position>, Refused> {
        let len = body_len(body)?;
        let crc = body.iter().fold(0, |crc, part| crc32c_append(crc, part));
        let large = (len >= LARGE_BYTES).then(|| {
            let mut bytes = Vec::with_capacity(RECORD_HEAD_BYTES as usize + len);
            bytes.extend_from_slice(&[0; RECORD_HEAD_BYTES as usize]);
            extend(&mut bytes, body);
            bytes
        });
        let state = &mut *self.state.lock();
        let has_ended = state.stopping && room.is_some();
        if has_ended || matches!(state.mode, Mode::Degraded | Mode::Closed) {
            return Ok(None);
        }
        let record_bytes = RECORD_HEAD_BYTES + len as u32;
        let opens = state.place(record_bytes, large.is_some(), &self.options);
        let head = RecordHead {
            position: state.next,
            kind,
            body_len: len as u32,
            commit_start: opens,
            filler: false,
        };
        let position = head.position;
        let head = head.encode(self.options.salt, crc);
        let commit = state.commits.back_mut().expect("a place is in a commit");
        match large {
            Some(mut bytes) => {
                bytes[..RECORD_HEAD_BYTES as usize].copy_from_slice(&head);
                commit.bytes = bytes;
            }
            None => {
                commit.bytes.extend_from_slice(&head);
                extend(&mut commit.bytes, body);
            }
        }
        commit.records += 1;
        commit.room += room.unwrap_or(0);
        state.next = position.plus(record_bytes);
        self.claims.set_next(state.next);
        if life == Life::Living {
            self.claims.claim(Claim::new(position, len));
        }
        self.wake.notify_one();
        Ok(Some(position))
    }

    /// Takes the next commit, which stays uncommitted until [`committed`](Self::committed).
    pub(super) fn take(&self) -> Option<Commit> {
        self.state.lock().commits.pop_front()
    }

    /// A commit is on the disk.
    pub(super) fn committed(&self, mut commit: Commit) {
        let mut state = self.state.lock();
        state.committed = commit.end();
        let end = state.committed;
        let later = state.waiting.split_off(&(end, 0));
        let ready = std::mem::replace(&mut state.waiting, later);
        if commit.bytes.capacity() <= 2 * self.options.commit_bytes_max as usize {
            commit.bytes.clear();
            state.buffer = commit.bytes;
        }
        drop(state);
        self.rooms.give_back(commit.room);
        ready.into_values().for_each(Waker::wake);
    }

    /// Nothing is written from now on. `failed` is the commit that could not be written. Returns the place of
    /// the record that would have been next: all places before it may be in use.
    pub(super) fn stop_writing(&self, mode: Mode, failed: Option<Commit>) -> Position {
        let mut state = self.state.lock();
        state.mode = mode;
        let next = state.next;
        let commits = std::mem::take(&mut state.commits);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        let room = commits.iter().chain(&failed).map(|c| c.room).sum();
        self.rooms.give_back(room);
        waiting.into_values().for_each(Waker::wake);
        next
    }

    /// The writer has ended. `intact`: the log on the disk lacks no record that was called safe.
    pub(super) fn end(&self, intact: bool) {
        let mut state = self.state.lock();
        state.ended_durable = intact && state.mode == Mode::Durable;
        drop(state);
        self.stop_writing(Mode::Closed, None);
    }

    /// Records are written again, into a log that begins with segment `first`.
    pub(super) fn begin_fresh(&self, first: u32) {
        let mut state = self.state.lock();
        state.mode = Mode::Returning;
        state.next = Position::new(first, HEADER_BYTES);
        state.begun = false;
        state.previous_end = None;
        state.committed = state.next;
        self.claims.set_next(state.next);
    }

    /// The fresh log is complete.
    pub(super) fn complete(&self) {
        self.state.lock().mode = Mode::Durable;
    }

    pub(super) fn mode(&self) -> Mode {
        self.state.lock().mode
    }

    /// Where the next record will be, unless its segment is full.
    pub(super) fn next(&self) -> Position {
        self.state.lock().next
    }

    /// Everything before this place was written and synced, also into a fresh log that does not count yet.
    pub(super) fn written_to(&self) -> Position {
        self.state.lock().committed
    }

    /// Everything before this place is safe; `None`: nothing is.
    pub(super) fn committed_to(&self) -> Option<Position> {
        self.state.lock().safe_to()
    }

    /// Whether the writer's thread was asked to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.state.lock().stopping
    }

    /// Asks the writer's thread to end when it has written the records that wait now.
    pub(super) fn stop(&self) {
        self.state.lock().stopping = true;
        self.wake.notify_one();
    }

    /// Whether the writer's thread is to end now. A fresh log is completed first.
    pub(super) fn is_stopped(&self) -> bool {
        let state = self.state.lock();
        state.stopping && state.commits.is_empty() && state.mode != Mode::Returning
    }

    /// Blocks the writer's thread until a record waits, the writer is to stop, or `longest` has passed.
    pub(super) fn wait_for_work(&self, longest: Duration) {
        let mut state = self.state.lock();
        if state.commits.is_empty() && !state.stopping {
            self.wake.wait_for(&mut state, longest);
        }
    }

    /// Whether the record at `position` is on the disk; wakes the task when that is decided. `waiter` is
    /// the task's number, once it has one.
    pub(super) fn poll_wait(
        &self,
        position: Position,
        waiter: &mut Option<u64>,
        cx: &Context<'_>,
    ) -> Poll<Durability> {
        if let Some(durability) = self.state.lock().judge(position) {
            return Poll::Ready(durability);
        }
        // A waker runs code of its own when it is cloned and dropped: not under the lock.
        let waker = cx.waker().clone();
        let mut state = self.state.lock();
        if let Some(durability) = state.judge(position) {
            drop(state);
            return Poll::Ready(durability);
        }
        let number = *waiter.get_or_insert_with(|| {
            state.next_waiter += 1;
            state.next_waiter
        });
        let before = state.waiting.insert((position, number), waker);
        drop(state);
        drop(before);
        Poll::Pending
    }

    pub(super) fn stop_waiting(&self, position: Position, waiter: u64) {
        let waker = self.state.lock().waiting.remove(&(position, waiter));
        drop(waker);
    }
}

/// The size of a body that is given in parts.
///
/// # Errors
/// [`Refused::TooLarge`] if a log does not take it.
pub(super) fn body_len(body: &[&[u8]]) -> Result<usize, Refused> {
    let len = body.iter().map(|part| part.len()).sum::<usize>();
    match len > BODY_BYTES_MAX {
        true => Err(Refused::TooLarge(len)),
        false => Ok(len),
    }
}

fn extend(bytes: &mut Vec<u8>, body: &[&[u8]]) {
    for part in body {
        bytes.extend_from_slice(part);
    }
}

impl State {
    /// Everything before this place is safe; `None`: nothing is.
    fn safe_to(&self) -> Option<Position> {
        let is_safe = match self.mode {
            Mode::Durable => true,
            Mode::Closed => self.ended_durable,
            Mode::Degraded | Mode::Returning => false,
        };
        is_safe.then_some(self.committed)
    }

    /// Whether the record at `position` is safe, if that is decided.
    fn judge(&self, position: Position) -> Option<Durability> {
        match self.mode {
            _ if self.safe_to().is_some_and(|safe| position < safe) => Some(Durability::Durable),
            Mode::Durable => None,
            Mode::Closed => Some(Durability::Closed),
            Mode::Degraded | Mode::Returning => Some(Durability::Degraded),
        }
    }

    /// Makes a place at `next` for a record, in the last commit, or in a new one if the record is to be
    /// `alone`. Returns whether the record opens its commit.
    fn place(&mut self, bytes: u32, alone: bool, options: &Options) -> bool {
        if self.begun && self.next.offset().saturating_add(bytes) > options.segment_bytes {
            self.previous_end = Some(self.next.offset());
            self.next = Position::new(self.next.segment() + 1, HEADER_BYTES);
            self.begun = false;
        }
        let joins = self.begun
            && !alone
            && self.commits.back().is_some_and(|last| {
                !last.is_full
                    && last.records < options.commit_records_max
                    && last.bytes.len() + bytes as usize <= options.commit_bytes_max as usize
            });
        if joins {
            return false;
        }
        let header = Header {
            segment: self.next.segment(),
            salt: options.salt,
            previous_end: self.previous_end,
        };
        self.commits.push_back(Commit {
            position: self.next,
            header: (!self.begun).then_some(header),
            bytes: match alone {
                true => Vec::new(),
                false => std::mem::take(&mut self.buffer),
            },
            records: 0,
            room: 0,
            is_full: alone,
        });
        self.begun = true;
        true
    }
}
