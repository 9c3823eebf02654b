use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use std::num::NonZeroU64;

use super::*;
use crate::store::log::{Position, Record};

/// The parts of a will and of a subscription that a record borrows.
type Will = (String, Vec<u8>, Vec<u8>, u8, bool, u32, Option<u32>);
type Subscription = (String, u8, u8, Option<u32>, Option<u16>);

fn wills() -> impl Strategy<Value = Will> {
    let bytes = || vec(any::<u8>(), 0..20);
    (
        ".{0,9}",
        bytes(),
        bytes(),
        0..3u8,
        any::<bool>(),
        any::<u32>(),
        any::<Option<u32>>(),
    )
}

fn subscriptions() -> impl Strategy<Value = Vec<Subscription>> {
    let one = (
        ".{0,9}",
        any::<u8>(),
        0..3u8,
        option::of(1..=u32::MAX),
        option::of(1..=u16::MAX),
    );
    vec(one, 0..5)
}

fn will_of(will: &Will) -> WillRecord<'_> {
    WillRecord {
        topic: &will.0,
        properties: &will.1,
        payload: &will.2,
        qos: will.3,
        retain: will.4,
        delay: will.5,
        message_expiry: will.6,
    }
}

fn subscription_of(subscription: &Subscription) -> SubscriptionRecord<'_> {
    SubscriptionRecord {
        name: &subscription.0,
        options: subscription.1,
        asked: subscription.2,
        identifier: subscription.3.and_then(NonZeroU32::new),
        wild_below: subscription.4.and_then(NonZeroU16::new),
    }
}

/// A body that can be read is written again to the byte.
fn has_one_form(body: &[u8]) {
    if let Ok(record) = SessionRecord::decode(body) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again, body);
    }
    if let Ok(incarnation) = decode_end(body) {
        assert_eq!(encode_end(incarnation), *body);
    }
    if let Ok(record) = MessageRecord::decode(body) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again, body);
    }
    if let Ok(record) = CheckpointRecord::decode(body) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(again, body);
    }
    if let Ok(record) = LinkReleased::decode(body) {
        assert_eq!(record.encode(), body);
    }
}

type Content = (String, Vec<u8>, Vec<u8>, u8, bool);

fn contents() -> impl Strategy<Value = Content> {
    let bytes = || vec(any::<u8>(), 0..20);
    (".{0,9}", bytes(), bytes(), 0..3u8, any::<bool>())
}

fn content((topic, properties, payload, qos, retain): &Content) -> ContentRecord<'_> {
    ContentRecord {
        topic,
        properties,
        payload,
        qos: *qos,
        retain: *retain,
    }
}

/// The parts of a delivery that a record borrows.
type Delivery = (
    (u8, u16, u8, bool),
    Vec<u32>,
    Option<String>,
    Option<u64>,
    Option<(Content, Option<u64>)>,
);

fn deliveries() -> impl Strategy<Value = Delivery> {
    (
        (0..4u8, any::<u16>(), 0..3u8, any::<bool>()),
        vec(any::<u32>(), 0..3),
        option::of(".{0,9}"),
        any::<Option<u64>>(),
        option::of((contents(), any::<Option<u64>>())),
    )
}

fn owed(delivery: &Delivery) -> OwedRecord<'_> {
    let ((stage, id, qos, retain), identifiers, group, number, own) = delivery;
    OwedRecord {
        message: match (own, number) {
            (Some((parts, expires_at)), _) => {
                OwedMessage::Content(content(parts), expires_at.map(UnixMillis::new))
            }
            (None, Some(number)) => OwedMessage::Sequence(*number),
            (None, None) => OwedMessage::Had,
        },
        stage: match stage {
            0 => OwedStage::Waiting,
            1 => OwedStage::Fetched,
            2 => OwedStage::Sent(*id),
            _ => OwedStage::Released(*id),
        },
        qos: *qos,
        retain: *retain,
        identifiers: identifiers.clone(),
        group: group.as_deref(),
    }
}

/// The parts of the addressees of a message that a record borrows.
type Addressee = (Option<String>, Option<u64>, Option<u64>);

