//! The records of filters and links in the log, and the filters and links whose record is to be written anew.
//!
//! Only with `store.durability = "disk"` the table has a journal. A change of a filter at the broker marks
//! it; the process's persist task then appends its record as the filter is at that moment. A SUBSCRIBE or an
//! UNSUBSCRIBE is sent once the record that announces it is on the disk.
//!
//! A link's record says that the broker has the link's session, or may have it. It is on the disk before
//! the first SUBSCRIBE in that session, and before each CONNECT that may begin another session in its place.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::mqtt::QoS;
use crate::router::sessions::journal::Marked;
use crate::store::log::{Claim, Position};
use crate::store::records::{FilterState, LinkRecord, LinkState};
use crate::time::{Millis, UnixMillis};
use crate::topics::FilterId;

/// What the log has of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The broker has the number's filter or may have it.
    Filter {
        session: NonZeroU64,
        asked: QoS,
        state: FilterState,
    },
    /// It rests.
    Rest { until: UnixMillis },
}

/// A record in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recorded<T> {
    /// Where it is, and the length of its body. `None`: the log was degraded.
    pub(super) place: Option<(Position, u32)>,
    pub(super) said: T,
    /// Tells it from others of the same filter or link.
    pub(super) serial: u64,
    /// It is on the disk.
    pub(super) committed: bool,
}

impl<T> Recorded<T> {
    pub(super) fn claim(&self) -> Option<Claim> {
        let (position, len) = self.place?;
        Some(Claim::new(position, len as usize))
    }
}

/// The properties of the broker by which filters are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) struct BrokerMode {
    /// It has Subscription Identifiers.
    pub identifiers: bool,
    /// Live messages keep RETAIN.
    pub keeps_retain: bool,
}

/// A link session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    pub(super) number: NonZeroU64,
    pub(super) mode: BrokerMode,
    pub(super) state: LinkState,
}

/// The body of a link's record.
#[derive(Clone, Debug)]
pub(super) struct LinkSaid {
    pub(super) body: Box<[u8]>,
    pub(super) session: NonZeroU64,
    pub(super) ended: bool,
}

/// A link, as the log is to know it.
#[derive(Debug, Default)]
pub(super) struct LinkEntry {
    pub(super) client_id: Box<str>,
    pub(super) server: Box<str>,
    /// Its session at the broker. `None`: there is none, or none that is to be resumed.
    pub(super) session: Option<Session>,
    pub(super) recorded: Option<Recorded<LinkSaid>>,
    /// Its record is to be written.
    pub(super) marked: bool,
    /// The session is no longer in doubt. Its record says so after the records of all its filters.
    pub(super) settles: bool,
    /// The session for which a record is on the disk.
    durable: Option<NonZeroU64>,
    /// An earlier process had a session for this link, and this one has not connected it.
    pub(super) is_restored: bool,
}

/// A link session of an earlier process that no link has any more.
#[derive(Debug)]
pub(super) struct Stale {
    pub(super) client_id: Box<str>,
    pub(super) server: Box<str>,
    pub(super) session: NonZeroU64,
    pub(super) claim: Claim,
    /// The broker does not have it any more.
    pub(super) ended: bool,
    /// The body of its record.
    pub(super) body: Box<[u8]>,
}

/// See the module.
#[derive(Debug)]
pub(in crate::router) struct FilterJournal {
    marked: Arc<Marked>,
    /// The time of day when the clock was at zero.
    pub(super) started_at: UnixMillis,
    /// The latest time of a removal.
    pub(super) now: Millis,
    /// The largest number of a link session.
    pub(super) last_session: u64,
    last_serial: u64,
    /// By the router's number.
    pub(super) links: Vec<LinkEntry>,
    pub(super) stale: Vec<Stale>,
    pub(super) recorded: BTreeMap<FilterId, Recorded<Said>>,
    /// The filters to be written, in the order of their marks, each once.
    pub(super) queue: VecDeque<FilterId>,
    queued: BTreeSet<FilterId>,
    /// Until when the numbers of filters rest whose end is to be written.
    pub(super) removed: BTreeMap<FilterId, Millis>,
    /// The numbers that rest and have a record, in the order of the ends of their rests.
    pub(super) rests: VecDeque<(Millis, FilterId)>,
}

impl FilterJournal {
    pub(super) fn new(marked: Arc<Marked>, started_at: UnixMillis, links: usize) -> Self {
        Self {
            marked,
            started_at,
            now: Millis::ZERO,
            last_session: 0,
            last_serial: 0,
            links: (0..links).map(|_| LinkEntry::default()).collect(),
            stale: Vec::new(),
            recorded: BTreeMap::new(),
            queue: VecDeque::new(),
            queued: BTreeSet::new(),
            removed: BTreeMap::new(),
            rests: VecDeque::new(),
        }
    }

    pub(super) fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// A filter is to be written.
    pub(super) fn mark(&mut self, id: FilterId) {
        if self.queued.insert(id) {
            self.queue.push_back(id);
            self.marked.insert_filters();
        }
    }

