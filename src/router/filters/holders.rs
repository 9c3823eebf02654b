//! Who the filters of the table are charged to: the session that brought a filter, as long as the table
//! has it, or until another session uses it after it was idle.

use crate::router::account::{Full, Holder};
use crate::router::filters::FILTERS_MAX;
use crate::router::filters::filter::Filter;
use crate::router::filters::table::Table;
use crate::session::SUBSCRIPTION_BYTES;
use crate::telemetry::SubscribeRefusedReason;
use crate::topics::FilterId;

/// Bytes of a filter beside its name, as measured: its entry in the table, its number, and its members in
/// one shard.
pub(super) const FILTER_BYTES: usize = 256;

impl Table {
    /// Whether there is room for a filter that `holder` brings, and for the subscription on it. A filter
    /// that is known needs none.
    ///
    /// # Errors
    /// The part that is used up, of the number of filters or of the memory.
    pub(super) fn has_room(
        &self,
        name: &str,
        holder: Holder,
    ) -> Result<(), (Full, SubscribeRefusedReason)> {
        if self.knows(name) {
            return Ok(());
        }
        // Some filters are charged to nobody, the roots for one.
        let filters = match self.len() >= FILTERS_MAX {
            true => Err(Full::All),
            false => self.account.filters.has_room(holder, 1),
        };
        filters.map_err(|full| (full, SubscribeRefusedReason::Filters))?;
        let bytes = bytes_of(name) + SUBSCRIPTION_BYTES as u64;
        let bytes = self.account.bytes.has_room(holder, bytes);
        bytes.map_err(|full| (full, SubscribeRefusedReason::SessionMemory))
    }

    /// Charges a filter to `holder`, who is about to use it, unless others use it already.
    pub(super) fn hold(&mut self, id: FilterId, holder: Holder) {
        let account = self.account.clone();
        let Some(filter) = self.get_mut(id).filter(|f| !f.is_root()) else {
            return;
        };
        if filter.holder.is_some() && filter.idle_since().is_none() {
            return;
        }
        let bytes = bytes_of(filter.name());
        if let Some(earlier) = filter.holder.replace(holder) {
            account.filters.release(earlier, 1);
            account.bytes.release(earlier, bytes);
        }
        account.filters.charge(holder, 1);
        account.bytes.charge(holder, bytes);
    }

    /// Gives back the charge of a filter that leaves the table.
    pub(super) fn give_back(&self, filter: &Filter) {
        if let Some(holder) = filter.holder {
            self.account.filters.release(holder, 1);
            self.account.bytes.release(holder, bytes_of(filter.name()));
        }
    }

    /// Whether a filter is charged to a principal or network with more than its share.
    pub(super) fn is_over_share(&self, filter: &Filter) -> bool {
        let account = &self.account;
        let over = |holder| account.filters.is_over(holder) || account.bytes.is_over(holder);
        filter.holder.is_some_and(over)
    }
}

fn bytes_of(name: &str) -> u64 {
    (FILTER_BYTES + name.len()) as u64
}
