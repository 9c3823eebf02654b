//! One delivery of a message to one client: what a queue and a window are made of.

use crate::mqtt::{Message, QoS};

use super::SessionLimits;

/// The client's own Subscription Identifiers that go with one delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SubscriptionIds {
    /// No matching subscription has one.
    #[default]
    None,
    /// The usual case.
    One(u32),
    /// Overlapping subscriptions with several.
    Many(Box<[u32]>),
}

impl SubscriptionIds {
    /// Keeps `ids` in the smallest form.
    pub fn from_slice(ids: &[u32]) -> Self {
        match ids {
            [] => Self::None,
            [one] => Self::One(*one),
            many => Self::Many(many.into()),
        }
    }

    /// The identifiers.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// One delivery of a message to this client, waiting or in flight.
#[derive(Debug)]
pub(super) struct Entry {
    /// Gone once the client has the message.
    pub message: Option<Message>,
    pub ids: SubscriptionIds,
    /// When it was queued, then when it was sent: milliseconds of the clock, cut to 32 bits.
    pub at: u32,
    pub packet_id: u16,
    pub qos: QoS,
    pub state: State,
    pub retain: bool,
}

impl Entry {
    /// Past its Message Expiry, or too old for the queue.
    pub fn is_over(&self, limits: &SessionLimits, now: u64) -> bool {
        let age = u64::from((now as u32).wrapping_sub(self.at));
        self.message.as_ref().is_none_or(|m| m.expires_at() <= now) || age >= limits.queue_age_max
    }

    pub fn offer(&self) -> Option<Offer<'_>> {
        Some(Offer {
            message: self.message.as_ref()?,
            qos: self.qos,
            retain: self.retain,
            ids: self.ids.as_slice(),
        })
    }

    pub fn size(&self) -> usize {
        self.message.as_ref().map_or(0, Message::size)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not sent yet.
    Waiting,
    /// PUBLISH sent on this connection.
    Sent,
    /// PUBLISH sent on an earlier connection: again, with DUP, when the window allows.
    Resend,
    /// PUBREC received, PUBREL sent on this connection.
    Released,
    /// PUBREC received on an earlier connection: PUBREL again.
    ReleaseAgain,
    /// Complete; stands until all before it are.
    Done,
}

/// A message as one client is to see it.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// The message.
    pub message: &'a Message,
    /// The smaller of its and the subscription's QoS.
    pub qos: QoS,
    /// RETAIN for this client.
    pub retain: bool,
    /// The client's own Subscription Identifiers.
    pub ids: &'a [u32],
}
