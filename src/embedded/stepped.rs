//! The embedded broker without tasks and clocks: bytes and time in, bytes out, for simulations.

use std::sync::Arc;

use crate::embedded::inbound::{End, Protocol, encode_end};
use crate::embedded::options::EmbeddedOptions;
use crate::embedded::state::{ConnectionHandle, Session, State};
use crate::mqtt::ReasonCode;
use crate::time::Millis;

/// A broker that acts only when it is called.
pub(crate) struct SteppedBroker {
    state: State,
}

/// One connection to it.
pub(crate) struct SteppedConnection {
    handle: Arc<ConnectionHandle>,
    protocol: Protocol,
    input: Vec<u8>,
}

/// How the broker ended a connection.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The client asked for it, or another connection took its place.
    Quietly,
    /// The client broke the protocol, or its CONNECT was refused.
    Refused(Option<ReasonCode>),
}

impl SteppedBroker {
    pub(crate) fn new(options: EmbeddedOptions) -> Self {
        Self {
            state: State::new(options),
        }
    }

    /// Sets the time, and runs the timers that are due.
    pub(crate) fn at(&mut self, now: Millis) {
        self.state.now = now;
        self.state.fire_due();
        self.state.to_wake.clear();
    }

    /// Opens a connection; `None` while the broker is stopped.
    pub(crate) fn connect(&mut self) -> Option<SteppedConnection> {
        Some(SteppedConnection {
            handle: self.state.open()?,
            protocol: Protocol::default(),
            input: Vec::new(),
        })
    }

    /// Takes bytes of a client, and appends the answers and all packets that may be sent.
    pub(crate) fn feed(
        &mut self,
        connection: &mut SteppedConnection,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Ended> {
        if let Some(reason) = connection.handle.ended() {
            return Err(match reason {
                Some(reason) => Ended::Refused(Some(reason)),
                None => Ended::Quietly,
            });
        }
        connection.input.extend_from_slice(bytes);
        let protocol = &mut connection.protocol;
        let (used, end) =
            protocol.feed(&mut self.state, &connection.handle, &connection.input, out);
        connection.input.drain(..used);
        if let Some(end) = end {
            if let (Some(connected), End::Refused(reason)) = (&protocol.connected, &end) {
                encode_end(connected.version, *reason, out);
            }
            return Err(match end {
                End::Disconnected { .. } | End::Superseded => Ended::Quietly,
                End::Refused(reason) => Ended::Refused(Some(reason)),
                End::NotConnected => Ended::Refused(None),
            });
        }
        if let Some(connected) = &protocol.connected
            && self.state.owns(connected.session, &connection.handle)
        {
            // Nobody takes bytes out meanwhile, so a limit would never let the last ones through.
            self.state.pump(connected.session, out, usize::MAX);
            protocol.unseen_acks = 0;
        }
        Ok(())
    }

    /// Ends a connection, as if the network had lost it.
    pub(crate) fn drop_connection(&mut self, connection: &SteppedConnection) {
        if let Some(connected) = &connection.protocol.connected
            && self.state.owns(connected.session, &connection.handle)
        {
            self.state.detach(connected.session, true);
        }
        self.state.close(&connection.handle);
    }

    /// Ends a connection and its session.
    pub(crate) fn forget(&mut self, connection: &SteppedConnection) {
        self.drop_connection(connection);
        if let Some(connected) = &connection.protocol.connected
            && self.state.sessions.contains(connected.session as usize)
        {
            self.state.end_session(connected.session);
        }
    }

    /// Stops the broker: all connections end.
    pub(crate) fn stop(&mut self) {
        self.state.stop();
    }

    /// Starts the broker again.
    pub(crate) fn start(&mut self, keep_sessions: bool) {
        self.state.start(keep_sessions);
    }

    /// Topics and payloads of the retained messages.
    pub(crate) fn retained(&mut self) -> Vec<(String, Vec<u8>)> {
        let now = self.state.now;
        let all = self.state.retained.matching("#", now);
        all.iter()
            .map(|m| (m.topic().to_owned(), m.payload().to_vec()))
            .collect()
    }

    /// Client identifiers of all sessions, with their filters.
    pub(crate) fn subscriptions(&self) -> Vec<(String, Vec<String>)> {
        let filters = |s: &Session| s.subscriptions.keys().map(|k| k.to_string()).collect();
        let sessions = self.state.sessions.iter();
        sessions
            .map(|(_, s)| (s.client_id.to_string(), filters(s)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{
        Connect, Message, MessageSpec, Properties, QoS, SubscribeOptions, Version, encode_subscribe,
    };
    use crate::sim::testing::publish_of;

    fn connected(broker: &mut SteppedBroker, client_id: &str) -> SteppedConnection {
        let mut connection = broker.connect().expect("it runs");
        let mut bytes = Vec::new();
        Connect {
            client_id,
            ..Connect::default()
        }
        .encode(&mut bytes);
        let connected = broker.feed(&mut connection, &bytes, &mut Vec::new());
        assert!(connected.is_ok());
        connection
    }

    #[test]
    fn a_subscriber_gets_more_than_one_batch_at_once() {
        let mut broker = SteppedBroker::new(EmbeddedOptions::with_quirks(&[]));
        let mut reader = connected(&mut broker, "reader");
        let mut writer = connected(&mut broker, "writer");
        let mut bytes = Vec::new();
        let filters = std::iter::once(("t", SubscribeOptions::default()));
        encode_subscribe(Version::V5, 1, None, filters, &mut bytes);
        let subscribed = broker.feed(&mut reader, &bytes, &mut Vec::new());
        assert!(subscribed.is_ok());
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: &[0; 50_000],
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let bytes = publish_of(Version::V5, 0, &message).repeat(4);
        let published = broker.feed(&mut writer, &bytes, &mut Vec::new());
        assert!(published.is_ok());
        let mut out = Vec::new();
        let read = broker.feed(&mut reader, &[], &mut out);
        assert!(read.is_ok() && out.len() > 200_000, "{}", out.len());
    }
}
