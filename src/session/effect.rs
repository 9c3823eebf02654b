//! What a session asks of the router.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::mqtt::{Message, SubscribeOptions};

use crate::session::inbound::Token;
use crate::session::incarnation::Incarnation;
use crate::topics::FilterId;

/// One filter of a SUBSCRIBE that passed the session's checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeRequest {
    /// Its place in the SUBSCRIBE.
    pub index: u16,
    /// The topic filter.
    pub filter: Box<str>,
    /// What the client asked for.
    pub options: SubscribeOptions,
}

/// What a packet or the time asks of the router.
#[derive(Debug)]
pub enum Effect {
    /// Forward to the core. No token: QoS 0, nobody waits for an answer.
    Publish {
        /// Names the publish in the core's answer.
        token: Option<Token>,
        /// What to publish.
        message: Message,
        /// The mark by which the session knows its publish again, where it has a No Local
        /// subscription that matches [MQTT-3.8.3-3].
        origin_mark: Option<Incarnation>,
    },
    /// Add subscriptions; each answer comes back through [`Session::subscribed`].
    Subscribe {
        /// Names the SUBSCRIBE in the answers: its packet identifier, or another number where two
        /// streams have the same in use.
        packet_id: u16,
        /// Its Subscription Identifier.
        identifier: Option<NonZeroU32>,
        /// The filters.
        requests: Vec<SubscribeRequest>,
    },
    /// These filters lost their subscription.
    Unsubscribe {
        /// The filters.
        filters: Vec<Unsubscribed>,
    },
}

/// A subscription that its client gave up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsubscribed {
    /// Number of the filter.
    pub filter: FilterId,
    /// The filter.
    pub name: Arc<str>,
    /// It had No Local.
    pub no_local: bool,
    /// Filters of the client, granted later, that match some of the same messages: it was the
    /// copies of this one that the client got.
    pub primary_over: Vec<FilterId>,
}
