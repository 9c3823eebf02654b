//! The probe: a few messages of our own, sent through the broker, show its quirks. The probe has a
//! connection and topics of its own, cleans up, and is bounded in time.

mod connection;

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::mqtt::{QoS, Version};
use crate::transport::dial::QuickAck;

use crate::upstream::profile::{
    BrokerProfile, Capabilities, Copies, Identifiers, OverlapQos, Quirks, SharedSubscriptions,
    Source, WINDOW_PROBED,
};
use connection::{
    Arrived, Interrupted, PROPERTIES, ProbeConnection, RETAINED_PAYLOAD, Subscription,
    VERSION_TOPIC,
};

/// Time for the whole probe.
pub(crate) const PROBE_TIME: Duration = Duration::from_secs(6);
/// How long a message through a shared subscription is waited for.
const SHARED_LATE: Duration = Duration::from_millis(300);
/// How long retained messages are waited for. Some brokers look for them after the SUBACK.
const RETAINED_LATE: Duration = Duration::from_secs(1);
/// Time for one answer of the broker. A broker that takes longer stalls the links no further.
pub(crate) const ANSWER_TIME: Duration = Duration::from_secs(3);
/// Memory that a probe takes at most: its read buffer, and the messages that arrived.
pub(crate) const PROBE_BYTES: usize = 1024 * 1024;
/// Retained messages that are published.
const RETAINED: usize = 16;
/// Bytes of the broker's name and version that are kept.
const SOFTWARE_MAX_BYTES: usize = 100;

/// Probes a broker over a connection that CONNACK has arrived on. `topic` lies below the probes'
/// prefix and belongs to this probe alone. A probe never fails: every quirk that it does not see is
/// assumed to be at its worst.
pub(crate) async fn probe<IO>(
    io: &mut IO,
    capabilities: &Capabilities,
    topic: &str,
    rest: BytesMut,
) -> BrokerProfile
where
    IO: AsyncRead + AsyncWrite + QuickAck + Unpin + Send,
{
    let mut profile = BrokerProfile::unseen(capabilities, Source::Probed);
    let mut probe = Probe {
        capabilities,
        connection: ProbeConnection::new(
            io,
            capabilities.version,
            topic,
            capabilities.identifiers,
            capabilities.receive_maximum,
            rest,
            Instant::now() + PROBE_TIME,
        ),
    };
    let mut step = "overlapping filters";
    let quirks = &mut profile.quirks;
    let result: Result<(), Interrupted> = async {
        quirks.nodelay = probe.connection.holds_back().await?.map(|holds| !holds);
        probe.overlap(quirks).await?;
        step = "a second SUBSCRIBE";
        probe.replace(quirks).await?;
        step = "retained messages";
        probe.retained(quirks).await?;
        step = "the send window";
        probe.window(quirks).await?;
        step = "cleaning up";
        probe.clean_up().await?;
        step = "shared subscriptions";
        if let Some(why) = probe.shared(quirks).await? {
            profile.missing.push(format!("shared subscriptions: {why}"));
        }
        step = "the broker's version";
        profile.software = probe.software().await?;
        Ok(())
    }
    .await;
    if let Err(why) = result {
        profile.source = Source::Partly;
        profile.missing.push(format!("{step}: {why}"));
    }
    probe.connection.close().await;
    profile
}

struct Probe<'a, IO> {
    capabilities: &'a Capabilities,
    connection: ProbeConnection<'a, IO>,
}

