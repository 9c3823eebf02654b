//! Whether a session has a connection, waits for one, or is over; and the deadlines that go with
//! each.
//!
//! ```text
//!             attach                detach                 close
//!   (new) ──> Detached ──> Attached ──────> Detached ──────────────> Closed
//!                 ^            │  ^                                    │
//!                 └────────────┘  └────────────────────────────────────┘
//!                     detach                    attach
//! ```
//! A takeover is [`Phase::attach`] on a session that is attached.

use std::time::Duration;

use crate::session::connection::Connection;
use crate::session::outbound::Outbound;
use crate::time::{Deadline, Millis};

/// The parts of a session that a client uses while it is connected, in one allocation.
#[derive(Debug)]
pub(super) struct Online {
    pub connection: Connection,
    pub outbound: Outbound,
}

/// The phase of a session's life.
#[derive(Debug)]
pub(super) enum Phase {
    /// A client is connected.
    Attached(Attached),
    /// The session waits for its client.
    Detached(Detached),
    /// The session is over. It is remembered for a while, to recognise publishes that its client
    /// sends again, or until its will and its absence are published.
    Closed(Closed),
}

#[derive(Debug)]
pub(super) struct Attached {
    online: Box<Online>,
    /// The client's presence was published, so its absence will be.
    announced: bool,
    /// The client's DISCONNECT discarded the will [MQTT-3.14.4-3].
    will_discarded: bool,
}

#[derive(Debug, Default)]
pub(super) struct Detached {
    /// The session's expiry.
    ends_at: Option<Deadline>,
    /// From then on other members of its groups get this session's share.
    share_at: Option<Deadline>,
    /// When the client's absence is to be published.
    absent_at: Option<Deadline>,
}

#[derive(Debug)]
pub(super) struct Closed {
    /// When the session can be forgotten.
    forget_at: Option<Deadline>,
    /// When the client's absence is to be published.
    absent_at: Option<Deadline>,
}

/// The deadlines that [`Phase::expire`] found to have passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Publish that the client is absent.
    pub absent: bool,
    /// Give the session's shared deliveries to other members.
    pub share: bool,
    /// The session's expiry.
    pub end: bool,
    /// Forget the closed session.
    pub forget: bool,
}

impl Default for Phase {
    /// A new session, which waits for its first connection without a deadline.
    fn default() -> Self {
        Self::Detached(Detached::default())
    }
}

impl Phase {
    /// The phase of a session of an earlier process: detached until `ends_at`, or, if it is `over`, closed
    /// and remembered until then. Its client's absence is to be published at `absent_at`.
    pub(super) fn restored(
        over: bool,
        ends_at: Option<Deadline>,
        absent_at: Option<Deadline>,
    ) -> Self {
        match over {
            true => Self::Closed(Closed {
                forget_at: ends_at,
                absent_at,
            }),
            false => Self::Detached(Detached {
                ends_at,
                share_at: None,
                absent_at,
            }),
        }
    }

    /// Begins a connection; it replaces the one that is there. `presence`: clients' presence is
    /// published. True: this client's is to be published now.
    pub(super) fn attach(&mut self, online: Box<Online>, presence: bool) -> bool {
        let announced = match self {
            Self::Attached(attached) => attached.announced,
            Self::Detached(Detached { absent_at, .. }) | Self::Closed(Closed { absent_at, .. }) => {
                absent_at.is_some()
            }
        };
        *self = Self::Attached(Attached {
            online,
            announced: announced || presence,
            will_discarded: false,
        });
        presence && !announced
    }

    /// Ends the connection, if there is one. A client that was announced is absent after
    /// `absent_after`. True: it is absent at once.
    pub(super) fn detach(&mut self, absent_after: Duration, now: Millis) -> bool {
        let Self::Attached(attached) = self else {
            return false;
        };
        let at_once = attached.announced && absent_after.is_zero();
        let later = attached.announced && !absent_after.is_zero();
        *self = Self::Detached(Detached {
            absent_at: later.then(|| Deadline::at(now + absent_after)),
            ..Detached::default()
        });
        at_once
    }

    /// The detached session's deadlines: the end of its expiry, and when others get its share of
    /// shared subscriptions. `None`: never.
    pub(super) fn wait_until(&mut self, ends_at: Option<Deadline>, share_at: Option<Deadline>) {
        if let Self::Detached(detached) = self {
            detached.ends_at = ends_at;
            detached.share_at = share_at;
        }
    }

