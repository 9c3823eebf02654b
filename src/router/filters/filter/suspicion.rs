//! Whether the broker may have ended a link for a filter.

use crate::router::filters::filter::Filter;
use crate::router::types::SessionRef;

impl Filter {
    /// How often the broker has ended the link while its SUBSCRIBE had no answer.
    pub(crate) fn ends(&self) -> u8 {
        self.ends
    }

    /// The broker may have ended the link because of it.
    pub(crate) fn suspect(&mut self) {
        self.ends = self.ends.saturating_add(1);
    }

    /// The suspicion is lifted.
    pub(crate) fn cleared(&mut self) {
        self.ends = 0;
    }

    /// The clients that wait for an answer on it.
    pub(crate) fn awaiting_clients(&self) -> Vec<SessionRef> {
        let clients = self.awaiting_suback.iter().map(|g| g.subscribe.session);
        clients.collect()
    }
}
