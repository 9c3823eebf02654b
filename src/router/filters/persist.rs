//! Filters and links go into the log: the marked ones for the persist task, and all of them for the log
//! itself.

use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::router::filters::Filters;
use crate::router::filters::actions::LinkSet;
use crate::router::filters::filter::Filter;
use crate::router::filters::journal::{FilterJournal, LinkSaid, Recorded, Said, Stale};
use crate::router::filters::table::Table;
use crate::router::sessions::journal::Marked;
use crate::store::log::{Claim, Life, Log, Pass, Piece, Position, Progress, Room};
use crate::store::records::{self, FilterGoneRecord, FilterRecord, LinkRecord, LinkState};
use crate::time::UnixMillis;
use crate::topics::FilterId;

/// Filters of one batch, at most.
const BATCH_FILTERS_MAX: usize = 512;
/// Bytes of room that filters leave for sessions.
const LEFT_BYTES: usize = 256 << 10;
/// Filters that are looked at before the table's lock is given back.
const CHUNK: usize = 256;

/// Filters and links that were appended to the log together.
#[derive(Debug, Default)]
pub(in crate::router) struct FilterBatch {
    /// The place of the last record. `None`: none was appended, or the log is degraded.
    pub last: Option<Position>,
    filters: Vec<(FilterId, u64)>,
    links: Vec<(usize, u64)>,
}

impl FilterBatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.filters.is_empty() && self.links.is_empty() && self.last.is_none()
    }
}

/// How far a pass of the log over the filters is.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::router) struct Rewritten {
    links: bool,
    /// The number of the filter to go on with.
    next: u32,
    done: bool,
}

/// A batch that is being appended.
struct Appending<'a> {
    log: &'a Log,
    room: &'a mut Room,
    body: Vec<u8>,
    batch: FilterBatch,
}

impl Appending<'_> {
    /// Whether the body finds room.
    fn has_room(&self) -> bool {
        self.room.bytes() >= Log::record_bytes(self.body.len()) + LEFT_BYTES
    }

    fn append(&mut self, kind: u8, life: Life) -> Option<(Position, u32)> {
        // A filter's name is far shorter than the largest record, and there is room.
        let position = self.log.append(self.room, kind, &[&self.body], life);
        let position = position.ok().flatten()?;
        self.batch.last = Some(position);
        Some((position, self.body.len() as u32))
    }

    fn release(&self, claim: Option<Claim>) {
        if let Some(claim) = claim {
            self.log.claims().release(claim);
        }
    }
}

impl Filters {
    /// From now on changes of filters and links are marked for the log.
    pub(crate) fn keep_in_log(&self, marked: Arc<Marked>, started_at: UnixMillis) {
        let links = self.config.links.all();
        let journal = FilterJournal::new(marked, started_at, links);
        self.write().journal = Some(Box::new(journal));
    }

    /// Appends marked links and filters to the log, as many as find room.
    pub(crate) fn append_marked(&self, log: &Log, room: &mut Room) -> FilterBatch {
        let mut appending = Appending {
            log,
            room,
            body: Vec::new(),
            batch: FilterBatch::default(),
        };
        loop {
            let mut table = self.write();
            let Some(mut journal) = table.journal.take() else {
                return FilterBatch::default();
            };
            let goes_on = append_some(&table, &mut journal, &mut appending);
            table.journal = Some(journal);
            if !goes_on {
                return appending.batch;
            }
        }
    }

    /// The records of a batch are on the disk, or the log is degraded. Returns the links that may have
    /// something to do now.
    pub(crate) fn committed(&self, batch: &FilterBatch) -> LinkSet {
        let mut wake = LinkSet::default();
        if batch.is_empty() {
            return wake;
        }
        let mut table = self.write();
        let Some(mut journal) = table.journal.take() else {
            return wake;
        };
        for (link, serial) in &batch.links {
            journal.link_committed(*link, *serial);
            wake.insert(*link);
        }
        for (id, serial) in &batch.filters {
            if let Some(recorded) = journal.recorded.get_mut(id)
                && recorded.serial == *serial
            {
                recorded.committed = true;
            }
            let link = table.moves.target(*id);
            wake.extend(link.or(table.get(*id).and_then(Filter::link)));
        }
        table.journal = Some(journal);
        wake
    }

    /// Appends the next living records of a pass of the log.
    pub(crate) fn rewrite(
        &self,
        log: &Log,
        pass: Pass,
        at: &mut Rewritten,
        piece: &mut Piece<'_>,
    ) -> Progress {
        while !at.done {
            if piece.is_full() {
                return Progress::More;
            }
            let mut table = self.write();
            let Some(mut journal) = table.journal.take() else {
                at.done = true;
                break;
            };
            if !std::mem::replace(&mut at.links, true) {
                rewrite_links(log, pass, &mut journal, piece);
            }
            rewrite_filters(log, pass, &table, &mut journal, at, piece);
            table.journal = Some(journal);
        }
        Progress::Done
    }
}