    /// The session is over. One that is attached goes on: its connection begins another session.
    pub(super) fn close(&mut self) {
        if let Self::Detached(detached) = self {
            *self = Self::Closed(Closed {
                forget_at: None,
                absent_at: detached.absent_at,
            });
        }
    }

    /// A closed session is remembered until `at`.
    pub(super) fn remember_until(&mut self, at: Millis) {
        if let Self::Closed(closed) = self {
            closed.forget_at = Some(Deadline::at(at));
        }
    }

    /// Takes the deadlines that have passed; those of an attached session never do.
    pub(super) fn expire(&mut self, now: Millis) -> Passed {
        let mut passed = Passed::default();
        match self {
            Self::Attached(_) => {}
            Self::Detached(detached) => {
                passed.absent = take_due(&mut detached.absent_at, now);
                passed.share = take_due(&mut detached.share_at, now);
                passed.end = take_due(&mut detached.ends_at, now);
            }
            Self::Closed(closed) => {
                passed.absent = take_due(&mut closed.absent_at, now);
                passed.forget = closed.forget_at.is_some_and(|at| at.is_due(now));
            }
        }
        if passed.end {
            self.close();
        }
        passed
    }

    /// The next deadline of a session without a connection.
    pub(super) fn deadline(&self) -> Option<Deadline> {
        let all = match self {
            Self::Attached(_) => return None,
            Self::Detached(d) => [d.ends_at, d.share_at, d.absent_at],
            Self::Closed(c) => [c.forget_at, c.absent_at, None],
        };
        all.into_iter().flatten().min()
    }

    /// The client's absence is yet to be published.
    pub(super) fn owes_absence(&self) -> bool {
        match self {
            Self::Attached(_) => false,
            Self::Detached(Detached { absent_at, .. }) | Self::Closed(Closed { absent_at, .. }) => {
                absent_at.is_some()
            }
        }
    }

    /// The client's absence is published now, if it was yet to be. True: it was.
    pub(super) fn take_absence(&mut self) -> bool {
        match self {
            Self::Attached(_) => false,
            Self::Detached(Detached { absent_at, .. }) | Self::Closed(Closed { absent_at, .. }) => {
                absent_at.take().is_some()
            }
        }
    }

    /// The client's DISCONNECT discarded a will.
    pub(super) fn discard_will(&mut self) {
        if let Self::Attached(attached) = self {
            attached.will_discarded = true;
        }
    }

    /// Whether [`Phase::discard_will`] was called on this connection; told once.
    pub(super) fn take_will_discarded(&mut self) -> bool {
        match self {
            Self::Attached(attached) => std::mem::take(&mut attached.will_discarded),
            _ => false,
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self, Self::Attached(_))
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self, Self::Closed(_))
    }

    pub(super) fn online(&self) -> Option<&Online> {
        match self {
            Self::Attached(attached) => Some(&attached.online),
            _ => None,
        }
    }

    pub(super) fn online_mut(&mut self) -> Option<&mut Online> {
        match self {
            Self::Attached(attached) => Some(&mut attached.online),
            _ => None,
        }
    }

    pub(super) fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Attached(attached) => Some(&attached.online.connection),
            _ => None,
        }
    }

    pub(super) fn connection_mut(&mut self) -> Option<&mut Connection> {
        match self {
            Self::Attached(attached) => Some(&mut attached.online.connection),
            _ => None,
        }
    }
}

