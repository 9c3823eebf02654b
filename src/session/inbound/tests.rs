use super::*;

fn publish(packet_id: u16, dup: bool, qos: QoS, digest: u64) -> Incoming {
    Incoming {
        packet_id,
        stream: StreamId::CONTROL,
        dup,
        qos,
        digest,
    }
}

const TEN: OpenMax = OpenMax {
    announced: 10,
    hard: 10,
};
const ONE: QoS = QoS::AtLeastOnce;
const TWO: QoS = QoS::ExactlyOnce;
const OK: ReasonCode = ReasonCode::SUCCESS;

fn new(inbound: &mut Inbound, id: u16, qos: QoS, digest: u64) -> Token {
    match inbound.arrive(&publish(id, false, qos, digest), TEN) {
        Arrival::New(token) => token,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_copy_sent_again_joins_the_first_while_it_waits() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let token = new(&mut inbound, 7, ONE, 1);
    inbound.connection_ended();
    assert_eq!(
        inbound.arrive(&publish(7, true, ONE, 1), TEN),
        Arrival::Joined
    );
    assert!(inbound.answer(token, OK, true).is_some());
    assert_eq!(inbound.open(), 0);
}

#[test]
fn an_answer_from_before_the_copy_serves_only_the_copy() {
    for attached in [false, true] {
        let mut inbound = Inbound::new(HashSeed::fixed());
        let token = new(&mut inbound, 7, ONE, 1);
        inbound.connection_ended();
        assert_eq!(inbound.answer(token, OK, attached), None);
        let again = inbound.arrive(&publish(7, true, ONE, 1), TEN);
        assert_eq!(again, Arrival::Answered(OK));
        // [MQTT-4.3.2-5]: from now on the identifier means a new message.
        let next = inbound.arrive(&publish(7, true, ONE, 1), TEN);
        assert!(matches!(next, Arrival::New(_)));
    }
}

#[test]
fn another_message_under_the_same_identifier_is_not_joined() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let first = new(&mut inbound, 1, ONE, 1);
    inbound.connection_ended();
    let second = new(&mut inbound, 1, ONE, 2);
    assert_eq!(inbound.answer(first, OK, true), None);
    assert!(inbound.answer(second, OK, true).is_some());
}

#[test]
fn after_a_clean_start_only_an_equal_publish_with_dup_joins() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let token = new(&mut inbound, 1, ONE, 1);
    inbound.restart();
    let other = inbound.arrive(&publish(1, true, ONE, 2), TEN);
    assert!(matches!(other, Arrival::New(_)));
    let mut inbound = Inbound::new(HashSeed::fixed());
    let again = new(&mut inbound, 1, ONE, 1);
    assert_eq!(token, again);
    inbound.restart();
    assert_eq!(
        inbound.arrive(&publish(1, true, ONE, 1), TEN),
        Arrival::Joined
    );
    assert!(inbound.answer(again, OK, true).is_some());
    let mut inbound = Inbound::new(HashSeed::fixed());
    new(&mut inbound, 1, ONE, 1);
    inbound.restart();
    let fresh = inbound.arrive(&publish(1, false, ONE, 1), TEN);
    assert!(
        matches!(fresh, Arrival::New(_)),
        "a legal identical message"
    );
}

#[test]
fn publishes_of_an_earlier_session_are_forgotten_once_the_next_one_progresses() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let old = new(&mut inbound, 1, ONE, 1);
    inbound.restart();
    inbound.answer(old, OK, true);
    let other = new(&mut inbound, 2, ONE, 2);
    inbound.answer(other, OK, true);
    inbound.restart();
    let again = inbound.arrive(&publish(1, true, ONE, 1), TEN);
    assert!(matches!(again, Arrival::New(_)));
}

#[test]
fn a_publish_past_the_limit_is_refused_and_not_kept() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    for id in 1..=10 {
        new(&mut inbound, id, ONE, 0);
    }
    assert_eq!(
        inbound.arrive(&publish(11, false, ONE, 0), TEN),
        Arrival::TooMany
    );
    assert_eq!(inbound.open(), 10);
    assert_eq!(inbound.waiting(), 10);
}

