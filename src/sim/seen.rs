//! The oracle's record of clients: their subscriptions, the messages they sent and received.

use std::time::Duration;

use crate::mqtt::QoS;
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::{matches, split_shared};

/// The conditions of a run, which decide what can be promised.
pub(super) struct Conditions {
    /// Whether each client speaks MQTT 5. Only such a client is told the reason of a refusal.
    pub clients_v5: Vec<bool>,
    /// Links are lost, and the broker restarts.
    pub stormy: bool,
    pub data_links: usize,
    /// Filters that overlap others may be refused.
    pub refuses: bool,
    /// The broker sends one copy for overlapping filters, at the lowest QoS. At QoS 0 it keeps no
    /// message for a link that is away, so nothing can be promised then.
    pub lowest_qos: bool,
    /// Messages wait at the broker behind a small window, while it answers PINGREQs at once.
    pub small_window: bool,
}

/// How long a message may take through a broker that loses sessions.
pub(super) const TRANSIT: Duration = Duration::from_millis(1500);

/// How many copies of a message a client may receive through plain subscriptions: one for all that
/// overlap in time, and one more for each that began after the ones before had ended.
pub(super) fn chances<'a>(subs: impl Iterator<Item = &'a Sub>, message: &Message) -> usize {
    let mut spans: Vec<(Millis, Millis)> = subs
        .filter(|s| s.lives_at(message.at))
        .map(|s| (s.ended_at.unwrap_or(Millis::MAX), s.asked_at))
        .collect();
    spans.sort_unstable();
    let mut last_end = None;
    let mut chances = 0;
    for (ended_at, asked_at) in spans {
        if last_end.is_none_or(|end| asked_at >= end) {
            chances += 1;
            last_end = Some(ended_at);
        }
    }
    chances
}

/// A message that a client received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Got {
    pub number: u32,
    pub qos: QoS,
    pub retain: bool,
    pub dup: bool,
    /// The stream on which it came.
    pub stream: StreamId,
    pub at: Millis,
}

/// A subscription of a client.
#[derive(Debug)]
pub(super) struct Sub {
    /// The packet identifier of its SUBSCRIBE.
    pub packet_id: u16,
    pub filter: String,
    pub qos: QoS,
    pub no_local: bool,
    /// Retain Handling.
    pub handling: u8,
    /// The stream of the SUBSCRIBE, and of its SUBACK.
    pub stream: StreamId,
    pub asked_at: Millis,
    /// When the SUBACK came. Another SUBSCRIBE for the filter may have been answered before.
    pub suback_at: Option<Millis>,
    pub granted_at: Option<Millis>,
    pub ended_at: Option<Millis>,
    /// The disk is known to have the end.
    pub end_on_disk: bool,
}

impl Sub {
    pub(super) fn shared(&self) -> bool {
        split_shared(&self.filter).is_some()
    }

    /// Whether the subscription existed at this time or later.
    pub(super) fn lives_at(&self, at: Millis) -> bool {
        self.ended_at.is_none_or(|end| end >= at)
    }

    /// Whether the subscription ended at about this time or later.
    pub(super) fn ended_about(&self, at: Millis) -> bool {
        self.ended_at.is_some_and(|end| end + 2 * TRANSIT >= at)
    }

    /// Whether No Local hides the message. A publish from before the subscription has no origin mark.
    pub(super) fn hides(&self, n: usize, message: &Message) -> bool {
        self.no_local && message.from == n && self.asked_at < message.at
    }

    pub(super) fn matches(&self, topic: &str) -> bool {
        let plain = split_shared(&self.filter).map_or(&*self.filter, |(_, f)| f);
        matches(plain, topic)
    }
}

/// A message that a client published.
#[derive(Debug)]
pub(super) struct Message {
    pub from: usize,
    pub topic: String,
    pub qos: QoS,
    pub retain: bool,
    pub will: bool,
    /// The broker closes the connection that brings it. It reaches nobody, and its sender is told.
    pub poison: bool,
    /// It is not known whether it was published.
    pub uncertain: bool,
    /// It may be published twice.
    pub repeats: bool,
    /// Its sender does not ask for its fate any more.
    pub given_up: bool,
    pub at: Millis,
    pub acknowledged_at: Option<Millis>,
}

impl Message {
    /// This long after the acknowledgement; never, if there was none.
    pub(super) fn acknowledged_by(&self, after: Duration) -> Millis {
        self.acknowledged_at.map_or(Millis::MAX, |at| at + after)
    }

    /// Whether the message had no acknowledgement before this time.
    pub(super) fn open_at(&self, at: Millis) -> bool {
        self.acknowledged_at.is_none_or(|done| done >= at)
    }
}

/// A client.
#[derive(Debug, Default)]
pub(super) struct Client {
    pub subs: Vec<Sub>,
    pub got: Vec<(String, Got)>,
    /// Retained messages that it received for a subscription.
    pub handed: Vec<(String, Got)>,
    /// When it lost its connection, or one of its data streams.
    pub losses: Vec<Millis>,
    /// When its sessions ended.
    pub sessions_ended: Vec<Millis>,
    /// The losses of streams whose output the client had not read. QoS 0 is lost with such output.
    pub losses_unread: Vec<Millis>,
    /// It ended, reset or did not read a data stream. The streams of a client keep no order with each
    /// other, and the messages of such a stream move to the control stream.
    pub reordered: bool,
}

impl Client {
    /// Whether a SUBSCRIBE for the same filter has no answer yet. It may ask for less.
    pub(super) fn replaces(&self, sub: &Sub) -> bool {
        let pending = |o: &Sub| o.granted_at.is_none() && o.ended_at.is_none();
        self.subs
            .iter()
            .any(|o| o.filter == sub.filter && pending(o))
    }
}
