//! A session as the log is to have it.

use std::net::{IpAddr, Ipv4Addr};

use crate::mqtt::Message;
use crate::session::{Owed, OwedStage, Session};
use crate::store::records::{
    self, ContentRecord, OwedMessage, OwedRecord, SessionRecord, SubscriptionRecord, WillRecord,
};
use crate::time::{Deadline, UnixMillis};

use crate::router::sessions::journal::Journal;
use crate::router::sessions::slot::Slot;

/// The record of the session in a slot. Messages up to the number `through` are with their sessions.
pub(super) fn record_of<'a>(
    at: u32,
    slot: &'a Slot,
    journal: &Journal,
    through: u64,
) -> SessionRecord<'a> {
    let session: &Session = &slot.session;
    let unknown = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let subscriptions = session.subscriptions().iter();
    let away_since = journal.through(at);
    let through = away_since.unwrap_or(through);
    let is_listed = |owed: &Owed<'_>| match (owed.stage, owed.message) {
        // While its client is away, a session is owed each later message by its subscription.
        (OwedStage::Waiting, Some(message)) if away_since.is_some() => {
            message.sequence().is_none_or(|number| number <= through)
        }
        _ => true,
    };
    SessionRecord {
        incarnation: session.incarnation.get(),
        key: session.key.as_str(),
        principal: &session.principal,
        anonymous: slot.holder.is_anonymous(),
        address: journal.address(at, slot).unwrap_or(unknown),
        level: session.version() as u8,
        bridge: session.is_bridge(),
        over: session.is_closed(),
        expiry: session.expiry,
        detached_at: journal.detached_at(at, session),
        gaps: session.gaps,
        last_id: session.last_id(),
        will: session.will().map(|will| WillRecord {
            topic: will.message.topic(),
            properties: will.message.properties(),
            payload: will.message.payload(),
            qos: will.message.qos() as u8,
            retain: will.message.retain(),
            delay: will.delay,
            message_expiry: will.message_expiry,
        }),
        subscriptions: subscriptions
            .map(|s| SubscriptionRecord {
                name: &s.name,
                options: s.options.to_u8(),
                asked: s.asked as u8,
                identifier: s.identifier,
                wild_below: s.wild_below,
            })
            .collect(),
        through,
        done: {
            let done = session.outbound().done().iter();
            done.copied().filter(|number| *number > through).collect()
        },
        owed: session
            .owed()
            .filter(is_listed)
            .map(|owed| owed_record(session, &owed, journal.started_at()))
            .collect(),
    }
}

fn owed_record<'a>(
    session: &'a Session,
    owed: &Owed<'a>,
    started_at: UnixMillis,
) -> OwedRecord<'a> {
    let message = match owed.message {
        None => OwedMessage::Had,
        Some(message) => match message.sequence() {
            Some(number) => OwedMessage::Sequence(number),
            None => {
                let expires_at = expiry_of(message, started_at);
                OwedMessage::Content(content_of(message), expires_at)
            }
        },
    };
    let mut subscriptions = session.subscriptions().iter();
    let subscription = owed
        .group
        .and_then(|group| subscriptions.find(|s| s.filter == group));
    OwedRecord {
        message,
        stage: match owed.stage {
            OwedStage::Waiting => records::OwedStage::Waiting,
            OwedStage::Fetched => records::OwedStage::Fetched,
            OwedStage::Sent(id) => records::OwedStage::Sent(id),
            OwedStage::Released(id) => records::OwedStage::Released(id),
        },
        qos: owed.qos as u8,
        retain: owed.retain,
        identifiers: owed.identifiers.to_vec(),
        group: subscription.map(|s| &*s.name),
    }
}

/// The parts of a message.
pub(super) fn content_of(message: &Message) -> ContentRecord<'_> {
    ContentRecord {
        topic: message.topic(),
        properties: message.properties(),
        payload: message.payload(),
        qos: message.qos() as u8,
        retain: message.retain(),
    }
}

/// The time of day at which a message expires.
pub(super) fn expiry_of(message: &Message, started_at: UnixMillis) -> Option<UnixMillis> {
    message
        .expires_at()
        .map(Deadline::time)
        .map(|at| started_at.at(at))
}
