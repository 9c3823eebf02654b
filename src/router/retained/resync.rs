//! After the broker lost a filter, retained messages may have changed unseen: they are fetched again, and
//! new values go to all subscribers of the filter. A value that is no longer there is not reported:
//! perhaps no client deleted it, and the broker lost it.

use smallvec::SmallVec;

use crate::mqtt::Message;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::retained::cache::Cache;
use crate::router::retained::{RetainedMessages, Sources};
use crate::router::sessions::Sessions;
use crate::router::sessions::came::{Came, Source};
use crate::router::sessions::tally::Tally;
use crate::router::types::Arrived;

impl RetainedMessages {
    /// The link of these filters is away: their subscribers know the values in the caches.
    pub(crate) fn link_lost(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        filters.iter().for_each(|filter| cache.miss(*filter));
    }

    /// The broker lost these filters: their subscribers know the values in the caches, and from now on
    /// the values that the filters bring.
    pub(crate) fn filters_lost(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        for filter in filters {
            cache.missed.begin(*filter, [].iter());
        }
    }

    /// The broker kept these filters: nothing was missed.
    pub(crate) fn nothing_missed(&self, filters: &[FilterId]) {
        let mut cache = self.cache.lock();
        filters.iter().for_each(|filter| cache.missed.end(*filter));
    }

    /// Forgets the values of filters that were lost and not regained, where they are not fetched again.
    /// `settled` returns how often links were lost, if no filter is lost now.
    pub(crate) fn forget_missed(&self, settled: impl FnOnce() -> Option<u64>) {
        if self.cache.lock().missed.is_empty() {
            return;
        }
        let settled = settled();
        let mut cache = self.cache.lock();
        // Twice in a row, without a loss in between: a filter that is regained just now is about to
        // be fetched.
        let still = settled.is_some() && settled == cache.missed.settled;
        cache.missed.settled = settled;
        if still && !cache.resyncs() {
            cache.missed.clear();
        }
    }

    /// The broker has a filter again that it had lost: it is fetched for all its subscribers.
    pub(crate) fn resync(&self, filter: FilterId, is_root: bool) {
        self.cache.lock().resync(filter, is_root);
        self.waker.raise();
    }

    /// The broker has a filter again that it had lost, and nobody is to get the values missed.
    pub(crate) fn skip_resync(&self, sources: &impl Sources, filter: FilterId) {
        self.cache.lock().resynced(sources, filter);
    }
}

/// Gives messages that were fetched anew to all subscribers of the filter that do not know them, like
/// live messages. Called with the cache locked, so that no newer message is overtaken.
pub(super) fn hand_missed(
    sessions: &Sessions,
    sources: &impl Sources,
    cache: &mut Cache,
    filter: FilterId,
    messages: &[Message],
    now: Millis,
) {
    let mut tally = Tally::default();
    for message in messages {
        let mut filters: SmallVec<[(FilterId, u64); 4]> = SmallVec::new();
        sources.receivers(filter, message.topic(), &mut |f, mask| {
            filters.push((f, mask));
        });
        for (filter, mask) in filters {
            if !cache.missed.is_new(filter, message)
                // A newer message comes by this filter too.
                || cache.is_ahead(filter, message, now)
            {
                continue;
            }
            let came = Came {
                message,
                filter,
                source: Source::Fetched,
                replayed: None,
                now,
            };
            sessions.deliver_to_shards(mask, &came, &mut tally);
        }
    }
    tally.wake();
    tally.flush();
}

impl Cache {
    /// The subscribers of a filter, and of those below it, have got every new value.
    pub(super) fn resynced(&mut self, sources: &impl Sources, filter: FilterId) {
        self.missed.end(filter);
        sources.below(filter, &mut |below| self.missed.end(below));
    }

    /// The subscribers of the message's filters know it.
    pub(super) fn learn(&mut self, arrived: &Arrived) {
        self.missed.learn(&arrived.message, &arrived.filters);
    }
}
