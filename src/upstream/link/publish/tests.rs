use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{Packet, QoS};
use crate::router::{ClientPublish, Connected, LinkSession, Router, RouterConfig};
use crate::sim::testing::{ack, client, config, publish, publish_at, read, router, router_of, up};
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};

use crate::time::Millis;
use crate::upstream::link::publish::PublishLink;
use crate::upstream::link::publish::suspects::{CLIENTS_MAX, WATCHED_MAX};

fn payloads(out: &mut Vec<u8>) -> Vec<String> {
    read(out).into_iter().map(|(what, _)| what).collect()
}

fn numbered(from: u32, to: u32, dup: bool) -> Vec<String> {
    let dup = if dup { " dup" } else { "" };
    (from..to).map(|n| format!("publish {n}{dup}")).collect()
}

/// I10: publishes without an acknowledgement never exceed the broker's Receive Maximum.
#[test]
fn the_window_of_the_broker_is_never_exceeded() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 3), Millis::ZERO, &mut out);
    for n in 0..10 {
        publish(&router, who, n);
    }
    link.poll(Millis::ZERO, &mut out);
    let first = read(&mut out);
    assert_eq!(first.len(), 3);
    assert_eq!(link.window(), (3, 3));
    link.packet(&Packet::Puback(ack(first[1].1)), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), numbered(3, 4, false));
    link.poll(Millis::ZERO, &mut out);
    assert!(out.is_empty(), "one acknowledgement, one publish");
}

/// A broker that holds small packets back until TCP acknowledges the ones before it gets the
/// acknowledgement at once as long as it has an answer to send.
#[test]
fn answers_are_awaited_until_the_last_one_is_there() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 10), Millis::ZERO, &mut out);
    assert!(!link.awaits_packets());
    publish_at(&router, who, 0, QoS::ExactlyOnce);
    link.poll(Millis::ZERO, &mut out);
    let id = read(&mut out)[0].1;
    assert!(link.awaits_packets());
    let recorded = link.packet(&Packet::Pubrec(ack(id)), Millis::ZERO, &mut out);
    recorded.expect("it is expected");
    assert!(link.awaits_packets(), "PUBCOMP");
    let complete = link.packet(&Packet::Pubcomp(ack(id)), Millis::ZERO, &mut out);
    complete.expect("it is expected");
    assert!(!link.awaits_packets());
}

/// I10, I19: publishes in flight are sent again in order, within the window of the new connection.
#[test]
fn a_smaller_window_after_a_reconnect_holds_for_what_is_sent_again() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    for n in 0..10 {
        publish(&router, who, n);
    }
    link.poll(Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), numbered(0, 10, false));
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    publish(&router, who, 10);
    link.connected(&up(true, 4), Millis::ZERO, &mut out);
    let again = read(&mut out);
    let words: Vec<String> = again.iter().map(|(w, _)| w.clone()).collect();
    assert_eq!(words, numbered(0, 4, true));
    for (_, id) in &again {
        link.packet(&Packet::Puback(ack(*id)), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    link.batch_ended(Millis::ZERO, &mut out);
    let again = read(&mut out);
    let words: Vec<String> = again.iter().map(|(w, _)| w.clone()).collect();
    assert_eq!(words, numbered(4, 8, true), "the new one waits its turn");
    for (_, id) in &again {
        link.packet(&Packet::Puback(ack(*id)), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    link.batch_ended(Millis::ZERO, &mut out);
    let mut rest = numbered(8, 10, true);
    rest.extend(numbered(10, 11, false));
    assert_eq!(payloads(&mut out), rest);
}

/// I19: if the broker lost the session, all publishes are sent as new ones, in order.
#[test]
fn a_lost_session_makes_them_new() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    for n in 0..5 {
        publish(&router, who, n);
    }
    link.poll(Millis::ZERO, &mut out);
    out.clear();
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), numbered(0, 5, false));
}

/// A message that is published before the data links have their filters again would reach nobody.
#[test]
fn a_link_that_comes_back_waits_for_the_data_links() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    router.data_link_down(0, Millis::ZERO);
    link.connected(&up(false, 100), Millis::new(1000), &mut out);
    publish(&router, who, 0);
    link.poll(Millis::new(1050), &mut out);
    assert!(out.is_empty());
    router.data_link_up(0, LinkSession::Resumed, false, Millis::new(1100));
    link.poll(Millis::new(1100), &mut out);
    assert_eq!(payloads(&mut out), numbered(0, 1, false));
}

