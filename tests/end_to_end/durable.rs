//! Sessions on the disk: Tidegate is killed and started again in front of a mosquitto, and its clients find
//! their sessions as they were told.
//!
//! `DURABLE_SEED` repeats the choices of another run; `TIDEGATE_FULL=1` kills five times as often.

mod kills;
mod links;
mod messages;
mod traffic;

use std::time::Duration;

use tidegate_kit::client::Client;
use tidegate_kit::dial::{Dialer, Trust};
use tidegate_kit::process::{Mosquitto, MosquittoConfig, Tidegate, TidegateConfig};
use tidegate_kit::wire::{Connect, Packet, Props, Value, Version, Will, prop};
use tokio::time::{Instant, sleep, timeout};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const WAYS: [&str; 6] = ["tcp", "tls", "ws", "wss", "quic", "webtransport"];
/// `session.restart_grace`.
const GRACE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// `upstream.data_links`.
const DATA_LINKS: u32 = 2;

/// A Tidegate in front of a mosquitto.
struct Node {
    tidegate: Tidegate,
    broker: Mosquitto,
}

impl Node {
    fn start(durability: &str) -> Result<Self> {
        Self::start_with(durability, &MosquittoConfig::default(), &[])
    }

    /// `keys` are further keys of `[upstream]` with their TOML values.
    fn start_with(
        durability: &str,
        broker: &MosquittoConfig,
        keys: &[(&str, &str)],
    ) -> Result<Self> {
        let broker = broker.start()?;
        let mut tidegate = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), &broker.url())
            .listen(&WAYS)
            .set("store", "durability", &format!("\"{durability}\""))
            .set(
                "session",
                "restart_grace",
                &format!("\"{}s\"", GRACE.as_secs()),
            )
            .set("upstream", "data_links", &DATA_LINKS.to_string());
        for (key, value) in keys {
            tidegate = tidegate.set("upstream", key, value);
        }
        Ok(Self {
            tidegate: tidegate.start()?,
            broker,
        })
    }

    /// Waits until the log has the records of the links, and returns the number of its records.
    async fn records_of_links(&self) -> Result<f64> {
        let records = f64::from(DATA_LINKS);
        self.wait_for("tidegate_store_records_total", &[], records)
            .await?;
        Ok(records)
    }

    /// Connects to the broker without Tidegate.
    async fn connect_to_broker(&self, connect: &Connect) -> Result<Client> {
        Ok(Client::connect(&self.broker_dialer()?, connect).await?.0)
    }

    fn broker_dialer(&self) -> Result<Dialer> {
        let url = format!("tcp://{}", self.broker.addr()).parse()?;
        Ok(Dialer::new(&url, &Trust::Anything)?)
    }

    fn kill_and_start(&mut self) -> Result {
        self.tidegate.kill();
        self.tidegate.start_again()?;
        Ok(())
    }

    /// Connects over tcp. Returns the client and Session Present.
    async fn connect(&self, connect: &Connect) -> Result<(Client, bool)> {
        self.connect_over("tcp", connect).await
    }

    async fn connect_over(&self, way: &str, connect: &Connect) -> Result<(Client, bool)> {
        let (client, ack) = Client::connect(&self.tidegate.dialer(way), connect).await?;
        Ok((client, ack.session_present))
    }

    /// Waits until a metric has this value.
    async fn wait_for(&self, name: &str, labels: &[(&str, &str)], value: f64) -> Result {
        self.wait_until(name, labels, |now| now == value).await
    }

    /// Waits until a metric is as it should be. Nothing tells that it changes.
    async fn wait_until(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        is_right: impl Fn(f64) -> bool,
    ) -> Result {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.tidegate.metrics()?.sum(name, labels);
            if is_right(now) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{name} {labels:?} stays at {now}").into());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until this number of sessions have expired.
    async fn wait_for_expired(&self, sessions: f64) -> Result {
        let labels = [("reason", "expired")];
        self.wait_for("tidegate_sessions_ended_total", &labels, sessions)
            .await
    }

    /// Publishes to `topic` until `receiver` has it: the broker has the receiver's filters again then.
    async fn reaches(&self, receiver: &mut Client, topic: &str) -> Result {
        let (mut publisher, _) = self.connect(&Connect::new("publisher").clean(true)).await?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            publisher.publish(topic, b"after", 1).await?;
            let wait = Duration::from_millis(300);
            while let Some(packet) = receiver.next_within(wait).await? {
                if let Packet::Publish(publish) = &packet
                    && publish.topic == topic
                {
                    receiver.acknowledge(publish).await?;
                    return Ok(());
                }
            }
        }
        Err(format!("no message to {topic} arrived").into())
    }
}

