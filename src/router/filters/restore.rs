//! Filters and links that an earlier process has left.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::mqtt::QoS;
use crate::router::account::Holder;
use crate::router::filters::Filters;
use crate::router::filters::filter::{Filter, Phase, Placement};
use crate::router::filters::journal::{BrokerMode, FilterJournal, Recorded, Said, Stale};
use crate::router::filters::place::breadth;
use crate::router::filters::table::{TOMBSTONE, Table};
use crate::router::lost::Loss;
use crate::store::log::{Claim, Claims, Position};
use crate::store::records::{
    FilterState, FoundFilter, FoundFilters, FoundLink, FoundRest, LinkRecord, LinkState,
};
use crate::time::{Millis, UnixMillis};
use crate::topics::FilterId;

/// The session that an earlier process had for a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredLink {
    /// The server that has it, as `upstream.servers` names it.
    pub server: Box<str>,
    /// The broker may have begun another session in its place.
    pub in_doubt: bool,
}

/// A link session of an earlier process that no link has any more, and that is to be ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleLink {
    /// The client identifier of the session.
    pub client_id: Box<str>,
    /// The server that has it, as `upstream.servers` names it.
    pub server: Box<str>,
}

impl Filters {
    /// A filter that restored sessions have, and the shards of these sessions, as bits.
    pub(crate) fn known(&self, name: &str) -> Option<(FilterId, u64)> {
        let table = self.read();
        let id = table.exact(name)?;
        Some((id, table.get(id)?.mask()))
    }

    /// Takes over the filters and links of a log, whose records get their claims. Nothing else has changed the
    /// table yet. `client_id` names the links as they are now. Unless `is_trusted`, the log lacks its last
    /// records, and no link's session is resumed. Returns the properties of the broker by which the filters
    /// are placed; `None`: no session is resumed.
    pub(crate) fn restore_all(
        &self,
        found: FoundFilters,
        client_id: impl Fn(usize) -> String,
        is_trusted: bool,
        claims: &Claims,
        now: Millis,
    ) -> Option<BrokerMode> {
        let mut table = self.write();
        let mut journal = table.journal.take()?;
        journal.last_session = found.largest_session();
        let (links, filters, rests) = found.into_parts();
        let resumed = table.restore_links(&mut journal, links, &client_id, is_trusted, claims);
        table.restore_filters(&mut journal, filters, rests, &resumed, claims, now);
        let mode = resumed.mode;
        if let Some(mode) = mode {
            table.identifiers = Some(mode.identifiers);
            table.keeps_retain = mode.keeps_retain;
        }
        table.journal = Some(journal);
        mode
    }

    /// A restored session in `shard` has a subscription on a filter, whose client asked for `qos`. A filter
    /// that the broker has not granted is lost, as if the broker had forgotten its link's session: it is
    /// subscribed once its link is there, and clients that ask for it now wait for that.
    pub(crate) fn restore(
        &self,
        name: &str,
        qos: QoS,
        shard: u16,
        holder: Holder,
    ) -> (FilterId, Arc<str>) {
        let mut table = self.write();
        let (id, name) = table.intern(name);
        table.hold(id, holder);
        table.reference(id, shard);
        table.request(id, qos);
        let is_placed = table.get(id).is_some_and(|f| f.link().is_some());
        if is_placed && !table.get(id).is_some_and(Filter::is_active) {
            table.lost.insert(id, Loss::Doubtful);
        }
        (id, name)
    }

    /// All sessions are restored: their filters that have no place yet get one, broad filters first, because
    /// they may cover the others. Before the broker is known a filter is placed in a root, if anywhere. Returns
    /// the filters among them that the broker does not have.
    pub(crate) fn place_restored(&self, now: Millis) -> Vec<FilterId> {
        let mut table = self.write();
        let unplaced = |f: &Filter| f.placement() == Placement::Unplaced && f.is_wanted();
        let all = table.all().filter(|(_, f)| unplaced(f));
        let mut ids: Vec<FilterId> = all.map(|(id, _)| id).collect();
        ids.sort_by_cached_key(|id| (table.get(*id).map(breadth), *id));
        for id in &ids {
            let name = table.name_of(*id).unwrap_or_default();
            table.place_again(*id, self.hash(&name), now);
        }
        // Shared filters do not linger.
        let idle = |f: &Filter| f.is_shared() && f.idle_since().is_some();
        let idle = table.all().filter(|(_, f)| idle(f));
        let idle: Vec<FilterId> = idle.map(|(id, _)| id).collect();
        table.release_soon.extend(idle);
        ids.retain(|id| self.lost().contains(*id));
        ids
    }