/// Appends the next marked links or filters. Returns whether there are more that find room.
fn append_some(table: &Table, journal: &mut FilterJournal, to: &mut Appending<'_>) -> bool {
    while let Some((_, id)) = journal.rests.front().filter(|(at, _)| *at <= journal.now) {
        if let Entry::Occupied(rested) = journal.recorded.entry(*id)
            && matches!(rested.get().said, Said::Rest { .. })
        {
            to.release(rested.remove().claim());
        }
        journal.rests.pop_front();
    }
    // A new session of a link, or its end, makes the records of its filters void: it goes first.
    let fits = |link: &usize| journal.links[*link].marked;
    let marked: Vec<usize> = (0..journal.links.len()).filter(fits).collect();
    for link in marked {
        if !append_link(table, journal, link, to) {
            journal.look_again();
            return false;
        }
    }
    for _ in 0..CHUNK {
        if to.batch.filters.len() >= BATCH_FILTERS_MAX {
            journal.look_again();
            return false;
        }
        let Some(id) = journal.next() else {
            break;
        };
        if !append_filter(table, journal, id, to) {
            journal.put_back(id);
            journal.look_again();
            return false;
        }
    }
    if !journal.queue.is_empty() {
        return true;
    }
    let settles = |link: &usize| journal.links[*link].settles;
    let settled: Vec<usize> = (0..journal.links.len()).filter(settles).collect();
    for link in settled {
        if let Some(session) = &mut journal.links[link].session {
            session.state = LinkState::Begun;
        }
        if !append_link(table, journal, link, to) {
            journal.look_again();
            return false;
        }
        journal.links[link].settles = false;
    }
    append_ended(journal, to);
    false
}

/// Appends the record of a link. False: it found no room.
fn append_link(
    table: &Table,
    journal: &mut FilterJournal,
    link: usize,
    to: &mut Appending<'_>,
) -> bool {
    let data_max = table.counts.data_max;
    let entry = &journal.links[link];
    let old = entry.recorded.as_ref();
    let said = match (entry.session, old) {
        (Some(session), _) => Some((session.number, session.state, session.mode)),
        (None, Some(old)) => Some((old.said.session, LinkState::Ended, table.mode())),
        (None, None) => None,
    };
    let Some((session, state, mode)) = said else {
        journal.links[link].marked = false;
        return true;
    };
    to.body.clear();
    let shared = link >= data_max;
    let record = LinkRecord {
        session,
        shared,
        number: (if shared { link - data_max } else { link }) as u8,
        identifiers: mode.identifiers,
        keeps_retain: mode.keeps_retain,
        state,
        client_id: &entry.client_id,
        server: &entry.server,
    };
    record.encode(&mut to.body);
    if !to.has_room() {
        return false;
    }
    let ended = state == LinkState::Ended;
    let life = if ended { Life::Passing } else { Life::Living };
    let place = to.append(records::LINK, life);
    let serial = journal.next_serial();
    let entry = &mut journal.links[link];
    let recorded = Recorded {
        place: place.filter(|_| !ended),
        said: LinkSaid {
            body: to.body.as_slice().into(),
            session,
            ended,
        },
        serial,
        committed: false,
    };
    let old = entry.recorded.replace(recorded);
    entry.marked = false;
    to.release(old.and_then(|r| r.claim()));
    to.batch.links.push((link, serial));
    true
}

/// Appends the record of a filter. False: it found no room.
fn append_filter(
    table: &Table,
    journal: &mut FilterJournal,
    id: FilterId,
    to: &mut Appending<'_>,
) -> bool {
    let old = journal.recorded.get(&id).copied();
    let had_filter = old.is_some_and(|r| matches!(r.said, Said::Filter { .. }));
    let said = match (table.to_say(journal, id), journal.removed.get(&id)) {
        (Some(said), _) => Some(said),
        (None, Some(until)) if had_filter => Some(Said::Rest {
            until: journal.started_at.at(*until),
        }),
        (None, _) => None,
    };
    if said.is_none() && !had_filter {
        return true;
    }
    if said.is_some() && said == old.map(|r| r.said) {
        return true;
    }
    to.body.clear();
    let name = table.get(id).map(|f| f.name().clone());
    encode(id, said, name.as_deref().unwrap_or_default(), &mut to.body);
    if !to.has_room() {
        return false;
    }
    let serial = journal.next_serial();
    match said {
        Some(said) => {
            let kind = kind_of(said);
            let place = to.append(kind, Life::Living);
            let recorded = Recorded {
                place,
                said,
                serial,
                committed: false,
            };
            journal.recorded.insert(id, recorded);
            to.batch.filters.push((id, serial));
        }
        None => {
            let _ = to.append(records::FILTER_GONE, Life::Passing);
            journal.recorded.remove(&id);
        }
    }
    if let Some(until) = journal.removed.remove(&id) {
        journal.rests.push_back((until, id));
    }
    to.release(old.and_then(|r| r.claim()));
    true
}

