//! Gaps that sessions show because a filter was granted without the broker's answer: they may show one
//! for each filter that was asked for, whether or not a message was missed.

use crate::oracle::Checked;
use crate::world::World;

impl World {
    /// Takes a step in which devices' packets reach the router. A filter may be granted at once although
    /// the broker has yet to answer for it, which is a gap.
    pub(crate) fn with_packets(&mut self, step: impl FnOnce(&mut Self) -> Checked) -> Checked {
        let asks =
            |world: &Self| -> Vec<u64> { world.oracle.clients.iter().map(|c| c.asks).collect() };
        let (before, asked) = (self.other_gaps(), asks(self));
        step(self)?;
        let made = asks(self).into_iter().zip(asked);
        let made: Vec<u64> = made.map(|(after, before)| after - before).collect();
        if made.iter().any(|made| *made > 0) {
            self.excuse_gaps(&before, made);
        }
        Ok(())
    }

    /// Each client's session may have shown so many more gaps than `before` because of filters that were
    /// granted without the broker's answer.
    pub(crate) fn excuse_gaps(&mut self, before: &[u64], most: Vec<u64>) {
        let after = self.other_gaps();
        let grown = after.into_iter().zip(before).zip(most);
        for (((after, before), most), c) in grown.zip(&mut self.oracle.clients) {
            c.ledger.late_gaps += after.saturating_sub(*before).min(most);
        }
    }

    /// The gaps that each client's session shows, without the excused ones.
    pub(crate) fn other_gaps(&self) -> Vec<u64> {
        let all = self.gaps().into_iter().zip(&self.oracle.clients);
        all.map(|(gaps, c)| gaps.saturating_sub(c.ledger.late_gaps))
            .collect()
    }

    /// The gaps that each client's session shows.
    pub(crate) fn gaps(&self) -> Vec<u64> {
        let clients = self.oracle.clients.iter();
        let shown = clients.map(|c| self.router.session(&c.profile.id.as_str().into()));
        shown.map(|info| info.map_or(0, |i| i.gaps)).collect()
    }
}
