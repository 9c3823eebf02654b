//! Groups of shared subscribers that exist at this node alone, for brokers without working shared
//! subscriptions. The group's plain filter is subscribed like any other, and each of its messages goes
//! to one member.

use std::sync::Arc;

use crate::router::filters::filter::Filter;
use crate::router::filters::table::Table;
use crate::time::Millis;
use crate::topics::FilterId;

impl Table {
    /// Adds a group to its plain filter, which is then in use as long as the group has members.
    ///
    /// # Errors
    /// The name of a filter that the plain one overlaps, if it overlaps one on every link.
    pub(super) fn place_locally(
        &mut self,
        id: FilterId,
        hash: u64,
        now: Millis,
    ) -> Result<(), Arc<str>> {
        let Some(topics) = self.get(id).map(|f| f.topics().to_owned()) else {
            return Ok(());
        };
        let (plain, _) = self.intern(&topics);
        if let Err(other) = self.place(plain, hash, &[], now) {
            if self.get(plain).is_some_and(Filter::is_unused) {
                self.remove(plain, now);
            }
            return Err(other);
        }
        if let Some(holder) = self.get(id).and_then(|f| f.holder) {
            self.hold(plain, holder);
        }
        let Some(filter) = self.get_mut(plain) else {
            return Ok(());
        };
        if let Some(since) = filter.add_group(id) {
            self.lingering.remove((since, plain));
        }
        if let Some(group) = self.get_mut(id) {
            group.place_locally(plain);
        }
        Ok(())
    }

    /// A group is gone; its plain filter lingers if nobody else uses it.
    pub(super) fn remove_local(&mut self, id: FilterId, plain: FilterId, now: Millis) {
        let Some(filter) = self.get_mut(plain) else {
            return;
        };
        if filter.remove_group(id, now) {
            let (is_inner, bytes) = (filter.source().is_some(), filter.name().len());
            // The broker does not know it, and a group has no retained messages.
            if is_inner {
                self.release_soon.push(plain);
            }
            self.lingering.insert((now, plain), bytes);
        }
    }
}
