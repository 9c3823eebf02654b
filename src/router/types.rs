//! Types that several of the router's modules share.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::mqtt::{LinkOrigin, Message, QoS, ReasonCode};
use crate::router::account::Holder;
use crate::session::{Incarnation, WaitNumber};
use crate::time::Millis;
use crate::topics::FilterId;

/// Names a session in the router: its place, and its version among the sessions of that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionRef {
    /// The number of the shard.
    pub shard: u16,
    /// The slot in the shard.
    pub slot: u32,
    /// Tells the session from earlier ones in the same slot.
    pub slot_version: u32,
}

/// The client's end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Listener name.
    pub listener: Arc<str>,
    /// Transport name.
    pub transport: &'static str,
    /// The client's address, which may change within a QUIC connection.
    pub address: SocketAddr,
}

/// A message that the broker sent, with the filters that it came for.
#[derive(Debug)]
pub struct Arrived {
    /// The message.
    pub message: Message,
    /// The filters that it came for; empty if the broker did not say.
    pub filters: SmallVec<[FilterId; 2]>,
    /// The data link or shared link that brought it.
    pub link: usize,
    /// The origin mark of its publisher, for No Local.
    pub origin_mark: Option<Incarnation>,
    /// Its identity on the link, if it is of QoS 2 and messages are kept in a log.
    pub link_origin: Option<LinkOrigin>,
    /// Its payload was too large and was skipped: its receivers get a gap in its place.
    pub skipped: bool,
}

/// A request for the retained messages of a filter, for one subscription.
#[derive(Clone, Copy, Debug)]
pub struct RetainedRequest {
    /// The subscriber.
    pub session: SessionRef,
    /// The session's incarnation when it subscribed.
    pub incarnation: Incarnation,
    /// Granted QoS.
    pub qos: QoS,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// The wait of the subscription's live messages, which ends behind the retained ones.
    pub wait: Option<WaitNumber>,
}

/// A request for the retained messages of a filter, which is due.
pub(super) type Due = (FilterId, RetainedRequest);

/// A subscription that has its retained messages: its live messages wait no longer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    pub session: SessionRef,
    pub filter: FilterId,
    /// The wait that ends, if it is still the subscription's wait.
    pub wait: WaitNumber,
}

/// The outcome of one filter of a SUBSCRIBE.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    /// Its place in the SUBSCRIBE.
    pub index: u16,
    pub code: ReasonCode,
    /// The filter, if its retained messages are to follow, and the wait of its live messages.
    pub retained: Option<(FilterId, Option<WaitNumber>)>,
}

/// The numbers of the barriers that somebody waits for, by data link; `None` for a link that brings
/// nothing.
pub(super) type BarrierNumbers = SmallVec<[Option<u64>; 4]>;

/// Names one filter of a client's SUBSCRIBE.
#[derive(Clone, Copy, Debug)]
pub(super) struct SubscribeRef {
    pub session: SessionRef,
    /// The connection that sent the SUBSCRIBE; another one may use the same packet identifier.
    pub connection_no: u64,
    /// Names the SUBSCRIBE to the session.
    pub packet_id: u16,
    /// The filter's place in the SUBSCRIBE.
    pub index: u16,
}

/// A client's subscriptions that overlap one filter.
#[derive(Debug, Default)]
pub(super) struct OverlappingFilters {
    pub all: Vec<FilterId>,
    /// The granted filters among them, and filters that the client gave up and still gets copies by.
    pub active: Vec<FilterId>,
    /// The filters among them that are not granted yet.
    pub awaiting: Vec<FilterId>,
}

/// The session of a SUBSCRIBE, as the table needs it for one filter.
#[derive(Debug)]
pub(super) struct Subscriber {
    /// Who the filter is charged to, if it is new.
    pub holder: Holder,
    pub overlapping: OverlappingFilters,
}

/// A filter is granted to a client at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grant {
    pub qos: QoS,
    /// The broker has granted it, so the subscription counts at once.
    pub confirmed: bool,
    /// The client's overlapping filter that has to be granted at this QoS as well before the client
    /// is told.
    pub behind: Option<FilterId>,
}

/// One filter of a client's SUBSCRIBE whose outcome the client has not been told yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingGrant {
    pub subscribe: SubscribeRef,
    /// The client's filter.
    pub filter: FilterId,
    /// Which incarnation of the session sent the SUBSCRIBE.
    pub incarnation: Incarnation,
    /// The QoS that the client asked for; once the filter is granted, the QoS that it is granted.
    pub qos: QoS,
    /// The filter is granted. The client is told once an older overlapping filter of it, whose
    /// copies it will get, is granted at this QoS as well.
    pub granted: bool,
    /// Retained messages are to be sent behind the SUBACK.
    pub retained: bool,
    /// The wait of its live messages, which ends behind the retained ones.
    pub wait: Option<WaitNumber>,
    /// When the client gets an answer at the latest.
    pub deadline: Millis,
}

impl PendingGrant {
    /// The outcome that the client is told.
    pub(super) fn answer(&self) -> Answer {
        Answer {
            index: self.subscribe.index,
            code: ReasonCode(self.qos as u8),
            retained: self.retained.then_some((self.filter, self.wait)),
        }
    }
}
