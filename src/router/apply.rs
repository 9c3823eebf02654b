//! What a client's connection asks of the router: to carry out the effects of its packets, and to
//! tell the session about the state of its streams and of its socket.
//!
//! Nothing here holds a shard's lock while it calls another module: effects travel from the session
//! to [`Router::apply`] after the lock of [`Router::feed`] is given back.

use crate::session::{Effect, Session};
use crate::streams::StreamId;
use crate::time::Millis;

use crate::router::Router;
use crate::router::publish::ClientPublish;
use crate::router::types::SessionRef;

/// The connection for which [`Router::apply`] carries out effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The connection's session.
    pub session: SessionRef,
    /// The connection's number within the session.
    pub connection_no: u64,
    /// The publish link of the session's publishes.
    pub publish_link: u8,
}

impl Router {
    /// Carries out the effects of a session's packets, in order. To be called after
    /// `Router::feed`, and before the next packet of the client is judged.
    pub fn apply(&self, caller: Caller, effects: Vec<Effect>, now: Millis) {
        for effect in effects {
            match effect {
                Effect::Publish {
                    token,
                    message,
                    origin_mark,
                } => {
                    let publish = ClientPublish {
                        token,
                        message,
                        origin_mark,
                    };
                    self.publish(caller.session, caller.publish_link, publish, now);
                }
                Effect::Subscribe {
                    packet_id,
                    identifier,
                    requests,
                } => self.subscribe(caller, packet_id, identifier, &requests, now),
                Effect::SubscribeOverLimit { filters } => {
                    self.subscribe_over_limit(caller.session, filters, now);
                }
                Effect::Unsubscribe { filters } => self.unsubscribe(caller.session, &filters, now),
            }
        }
    }

    /// Replaces the user properties that name the sender in each of a client's publishes.
    pub fn set_sender(&self, session: SessionRef, connection_no: u64, sender: Box<[u8]>) {
        self.with(session, connection_no, |session, _| {
            if let Some(connection) = session.connection() {
                connection.set_sender(sender);
            }
        });
    }

    /// Notes whether we leave bytes of the client unread. While we do, its silence is not held against
    /// it; its keep alive time starts anew at `now`.
    pub fn set_unread(&self, session: SessionRef, connection_no: u64, unread: bool, now: Millis) {
        self.with(session, connection_no, |session, _| {
            if let Some(connection) = session.connection() {
                connection.unread = unread;
                connection.last_seen = now;
            }
        });
    }

    /// Whether a packet that arrived on a data stream has yet to be answered there.
    pub fn stream_busy(&self, session: SessionRef, connection_no: u64, stream: StreamId) -> bool {
        let busy = self.with(session, connection_no, |session, _| {
            session.stream_busy(stream)
        });
        busy == Some(true)
    }

    /// A data stream takes no output: its subscriptions' messages go on the control stream.
    pub fn stream_blocked(&self, session: SessionRef, connection_no: u64, stream: StreamId) {
        self.on_stream(session, connection_no, |session| {
            session.stream_blocked(stream);
        });
    }

    /// The client ended its direction of a data stream. Answers still go there.
    pub fn stream_closed(&self, session: SessionRef, connection_no: u64, stream: StreamId) {
        self.on_stream(session, connection_no, |session| {
            session.stream_closed(stream);
        });
    }

    /// A data stream ended in both directions.
    pub fn stream_ended(&self, session: SessionRef, connection_no: u64, stream: StreamId) {
        self.on_stream(session, connection_no, |session| {
            session.stream_ended(stream);
        });
    }

    fn on_stream(
        &self,
        session: SessionRef,
        connection_no: u64,
        change: impl FnOnce(&mut Session),
    ) {
        self.with(session, connection_no, |session, _| change(session));
    }
}
