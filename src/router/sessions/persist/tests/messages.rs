//! Messages that a crash must not lose.

use super::*;
use crate::mqtt::{AckKind, Decoder, Packet, Receiver, encode_ack};
use crate::router::Arrived;
use crate::topics::FilterId;

/// A PUBLISH or PUBREL that a client got: payload, packet identifier, DUP.
type Got = (String, u16, bool);

impl Node {
    fn filter(&self, name: &str) -> FilterId {
        let table = self.router.filters.read();
        table.exact(name).expect("it is known")
    }

    /// A message arrives on the data link for these filters. Returns it as the link keeps it.
    fn arrive(&self, filters: &[&str], payload: &str, qos: QoS) -> Message {
        self.arrive_on(0, filters, payload, qos)
    }

    fn arrive_on(&self, link: usize, filters: &[&str], payload: &str, qos: QoS) -> Message {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let mut batch = [Arrived {
            message,
            filters: filters.iter().map(|name| self.filter(name)).collect(),
            link,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }];
        self.router.fan_out(&mut batch, self.now);
        batch[0].message.clone()
    }

    /// A message arrives, and its record is on the disk where somebody needs it.
    fn arrive_safely(&mut self, filters: &[&str], payload: &str, qos: QoS) {
        let message = self.arrive(filters, payload, qos);
        self.router.write_messages([message.clone()]);
        self.persist();
        assert!(message.numbered().is_some_and(|n| n.is_settled()));
    }

    /// The messages that a client is given.
    fn got(&self, client: Connected) -> Vec<Got> {
        let mut out = Vec::new();
        let (session, connection_no) = (client.session, client.connection_no);
        self.router
            .take_output(session, connection_no, &mut out, self.now);
        // Behind the CONNACK of these tests.
        let mut rest = match out.first() {
            Some(0x20) => &out[2..],
            _ => &out[..],
        };
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut got = Vec::new();
        while let Some((packet, used)) = decoder.next(rest).expect("it is legal") {
            rest = &rest[used..];
            match packet {
                Packet::Publish(p) => {
                    let text = String::from_utf8_lossy(p.payload).into_owned();
                    got.push((text, p.packet_id, p.dup));
                }
                Packet::Pubrel(a) => got.push(("pubrel".into(), a.packet_id, false)),
                _ => {}
            }
        }
        got
    }

    fn ack(&self, client: Connected, kind: AckKind, id: u16) {
        let mut bytes = Vec::new();
        encode_ack(Version::V5, kind, id, ReasonCode::SUCCESS, None, &mut bytes);
        packet_of(&self.router, client, &bytes, self.now);
    }

    /// Subscribes a client, which takes the answer.
    fn subscribe_safely(&mut self, client: Connected, filter: &str, qos: QoS) {
        self.subscribe_at(client, filter, qos);
        self.persist();
        self.got(client);
    }

    /// A client that has subscribed to `t`.
    fn subscribed(&mut self, id: &str, qos: QoS) -> Connected {
        let client = self.kept(id);
        self.subscribe_safely(client, "t", qos);
        client
    }

    fn is_written(&self, message: &Message) -> bool {
        message.numbered().is_some_and(|n| n.place().is_some())
    }
}

fn got(payload: &str, id: u16, dup: bool) -> Got {
    (payload.into(), id, dup)
}

#[test]
fn messages_for_a_client_that_is_away_are_there_after_a_kill() {
    for later in [Duration::ZERO, Duration::from_secs(10)] {
        let mut node = node();
        let [one, two] = ["one", "two"].map(|id| {
            let client = node.subscribed(id, QoS::AtLeastOnce);
            node.leave(client, true);
            client
        });
        assert_ne!(one.session, two.session);
        // With time, both sleep, and their records say that they are away.
        for n in 0..5 {
            node.arrive_safely(&["t"], &n.to_string(), QoS::AtLeastOnce);
            node.advance(later);
            node.persist();
        }
        for crash in 0..3 {
            node = node.restart(Duration::from_secs(1));
            if crash == 1 {
                node.arrive_safely(&["t"], "5", QoS::AtLeastOnce);
            }
        }
        let client = node.kept("one");
        assert!(client.present);
        node.persist();
        let payloads: Vec<String> = node.got(client).into_iter().map(|g| g.0).collect();
        assert_eq!(payloads, ["0", "1", "2", "3", "4", "5"], "{later:?}");
    }
}

