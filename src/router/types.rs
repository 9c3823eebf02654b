//! Types that several of the router's modules share.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::mqtt::{Message, QoS};
use crate::session::Incarnation;
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
