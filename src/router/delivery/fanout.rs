//! From the broker to the clients: one batch of messages, shard by shard.

use smallvec::SmallVec;

use crate::telemetry::{DropReason, metrics};
use crate::topics::FilterId;

use crate::router::filters::table::Table;
use crate::router::types::Arrived;

/// The shards and groups that a batch is for.
#[derive(Debug, Default)]
pub(in crate::router) struct Routes {
    /// For each message the shards that may have members of its filters, as bits.
    masks: SmallVec<[u64; 64]>,
    /// The shards of all messages.
    all: u64,
    /// Messages of a shared link; each goes to one member of its group.
    pub shared: bool,
    /// Groups of this node alone: the message's place in the batch, and the group.
    pub local_groups: SmallVec<[(usize, FilterId); 4]>,
}

impl Routes {
    /// Finds the receivers of a batch. Each message gets the filters that it is for, or none if all of
    /// them are gone.
    pub(crate) fn find(&mut self, table: &Table, data_links: usize, batch: &mut [Arrived]) {
        let named = table.identifiers != Some(false);
        for (at, arrived) in batch.iter_mut().enumerate() {
            let mut mask = 0;
            resolve_exact(table, arrived);
            let dead = |n: &FilterId| *n == FilterId::EXACT || table.is_tombstone(*n);
            if !arrived.filters.is_empty() && arrived.filters.iter().all(dead) {
                arrived.filters.clear();
                metrics().messages_dropped[DropReason::NoReceiver].increment(1);
            } else if !arrived.filters.iter().any(|n| table.get(*n).is_some()) {
                // Without a working identifier the topic decides, among this link's filters.
                if named {
                    metrics().upstream_unknown_subscription_ids.increment(1);
                }
                let filters = &mut arrived.filters;
                filters.clear();
                table.match_topic(arrived.link, arrived.message.topic(), |n| filters.push(n));
                if table.is_moving() {
                    let mut filters = std::mem::take(&mut arrived.filters);
                    filters.retain(|n| table.own_copy(*n, arrived));
                    arrived.filters = filters;
                }
            }
            if table.has_inner_filters() {
                expand(table, arrived);
            }
            if arrived.link >= data_links {
                self.shared = true;
                self.masks.push(0);
                continue;
            }
            for number in &arrived.filters {
                if let Some(filter) = table.get(*number) {
                    mask |= filter.mask();
                    let groups = filter.groups().iter().map(|g| (at, *g));
                    self.local_groups.extend(groups);
                    if filter.is_unused() {
                        filter.count_unread();
                    }
                }
            }
            self.all |= mask;
            self.masks.push(mask);
        }
    }

    /// The shards that some message is for.
    pub(crate) fn shards(&self) -> impl Iterator<Item = u16> + use<> {
        let mut remaining = self.all;
        std::iter::from_fn(move || {
            let number = (remaining != 0).then(|| remaining.trailing_zeros() as u16);
            remaining &= remaining.wrapping_sub(1);
            number
        })
    }

    /// The messages of the batch that are for one shard.
    pub(crate) fn of_shard<'a>(
        &'a self,
        number: u16,
        batch: &'a [Arrived],
    ) -> impl Iterator<Item = &'a Arrived> {
        let bit = 1 << number;
        let with_masks = batch.iter().zip(&self.masks);
        with_masks.filter_map(move |(arrived, mask)| (mask & bit != 0).then_some(arrived))
    }
}

/// Puts the filter without wildcards into the place of the identifier that all such filters have. If
/// nobody has the filter any more, the number stays, which means none.
fn resolve_exact(table: &Table, arrived: &mut Arrived) {
    let mut filters = arrived.filters.iter();
    let Some(at) = filters.position(|filter| *filter == FilterId::EXACT) else {
        return;
    };
    let Some(filter) = table.exact(arrived.message.topic()) else {
        return;
    };
    match arrived.filters.contains(&filter) {
        true => drop(arrived.filters.swap_remove(at)),
        false => arrived.filters[at] = filter,
    }
}

/// Adds the filters that lie inside the filters that brought a message.
fn expand(table: &Table, arrived: &mut Arrived) {
    let came = arrived.filters.len();
    for at in 0..came {
        let number = arrived.filters[at];
        let filters = &mut arrived.filters;
        table.match_inner(number, arrived.message.topic(), |n| filters.push(n));
    }
    if table.is_moving() {
        for number in &arrived.filters[came..] {
            table.outer_copy(*number, arrived);
        }
    }
}
