//! The number of a message that a log may have to keep, and the place of its record there.

use std::fmt::Debug;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::time::UnixMillis;

/// Is told when a record is not needed any more.
pub trait Records: Debug + Send + Sync {
    /// The last reference to the message of this record is gone.
    fn release(&self, place: RecordPlace);
}

/// The place of a record in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordPlace {
    /// Segment and offset, as one number.
    pub position: u64,
    /// The length of its body, in bytes.
    pub bytes: u32,
}

/// The sessions that a message is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressee {
    /// The filter of their subscriptions.
    pub filter: Arc<str>,
    /// The incarnation of the member that has the message, if the subscription is shared.
    pub member: Option<NonZeroU64>,
    /// The sequence number with which they were given it. It is a later one than the message's own if it came
    /// to them later.
    pub since: u64,
}

/// The identity of a message of QoS 2 on the link that brought it, until the broker releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkOrigin {
    /// The number of the link.
    pub link: u16,
    /// The packet identifier.
    pub packet_id: u16,
    /// A digest of the message.
    pub digest: u64,
}

/// The identity of a message of QoS 1 or 2 for the log, as long as the message is in memory.
#[derive(Debug)]
pub struct Numbered {
    sequence: u64,
    /// The incarnation of the publishing session, if it is known: for No Local.
    origin_mark: Option<NonZeroU64>,
    arrived_at: UnixMillis,
    /// It is to be written without delay.
    urgent: AtomicBool,
    /// The record is on the disk, or the log is degraded.
    settled: AtomicBool,
    state: Mutex<State>,
    records: Arc<dyn Records>,
}

#[derive(Debug, Default)]
struct State {
    addressees: SmallVec<[Addressee; 1]>,
    place: Option<RecordPlace>,
    /// The broker may send the message again.
    link_origin: Option<LinkOrigin>,
    /// The record lacks addressees.
    is_outdated: bool,
}

impl Numbered {
    /// A message that arrived at this time, with the next sequence number. It has no record yet.
    pub fn new(
        sequence: u64,
        origin_mark: Option<NonZeroU64>,
        link_origin: Option<LinkOrigin>,
        arrived_at: UnixMillis,
        records: Arc<dyn Records>,
    ) -> Self {
        let state = State {
            link_origin,
            ..State::default()
        };
        Self {
            sequence,
            origin_mark,
            arrived_at,
            urgent: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            state: Mutex::new(state),
            records,
        }
    }

    /// Names the message in the records of sessions. It grows with the time of arrival on a link.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The incarnation of the session that published the message, for No Local.
    pub fn origin_mark(&self) -> Option<NonZeroU64> {
        self.origin_mark
    }

    /// The time of day at which it arrived.
    pub fn arrived_at(&self) -> UnixMillis {
        self.arrived_at
    }

    /// The message is for more sessions. Returns whether its record is to be written anew.
    pub fn address(&self, more: impl Iterator<Item = Addressee>) -> bool {
        let mut state = self.state.lock();
        state.addressees.extend(more);
        state.is_outdated = state.place.is_some();
        state.is_outdated
    }

    /// A member of a shared subscription has the message now, and no other member of that subscription. Returns
    /// whether its record is to be written anew.
    pub fn hand_to(&self, member: Addressee) -> bool {
        let mut state = self.state.lock();
        state.addressees.retain(|a| a.filter != member.filter);
        state.addressees.push(member);
        state.is_outdated = state.place.is_some();
        state.is_outdated
    }

    /// Whether the message has no record, or one that lacks addressees.
    pub fn wants_record(&self) -> bool {
        let state = self.state.lock();
        state.place.is_none() || state.is_outdated
    }

    /// A client that is away is to get the message: its record is not to wait.
    pub fn hurry(&self) {
        // Most messages have many receivers, and a read is cheaper than a write.
        if !self.is_urgent() {
            self.urgent.store(true, Ordering::Relaxed);
        }
    }

    /// Whether its record is not to wait.
    pub fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// Its record, if it was appended to the log.
    pub fn place(&self) -> Option<RecordPlace> {
        self.state.lock().place
    }

    /// Appends its record to the log by a function, which gets the sessions that the message is for and its
    /// identity on its link, as far as both are known. The record before that, if there was one, is not needed
    /// any more then. Nothing changes if the function returns `None`.
    pub fn append(
        &self,
        append: impl FnOnce(&[Addressee], Option<LinkOrigin>) -> Option<RecordPlace>,
    ) {
        let mut state = self.state.lock();
        let Some(place) = append(&state.addressees, state.link_origin) else {
            return;
        };
        state.is_outdated = false;
        let before = state.place.replace(place);
        drop(state);
        if let Some(before) = before {
            self.records.release(before);
        }
    }

    /// The broker does not send the message again. A later record does not name its link.
    pub fn forget_link_origin(&self) {
        self.state.lock().link_origin = None;
    }

    /// Its identity on the link that brought it, until the broker has released it.
    pub fn link_origin(&self) -> Option<LinkOrigin> {
        self.state.lock().link_origin
    }

    /// Its record is on the disk, or the log is degraded: the broker may forget the message.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Whether the broker may forget the message.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        if let Some(place) = self.state.get_mut().place {
            self.records.release(place);
        }
    }
}
