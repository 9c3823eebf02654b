//! Subscriptions of an embedded broker, as its modules share them.

use crate::mqtt::{QoS, SubscribeOptions};

/// Where a session's subscription is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the filter with this key.
    Filter(u32),
    /// In a group, which is found by the subscription's name.
    Group,
}

/// A filter that at least one session subscribes to.
pub(super) struct Filter {
    pub name: Box<str>,
    pub members: Vec<Member>,
}

/// One session's subscription to a filter, or its membership of a group.
#[derive(Clone, Copy)]
pub(super) struct Member {
    pub session: u32,
    pub options: SubscribeOptions,
    /// Subscription Identifier.
    pub id: Option<u32>,
    /// The filter is in the queue for QoS 0 and in the other one.
    pub both_queues: bool,
}

/// The retained messages of a subscription, to be sent later.
pub(super) struct LateReplay {
    pub session: u32,
    /// Tells the session from another one that has its key.
    pub serial: u64,
    pub filter: Box<str>,
    pub qos: QoS,
    pub id: Option<u32>,
}
