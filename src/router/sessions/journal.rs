//! The records that a shard's sessions have in the log, and the sessions whose record is to be written anew.
//!
//! Only with `store.durability = "disk"` a shard has a journal. A change of a session marks its slot; the
//! process's persist task then takes the marked slots and appends each session as it is at that moment, so
//! that any number of changes cost one record. A connection whose acknowledgement waits for the record
//! withholds its output until then.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{BuildHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::hashing::{LookUp, LookUpHasher};
use crate::router::handle::TaskWaker;
use crate::router::messages::Numbers;
use crate::router::sessions::came::Replayed;
use crate::router::sessions::slot::Slot;
use crate::session::{Session, Will};
use crate::store::log::{Claim, Position};
use crate::time::{Millis, UnixMillis};

/// A client that is away for less than this writes nothing: flaps are shorter.
const FLAP: Duration = Duration::from_secs(5);

/// The shards that have marked slots, and whether filters are marked.
#[derive(Debug, Default)]
pub(in crate::router) struct Marked {
    /// The numbers of the shards, as bits.
    shards: AtomicU64,
    filters: AtomicBool,
    pub(super) waker: Arc<TaskWaker>,
}

impl Marked {
    fn insert(&self, shard: u16) {
        if self.shards.fetch_or(1 << shard, Ordering::AcqRel) & 1 << shard == 0 {
            self.waker.raise();
        }
    }

    /// Filters, or links, are to be written.
    pub(crate) fn insert_filters(&self) {
        if !self.filters.swap(true, Ordering::AcqRel) {
            self.waker.raise();
        }
    }

    /// Whether filters are marked. Takes the mark.
    pub(crate) fn take_filters(&self) -> bool {
        self.filters.swap(false, Ordering::AcqRel)
    }

    /// Takes the shards.
    pub(super) fn take(&self) -> u64 {
        self.shards.swap(0, Ordering::AcqRel)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.shards.load(Ordering::Acquire) == 0 && !self.filters.load(Ordering::Acquire)
    }
}

/// Why a slot is in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// Its session was removed before its turn. The slot keeps its place for the next one, so that clients
    /// that come and go while the disk is slow do not make the queue longer.
    Cancelled,
    /// The session is to be written.
    Changed,
    /// A connection waits for the record, too.
    Awaited,
}

impl Mark {
    fn of(waits: bool) -> Self {
        match waits {
            true => Self::Awaited,
            false => Self::Changed,
        }
    }
}

/// A session's record in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorded {
    /// Where it is, and the length of its body. `None`: the log was degraded.
    pub(super) place: Option<(Position, u32)>,
    pub(super) incarnation: u64,
    expiry: u32,
    /// The session is over.
    over: bool,
    /// A digest of the will.
    will: Option<u64>,
    /// The client was away.
    detached: bool,
    /// The record is on the disk.
    pub(super) committed: bool,
}

impl Recorded {
    pub(super) fn claim(&self) -> Option<Claim> {
        let (position, len) = self.place?;
        Some(Claim::new(position, len as usize))
    }
}

/// The client of a restored session, as its record says.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct RestoredClient {
    /// When it went away; `None`: it was connected.
    pub detached_at: Option<UnixMillis>,
    pub address: IpAddr,
}

/// The times that a journal knows.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct JournalTimes {
    /// The time of day when the clock was at zero.
    pub started_at: UnixMillis,
    /// How long after a start neither a session ends nor a will is published.
    pub restart_grace: Duration,
}

/// See the module.
#[derive(Debug)]
pub(in crate::router) struct Journal {
    shard: u16,
    marked: Arc<Marked>,
    times: JournalTimes,
    digests: LookUpHasher,
    /// The records of the sessions, by slot.
    recorded: LookUp<u32, Recorded>,
    /// The slots in the queue.
    marks: LookUp<u32, Mark>,
    /// The slots whose sessions are to be written, in the order of their marks, each once.
    queue: VecDeque<u32>,
    /// The records of sessions that were removed, whose end is to be written.
    pub(super) removed: VecDeque<Recorded>,
    /// Slots whose clients went away, with the numbers of their connections, in the order of these times.
    away: VecDeque<(Millis, u32, u64)>,
    /// Restored sessions whose clients have not been back.
    restored: LookUp<u32, RestoredClient>,
    /// For the sessions whose client is away: the last number of a message that was given to them while it
    /// was there.
    through: LookUp<u32, u64>,
    /// How far restored sessions were, while messages are replayed.
    pub(in crate::router) progress: LookUp<u32, Progress>,
    pub(in crate::router) numbers: Arc<Numbers>,
}

