//! What a session asks of the router.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::mqtt::{Message, QoS, SubscribeOptions};
use crate::topics::FilterId;

use crate::session::inbound::Token;
use crate::session::incarnation::Incarnation;
use crate::session::waiting::WaitNumber;

/// One filter of a SUBSCRIBE that passed the session's checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeRequest {
    /// Its place in the SUBSCRIBE.
    pub index: u16,
    /// The topic filter, below the client's mount.
    pub filter: Box<str>,
    /// The options that the client asked for.
    pub options: SubscribeOptions,
}

/// What a packet asks of the router.
#[derive(Debug)]
pub enum Effect {
    /// Forward a publish to the broker.
    Publish {
        /// Names the publish in the broker's answer. `None`: QoS 0 or a will, which need no answer.
        token: Option<Token>,
        /// The message.
        message: Message,
        /// The mark by which the session knows its publish again, where it has a No Local
        /// subscription that matches [MQTT-3.8.3-3].
        origin_mark: Option<Incarnation>,
    },
    /// Add subscriptions. Each request is answered through
    /// [`Session::subscribed`](crate::session::Session::subscribed).
    Subscribe {
        /// Names the SUBSCRIBE in the answers: its packet identifier, or another number where two
        /// streams have the same one in use.
        packet_id: u16,
        /// Its Subscription Identifier.
        identifier: Option<NonZeroU32>,
        /// The filters.
        requests: Vec<SubscribeRequest>,
    },
    /// Count filters of a SUBSCRIBE that the session refused because of its client's limits.
    SubscribeOverLimit {
        /// Their number.
        filters: usize,
    },
    /// Release these subscriptions, which the session has ended.
    Unsubscribe {
        /// The subscriptions.
        filters: Vec<Unsubscribed>,
    },
}

/// A subscription whose retained messages are to follow the SUBACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetainedDue {
    /// The router's number of the filter.
    pub filter: FilterId,
    /// The granted QoS.
    pub qos: QoS,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// The wait of its live messages, which ends behind the retained ones.
    pub wait: Option<WaitNumber>,
}

/// A subscription that its client ended by UNSUBSCRIBE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsubscribed {
    /// The router's number of the filter.
    pub filter: FilterId,
    /// The filter.
    pub name: Arc<str>,
    /// The subscription had No Local.
    pub no_local: bool,
    /// Whether the client has other subscriptions, granted later or still to be granted, that match
    /// some of the same messages, and which filters come later. The client got those messages as copies
    /// of this subscription.
    pub primary_over: Option<PrimaryOver>,
}

/// The filters that come after one that its client unsubscribed. A filter that matches none of the
/// same messages may be among them: whether a message matches both is to be asked too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryOver {
    order: Arc<GrantOrder>,
    place: u32,
}

impl PrimaryOver {
    /// The filters behind place `place` of `order`.
    pub fn new(order: &Arc<GrantOrder>, place: u32) -> Self {
        Self {
            order: order.clone(),
            place,
        }
    }

    /// Whether the filter came later.
    pub fn contains(&self, filter: FilterId) -> bool {
        self.order.place(filter).is_some_and(|at| at > self.place)
    }

    /// The order, which all filters of one UNSUBSCRIBE share.
    pub fn order(&self) -> &Arc<GrantOrder> {
        &self.order
    }
}

/// A client's filters, with their places in the order of the grants, at the time of an UNSUBSCRIBE.
#[derive(Debug, PartialEq, Eq)]
pub struct GrantOrder(Box<[(FilterId, u32)]>);

impl GrantOrder {
    /// The order of these filters.
    pub fn new(filters: impl Iterator<Item = FilterId>) -> Self {
        let mut places: Vec<(FilterId, u32)> = filters.zip(0..).collect();
        places.sort_unstable();
        Self(places.into())
    }

    /// The place of a filter.
    pub fn place(&self, filter: FilterId) -> Option<u32> {
        let at = self.0.binary_search_by_key(&filter, |(filter, _)| *filter);
        at.ok().map(|at| self.0[at].1)
    }

    /// The number of its filters.
    pub fn filters(&self) -> usize {
        self.0.len()
    }
}
