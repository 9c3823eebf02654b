//! The data streams of a session's connection, beside the control stream: where a filter's messages
//! go, and what becomes of what is under way on a stream that blocks or ends.

use crate::session::Session;
use crate::topics::FilterId;

impl Session {
    /// The stream that a filter's messages go on: the one that subscribed, while it takes them.
    pub fn stream_of(&self, filter: FilterId) -> u8 {
        let connection = self.phase.connection();
        connection.map_or(0, |c| c.stream_of(filter))
    }

    /// A data stream takes nothing: the messages of its subscriptions go on the control stream.
    pub fn stream_blocked(&mut self, stream: u8) {
        if let Some(connection) = self.phase.connection_mut() {
            connection.unbind(stream);
        }
        self.outbound.leave_stream(stream);
    }

    /// The client ended its direction of a data stream: it can acknowledge nothing there any more,
    /// so what it has not is sent again on the control stream. Answers still go there while
    /// [`Session::stream_busy`].
    pub fn stream_closed(&mut self, stream: u8) {
        self.stream_blocked(stream);
        self.outbound.stream_ended(stream);
    }

    /// Something that came on a data stream has yet to be answered there.
    pub fn stream_busy(&self, stream: u8) -> bool {
        let connection = self.phase.connection();
        connection.is_some_and(|c| c.stream_busy(stream))
            || self.inbound.as_ref().is_some_and(|i| i.busy(stream))
    }

    /// A data stream is gone in both directions. What came on it and is not answered yet is
    /// answered when its client sends it again.
    pub fn stream_ended(&mut self, stream: u8) {
        self.stream_closed(stream);
        if let Some(connection) = self.phase.connection_mut() {
            connection.stream_ended(stream);
        }
        if let Some(inbound) = &mut self.inbound {
            inbound.stream_ended(stream);
        }
    }
}
