//! Sessions go into the log: the marked ones for the persist task, and all of them for the log itself.

mod messages;
mod record;
mod restore;

use crate::mqtt::Message;
use crate::store::log::{self, Life, Log, Pass, Piece, Position, Room};
use crate::store::records::{self, END_BYTES, encode_end};
use crate::telemetry::RateLimited;
use crate::time::Millis;

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use crate::router::handle::ConnectionHandle;
use crate::router::messages::Committed;
use crate::router::sessions::journal::{Marked, Recorded, is_kept};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::{SHARDS, Sessions};
use crate::router::types::SessionRef;
use messages::append_message;
use record::record_of;

/// Sessions that are encoded, or looked at, before a shard's lock is given back.
const CHUNK: usize = 64;
/// Records of one batch, at most. The log puts as many on the disk together.
const BATCH_RECORDS_MAX: usize = 512;

static TOO_LARGE: RateLimited = RateLimited::new(Duration::from_secs(1));

/// Sessions that were appended to the log together.
#[derive(Debug, Default)]
#[must_use]
pub(in crate::router) struct SessionBatch {
    /// The place of the last record. `None`: none was appended, or the log is degraded.
    pub last: Option<Position>,
    /// The bytes of room that the next record needs, if it did not find them.
    pub needs: Option<usize>,
    sessions: Vec<Appended>,
    /// Messages whose records are in it. The links wait for them.
    messages: Vec<Message>,
    /// Bytes of their records.
    message_bytes: u64,
    /// Releases of messages of QoS 2, for which the links wait.
    released: Vec<Committed>,
}

impl SessionBatch {
    /// Whether it has nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.records() == 0 && self.last.is_none()
    }

    /// Whether links wait for it.
    pub(crate) fn has_messages(&self) -> bool {
        !self.messages.is_empty() || !self.released.is_empty()
    }

    fn records(&self) -> usize {
        self.sessions.len() + self.messages.len() + self.released.len()
    }

    /// How many sessions it has.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }
}

/// A session of a batch.
#[derive(Clone, Copy, Debug)]
struct Appended {
    session: SessionRef,
    position: Option<Position>,
    /// The connection that waits for the record.
    waits: Option<u64>,
}

/// How far a look at a shard came.
enum Look {
    /// Nothing is marked any more.
    Done,
    More,
    /// The batch, or its room, is used up.
    Full,
}

impl Sessions {
    /// The shards' marks, which filters have in common with them.
    pub(crate) fn marks(&self) -> &Arc<Marked> {
        &self.marked
    }

    /// See [`Router::suspend`](crate::router::Router::suspend).
    pub(crate) fn suspend(&self, reference: SessionRef, connection_no: u64) -> bool {
        let mut shard = self.shard(reference.shard);
        if shard.journal.is_none() {
            return false;
        }
        let slot = shard.connected(reference, connection_no);
        slot.map(|slot| slot.handle = None).is_some()
    }

    /// Whether sessions are marked. Wakes the task behind `waker` when they are.
    pub(crate) fn has_marked(&self, waker: &Waker) -> bool {
        self.marked.waker.take(waker);
        !self.marked.is_empty() || self.numbers.has_work()
    }

    /// Appends marked sessions to the log, as many as find room. `from` is the shard to begin with.
    pub(crate) fn append_marked(&self, log: &Log, room: &mut Room, from: &mut u16) -> SessionBatch {
        let mut batch = SessionBatch::default();
        // Messages up to this number are with their sessions before these are looked at.
        let through = self.numbers.through();
        let marked = self.marked.take();
        let mut body = Vec::new();
        // A message's record comes before those of the sessions that name it.
        let mut is_full = !self.append_messages(log, room, &mut batch, &mut body);
        let first = *from;
        for number in (0..SHARDS as u16).map(|n| (first + n) % SHARDS as u16) {
            if marked & 1 << number == 0 {
                continue;
            }
            loop {
                let mut shard = self.shard(number);
                let look = match is_full {
                    true => Look::Full,
                    false => shard.append_marked(log, room, &mut batch, (through, &mut body)),
                };
                match look {
                    Look::Done => break,
                    Look::More => {}
                    Look::Full => {
                        if !is_full {
                            *from = number;
                        }
                        is_full = true;
                        if let Some(journal) = &shard.journal {
                            journal.look_again();
                        }
                        break;
                    }
                }
            }
        }
        if batch.message_bytes > 0 {
            self.numbers.wrote(batch.message_bytes);
        }
        batch
    }

