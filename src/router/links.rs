//! The calls of the publish links, of the retained link, and of the data links for their barriers.

use std::sync::Arc;

use crate::mqtt::Message;
use crate::session::SessionKey;
use crate::telemetry::{DeferReason, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::handle::TaskWaker;
use crate::router::publish::queue::PublishQueues;
use crate::router::types::{Due, Served};
use crate::router::{Answered, Router, SessionRef};

/// Messages that were kept back are delivered in batches of this many.
const KEPT_AT_ONCE: usize = 512;

impl Router {
    /// Publish links that are dialled.
    pub fn publish_links_wanted(&self) -> usize {
        self.publishing.links_wanted()
    }

    /// Asks for another publish link, once the last that was asked for is there. Returns whether
    /// there will be one.
    pub fn add_publish_link(&self) -> bool {
        self.publishing.add_link()
    }

    /// Publish link `link` is connected, or not.
    pub fn publish_link_up(&self, link: usize, up: bool, now: Millis) {
        self.publishing.link_up(link, up, now);
    }

    /// Whether publish link `link` is to send a PINGREQ now, behind everything that it took from its
    /// queues, and behind the publishes that it sends again. If so, it counts as sent.
    pub fn publish_ping_due(&self, link: usize, now: Millis) -> bool {
        self.publishing.ping_due(link, now)
    }

    /// The broker has answered a PINGREQ of [`Router::publish_ping_due`], so that everything which
    /// the link sent before it has arrived.
    pub fn publish_ping_answered(&self, link: usize) {
        self.publishing.ping_answered(link);
    }

    /// Works on the publishes that wait for publish link `link`.
    pub fn publish_queues<R>(&self, link: usize, f: impl FnOnce(&mut PublishQueues) -> R) -> R {
        self.publishing.queues(link, f)
    }

    /// Wakes the task of publish link `link`.
    pub fn publish_waker(&self, link: usize) -> &Arc<TaskWaker> {
        self.publishing.waker(link)
    }

    /// Whether publishes are limited, because data links lag.
    pub fn publishes_limited(&self) -> bool {
        self.publishing.is_limited()
    }

    /// Takes up to `wanted` publishes of what the data links allow to publish link `link` in this round.
    /// Returns how many it may send.
    pub fn take_allowance(&self, link: usize, wanted: usize) -> usize {
        self.publishing.take_allowance(link, wanted)
    }

    /// Gives back publishes that publish link `link` took with [`Router::take_allowance`] and did not
    /// have.
    pub fn return_allowance(&self, link: usize, unused: usize) {
        self.publishing.return_allowance(link, unused);
    }

    /// A round of data link `link` ends. Returns whether publishes wait for the next one.
    pub fn publishes_used_up(&self, link: usize) -> bool {
        let used_up = self.publishing.is_used_up(link);
        if used_up {
            metrics().publishes_deferred[DeferReason::DataLinkLag].increment(1);
        }
        used_up
    }

    /// A round of data link `link` begins, in which so many publishes may go to the broker; `None`: any
    /// number.
    pub fn limit_publishes(&self, link: usize, window: Option<u32>) {
        self.publishing.limit(link, window);
    }

    /// Publishes that wait for publish links.
    pub fn publishes_waiting(&self) -> usize {
        self.publishing.waiting()
    }

    /// The broker's answers, for the clients that wait for them.
    pub fn answered(&self, answers: &[Answered], now: Millis) {
        self.sessions.answered(answers, now);
    }

    /// A probe of the broker begins, with topics below `topic`, which nobody else can know.
    pub(crate) fn probe_begins(&self, topic: &str) {
        self.own_probes.begin(topic);
    }

    /// The probe below `topic` is over. Returns whether it came back to a listener of this process.
    pub(crate) fn probe_ends(&self, topic: &str) -> bool {
        self.own_probes.end(topic)
    }

    /// Whether a topic or filter that a client names is one of this process's own probes.
    pub(crate) fn is_own_probe(&self, topic: &str) -> bool {
        self.own_probes.came(topic)
    }

    /// The name of a session.
    pub fn session_key(&self, session: SessionRef) -> Option<SessionKey> {
        self.sessions.key(session)
    }

    /// Wakes the retained link's task.
    pub fn retained_waker(&self) -> &Arc<TaskWaker> {
        self.retained.waker()
    }

    /// Up to `max` filters whose fetch begins now, with their names.
    pub fn next_fetches(&self, max: usize) -> Vec<(FilterId, Arc<str>)> {
        self.retained.next_fetches(&self.filters, max)
    }

    /// The retained link brought a message for a filter.
    pub fn fetched(&self, filter: FilterId, message: &Message, now: Millis) {
        let (sessions, barriers) = (&self.sessions, &self.barriers);
        self.retained
            .fetched(sessions, barriers, &self.filters, filter, message, now);
    }

    /// The broker has answered a PINGREQ behind the fetch of these filters: the messages that it had
    /// are here.
    pub fn fetch_answered(&self, filters: &[FilterId], now: Millis) {
        self.end_waits(&self.retained.fetch_answered(filters), now);
    }

    /// The fetch of these filters is over. Not `complete`: it failed and is to be tried again.
    pub fn fetch_ended(&self, filters: &[FilterId], complete: bool, now: Millis) {
        let served = (self.retained).fetch_ended(&self.filters, filters, complete, now);
        self.end_waits(&served, now);
    }

    /// These filters cannot be fetched, and are not tried again: their subscribers get no retained
    /// messages, and nothing is cached.
    pub fn fetch_given_up(&self, filters: &[FilterId], now: Millis) {
        self.retained.forget(filters.iter().copied());
        self.fetch_ended(filters, true, now);
    }

    /// Filters whose retained messages are being fetched, or are to be.
    pub fn retained_pending(&self) -> u64 {
        self.retained.pending()
    }

    /// Bytes in the retained cache.
    pub fn retained_bytes(&self) -> u64 {
        self.retained.bytes()
    }

    /// Whether a PINGREQ is wanted on data link `link`.
    pub fn barrier_wanted(&self, link: usize) -> bool {
        self.barriers.wanted(link)
    }

    /// A PINGREQ is about to be sent on data link `link`. Returns its number.
    pub fn barrier_begins(&self, link: usize) -> u64 {
        self.barriers.begin(link)
    }

    /// PINGREQ `number` of data link `link` was answered, and all messages before it are fanned out.
    pub fn barrier_passed(&self, link: usize, number: u64, now: Millis) {
        let (sessions, filters) = (&self.sessions, &self.filters);
        let served = (self.retained).barrier_passed(sessions, filters, link, number, now);
        self.end_waits(&served, now);
        for moved in self.filters.moves_passed(link, number, now) {
            self.deliver_kept(moved, now);
        }
        let next = || self.barriers.ask_all(self.filters.data_links_used().iter());
        let complete = self.sessions.barrier_passed(link, number, next);
        self.filters.unsubscribed(&complete, now);
    }

    /// Delivers the messages of a filter that were kept back until its own link serves it.
    fn deliver_kept(&self, filter: FilterId, now: Millis) {
        loop {
            let mut kept = self.filters.take_kept(filter, KEPT_AT_ONCE, now);
            if kept.is_empty() {
                return;
            }
            self.fan_out(&mut kept, now);
        }
    }

    /// Whether PINGREQs of a lost connection have to be sent again.
    pub(super) fn awaits_barriers(&self) -> bool {
        self.retained.is_buffering() || self.sessions.hands_over() || self.filters.is_moving()
    }

    /// A session gave up filters that overlapping ones of it take over from, once every data link has
    /// brought everything that is under way.
    pub(super) fn hand_over(&self, session: SessionRef) {
        self.sessions.handover_begins(session);
        let barriers = self.barriers.ask_all(self.filters.data_links_used().iter());
        self.sessions.await_barriers(session, &barriers);
    }

    /// Sends the retained messages that follow a SUBACK.
    pub(super) fn request_retained(&self, due: Vec<Due>, now: Millis) {
        for (filter, request) in due {
            let (sessions, filters) = (&self.sessions, &self.filters);
            let served = (self.retained).request(sessions, filters, filter, request, now);
            self.end_waits(served.as_slice(), now);
        }
    }

    /// The retained messages of these subscriptions are sent: live ones follow.
    pub(super) fn end_waits(&self, served: &[Served], now: Millis) {
        for served in served {
            self.sessions.end_wait(served, now);
        }
    }
}