/// How far a restored session was with its messages.
#[derive(Clone, Debug, Default)]
pub(in crate::router) struct Progress {
    /// Of the messages up to this number, it was owed only the listed ones.
    pub through: u64,
    /// Earlier messages are done.
    pub lowest: u64,
    /// Messages that it has, or whose delivery goes on already.
    pub listed: BTreeSet<u64>,
    /// The client was connected: no limit of a queue counted.
    pub connected: bool,
}

impl Progress {
    /// Whether the session is owed a message.
    pub(in crate::router) fn owes(&self, message: Replayed) -> bool {
        let Replayed { sequence, since } = message;
        since > self.through && since >= self.lowest && !self.listed.contains(&sequence)
    }
}

/// Whether the log is to have a session.
pub(super) fn is_kept(session: &Session) -> bool {
    session.will().is_some() || (!session.is_closed() && session.expiry > 0)
}

impl Journal {
    pub(super) fn new(
        shard: u16,
        marked: Arc<Marked>,
        times: JournalTimes,
        numbers: Arc<Numbers>,
    ) -> Self {
        Self {
            shard,
            marked,
            times,
            through: LookUp::default(),
            progress: LookUp::default(),
            numbers,
            digests: LookUpHasher::default(),
            recorded: LookUp::default(),
            marks: LookUp::default(),
            queue: VecDeque::new(),
            removed: VecDeque::new(),
            away: VecDeque::new(),
            restored: LookUp::default(),
        }
    }

    fn digest(&self, will: Option<&Will>) -> Option<u64> {
        let will = will?;
        let message = &will.message;
        let mut hasher = self.digests.build_hasher();
        message.topic().hash(&mut hasher);
        message.properties().hash(&mut hasher);
        message.payload().hash(&mut hasher);
        (message.qos() as u8, message.retain()).hash(&mut hasher);
        (will.delay, will.message_expiry).hash(&mut hasher);
        Some(hasher.finish())
    }

    pub(super) fn recorded(&self, at: u32) -> Option<&Recorded> {
        self.recorded.get(&at)
    }

    /// The session's state is appended to the log, or dropped by it.
    pub(super) fn record(
        &mut self,
        at: u32,
        session: &Session,
        place: Option<(Position, u32)>,
        committed: bool,
    ) {
        let recorded = Recorded {
            place,
            incarnation: session.incarnation.get(),
            expiry: session.expiry,
            over: session.is_closed(),
            will: self.digest(session.will()),
            detached: !session.attached(),
            committed,
        };
        self.recorded.insert(at, recorded);
    }

    /// The end of the session's record is appended to the log.
    pub(super) fn forget(&mut self, at: u32) {
        self.recorded.remove(&at);
    }

    /// The record at `position` is on the disk.
    pub(super) fn committed(&mut self, at: u32, position: Position) {
        if let Some(recorded) = self.recorded.get_mut(&at)
            && recorded.place.is_some_and(|(place, _)| place == position)
        {
            recorded.committed = true;
        }
    }

    /// The session is to be written. `waits`: its connection withholds its output until then.
    pub(super) fn mark(&mut self, at: u32, waits: bool) {
        match self.marks.get_mut(&at) {
            Some(Mark::Awaited) => {}
            Some(mark) => *mark = Mark::of(waits),
            None => {
                self.marks.insert(at, Mark::of(waits));
                self.queue.push_back(at);
                self.marked.insert(self.shard);
            }
        }
    }

    /// The next marked slot, without its mark, and whether its connection waits.
    pub(super) fn next(&mut self) -> Option<(u32, bool)> {
        loop {
            let at = self.queue.pop_front()?;
            match self.marks.remove(&at) {
                Some(Mark::Changed) => return Some((at, false)),
                Some(Mark::Awaited) => return Some((at, true)),
                Some(Mark::Cancelled) | None => {}
            }
        }
    }

    /// A slot whose turn is to come again first, because its record did not find room.
    pub(super) fn put_back(&mut self, at: u32, waits: bool) {
        self.marks.insert(at, Mark::of(waits));
        self.queue.push_front(at);
    }

    /// Asks for another look at this shard.
    pub(super) fn look_again(&self) {
        self.marked.insert(self.shard);
    }

    /// Whether a connection waits for the record of this slot again.
    pub(super) fn waits(&self, at: u32) -> bool {
        self.marks.get(&at) == Some(&Mark::Awaited)
    }

    /// Marks the session if its record says something else about its existence, its expiry or its will.
    pub(super) fn compare(&mut self, at: u32, session: &Session) {
        let stands = match self.recorded(at) {
            None => !is_kept(session),
            Some(recorded) => is_kept(session) && self.describes(recorded, session),
        };
        if !stands {
            self.mark(at, false);
        }
    }

    /// Whether the record has the session's existence, expiry and will.
    fn describes(&self, recorded: &Recorded, session: &Session) -> bool {
        recorded.incarnation == session.incarnation.get()
            && recorded.expiry == session.expiry
            && recorded.over == session.is_closed()
            && recorded.will == self.digest(session.will())
    }

