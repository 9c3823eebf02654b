//! The calls of the data links and of the links for shared subscriptions.

use std::sync::Arc;

use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::broker::BrokerFeatures;
use crate::router::filters::actions::Released;
use crate::router::filters::filter::LinkSession;
use crate::router::filters::links::{UpstreamRequests, UpstreamSubscribe};
use crate::router::filters::restore::{RestoredLink, StaleLink};
use crate::router::handle::TaskWaker;

impl Router {
    /// Takes over the broker's features from a CONNACK. Filters that wait for them are placed. True:
    /// filters were placed before under other features, so all data links must begin anew.
    pub fn set_broker_features(&self, features: &BrokerFeatures, now: Millis) -> bool {
        let kept_retain = self.broker.set(features);
        let retain_changed = kept_retain != features.keeps_retain;
        let Some(placed) = self.filters.place_all(features, retain_changed, now) else {
            return false;
        };
        for refused in placed.refused {
            self.settle_answered(refused, now);
        }
        for waker in &self.data {
            waker.raise();
        }
        placed.changed
    }

    /// Wakes the task of data link `link`.
    pub fn data_waker(&self, link: usize) -> &Arc<TaskWaker> {
        &self.data[link]
    }

    /// The number among the data links of link `n` for shared subscriptions.
    pub fn shared_link(&self, n: usize) -> usize {
        self.links.data_max + n
    }

    /// Whether a SUBSCRIBE or an UNSUBSCRIBE may have to be sent on data link `link`. A busy link asks
    /// often, and nearly always in vain.
    pub(crate) fn has_requests(&self, link: usize) -> bool {
        self.filters.has_requests(link)
    }

    /// Requests for up to `max` filters to send on data link `link` now. `answered`: no earlier request of
    /// the link waits for the broker.
    pub(crate) fn next_requests(
        &self,
        link: usize,
        max: usize,
        answered: bool,
    ) -> UpstreamRequests {
        self.filters.next_requests(link, max, answered)
    }

    /// Up to `max` filters whose SUBSCRIBE is to be sent on data link `link` now.
    pub fn next_subscribes(&self, link: usize, max: usize) -> Vec<UpstreamSubscribe> {
        self.filters.next_subscribes(link, max)
    }

    /// Up to `max` filters whose UNSUBSCRIBE is to be sent on data link `link` now.
    pub fn next_unsubscribes(&self, link: usize, max: usize) -> Vec<(FilterId, Arc<str>)> {
        self.filters.next_unsubscribes(link, max)
    }

    /// The session that an earlier process had for data link `link`, until the link connects.
    pub fn restored_link(&self, link: usize) -> Option<RestoredLink> {
        self.filters.restored_link(link)
    }

    /// Data link `link` is about to connect to a server under a client identifier, with a clean session or
    /// the one that it has. It may do so once [`Router::may_connect`] says so; its task is woken then.
    pub fn link_connects(&self, link: usize, clean: bool, client_id: &str, server: &str) {
        self.filters.link_connects(link, clean, client_id, server);
    }

    /// Whether the disk knows that data link `link` is about to connect.
    pub fn may_connect(&self, link: usize) -> bool {
        self.filters.may_connect(link)
    }

    /// Whether the sessions of the data links at the broker outlive the process.
    pub fn keeps_link_sessions(&self) -> bool {
        self.filters.keeps_link_sessions()
    }

    /// The link sessions of an earlier process that no link has any more.
    pub fn stale_links(&self) -> Vec<StaleLink> {
        self.filters.stale_links()
    }

    /// The broker does not have a stale link session any more, or nobody can end it.
    pub fn stale_link_ended(&self, client_id: &str) {
        self.filters.stale_link_ended(client_id);
    }

    /// Data link `link` is connected, and the broker still has its filters, or not; `first`: for the
    /// first time. Returns whether messages may have been missed.
    pub fn data_link_up(
        &self,
        link: usize,
        session: LinkSession,
        first: bool,
        now: Millis,
    ) -> bool {
        let up = self.filters.link_up(link, session, first, now);
        // A PINGREQ of the lost connection is never answered.
        if self.awaits_barriers() {
            self.barriers.ask(link);
        }
        self.data[link].raise();
        self.take_actions(up.actions, now);
        if session == LinkSession::Resumed {
            self.retained.nothing_missed(&up.kept);
        } else if self.resyncs() {
            self.retained.filters_lost(&up.lost);
        }
        self.retained.forget(up.filters.into_iter());
        if up.gap {
            metrics().upstream_gaps.increment(1);
            self.sessions.note_gap(&up.lost);
            self.sessions
                .note_gap_of(&self.groups.members(&up.lost_groups));
        }
        up.gap
    }

    /// Data link `link` is lost.
    pub fn data_link_down(&self, link: usize, now: Millis) {
        let filters = self.filters.link_down(link, now);
        if self.resyncs() {
            self.retained.link_lost(&filters);
        }
        let served = self.retained.stop_waiting(&filters);
        self.end_waits(&served, now);
        self.retained.forget(filters.into_iter());
    }

    /// Whether every data link is up and has its filters again: every message that is published now
    /// arrives.
    pub fn data_settled(&self) -> bool {
        self.filters.is_complete()
    }

    /// How often a data link was lost: the same number before and after means that the broker was there
    /// all the time.
    pub fn data_losses(&self) -> u64 {
        self.filters.link_losses()
    }

    /// A link of any role was lost on which the broker had answered everything: a broker that ends
    /// takes such links with it.
    pub fn link_lost_unprovoked(&self) {
        self.filters.lost_unprovoked();
    }

    /// How often that happened: the same number before and after means that the broker was there all the
    /// time, and ended other links for a packet.
    pub fn unprovoked_losses(&self) -> u64 {
        self.filters.unprovoked_losses()
    }

    /// The broker has ended a link, and no idle one, while the SUBSCRIBEs for these filters had no
    /// answer. To be called before [`Router::data_link_up`].
    pub fn subscribes_ended_link(&self, filters: &[FilterId], now: Millis) {
        let actions = self.filters.subscribes_ended_link(filters, now);
        self.take_actions(actions, now);
    }

    /// Whether data link or shared link `link` is to be connected.
    pub(crate) fn filter_link_wanted(&self, link: usize) -> bool {
        link < self.filters.data_links_wanted() || self.filters_on(link) > 0
    }

    /// Filters on data link `link`.
    pub fn filters_on(&self, link: usize) -> usize {
        self.filters.count_on(link)
    }

    /// Whether retained messages of lost filters are fetched again, for all subscribers.
    pub(super) fn resyncs(&self) -> bool {
        self.config.retained_resync && self.broker.retain_available()
    }

    /// Releases the filters that do not linger.
    pub(super) fn tick_unsubscribed(&self, now: Millis) {
        let forget_groups = |gone: &[FilterId]| self.groups.forget(gone);
        self.finish_release(self.filters.release_due(now, forget_groups));
    }

    /// Releases the lingering filters whose time is over.
    pub(super) fn tick_linger(&self, now: Millis) {
        let forget_groups = |gone: &[FilterId]| self.groups.forget(gone);
        for released in self.filters.release_overdue(now, forget_groups) {
            self.finish_release(released);
        }
    }

    fn finish_release(&self, released: Released) {
        if !released.forget_retained.is_empty() {
            self.retained.forget(released.forget_retained.into_iter());
        }
        self.wake_links(released.wake);
    }
}
