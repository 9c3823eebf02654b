//! Fetched messages go to the clients that asked for them, once no older message can follow.

use std::time::Duration;

use parking_lot::MutexGuard;

use crate::hashing::LookUpSet;
use crate::mqtt::Message;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::retained::cache::{Cache, Cached, Requests, State};
use crate::router::retained::resync::hand_missed;
use crate::router::retained::{RetainedMessages, Sources};
use crate::router::sessions::Sessions;
use crate::router::sessions::tally::Tally;
use crate::router::types::{RetainedRequest, Served};

/// How long fetched messages may wait for a data link that is away.
const BUFFERED_FOR: Duration = Duration::from_secs(5);

impl RetainedMessages {
    /// Whether fetched messages wait for a data link.
    pub(crate) fn is_buffering(&self) -> bool {
        self.cache.lock().buffered > 0
    }

    /// A barrier of a data link has passed: hands on the messages that waited for it. Returns the
    /// subscriptions that have theirs now.
    pub(crate) fn barrier_passed(
        &self,
        sessions: &Sessions,
        sources: &impl Sources,
        link: usize,
        number: u64,
        now: Millis,
    ) -> Vec<Served> {
        let cache = self.cache.lock();
        if cache.buffered == 0 {
            return Vec::new();
        }
        let buffering: Vec<FilterId> = cache.buffering.iter().copied().collect();
        let passed = |of: usize, barrier: u64| of == link && barrier <= number;
        self.release(sessions, sources, cache, &buffering, passed, now)
    }

    /// Hands on messages that have waited long enough for a data link. Returns the
    /// subscriptions that have theirs now.
    pub(crate) fn release_late(
        &self,
        sessions: &Sessions,
        sources: &impl Sources,
        now: Millis,
    ) -> Vec<Served> {
        let cache = self.cache.lock();
        let is_late = |filter: &FilterId| {
            let ending = cache.filters.get(filter).and_then(|c| c.ending);
            ending.is_some_and(|until| until <= now)
        };
        let late: Vec<FilterId> = cache.buffering.iter().copied().filter(is_late).collect();
        self.release(sessions, sources, cache, &late, |_, _| true, now)
    }

    fn release(
        &self,
        sessions: &Sessions,
        sources: &impl Sources,
        mut cache: MutexGuard<'_, Cache>,
        filters: &[FilterId],
        passed: impl Fn(usize, u64) -> bool,
        now: Millis,
    ) -> Vec<Served> {
        let (mut served, mut again) = (Vec::new(), false);
        for &filter in filters {
            let messages = cache.release(filter, &passed);
            hand_fetched(sessions, sources, &mut cache, filter, &messages, now);
            again |= end_if_over(sources, &mut cache, filter, &mut served);
            cache.served(filter, &mut served);
        }
        drop(cache);
        if again {
            self.waker.raise();
        }
        served
    }

    /// The fetch of these filters is over. Not `complete`: it failed and is to be tried again. Returns
    /// the subscriptions that have their retained messages now.
    pub(crate) fn fetch_ended(
        &self,
        sources: &impl Sources,
        filters: &[FilterId],
        complete: bool,
        now: Millis,
    ) -> Vec<Served> {
        let mut cache = self.cache.lock();
        let (mut served, mut again) = (Vec::new(), false);
        for &filter in filters {
            let Some(cached) = cache.filters.get_mut(&filter) else {
                continue;
            };
            if cached.state != State::Fetching {
                continue;
            }
            if complete {
                cached.ending = Some(now + BUFFERED_FOR);
                again |= end_if_over(sources, &mut cache, filter, &mut served);
            } else {
                drop(cache.release(filter, |_, _| true));
                again |= end(sources, &mut cache, filter, false, &mut served);
            }
        }
        drop(cache);
        if again {
            self.waker.raise();
        }
        served
    }
}

