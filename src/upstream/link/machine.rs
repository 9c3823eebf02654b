//! What all link machines have in common: packets and time in, bytes out, no I/O.

use std::time::Duration;

use crate::mqtt::{Packet, QoS, ReasonCode, Version};
use crate::telemetry::LinkDownReason;
use crate::time::Millis;

/// What the core said when a link came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Up {
    /// The protocol of this connection.
    pub version: Version,
    /// The core kept the link's session.
    pub session_present: bool,
    /// An earlier CONNECT may have begun that session, and its answer was lost: it may be empty.
    pub doubtful: bool,
    /// The core's Receive Maximum; 20 where a 3.1.1 core cannot say.
    pub receive_maximum: u16,
    /// The core's Maximum Packet Size, bytes.
    pub packet_max: u32,
    /// The core has working Subscription Identifiers.
    pub identifiers: bool,
    /// Live messages keep their RETAIN, and no replay comes between them.
    pub keeps_retain: bool,
    /// The R link subscribes at this QoS.
    pub fetch_qos: QoS,
    /// The R link is quiet for so long before a fetch is over, milliseconds.
    pub fetch_quiet: u64,
}

/// Why a link ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkEnd {
    /// For the metric.
    pub reason: LinkDownReason,
    /// Sent in DISCONNECT; SUCCESS: nothing is sent.
    pub code: ReasonCode,
    /// For the log.
    pub why: String,
}

impl LinkEnd {
    /// The core closed the connection.
    pub fn closed() -> Self {
        Self {
            reason: LinkDownReason::Closed,
            code: ReasonCode::SUCCESS,
            why: "the core closed the connection".into(),
        }
    }

    /// Whether the core may have ended it because of a packet that it was sent.
    pub fn by_core(&self) -> bool {
        use LinkDownReason::{Closed, Disconnect, Io};
        matches!(self.reason, Closed | Disconnect | Io)
    }

    /// The core broke the protocol.
    pub fn protocol(why: impl Into<String>) -> Self {
        Self {
            reason: LinkDownReason::Protocol,
            code: ReasonCode::PROTOCOL_ERROR,
            why: why.into(),
        }
    }
}

/// One link's own part. The driver feeds it packets and the time, and writes what it puts out.
pub trait Machine: Send {
    /// The link came up.
    fn up(&mut self, up: &Up, now: Millis, out: &mut Vec<u8>);
    /// A packet of the core, in order. PINGRESP and DISCONNECT are the driver's.
    ///
    /// # Errors
    /// The link must end.
    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd>;
    /// All packets that had arrived were given.
    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>);
    /// The router has something for the link, or time has passed.
    fn poll(&mut self, now: Millis, out: &mut Vec<u8>);
    /// The answer to a PINGREQ that the machine asked for by [`Machine::wants_ping`].
    fn ping_answered(&mut self, _now: u64) {}
    /// The machine wants a PINGREQ sent behind what it put out.
    fn wants_ping(&mut self) -> bool {
        false
    }
    /// The link is lost.
    fn down(&mut self, end: &LinkEnd, now: Millis);
    /// The least time between two writes, so that one serves several packets. `None`: at once.
    fn pace(&self) -> Option<Duration> {
        None
    }
    /// Unacknowledged publishes and their limit, for the metrics.
    fn window(&self) -> (usize, usize) {
        (0, 0)
    }
}