    /// The records of a batch are on the disk, or the log is degraded: the connections that waited for
    /// them go on.
    pub(crate) fn committed(&self, batch: &SessionBatch) {
        for numbered in batch.messages.iter().filter_map(Message::numbered) {
            numbered.settle();
        }
        for released in &batch.released {
            released.set();
        }
        let same = |a: &Appended, b: &Appended| a.session.shard == b.session.shard;
        for sessions in batch.sessions.chunk_by(same) {
            let mut waking = Vec::new();
            let mut shard = self.shard(sessions[0].session.shard);
            for appended in sessions {
                waking.extend(shard.committed(appended));
            }
            drop(shard);
            for handle in waking {
                handle.raise();
            }
        }
    }

    /// Appends the next living records of a pass of the log. `next` is the shard and slot to go on with.
    pub(crate) fn rewrite(
        &self,
        log: &Log,
        pass: Pass,
        next: &mut (u16, usize),
        piece: &mut Piece<'_>,
    ) -> log::Progress {
        let through = self.numbers.through();
        let mut body = Vec::new();
        while usize::from(next.0) < SHARDS {
            let mut shard = self.shard(next.0);
            let end = (next.1 + CHUNK).min(shard.slots.capacity());
            while next.1 < end {
                if piece.is_full() {
                    return log::Progress::More;
                }
                let at = next.1 as u32;
                shard.rewrite_messages_of(pass, at, piece, &mut body);
                shard.rewrite(log, pass, at, piece, (through, &mut body));
                next.1 += 1;
            }
            if next.1 >= shard.slots.capacity() {
                if !shard.rewrite_backlogs(pass, piece, &mut body) {
                    return log::Progress::More;
                }
                *next = (next.0 + 1, 0);
            }
        }
        self.rewrite_rest(log, pass, piece);
        log::Progress::Done
    }
}

impl Shard {
    /// A session's subscriptions have changed. If its connection withholds the acknowledgement, the
    /// connection waits for the record.
    pub(crate) fn subscriptions_changed(&mut self, at: u32) {
        let Self { slots, journal, .. } = self;
        let Some(journal) = journal else {
            return;
        };
        let Some(slot) = slots.get(at as usize) else {
            return;
        };
        let session = &slot.session;
        let waits = session.connection_ref().is_some_and(|c| c.is_withheld());
        if waits || (is_kept(session) && session.expiry > 0) {
            journal.mark(at, waits);
        }
    }

    /// A session's connection waits for its record.
    pub(super) fn await_commit(&mut self, at: u32) {
        if let Some(journal) = &mut self.journal {
            journal.mark(at, true);
        }
    }

    /// A session has a new connection, whose CONNACK is in the output. It is withheld if the
    /// disk does not know its news: a session that begins anew, another will, another expiry.
    pub(super) fn withhold_connack(&mut self, at: u32, present: bool) {
        let Self { slots, journal, .. } = self;
        let (Some(journal), Some(slot)) = (journal, slots.get_mut(at as usize)) else {
            return;
        };
        let waits = journal.attached(at, &slot.session, present);
        let is_kept = slot.session.expiry > 0;
        if let Some(connection) = slot.session.connection() {
            if is_kept {
                connection.acknowledge_after_commit();
            }
            if waits {
                connection.withhold();
            }
        }
    }

    /// Marks a session if its record does not stand any more.
    pub(super) fn compare_with_record(&mut self, at: u32) {
        if let Some(journal) = &mut self.journal
            && let Some(slot) = self.slots.get(at as usize)
        {
            journal.compare(at, &slot.session);
        }
    }

    /// Marks the sessions whose clients have been away for longer than a flap.
    pub(super) fn mark_away(&mut self, now: Millis) {
        let Self { slots, journal, .. } = self;
        let Some(journal) = journal else {
            return;
        };
        while let Some((at, connection_no)) = journal.next_away(now) {
            let session = slots.get(at as usize).map(|slot| &slot.session);
            let away = session.filter(|s| !s.attached() && s.connection_no() == connection_no);
            if away.is_some_and(is_kept) {
                journal.mark(at, false);
            }
        }
    }

