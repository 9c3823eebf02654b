use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::budget::Allowance;
use crate::hashing::HashSeed;

use crate::mqtt::{
    Decoder, Message, MessageSpec, Packet, Properties, Receiver, encode_subscribe,
    encode_unsubscribe,
};
use crate::outbuf::OutBuf;
use crate::session::{
    ConnectionSpec, Deferral, Incarnation, Offer, QueueFull, SLEEP_AFTER, WaitNumber, WaitingMax,
};
use crate::streams::{StreamId, StreamSet};
use crate::time::Millis;
use crate::topics::FilterId;

fn subscription(filter: FilterId, name: &str) -> Subscription {
    Subscription {
        filter,
        name: name.into(),
        options: SubscribeOptions::default(),
        asked: QoS::AtMostOnce,
        identifier: None,
        active: false,
        overlaps: 0,
        shared: false,
        wild: true,
        wild_below: None,
    }
}

fn limits(subscriptions_max: usize) -> SessionLimits {
    SessionLimits {
        receive_max: 10,
        receive_max_hard: 10,
        topic_alias_max: 0,
        packet_max: 1024 * 1024,
        queue_messages_max: 10,
        queue_bytes_max: 1024,
        queue_age_max: None,
        sleep_after: SLEEP_AFTER,
        shared_redeliver_after: Duration::ZERO,
        will_grace: Duration::ZERO,
        presence: false,
        queue_full: QueueFull::Oldest,
        queue_qos0: false,
        output_buffer: Arc::new(1024.into()),
        subscriptions_max,
        filter_bytes_max: 1024 * 1024,
        topic_levels_max: 32,
        v3_publishes_max: 10,
        expiry_max: 0,
        publish_account: Arc::default(),
        reserved_key: "",
        hash_seed: HashSeed::fixed(),
    }
}

/// Refuses filters that begin with "no", and counts how often it is asked.
#[derive(Default)]
struct Counting(Cell<usize>);

impl Policy for Counting {
    fn may_publish(&self, _: &str, _: &str) -> bool {
        true
    }

    fn may_subscribe(&self, _: &str, filter: &str) -> bool {
        self.0.set(self.0.get() + 1);
        !filter.starts_with("no")
    }
}

fn connected() -> Session {
    connected_of(Version::V5)
}

fn connected_of(version: Version) -> Session {
    connected_as(version, false)
}

fn connected_as(version: Version, bridge: bool) -> Session {
    let mut session = Session::new("c".into(), "p".into(), Incarnation::nth(0), Millis::ZERO);
    let spec = ConnectionSpec {
        version,
        bridge,
        receive_maximum: 10,
        maximum_packet_size: None,
        topic_alias_maximum: 0,
        keep_alive: None,
        scope: None,
    };
    session.attach(&spec, 0, None, &limits(0), Millis::ZERO);
    session
}

fn options(qos: QoS, retain_handling: u8) -> SubscribeOptions {
    SubscribeOptions {
        qos,
        retain_handling,
        ..SubscribeOptions::default()
    }
}

/// What a SUBSCRIBE requests of the router, and how often it asked the policy.
fn subscribe(
    session: &mut Session,
    filters: &[(&str, SubscribeOptions)],
    limits: &SessionLimits,
) -> (Vec<SubscribeRequest>, usize) {
    let (mut effects, asked) = effects_of(session, filters, limits);
    let requests = match effects.pop() {
        Some(Effect::Subscribe { requests, .. }) => requests,
        _ => Vec::new(),
    };
    (requests, asked)
}

