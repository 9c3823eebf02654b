//! Detects a second process with the same `node.id` at the same broker. The two take the links'
//! client identifiers from each other.

use std::time::Duration;

use crate::mqtt::ReasonCode;

use crate::upstream::broker::Broker;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::status::LinkStatus;

/// Connections that end within this time are short.
const SHORT: Duration = Duration::from_secs(15);

/// So many short connections in a row point to a second process. An MQTT 3.1.1 broker gives no
/// reason when it closes a connection.
const SUSPICIOUS: u32 = 4;

/// A sign of a second process. `Display` begins the log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Sign {
    /// The broker ended the connection because another one took its client identifier.
    #[error("Another client took the link's client identifier")]
    TakenOver,
    /// Several connections in a row were short.
    #[error("The broker closes the link again and again soon after it accepted it")]
    ShortConnections,
}

/// The watch that one link keeps.
#[derive(Debug, Default)]
pub(super) struct DuplicateNodeWatch {
    /// Connections in a row that the broker closed soon after it had accepted them.
    short: u32,
}

impl DuplicateNodeWatch {
    /// The broker could not be reached, so short connections say nothing about a second process.
    pub(super) fn unreachable(&mut self) {
        self.short = 0;
    }

    /// A connection of the link ended after `lasted`. Logs an error if a second process is likely.
    pub(super) fn ended(
        &mut self,
        broker: &Broker,
        link: &LinkStatus,
        end: &LinkEnd,
        lasted: Duration,
    ) {
        if let Some(sign) = self.sign(end, lasted) {
            tracing::error!(
                link = link.name,
                client_id = broker.client_id(&link.name),
                node_id = broker.access.node,
                "{sign}: is there a second Tidegate with this node.id? node.id must differ between processes at one broker"
            );
        }
    }

    /// The sign of a second process in the end of a connection, if there is one.
    fn sign(&mut self, end: &LinkEnd, lasted: Duration) -> Option<Sign> {
        if let LinkEnd::Disconnect(ReasonCode::SESSION_TAKEN_OVER) = end {
            self.short = 0;
            return Some(Sign::TakenOver);
        }
        let closed = matches!(end, LinkEnd::Closed | LinkEnd::Io(_));
        self.short = match closed && lasted < SHORT {
            true => self.short + 1,
            false => 0,
        };
        (self.short >= SUSPICIOUS && self.short.is_power_of_two()).then_some(Sign::ShortConnections)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn a_takeover_is_a_sign_at_once() {
        let mut watch = DuplicateNodeWatch::default();
        let end = LinkEnd::Disconnect(ReasonCode::SESSION_TAKEN_OVER);
        assert!(watch.sign(&end, Duration::from_secs(3600)).is_some());
    }

    #[test]
    fn short_connections_in_a_row_are_a_sign_ever_more_rarely() {
        let mut watch = DuplicateNodeWatch::default();
        let signs: Vec<u32> = (1..=20)
            .filter(|_| watch.sign(&LinkEnd::Closed, SOON).is_some())
            .collect();
        assert_eq!(signs, [4, 8, 16]);
    }

    #[test]
    fn a_long_connection_or_an_unreachable_broker_begins_the_count_again() {
        let mut watch = DuplicateNodeWatch::default();
        for _ in 0..3 {
            assert_eq!(watch.sign(&LinkEnd::Closed, SOON), None);
        }
        assert_eq!(watch.sign(&LinkEnd::Closed, SHORT), None);
        for _ in 0..3 {
            assert_eq!(watch.sign(&LinkEnd::Closed, SOON), None);
        }
        watch.unreachable();
        assert_eq!(watch.sign(&LinkEnd::Closed, SOON), None);
        assert_eq!(watch.sign(&LinkEnd::KeepAlive, SOON), None);
    }
}