impl<IO> Probe<'_, IO>
where
    IO: AsyncRead + AsyncWrite + QuickAck + Unpin + Send,
{
    /// QoS 1, or 0 if the broker has no more.
    fn qos(&self) -> QoS {
        self.capabilities.maximum_qos.min(QoS::AtLeastOnce)
    }

    /// One message for three overlapping filters shows the copies, their QoS, their identifiers and
    /// properties, and whether they keep RETAIN.
    async fn overlap(&mut self, quirks: &mut Quirks) -> Result<(), Interrupted> {
        let qos = self.qos();
        let exact = Subscription::live("o/a", QoS::AtMostOnce, 1);
        let connection = &mut self.connection;
        connection.subscribe(exact).await?;
        for (filter, identifier) in [("o/+", 2), ("o/#", 3)] {
            let subscription = Subscription::live(filter, qos, identifier);
            connection.subscribe(subscription).await?;
        }
        connection.publish("o/a", b"overlap", qos, true).await?;
        connection.settle().await?;
        let complete = match self.capabilities.identifiers {
            true => each_identified_once(&connection.arrived),
            false => connection.arrived.len() >= 3,
        };
        if !complete {
            connection.quiet(connection.late()).await?;
        }
        let copies = connection.take("o/a", b"overlap");
        let Some(first) = copies.first() else {
            return Err(Interrupted::NothingDelivered);
        };
        let alone = copies.len() == 1;
        quirks.copies = Some(if alone { Copies::One } else { Copies::Many });
        quirks.overlap_qos = Some(match alone {
            true if first.qos < qos => OverlapQos::Lower,
            true => OverlapQos::Highest,
            false => OverlapQos::Each,
        });
        if self.capabilities.version < Version::V5 {
            return Ok(());
        }
        if self.capabilities.identifiers {
            quirks.identifiers = match each_identified_once(&copies) {
                true => Identifiers::Working,
                false => Identifiers::Broken,
            };
        }
        quirks.properties = Some(copies.iter().all(|c| {
            let arrived = c.properties.iter().map(|(k, v)| (k.as_str(), v.as_str()));
            arrived.eq(PROPERTIES)
        }));
        if !self.capabilities.retain_available {
            return Ok(());
        }
        quirks.retain_as_published = Some(copies.iter().all(|c| c.retain));
        self.connection.subscribe(exact).await?;
        self.connection.settle().await?;
        let replays = self.connection.take("o/a", b"overlap");
        quirks.retain_handling = Some(replays.is_empty());
        Ok(())
    }

    /// A second SUBSCRIBE raises a filter's QoS. A broker that replaces the first one sends a single
    /// copy, at the new QoS.
    async fn replace(&mut self, quirks: &mut Quirks) -> Result<(), Interrupted> {
        if self.qos() == QoS::AtMostOnce {
            return Ok(());
        }
        let connection = &mut self.connection;
        for qos in [QoS::AtMostOnce, QoS::AtLeastOnce] {
            let subscription = Subscription::live("q", qos, 1);
            connection.subscribe(subscription).await?;
        }
        let qos = QoS::AtLeastOnce;
        connection.publish("q", b"once", qos, false).await?;
        connection.settle().await?;
        let copies = connection.take("q", b"once");
        quirks.replaces = Some(matches!(&copies[..], [only] if only.qos == qos));
        Ok(())
    }

    /// A filter with a wildcard, and a PINGREQ after it, show how retained messages arrive.
    async fn retained(&mut self, quirks: &mut Quirks) -> Result<(), Interrupted> {
        if !self.capabilities.retain_available {
            return Ok(());
        }
        let qos = self.qos();
        let connection = &mut self.connection;
        let names: Vec<String> = (0..RETAINED).map(|n| format!("r/{n}")).collect();
        connection
            .publish_all(&names, RETAINED_PAYLOAD, qos, true)
            .await?;
        let begun = Instant::now();
        let subscription = Subscription::retained("r/#", Some(4));
        let before = connection.subscribe_and_ping(subscription).await?;
        let (expected, until) = (("r/", RETAINED_PAYLOAD), begun + RETAINED_LATE);
        let all = connection.wait_for(RETAINED, expected, until).await?;
        connection.arrived.clear();
        quirks.retained_within = (all >= RETAINED).then(|| begun.elapsed().as_millis() as u32);
        quirks.retained_wildcard = Some(all >= RETAINED);
        quirks.retained_marker = (all > 0).then_some(before >= RETAINED);
        if all == 0 {
            quirks.retained_within = self.retained_exact().await?;
        }
        Ok(())
    }

    /// A broker that sends no retained messages for wildcards may send one for its exact topic.
    /// Returns the milliseconds until it arrived.
    async fn retained_exact(&mut self) -> Result<Option<u32>, Interrupted> {
        let begun = Instant::now();
        let connection = &mut self.connection;
        connection
            .subscribe(Subscription::retained("r/0", Some(4)))
            .await?;
        let expected = ("r/0", RETAINED_PAYLOAD);
        let until = begun + SHARED_LATE;
        let arrived = connection.wait_for(1, expected, until).await?;
        connection.arrived.clear();
        Ok((arrived > 0).then(|| begun.elapsed().as_millis() as u32))
    }

    /// Messages without an acknowledgement show how many the broker sends.
    async fn window(&mut self, quirks: &mut Quirks) -> Result<(), Interrupted> {
        if self.qos() == QoS::AtMostOnce {
            return Ok(());
        }
        let qos = QoS::AtLeastOnce;
        let connection = &mut self.connection;
        connection
            .subscribe(Subscription::live("w", qos, 5))
            .await?;
        connection.keep_unacknowledged = true;
        let names = vec!["w".to_owned(); usize::from(WINDOW_PROBED)];
        connection
            .publish_all(&names, b"window", qos, false)
            .await?;
        let until = Instant::now() + connection.late();
        let all = usize::from(WINDOW_PROBED);
        connection.wait_for(all, ("w", b"window"), until).await?;
        connection.keep_unacknowledged = false;
        quirks.window = u16::try_from(connection.take("w", b"window").len()).ok();
        connection.acknowledge().await?;
        connection.settle().await?;
        connection.arrived.clear();
        Ok(())
    }

    /// A message through a shared subscription shows whether they work. Returns why the broker
    /// refused to grant one, if it did.
    async fn shared(&mut self, quirks: &mut Quirks) -> Result<Option<Interrupted>, Interrupted> {
        if !self.capabilities.shared {
            return Ok(None);
        }
        // The state if the probe ends before the next step.
        quirks.shared = SharedSubscriptions::Refused;
        let qos = self.qos();
        let connection = &mut self.connection;
        let filter = format!("$share/tidegate-probe/{}", connection.below("s"));
        let subscription = Subscription::live(&filter, qos, 6);
        let id = connection.send_subscribe(&subscription).await?;
        if let Err(refused) = connection.granted(id).await {
            return Ok(Some(refused));
        }
        quirks.shared = SharedSubscriptions::Dead;
        connection.publish("s", b"shared", qos, false).await?;
        let until = Instant::now() + SHARED_LATE.max(connection.late());
        if connection.wait_for(1, ("s", b"shared"), until).await? > 0 {
            quirks.shared = SharedSubscriptions::Alive;
        }
        Ok(None)
    }

    /// The broker's name and version. A broker may close the connection at this SUBSCRIBE; nothing is
    /// lost then.
    async fn software(&mut self) -> Result<Option<String>, Interrupted> {
        let connection = &mut self.connection;
        let subscription = Subscription::retained(VERSION_TOPIC, None);
        let Ok(id) = connection.send_subscribe(&subscription).await else {
            return Ok(None);
        };
        if connection.granted(id).await.is_err() {
            return Ok(None);
        }
        // An error means that the broker has closed the connection.
        let until = Instant::now() + connection.late();
        let said = connection.version(until).await.ok().flatten();
        Ok(said.map(|payload| {
            let text = String::from_utf8_lossy(&payload);
            crate::telemetry::clean(&text, SOFTWARE_MAX_BYTES).to_string()
        }))
    }

    /// Removes the retained messages.
    async fn clean_up(&mut self) -> Result<(), Interrupted> {
        if !self.capabilities.retain_available {
            return Ok(());
        }
        let connection = &mut self.connection;
        let qos = QoS::AtMostOnce;
        let mut names: Vec<String> = (0..RETAINED).map(|n| format!("r/{n}")).collect();
        names.push("o/a".into());
        connection.publish_all(&names, b"", qos, true).await?;
        connection.settle().await?;
        connection.arrived.clear();
        Ok(())
    }
}

/// Whether the copies name each of the three overlapping filters once.
fn each_identified_once(copies: &[Arrived]) -> bool {
    let mut ids: Vec<u32> = copies.iter().flat_map(|c| c.ids.iter().copied()).collect();
    ids.sort_unstable();
    ids == [1, 2, 3]
}

#[cfg(test)]
mod tests;