proptest! {
    #[test]
    fn a_message_is_read_as_it_was_written(
        numbers in any::<(u64, Option<u64>, u64, Option<u64>)>(),
        parts in contents(),
        received in any::<Option<(u16, u16, u64)>>(),
        addressees in vec((option::of(".{0,9}"), any::<Option<u64>>(), any::<Option<u64>>()), 0..4),
    ) {
        let addressees: Vec<Addressee> = addressees;
        let record = MessageRecord {
            sequence: numbers.0,
            origin_mark: numbers.1.and_then(NonZeroU64::new),
            arrived_at: UnixMillis::new(numbers.2),
            expires_at: numbers.3.map(UnixMillis::new),
            received: received.map(|(link, packet_id, digest)| LinkReceived {
                link,
                packet_id,
                digest,
            }),
            addressees: addressees
                .iter()
                .map(|(filter, member, since)| AddresseeRecord {
                    // Without a name of its own it is the topic.
                    filter: filter.as_ref().unwrap_or(&parts.0),
                    member: member.and_then(NonZeroU64::new),
                    since: *since,
                })
                .collect(),
            content: content(&parts),
        };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(MessageRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert_eq!(MessageRecord::decode(&body[..len]), Err(RecordError::Malformed));
        }
    }

    #[test]
    fn a_checkpoint_is_read_as_it_was_written(
        through: u64,
        behind in vec(any::<(u64, u64)>(), 0..5),
    ) {
        let record = CheckpointRecord { through, behind };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(CheckpointRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert_eq!(CheckpointRecord::decode(&body[..len]), Err(RecordError::Malformed));
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written(
        names in (".{0,9}", ".{0,9}", any::<IpAddr>()),
        numbers in any::<(u64, u8, u32, Option<u64>, u64, u16)>(),
        flags in any::<(bool, bool, bool)>(),
        will in option::of(wills()),
        subscriptions in subscriptions(),
        progress in (any::<u64>(), vec(any::<u64>(), 0..3)),
        deliveries in vec(deliveries(), 0..4),
    ) {
        let record = SessionRecord {
            incarnation: numbers.0,
            key: &names.0,
            principal: &names.1,
            anonymous: flags.0,
            address: names.2,
            level: numbers.1,
            bridge: flags.1,
            over: flags.2,
            expiry: numbers.2,
            detached_at: numbers.3.map(UnixMillis::new),
            gaps: numbers.4,
            last_id: numbers.5,
            will: will.as_ref().map(will_of),
            subscriptions: subscriptions.iter().map(subscription_of).collect(),
            through: progress.0,
            done: progress.1,
            owed: deliveries.iter().map(owed).collect(),
        };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(SessionRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert_eq!(SessionRecord::decode(&body[..len]), Err(RecordError::Malformed));
        }
        body.push(0);
        prop_assert_eq!(SessionRecord::decode(&body), Err(RecordError::Malformed));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(mut body in vec(any::<u8>(), 0..200)) {
        has_one_form(&body);
        if let Some(version) = body.first_mut() {
            *version = RECORDS_VERSION;
            has_one_form(&body);
        }
    }

    #[test]
    fn a_damaged_record_is_read_without_a_panic(
        will in option::of(wills()),
        subscriptions in subscriptions(),
        deliveries in vec(deliveries(), 0..3),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = Vec::new();
        SessionRecord {
            will: will.as_ref().map(will_of),
            subscriptions: subscriptions.iter().map(subscription_of).collect(),
            owed: deliveries.iter().map(owed).collect(),
            ..session(7)
        }
        .encode(&mut body);
        for (at, byte) in damage {
            let at = at.index(body.len());
            body[at] = byte;
        }
        has_one_form(&body);
    }

    #[test]
    fn an_end_is_read_as_it_was_written(incarnation: u64) {
        prop_assert_eq!(decode_end(&encode_end(incarnation)), Ok(incarnation));
        prop_assert_eq!(
            decode_end(&encode_end(incarnation)[..8]),
            Err(RecordError::Malformed)
        );
    }
}

#[test]
fn a_record_of_a_later_version_is_refused() {
    let mut body = encode_end(7);
    body[0] = RECORDS_VERSION + 1;
    assert_eq!(decode_end(&body), Err(RecordError::Version(2)));
    assert_eq!(SessionRecord::decode(&body), Err(RecordError::Version(2)));
}

/// The bodies of sessions of one client, and ends of incarnations, as records of a log.
fn found(records: &[(u8, u64)]) -> FoundSessions {
    let mut found = FoundSessions::default();
    for (at, (kind, incarnation)) in records.iter().enumerate() {
        let mut body = encode_end(*incarnation).to_vec();
        if *kind == SESSION {
            body.clear();
            session(*incarnation).encode(&mut body);
        }
        let record = Record {
            position: Position::new(1, 100 * at as u32),
            kind: *kind,
            body: &body,
        };
        assert_eq!(found.take(&record), Ok(()));
    }
    found
}

fn session(incarnation: u64) -> SessionRecord<'static> {
    SessionRecord {
        incarnation,
        key: "client",
        principal: "anonymous",
        anonymous: true,
        address: IpAddr::from([127, 0, 0, 1]),
        level: 5,
        bridge: false,
        over: false,
        expiry: 1,
        detached_at: None,
        gaps: 0,
        last_id: 0,
        will: None,
        subscriptions: Vec::new(),
        through: 0,
        done: Vec::new(),
        owed: Vec::new(),
    }
}

#[test]
fn the_last_incarnation_of_a_client_is_its_session_until_it_ends() {
    let (new, end) = (SESSION, SESSION_END);
    for (records, left) in [
        (&[(new, 1)][..], 1),
        (&[(new, 1), (end, 1)], 0),
        (&[(new, 1), (end, 1), (new, 2)], 1),
        // An end that was lost does not bring a session back.
        (&[(new, 1), (new, 2), (end, 2)], 0),
        (&[(new, 1), (new, 2), (end, 1)], 1),
        (&[(end, 1)], 0),
    ] {
        let found = found(records);
        let largest = records.iter().map(|(_, n)| *n).max();
        assert_eq!(Some(found.largest_incarnation()), largest);
        assert_eq!(found.sessions().len(), left, "{records:?}");
    }
}

#[test]
fn a_record_of_an_unknown_kind_is_refused() {
    let record = Record {
        position: Position::new(1, 100),
        kind: 77,
        body: b"",
    };
    let refused = FoundSessions::default().take(&record);
    assert_eq!(refused, Err(RecordError::Kind(77)));
}
