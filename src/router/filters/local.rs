//! Groups of shared subscriptions that exist at this node alone, for cores without working ones:
//! the filter of the group is held like any other, and each of its messages goes to one member.

use std::sync::Arc;

use crate::router::filters::table::{ROOTED, State, Table};
use crate::time::Millis;
use crate::topics::FilterId;

impl Table {
    /// Hangs a group on its plain filter, which then is held as long as the group has members.
    ///
    /// # Errors
    /// The filter that the plain one would overlap on every link.
    pub(in crate::router) fn take_local(
        &mut self,
        number: FilterId,
        hash: u64,
    ) -> Result<(), Arc<str>> {
        let Some(topics) = self.get(number).map(|f| f.topics().to_owned()) else {
            return Ok(());
        };
        let (plain, _) = self.intern(&topics);
        if let Err(other) = self.place(plain, hash, &[]) {
            let unused =
                |f: &crate::router::filters::table::Filter| f.mask == 0 && f.groups.is_empty();
            if self.get(plain).is_some_and(unused) {
                self.bury(plain, 0);
            }
            return Err(other);
        }
        let source = self.source(plain);
        let Some(filter) = self.get_mut(plain) else {
            return Ok(());
        };
        if !filter.groups.contains(&number) {
            filter.groups.push(number);
        }
        let idle = std::mem::replace(&mut filter.idle_since, u64::MAX);
        if idle != u64::MAX {
            self.lingering.remove((idle, plain));
        }
        if let Some(group) = self.get_mut(number) {
            group.plain = Some(plain);
            group.rooted = Some(source);
            group.link = ROOTED;
            group.state = State::Active;
        }
        Ok(())
    }

    /// A group is gone; its plain filter lingers if nobody else holds it.
    pub(in crate::router) fn leave_local(
        &mut self,
        number: FilterId,
        plain: FilterId,
        now: Millis,
    ) {
        let Some(filter) = self.get_mut(plain) else {
            return;
        };
        filter.groups.retain(|g| *g != number);
        if filter.mask == 0
            && filter.groups.is_empty()
            && filter.idle_since == u64::MAX
            && !filter.root
        {
            filter.idle_since = now;
            let (rooted, bytes) = (filter.rooted.is_some(), filter.name.len());
            // Nothing of it is at the core, and a group has no retained messages.
            if rooted {
                self.left.push(plain);
            }
            self.lingering.insert((now, plain), bytes);
        }
    }
}
