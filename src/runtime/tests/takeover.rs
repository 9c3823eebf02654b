//! Bytes that arrived before a CONNECT of the same client, or before a failed write, are read.

use crate::mqtt::Will;

use super::*;

const DISCONNECT: &[u8] = &[0xE0, 0];
/// DISCONNECT 0x00 with Session Expiry Interval 0.
const DISCONNECT_FOR_GOOD: &[u8] = &[0xE0, 7, 0, 5, 0x11, 0, 0, 0, 0];
/// PUBLISH of QoS 0 in MQTT 3.x on the topic `t/last`.
const LAST_V3: &[u8] = b"\x30\x08\0\x06t/last";
/// PUBLISH of QoS 0 in MQTT 5 on the topic `t/last`.
const LAST_V5: &[u8] = b"\x30\x09\0\x06t/last\0";

/// CONNECT with a will.
fn connect(version: Version, clean_start: bool) -> Connect<'static> {
    Connect {
        version,
        client_id: "phone",
        clean_start,
        session_expiry: (version == Version::V5).then_some(300),
        will: Some(Will {
            topic: "t/will",
            ..Will::default()
        }),
        ..Connect::default()
    }
}

fn suback(packet: &Packet<'_>) -> Option<()> {
    matches!(packet, Packet::Suback(_)).then_some(())
}

fn session_present(packet: &Packet<'_>) -> Option<bool> {
    match packet {
        Packet::Connack(connack) => Some(connack.session_present),
        _ => None,
    }
}

/// A client that receives every message on `t/+`.
async fn watcher(process: &Process) -> Device {
    let mut watcher = process.connect("watcher");
    watcher.subscribe("t/+").await;
    watcher.read_until(suback).await.expect("granted");
    watcher
}

/// The topics of the messages that arrive before a message that the client sends now. A client's own
/// publishes keep their order.
async fn topics_until_now(watcher: &mut Device, client: &mut Device) -> Vec<String> {
    let now: &[u8] = match client.version {
        Version::V5 => b"\x30\x08\0\x05t/now\0",
        _ => b"\x30\x07\0\x05t/now",
    };
    client.out.extend(now);
    client.send().await;
    let topic = |packet: &Packet<'_>| match packet {
        Packet::Publish(publish) => Some(publish.topic.to_owned()),
        _ => None,
    };
    let mut topics = Vec::new();
    loop {
        match watcher.read_until(topic).await.expect("a message") {
            topic if topic == "t/now" => return topics,
            topic => topics.push(topic),
        }
    }
}

/// The old connection's bytes arrive when the new connection's task is to run first.
#[tokio::test]
async fn a_disconnect_that_arrived_before_a_connect_counts() {
    let process = Process::start(&Traps::default());
    let mut watcher = watcher(&process).await;
    let mut wrong = Vec::new();
    for (version, clean_start, disconnect, present) in [
        (Version::V5, false, DISCONNECT, true),
        (Version::V5, true, DISCONNECT, false),
        (Version::V5, false, DISCONNECT_FOR_GOOD, false),
        (Version::V311, false, DISCONNECT, true),
        (Version::V311, true, DISCONNECT, false),
        (Version::V31, false, DISCONNECT, false),
    ] {
        let mut old = process.open(&connect(version, false), "", 1024);
        old.send().await;
        old.read_until(session_present).await.expect("accepted");
        let mut new = process.open(&connect(version, clean_start), "", 1024);
        new.send().await;
        let last = if version == Version::V5 {
            LAST_V5
        } else {
            LAST_V3
        };
        old.out.extend(last);
        old.out.extend(disconnect);
        old.send().await;
        drop(old.io);
        let what = format!("{version:?} clean start {clean_start}");
        let resumed = new.read_until(session_present).await;
        let topics = topics_until_now(&mut watcher, &mut new).await;
        if resumed != Some(present) || topics != ["t/last"] {
            wrong.push(format!("{what}: present {resumed:?}, {topics:?}"));
        }
        // The session ends, for the next round.
        new.out.extend(DISCONNECT);
        new.send().await;
        drop(new.io);
        new.served.await.expect("no panic");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    process.end();
}

/// The pipe is full, so our write fails when the client closes its end.
#[tokio::test]
async fn a_disconnect_before_a_failed_write_counts() {
    let process = Process::start(&Traps::default());
    let mut watcher = watcher(&process).await;
    let mut phone = process.open(&connect(Version::V5, true), "", 4);
    phone.send().await;
    // A part of CONNACK.
    let mut first = [0; 4];
    phone.io.read_exact(&mut first).await.expect("an answer");
    assert_eq!((first[0], first[3]), (0x20, 0), "accepted");
    phone.out.extend(DISCONNECT);
    phone.send().await;
    drop(phone.io);
    phone.served.await.expect("no panic");
    let mut phone = process.open(&connect(Version::V5, true), "", 1024);
    let topics = topics_until_now(&mut watcher, &mut phone).await;
    assert!(topics.is_empty(), "{topics:?}");
    process.end();
}
