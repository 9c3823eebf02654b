//! Filters of sessions that an earlier process has left.

use std::sync::Arc;

use crate::mqtt::QoS;
use crate::router::account::Holder;
use crate::router::filters::Filters;
use crate::router::lost::Loss;
use crate::time::Millis;
use crate::topics::FilterId;

impl Filters {
    /// A restored session in `shard` has a subscription on a filter, whose client asked for `qos`. The filter
    /// is lost, as if the broker had forgotten its link's session: it is subscribed once its link is there,
    /// and clients that ask for it now wait for that.
    pub(crate) fn restore(
        &self,
        name: &str,
        qos: QoS,
        shard: u16,
        holder: Holder,
        now: Millis,
    ) -> (FilterId, Arc<str>) {
        let hash = self.hash(name);
        let mut table = self.write();
        let (id, name) = table.intern(name);
        table.hold(id, holder);
        // Before the broker is known a filter is placed in a root, if anywhere.
        let placed = table.place(id, hash, &[], now);
        debug_assert!(placed.is_ok(), "nothing can be in the way");
        table.reference(id, shard);
        if table.source(id) != id {
            table.want(id, qos);
            return (id, name);
        }
        table.request(id, qos);
        table.lost.insert(id, Loss::Sure);
        (id, name)
    }
}
