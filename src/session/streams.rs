//! The data streams of a session's connection, beside the control stream: which stream a filter's
//! messages go on, and what happens to packets in flight on a stream that blocks or ends.

use crate::session::Session;
use crate::streams::StreamId;
use crate::topics::FilterId;

impl Session {
    /// The stream for a filter's messages: the stream that subscribed, while it accepts output.
    pub fn stream_of(&self, filter: FilterId) -> StreamId {
        let connection = self.phase.connection();
        connection.map_or(StreamId::CONTROL, |c| c.stream_of(filter))
    }

    /// A data stream accepts no output: its subscriptions' messages go on the control stream.
    pub fn stream_blocked(&mut self, stream: StreamId) {
        if let Some(connection) = self.phase.connection_mut() {
            connection.unbind(stream);
        }
        self.outbound_mut().leave_stream(stream);
    }

    /// The client ended its direction of a data stream, so it cannot acknowledge messages there any
    /// more: unacknowledged ones are sent again on the control stream. Answers still go on the data
    /// stream while [`Session::stream_busy`].
    pub fn stream_closed(&mut self, stream: StreamId) {
        self.stream_blocked(stream);
        self.outbound_mut().stream_ended(stream);
    }

    /// Whether a packet that arrived on a data stream has yet to be answered there.
    pub fn stream_busy(&self, stream: StreamId) -> bool {
        let connection = self.phase.connection();
        connection.is_some_and(|c| c.stream_busy(stream))
            || self.inbound.as_ref().is_some_and(|i| i.busy(stream))
    }

    /// A data stream ended in both directions. Publishes that arrived on it without an answer are
    /// answered when the client sends them again.
    pub fn stream_ended(&mut self, stream: StreamId) {
        self.stream_closed(stream);
        if let Some(connection) = self.phase.connection_mut() {
            connection.stream_ended(stream);
        }
        if let Some(inbound) = &mut self.inbound {
            inbound.stream_ended(stream);
        }
    }
}
