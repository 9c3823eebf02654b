//! Changes of filters at the broker are announced in the log before they are asked for.

use crate::router::filters::filter::{Filter, LinkSession, Phase};
use crate::router::filters::journal::{BrokerMode, FilterJournal, Said};
use crate::router::filters::table::Table;
use crate::store::records::FilterState;
use crate::topics::FilterId;

impl Table {
    /// The filter's state at the broker is another one.
    pub(super) fn mark(&mut self, id: FilterId) {
        if let Some(journal) = &mut self.journal {
            journal.mark(id);
        }
    }

    /// The filter may have no subscription of its own any more.
    pub(super) fn mark_recorded(&mut self, id: FilterId) {
        if let Some(journal) = &mut self.journal
            && journal.recorded.contains_key(&id)
        {
            journal.mark(id);
        }
    }

    /// The record that a filter is to have. `None`: none, because the broker does not have it, and is not
    /// about to.
    pub(super) fn to_say(&self, journal: &FilterJournal, id: FilterId) -> Option<Said> {
        let filter = self.get(id)?;
        let link = self.moves.target(id).or(filter.link())?;
        let session = journal.links[link].session?.number;
        let granted = filter.granted() as u8;
        let state = match filter.phase() {
            Phase::Absent => return None,
            Phase::Pending | Phase::Subscribing => FilterState::Asked,
            Phase::Active { raising: false } => FilterState::Granted(granted),
            Phase::Active { raising: true } => FilterState::Rising(granted),
            Phase::Unsubscribing => FilterState::Leaving,
        };
        Some(Said::Filter {
            session,
            asked: filter.wanted().max(self.floor),
            state,
        })
    }

    /// Whether the record of a filter that is to be subscribed on a link is on the disk. If not, it is on its
    /// way there.
    pub(super) fn may_subscribe(&mut self, link: usize, id: FilterId) -> bool {
        let floor = self.floor;
        let Some(journal) = &self.journal else {
            return true;
        };
        let Some(filter) = self.get(id).filter(|f| f.is_rising()) else {
            return true;
        };
        let wanted = filter.wanted().max(floor);
        let announced = journal.committed(id, link).is_some_and(|(asked, state)| {
            let same = match filter.phase() {
                Phase::Active { .. } => matches!(state, FilterState::Rising(_)),
                _ => state == FilterState::Asked,
            };
            same && asked >= wanted
        });
        announced || self.announce(id)
    }

    /// Whether the record of a filter that is to be unsubscribed from a link is on the disk. If not, it is on
    /// its way there.
    pub(super) fn may_unsubscribe(&mut self, link: usize, id: FilterId) -> bool {
        let Some(journal) = &self.journal else {
            return true;
        };
        let leaves = |f: &Filter| f.phase() == Phase::Unsubscribing;
        if !self.get(id).is_some_and(leaves) {
            return true;
        }
        let committed = journal.committed(id, link);
        let announced = committed.is_some_and(|(_, state)| state == FilterState::Leaving);
        announced || self.announce(id)
    }

    /// Marks a filter whose record is neither on the disk nor on its way there.
    fn announce(&mut self, id: FilterId) -> bool {
        if let Some(journal) = &mut self.journal
            && !journal.is_under_way(id)
        {
            journal.mark(id);
        }
        false
    }

    /// A link has connected. Whether no earlier process had a session for it.
    pub(super) fn journal_link_up(&mut self, link: usize, session: LinkSession) -> bool {
        let mode = self.mode();
        let Some(journal) = &mut self.journal else {
            return true;
        };
        let is_restored = journal.links[link].is_restored;
        match session {
            LinkSession::New => journal.session_began(link, mode),
            LinkSession::Doubtful | LinkSession::Resumed => journal.session_resumed(link, mode),
        }
        !is_restored
    }

    /// The broker's properties, as far as they are known.
    pub(super) fn mode(&self) -> BrokerMode {
        BrokerMode {
            identifiers: self.identifiers.unwrap_or(true),
            keeps_retain: self.keeps_retain,
        }
    }
}
