//! Messages go into the log, each once for all sessions, and checkpoints of the sessions that have them.

use crate::mqtt::{Addressee, LinkOrigin, Message, Numbered, QoS, RecordPlace};
use crate::store::log::{Claim, Life, Log, Pass, Piece, Position, Room};
use crate::store::records::{
    AddresseeRecord, CHECKPOINT, CheckpointRecord, LinkReceived, LinkReleased, MESSAGE,
    MessageRecord,
};
use crate::time::{Millis, UnixMillis};
use crate::topics::FilterId;

use crate::router::messages::{Appended, Committed, Unwritten};
use crate::router::sessions::Sessions;
use crate::router::sessions::persist::record::{content_of, expiry_of};
use crate::router::sessions::persist::{BATCH_RECORDS_MAX, CHUNK, SessionBatch, TOO_LARGE};
use crate::router::sessions::shard::Shard;

/// A larger checkpoint is written only if it is small beside the records of messages since the last one.
const SMALL_CHECKPOINT_BYTES: usize = 64 * 1024;

impl Sessions {
    /// Appends messages to the log, and a checkpoint if it is due. Returns whether there was room for all.
    pub(super) fn append_messages(
        &self,
        log: &Log,
        room: &mut Room,
        batch: &mut SessionBatch,
        body: &mut Vec<u8>,
    ) -> bool {
        let Some(kept) = self.numbers.kept() else {
            return true;
        };
        while batch.records() < BATCH_RECORDS_MAX {
            let Some(next) = self.numbers.pop() else {
                return self.append_checkpoint(log, room, batch, body);
            };
            let had_room = match &next {
                Unwritten::Message(message) => {
                    append_message(log, room, batch, (message, kept.started_at), body)
                }
                Unwritten::Released(released, committed) => {
                    self.append_released(log, room, batch, (*released, committed))
                }
            };
            if !had_room {
                self.numbers.put_back(next);
                return false;
            }
        }
        false
    }

    fn append_released(
        &self,
        log: &Log,
        room: &mut Room,
        batch: &mut SessionBatch,
        (released, committed): (LinkReleased, &Committed),
    ) -> bool {
        let appended = self.numbers.received.append_release(log, room, released);
        match appended {
            Appended::NoRoom(needed) => {
                batch.needs = Some(needed);
                false
            }
            Appended::At(position) => {
                batch.last = position.or(batch.last);
                batch.released.push(committed.clone());
                true
            }
        }
    }

    /// Appends a checkpoint if it is due. Returns whether there was room for it.
    fn append_checkpoint(
        &self,
        log: &Log,
        room: &mut Room,
        batch: &mut SessionBatch,
        body: &mut Vec<u8>,
    ) -> bool {
        let Some(written) = self.numbers.take_checkpoint() else {
            return true;
        };
        body.clear();
        self.checkpoint().encode(body);
        if body.len() > SMALL_CHECKPOINT_BYTES.max(written as usize / 2) {
            // Many clients have messages in flight. Later there may be fewer.
            return true;
        }
        let needed = Log::record_bytes(body.len());
        if room.bytes() < needed {
            batch.needs = Some(needed);
            self.numbers.ask_for_checkpoint();
            return false;
        }
        if let Ok(Some(position)) = log.append(room, CHECKPOINT, &[body], Life::Living) {
            batch.last = Some(position);
            self.numbers.checkpointed(written);
            let claim = Claim::new(position, body.len());
            if let Some(before) = self.checkpoint.lock().replace(claim) {
                log.claims().release(before);
            }
        }
        true
    }

    /// The bytes of the last checkpoint in the log.
    #[cfg(test)]
    pub(crate) fn checkpoint_bytes(&self) -> u64 {
        self.checkpoint.lock().map_or(0, |claim| claim.bytes.into())
    }

