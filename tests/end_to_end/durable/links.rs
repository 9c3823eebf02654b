//! The links' sessions at the broker go on after a kill: the broker's messages of the downtime arrive, and the
//! broker is asked for nothing that it has.

use std::process::Command;

use super::*;

const SUBSCRIBES: &str = "tidegate_upstream_subscribes_total";
const UNSUBSCRIBES: &str = "tidegate_upstream_unsubscribes_total";
const GAPS: &str = "tidegate_upstream_gaps_total";

/// The ways in which filters are mapped: by Subscription Identifiers; without, by disjoint placement; and by a
/// root.
const MAPPINGS: [&[(&str, &str)]; 3] = [
    &[],
    &[("protocol", "\"3.1.1\""), ("data_links", "\"auto\"")],
    &[("roots", "[\"away/#\"]")],
];

/// The broker's process runs, or does not.
fn signal_broker(node: &Node, name: &str) -> Result {
    let pid = node.broker.pid().to_string();
    let status = Command::new("kill").args([name, &pid]).status()?;
    assert!(status.success());
    Ok(())
}

/// Changes the configuration for the next start.
fn reconfigure(node: &Node, from: &str, to: &str) -> Result {
    let path = node.tidegate.dir().join("tidegate.toml");
    let text = std::fs::read_to_string(&path)?;
    assert!(text.contains(from), "{text}");
    std::fs::write(&path, text.replace(from, to))?;
    Ok(())
}

/// Publishes messages to the broker itself.
async fn publish(node: &Node, topics: &[&str], count: u32) -> Result {
    let mut publisher = node
        .connect_to_broker(&Connect::new("p").clean(true))
        .await?;
    for number in 0..count {
        for topic in topics {
            let payload = format!("{topic} {number}");
            publisher.publish(topic, payload.as_bytes(), 1).await?;
        }
    }
    Ok(())
}

/// The payloads that a client gets until the wanted number is there, and a moment longer.
async fn payloads(client: &mut Client, count: usize) -> Result<Vec<String>> {
    let mut payloads = Vec::new();
    loop {
        let wait = match payloads.len() < count {
            true => Duration::from_secs(20),
            false => Duration::from_millis(300),
        };
        let Some(packet) = client.next_within(wait).await? else {
            return Ok(payloads);
        };
        if let Packet::Publish(publish) = packet {
            client.acknowledge(&publish).await?;
            payloads.push(String::from_utf8(publish.payload)?);
        }
    }
}

fn numbered(topic: &str, count: u32) -> Vec<String> {
    (0..count).map(|n| format!("{topic} {n}")).collect()
}

/// Waits until the disk has the records of all filters that the broker has granted.
async fn settled(node: &Node) -> Result {
    let (mut client, _) = node.connect(&kept("settled")).await?;
    client.subscribe(&["settled"], 1).await?;
    Ok(())
}

#[test]
fn messages_that_are_published_while_nothing_runs_arrive_once_and_in_order() {
    run(async {
        for mapping in MAPPINGS {
            let mut node = Node::start_with("disk", &MosquittoConfig::default(), mapping)?;
            let (mut inner, _) = node.connect(&kept("inner")).await?;
            inner.subscribe(&["away/a"], 1).await?;
            let (mut outer, _) = node.connect(&kept("outer")).await?;
            outer.subscribe(&["away/+"], 1).await?;
            let (mut both, _) = node.connect(&kept("both")).await?;
            both.subscribe(&["away/#", "away/b", "away/+"], 1).await?;
            let before = node.tidegate.metrics()?.sum(SUBSCRIBES, &[]);
            assert!(before > 0.0);
            node.tidegate.kill();
            publish(&node, &["away/a", "away/b"], 50).await?;
            node.tidegate.start_again()?;
            let (mut inner, present) = node.connect(&kept("inner")).await?;
            assert!(present);
            assert_eq!(payloads(&mut inner, 50).await?, numbered("away/a", 50));
            for id in ["outer", "both"] {
                let (mut client, _) = node.connect(&kept(id)).await?;
                let all = payloads(&mut client, 100).await?;
                for topic in ["away/a", "away/b"] {
                    let of_topic = all.iter().filter(|p| p.starts_with(topic)).cloned();
                    let of_topic: Vec<String> = of_topic.collect();
                    assert_eq!(of_topic, numbered(topic, 50), "{id} {mapping:?}");
                }
            }
            let metrics = node.tidegate.metrics()?;
            assert_eq!(metrics.sum(SUBSCRIBES, &[]), 0.0, "{mapping:?}");
            assert_eq!(metrics.sum(GAPS, &[]), 0.0, "{mapping:?}");
            // Live messages come as before.
            publish(&node, &["away/a"], 3).await?;
            assert_eq!(payloads(&mut inner, 3).await?, numbered("away/a", 3));
        }
        Ok(())
    });
}

