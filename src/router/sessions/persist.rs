//! Sessions go into the log: the marked ones for the persist task, and all of them for the log itself.

use crate::session::Session;
use crate::store::log::{Life, Log, Pass, Piece, Position, Progress, Room};
use crate::store::records::{
    self, END_BYTES, SessionRecord, SubscriptionRecord, WillRecord, encode_end,
};
use crate::telemetry::RateLimited;
use crate::time::Millis;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;
use std::time::Duration;

use crate::router::account::Holder;
use crate::router::handle::ConnectionHandle;
use crate::router::sessions::journal::{
    Journal, JournalTimes, Marked, Recorded, RestoredClient, is_kept,
};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::slot::Slot;
use crate::router::sessions::{SHARDS, Sessions};
use crate::router::types::SessionRef;

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
}

impl SessionBatch {
    /// Whether it has no session.
    pub(crate) fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.last.is_none()
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
    /// From now on changes of sessions are marked for the log.
    pub(crate) fn keep_in_log(&self, times: JournalTimes) {
        for number in self.shards() {
            let journal = Journal::new(number, self.marked.clone(), times);
            self.shard(number).journal = Some(Box::new(journal));
        }
    }

    /// The shards' marks, which filters have in common with them.
    pub(crate) fn marks(&self) -> &Arc<Marked> {
        &self.marked
    }

    /// How long after a start no session ends and no will is published.
    pub(crate) fn restart_grace(&self) -> Duration {
        let shard = self.shard(0);
        let journal = shard.journal.as_ref();
        journal.map_or(Duration::ZERO, |journal| journal.restart_grace())
    }

    /// Incarnations go on behind this one.
    pub(crate) fn incarnations_from(&self, largest: u64) {
        self.incarnations.fetch_max(largest, Ordering::Relaxed);
    }

    /// Adds a session of an earlier process, whose record is at `place`. `publish_link` chooses its publish
    /// link.
    pub(crate) fn restore(
        &self,
        session: Session,
        holder: Holder,
        client: RestoredClient,
        place: (Position, u32),
        publish_link: impl Fn(SessionRef) -> u8,
    ) -> SessionRef {
        let mut shard = self.shard(self.shard_of(session.key.client_id()));
        let at = shard.insert(session, holder);
        let reference = shard.reference(at);
        shard.slots[at as usize].publish_link = publish_link(reference);
        shard.begin_absence(at);
        shard.rejoin(at);
        shard.hold(at);
        shard.settle(at);
        let Shard { slots, journal, .. } = &mut *shard;
        if let (Some(journal), Some(slot)) = (journal, slots.get(at as usize)) {
            journal.restored(at, &slot.session, place, client);
        }
        self.charge(&mut shard);
        reference
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
        !self.marked.is_empty()
    }

    /// Appends marked sessions to the log, as many as find room. `from` is the shard to begin with.
    pub(crate) fn append_marked(&self, log: &Log, room: &mut Room, from: &mut u16) -> SessionBatch {
        let mut batch = SessionBatch::default();
        let marked = self.marked.take();
        let mut body = Vec::new();
        let mut is_full = false;
        let first = *from;
        for number in (0..SHARDS as u16).map(|n| (first + n) % SHARDS as u16) {
            if marked & 1 << number == 0 {
                continue;
            }
            loop {
                let mut shard = self.shard(number);
                let look = match is_full {
                    true => Look::Full,
                    false => shard.append_marked(log, room, &mut batch, &mut body),
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
        batch
    }

    /// The records of a batch are on the disk, or the log is degraded: the connections that waited for
    /// them go on.
    pub(crate) fn committed(&self, batch: &SessionBatch) {
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
    ) -> Progress {
        let mut body = Vec::new();
        while usize::from(next.0) < SHARDS {
            let mut shard = self.shard(next.0);
            let end = (next.1 + CHUNK).min(shard.slots.capacity());
            while next.1 < end {
                if piece.is_full() {
                    return Progress::More;
                }
                shard.rewrite(log, pass, next.1 as u32, piece, &mut body);
                next.1 += 1;
            }
            if next.1 >= shard.slots.capacity() {
                *next = (next.0 + 1, 0);
            }
        }
        Progress::Done
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
        body: &mut Vec<u8>,
    ) -> Look {
        let Some(journal) = &mut self.journal else {
            return Look::Done;
        };
        for _ in 0..CHUNK {
            if batch.sessions.len() >= BATCH_RECORDS_MAX {
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
            let Some(slot) = self.slots.get(at as usize) else {
                continue;
            };
            let kept = is_kept(&slot.session);
            let old = journal.recorded(at).copied();
            let ended = old.filter(|r| !kept || r.incarnation != slot.session.incarnation.get());
            body.clear();
            if kept {
                record_of(at, slot, journal).encode(body);
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
        body: &mut Vec<u8>,
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
        record_of(at, slot, journal).encode(body);
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

/// A session as the log is to have it.
fn record_of<'a>(at: u32, slot: &'a Slot, journal: &Journal) -> SessionRecord<'a> {
    let session: &Session = &slot.session;
    let unknown = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let subscriptions = session.subscriptions().iter();
    SessionRecord {
        incarnation: session.incarnation.get(),
        key: session.key.as_str(),
        principal: &session.principal,
        anonymous: slot.holder.is_anonymous(),
        address: journal.address(at, slot).unwrap_or(unknown),
        level: session.version() as u8,
        bridge: session.is_bridge(),
        over: session.is_closed(),
        expiry: session.expiry,
        detached_at: journal.detached_at(at, session),
        gaps: session.gaps,
        last_id: session.last_id(),
        will: session.will().map(|will| WillRecord {
            topic: will.message.topic(),
            properties: will.message.properties(),
            payload: will.message.payload(),
            qos: will.message.qos() as u8,
            retain: will.message.retain(),
            delay: will.delay,
            message_expiry: will.message_expiry,
        }),
        subscriptions: subscriptions
            .map(|s| SubscriptionRecord {
                name: &s.name,
                options: s.options.to_u8(),
                asked: s.asked as u8,
                identifier: s.identifier,
                wild_below: s.wild_below,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests;