    /// How far the sessions of connected clients are now.
    fn checkpoint(&self) -> CheckpointRecord {
        let through = self.numbers.through();
        let mut checkpoint = CheckpointRecord {
            through,
            behind: Vec::new(),
        };
        for number in self.shards() {
            let mut next = Some(0);
            // The lock is given back in between: messages that arrive meanwhile have later numbers.
            while let Some(from) = next {
                let shard = self.shard(number);
                next = shard.add_to_checkpoint(from, &mut checkpoint.behind, through);
            }
        }
        checkpoint
    }

    /// Writes the state of the links and the checkpoint again, where they belong to a pass of the log.
    pub(super) fn rewrite_rest(&self, log: &Log, pass: Pass, piece: &mut Piece<'_>) {
        if let Some(kept) = self.numbers.kept() {
            let mut body = Vec::new();
            for message in self.numbers.received.all() {
                rewrite(&message, pass, kept.started_at, piece, &mut body);
            }
        }
        let old = *self.checkpoint.lock();
        let belongs = match pass {
            Pass::All => true,
            Pass::Until(last) => old.is_some_and(|claim| claim.segment <= last),
        };
        if !belongs || self.numbers.kept().is_none() {
            return;
        }
        let mut body = Vec::new();
        self.checkpoint().encode(&mut body);
        if let Ok(Some(position)) = piece.append(CHECKPOINT, &[&body]) {
            let claim = Claim::new(position, body.len());
            if let Some(before) = self.checkpoint.lock().replace(claim) {
                log.claims().release(before);
            }
        }
    }
}

impl Shard {
    /// Adds some of the sessions that a checkpoint would count as done, and that are not: by incarnation, with
    /// the lowest number of a message that is not done. Begins with slot `from`, and returns the slot to go on
    /// with.
    fn add_to_checkpoint(
        &self,
        from: usize,
        behind: &mut Vec<(u64, u64)>,
        through: u64,
    ) -> Option<usize> {
        let journal = self.journal.as_ref()?;
        let end = (from + CHUNK).min(self.slots.capacity());
        for at in from as u32..end as u32 {
            let Some(slot) = self.slots.get(at as usize) else {
                continue;
            };
            if !journal.is_recorded_connected(at) {
                continue;
            }
            let lowest = slot.session.lowest_owed();
            // Its client is away: all later messages are not done.
            let away_since = journal.through(at).map(|number| number + 1);
            let lowest = lowest.into_iter().chain(away_since).min();
            if let Some(lowest) = lowest.filter(|lowest| *lowest <= through) {
                behind.push((slot.session.incarnation.get(), lowest));
            }
        }
        (end < self.slots.capacity()).then_some(end)
    }

    /// Writes the messages of a session's queue again, if they belong to a pass of the log.
    pub(super) fn rewrite_messages_of(
        &self,
        pass: Pass,
        at: u32,
        piece: &mut Piece<'_>,
        body: &mut Vec<u8>,
    ) {
        let (Some(journal), Some(slot)) = (&self.journal, self.slots.get(at as usize)) else {
            return;
        };
        let started_at = journal.started_at();
        for message in slot.session.owed().filter_map(|owed| owed.message) {
            rewrite(message, pass, started_at, piece, body);
        }
    }

    /// Writes the messages of the backlogs again, if they belong to a pass of the log. Returns whether all are
    /// written.
    pub(super) fn rewrite_backlogs(
        &self,
        pass: Pass,
        piece: &mut Piece<'_>,
        body: &mut Vec<u8>,
    ) -> bool {
        let Some(journal) = &self.journal else {
            return true;
        };
        let started_at = journal.started_at();
        for filter in &self.backlogs.filters {
            for message in self.backlog_messages(*filter) {
                if piece.is_full() {
                    return false;
                }
                rewrite(message, pass, started_at, piece, body);
            }
        }
        true
    }

