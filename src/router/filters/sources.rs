//! The filters, as far as their retained messages have to know them.

use std::sync::Arc;

use crate::router::filters::Filters;
use crate::router::filters::filter::Filter;
use crate::router::retained::Sources;
use crate::topics::FilterId;

impl Sources for Filters {
    fn name(&self, filter: FilterId) -> Option<Arc<str>> {
        self.read().get(filter).map(|f| f.name().clone())
    }

    fn data_link(&self, filter: FilterId) -> Option<usize> {
        let table = self.read();
        let link = table.get(table.source(filter)).and_then(Filter::link);
        link.filter(|link| *link < self.config.links.data_max)
    }

    fn is_away(&self, filter: FilterId) -> bool {
        self.data_link(filter).is_some_and(|link| !self.is_up(link))
    }

    fn receivers(&self, filter: FilterId, topic: &str, f: &mut dyn FnMut(FilterId, u64)) {
        let table = self.read();
        let mut with_mask = |id: FilterId| {
            if let Some(filter) = table.get(id) {
                f(id, filter.mask());
            }
        };
        with_mask(filter);
        table.match_inner(filter, topic, with_mask);
    }

    fn below(&self, outer: FilterId, f: &mut dyn FnMut(FilterId)) {
        self.read().below(outer).into_iter().for_each(f);
    }
}
