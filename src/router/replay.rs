//! Messages that an earlier process has left in the log go to the sessions that they are owed to.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::mqtt::{
    Addressee, LinkOrigin, Message, MessageSpec, Numbered, Properties, QoS, RecordPlace,
};
use crate::session::{Incarnation, OwedStage, RestoredDelivery, Session};
use crate::store::log::{Claim, Claims, Position};
use crate::store::records::{
    self, ContentRecord, FoundMessage, FoundSessions, MessageRecord, OwedMessage, OwedRecord,
    SessionRecord,
};
use crate::time::{Deadline, Millis, UnixMillis};
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::sessions::came::{Came, Replayed, Source};
use crate::router::sessions::journal::Progress;
use crate::router::sessions::tally::Tally;
use crate::router::types::SessionRef;

/// The messages of a log, while sessions begin.
#[derive(Debug)]
pub(super) struct Replay<'a> {
    router: &'a Router,
    found: &'a FoundSessions,
    claims: &'a Arc<Claims>,
    stale: bool,
    now: Millis,
    /// The messages that sessions name, by number.
    named: BTreeMap<u64, Message>,
    /// Sessions with shared subscriptions.
    members: BTreeMap<u64, SessionRef>,
}

impl<'a> Replay<'a> {
    /// `stale`: the log lacks its last records, so nobody gets a message.
    pub(super) fn new(
        router: &'a Router,
        found: &'a FoundSessions,
        claims: &'a Arc<Claims>,
        stale: bool,
        now: Millis,
    ) -> Self {
        Self {
            router,
            found,
            claims,
            stale,
            now,
            named: BTreeMap::new(),
            members: BTreeMap::new(),
        }
    }

    /// Whether no message of the log is used.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// A session with shared subscriptions has begun.
    pub(super) fn member(&mut self, incarnation: Incarnation, session: SessionRef) {
        self.members.insert(incarnation.get(), session);
    }

    /// Gives a session the deliveries that its record lists. Returns how far it is with other messages.
    pub(super) fn begin(
        &mut self,
        session: &mut Session,
        record: &SessionRecord<'_>,
        position: Position,
    ) -> Progress {
        if self.stale {
            return Progress {
                through: self.found.largest_sequence(),
                ..Progress::default()
            };
        }
        let lowest = self.found.lowest(record, position);
        let mut listed: BTreeSet<u64> = record.done.iter().copied().collect();
        let mut deliveries = Vec::new();
        for owed in &record.owed {
            if let OwedMessage::Sequence(number) = owed.message {
                listed.insert(number);
            }
            deliveries.extend(self.delivery(session, owed, lowest));
        }
        session.restore_deliveries(record.last_id, deliveries);
        Progress {
            through: record.through,
            lowest,
            listed,
            connected: record.detached_at.is_none(),
        }
    }

    /// A delivery that a record lists. `None`: its message is not needed any more.
    fn delivery(
        &mut self,
        session: &Session,
        owed: &OwedRecord<'_>,
        lowest: u64,
    ) -> Option<RestoredDelivery> {
        let qos = QoS::from_u8(owed.qos)?;
        let stage = match owed.stage {
            records::OwedStage::Waiting => OwedStage::Waiting,
            records::OwedStage::Fetched => OwedStage::Fetched,
            records::OwedStage::Sent(id) => OwedStage::Sent(id),
            records::OwedStage::Released(id) => OwedStage::Released(id),
        };
        let message = match owed.message {
            OwedMessage::Had => None,
            OwedMessage::Sequence(number) => {
                // The client may have a message of QoS 2 that was sent to it, and no other one under its
                // identifier.
                let is_open = qos == QoS::ExactlyOnce && matches!(stage, OwedStage::Sent(_));
                if number < lowest && !is_open {
                    return None;
                }
                Some(self.message(number)?)
            }
            OwedMessage::Content(content, expires_at) => Some(self.content(&content, expires_at)),
        };
        let mut subscriptions = session.subscriptions().iter();
        let group = owed.group.and_then(|name| {
            let subscription = subscriptions.find(|s| s.shared && *s.name == *name);
            subscription.map(|s| s.filter)
        });
        Some(RestoredDelivery {
            message,
            stage,
            qos,
            retain: owed.retain,
            identifiers: SmallVec::from_slice(&owed.identifiers),
            group,
            at: self.now.low_bits(),
        })
    }

    /// The message with this number.
    fn message(&mut self, number: u64) -> Option<Message> {
        if let Some(message) = self.named.get(&number) {
            return Some(message.clone());
        }
        let found = self.found.messages().get(&number)?;
        let record = MessageRecord::decode(&found.body).ok()?;
        let message = self.restored(&record, found)?;
        self.named.insert(number, message.clone());
        Some(message)
    }