#[test]
fn qos_1_past_the_announced_number_waits_and_is_refused_only_past_the_hard_one() {
    let max = OpenMax {
        announced: 10,
        hard: 12,
    };
    let mut inbound = Inbound::new(HashSeed::fixed());
    let tokens: Vec<Token> = (1..=10).map(|id| new(&mut inbound, id, ONE, 0)).collect();
    let full = |inbound: &Inbound, id| inbound.is_full(StreamId::CONTROL, id, 10);
    assert!(full(&inbound, 11) && !full(&inbound, 1), "1 is in use");
    for id in 11..=12 {
        let arrival = inbound.arrive(&publish(id, true, ONE, 0), max);
        assert!(matches!(arrival, Arrival::New(_)));
    }
    let arrival = inbound.arrive(&publish(13, true, ONE, 0), max);
    assert_eq!((arrival, inbound.open()), (Arrival::TooMany, 12));
    for token in &tokens[..3] {
        assert!(inbound.answer(*token, OK, true).is_some());
    }
    assert!(!full(&inbound, 13) && inbound.open() == 9);
}

#[test]
fn qos_2_is_limited_to_the_announced_number_whatever_waits_at_qos_1() {
    let max = OpenMax {
        announced: 2,
        hard: 100,
    };
    let mut inbound = Inbound::new(HashSeed::fixed());
    let arrive = |inbound: &mut Inbound, id, qos| inbound.arrive(&publish(id, false, qos, 0), max);
    for (id, qos) in [(1, ONE), (2, TWO), (3, TWO)] {
        let arrival = arrive(&mut inbound, id, qos);
        assert!(matches!(arrival, Arrival::New(_)), "{id}");
    }
    assert_eq!(arrive(&mut inbound, 4, TWO), Arrival::TooMany);
    assert!(inbound.is_full(StreamId::CONTROL, 4, 2));
    let Arrival::New(token) = arrive(&mut inbound, 1, ONE) else {
        panic!("the client uses the identifier again");
    };
    assert!(inbound.answer(token, OK, true).is_some());
    // No answer of the broker makes room: the client must send PUBREL, so it has to be read.
    assert!(!inbound.is_full(StreamId::CONTROL, 4, 2));
    assert_eq!(arrive(&mut inbound, 4, TWO), Arrival::TooMany);
    assert!(matches!(arrive(&mut inbound, 5, ONE), Arrival::New(_)));
}

#[test]
fn only_publishes_that_count_as_open_can_make_room() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let first = new(&mut inbound, 1, ONE, 1);
    inbound.restart();
    assert!(
        !inbound.is_full(StreamId::CONTROL, 2, 0),
        "an earlier session's"
    );
    let again = inbound.arrive(&publish(1, true, ONE, 1), TEN);
    assert_eq!(again, Arrival::Joined);
    assert!(inbound.is_full(StreamId::CONTROL, 2, 1));
    assert!(inbound.answer(first, OK, true).is_some());
    assert!(!inbound.is_full(StreamId::CONTROL, 2, 0));
    for answered in [false, true] {
        let Arrival::New(token) = inbound.arrive(&on_at(StreamId::new(1), 1, ONE), TEN) else {
            panic!("new");
        };
        inbound.stream_ended(StreamId::new(1));
        assert!(inbound.is_full(StreamId::CONTROL, 2, 1));
        if answered {
            assert_eq!(inbound.answer(token, OK, true), None);
        } else {
            inbound.restart();
        }
        assert!(!inbound.is_full(StreamId::CONTROL, 2, 0));
    }
}

fn on_at(stream: StreamId, packet_id: u16, qos: QoS) -> Incoming {
    Incoming {
        stream,
        ..publish(packet_id, false, qos, 1)
    }
}

#[test]
fn answers_while_away_do_not_count_against_the_client() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let tokens: Vec<Token> = (1..=10).map(|id| new(&mut inbound, id, ONE, 0)).collect();
    inbound.connection_ended();
    for token in tokens {
        inbound.answer(token, OK, false);
    }
    new(&mut inbound, 20, ONE, 0);
    assert_eq!(inbound.open(), 1);
}