/// Link sessions of an earlier process that the broker does not have any more.
fn append_ended(journal: &mut FilterJournal, to: &mut Appending<'_>) {
    let ended: Vec<Stale> = journal.stale.extract_if(.., |s| s.ended).collect();
    for stale in ended {
        let record = LinkRecord {
            session: stale.session,
            shared: false,
            number: 0,
            identifiers: false,
            keeps_retain: false,
            state: LinkState::Ended,
            client_id: &stale.client_id,
            server: &stale.server,
        };
        to.body.clear();
        record.encode(&mut to.body);
        // Without room, or on a degraded log, the next start ends the session again.
        if to.has_room() {
            to.append(records::LINK, Life::Passing);
        }
        to.release(Some(stale.claim));
    }
}

fn kind_of(said: Said) -> u8 {
    match said {
        Said::Filter { .. } => records::FILTER,
        Said::Rest { .. } => records::FILTER_GONE,
    }
}

/// Appends the body of a filter's record. `None`: it is gone.
fn encode(id: FilterId, said: Option<Said>, name: &str, body: &mut Vec<u8>) {
    let gone = |rests_until| FilterGoneRecord {
        number: id.0,
        rests_until,
    };
    match said {
        Some(Said::Filter {
            session,
            asked,
            state,
        }) => FilterRecord {
            number: id.0,
            session,
            name,
            asked: asked as u8,
            state,
        }
        .encode(body),
        Some(Said::Rest { until }) => gone(Some(until)).encode(body),
        None => gone(None).encode(body),
    }
}

fn belongs(pass: Pass, claim: Option<Claim>) -> bool {
    match pass {
        Pass::All => true,
        Pass::Until(last) => claim.is_some_and(|claim| claim.segment <= last),
    }
}

fn rewrite_links(log: &Log, pass: Pass, journal: &mut FilterJournal, piece: &mut Piece<'_>) {
    for entry in &mut journal.links {
        let Some(recorded) = entry.recorded.as_mut().filter(|r| !r.said.ended) else {
            continue;
        };
        let claim = recorded.claim();
        if !belongs(pass, claim) {
            continue;
        }
        let body = &recorded.said.body;
        let position = piece.append(records::LINK, &[body]).ok().flatten();
        recorded.place = position.map(|position| (position, body.len() as u32));
        recorded.committed |= pass == Pass::All;
        if let Some(claim) = claim {
            log.claims().release(claim);
        }
    }
    for stale in &mut journal.stale {
        if belongs(pass, Some(stale.claim))
            && let Ok(Some(position)) = piece.append(records::LINK, &[&stale.body])
        {
            log.claims().release(stale.claim);
            stale.claim = Claim::new(position, stale.body.len());
        }
    }
}

fn rewrite_filters(
    log: &Log,
    pass: Pass,
    table: &Table,
    journal: &mut FilterJournal,
    at: &mut Rewritten,
    piece: &mut Piece<'_>,
) {
    let mut body = Vec::new();
    let rest = journal.recorded.range_mut(FilterId(at.next)..);
    for (looked_at, (id, recorded)) in rest.enumerate() {
        if piece.is_full() || looked_at == CHUNK {
            at.next = id.0;
            return;
        }
        let claim = recorded.claim();
        if !belongs(pass, claim) {
            continue;
        }
        let name = table.get(*id).map(|f| f.name().clone());
        // Its end is about to be written.
        if name.is_none() && matches!(recorded.said, Said::Filter { .. }) {
            continue;
        }
        body.clear();
        let name = name.as_deref().unwrap_or_default();
        encode(*id, Some(recorded.said), name, &mut body);
        let position = piece
            .append(kind_of(recorded.said), &[&body])
            .ok()
            .flatten();
        recorded.place = position.map(|position| (position, body.len() as u32));
        recorded.committed |= pass == Pass::All;
        if let Some(claim) = claim {
            log.claims().release(claim);
        }
    }
    at.done = true;
}

#[cfg(test)]
mod tests;