/// The wait for the data links ends.
#[test]
fn a_data_link_that_stays_away_does_not_hold_publishes_for_ever() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    router.data_link_down(0, Millis::ZERO);
    link.connected(&up(false, 100), Millis::new(1000), &mut out);
    publish(&router, who, 0);
    link.poll(Millis::new(5999), &mut out);
    assert!(out.is_empty());
    link.poll(Millis::new(6000), &mut out);
    assert_eq!(payloads(&mut out), numbered(0, 1, false));
}

/// The broker ends the connection at publish `bad` each time. Returns the remaining publishes once it
/// no longer does.
fn until_found(bad: usize, publishes: u32, broker_restarts: bool) -> (Vec<u32>, usize) {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    for n in 0..publishes {
        publish(&router, who, n);
    }
    let (mut taken, mut cuts) = (Vec::new(), 0);
    loop {
        link.connected(&up(true, 10), Millis::ZERO, &mut out);
        let cut = loop {
            let sent = read(&mut out);
            if sent.is_empty() {
                break false;
            }
            let number = |what: &str| what.split(' ').nth(1).and_then(|n| n.parse().ok());
            let at = sent.iter().position(|(w, _)| number(w) == Some(bad as u32));
            // It takes the publishes before that one, and closes before its answers are read.
            if at.is_some() {
                break true;
            }
            for (what, id) in sent {
                taken.push(number(&what).expect("a number"));
                let _ = link.packet(&Packet::Puback(ack(id)), Millis::ZERO, &mut out);
            }
            link.batch_ended(Millis::ZERO, &mut out);
        };
        if !cut || cuts > 20 {
            return (taken, cuts);
        }
        cuts += 1;
        if broker_restarts {
            router.link_lost_unprovoked();
        }
        link.disconnected(&LinkEnd::Closed, Millis::ZERO);
        out.clear();
    }
}

#[test]
fn a_publish_that_the_broker_closes_the_link_for_is_quarantined() {
    assert_eq!(until_found(0, 1, false), (vec![], 3), "twice, then alone");
    let (taken, cuts) = until_found(3, 8, false);
    assert_eq!(
        taken,
        [0, 1, 2, 4, 5, 6, 7],
        "in order, and no other is lost"
    );
    assert_eq!(cuts, 3, "twice, then alone");
}

#[test]
fn a_restart_of_the_broker_quarantines_no_publish() {
    assert_eq!(until_found(0, 1, true), (vec![], 21));
}

/// [MQTT-3.3.4-8], [MQTT-4.6.0-4], [MQTT-2.3.1-3] of 3.1.1: PUBRELs wait for no quota, go in the
/// order of the PUBRECs, and a packet that is sent again keeps its identifier.
#[test]
fn releases_wait_for_no_quota_and_keep_their_order() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 10), Millis::ZERO, &mut out);
    for n in 0..6 {
        publish_at(&router, who, n, QoS::ExactlyOnce);
    }
    link.poll(Millis::ZERO, &mut out);
    let sent = read(&mut out);
    assert_eq!(sent.len(), 6);
    // The first is not answered, the next three are.
    let released: Vec<u16> = sent[1..4].iter().map(|(_, id)| *id).collect();
    for id in &released {
        link.packet(&Packet::Pubrec(ack(*id)), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    let pubrels = |seen: &[(String, u16)]| -> Vec<u16> {
        let all = seen.iter().filter(|(what, _)| what == "pubrel");
        all.map(|(_, id)| *id).collect()
    };
    assert_eq!(pubrels(&read(&mut out)), released);
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    link.connected(&up(true, 1), Millis::ZERO, &mut out);
    let again = read(&mut out);
    assert_eq!(pubrels(&again), released);
    assert_eq!(again.len(), 3, "no publish beside them: {again:?}");
    for id in released {
        link.packet(&Packet::Pubcomp(ack(id)), Millis::ZERO, &mut out)
            .expect("it is expected");
    }
    link.batch_ended(Millis::ZERO, &mut out);
    let first = read(&mut out);
    assert_eq!(first, [("publish 0 dup".to_owned(), sent[0].1)]);
}

/// I19: the answer to a PINGREQ shows that everything before it has arrived, so none goes before
/// publishes that are sent again.
#[test]
fn a_ping_follows_the_publishes_that_are_sent_again() {
    let router = router_of(RouterConfig {
        publish_links_max: 2,
        ..config()
    });
    router.data_link_up(0, LinkSession::New, true, Millis::ZERO);
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(false, 10), Millis::ZERO, &mut out);
    publish(&router, who, 0);
    publish(&router, who, 1);
    link.poll(Millis::ZERO, &mut out);
    assert!(!link.wants_ping(), "nobody asks");
    link.disconnected(&LinkEnd::Closed, Millis::ZERO);
    assert!(router.add_publish_link());
    router.publish_link_up(1, true, Millis::ZERO);
    out.clear();
    link.connected(&up(true, 1), Millis::ZERO, &mut out);
    let first = read(&mut out);
    assert_eq!(first.len(), 1);
    assert!(!link.wants_ping(), "one is to be sent again");
    link.packet(&Packet::Puback(ack(first[0].1)), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), numbered(1, 2, true));
    assert!(link.wants_ping() && !link.wants_ping());
}