/// Takes a deadline that has passed.
fn take_due(deadline: &mut Option<Deadline>, now: Millis) -> bool {
    deadline.take_if(|at| at.is_due(now)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::Version;
    use crate::session::ConnectionSpec;

    // Each session has one, online or not.
    const _: () = assert!(size_of::<Phase>() <= 32);

    fn online(connection_no: u64) -> Box<Online> {
        let spec = ConnectionSpec {
            version: Version::V5,
            bridge: false,
            receive_maximum: 1,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            keep_alive: None,
            scope: None,
        };
        Box::new(Online {
            connection: Connection::new(connection_no, &spec, Millis::ZERO),
            outbound: Outbound::default(),
        })
    }

    fn attached(presence: bool) -> Phase {
        let mut phase = Phase::default();
        phase.attach(online(1), presence);
        phase
    }

    fn detached() -> Phase {
        let mut phase = attached(true);
        assert!(!phase.detach(Duration::from_millis(10), Millis::new(100)));
        phase
    }

    fn closed() -> Phase {
        let mut phase = detached();
        phase.close();
        phase
    }

    fn number(phase: &Phase) -> Option<u64> {
        phase.connection().map(|c| c.connection_no)
    }

    #[test]
    fn attach_replaces_the_connection_and_announces_a_client_once() {
        let mut phase = Phase::default();
        assert!(phase.attach(online(1), true));
        assert!(!phase.attach(online(2), true), "a takeover");
        assert_eq!(number(&phase), Some(2));
        assert!(!attached(false).owes_absence());
        assert!(!Phase::default().attach(online(1), false));
    }

    #[test]
    fn attach_within_the_grace_announces_nothing() {
        assert!(!detached().attach(online(2), true));
        assert!(!closed().attach(online(2), true));
        let mut told = detached();
        assert!(told.take_absence() && !told.take_absence());
        assert!(told.attach(online(2), true));
    }

    #[test]
    fn detach_tells_an_absence_at_once_or_later_or_never() {
        assert!(attached(true).detach(Duration::ZERO, Millis::new(100)));
        assert!(!attached(false).detach(Duration::ZERO, Millis::new(100)));
        let mut phase = detached();
        assert!(phase.owes_absence() && !phase.is_attached());
        assert_eq!(phase.deadline(), Some(Deadline::at(Millis::new(110))));
        assert!(
            !phase.detach(Duration::ZERO, Millis::new(200)),
            "it is detached"
        );
        assert_eq!(phase.deadline(), Some(Deadline::at(Millis::new(110))));
    }

    #[test]
    fn a_detached_session_has_the_earliest_of_its_deadlines() {
        let mut phase = detached();
        let at = |n| Some(Deadline::at(n));
        phase.wait_until(at(Millis::new(300)), at(Millis::new(200)));
        assert_eq!(phase.deadline(), at(Millis::new(110)));
        let absent = Passed {
            absent: true,
            ..Passed::default()
        };
        assert_eq!(phase.expire(Millis::new(110)), absent);
        assert_eq!(phase.expire(Millis::new(110)), Passed::default());
        assert_eq!(phase.deadline(), at(Millis::new(200)));
        let share = Passed {
            share: true,
            ..Passed::default()
        };
        assert_eq!(phase.expire(Millis::new(200)), share);
        assert!(!phase.is_closed());
        assert!(phase.expire(Millis::new(300)).end && phase.is_closed());
        assert_eq!(phase.deadline(), None);
    }

    #[test]
    fn an_attached_session_has_no_deadlines_and_cannot_close() {
        let mut phase = attached(true);
        phase.wait_until(
            Some(Deadline::at(Millis::new(1))),
            Some(Deadline::at(Millis::new(1))),
        );
        phase.remember_until(Millis::new(1));
        phase.close();
        assert!(phase.is_attached());
        assert_eq!(phase.deadline(), None);
        assert_eq!(phase.expire(Millis::MAX), Passed::default());
    }

    #[test]
    fn a_closed_session_is_forgotten_in_time_and_owes_the_absence() {
        let mut phase = closed();
        assert!(phase.is_closed() && phase.connection().is_none());
        phase.remember_until(Millis::new(500));
        assert_eq!(phase.deadline(), Some(Deadline::at(Millis::new(110))));
        assert!(phase.expire(Millis::new(499)).absent);
        assert_eq!(phase.expire(Millis::new(499)), Passed::default());
        assert!(phase.expire(Millis::new(500)).forget);
    }

    #[test]
    fn a_discarded_will_is_told_once_and_only_of_this_connection() {
        let mut phase = attached(false);
        assert!(!phase.take_will_discarded());
        phase.discard_will();
        assert!(phase.take_will_discarded() && !phase.take_will_discarded());
        phase.discard_will();
        phase.attach(online(2), false);
        assert!(!phase.take_will_discarded());
        let mut phase = detached();
        phase.discard_will();
        assert!(!phase.take_will_discarded());
    }
}