fn kept(id: &str) -> Connect {
    Connect::new(id).clean(false).expiry(600)
}

fn will(id: &str) -> Will {
    Will {
        topic: format!("wills/{id}"),
        payload: b"gone".to_vec(),
        qos: 1,
        ..Will::default()
    }
}

fn delayed(id: &str) -> Will {
    Will {
        props: Props(vec![(prop::WILL_DELAY, Value::Four(600))]),
        ..will(id)
    }
}

/// The topics that a client gets within `wait`.
async fn topics(client: &mut Client, wait: Duration) -> Result<Vec<String>> {
    let mut topics = Vec::new();
    let until = Instant::now() + wait;
    while let Some(rest) = until.checked_duration_since(Instant::now())
        && let Some(packet) = client.next_within(rest).await?
    {
        if let Packet::Publish(publish) = packet {
            client.acknowledge(&publish).await?;
            topics.push(publish.topic);
        }
    }
    Ok(topics)
}

/// The seed of a test's choices, which it prints.
fn seed() -> u64 {
    let seed = std::env::var("DURABLE_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64)
    });
    println!("DURABLE_SEED={seed}");
    seed
}

fn run(test: impl Future<Output = Result>) {
    run_within(3 * PATIENCE, test);
}

fn run_within(patience: Duration, test: impl Future<Output = Result>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let outcome = runtime.block_on(async {
        let _guard = crate::beside_others().await;
        timeout(patience, test).await
    });
    runtime.shutdown_background();
    outcome
        .expect("the test ends")
        .unwrap_or_else(|what| panic!("{what}"));
}

#[test]
fn a_session_survives_a_kill_over_every_transport_with_its_subscriptions() {
    run(async {
        let mut node = Node::start("disk")?;
        let mut clients = Vec::new();
        for way in WAYS {
            let (mut client, present) = node.connect_over(way, &kept(way)).await?;
            assert!(!present);
            client.subscribe(&[&format!("to/{way}/+")], 1).await?;
            client.subscribe(&["given/up"], 1).await?;
            client.unsubscribe(&["given/up"]).await?;
            clients.push(client);
        }
        node.kill_and_start()?;
        for (at, way) in WAYS.iter().enumerate() {
            // Each session goes on over another transport.
            let over = WAYS[(at + 1) % WAYS.len()];
            let (mut client, present) = node.connect_over(over, &kept(way)).await?;
            assert!(present, "{way}");
            node.reaches(&mut client, &format!("to/{way}/x")).await?;
            let (mut publisher, _) = node.connect(&Connect::new("p").clean(true)).await?;
            publisher.publish("given/up", b"", 1).await?;
            publisher.publish(&format!("to/{way}/last"), b"", 1).await?;
            let publish = client.next_publish().await?;
            assert_eq!(publish.topic, format!("to/{way}/last"));
        }
        Ok(())
    });
}

#[test]
fn every_version_of_mqtt_keeps_its_session() {
    run(async {
        let mut node = Node::start("disk")?;
        let versions = [Version::V31, Version::V311, Version::V5];
        let connect = |version: Version| match version {
            Version::V5 => kept("v5"),
            _ => Connect::new(format!("v{}", version.level()))
                .version(version)
                .clean(false),
        };
        for version in versions {
            let (mut client, _) = node.connect(&connect(version)).await?;
            client
                .subscribe(&[&format!("v/{}", version.level())], 1)
                .await?;
        }
        node.kill_and_start()?;
        for version in versions {
            let (mut client, present) = node.connect(&connect(version)).await?;
            // CONNACK of MQTT 3.1 cannot say so.
            assert_eq!(present, version != Version::V31);
            node.reaches(&mut client, &format!("v/{}", version.level()))
                .await?;
        }
        Ok(())
    });
}