/// The effects of a SUBSCRIBE, and how often it asked the policy.
fn effects_of(
    session: &mut Session,
    filters: &[(&str, SubscribeOptions)],
    limits: &SessionLimits,
) -> (Vec<Effect>, usize) {
    let version = session.version();
    let mut packet = Vec::new();
    encode_subscribe(version, 1, None, filters.iter().copied(), &mut packet);
    let decoder = Decoder {
        version,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let (packet, _) = decoder.next(&packet).expect("legal").expect("whole");
    let (mut effects, policy) = (Vec::new(), Counting::default());
    let taken = session.packet(
        StreamId::CONTROL,
        &packet,
        limits,
        &policy,
        Millis::ZERO,
        &mut effects,
    );
    taken.expect("it is allowed");
    (effects, policy.0.get())
}

#[test]
fn filters_beyond_the_clients_limit_are_counted() {
    let filters = ["a", "b", "c", "d"].map(|filter| (filter, options(ONE, 0)));
    let (effects, _) = effects_of(&mut connected(), &filters, &limits(3));
    assert!(matches!(
        effects[..],
        [
            Effect::SubscribeOverLimit { filters: 1 },
            Effect::Subscribe { .. }
        ]
    ));
}

/// The codes of the SUBACK; empty if it was not written.
fn codes(session: &mut Session) -> Vec<u8> {
    let mut out = OutBuf::default();
    session
        .connection()
        .expect("connected")
        .take_output(StreamSet::CONTROL, &mut out);
    let out = out.to_vec();
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    match decoder.next(&out).expect("legal") {
        Some((Packet::Suback(suback), _)) => suback.codes.to_vec(),
        Some((Packet::Unsuback(unsuback), _)) => unsuback.codes.to_vec(),
        None => Vec::new(),
        Some((other, _)) => panic!("{other:?}"),
    }
}

const ZERO: QoS = QoS::AtMostOnce;
const ONE: QoS = QoS::AtLeastOnce;
const TWO: QoS = QoS::ExactlyOnce;

#[test]
fn a_repeated_filter_is_requested_once_and_answered_everywhere() {
    let mut session = connected();
    let filters = [
        ("a", options(ZERO, 2)),
        ("no", options(ONE, 2)),
        ("a", options(TWO, 2)),
        ("b", options(ONE, 2)),
        ("no", options(ONE, 2)),
        ("a", options(ONE, 2)),
    ];
    let (requests, asked) = subscribe(&mut session, &filters, &limits(10));
    let seen = requests
        .iter()
        .map(|w| (w.index, &*w.filter, w.options.qos));
    assert_eq!(seen.collect::<Vec<_>>(), [(0, "a", ONE), (3, "b", ONE)]);
    assert_eq!(asked, 3);
    session.subscribed(1, 0, ReasonCode(1), None).expect("told");
    assert!(codes(&mut session).is_empty(), "b is not answered yet");
    session.subscribed(1, 3, ReasonCode(1), None).expect("told");
    // None is granted more than it asked for.
    assert_eq!(codes(&mut session), [0, 0x87, 1, 1, 0x87, 1]);
}

#[test]
fn a_repeated_filter_that_is_refused_is_refused_everywhere() {
    let mut session = connected();
    let filters = [("a", options(ZERO, 0)), ("a", options(ONE, 0))];
    subscribe(&mut session, &filters, &limits(10));
    let refused = ReasonCode::QUOTA_EXCEEDED;
    session.subscribed(1, 0, refused, None).expect("told");
    assert_eq!(codes(&mut session), [0x97, 0x97]);
}

#[test]
fn retain_handling_of_a_repeated_filter() {
    // As if each were a SUBSCRIBE: 0 asks again, 1 only as the first, 2 never.
    for (handlings, all) in [
        ([0, 2], 0),
        ([2, 0], 0),
        ([1, 0], 0),
        ([1, 2], 1),
        ([1, 1], 1),
        ([2, 1], 2),
        ([2, 2], 2),
    ] {
        let filters = handlings.map(|handling| ("a", options(ONE, handling)));
        let (requests, _) = subscribe(&mut connected(), &filters, &limits(10));
        let options = requests.first().map(|w| w.options.retain_handling);
        assert_eq!(options, Some(all), "{handlings:?}");
    }
}

#[test]
fn a_subscribe_with_more_filters_than_can_be_counted_is_answered_whole() {
    let mut session = connected();
    session.add_subscription(subscription(FilterId(7), "#"), &[]);
    let mut filters = vec![("#", options(ONE, 0)); 70_000];
    filters.push(("a", options(ONE, 0)));
    let (requests, asked) = subscribe(&mut session, &filters, &limits(10));
    assert_eq!((requests.len(), asked), (1, 1));
    session.subscribed(1, 0, ReasonCode(1), None).expect("told");
    let codes = codes(&mut session);
    assert_eq!(codes.len(), filters.len());
    let granted = codes.iter().filter(|c| **c == 1).count();
    assert_eq!(granted, FILTERS_MAX);
    assert!(codes[FILTERS_MAX..].iter().all(|c| *c == 0x97));
}

/// An UNSUBSCRIBE of `count` filters. Returns the codes of the UNSUBACK.
fn unsubscribe(version: Version, count: usize) -> Result<Vec<u8>, CloseReason> {
    let mut session = connected_of(version);
    session.add_subscription(subscription(FilterId(7), "a"), &[]);
    let mut packet = Vec::new();
    encode_unsubscribe(version, 1, std::iter::repeat_n("a", count), &mut packet);
    let decoder = Decoder {
        version,
        receiver: Receiver::Server,
        max: u32::MAX,
    };
    let (packet, _) = decoder.next(&packet).expect("legal").expect("whole");
    let (limits, policy, mut effects) = (limits(10), Counting::default(), Vec::new());
    let (stream, now) = (StreamId::CONTROL, Millis::ZERO);
    session.packet(stream, &packet, &limits, &policy, now, &mut effects)?;
    let ended = session.subscriptions().is_empty();
    assert_eq!(
        (ended, effects.len()),
        (count <= FILTERS_MAX, usize::from(ended))
    );
    Ok(match version {
        Version::V5 => codes(&mut session),
        _ => Vec::new(),
    })
}

#[test]
fn an_unsubscribe_has_no_more_filters_than_can_be_counted() {
    let codes = unsubscribe(Version::V5, FILTERS_MAX).expect("it is answered");
    assert_eq!((codes.len(), codes[0], codes[1]), (FILTERS_MAX, 0, 0x11));
    let codes = unsubscribe(Version::V5, FILTERS_MAX + 1).expect("it is answered");
    assert_eq!(codes, vec![0x83; FILTERS_MAX + 1]);
    assert!(unsubscribe(Version::V311, FILTERS_MAX).is_ok());
    let refused = unsubscribe(Version::V311, FILTERS_MAX + 1);
    assert_eq!(refused, Err(CloseReason::UnsubscribeFilters));
}

#[test]
fn a_subscribe_is_checked_up_to_the_subscriptions_that_a_client_may_have() {
    let names: Vec<String> = (0..100).map(|n| format!("no/{n}")).collect();
    let filters = names.iter().map(|n| (&**n, options(ONE, 0)));
    let filters: Vec<_> = filters.collect();
    let mut session = connected();
    let (requests, asked) = subscribe(&mut session, &filters, &limits(10));
    assert_eq!((requests.len(), asked), (0, 10));
    let codes = codes(&mut session);
    assert_eq!(codes[..10], [0x87; 10]);
    assert_eq!(codes[10..], [0x97; 90]);
}

#[test]
fn a_bridge_of_mqtt_3_subscribes_with_no_local_and_retain_as_published() {
    let filters = ["a", "$share/g/a", "a"].map(|name| (name, options(ONE, 0)));
    for bridge in [false, true] {
        let mut session = connected_as(Version::V311, bridge);
        let (requests, _) = subscribe(&mut session, &filters, &limits(10));
        let seen = requests
            .iter()
            .map(|w| (w.options.no_local, w.options.retain_as_published));
        // No Local is illegal for a shared subscription.
        let expected = [(bridge, bridge), (false, bridge)];
        assert_eq!(seen.collect::<Vec<_>>(), expected);
    }
}

/// Two messages of one topic wait for the retained messages of one subscription. Each goes on the stream of
/// its own.
#[test]
fn messages_that_waited_go_on_the_streams_of_their_subscriptions() {
    let (mut session, limits) = (connected(), limits(10));
    let streams = [(FilterId(1), "a"), (FilterId(2), "+")];
    let stream_of = |filter: FilterId| StreamId::new(filter.0 as u8);
    for (filter, name) in streams {
        let connection = session.connection().expect("it is connected");
        connection.bind(name, stream_of(filter));
        connection.numbered(name, filter);
    }
    let (total, number) = (Arc::default(), WaitNumber::default());
    assert!(session.begin_wait(FilterId(1), number, Millis::MAX, &total));
    let message = Message::new(&MessageSpec {
        topic: "a",
        properties: Properties::default(),
        payload: b"",
        qos: QoS::AtMostOnce,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    });
    let max = WaitingMax {
        messages: 10,
        bytes: 1000,
    };
    for (filter, _) in streams {
        let offer = Offer {
            message: &message,
            qos: QoS::AtMostOnce,
            retain: false,
            ids: &[],
            group: None,
            stream: stream_of(filter),
            fetched: false,
            position: 0,
        };
        assert_eq!(session.defer(filter, &offer, max), Deferral::Waits);
    }
    let mut output = Allowance::new(Arc::default(), u64::MAX, 1);
    session.end_wait(FilterId(1), &limits, Millis::ZERO, &mut output);
    let connection = session.connection().expect("it is connected");
    let taken = connection.take_output(StreamSet::ALL, &mut OutBuf::default());
    let taken: Vec<StreamId> = taken.iter().map(|(stream, _)| *stream).collect();
    assert_eq!(taken, streams.map(|(filter, _)| stream_of(filter)));
}