#[test]
fn a_message_in_flight_is_sent_again_with_its_identifier() {
    let mut node = node();
    let client = node.subscribed("a", QoS::AtLeastOnce);
    for n in 0..3 {
        node.arrive_safely(&["t"], &n.to_string(), QoS::AtLeastOnce);
    }
    assert_eq!(node.got(client).len(), 3);
    node.ack(client, AckKind::Puback, 2);
    node.leave(client, false);
    node.advance(Duration::from_secs(6));
    node.persist();
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    node.persist();
    assert_eq!(node.got(client), [got("0", 1, true), got("2", 3, true)]);
}

#[test]
fn a_message_that_all_receivers_have_is_never_written() {
    let mut node = node();
    let client = node.subscribed("a", QoS::AtLeastOnce);
    let message = node.arrive(&["t"], "x", QoS::AtLeastOnce);
    assert_eq!(node.got(client).len(), 1);
    node.ack(client, AckKind::Puback, 1);
    node.router.write_messages([message.clone()]);
    node.persist();
    assert!(!node.is_written(&message));
    assert!(message.numbered().is_some_and(|n| n.is_settled()));
}

#[test]
fn a_connected_client_does_not_get_messages_again_that_a_checkpoint_covers() {
    let mut node = node();
    let away = node.subscribed("away", QoS::AtLeastOnce);
    node.leave(away, true);
    let here = node.subscribed("here", QoS::AtLeastOnce);
    for n in 0..3 {
        node.arrive_safely(&["t"], &n.to_string(), QoS::AtLeastOnce);
    }
    assert_eq!(node.got(here).len(), 3);
    for id in 1..=3 {
        node.ack(here, AckKind::Puback, id);
    }
    node.router.sessions.numbers().ask_for_checkpoint();
    node.persist();
    node.arrive_safely(&["t"], "3", QoS::AtLeastOnce);
    let mut node = node.restart(Duration::ZERO);
    let [here, away] = ["here", "away"].map(|id| node.kept(id));
    node.persist();
    assert_eq!(node.got(here).len(), 1, "only the last");
    assert_eq!(node.got(away).len(), 4);
}

#[test]
fn a_message_of_qos_2_waits_for_the_record_and_comes_once() {
    let mut node = node();
    let client = node.subscribed("a", QoS::ExactlyOnce);
    let message = node.arrive(&["t"], "x", QoS::ExactlyOnce);
    assert_eq!(
        node.got(client),
        [],
        "the disk does not know its identifier"
    );
    node.router.write_messages([message]);
    node.persist();
    assert_eq!(node.got(client), [got("x", 1, false)]);
    node.ack(client, AckKind::Pubrec, 1);
    assert_eq!(
        node.got(client),
        [],
        "the disk does not know that the client has it"
    );
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    assert_eq!(node.got(client), []);
    node.persist();
    // The client has the message, and answers with PUBREC again.
    assert_eq!(node.got(client), [got("x", 1, true)]);
    node.ack(client, AckKind::Pubrec, 1);
    assert_eq!(node.got(client), []);
    node.persist();
    assert_eq!(node.got(client), [got("pubrel", 1, false)]);
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    assert_eq!(node.got(client), []);
    node.persist();
    assert_eq!(node.got(client), [got("pubrel", 1, false)]);
    node.ack(client, AckKind::Pubcomp, 1);
    node.arrive_safely(&["t"], "y", QoS::ExactlyOnce);
    assert_eq!(node.got(client), []);
    node.persist();
    assert_eq!(node.got(client), [got("y", 2, false)]);
}