#[test]
fn a_clean_start_and_a_changed_expiry_hold_after_a_kill() {
    run(async {
        let mut node = Node::start("disk")?;
        for id in ["clean", "shorter", "longer"] {
            let (mut client, _) = node.connect(&kept(id)).await?;
            client.subscribe(&["t"], 1).await?;
        }
        node.connect(&kept("clean").clean(true)).await?;
        node.connect(&kept("shorter").expiry(1)).await?;
        node.connect(&kept("longer").expiry(1)).await?;
        node.connect(&kept("longer")).await?;
        node.kill_and_start()?;
        let (mut client, present) = node.connect(&kept("clean")).await?;
        assert!(
            present,
            "the session of the clean start is kept, without subscriptions"
        );
        // Its time begins with the start.
        node.wait_for_expired(1.0).await?;
        assert!(!node.connect(&kept("shorter")).await?.1);
        let (mut longer, present) = node.connect(&kept("longer")).await?;
        assert!(present);
        node.reaches(&mut longer, "t").await?;
        assert_eq!(
            topics(&mut client, Duration::from_millis(100)).await?,
            [""; 0]
        );
        Ok(())
    });
}

#[test]
fn an_expiry_goes_on_while_nothing_runs() {
    run(async {
        let mut node = Node::start("disk")?;
        let before = node.records_of_links().await?;
        let (client, _) = node.connect(&kept("gone").expiry(7)).await?;
        client.disconnect().await?;
        // One record for its begin, and one for an absence that is longer than a flap.
        node.wait_for("tidegate_store_records_total", &[], before + 2.0)
            .await?;
        let began = Instant::now();
        node.kill_and_start()?;
        assert!(node.connect(&kept("other")).await.is_ok());
        node.wait_for_expired(1.0).await?;
        assert!(
            began.elapsed() < Duration::from_secs(6),
            "its time began anew"
        );
        assert!(!node.connect(&kept("gone")).await?.1);
        Ok(())
    });
}

#[test]
fn a_will_is_published_once_unless_its_client_is_back_or_has_said_goodbye() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut watcher, _) = node.connect(&kept("watcher")).await?;
        watcher.subscribe(&["wills/#"], 1).await?;
        let mut clients = Vec::new();
        for id in ["kept", "back", "bye", "replaced"] {
            clients.push(node.connect(&kept(id).will(will(id))).await?.0);
        }
        for id in ["ends", "ends-back"] {
            let connect = Connect::new(id).clean(true).will(will(id));
            clients.push(node.connect(&connect).await?.0);
        }
        clients.push(node.connect(&kept("late").will(delayed("late"))).await?.0);
        node.connect(&kept("replaced"))
            .await?
            .0
            .disconnect()
            .await?;
        clients.remove(2).disconnect().await?;
        // The commit of a discarded will is not awaited; this one's is behind it.
        node.connect(&kept("behind").will(will("behind")))
            .await?
            .0
            .disconnect()
            .await?;
        node.connect(&kept("behind2").will(will("behind2"))).await?;
        node.connect(&kept("behind2")).await?;
        let before = topics(&mut watcher, Duration::from_millis(300)).await?;
        node.kill_and_start()?;
        let (mut watcher, present) = node.connect(&kept("watcher")).await?;
        assert!(present);
        let _back = node.connect(&kept("back").will(will("back"))).await?;
        let _ends_back = node.connect(&Connect::new("ends-back").clean(true)).await?;
        let mut got = topics(&mut watcher, GRACE + Duration::from_secs(2)).await?;
        // Around a kill a message may come again.
        got.retain(|topic| !before.contains(topic));
        got.sort_unstable();
        assert_eq!(got, ["wills/ends", "wills/kept"]);
        node.kill_and_start()?;
        let (mut watcher, _) = node.connect(&kept("watcher")).await?;
        let again = got;
        let mut got = topics(&mut watcher, GRACE + Duration::from_secs(2)).await?;
        got.retain(|topic| !again.contains(topic) && !before.contains(topic));
        assert_eq!(
            got,
            ["wills/back"],
            "others are published, or wait for their delay"
        );
        Ok(())
    });
}

