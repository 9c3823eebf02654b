use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::mqtt::{
    AckKind, Decoder, Message, MessageSpec, Packet, Properties, ReasonCode, Receiver,
    SubscribeOptions, Version, encode_ack, encode_unsubscribe,
};
use crate::router::sessions::SHARDS;
use crate::router::sessions::tally::Tally;
use crate::router::{Arrived, Caller, Connected, LinkSession, Router, testing};
use crate::session::{Incarnation, SubscribeRequest};
use crate::sim::testing::packet_of;
use crate::time::Millis;

mod budget;
mod limits;
mod parts;

/// The time at which the clients of most tests go away.
const AWAY: u64 = 1000;
/// A time at which such a client has been away for long enough.
const LATER: u64 = AWAY + 2000;

fn router() -> Arc<Router> {
    router_with(|_| {})
}

fn router_with(change: impl FnOnce(&mut SessionLimits)) -> Arc<Router> {
    let router = testing::router_limited(testing::config(), change);
    router.set_broker_features(&testing::facts(), Millis::ZERO);
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    router
}

/// Client identifiers of one shard: members of different shards do not sleep together.
fn names(router: &Router, count: usize) -> Vec<String> {
    let hash = |id: &String| {
        let seed = &router.limits().hash_seed;
        std::hash::BuildHasher::hash_one(seed, id.as_str())
    };
    let all = (0..).map(|n| format!("c{n}"));
    all.filter(|id| hash(id) % SHARDS as u64 == 7)
        .take(count)
        .collect()
}

fn connect(router: &Router, id: &str, now: u64) -> Connected {
    testing::kept_client_of(router, id, Version::V5, None, Millis::new(now))
}

fn options(qos: QoS) -> SubscribeOptions {
    SubscribeOptions {
        qos,
        no_local: false,
        retain_as_published: false,
        retain_handling: 2,
    }
}

/// The client subscribes to a filter, and the broker grants it.
fn subscribe(
    router: &Router,
    client: Connected,
    filter: &str,
    options: SubscribeOptions,
) -> FilterId {
    let wanted = SubscribeRequest {
        index: 0,
        filter: filter.into(),
        options,
    };
    let caller = Caller {
        session: client.session,
        connection_no: client.connection_no,
        publish_link: client.publish_link,
    };
    router.subscribe(caller, 1, None, &[wanted], Millis::ZERO);
    for wanted in router.next_subscribes(0, 100) {
        router.suback(wanted.filter, ReasonCode(wanted.qos as u8), Millis::ZERO);
    }
    router.filters.table().write().intern(filter).0
}

fn leave(router: &Router, client: Connected, now: u64) {
    router.disconnected(
        client.session,
        client.connection_no,
        false,
        Millis::new(now),
    );
}