#[test]
fn qos_2_is_received_once_until_released() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let token = new(&mut inbound, 3, TWO, 1);
    assert!(inbound.answer(token, OK, true).is_some());
    assert_eq!(
        inbound.arrive(&publish(3, true, TWO, 1), TEN),
        Arrival::Received
    );
    assert!(inbound.release(StreamId::CONTROL, 3));
    assert!(!inbound.release(StreamId::CONTROL, 3));
}

#[test]
fn a_new_message_on_a_data_stream_may_overtake_the_copies_of_an_earlier_session() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let old = new(&mut inbound, 1, TWO, 1);
    inbound.restart();
    inbound.arrive(&on(StreamId::new(2), 2, false, 2), TEN);
    inbound.answer(old, OK, true);
    inbound.restart();
    assert_eq!(
        inbound.arrive(&publish(1, true, TWO, 1), TEN),
        Arrival::Answered(OK)
    );
}

fn on(stream: StreamId, packet_id: u16, dup: bool, digest: u64) -> Incoming {
    Incoming {
        stream,
        ..publish(packet_id, dup, TWO, digest)
    }
}

/// A publish of QoS 2 whose PUBREC is sent.
fn received(inbound: &mut Inbound, stream: StreamId, packet_id: u16, digest: u64) {
    match inbound.arrive(&on(stream, packet_id, false, digest), TEN) {
        Arrival::New(token) => {
            let answer = inbound.answer(token, OK, true).expect("told");
            assert_eq!((answer.stream, answer.packet_id), (stream, packet_id));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn streams_use_one_identifier_for_different_messages() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    received(&mut inbound, StreamId::new(1), 1, 11);
    received(&mut inbound, StreamId::new(2), 1, 22);
    assert_eq!(inbound.open(), 2);
    assert!(inbound.release(StreamId::new(1), 1));
    // Only the publish of its own stream.
    let again = inbound.arrive(&on(StreamId::new(2), 1, true, 22), TEN);
    assert_eq!(again, Arrival::Received);
    assert!(inbound.release(StreamId::new(2), 1));
    assert_eq!(inbound.open(), 0);
    assert!(!inbound.release(StreamId::new(2), 1));
}

#[test]
fn a_release_may_come_on_any_stream() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    received(&mut inbound, StreamId::new(3), 7, 1);
    assert!(inbound.release(StreamId::CONTROL, 7));
    assert!(!inbound.release(StreamId::new(3), 7));
    received(&mut inbound, StreamId::new(3), 7, 2);
    inbound.stream_ended(StreamId::new(3));
    assert!(inbound.release(StreamId::new(5), 7));
    assert_eq!(inbound.detached.len(), 0);
}

#[test]
fn an_ended_stream_s_identifiers_are_free_for_the_next_stream_of_its_number() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    received(&mut inbound, StreamId::new(1), 1, 11);
    inbound.stream_ended(StreamId::new(1));
    received(&mut inbound, StreamId::new(1), 1, 22);
    // The first is still known, so its copy is not a third message.
    let again = inbound.arrive(&on(StreamId::new(4), 1, true, 11), TEN);
    assert_eq!(again, Arrival::Received);
}

#[test]
fn after_a_resume_copies_are_recognised_on_any_stream() {
    for (first, then) in [(1, 0), (1, 2), (0, 1), (0, 0), (1, 1)] {
        let mut inbound = Inbound::new(HashSeed::fixed());
        // The broker has the first and answered the second while the client was away; the client
        // may have PUBREC for the third.
        let mut tokens = Vec::new();
        for (id, digest) in [(1, 11), (2, 22)] {
            match inbound.arrive(&on(StreamId::new(first), id, false, digest), TEN) {
                Arrival::New(token) => tokens.push(token),
                other => panic!("{other:?}"),
            }
        }
        received(&mut inbound, StreamId::new(first), 3, 33);
        inbound.connection_ended();
        assert_eq!(inbound.answer(tokens[1], OK, false), None);
        let mut again =
            |id, digest| inbound.arrive(&on(StreamId::new(then), id, true, digest), TEN);
        assert_eq!(again(1, 11), Arrival::Joined, "{first} {then}");
        assert_eq!(again(2, 22), Arrival::Answered(OK), "{first} {then}");
        assert_eq!(again(3, 33), Arrival::Received, "{first} {then}");
        let answer = inbound.answer(tokens[0], OK, true).expect("told");
        assert_eq!(answer.stream, StreamId::new(then));
        for id in 1..=3 {
            assert!(
                inbound.release(StreamId::new(then), id),
                "{first} {then} {id}"
            );
        }
        assert_eq!((inbound.open(), inbound.waiting()), (0, 0));
    }
}