    /// Appends some of the marked sessions.
    fn append_marked(
        &mut self,
        log: &Log,
        room: &mut Room,
        batch: &mut SessionBatch,
        (through, body): (u64, &mut Vec<u8>),
    ) -> Look {
        let Some(journal) = &mut self.journal else {
            return Look::Done;
        };
        for _ in 0..CHUNK {
            if batch.records() >= BATCH_RECORDS_MAX {
                return Look::Full;
            }
            if let Some(removed) = journal.removed.front() {
                let needed = Log::record_bytes(END_BYTES);
                if room.bytes() < needed {
                    batch.needs = Some(needed);
                    return Look::Full;
                }
                append_end(log, room, removed, batch);
                journal.removed.pop_front();
                continue;
            }
            let Some((at, waits)) = journal.next() else {
                return Look::Done;
            };
            let Some(slot) = self.slots.get_mut(at as usize) else {
                continue;
            };
            // The client may get a message of QoS 2 once the session's record is on the disk.
            let started_at = journal.started_at();
            let sent = slot.session.sent_exactly_once();
            let mut unwritten = sent.filter(|m| m.numbered().is_some_and(|n| n.wants_record()));
            let are_written = unwritten.all(|m| {
                let message = (m, started_at);
                append_message(log, room, batch, message, body)
            });
            drop(unwritten);
            if !are_written {
                journal.put_back(at, waits);
                return Look::Full;
            }
            let kept = is_kept(&slot.session);
            let old = journal.recorded(at).copied();
            let ended = old.filter(|r| !kept || r.incarnation != slot.session.incarnation.get());
            body.clear();
            if kept {
                record_of(at, slot, journal, through).encode(body);
            }
            let end = ended.map_or(0, |_| Log::record_bytes(END_BYTES));
            let needed = end + Log::record_bytes(body.len());
            if room.bytes() < needed {
                batch.needs = Some(needed);
                journal.put_back(at, waits);
                return Look::Full;
            }
            if let Some(ended) = ended {
                append_end(log, room, &ended, batch);
                journal.forget(at);
            }
            if kept && slot.session.attached() && slot.session.outbound().entries() > 0 {
                // A checkpoint is to say when these are done.
                batch.message_bytes += body.len() as u64;
            }
            if !slot.session.outbound().done().is_empty() {
                let through = journal.through(at).unwrap_or(through);
                slot.session.outbound_mut().forget_done(through);
            }
            let mut position = None;
            if kept {
                position = append_session(log, room, body, batch);
                let place = position.map(|position| (position, body.len() as u32));
                journal.record(at, &slot.session, place, position.is_none());
                if let Some(claim) = old.filter(|_| ended.is_none()).and_then(|r| r.claim()) {
                    log.claims().release(claim);
                }
            }
            let session = SessionRef {
                shard: self.number,
                slot: at,
                slot_version: slot.slot_version,
            };
            batch.sessions.push(Appended {
                session,
                position,
                waits: waits.then(|| slot.session.connection_no()),
            });
        }
        Look::More
    }

    /// The record of a session is on the disk. Returns the handle of the connection that goes on.
    fn committed(&mut self, appended: &Appended) -> Option<Arc<ConnectionHandle>> {
        let at = appended.session.slot;
        let journal = self.journal.as_mut()?;
        if let Some(position) = appended.position {
            journal.committed(at, position);
        }
        let waits = journal.waits(at);
        let connection_no = appended.waits.filter(|_| !waits)?;
        let slot = self.connected(appended.session, connection_no)?;
        slot.session.connection()?.release();
        slot.woken = true;
        slot.handle.clone()
    }

    /// Appends a session to a piece of the log, if it belongs to the pass.
    fn rewrite(
        &mut self,
        log: &Log,
        pass: Pass,
        at: u32,
        piece: &mut Piece<'_>,
        (through, body): (u64, &mut Vec<u8>),
    ) {
        let Self { slots, journal, .. } = self;
        let (Some(journal), Some(slot)) = (journal, slots.get(at as usize)) else {
            return;
        };
        let old = journal.recorded(at).copied();
        let same = old.is_some_and(|r| r.incarnation == slot.session.incarnation.get());
        let belongs = match pass {
            Pass::All => true,
            Pass::Until(last) => {
                same && old
                    .and_then(|r| r.claim())
                    .is_some_and(|c| c.segment <= last)
            }
        };
        if !belongs || !is_kept(&slot.session) {
            return;
        }
        body.clear();
        record_of(at, slot, journal, through).encode(body);
        // A record that was appended before is not too large now.
        let position = piece.append(records::SESSION, &[body]).ok().flatten();
        let place = position.map(|position| (position, body.len() as u32));
        let committed = pass == Pass::All || old.is_some_and(|r| r.committed);
        journal.record(at, &slot.session, place, committed);
        if let Some(claim) = old.and_then(|r| r.claim()) {
            log.claims().release(claim);
        }
    }
}

fn append_end(log: &Log, room: &mut Room, ended: &Recorded, batch: &mut SessionBatch) {
    let body = encode_end(ended.incarnation);
    let position = log.append(room, records::SESSION_END, &[&body], Life::Passing);
    if let Some(position) = position.ok().flatten() {
        batch.last = Some(position);
    }
    if let Some(claim) = ended.claim() {
        log.claims().release(claim);
    }
}

fn append_session(
    log: &Log,
    room: &mut Room,
    body: &[u8],
    batch: &mut SessionBatch,
) -> Option<Position> {
    match log.append(room, records::SESSION, &[body], Life::Living) {
        Ok(Some(position)) => {
            batch.last = Some(position);
            Some(position)
        }
        Ok(None) => None,
        Err(error) => {
            if let Some(suppressed) = TOO_LARGE.permit(Millis::ZERO) {
                tracing::error!(%error, suppressed, "A session could not be written to the log");
            }
            None
        }
    }
}

#[cfg(test)]
mod tests;
