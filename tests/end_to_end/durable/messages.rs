//! Messages on the disk: a kill loses none that the broker has handed over, and repeats none of QoS 2.

use std::time::Duration;

use tidegate_kit::client::Client;
use tidegate_kit::wire::{Ack, Connect, Packet, Publish};
use tokio::time::sleep;

use super::{Node, PATIENCE, Result, WAYS, kept, run};

impl Node {
    /// Publishes messages with these payloads, and waits until they are on the disk.
    async fn publish_all(&self, topics: &[String], payloads: &[String], qos: u8) -> Result {
        let (mut publisher, _) = self.connect(&Connect::new("publisher").clean(true)).await?;
        let before = self.tidegate.metrics()?;
        let records = before.sum("tidegate_store_records_total", &[]);
        for payload in payloads {
            for topic in topics {
                publisher.publish(topic, payload.as_str(), qos).await?;
            }
        }
        // A message of QoS 2 has a record of its release, too.
        let each = if qos == 2 { 2 } else { 1 };
        let count = (each * topics.len() * payloads.len()) as f64;
        let name = "tidegate_store_records_total";
        self.wait_until(name, &[], |now| now >= records + count)
            .await
    }
}

fn numbered(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

fn text(publish: &Publish) -> String {
    String::from_utf8_lossy(&publish.payload).into_owned()
}

/// Takes as many messages, and completes them.
async fn take(client: &mut Client, count: usize) -> Result<Vec<String>> {
    let mut payloads = Vec::new();
    let mut open = 0;
    while payloads.len() < count || open > 0 {
        match client.next_within(PATIENCE).await? {
            Some(Packet::Publish(publish)) => {
                client.acknowledge(&publish).await?;
                open += usize::from(publish.qos == 2);
                payloads.push(text(&publish));
            }
            Some(Packet::PubRel(ack)) => {
                let ack = Ack {
                    id: ack.id,
                    ..Ack::default()
                };
                client.send(&Packet::PubComp(ack)).await?;
                open -= 1;
            }
            Some(_) => {}
            None => return Err(format!("after {payloads:?} nothing comes").into()),
        }
    }
    // The acknowledgements have arrived.
    client.ping().await?;
    Ok(payloads)
}

#[test]
fn messages_for_clients_that_are_away_survive_kills_on_every_transport() {
    run(async {
        let mut node = Node::start("disk")?;
        let mut topics = Vec::new();
        for way in WAYS {
            let (mut client, _) = node.connect_over(way, &kept(way)).await?;
            client.subscribe(&[&format!("to/{way}"), "all"], 2).await?;
            client.disconnect().await?;
            topics.push(format!("to/{way}"));
        }
        topics.push("all".into());
        node.publish_all(&topics, &numbered(0..5), 1).await?;
        // After two seconds clients that are away sleep: a backlog has their messages.
        sleep(Duration::from_millis(2500)).await;
        node.publish_all(&topics, &numbered(5..8), 2).await?;
        node.kill_and_start()?;
        let expected: Vec<String> = numbered(0..8)
            .into_iter()
            .flat_map(|n| [n.clone(), n])
            .collect();
        for (at, way) in WAYS.iter().enumerate() {
            // Each session goes on over another transport, and half of the clients come after another kill.
            if at == WAYS.len() / 2 {
                node.kill_and_start()?;
            }
            let over = WAYS[(at + 1) % WAYS.len()];
            let (mut client, present) = node.connect_over(over, &kept(way)).await?;
            assert!(present, "{way}");
            let mut got = take(&mut client, expected.len()).await?;
            got.sort();
            assert_eq!(got, expected, "{way}");
        }
        Ok(())
    });
}

#[test]
fn a_delivery_goes_on_where_a_kill_has_cut_it() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut client, _) = node.connect(&kept("a")).await?;
        client.subscribe(&["once"], 2).await?;
        client.subscribe(&["at/least"], 1).await?;
        node.publish_all(&["once".into()], &numbered(0..3), 2)
            .await?;
        node.publish_all(&["at/least".into()], &numbered(3..4), 1)
            .await?;
        let mut ids = Vec::new();
        let mut released = Vec::new();
        // The client has the first two. PUBREL comes for the first, and perhaps for the second.
        while ids.len() < 4 || !released.contains(&ids[0]) {
            match client.next().await? {
                Packet::Publish(publish) => {
                    assert_eq!(text(&publish), ids.len().to_string());
                    if ids.len() < 2 {
                        client.acknowledge(&publish).await?;
                    }
                    ids.push(publish.id);
                }
                Packet::PubRel(ack) => released.push(ack.id),
                other => return Err(format!("{other:?}").into()),
            }
        }
        node.kill_and_start()?;
        let (mut client, present) = node.connect(&kept("a")).await?;
        assert!(present);
        let mut again = Vec::new();
        for _ in 0..4 {
            match client.next().await? {
                Packet::Publish(publish) => {
                    assert!(publish.dup, "{publish:?}");
                    again.push((text(&publish), publish.id));
                }
                Packet::PubRel(ack) => again.push(("released".to_owned(), ack.id)),
                other => return Err(format!("{other:?}").into()),
            }
        }
        again.sort_by_key(|(_, id)| *id);
        let ids_again: Vec<u16> = again.iter().map(|(_, id)| *id).collect();
        assert_eq!(ids_again, ids);
        let what: Vec<&str> = again.iter().map(|(what, _)| &**what).collect();
        assert!(
            matches!(what[..], ["released", "released" | "1", "2", "3"]),
            "{what:?}"
        );
        Ok(())
    });
}