    /// The session that an earlier process had for a link, until the link connects.
    pub(crate) fn restored_link(&self, link: usize) -> Option<RestoredLink> {
        let table = self.read();
        let entry = table.journal.as_ref()?.links.get(link)?;
        let session = entry.session.filter(|_| entry.is_restored)?;
        Some(RestoredLink {
            server: entry.server.clone(),
            in_doubt: session.state == LinkState::InDoubt,
        })
    }

    /// The link sessions of an earlier process that are to be ended.
    pub(crate) fn stale_links(&self) -> Vec<StaleLink> {
        let table = self.read();
        let stale = table.journal.iter().flat_map(|journal| &journal.stale);
        let stale = stale.filter(|stale| !stale.ended).map(|stale| StaleLink {
            client_id: stale.client_id.clone(),
            server: stale.server.clone(),
        });
        stale.collect()
    }

    /// The broker does not have a stale link session any more, or nobody can end it.
    pub(crate) fn stale_link_ended(&self, client_id: &str) {
        if let Some(journal) = &mut self.write().journal {
            for stale in &mut journal.stale {
                stale.ended |= *stale.client_id == *client_id;
            }
            journal.look_again();
        }
    }

    /// A link is about to connect to a server, with a clean session or the one that it has.
    pub(crate) fn link_connects(&self, link: usize, clean: bool, client_id: &str, server: &str) {
        if let Some(journal) = &mut self.write().journal {
            journal.connects(link, clean, client_id, server);
        }
    }

    /// Whether the disk knows that a link is about to connect.
    pub(crate) fn may_connect(&self, link: usize) -> bool {
        let table = self.read();
        let journal = table.journal.as_ref();
        journal.is_none_or(|journal| journal.may_connect(link))
    }

    /// Whether the links' sessions at the broker outlive the process.
    pub(crate) fn keeps_link_sessions(&self) -> bool {
        self.read().journal.is_some()
    }
}

/// The link sessions that are resumed.
#[derive(Debug, Default)]
struct ResumedLinks {
    links: BTreeMap<NonZeroU64, usize>,
    /// The properties of the broker that they have in common.
    mode: Option<BrokerMode>,
}

impl Table {
    fn restore_links(
        &self,
        journal: &mut FilterJournal,
        found: Vec<FoundLink>,
        client_id: impl Fn(usize) -> String,
        is_trusted: bool,
        claims: &Claims,
    ) -> ResumedLinks {
        let mut resumed = ResumedLinks::default();
        let mode_of = |link: &FoundLink| BrokerMode {
            identifiers: link.identifiers,
            keeps_retain: link.keeps_retain,
        };
        let first = found.first().map(mode_of);
        // The broker was about to change when the process ended: all links begin anew.
        let is_trusted = is_trusted && found.iter().all(|link| Some(mode_of(link)) == first);
        for found in found {
            claims.claim(Claim::new(found.place.0, found.place.1 as usize));
            let record = record_of(&found);
            let place = self.index_of(&found).filter(|link| {
                let takes_filters = !found.shared || !self.local_groups;
                takes_filters && *found.client_id == *client_id(*link)
            });
            let Some(link) = place else {
                let mut body = Vec::new();
                record.encode(&mut body);
                journal.stale.push(Stale {
                    client_id: found.client_id,
                    server: found.server,
                    session: found.session,
                    claim: Claim::new(found.place.0, found.place.1 as usize),
                    ended: false,
                    body: body.into(),
                });
                continue;
            };
            journal.link_restored(link, &record, found.place, is_trusted);
            if is_trusted {
                resumed.links.insert(found.session, link);
                resumed.mode = first;
            }
        }
        resumed
    }

    /// The router's number of a link.
    fn index_of(&self, found: &FoundLink) -> Option<usize> {
        let number = usize::from(found.number);
        let (first, count) = match found.shared {
            true => (self.counts.data_max, self.counts.shared_max),
            false => (0, self.counts.data_max),
        };
        (number < count).then_some(first + number)
    }

