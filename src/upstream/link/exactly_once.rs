//! The QoS 2 messages that a link has received, so that each is delivered once (MQTT 5 §4.3.3).
//!
//! Between PUBREC and PUBREL the packet identifier decides. After a CONNECT whose answer was lost, the
//! broker may have begun a new session, so the content has to be the same too. mosquitto sends a message
//! again after its PUBREL, with DUP, if its connection broke; a message that was released on the last
//! connection is therefore known by identifier, content and DUP until the broker has read the PUBCOMP.

use crate::hashing::LookUp;
use crate::mqtt::LinkOrigin;
use crate::router::LinkSession;

/// A message that was received.
#[derive(Clone, Copy, Debug)]
struct Received {
    digest: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// PUBREL has not arrived.
    Unreleased,
    /// PUBREL has not arrived, and the broker may have replaced the session.
    Doubtful,
    /// PUBCOMP was sent on this connection, as the one of this number.
    Released(u64),
    /// PUBCOMP was sent on the connection before.
    ReleasedBefore,
}

/// The QoS 2 messages of one link that the broker may send again.
#[derive(Debug, Default)]
pub(super) struct ExactlyOnce {
    /// By packet identifier.
    received: LookUp<u16, Received>,
    /// PUBCOMPs that were sent.
    released: u64,
}

impl ExactlyOnce {
    /// The messages that an earlier process received, and that the broker has not released.
    pub(super) fn restore(&mut self, received: &[LinkOrigin]) {
        for message in received {
            let unreleased = Received {
                digest: message.digest,
                state: State::Unreleased,
            };
            self.received.insert(message.packet_id, unreleased);
        }
    }

    /// The link has connected.
    pub(super) fn connected(&mut self, session: LinkSession) {
        if session == LinkSession::New {
            self.received.clear();
            return;
        }
        self.received.retain(|_, message| {
            message.state = match message.state {
                State::ReleasedBefore => return false,
                State::Released(_) => State::ReleasedBefore,
                State::Unreleased if session == LinkSession::Resumed => State::Unreleased,
                State::Unreleased | State::Doubtful => State::Doubtful,
            };
            true
        });
    }

    /// Whether a message that arrives was received before.
    pub(super) fn seen(&mut self, packet_id: u16, digest: u64, dup: bool) -> bool {
        let message = Received {
            digest,
            state: State::Unreleased,
        };
        let before = self.received.insert(packet_id, message);
        before.is_some_and(|before| match before.state {
            State::Unreleased => true,
            State::Doubtful => before.digest == digest,
            State::ReleasedBefore => dup && before.digest == digest,
            State::Released(_) => false,
        })
    }

    /// PUBREL has arrived, and PUBCOMP is sent.
    pub(super) fn release(&mut self, packet_id: u16) {
        self.released += 1;
        if let Some(message) = self.received.get_mut(&packet_id) {
            message.state = State::Released(self.released);
        }
    }

    /// Whether a PINGREQ would show that messages can be forgotten.
    pub(super) fn wants_confirmation(&self) -> bool {
        !self.received.is_empty()
    }

    /// The number of the last PUBCOMP.
    pub(super) fn mark(&self) -> u64 {
        self.released
    }

    /// The broker has read the PUBCOMPs up to `mark` of this connection, and has finished its
    /// retransmissions after the reconnect.
    /// Returns the packet identifiers of messages that it does not know: it has begun another session.
    pub(super) fn confirmed(&mut self, mark: u64) -> Vec<u16> {
        let doubtful = |_: &u16, message: &Received| message.state == State::Doubtful;
        let unknown = self.received.sorted(doubtful);
        let unknown = unknown.into_iter().map(|(id, _)| *id).collect();
        self.received.retain(|_, message| match message.state {
            State::Unreleased => true,
            State::Released(number) => number > mark,
            State::Doubtful | State::ReleasedBefore => false,
        });
        unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_received_once_until_its_release() {
        let mut once = ExactlyOnce::default();
        assert!(!once.seen(5, 1, false));
        once.connected(LinkSession::Resumed);
        assert!(once.seen(5, 2, false), "the identifier decides");
        once.release(5);
        assert!(!once.seen(5, 1, true), "released on this connection");
        once.connected(LinkSession::New);
        assert!(!once.seen(5, 1, true) && once.seen(5, 1, true));
    }

    #[test]
    fn in_doubt_the_content_decides_too() {
        let mut once = ExactlyOnce::default();
        for id in [1, 2, 3] {
            assert!(!once.seen(id, 7, false));
        }
        once.connected(LinkSession::Doubtful);
        assert!(once.seen(1, 7, false), "it is sent again, without DUP");
        assert!(!once.seen(2, 8, false), "it is another message");
        assert!(once.seen(2, 8, false));
        assert_eq!(once.confirmed(once.mark()), [3]);
        assert!(once.seen(1, 7, false), "it is not released");
        assert!(!once.seen(3, 7, false), "it was not sent again in time");
    }

    #[test]
    fn a_released_message_that_is_sent_again_is_known_until_the_broker_has_the_pubcomp() {
        let mut once = ExactlyOnce::default();
        for id in [1, 2, 3, 4] {
            assert!(!once.seen(id, 7, false));
        }
        once.release(1);
        let mark = once.mark();
        (2..=4).for_each(|id| once.release(id));
        let _ = once.confirmed(mark);
        once.connected(LinkSession::Resumed);
        assert!(!once.seen(1, 7, true), "the broker has read its PUBCOMP");
        assert!(once.seen(2, 7, true), "identifier, content and DUP");
        assert!(!once.seen(3, 7, false), "a new message has no DUP");
        once.connected(LinkSession::Resumed);
        assert!(!once.seen(4, 7, true), "two connections ago");
    }
}