fn message(topic: &str, text: &str, qos: QoS) -> Message {
    Message::new(&MessageSpec {
        topic,
        properties: Properties::default(),
        payload: text.as_bytes(),
        qos,
        retain: false,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

/// The data link brings a message for a filter.
fn bring_message(
    router: &Router,
    filter: FilterId,
    message: Message,
    mark: Option<Incarnation>,
    now: u64,
) {
    let mut batch = [Arrived {
        message,
        filters: [filter].into_iter().collect(),
        link: 0,
        origin_mark: mark,
        link_origin: None,
        skipped: false,
    }];
    router.fan_out(&mut batch, Millis::new(now));
}

fn bring(router: &Router, filter: FilterId, text: &str, now: u64) {
    bring_message(
        router,
        filter,
        message("t", text, QoS::AtLeastOnce),
        None,
        now,
    );
}

fn bring_all(router: &Router, filter: FilterId, numbers: Range<u32>, now: u64) {
    for number in numbers {
        bring(router, filter, &number.to_string(), now);
    }
}

/// The payloads that the client reads, each acknowledged if `acknowledges`.
fn read(router: &Router, client: Connected, now: u64, acknowledges: bool) -> Vec<String> {
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Client,
        max: u32::MAX,
    };
    let (mut texts, now) = (Vec::new(), Millis::new(now));
    loop {
        let mut bytes = Vec::new();
        router.take_output(client.session, client.connection_no, &mut bytes, now);
        if bytes.is_empty() {
            return texts;
        }
        let (mut used, mut acks) = (0, Vec::new());
        while let Some((packet, size)) = decoder.next(&bytes[used..]).expect("legal") {
            if let Packet::Publish(p) = packet {
                texts.push(String::from_utf8_lossy(p.payload).into_owned());
                if p.qos > QoS::AtMostOnce {
                    let (kind, code) = (AckKind::Puback, ReasonCode::SUCCESS);
                    encode_ack(Version::V5, kind, p.packet_id, code, None, &mut acks);
                }
            }
            used += size;
        }
        if acknowledges && !acks.is_empty() {
            packet_of(router, client, &acks, now);
        }
    }
}

fn resume(router: &Router, id: &str, now: u64) -> Vec<String> {
    let client = connect(router, id, now);
    read(router, client, now, true)
}

fn texts(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|n| n.to_string()).collect()
}

fn gaps(router: &Router, id: &str) -> u64 {
    router.session(&id.into()).expect("it is there").gaps
}

fn queued(router: &Router, id: &str) -> usize {
    router
        .session(&id.into())
        .expect("it is there")
        .queue_messages
}

/// Clients of one shard that have subscribed to `t` and have gone away.
struct Audience {
    router: Arc<Router>,
    ids: Vec<String>,
    filter: FilterId,
}

impl Audience {
    fn new(router: Arc<Router>, count: usize) -> Self {
        let ids = names(&router, count);
        let mut filter = None;
        for id in &ids {
            let client = connect(&router, id, 0);
            filter = Some(subscribe(&router, client, "t", options(QoS::AtLeastOnce)));
            read(&router, client, 0, true);
            leave(&router, client, AWAY);
        }
        let filter = filter.expect("there is a client");
        Self {
            router,
            ids,
            filter,
        }
    }

    fn bring(&self, numbers: Range<u32>, now: u64) {
        bring_all(&self.router, self.filter, numbers, now);
    }

    fn asleep(&self) -> usize {
        self.router.totals().asleep
    }
}

#[test]
fn members_fall_asleep_and_get_every_message_in_order() {
    let audience = Audience::new(router(), 3);
    audience.bring(0..2, LATER - 1);
    assert_eq!(audience.asleep(), 0, "flaps are shorter");
    audience.bring(2..4, LATER);
    assert_eq!(audience.asleep(), 3);
    let entries = audience.router.queue_used();
    audience.bring(4..6, LATER);
    let each = (audience.router.queue_used() - entries) / 2;
    assert!(each < 100, "{each} bytes for a message to three clients");
    for id in &audience.ids {
        assert_eq!(queued(&audience.router, id), 6);
    }
    assert_eq!(audience.router.totals().queue_messages, 18);
    for id in &audience.ids {
        assert_eq!(resume(&audience.router, id, LATER), texts(0..6));
        assert_eq!(gaps(&audience.router, id), 0);
    }
    assert_eq!(audience.asleep(), 0);
    assert_eq!(audience.router.queue_used(), 0);
}

#[test]
fn a_lone_member_has_a_queue_of_its_own() {
    let audience = Audience::new(router(), 1);
    audience.bring(0..4, LATER);
    assert_eq!(audience.asleep(), 0);
    assert_eq!(
        resume(&audience.router, &audience.ids[0], LATER),
        texts(0..4)
    );
    // One that remains alone does not sleep on.
    let audience = Audience::new(router(), 2);
    audience.bring(0..4, LATER);
    assert_eq!(audience.asleep(), 2);
    assert_eq!(
        resume(&audience.router, &audience.ids[0], LATER),
        texts(0..4)
    );
    audience.bring(4..5, LATER);
    assert_eq!(audience.asleep(), 0);
    assert_eq!(
        resume(&audience.router, &audience.ids[1], LATER),
        texts(0..5)
    );
}

/// Messages that waited or were in flight before a session fell asleep are not lost with its
/// place in the backlog.
#[test]
fn messages_from_before_a_session_fell_asleep_are_sent_first() {
    let router = router();
    let ids = names(&router, 2);
    let mut filter = None;
    for id in &ids {
        let client = connect(&router, id, 0);
        filter = Some(subscribe(&router, client, "t", options(QoS::AtLeastOnce)));
        bring_all(&router, filter.expect("set"), 0..2, 0);
        read(&router, client, 0, false);
        leave(&router, client, AWAY);
    }
    let filter = filter.expect("there are clients");
    bring_all(&router, filter, 2..50, AWAY);
    bring_all(&router, filter, 50..60, LATER);
    assert_eq!(router.totals().asleep, 2);
    let got = resume(&router, &ids[1], LATER);
    assert_eq!(got, texts((0..2).chain(2..60)));
}

/// Messages of several filters, whose links are not in step, come in the order of arrival.
#[test]
fn messages_of_several_filters_come_in_the_order_of_arrival() {
    let router = router();
    let ids = names(&router, 3);
    let mut filters = Vec::new();
    for id in &ids {
        let client = connect(&router, id, 0);
        filters = ["t", "u", "v"]
            .map(|f| subscribe(&router, client, f, options(QoS::AtLeastOnce)))
            .into();
        read(&router, client, 0, true);
        leave(&router, client, AWAY);
    }
    // The filter of the second link is the first in which they sleep.
    for (number, which) in [1, 0, 0, 1, 2, 1, 2, 2, 0, 0].into_iter().enumerate() {
        bring(
            &router,
            filters[which],
            &number.to_string(),
            LATER + number as u64,
        );
    }
    assert_eq!(router.totals().asleep, 3);
    for id in &ids {
        assert_eq!(resume(&router, id, LATER + 20), texts(0..10));
    }
}

/// A session that is back for a moment gets nothing twice.
#[test]
fn a_session_that_leaves_again_gets_nothing_twice() {
    let router = router();
    let ids = names(&router, 3);
    let mut filters = Vec::new();
    for id in &ids {
        let client = connect(&router, id, 0);
        filters = ["t", "u"]
            .map(|f| subscribe(&router, client, f, options(QoS::AtLeastOnce)))
            .into();
        read(&router, client, 0, true);
        leave(&router, client, AWAY);
    }
    // Asleep in the second filter only.
    bring_all(&router, filters[1], 0..5, LATER);
    let client = connect(&router, &ids[0], LATER);
    bring_all(&router, filters[0], 5..10, LATER);
    bring_all(&router, filters[1], 10..15, LATER);
    // It acknowledges nothing.
    assert_eq!(read(&router, client, LATER, false), texts(0..15));
    leave(&router, client, LATER);
    bring_all(&router, filters[0], 15..20, LATER + 2000);
    bring_all(&router, filters[1], 20..25, LATER + 2000);
    assert_eq!(router.totals().asleep, 3);
    assert_eq!(resume(&router, &ids[0], LATER + 2000), texts(0..25));
    assert_eq!(resume(&router, &ids[1], LATER + 2000), texts(0..25));
}

/// A full backlog and live messages cost a client that is back nothing.
#[test]
fn a_client_that_is_back_loses_nothing_to_newer_messages() {
    let router = router_with(|limits| {
        limits.queue_messages_max = 10;
        limits.output_buffer = Arc::new(64.into());
    });
    let audience = Audience::new(router, 3);
    audience.bring(0..12, LATER);
    let (router, id) = (&audience.router, &audience.ids[0]);
    let client = connect(router, id, LATER);
    audience.bring(12..40, LATER);
    let zero = message("t", "zero", QoS::AtMostOnce);
    bring_message(router, audience.filter, zero, None, LATER);
    let got = read(router, client, LATER, true);
    let (zeros, others): (Vec<_>, Vec<_>) = got.into_iter().partition(|text| text == "zero");
    assert_eq!(others, texts(2..40));
    assert_eq!(zeros.len(), 1);
    assert_eq!(gaps(router, id), 2);
    // The others have lost more.
    assert_eq!(gaps(router, &audience.ids[1]), 31);
    assert_eq!(resume(router, &audience.ids[1], LATER), texts(30..40));
    assert_eq!(gaps(router, &audience.ids[1]), 31);
}

/// Which copy of a message counts depends on the time at which the copies come, so overlapping
/// subscriptions do not sleep.
#[test]
fn overlapping_subscriptions_do_not_sleep() {
    let router = router();
    let ids = names(&router, 3);
    let mut filters = Vec::new();
    for id in &ids {
        let client = connect(&router, id, 0);
        filters = ["a/+", "+/b", "t"]
            .map(|f| subscribe(&router, client, f, options(QoS::AtLeastOnce)))
            .into();
        read(&router, client, 0, true);
        leave(&router, client, AWAY);
    }
    for number in 0..3 {
        for filter in &filters[..2] {
            let copy = message("a/b", &number.to_string(), QoS::AtLeastOnce);
            bring_message(&router, *filter, copy, None, LATER);
        }
    }
    assert_eq!(router.totals().asleep, 0);
    bring_all(&router, filters[2], 3..5, LATER);
    assert_eq!(router.totals().asleep, 3);
    for id in &ids {
        assert_eq!(resume(&router, id, LATER), texts(0..5));
    }
}

/// UNSUBSCRIBE while the messages of the backlog are still waiting.
#[test]
fn unsubscribing_repeats_nothing_and_loses_nothing_that_waits() {
    let router = router_with(|limits| limits.output_buffer = Arc::new(64.into()));
    let audience = Audience::new(router, 3);
    audience.bring(0..40, LATER);
    let (router, id) = (&audience.router, &audience.ids[0]);
    let client = connect(router, id, LATER);
    let mut bytes = Vec::new();
    encode_unsubscribe(Version::V5, 7, std::iter::once("t"), &mut bytes);
    packet_of(router, client, &bytes, Millis::new(LATER));
    audience.bring(40..45, LATER);
    assert_eq!(read(router, client, LATER, true), texts(0..40));
    assert_eq!(resume(router, &audience.ids[1], LATER), texts(0..45));
}

/// Messages that are fetched displace no live messages, and keep their order with them.
#[test]
fn fetched_messages_displace_no_live_message() {
    let router = router_with(|limits| limits.queue_messages_max = 10);
    let audience = Audience::new(router, 3);
    let router = &audience.router;
    audience.bring(0..10, LATER);
    for number in 100..200 {
        let message = message("t", &number.to_string(), QoS::AtLeastOnce);
        let came = Came {
            message: &message,
            filter: audience.filter,
            source: Source::Fetched,
            replayed: None,
            now: Millis::new(LATER),
        };
        let mut tally = Tally::default();
        router.sessions.deliver_to_shards(1 << 7, &came, &mut tally);
    }
    assert_eq!(audience.asleep(), 3);
    audience.bring(10..12, LATER + 1);
    for id in &audience.ids {
        let all = (2..10).chain(100..200).chain(10..12);
        assert_eq!(resume(router, id, LATER + 1), texts(all));
        assert_eq!(gaps(router, id), 2);
    }
}

#[test]
fn a_message_that_was_skipped_is_a_gap_of_each_sleeper() {
    let audience = Audience::new(router(), 3);
    audience.bring(0..2, LATER);
    let mut batch = [Arrived {
        message: message("t", "", QoS::AtLeastOnce),
        filters: [audience.filter].into_iter().collect(),
        link: 0,
        origin_mark: None,
        link_origin: None,
        skipped: true,
    }];
    audience.router.fan_out(&mut batch, Millis::new(LATER));
    assert_eq!(audience.asleep(), 3);
    for id in &audience.ids {
        assert_eq!(gaps(&audience.router, id), 1);
    }
}

#[test]
fn no_local_hides_own_messages_from_a_sleeper_and_they_are_no_gap() {
    let router = router();
    let ids = names(&router, 3);
    let (mut filter, mut mark) = (None, None);
    for id in &ids {
        let client = connect(&router, id, 0);
        let own = SubscribeOptions {
            no_local: true,
            ..options(QoS::AtLeastOnce)
        };
        filter = Some(subscribe(&router, client, "t", own));
        let incarnation = |s: &mut Session, _: &SessionLimits| s.incarnation;
        mark = router.sessions.with(client.session, incarnation);
        leave(&router, client, AWAY);
    }
    let filter = filter.expect("there are clients");
    bring_all(&router, filter, 0..2, LATER);
    assert_eq!(router.totals().asleep, 3);
    for qos in [QoS::AtLeastOnce, QoS::AtMostOnce] {
        let own = message("t", "own", qos);
        bring_message(&router, filter, own, mark, LATER);
        assert_eq!(router.totals().asleep, 2, "its publisher is awake");
        bring_all(&router, filter, 2..3, LATER);
        assert_eq!(router.totals().asleep, 3);
    }
    assert_eq!(queued(&router, &ids[2]), 4);
    assert_eq!(resume(&router, &ids[2], LATER), ["0", "1", "2", "2"]);
    assert_eq!(gaps(&router, &ids[2]), 0);
    assert_eq!(resume(&router, &ids[0], LATER), ["0", "1", "own", "2", "2"]);
    assert_eq!(gaps(&router, &ids[0]), 1, "the message of QoS 0");
}

#[test]
fn a_session_that_ends_gives_its_place_up() {
    let router = router();
    let used = router.session_bytes();
    let audience = Audience::new(router, 2);
    audience.bring(0..4, LATER);
    let router = &audience.router;
    for id in &audience.ids {
        assert!(router.end_session(&id.as_str().into(), Millis::new(LATER)));
    }
    assert_eq!(router.queue_used(), 0);
    assert_eq!(router.totals().queue_messages, 0);
    let shard = router.sessions.shard(7);
    assert!(shard.backlogs.filters.is_empty() && shard.members.get(&audience.filter).is_none());
    drop(shard);
    assert!(used <= router.session_bytes());
}

#[test]
fn a_clean_start_gets_nothing_of_the_backlog() {
    let audience = Audience::new(router(), 3);
    audience.bring(0..4, LATER);
    let router = &audience.router;
    let client = testing::client(router, &audience.ids[0]);
    assert_eq!(read(router, client, LATER, true), texts([]));
    audience.bring(4..6, LATER);
    assert_eq!(read(router, client, LATER, true), texts([]));
    assert_eq!(resume(router, &audience.ids[1], LATER), texts(0..6));
}