    fn backlog_messages(&self, filter: FilterId) -> impl Iterator<Item = &Message> {
        let members = self.members.get(&filter);
        let backlog = members.and_then(|m| m.backlog.as_ref());
        backlog
            .into_iter()
            .flat_map(|b| b.since(0))
            .map(|entry| &entry.message)
    }
}

/// Appends the record of a message, if it wants one. Returns whether there was room.
pub(super) fn append_message(
    log: &Log,
    room: &mut Room,
    batch: &mut SessionBatch,
    (message, started_at): (&Message, UnixMillis),
    body: &mut Vec<u8>,
) -> bool {
    let Some(numbered) = message.numbered() else {
        return true;
    };
    let mut needs = None;
    if numbered.wants_record() && !is_unneeded(message, numbered) {
        numbered.append(|addressees, link_origin| {
            body.clear();
            encode(message, numbered, (addressees, link_origin), started_at, body);
            let needed = Log::record_bytes(body.len());
            if room.bytes() < needed {
                needs = Some(needed);
                return None;
            }
            match log.append(room, MESSAGE, &[body], Life::Living) {
                Ok(position) => {
                    let position = position?;
                    batch.message_bytes += body.len() as u64;
                    batch.last = Some(position);
                    Some(place(position, body.len()))
                }
                Err(error) => {
                    if let Some(suppressed) = TOO_LARGE.permit(Millis::ZERO) {
                        tracing::error!(%error, suppressed, "A message could not be written to the log");
                    }
                    None
                }
            }
        });
    }
    if needs.is_some() {
        batch.needs = needs;
        return false;
    }
    batch.messages.push(message.clone());
    true
}

/// Whether nobody but its link and this batch has a message, so that no record is of use.
fn is_unneeded(message: &Message, numbered: &Numbered) -> bool {
    let is_new = numbered.place().is_none() && !numbered.is_settled();
    is_new && message.qos() == QoS::AtLeastOnce && message.refs() <= 2
}

fn place(position: Position, bytes: usize) -> RecordPlace {
    RecordPlace {
        position: position.as_u64(),
        bytes: bytes as u32,
    }
}

fn encode(
    message: &Message,
    numbered: &Numbered,
    (addressees, link_origin): (&[Addressee], Option<LinkOrigin>),
    started_at: UnixMillis,
    out: &mut Vec<u8>,
) {
    let sequence = numbered.sequence();
    let record = MessageRecord {
        sequence,
        origin_mark: numbered.origin_mark(),
        arrived_at: numbered.arrived_at(),
        expires_at: expiry_of(message, started_at),
        received: link_origin.map(|origin| LinkReceived {
            link: origin.link,
            packet_id: origin.packet_id,
            digest: origin.digest,
        }),
        addressees: addressees
            .iter()
            .map(|addressee| AddresseeRecord {
                filter: &addressee.filter,
                member: addressee.member,
                since: (addressee.since != sequence).then_some(addressee.since),
            })
            .collect(),
        content: content_of(message),
    };
    record.encode(out);
}

/// Writes a message again, if it belongs to a pass of the log and was not written in it yet.
fn rewrite(
    message: &Message,
    pass: Pass,
    started_at: UnixMillis,
    piece: &mut Piece<'_>,
    body: &mut Vec<u8>,
) {
    let Some(numbered) = message.numbered() else {
        return;
    };
    let segment = numbered.place().map(segment_of);
    let belongs = match pass {
        Pass::All => segment.is_none_or(|segment| segment < piece.first_segment()),
        Pass::Until(last) => segment.is_some_and(|segment| segment <= last),
    };
    if !belongs {
        return;
    }
    numbered.append(|addressees, link_origin| {
        body.clear();
        encode(
            message,
            numbered,
            (addressees, link_origin),
            started_at,
            body,
        );
        // A record that was appended before is not too large now.
        let position = piece.append(MESSAGE, &[body]).ok().flatten()?;
        Some(place(position, body.len()))
    });
}

fn segment_of(place: RecordPlace) -> u32 {
    Position::from_u64(place.position).segment()
}