    fn restore_filters(
        &mut self,
        journal: &mut FilterJournal,
        mut found: Vec<FoundFilter>,
        rests: Vec<FoundRest>,
        resumed: &ResumedLinks,
        claims: &Claims,
        now: Millis,
    ) {
        let roots: Vec<Arc<str>> = std::mem::take(&mut self.roots)
            .into_iter()
            .filter_map(|id| self.name_of(id))
            .collect();
        let mut numbers = Vec::new();
        // If a record was lost, a later one shows it: the newest record of a name counts, and of filters that
        // may not be on one link.
        found.sort_by_key(|filter| std::cmp::Reverse(filter.place.0));
        let mut known = BTreeMap::new();
        let mut filters = Vec::new();
        for found in found {
            let Some(link) = resumed.links.get(&found.session).copied() else {
                continue;
            };
            if known.insert(found.name.clone(), found.number).is_some() {
                continue;
            }
            let name: Arc<str> = (*found.name).into();
            numbers.push((FilterId(found.number), name.clone()));
            filters.push((found, link, name));
        }
        let mut resting = Vec::new();
        let today = journal.started_at.at(now);
        for rest in rests {
            let Some(rest_ms) = remaining_ms(rest.until, today) else {
                continue;
            };
            let until = now + std::time::Duration::from_millis(rest_ms);
            let id = FilterId(rest.number);
            resting.push((until, id));
            remember(
                journal,
                id,
                Said::Rest { until: rest.until },
                rest.place,
                claims,
            );
        }
        resting.sort_unstable();
        journal.rests = resting.iter().copied().collect();
        self.take_over_numbers(numbers, resting);
        for (found, link, name) in filters {
            let id = FilterId(found.number);
            let asked = QoS::from_u8(found.asked).unwrap_or_default();
            let said = Said::Filter {
                session: found.session,
                asked,
                state: found.state,
            };
            remember(journal, id, said, found.place, claims);
            self.restore_filter(id, name, (link, asked, found.state), resumed.mode, now);
        }
        for root in roots {
            self.add_root(&root);
        }
    }

    fn restore_filter(
        &mut self,
        id: FilterId,
        name: Arc<str>,
        (link, asked, mut state): (usize, QoS, FilterState),
        mode: Option<BrokerMode>,
        now: Millis,
    ) {
        let disjoint = mode.is_some_and(|mode| !mode.identifiers);
        let mut filter = Filter::idle(name, now);
        if disjoint && state != FilterState::Leaving {
            let topics = filter.topics().to_owned();
            match self.tries[link].overlaps_any(&topics, |_| true) {
                true => state = FilterState::Leaving,
                false => {
                    self.tries[link].insert(&topics, id);
                }
            }
        }
        filter.restore(link as u8, asked, state);
        self.lingering.insert((now, id), filter.name().len());
        self.used.insert(link);
        self.put(id, filter);
    }

    /// Chooses a place for a restored filter, and asks the broker for it if that is needed.
    fn place_again(&mut self, id: FilterId, hash: u64, now: Millis) {
        let Some(filter) = self.get(id) else {
            return;
        };
        let (is_root, name) = (filter.is_root(), filter.name().clone());
        let qos = filter.wanted();
        // Its messages came through this filter, also when nobody uses that one any more.
        let disjoint = self.identifiers == Some(false);
        if disjoint
            && !is_root
            && !filter.is_shared()
            && let Some(outer) = self.outer_of(&name, |outer, _| outer != id)
        {
            self.put_inside(id, outer);
        } else if self.place(id, hash, &[], now).is_err() {
            if let Some(filter) = self.get_mut(id) {
                filter.unservable();
            }
            return;
        }
        let source = self.source(id);
        if source != id {
            self.request(source, qos);
            if !self.get(source).is_some_and(Filter::is_active) {
                self.lose_until_answered(id, source);
            }
            return;
        }
        if self.get(id).is_some_and(|f| f.mask() != 0) {
            self.lost.insert(id, Loss::Sure);
        }
        let is_pending = self.get(id).is_some_and(|f| f.phase() == Phase::Pending);
        match is_pending {
            true => self.queue_moved(id),
            false => self.request(id, qos),
        }
    }
}

impl Table {
    /// The broker has not granted the filter yet that brings a restored one's messages. A local group counts
    /// as lost by its plain filter.
    fn lose_until_answered(&self, id: FilterId, source: FilterId) {
        let inner = match self.get(id).map(Filter::placement) {
            Some(Placement::Local { plain }) => plain,
            _ => id,
        };
        for lost in [inner, source] {
            self.lost.insert(lost, Loss::Doubtful);
        }
    }
}

fn record_of(found: &FoundLink) -> LinkRecord<'_> {
    LinkRecord {
        session: found.session,
        shared: found.shared,
        number: found.number,
        identifiers: found.identifiers,
        keeps_retain: found.keeps_retain,
        state: match found.in_doubt {
            true => LinkState::InDoubt,
            false => LinkState::Begun,
        },
        client_id: &found.client_id,
        server: &found.server,
    }
}

fn remember(
    journal: &mut FilterJournal,
    id: FilterId,
    said: Said,
    place: (Position, u32),
    claims: &Claims,
) {
    claims.claim(Claim::new(place.0, place.1 as usize));
    let serial = journal.next_serial();
    let recorded = Recorded {
        place: Some(place),
        said,
        serial,
        committed: true,
    };
    journal.recorded.insert(id, recorded);
}

/// The rest of a number's rest. The wall clock may have been set back: it is never longer than the whole.
fn remaining_ms(until: UnixMillis, today: UnixMillis) -> Option<u64> {
    let rest = until.as_u64().checked_sub(today.as_u64())?;
    (rest > 0).then(|| rest.min(TOMBSTONE.as_millis() as u64))
}