#[test]
fn a_shared_group_gets_the_messages_of_the_downtime_once() {
    run(async {
        for keys in [&[][..], &[("shared", "\"local\"")]] {
            let mut node = Node::start_with("disk", &MosquittoConfig::default(), keys)?;
            for id in ["one", "two"] {
                let (mut client, _) = node.connect(&kept(id)).await?;
                client.subscribe(&["$share/g/jobs/+"], 1).await?;
            }
            node.tidegate.kill();
            publish(&node, &["jobs/x"], 40).await?;
            node.tidegate.start_again()?;
            let (mut one, _) = node.connect(&kept("one")).await?;
            let (mut two, _) = node.connect(&kept("two")).await?;
            let (mut all, mut others) = (Vec::new(), Vec::new());
            while all.len() + others.len() < 40 {
                let took = tokio::join!(payloads(&mut one, 1), payloads(&mut two, 1));
                all.extend(took.0?);
                others.extend(took.1?);
            }
            all.extend(others);
            all.sort_unstable();
            let mut wanted = numbered("jobs/x", 40);
            wanted.sort_unstable();
            assert_eq!(all, wanted, "{keys:?}");
            assert_eq!(node.tidegate.metrics()?.sum(SUBSCRIBES, &[]), 0.0);
        }
        Ok(())
    });
}

#[test]
fn a_broker_that_restarts_meanwhile_keeps_the_messages_or_leaves_a_gap() {
    run(async {
        for persistence in [true, false] {
            let config = MosquittoConfig {
                persistence,
                ..MosquittoConfig::default()
            };
            let mut node = Node::start_with("disk", &config, &[])?;
            let (mut client, _) = node.connect(&kept("c")).await?;
            client.subscribe(&["away/+"], 1).await?;
            node.tidegate.kill();
            publish(&node, &["away/a"], 10).await?;
            node.broker.stop(false)?;
            node.broker.start_again()?;
            node.tidegate.start_again()?;
            let (mut client, present) = node.connect(&kept("c")).await?;
            assert!(present);
            if persistence {
                assert_eq!(payloads(&mut client, 10).await?, numbered("away/a", 10));
            } else {
                node.reaches(&mut client, "away/b").await?;
                // Each link that had a session.
                node.wait_for(GAPS, &[], 1.0).await?;
            }
            // The next start finds the new sessions.
            node.tidegate.kill();
            publish(&node, &["away/c"], 10).await?;
            node.tidegate.start_again()?;
            let (mut client, _) = node.connect(&kept("c")).await?;
            let mut got = payloads(&mut client, 10).await?;
            // Around a kill a message may come again.
            while got.len() - got.iter().filter(|p| *p == "after").count() < 10 {
                got.extend(payloads(&mut client, 1).await?);
            }
            got.retain(|payload| payload != "after");
            assert_eq!(got, numbered("away/c", 10));
        }
        Ok(())
    });
}

#[test]
fn an_unsubscribe_that_was_pending_at_a_kill_is_finished() {
    run(async {
        let keys = [("linger", "\"60s\"")];
        let mut node = Node::start_with("disk", &MosquittoConfig::default(), &keys)?;
        let (mut client, _) = node.connect(&kept("c")).await?;
        client.subscribe(&["$share/g/gone", "stays"], 1).await?;
        settled(&node).await?;
        signal_broker(&node, "-STOP")?;
        // Shared filters do not linger.
        client.unsubscribe(&["$share/g/gone"]).await?;
        node.wait_for(UNSUBSCRIBES, &[], 1.0).await?;
        node.tidegate.kill();
        signal_broker(&node, "-CONT")?;
        node.tidegate.start_again()?;
        node.wait_for(UNSUBSCRIBES, &[], 1.0).await?;
        let (mut client, _) = node.connect(&kept("c")).await?;
        publish(&node, &["gone", "stays"], 3).await?;
        assert_eq!(payloads(&mut client, 3).await?, numbered("stays", 3));
        // Nothing is left for another start.
        settled(&node).await?;
        node.kill_and_start()?;
        settled(&node).await?;
        assert_eq!(node.tidegate.metrics()?.sum(UNSUBSCRIBES, &[]), 0.0);
        Ok(())
    });
}