/// Fetched messages reach the cache and the subscribers, except on topics that a live message reached
/// since. The cache is free for others in between, so their changes are looked at again.
pub(super) fn hand_fetched(
    sessions: &Sessions,
    sources: &impl Sources,
    cache: &mut MutexGuard<'_, Cache>,
    filter: FilterId,
    messages: &[Message],
    now: Millis,
) {
    let mut messages = newest(cache, filter, messages.iter().cloned());
    let Some(cached) = cache.filters.get_mut(&filter) else {
        return;
    };
    if messages.is_empty() {
        return;
    }
    let requests: Vec<RetainedRequest> = cached.requests.iter().map(|(_, r)| r).collect();
    let resync = cached.resync;
    cached.handing += 1;
    for message in &messages {
        cache.put(filter, message);
    }
    if resync {
        hand_missed(sessions, sources, cache, filter, &messages, now);
    }
    for request in &requests {
        let cached = cache.filters.get(&filter);
        if !cached.is_some_and(|c| c.requests.contains(request.session)) {
            // It was cancelled while others had the cache.
            continue;
        }
        hand(sessions, cache, filter, &messages, request, now);
        MutexGuard::bump(cache);
        messages = newest(cache, filter, messages.into_iter());
    }
    if let Some(cached) = cache.filters.get_mut(&filter) {
        cached.handing -= 1;
    }
}

/// Hands retained messages to one session.
pub(super) fn hand(
    sessions: &Sessions,
    cache: &Cache,
    filter: FilterId,
    messages: &[Message],
    request: &RetainedRequest,
    now: Millis,
) {
    let mut tally = Tally::default();
    let mut shard = sessions.shard(request.session.shard);
    for message in messages {
        if message.payload().is_empty() {
            continue;
        }
        if cache.is_ahead(filter, message, now)
            && shard.has_another(request.session, filter, message.topic())
        {
            continue;
        }
        shard.hand(sessions.limits(), now, message, filter, request, &mut tally);
    }
    sessions.charge(&mut shard);
    drop(shard);
    tally.wake();
    tally.flush();
}

/// Ends a fetch that is complete, unless some of its messages are still buffered or handed on. Returns
/// whether the filter is to be fetched again.
fn end_if_over(
    sources: &impl Sources,
    cache: &mut Cache,
    filter: FilterId,
    served: &mut Vec<Served>,
) -> bool {
    cache.filters.get(&filter).is_some_and(|c| c.is_over())
        && end(sources, cache, filter, true, served)
}

/// Ends a fetch. The subscriptions that have their retained messages are added to `served`; those of a fetch
/// that failed go on waiting. Returns whether the filter is to be fetched again.
fn end(
    sources: &impl Sources,
    cache: &mut Cache,
    filter: FilterId,
    complete: bool,
    served: &mut Vec<Served>,
) -> bool {
    let Some(cached) = cache.filters.get_mut(&filter) else {
        return false;
    };
    cached.live = LookUpSet::default();
    cached.answered = true;
    cached.ending = None;
    if complete {
        cached.requests = Requests::default();
    }
    let resync = cached.resync && (!complete || cached.early);
    if cached.resync && !resync {
        cached.resync = false;
        cache.resynced(sources, filter);
    }
    if complete {
        cache.served(filter, served);
    }
    let Some(cached) = cache.filters.get_mut(&filter) else {
        return false;
    };
    if complete && !cached.overflow && !cached.stale {
        cached.state = State::Complete;
        cache.complete.put(filter, ());
        return false;
    }
    let mut requests = std::mem::take(&mut cached.requests);
    requests.append(&mut cached.late);
    let waiting = std::mem::take(&mut cached.waiting);
    let (overflow, handing) = (cached.overflow, cached.handing);
    cache.drop_filter(filter);
    if requests.is_empty() && !resync {
        return false;
    }
    let mut queued = Cached::queued(requests);
    queued.waiting = waiting;
    queued.resync = resync;
    // The callers that hand messages on count down when they have the cache again.
    queued.handing = handing;
    // The messages of a root are not kept.
    queued.overflow = resync && overflow;
    cache.filters.insert(filter, queued);
    cache.queue.push_back(filter);
    true
}

/// The fetched messages of a filter on whose topic no live message has come since.
fn newest(
    cache: &Cache,
    filter: FilterId,
    messages: impl Iterator<Item = Message>,
) -> Vec<Message> {
    let cached = cache.filters.get(&filter);
    let newest = |m: &Message| cached.is_some_and(|c| !c.live.contains(&cache.topic(m)));
    messages.filter(newest).collect()
}
