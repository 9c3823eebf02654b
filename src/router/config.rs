//! The router's configuration.

use std::time::Duration;

use crate::time::UnixMillis;

/// The router's configuration. Sizes are in bytes.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Number of data links at first, 1 to 8.
    pub data_links: usize,
    /// The number of data links to which they may grow: where the broker has no Subscription
    /// Identifiers, for filters that overlap others, and elsewhere for many filters; 1 to 8.
    pub data_links_max: usize,
    /// Where the broker has Subscription Identifiers, another data link is opened when there are more
    /// filters than this for each.
    pub data_link_filters: usize,
    /// Number of links for shared subscriptions at first, 1 to 8.
    pub shared_links: usize,
    /// The number of shared links to which they may grow for the same reason, 1 to 8.
    pub shared_links_max: usize,
    /// Messages of shared subscriptions are distributed at this node, because the broker has no working
    /// ones.
    pub local_groups: bool,
    /// Roots: disjoint filters that are subscribed for good. Clients' filters inside them cost the
    /// broker nothing.
    pub roots: Vec<String>,
    /// Number of publish links at first, 1 to 8.
    pub publish_links: usize,
    /// The number of publish links to which they may grow while their windows are the limit.
    pub publish_links_max: usize,
    /// The topic of clients' presence, `%c` being the client identifier. `None`: it is not published.
    pub presence_topic: Option<String>,
    /// The time of day when the clock was at zero.
    pub started_at: UnixMillis,
    /// How long a filter without subscribers stays subscribed.
    pub linger: Duration,
    /// How long a filter without subscribers stays subscribed at least: it goes then if it has much
    /// traffic, or if there are too many.
    pub linger_busy_min: Duration,
    /// Filters that may linger.
    pub filters_lingering_max: usize,
    /// How long a SUBSCRIBE for a new filter waits for an absent broker.
    pub subscribe_wait: Duration,
    /// After that time the filter is granted, with a gap; else it is refused.
    pub subscribe_accept: bool,
    /// Budget of all publishes that wait for the broker.
    pub publishes_waiting: u64,
    /// One client's share of that budget.
    pub publishes_waiting_per_client: usize,
    /// The size of the retained cache.
    pub retained_cache: usize,
    /// After the broker lost a filter, its retained messages are fetched again for all subscribers.
    pub retained_resync: bool,
    /// Budget of all sessions and of the table of filters, without the queues.
    pub sessions: u64,
    /// Budget of all sessions' queues.
    pub queues: u64,
    /// Budget of the output of all connections together.
    pub output: u64,
    /// An entry of the output that no socket takes for this long ends its connection.
    pub write_stall: Duration,
    /// Sessions whose clients are away for longer than this end, least recently connected first, when
    /// new sessions find no room. `None`: no session ends for that.
    pub evict_after: Option<Duration>,
}