    /// Takes the next marked filter.
    pub(super) fn next(&mut self) -> Option<FilterId> {
        let id = self.queue.pop_front()?;
        self.queued.remove(&id);
        Some(id)
    }

    /// A filter whose turn is to come again first, because its record did not find room.
    pub(super) fn put_back(&mut self, id: FilterId) {
        self.queued.insert(id);
        self.queue.push_front(id);
    }

    /// Asks for another look.
    pub(super) fn look_again(&self) {
        self.marked.insert_filters();
    }

    /// The filter leaves the table; its number rests until then.
    pub(super) fn remove(&mut self, id: FilterId, now: Millis, until: Millis) {
        self.now = self.now.max(now);
        if self.recorded.contains_key(&id) {
            self.removed.insert(id, until);
            self.mark(id);
        }
    }

    fn mark_link(&mut self, link: usize) {
        self.links[link].marked = true;
        self.marked.insert_filters();
    }

    /// A link is about to connect, with a clean session or the one that it has.
    pub(super) fn connects(&mut self, link: usize, clean: bool, client_id: &str, server: &str) {
        let entry = &mut self.links[link];
        (entry.client_id, entry.server) = (client_id.into(), server.into());
        entry.settles = false;
        if clean {
            entry.session = None;
        }
        let ends = clean && entry.recorded.as_ref().is_some_and(|r| !r.said.ended);
        if let Some(session) = &mut entry.session {
            session.state = LinkState::InDoubt;
        }
        if ends || entry.session.is_some() {
            self.mark_link(link);
        }
    }

    /// Whether the disk knows that the link is about to connect.
    pub(super) fn may_connect(&self, link: usize) -> bool {
        let entry = &self.links[link];
        !entry.marked && entry.recorded.as_ref().is_none_or(|r| r.committed)
    }

    /// A link has connected, and its session is a new one.
    pub(super) fn session_began(&mut self, link: usize, mode: BrokerMode) {
        self.last_session += 1;
        let entry = &mut self.links[link];
        entry.is_restored = false;
        entry.settles = false;
        entry.session = NonZeroU64::new(self.last_session).map(|number| Session {
            number,
            mode,
            state: LinkState::Begun,
        });
        self.mark_link(link);
    }

    /// A link has connected, and the broker has its session.
    pub(super) fn session_resumed(&mut self, link: usize, mode: BrokerMode) {
        if self.links[link].session.is_none() {
            return self.session_began(link, mode);
        }
        self.links[link].is_restored = false;
        self.links[link].settles = true;
        self.marked.insert_filters();
    }

    /// The record of a link is on the disk, or the log is degraded.
    pub(super) fn link_committed(&mut self, link: usize, serial: u64) {
        let entry = &mut self.links[link];
        let Some(recorded) = entry.recorded.as_mut().filter(|r| r.serial == serial) else {
            return;
        };
        recorded.committed = true;
        entry.durable = Some(recorded.said.session);
        if recorded.said.ended {
            entry.recorded = None;
        }
    }

    /// A link session is known from its record.
    pub(super) fn link_restored(
        &mut self,
        link: usize,
        record: &LinkRecord<'_>,
        place: (Position, u32),
        is_trusted: bool,
    ) {
        let serial = self.next_serial();
        let mut body = Vec::new();
        record.encode(&mut body);
        let entry = &mut self.links[link];
        entry.client_id = record.client_id.into();
        entry.server = record.server.into();
        entry.is_restored = true;
        entry.recorded = Some(Recorded {
            place: Some(place),
            said: LinkSaid {
                body: body.into(),
                session: record.session,
                ended: false,
            },
            serial,
            committed: true,
        });
        if is_trusted {
            entry.durable = Some(record.session);
            entry.session = Some(Session {
                number: record.session,
                mode: BrokerMode {
                    identifiers: record.identifiers,
                    keeps_retain: record.keeps_retain,
                },
                state: record.state,
            });
        }
    }

    /// The number of a link's session, once its record is on the disk.
    fn durable_session(&self, link: usize) -> Option<NonZeroU64> {
        let entry = &self.links[link];
        let number = entry.session?.number;
        (entry.durable == Some(number)).then_some(number)
    }

    /// The filter's record, if it is on the disk and speaks of the link's session.
    pub(super) fn committed(&self, id: FilterId, link: usize) -> Option<(QoS, FilterState)> {
        let session = self.durable_session(link)?;
        let recorded = self.recorded.get(&id).filter(|r| r.committed)?;
        match recorded.said {
            Said::Filter {
                session: of,
                asked,
                state,
            } if of == session => Some((asked, state)),
            Said::Filter { .. } | Said::Rest { .. } => None,
        }
    }

    /// Whether the record of a filter is on its way to the disk.
    pub(super) fn is_under_way(&self, id: FilterId) -> bool {
        self.queued.contains(&id) || self.recorded.get(&id).is_some_and(|r| !r.committed)
    }
}