#[test]
fn a_filter_that_the_broker_has_is_granted_although_the_broker_does_not_answer() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut client, _) = node.connect(&kept("c")).await?;
        client.subscribe(&["known/+"], 1).await?;
        settled(&node).await?;
        node.tidegate.kill();
        signal_broker(&node, "-STOP")?;
        node.tidegate.start_again()?;
        let (mut other, _) = node.connect(&Connect::new("other").clean(true)).await?;
        let began = Instant::now();
        let codes = other.subscribe(&["known/+"], 1).await?;
        assert_eq!(codes.codes, [1]);
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "upstream.subscribe_wait"
        );
        signal_broker(&node, "-CONT")?;
        publish(&node, &["known/x"], 3).await?;
        assert_eq!(payloads(&mut other, 3).await?, numbered("known/x", 3));
        assert_eq!(node.tidegate.metrics()?.sum(SUBSCRIBES, &[]), 0.0);
        Ok(())
    });
}

#[test]
fn a_filter_that_no_session_needs_any_more_lingers_and_leaves_the_broker() {
    run(async {
        let keys = [("linger", "\"60s\""), ("filters_lingering_max", "1000")];
        let mut node = Node::start_with("disk", &MosquittoConfig::default(), &keys)?;
        let (mut client, _) = node
            .connect(&Connect::new("clean").clean(true).expiry(0))
            .await?;
        client.subscribe(&["linger/+"], 1).await?;
        settled(&node).await?;
        node.tidegate.kill();
        reconfigure(&node, "linger = \"60s\"", "linger = \"1s\"")?;
        reconfigure(&node, "[upstream]", "[upstream]\nlinger_busy_min = \"1s\"")?;
        node.tidegate.start_again()?;
        node.wait_for(UNSUBSCRIBES, &[], 1.0).await?;
        Ok(())
    });
}

#[test]
fn with_fewer_links_or_another_prefix_filters_are_placed_anew_and_old_sessions_are_ended() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut client, _) = node.connect(&kept("c")).await?;
        let filters: Vec<String> = (0..20).map(|n| format!("to/{n}/+")).collect();
        let names: Vec<&str> = filters.iter().map(String::as_str).collect();
        client.subscribe(&names, 1).await?;
        for (from, to, ended) in [
            ("data_links = 2", "data_links = 1", 1),
            (
                "data_links = 1",
                "data_links = 1\nclient_id_prefix = \"other\"",
                1,
            ),
        ] {
            node.tidegate.kill();
            reconfigure(&node, from, to)?;
            node.tidegate.start_again()?;
            let wait = Duration::from_secs(20);
            let mut lines = 0;
            while lines < ended {
                node.tidegate
                    .wait_for_log("The session of a link that is gone was ended", wait)?;
                lines += 1;
            }
            let (mut client, present) = node.connect(&kept("c")).await?;
            assert!(present);
            for n in 0..20 {
                node.reaches(&mut client, &format!("to/{n}/x")).await?;
            }
            publish(&node, &["to/3/y"], 3).await?;
            let all = payloads(&mut client, 3).await?;
            let last: Vec<&String> = all.iter().filter(|p| p.starts_with("to/3/y")).collect();
            assert_eq!(last.len(), 3, "{all:?}");
        }
        // The next start ends nothing.
        node.kill_and_start()?;
        settled(&node).await?;
        let log = node.tidegate.log();
        assert!(
            !log.iter()
                .any(|line| line.contains("that is gone was ended"))
        );
        Ok(())
    });
}

#[test]
fn no_local_holds_for_a_message_that_was_under_way() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut client, _) = node.connect(&kept("c")).await?;
        let subscribe = tidegate_kit::wire::Subscribe {
            id: client.new_id(),
            filters: vec![("own/+".to_owned(), 1 | 1 << 2)],
            ..Default::default()
        };
        client.subscribe_with(subscribe).await?;
        let (mut other, _) = node.connect(&kept("other")).await?;
        other.subscribe(&["own/+"], 1).await?;
        settled(&node).await?;
        // The broker gets the message, and Tidegate is gone before it comes back.
        signal_broker(&node, "-STOP")?;
        let publish = tidegate_kit::wire::Publish {
            topic: "own/x".to_owned(),
            qos: 1,
            id: 77,
            payload: b"mine".to_vec(),
            ..Default::default()
        };
        client.send(&Packet::Publish(publish)).await?;
        node.wait_for("tidegate_upstream_publishes_total", &[], 1.0)
            .await?;
        node.tidegate.kill();
        signal_broker(&node, "-CONT")?;
        node.tidegate.start_again()?;
        let (mut other, _) = node.connect(&kept("other")).await?;
        assert_eq!(payloads(&mut other, 1).await?, ["mine"]);
        let (mut client, _) = node.connect(&kept("c")).await?;
        assert_eq!(payloads(&mut client, 0).await?, [""; 0]);
        Ok(())
    });
}