#[test]
fn a_drained_node_keeps_sessions_and_wills() {
    run(async {
        let mut node = Node::start("disk")?;
        let (mut watcher, _) = node.connect(&kept("watcher")).await?;
        watcher.subscribe(&["wills/#"], 1).await?;
        let _client = node.connect(&kept("c").will(will("c"))).await?;
        let (status, _) = node.tidegate.stop()?;
        assert!(status.success());
        node.tidegate.start_again()?;
        let (mut watcher, present) = node.connect(&kept("watcher")).await?;
        assert!(present);
        let got = topics(&mut watcher, GRACE + Duration::from_secs(2)).await?;
        assert_eq!(got, ["wills/c"]);
        Ok(())
    });
}

#[test]
fn in_memory_mode_a_restart_begins_empty_and_writes_nothing() {
    run(async {
        let mut node = Node::start("memory")?;
        node.connect(&kept("c")).await?;
        node.kill_and_start()?;
        assert!(!node.connect(&kept("c")).await?.1);
        assert!(!node.tidegate.dir().join("data/log").exists());
        Ok(())
    });
}

#[test]
fn flaps_write_nothing() {
    run(async {
        let node = Node::start("disk")?;
        let before = node.records_of_links().await?;
        let connect = kept("flapping").will(delayed("flapping"));
        let (mut client, _) = node.connect(&connect).await?;
        client.subscribe(&["t"], 1).await?;
        let written = || {
            node.tidegate
                .metrics()
                .map(|m| m.sum("tidegate_store_records_total", &[]))
        };
        // One for the will, one for the subscription, and two for its filter: before and after the broker's
        // answer.
        node.wait_for("tidegate_store_records_total", &[], before + 4.0)
            .await?;
        let before = written()?;
        for _ in 0..100 {
            drop(client);
            let (again, present) = node.connect(&connect).await?;
            assert!(present);
            client = again;
        }
        assert_eq!(written()?, before);
        Ok(())
    });
}

#[test]
fn a_damaged_record_costs_its_session_and_is_named() {
    run(async {
        let mut node = Node::start("disk")?;
        for id in ["whole-1", "damaged", "whole-2"] {
            let (mut client, _) = node.connect(&kept(id)).await?;
            client.subscribe(&["t"], 1).await?;
        }
        let log = node.tidegate.dir().join("data/log");
        node.tidegate.kill();
        for entry in std::fs::read_dir(&log)? {
            let path = entry?.path();
            let mut bytes = std::fs::read(&path)?;
            let name = b"damaged";
            for at in 0..bytes.len().saturating_sub(name.len()) {
                if bytes[at..].starts_with(name) {
                    bytes[at] ^= 1;
                }
            }
            std::fs::write(&path, bytes)?;
        }
        node.tidegate.start_again()?;
        let wait = Duration::from_secs(5);
        let line = node
            .tidegate
            .wait_for_log("cannot be read at segment", wait)?;
        assert!(line.contains("offset"), "{line}");
        for (id, there) in [("whole-1", true), ("damaged", false), ("whole-2", true)] {
            assert_eq!(node.connect(&kept(id)).await?.1, there, "{id}");
        }
        let damaged = node
            .tidegate
            .metrics()?
            .sum("tidegate_store_damaged_total", &[]);
        assert!(damaged >= 1.0);
        Ok(())
    });
}

#[test]
fn a_store_that_cannot_be_used_is_an_error_that_names_it() {
    run(async {
        let mut node = Node::start("disk")?;
        let log = node.tidegate.dir().join("data/log");
        node.tidegate.kill();
        let lock = std::fs::File::create(log.join("lock"))?;
        lock.lock()?;
        let error = node
            .tidegate
            .start_again()
            .expect_err("it is in use")
            .to_string();
        assert!(
            error.contains("in use by another process") && error.contains("data/log"),
            "{error}"
        );
        drop(lock);
        std::fs::remove_dir_all(&log)?;
        std::fs::write(&log, "not a directory")?;
        let error = node
            .tidegate
            .start_again()
            .expect_err("it is a file")
            .to_string();
        assert!(
            error.contains("node.data_dir") && error.contains("data/log"),
            "{error}"
        );
        Ok(())
    });
}