    /// The client is connected; `present`: its session is resumed. Marks the session if its record does not
    /// stand. Returns whether CONNACK has to wait for the new record, because the disk does not know yet what
    /// it says.
    pub(super) fn attached(&mut self, at: u32, session: &Session, present: bool) -> bool {
        self.restored.remove(&at);
        self.through.remove(&at);
        let waits = match self.recorded(at) {
            None => session.will().is_some() || (present && is_kept(session)),
            Some(recorded) => !recorded.committed || !self.describes(recorded, session),
        };
        // An earlier connection may have ended before its answer came.
        let waits = waits || self.waits(at);
        let is_away = self.recorded(at).is_some_and(|recorded| recorded.detached);
        let is_new = self.recorded(at).is_none() && is_kept(session);
        if waits || is_away || is_new {
            self.mark(at, waits);
        }
        waits
    }

    /// The client went away. If it stays away, the record is to say so.
    pub(super) fn detached(&mut self, at: u32, session: &Session, now: Millis) {
        self.compare(at, session);
        self.through.insert(at, self.numbers.through());
        self.away.push_back((now, at, session.connection_no()));
    }

    /// The last number of a message that was given to a session while its client was there, if the client is
    /// away.
    pub(super) fn through(&self, at: u32) -> Option<u64> {
        self.through.get(&at).copied()
    }

    /// Whether the last record says that the client was connected.
    pub(super) fn is_recorded_connected(&self, at: u32) -> bool {
        self.recorded(at).is_some_and(|recorded| !recorded.detached)
    }

    /// The next client that has been away for longer than a flap, with the number of its connection.
    pub(super) fn next_away(&mut self, now: Millis) -> Option<(u32, u64)> {
        let (since, at, connection_no) = *self.away.front()?;
        if since + FLAP > now {
            return None;
        }
        self.away.pop_front();
        Some((at, connection_no))
    }

    /// The session is removed from its slot.
    pub(super) fn removed(&mut self, at: u32) {
        self.restored.remove(&at);
        self.through.remove(&at);
        if let Some(mark) = self.marks.get_mut(&at) {
            *mark = Mark::Cancelled;
        }
        if let Some(recorded) = self.recorded.remove(&at) {
            self.removed.push_back(recorded);
            self.marked.insert(self.shard);
        }
    }

    /// The session begins from a record.
    pub(super) fn restored(
        &mut self,
        at: u32,
        session: &Session,
        place: (Position, u32),
        client: RestoredClient,
        progress: Progress,
    ) {
        // Until its client is back, later messages go to it as to any client that is away.
        let through = match client.detached_at {
            Some(_) => progress.through,
            None => self.numbers.last(),
        };
        self.through.insert(at, through);
        self.progress.insert(at, progress);
        self.record(at, session, Some(place), true);
        if client.detached_at.is_none() {
            if let Some(recorded) = self.recorded.get_mut(&at) {
                recorded.detached = false;
            }
            let away = (session.since(), at, session.connection_no());
            self.away.push_back(away);
        }
        self.restored.insert(at, client);
    }

    /// The time of day when the clock was at zero.
    pub(super) fn started_at(&self) -> UnixMillis {
        self.times.started_at
    }

    /// How long after the start the client of a restored session may be back before its will is published.
    pub(super) fn restart_grace(&self) -> Duration {
        self.times.restart_grace
    }

    /// When the client of a session went away; `None`: it is connected.
    pub(super) fn detached_at(&self, at: u32, session: &Session) -> Option<UnixMillis> {
        let restored = self.restored.get(&at).and_then(|client| client.detached_at);
        let since = || self.times.started_at.at(session.since());
        restored.or_else(|| (!session.attached()).then(since))
    }

    /// The address of a session's client.
    pub(super) fn address(&self, at: u32, slot: &Slot) -> Option<IpAddr> {
        let peer = slot.peer.as_ref().map(|peer| peer.address.ip());
        peer.or_else(|| Some(self.restored.get(&at)?.address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_in_the_queue_once_however_many_sessions_it_has_one_after_the_other() {
        let times = JournalTimes {
            started_at: UnixMillis::default(),
            restart_grace: Duration::ZERO,
        };
        let mut journal = Journal::new(0, Arc::default(), times, Arc::default());
        for _ in 0..100 {
            journal.mark(7, true);
            assert!(journal.waits(7));
            journal.removed(7);
            assert!(!journal.waits(7));
        }
        assert_eq!(journal.queue, [7]);
        assert_eq!(journal.next(), None);
        for waits in [false, true, false] {
            journal.mark(7, waits);
        }
        assert_eq!((journal.next(), journal.next()), (Some((7, true)), None));
    }
}
