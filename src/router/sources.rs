//! The filters, as far as their retained messages have to know them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::topics::FilterId;

use crate::router::Router;
use crate::router::retained::Sources;

impl Sources for Router {
    fn name(&self, filter: FilterId) -> Option<Arc<str>> {
        self.table.read().get(filter).map(|f| f.name().clone())
    }

    fn data_link(&self, filter: FilterId) -> Option<usize> {
        let table = self.table.read();
        let source = table.get(table.source(filter))?;
        source.link().filter(|link| *link < self.config.data_links)
    }

    fn is_away(&self, filter: FilterId) -> bool {
        let link = self.data_link(filter);
        link.is_some_and(|link| !self.data_up[link].load(Ordering::Acquire))
    }

    fn receivers(&self, filter: FilterId, topic: &str, f: &mut dyn FnMut(FilterId, u64)) {
        let table = self.table.read();
        let mut with_mask = |n: FilterId| {
            if let Some(filter) = table.get(n) {
                f(n, filter.mask());
            }
        };
        with_mask(filter);
        table.match_root(filter, topic, with_mask);
    }

    fn below(&self, root: FilterId, f: &mut dyn FnMut(FilterId)) {
        self.table.read().below(root).for_each(f);
    }
}