    /// The message of a record, with the claim on the record.
    fn restored(&self, record: &MessageRecord<'_>, found: &FoundMessage) -> Option<Message> {
        let mut message = self.content(&record.content, record.expires_at);
        let received = record.received;
        let received = received.filter(|r| self.found.is_received(r, record.sequence));
        // The broker has forgotten the messages of other links.
        let received = received.filter(|r| self.router.restored_link(r.link.into()).is_some());
        let link_origin = received.map(|received| LinkOrigin {
            link: received.link,
            packet_id: received.packet_id,
            digest: received.digest,
        });
        let kept = self.router.sessions.numbers().kept()?;
        let numbered = Numbered::new(
            record.sequence,
            record.origin_mark,
            link_origin,
            record.arrived_at,
            kept.records.clone(),
        );
        let _ = numbered.address(record.addressees.iter().map(|addressee| Addressee {
            filter: addressee.filter.into(),
            member: addressee.member,
            since: addressee.since.unwrap_or(record.sequence),
        }));
        self.claims
            .claim(Claim::new(found.position, found.body.len()));
        numbered.append(|_, _| {
            Some(RecordPlace {
                position: found.position.as_u64(),
                bytes: found.body.len() as u32,
            })
        });
        numbered.settle();
        message.number(numbered);
        Some(message)
    }

    fn content(&self, content: &ContentRecord<'_>, expires_at: Option<UnixMillis>) -> Message {
        let today = self.router.config.started_at.at(self.now).as_u64();
        let expires_at = expires_at.map(|at| {
            let rest = at.as_u64().saturating_sub(today);
            Deadline::at(self.now + Duration::from_millis(rest))
        });
        Message::new(&MessageSpec {
            topic: content.topic,
            properties: Properties(content.properties),
            payload: content.payload,
            qos: QoS::from_u8(content.qos).unwrap_or_default(),
            retain: content.retain,
            expires_at,
            strip_key: None,
            account: Some(self.router.sessions.queue_account().clone()),
        })
    }

    /// The links know the messages of QoS 2 that the broker has not released.
    pub(super) fn restore_received(&mut self) {
        if self.stale {
            return;
        }
        for (received, sequence) in self.found.received() {
            let message = self.message(sequence);
            let numbers = self.router.sessions.numbers();
            let origin = message.as_ref().and_then(|m| m.numbered()?.link_origin());
            match (origin, message) {
                (Some(origin), Some(message)) => numbers.received.insert(origin, message),
                _ => numbers.received.unknown(received.link),
            }
        }
    }

    /// Gives all sessions the messages that their records do not list.
    pub(super) fn replay(mut self) {
        let mut tally = Tally::default();
        if !self.stale {
            for number in self.found.messages().keys() {
                self.replay_one(*number, &mut tally);
            }
        }
        tally.flush();
        self.router.sessions.replayed();
    }

    fn replay_one(&mut self, number: u64, tally: &mut Tally) {
        let Some(found) = self.found.messages().get(&number) else {
            return;
        };
        let Ok(record) = MessageRecord::decode(&found.body) else {
            return;
        };
        let message = match self.named.remove(&number) {
            Some(message) => message,
            None => match self.restored(&record, found) {
                Some(message) => message,
                None => return,
            },
        };
        if message.has_expired(self.now) {
            return;
        }
        for addressee in &record.addressees {
            let replayed = Replayed {
                sequence: number,
                since: addressee.since.unwrap_or(number),
            };
            let known = self.router.filters.known(addressee.filter);
            let Some((filter, shards)) = known else {
                continue;
            };
            match addressee.member {
                Some(member) => self.hand_to_member(member, filter, &message, replayed, tally),
                None => {
                    let came = Came {
                        message: &message,
                        filter,
                        source: Source::Live(record.origin_mark.and_then(incarnation)),
                        replayed: Some(replayed),
                        now: self.now,
                    };
                    self.router.sessions.deliver_to_shards(shards, &came, tally);
                }
            }
        }
    }

    /// A member of a shared subscription gets a message, if it is owed it.
    fn hand_to_member(
        &self,
        member: NonZeroU64,
        filter: FilterId,
        message: &Message,
        replayed: Replayed,
        tally: &mut Tally,
    ) {
        let Some(session) = self.members.get(&member.get()) else {
            return;
        };
        let (sessions, now) = (&self.router.sessions, self.now);
        (self.router.groups).restore(sessions, (filter, *session), message, replayed, now, tally);
    }
}

fn incarnation(number: NonZeroU64) -> Option<Incarnation> {
    Incarnation::new(number.get())
}
