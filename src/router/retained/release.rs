//! What was fetched goes to those who wait for it, once nothing older can follow it.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use crate::mqtt::Message;
use crate::router::Router;
use crate::router::delivery::fanout::Tally;
use crate::router::retained::cache::{Cached, Retained, State};
use crate::router::retained::{Reply, RetainedRequest};
use crate::time::Millis;
use crate::topics::FilterId;

/// How long what was fetched may wait for a data link that is away, milliseconds.
const HELD_FOR: u64 = 5000;

impl Router {
    /// The data link that a filter's messages come by.
    pub(super) fn source_link(&self, number: FilterId) -> Option<usize> {
        let table = self.table.read();
        let filter = table.get(table.source(number))?;
        filter.link().filter(|link| *link < self.config.data_links)
    }

    /// Whether what changes now is not seen at once.
    pub(super) fn source_is_away(&self, number: FilterId) -> bool {
        let link = self.source_link(number);
        link.is_some_and(|link| !self.data_up[link].load(Ordering::Acquire))
    }

    /// Whether fetched messages wait for a data link.
    pub(in crate::router) fn holds_fetched(&self) -> bool {
        self.retained.lock().held > 0
    }

    /// Hands on what is held for a link and moment that `passed`.
    pub(in crate::router) fn release_fetched(
        &self,
        passed: impl Fn(usize, u64) -> bool,
        now: Millis,
    ) {
        let retained = self.retained.lock();
        if retained.held == 0 {
            return;
        }
        let mut holding: Vec<FilterId> = retained.holding.iter().copied().collect();
        holding.sort_unstable();
        self.release_of(retained, &holding, passed, now);
    }

    /// Fetches that have waited long enough for a data link.
    pub(super) fn late_fetches(&self, now: Millis) {
        let retained = self.retained.lock();
        let late = |number: &FilterId| {
            let ending = retained.filters.get(number).and_then(|c| c.ending);
            ending.is_some_and(|until| until <= now)
        };
        let mut late: Vec<FilterId> = retained.holding.iter().copied().filter(late).collect();
        late.sort_unstable();
        self.release_of(retained, &late, |_, _| true, now);
    }

    fn release_of(
        &self,
        mut retained: MutexGuard<'_, Retained>,
        numbers: &[FilterId],
        passed: impl Fn(usize, u64) -> bool,
        now: Millis,
    ) {
        let (mut replies, mut again) = (Vec::new(), false);
        for &number in numbers {
            let messages = retained.release(number, &passed);
            self.hand_fetched(&mut retained, number, &messages, now);
            again |= self.end_if_over(&mut retained, number, &mut replies);
            replies.extend(retained.replies_of(number));
        }
        drop(retained);
        self.reply(&replies);
        if again {
            self.fetch.raise();
        }
    }

    /// Fetched messages reach cache and subscribers, but for topics that a live one reached since.
    /// The cache is free for others in between: what they do is looked at again.
    pub(super) fn hand_fetched(
        &self,
        retained: &mut MutexGuard<'_, Retained>,
        number: FilterId,
        messages: &[Message],
        now: Millis,
    ) {
        let mut messages = newest(retained, number, messages.iter().cloned());
        let Some(cached) = retained.filters.get_mut(&number) else {
            return;
        };
        if messages.is_empty() {
            return;
        }
        let wants: Vec<RetainedRequest> = cached.wants.values().copied().collect();
        let resync = cached.resync;
        cached.handing += 1;
        for message in &messages {
            retained.put(number, message);
        }
        if resync {
            self.hand_missed(retained, number, &messages, now);
        }
        for want in &wants {
            self.hand_retained(retained, number, &messages, want, now);
            MutexGuard::bump(retained);
            messages = newest(retained, number, messages.into_iter());
        }
        if let Some(cached) = retained.filters.get_mut(&number) {
            cached.handing -= 1;
        }
    }

    /// Hands retained messages to one session.
    pub(super) fn hand_retained(
        &self,
        retained: &Retained,
        number: FilterId,
        messages: &[Message],
        want: &RetainedRequest,
        now: Millis,
    ) {
        let Some(shard) = self.shards.get(usize::from(want.session.shard)) else {
            return;
        };
        let mut tally = Tally::default();
        let mut shard = shard.lock();
        for message in messages {
            if message.payload().is_empty() {
                continue;
            }
            if retained.is_ahead(number, message, now)
                && shard.has_another(want.session, number, message.topic())
            {
                continue;
            }
            shard.hand(&self.limits, now, message, number, want, &mut tally);
        }
        self.charge_entries(&mut shard);
        drop(shard);
        tally.wake();
        tally.flush();
    }

    /// The fetch of these filters is over. Not `complete`: it failed and is to be tried again.
    pub fn fetch_ended(&self, numbers: &[FilterId], complete: bool, now: Millis) {
        let mut retained = self.retained.lock();
        let (mut replies, mut again) = (Vec::new(), false);
        for &number in numbers {
            let Some(cached) = retained.filters.get_mut(&number) else {
                continue;
            };
            if cached.state != State::Fetching {
                continue;
            }
            if complete {
                cached.ending = Some(now + HELD_FOR);
                again |= self.end_if_over(&mut retained, number, &mut replies);
            } else {
                drop(retained.release(number, |_, _| true));
                again |= self.end(&mut retained, number, false, &mut replies);
            }
        }
        drop(retained);
        self.reply(&replies);
        if again {
            self.fetch.raise();
        }
    }

    /// Ends a fetch that is complete, unless something of it is still held or handed on.
    fn end_if_over(
        &self,
        retained: &mut Retained,
        number: FilterId,
        replies: &mut Vec<Reply>,
    ) -> bool {
        retained.filters.get(&number).is_some_and(|c| c.is_over())
            && self.end(retained, number, true, replies)
    }

    /// Whether the filter is to be fetched again.
    fn end(
        &self,
        retained: &mut Retained,
        number: FilterId,
        complete: bool,
        replies: &mut Vec<Reply>,
    ) -> bool {
        let Some(cached) = retained.filters.get_mut(&number) else {
            return false;
        };
        cached.live = HashSet::default();
        cached.through = true;
        cached.ending = None;
        if complete {
            cached.wants.clear();
        }
        let resync = cached.resync && (!complete || cached.early);
        if cached.resync && !resync {
            cached.resync = false;
            self.resynced(retained, number);
        }
        replies.extend(retained.replies_of(number));
        let Some(cached) = retained.filters.get_mut(&number) else {
            return false;
        };
        if complete && !cached.overflow && !cached.stale {
            cached.state = State::Complete;
            retained.complete.put(number, ());
            return false;
        }
        let mut wants = std::mem::take(&mut cached.wants);
        wants.append(&mut cached.late);
        let (overflow, handing) = (cached.overflow, cached.handing);
        retained.drop_filter(number);
        if wants.is_empty() && !resync {
            return false;
        }
        let mut queued = Cached::queued(wants);
        queued.resync = resync;
        // They count down when they have the cache again.
        queued.handing = handing;
        // All that is below a root is not kept.
        queued.overflow = resync && overflow;
        retained.filters.insert(number, queued);
        retained.queue.push_back(number);
        true
    }
}

/// Those of a filter's fetched messages that no live one has reached since.
fn newest(
    retained: &Retained,
    number: FilterId,
    messages: impl Iterator<Item = Message>,
) -> Vec<Message> {
    let cached = retained.filters.get(&number);
    let newest = |m: &Message| cached.is_some_and(|c| !c.live.contains(&retained.topic(m)));
    messages.filter(newest).collect()
}
