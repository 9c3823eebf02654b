//! Types that several of the router's modules share.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::mqtt::{Message, QoS};
use crate::session::Incarnation;
use crate::time::Millis;
use crate::topics::FilterId;

/// Names a session in the router: where it is, and which one of those that were there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionRef {
    /// The shard.
    pub shard: u16,
    /// The place in the shard.
    pub slot: u32,
    /// Which session in that place.
    pub slot_version: u32,
}

/// The client's end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Listener name.
    pub listener: Arc<str>,
    /// Transport name.
    pub transport: &'static str,
    /// Silence after which its WebSocket is pinged, milliseconds; 0: never.
    pub ping_after: u64,
    /// The client's address, which may change within a QUIC connection.
    pub address: SocketAddr,
}

/// A message that came in on a D link, with the filters it came for.
#[derive(Debug)]
pub struct Arrived {
    /// The message.
    pub message: Message,
    /// Numbers of the filters that it came for; empty: the core did not say.
    pub filters: SmallVec<[FilterId; 2]>,
    /// The D link that brought it.
    pub link: usize,
    /// The origin mark of the session that published it.
    pub origin_mark: Option<Incarnation>,
}

/// A subscription that retained messages are wanted for.
#[derive(Clone, Copy, Debug)]
pub struct RetainedRequest {
    /// Whose it is.
    pub session: SessionRef,
    /// Which session it is, should another take its place.
    pub incarnation: Incarnation,
    /// Granted QoS.
    pub qos: QoS,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
}

/// One filter of a client's SUBSCRIBE whose outcome is not told yet.
#[derive(Clone, Copy, Debug)]
pub(in crate::router) struct PendingGrant {
    /// The client's filter.
    pub filter: FilterId,
    /// The client's session, and which incarnation of it sent the SUBSCRIBE.
    pub session: SessionRef,
    pub incarnation: Incarnation,
    /// The connection that sent the SUBSCRIBE; another one may use the same packet identifier.
    pub connection_no: u64,
    /// Names the SUBSCRIBE to the session, and `index` the filter in it.
    pub packet_id: u16,
    pub index: u16,
    /// What the client asked for; once the filter is granted, what it is granted.
    pub qos: QoS,
    /// The filter is granted. The client is told once an older overlapping filter of it, whose
    /// copies it will get, is granted at this QoS as well.
    pub granted: bool,
    /// Retained messages are to follow the grant.
    pub retained: bool,
    /// When the client gets an answer at the latest.
    pub deadline: Millis,
}
