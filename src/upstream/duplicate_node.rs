//! Detects that the broker takes client identifiers from the links: a second process with the same
//! `node.id` is at the same broker, or the broker gives all connections of a user one identifier.
//!
//! MQTT 3.1.1 gives no reason for the end of a connection, so the links are compared. A broker that
//! restarts ends all of them at once. A second process takes one link after the other. With one
//! identifier for all, each link that connects ends the one before it, so that no more than one stays.

use std::time::Duration;

use tokio::time::Instant;

use crate::mqtt::ReasonCode;

use crate::upstream::broker::Broker;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link_times::{LinkTimes, Others};
use crate::upstream::status::LinkStatus;

/// Connections that end within this time are short.
const SHORT: Duration = Duration::from_secs(15);

/// So many short connections of a link in a row, while others stayed, point to a second process.
const SUSPICIOUS: u32 = 4;

/// So many ends of a link in a row after which one other link was there, that had just connected,
/// point to one identifier for all.
const SOLE: u32 = 3;

/// What the end of a link points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// A second process, by this sign.
    SecondProcess(&'static str),
    /// All links have one client identifier at the broker.
    OneIdentifier,
}

/// The end of a connection that is to be judged when it is seen which other links stayed.
#[derive(Clone, Copy, Debug)]
struct End {
    at: Instant,
    taken_over: bool,
}

/// The watch that one link keeps.
#[derive(Debug, Default)]
pub(super) struct DuplicateNodeWatch {
    end: Option<End>,
    /// Short connections in a row that ended while other links stayed.
    short: u32,
    /// Of these, the last ones in a row after which one other link was there, a new one.
    sole: u32,
}

impl DuplicateNodeWatch {
    /// The broker could not be reached, so short connections say nothing about a second process.
    pub(super) fn unreachable(&mut self) {
        *self = Self::default();
    }

    /// A connection of the link ended after `lasted`.
    pub(super) fn ended(&mut self, end: &LinkEnd, lasted: Duration) {
        let taken_over = matches!(end, LinkEnd::Disconnect(ReasonCode::SESSION_TAKEN_OVER));
        let closed = matches!(end, LinkEnd::Closed | LinkEnd::Io(_));
        let short = closed && lasted < SHORT;
        if !(taken_over || short) {
            return self.unreachable();
        }
        self.end = Some(End {
            at: Instant::now(),
            taken_over,
        });
    }

    /// The link is about to connect again. Logs an error if its last end has a likely cause.
    pub(super) fn judge(&mut self, broker: &Broker, link: &LinkStatus, times: &LinkTimes) {
        match self.sign(|at| times.others_at(&link.name, at)) {
            Some(Sign::SecondProcess(sign)) => tracing::error!(
                link = link.name,
                client_id = broker.client_id(&link.name),
                node_id = broker.access.node,
                "{sign}: is there a second Tidegate with this node.id? node.id must differ between processes at one broker"
            ),
            Some(Sign::OneIdentifier) => tracing::error!(
                link = link.name,
                username = broker.access.config.username.as_deref(),
                "Each link that connects ends the one before it: the broker gives all connections of a user one client identifier (mosquitto: use_username_as_clientid). The links need identifiers of their own"
            ),
            None => {}
        }
    }

    fn sign(&mut self, others_at: impl Fn(Instant) -> Others) -> Option<Sign> {
        let end = self.end.take()?;
        let others = others_at(end.at);
        if others.stayed == 0 && !end.taken_over {
            // All links ended: the broker has restarted, or the network failed.
            return None;
        }
        let rarely = |count: u32, first: u32| count >= first && count.is_power_of_two();
        self.sole = match others {
            Others { stayed: 1, new: 1 } => self.sole + 1,
            _ => 0,
        };
        self.short = match end.taken_over {
            true => 0,
            false => self.short + 1,
        };
        if self.sole > 0 {
            let said = self.sole == SOLE || rarely(self.sole, SOLE);
            return said.then_some(Sign::OneIdentifier);
        }
        if end.taken_over {
            let sign = "Another client took the link's client identifier";
            return Some(Sign::SecondProcess(sign));
        }
        let sign = "The broker closes the link again and again soon after it accepted it";
        rarely(self.short, SUSPICIOUS).then_some(Sign::SecondProcess(sign))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);
    const MANY: Others = Others { stayed: 3, new: 0 };

    /// Whether each of these ends is a sign.
    fn signs(ends: impl Iterator<Item = (LinkEnd, Duration, Others)>) -> Vec<Option<Sign>> {
        let mut watch = DuplicateNodeWatch::default();
        ends.map(|(end, lasted, others)| {
            watch.ended(&end, lasted);
            watch.sign(|_| others)
        })
        .collect()
    }

    /// The numbers of the signs, from 1.
    fn at(signs: &[Option<Sign>]) -> Vec<usize> {
        let at = |(n, sign): (usize, &Option<Sign>)| sign.map(|_| n + 1);
        signs.iter().enumerate().filter_map(at).collect()
    }

    #[tokio::test]
    async fn a_takeover_is_a_sign_at_once() {
        let end = LinkEnd::Disconnect(ReasonCode::SESSION_TAKEN_OVER);
        let lasted = Duration::from_secs(3600);
        let signs = signs([(end, lasted, Others::default())].into_iter());
        assert!(matches!(signs[..], [Some(Sign::SecondProcess(_))]));
    }

    #[tokio::test]
    async fn short_connections_in_a_row_are_a_sign_ever_more_rarely() {
        let signs = signs((0..20).map(|_| (LinkEnd::Closed, SOON, MANY)));
        assert_eq!(at(&signs), [4, 8, 16]);
        assert!(matches!(signs[3], Some(Sign::SecondProcess(_))));
    }

    #[tokio::test]
    async fn a_broker_that_restarts_again_and_again_is_no_sign() {
        let all = Others::default();
        let signs = signs((0..20).map(|_| (LinkEnd::Closed, SOON, all)));
        assert!(at(&signs).is_empty());
    }

    #[tokio::test]
    async fn links_that_end_each_other_have_one_identifier() {
        let one = Others { stayed: 1, new: 1 };
        let taken = || LinkEnd::Disconnect(ReasonCode::SESSION_TAKEN_OVER);
        for end in [taken, || LinkEnd::Closed] {
            let signs = signs((0..10).map(|_| (end(), SOON, one)));
            assert_eq!(at(&signs), [3, 4, 8]);
            assert_eq!(signs[2], Some(Sign::OneIdentifier));
        }
    }

    #[tokio::test]
    async fn a_long_connection_or_an_unreachable_broker_begins_the_count_again() {
        let mut watch = DuplicateNodeWatch::default();
        let mut sign = |end: LinkEnd, lasted| {
            watch.ended(&end, lasted);
            watch.sign(|_| MANY)
        };
        for _ in 0..3 {
            assert_eq!(sign(LinkEnd::Closed, SOON), None);
        }
        assert_eq!(sign(LinkEnd::Closed, SHORT), None);
        for _ in 0..3 {
            assert_eq!(sign(LinkEnd::Closed, SOON), None);
        }
        watch.unreachable();
        let mut sign = |end: LinkEnd, lasted| {
            watch.ended(&end, lasted);
            watch.sign(|_| MANY)
        };
        assert_eq!(sign(LinkEnd::Closed, SOON), None);
        assert_eq!(sign(LinkEnd::KeepAlive, SOON), None);
    }
}
