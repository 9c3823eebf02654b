//! What all link machines have in common: packets and time in, bytes out, no I/O.

use std::time::Duration;

use crate::mqtt::{Oversized, Packet, QoS, Version};
use crate::router::LinkSession;
use crate::time::Millis;

use crate::upstream::link::end::LinkEnd;
use crate::upstream::profile::BrokerProfile;

/// What a link machine learns when its link has connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// The protocol version of this connection.
    pub version: Version,
    /// What the broker has of the link's session.
    pub session: LinkSession,
    /// The broker's Receive Maximum.
    pub receive_maximum: u16,
    /// The broker's Maximum Packet Size, bytes; `None`: not limited.
    pub packet_max: Option<u32>,
    /// Subscription Identifiers can be used.
    pub identifiers: bool,
    /// Live messages keep their RETAIN flag, and no replay is mixed with them.
    pub keeps_retain: bool,
    /// The broker may hold packets back until TCP acknowledgements arrive, so these are sent at once.
    pub quick_ack: bool,
    /// Filters in one SUBSCRIBE or UNSUBSCRIBE.
    pub filters_in_packet: usize,
    /// The QoS of the retained link's subscriptions.
    pub fetch_qos: QoS,
    /// The broker's window toward us, as its probe saw it.
    pub window: Option<u16>,
    /// How long the retained link has to be quiet before a fetch is over.
    pub fetch_quiet: Duration,
}

impl Handshake {
    /// The outcome of a connection to the broker of this profile.
    pub(crate) fn new(session: LinkSession, profile: &BrokerProfile) -> Self {
        let capabilities = &profile.capabilities;
        Self {
            version: capabilities.version,
            session,
            receive_maximum: capabilities.receive_maximum,
            packet_max: capabilities.maximum_packet_size,
            identifiers: profile.quirks.identifiers.usable(),
            keeps_retain: profile.keeps_retain(),
            quick_ack: profile.quirks.nodelay != Some(true),
            filters_in_packet: profile.filters_in_packet(),
            fetch_qos: profile.fetch_qos(),
            window: profile.quirks.window,
            fetch_quiet: profile.fetch_quiet(),
        }
    }
}

/// One link without its socket.
///
/// The link's task calls [`Machine::connected`] first, then [`Machine::packet`] for each packet and
/// [`Machine::batch_ended`] once it has given all packets that had arrived, [`Machine::poll`] when
/// the router wakes it or time has passed, and [`Machine::disconnected`] last. After each of these
/// calls it asks [`Machine::wants_ping`], and writes what the machine appended to `out`.
pub(crate) trait Machine: Send {
    /// The link has connected.
    fn connected(&mut self, handshake: &Handshake, now: Millis, out: &mut Vec<u8>);
    /// The broker sent a packet. PINGRESP and DISCONNECT are for the task.
    ///
    /// # Errors
    /// The link must end.
    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd>;
    /// The broker sent a PUBLISH that is larger than `limits.packet_max`. Its payload was skipped.
    ///
    /// # Errors
    /// The link must end.
    fn oversized(
        &mut self,
        packet: &Oversized,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd>;
    /// A part of such a packet has arrived.
    fn skipping(&mut self, _packet: &Oversized, _now: Millis) {}
    /// All packets that had arrived were given.
    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>);
    /// The router has something for the link, or time has passed.
    fn poll(&mut self, now: Millis, out: &mut Vec<u8>);
    /// The answer to a PINGREQ that the machine asked for by [`Machine::wants_ping`].
    fn ping_answered(&mut self, _now: Millis) {}
    /// Whether a PINGREQ is to follow the bytes that were put out. Asking takes the wish.
    fn wants_ping(&mut self) -> bool {
        false
    }
    /// Whether the broker may end the connection for a packet that was sent on it. Asked before
    /// [`Machine::disconnected`].
    fn has_sent(&self) -> bool;
    /// The connection has ended.
    fn disconnected(&mut self, end: &LinkEnd, now: Millis);
    /// The least time between two writes, so that one write serves several packets. `None`: write
    /// at once.
    fn pace(&self) -> Option<Duration> {
        None
    }
    /// Whether the broker may have packets for the link before anything else is sent on it. If not, the TCP
    /// acknowledgement of the last ones can wait for the next packet.
    fn awaits_packets(&self) -> bool {
        true
    }
    /// The age of the messages that the link brings, as it was measured last, for the metrics. `None`: the
    /// link brings none.
    fn lag(&self) -> Option<Duration> {
        None
    }
    /// Publishes without an acknowledgement and their limit, for the metrics.
    fn window(&self) -> (usize, usize) {
        (0, 0)
    }
}