#[test]
fn a_release_that_a_lost_connection_has_not_recorded_waits_on_the_next_one() {
    let mut node = node();
    let client = node.subscribed("a", QoS::ExactlyOnce);
    node.arrive_safely(&["t"], "x", QoS::ExactlyOnce);
    assert_eq!(node.got(client), []);
    node.persist();
    assert_eq!(node.got(client), [got("x", 1, false)]);
    node.ack(client, AckKind::Pubrec, 1);
    // The connection is lost before its output is taken.
    let client = node.kept("a");
    assert_eq!(node.got(client), [], "the disk does not know of PUBREC");
    node.persist();
    assert_eq!(node.got(client), [got("pubrel", 1, false)]);
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    assert_eq!(node.got(client), []);
    node.persist();
    assert_eq!(node.got(client), [got("pubrel", 1, false)]);
}

#[test]
fn a_member_of_a_shared_subscription_keeps_its_messages() {
    let mut node = node();
    for id in ["a", "b"] {
        let client = node.kept(id);
        node.subscribe_safely(client, "$share/g/t", QoS::AtLeastOnce);
        node.leave(client, true);
    }
    let link = node.router.shared_link(0);
    for n in 0..4 {
        // As long as it is not safe, the link has it.
        let message = node.arrive_on(link, &["$share/g/t"], &n.to_string(), QoS::AtLeastOnce);
        node.router.write_messages([message.clone()]);
        node.persist();
        assert!(node.is_written(&message));
    }
    let mut node = node.restart(Duration::ZERO);
    let mut all = Vec::new();
    for id in ["a", "b"] {
        let client = node.kept(id);
        node.persist();
        let payloads: Vec<String> = node.got(client).into_iter().map(|g| g.0).collect();
        assert_eq!(payloads.len(), 2, "{id}: {payloads:?}");
        all.extend(payloads);
    }
    all.sort_unstable();
    assert_eq!(all, ["0", "1", "2", "3"]);
}

#[test]
fn messages_and_sessions_move_on_while_the_log_is_reclaimed() {
    let mut node = node();
    let client = node.subscribed("a", QoS::AtLeastOnce);
    node.leave(client, true);
    node.arrive_safely(&["t"], "first", QoS::AtLeastOnce);
    let busy = node.kept("busy");
    node.subscribe_safely(busy, "u", QoS::AtLeastOnce);
    let stalled = node.kept("stalled");
    node.subscribe_safely(stalled, "u", QoS::AtLeastOnce);
    let payload = "x".repeat(500);
    for n in 0..400u16 {
        node.arrive_safely(&["u"], &payload, QoS::AtLeastOnce);
        for client in [busy, stalled] {
            for (_, id, _) in node.got(client) {
                node.ack(client, AckKind::Puback, id);
            }
        }
        if n % 50 == 0 {
            node.router.sessions.numbers().ask_for_checkpoint();
        }
    }
    let bytes: u64 = node.writer.sizes().bytes;
    assert!(bytes < 10 * u64::from(SEGMENT_BYTES), "{bytes}");
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    node.persist();
    assert_eq!(node.got(client), [got("first", 1, false)]);
}

#[test]
fn a_full_disk_and_the_return_from_it_keep_messages() {
    let mut node = node();
    let client = node.subscribed("a", QoS::AtLeastOnce);
    node.leave(client, true);
    node.arrive_safely(&["t"], "before", QoS::AtLeastOnce);
    node.disk.fault(0, Fault::Fail);
    node.arrive_safely(&["t"], "meanwhile", QoS::AtLeastOnce);
    assert_eq!(node.log.mode(), Mode::Degraded);
    node.advance(Duration::from_secs(5));
    node.write();
    assert_eq!(node.log.mode(), Mode::Durable);
    node.arrive_safely(&["t"], "after", QoS::AtLeastOnce);
    let mut node = node.restart(Duration::ZERO);
    let client = node.kept("a");
    node.persist();
    let payloads: Vec<String> = node.got(client).into_iter().map(|g| g.0).collect();
    assert_eq!(payloads, ["before", "meanwhile", "after"]);
}