/// A broker that closes the link whenever it reads publish 666, for a minute. Returns how often it
/// did, how many publishes of the other client it got, and the longest time that one of them took.
fn a_minute_with_a_publish_that_ends_the_link(qos: QoS) -> (usize, u32, Duration) {
    const RECONNECT: Duration = Duration::from_millis(50);
    let router = router();
    let [bad, good] = ["bad", "good"].map(|id| client(&router, id));
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let (mut out, mut down_until) = (Vec::new(), None);
    let (mut cuts, mut taken, mut longest) = (0, 0, Duration::ZERO);
    let mut waiting = std::collections::BTreeMap::new();
    let publish_now = |client: Connected, number, qos, now| {
        let publish = ClientPublish {
            token: None,
            message: crate::sim::testing::numbered(number, qos),
            origin_mark: None,
        };
        router.publish(client.session, client.publish_link, publish, now);
    };
    link.connected(&up(true, 20), Millis::ZERO, &mut out);
    for ms in (0..60_000u64).step_by(10) {
        let now = Millis::new(ms);
        if ms % 200 == 0 {
            publish_now(bad, 666, qos, now);
        }
        if ms % 100 == 50 {
            // The others' publishes have QoS 0 and 1 in turn.
            let number = 1000 + (ms / 100) as u32;
            let at = QoS::from_u8(number as u8 % 2).expect("it is 0 or 1");
            publish_now(good, number, at, now);
            waiting.insert(number, now);
        }
        match down_until {
            Some(until) if now < until => continue,
            Some(_) => link.connected(&up(true, 20), now, &mut out),
            None => link.poll(now, &mut out),
        }
        down_until = None;
        loop {
            if link.wants_ping() {
                crate::mqtt::encode_pingreq(&mut out);
            }
            let packets = read(&mut out);
            if packets.is_empty() {
                break;
            }
            let mut pings = 0;
            for (what, id) in packets {
                let number = what.split(' ').nth(1).and_then(|n| n.parse().ok());
                if number == Some(666) {
                    down_until = Some(now + RECONNECT);
                    break;
                }
                pings += usize::from(number.is_none());
                if let Some(number) = number
                    && let Some(since) = waiting.remove(&number)
                {
                    taken += 1;
                    longest = longest.max(now.since(since));
                }
                if id > 0 {
                    link.packet(&Packet::Puback(ack(id)), now, &mut out)
                        .expect("it is expected");
                }
            }
            if down_until.is_some() {
                cuts += 1;
                link.disconnected(&LinkEnd::Closed, now);
                out.clear();
                break;
            }
            (0..pings).for_each(|_| link.ping_answered(now));
            link.batch_ended(now, &mut out);
        }
    }
    (cuts, taken, longest)
}

#[test]
fn publishes_of_any_qos_that_end_the_link_are_found_and_cost_others_little() {
    for (qos, most) in [(QoS::AtMostOnce, 36), (QoS::AtLeastOnce, 72)] {
        let (cuts, taken, longest) = a_minute_with_a_publish_that_ends_the_link(qos);
        assert!((3..=most).contains(&cuts), "{cuts} cuts at {qos:?}");
        assert!(longest.as_millis() < 1000, "{longest:?} at {qos:?}");
        assert!(taken >= 600 - most as u32, "{taken} of 600 at {qos:?}");
    }
}