#[test]
fn after_a_resume_a_new_message_on_one_stream_forgets_no_copy_of_another() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    let Arrival::New(token) = inbound.arrive(&on(StreamId::new(1), 1, false, 11), TEN) else {
        panic!("new");
    };
    inbound.connection_ended();
    inbound.answer(token, OK, false);
    received(&mut inbound, StreamId::new(2), 9, 99);
    let again = inbound.arrive(&on(StreamId::new(1), 1, true, 11), TEN);
    assert_eq!(again, Arrival::Answered(OK));
}

#[test]
fn an_ambiguous_release_forgets_no_publish_that_may_be_sent_again() {
    for order in [[11, 22], [22, 11]] {
        let mut inbound = Inbound::new(HashSeed::fixed());
        received(&mut inbound, StreamId::new(1), 1, order[0]);
        received(&mut inbound, StreamId::new(2), 1, order[1]);
        inbound.connection_ended();
        // The client has PUBREC for one, and not for the other.
        assert!(inbound.release(StreamId::CONTROL, 1));
        let again = inbound.arrive(&on(StreamId::CONTROL, 1, true, 22), TEN);
        assert_eq!(again, Arrival::Received);
        assert!(inbound.release(StreamId::CONTROL, 1));
        assert_eq!((inbound.open(), inbound.detached.len()), (0, 0));
    }
}

#[test]
fn a_new_message_says_which_of_two_was_released() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    received(&mut inbound, StreamId::new(1), 1, 11);
    received(&mut inbound, StreamId::new(2), 1, 22);
    assert!(inbound.release(StreamId::CONTROL, 1));
    received(&mut inbound, StreamId::new(2), 1, 33);
    let again = inbound.arrive(&on(StreamId::new(1), 1, true, 11), TEN);
    assert_eq!(again, Arrival::Received);
    assert!(inbound.release(StreamId::new(1), 1) && inbound.release(StreamId::new(2), 1));
    assert_eq!((inbound.open(), inbound.detached.len()), (0, 0));
}

#[test]
fn a_new_message_that_looks_like_the_one_before_is_forwarded() {
    // The PUBREL may have marked either.
    for stream in [1, 2].repeat(16) {
        let mut inbound = Inbound::new(HashSeed::fixed());
        received(&mut inbound, StreamId::new(1), 1, 11);
        received(&mut inbound, StreamId::new(2), 1, 11);
        assert!(inbound.release(StreamId::CONTROL, 1));
        received(&mut inbound, StreamId::new(stream), 1, 11);
        // The other is still open.
        let again = inbound.arrive(&on(StreamId::new(3 - stream), 1, true, 11), TEN);
        assert_eq!(again, Arrival::Received);
        assert!(inbound.release(StreamId::new(1), 1) && inbound.release(StreamId::new(2), 1));
        assert_eq!((inbound.open(), inbound.detached.len()), (0, 0));
    }
}

#[test]
fn without_a_release_an_equal_publish_is_a_copy_with_or_without_dup() {
    for stream in [0, 1] {
        let mut inbound = Inbound::new(HashSeed::fixed());
        received(&mut inbound, StreamId::new(stream), 1, 11);
        for dup in [false, true] {
            let again = inbound.arrive(&on(StreamId::new(stream), 1, dup, 11), TEN);
            assert_eq!(again, Arrival::Received);
        }
    }
}

#[test]
fn publishes_of_ended_streams_are_bounded_and_not_counted_against_the_client() {
    let mut inbound = Inbound::new(HashSeed::fixed());
    for n in 0..2 * DETACHED_MAX as u64 {
        received(&mut inbound, StreamId::new(1), 1, n);
        inbound.stream_ended(StreamId::new(1));
    }
    assert_eq!(inbound.detached.len(), DETACHED_MAX);
    assert_eq!(inbound.open(), 0);
}
