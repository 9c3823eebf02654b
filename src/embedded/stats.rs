//! Counts of an embedded broker.

/// What an embedded broker holds now, and what it has done since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EmbeddedStats {
    /// Connections now, whether or not they have sent CONNECT.
    pub connections: usize,
    /// Sessions now, connected or not.
    pub sessions: usize,
    /// Subscriptions now, over all sessions.
    pub subscriptions: usize,
    /// Retained messages now.
    pub retained: usize,
    /// Messages now in the queues of all sessions, including those in flight.
    pub queued: usize,
    /// Bytes now of all messages, and of the entries of the queues.
    pub bytes: u64,
    /// CONNECT packets accepted.
    pub connects: u64,
    /// SUBSCRIBE packets received.
    pub subscribes: u64,
    /// UNSUBSCRIBE packets received.
    pub unsubscribes: u64,
    /// Messages published to this broker, including wills. A QoS 2 message counts once.
    pub published: u64,
    /// PUBLISH packets sent, including redeliveries.
    pub delivered: u64,
    /// Messages dropped because a session's queue, all messages together or the retained store was at
    /// its limit.
    pub dropped_full: u64,
    /// Messages dropped because their Message Expiry Interval had passed.
    pub dropped_expired: u64,
    /// Messages dropped because they exceed a client's Maximum Packet Size [MQTT-3.1.2-25].
    pub dropped_too_large: u64,
}