#[test]
fn qos_0_publishes_that_waited_long_for_the_broker_are_dropped() {
    let router = router();
    let who = client(&router, "a");
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    publish_at(&router, who, 1, QoS::AtMostOnce);
    publish_at(&router, who, 2, QoS::AtLeastOnce);
    link.connected(&up(false, 20), Millis::new(10_000), &mut out);
    assert_eq!(payloads(&mut out), ["publish 1", "publish 2"]);
    link.disconnected(&LinkEnd::Closed, Millis::new(20_000));
    publish_at(&router, who, 3, QoS::AtMostOnce);
    link.connected(&up(true, 20), Millis::new(31_000), &mut out);
    assert_eq!(payloads(&mut out), ["publish 2 dup"]);
}

/// A link that `bad` has ended twice by publishes of QoS 0, so that it is a suspect.
fn with_suspect(router: &Arc<Router>, bad: Connected) -> PublishLink {
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(true, 20), Millis::ZERO, &mut out);
    for n in 0..2 {
        publish_at(router, bad, n, QoS::AtMostOnce);
        link.poll(Millis::ZERO, &mut out);
        link.disconnected(&LinkEnd::Closed, Millis::ZERO);
        link.connected(&up(true, 20), Millis::ZERO, &mut out);
    }
    link
}

/// Another server takes over, whose Maximum Packet Size is 16 bytes.
fn move_to_a_broker_with_small_packets(link: &mut PublishLink, out: &mut Vec<u8>) {
    link.disconnected(&LinkEnd::Failover, Millis::ZERO);
    let small = Handshake {
        packet_max: Some(16),
        ..up(true, 20)
    };
    link.connected(&small, Millis::ZERO, out);
}

#[test]
fn publishes_of_a_suspect_that_cannot_be_sent_do_not_keep_others_waiting() {
    let router = router();
    let [bad, good] = ["bad", "good"].map(|id| client(&router, id));
    let mut link = with_suspect(&router, bad);
    let mut out = Vec::new();
    move_to_a_broker_with_small_packets(&mut link, &mut out);
    publish(&router, good, 7);
    // Larger than the broker's Maximum Packet Size.
    publish(&router, bad, 1_000_000_000);
    publish(&router, bad, 1_000_000_001);
    link.poll(Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), ["publish 7"]);
}

#[test]
fn a_tried_publish_that_cannot_be_sent_again_does_not_stop_the_link() {
    let router = router();
    let [bad, good] = ["bad", "good"].map(|id| client(&router, id));
    let mut link = with_suspect(&router, bad);
    let mut out = Vec::new();
    publish(&router, bad, 1_000_000_000);
    link.poll(Millis::ZERO, &mut out);
    assert_eq!(payloads(&mut out), ["publish 1000000000"]);
    move_to_a_broker_with_small_packets(&mut link, &mut out);
    publish(&router, good, 7);
    link.poll(Millis::new(1000), &mut out);
    assert_eq!(payloads(&mut out), ["publish 7"]);
}

#[test]
fn a_client_that_is_found_while_all_suspects_are_remembered_can_publish_later() {
    let router = router();
    let mut link = PublishLink::new(router.clone(), 0, 1);
    let mut out = Vec::new();
    link.connected(&up(true, 20), Millis::ZERO, &mut out);
    let mut reconnect = |link: &mut PublishLink| {
        link.poll(Millis::ZERO, &mut out);
        link.disconnected(&LinkEnd::Closed, Millis::ZERO);
        link.connected(&up(true, 20), Millis::ZERO, &mut out);
        out.clear();
    };
    for n in 0..=CLIENTS_MAX / WATCHED_MAX {
        for i in 0..WATCHED_MAX {
            let who = client(&router, &format!("{n} {i}"));
            publish_at(&router, who, 0, QoS::AtMostOnce);
        }
        reconnect(&mut link);
    }
    let last = client(&router, "last");
    publish(&router, last, 1);
    for _ in 0..3 {
        reconnect(&mut link);
    }
    link.poll(Millis::new(61_000), &mut out);
    publish(&router, last, 2);
    link.poll(Millis::new(62_000), &mut out);
    assert_eq!(
        payloads(&mut out),
        ["publish 2"],
        "the first was quarantined"
    );
}
