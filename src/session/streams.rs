//! The data streams of a session's connection, beside the control stream: where a filter's messages
//! go, and what becomes of what is under way on a stream that blocks or ends.

use crate::session::Session;
use crate::topics::FilterId;

impl Session {
    /// The stream that a filter's messages go on: the one that subscribed, while it takes them.
    pub fn lane_of(&self, filter: FilterId) -> u8 {
        let connection = self.phase.connection();
        connection.map_or(0, |c| c.lane_of(filter))
    }

    /// A data stream takes nothing: the messages of its subscriptions go on the control stream.
    pub fn lane_blocked(&mut self, lane: u8) {
        if let Some(connection) = self.phase.connection_mut() {
            connection.unbind(lane);
        }
        self.outbound.leave_lane(lane);
    }

    /// The client ended its direction of a data stream: it can acknowledge nothing there any more,
    /// so what it has not is sent again on the control stream. Answers still go there while
    /// [`Session::lane_busy`].
    pub fn lane_closed(&mut self, lane: u8) {
        self.lane_blocked(lane);
        self.outbound.lane_ended(lane);
    }

    /// Something that came on a data stream has yet to be answered there.
    pub fn lane_busy(&self, lane: u8) -> bool {
        let connection = self.phase.connection();
        connection.is_some_and(|c| c.lane_busy(lane))
            || self.inbound.as_ref().is_some_and(|i| i.busy(lane))
    }

    /// A data stream is gone in both directions. What came on it and is not answered yet is
    /// answered when its client sends it again.
    pub fn lane_ended(&mut self, lane: u8) {
        self.lane_closed(lane);
        if let Some(connection) = self.phase.connection_mut() {
            connection.lane_ended(lane);
        }
        if let Some(inbound) = &mut self.inbound {
            inbound.lane_ended(lane);
        }
    }
}
