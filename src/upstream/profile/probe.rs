//! The self-probe: a few messages of our own through the core show what it does where brokers
//! differ. It has a connection and topics of its own, cleans up, and is bounded in time.

use std::collections::HashSet;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::mqtt::{
    AckKind, Alias, Decoder, Delivery, Message, MessageSpec, Packet, Properties, Property, QoS,
    ReasonCode, Receiver, SubscribeOptions, Version, encode_ack, encode_disconnect, encode_pingreq,
    encode_subscribe,
};

use crate::upstream::profile::{
    BrokerProfile, Capabilities, Copies, Identifiers, OverlapQos, SharedSubscriptions, Source,
    WINDOW_PROBED,
};

/// Time for all of it.
pub const PROBE_TIME: Duration = Duration::from_secs(6);
/// Nothing more comes once it was quiet for this long behind an answered PINGREQ...
const QUIET: Duration = Duration::from_millis(20);
/// ...or for this long, where what is missing may come on the broker's own time.
const QUIET_LATE: Duration = Duration::from_millis(300);
/// Retained messages are waited for that long: some brokers look for them after the SUBACK.
const RETAINED_LATE: Duration = Duration::from_secs(1);
/// Retained messages that are published.
const RETAINED: usize = 16;
/// How long they outlive a probe that was cut off, seconds.
const EXPIRY: u32 = 60;
/// User properties as published.
const PROPERTIES: [(&str, &str); 3] = [("a", "1"), ("b", "2"), ("a", "3")];

/// Why a step did not come to its end.
struct Cut(String);

impl From<std::io::Error> for Cut {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Probes a core over a connection that its CONNACK has come on. `topic` is below the probes'
/// own prefix, and nobody else's. Never fails: what was not seen is assumed at its worst.
pub async fn probe<IO>(
    io: &mut IO,
    capabilities: &Capabilities,
    topic: &str,
    rest: BytesMut,
) -> BrokerProfile
where
    IO: AsyncRead + AsyncWrite + Unpin + Send,
{
    let version = capabilities.version;
    let mut profile = BrokerProfile::unseen(capabilities, Source::Probed);
    let mut probe = Probe {
        io,
        version,
        topic,
        capabilities,
        decoder: Decoder {
            version,
            receiver: Receiver::Client,
            max: 1024 * 1024,
        },
        input: rest,
        last_id: 0,
        hold: false,
        held: Vec::new(),
        got: Got::default(),
        deadline: Instant::now() + PROBE_TIME,
    };
    let mut step = "overlapping filters";
    let result = async {
        probe.overlap(&mut profile).await?;
        step = "a second SUBSCRIBE";
        probe.replace(&mut profile).await?;
        step = "retained messages";
        probe.retained(&mut profile).await?;
        step = "the send window";
        probe.window(&mut profile).await?;
        step = "cleaning up";
        probe.clean_up().await?;
        step = "shared subscriptions";
        probe.shared(&mut profile).await?;
        step = "the core's version";
        probe.software(&mut profile).await
    }
    .await;
    if let Err(Cut(why)) = result {
        profile.source = Source::Partly;
        profile.missing.push(format!("{step}: {why}"));
    }
    let mut bye = Vec::new();
    encode_disconnect(version, ReasonCode::SUCCESS, None, None, &mut bye);
    // The session is clean: it ends with the connection either way.
    let _ = tokio::time::timeout(Duration::from_millis(500), async {
        io.write_all(&bye).await?;
        io.shutdown().await
    })
    .await;
    profile
}

/// A PUBLISH that came.
struct Came {
    payload: Vec<u8>,
    qos: QoS,
    retain: bool,
    ids: Vec<u32>,
    properties: Vec<(String, String)>,
}

/// What came and was not looked at yet.
#[derive(Default)]
struct Got {
    publishes: Vec<Came>,
    subacks: Vec<(u16, Vec<u8>)>,
    acknowledged: HashSet<u16>,
    pings: usize,
}

struct Probe<'a, IO> {
    io: &'a mut IO,
    version: Version,
    topic: &'a str,
    capabilities: &'a Capabilities,
    decoder: Decoder,
    input: BytesMut,
    last_id: u16,
    /// PUBLISH packets are not acknowledged for now.
    hold: bool,
    held: Vec<u16>,
    got: Got,
    deadline: Instant,
}

impl<IO> Probe<'_, IO>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send,
{
    fn maximum_qos(&self) -> u8 {
        self.capabilities.maximum_qos as u8
    }

    async fn overlap(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        let one = self.maximum_qos().min(1);
        let filters = [("o/a", 0, 1), ("o/+", one, 2), ("o/#", one, 3)];
        for (name, qos, identifier) in filters {
            self.subscribe(name, qos, 2, true, Some(identifier)).await?;
        }
        self.publish("o/a", b"overlap", one, true).await?;
        self.settle(QUIET).await?;
        if !self.all_came() {
            self.quiet(QUIET_LATE).await?;
        }
        let identified = self.all_came();
        let copies = std::mem::take(&mut self.got.publishes);
        if copies.is_empty() {
            return Err(Cut("nothing came back".into()));
        }
        let alone = copies.len() == 1;
        profile.quirks.copies = Some(if alone { Copies::One } else { Copies::Many });
        profile.quirks.overlap_qos = Some(match copies.first() {
            Some(c) if alone && (c.qos as u8) < one => OverlapQos::Lower,
            _ if alone => OverlapQos::Highest,
            _ => OverlapQos::Each,
        });
        if self.version < Version::V5 {
            return Ok(());
        }
        if self.capabilities.identifiers {
            profile.quirks.identifiers = match identified {
                true => Identifiers::Working,
                false => Identifiers::Broken,
            };
        }
        profile.quirks.properties = Some(copies.iter().all(|c| {
            let kept = c.properties.iter().map(|(k, v)| (k.as_str(), v.as_str()));
            kept.eq(PROPERTIES)
        }));
        if !self.capabilities.retain_available {
            return Ok(());
        }
        profile.quirks.retain_as_published = Some(copies.iter().all(|c| c.retain));
        self.subscribe("o/a", 0, 2, true, Some(1)).await?;
        self.settle(QUIET).await?;
        let replays = std::mem::take(&mut self.got.publishes);
        profile.quirks.retain_handling = Some(replays.is_empty());
        Ok(())
    }

    /// A filter whose QoS is raised brings each message once.
    async fn replace(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        if self.maximum_qos() == 0 {
            return Ok(());
        }
        for qos in [0, 1] {
            self.subscribe("q", qos, 2, true, Some(1)).await?;
        }
        self.publish("q", b"once", 1, false).await?;
        self.settle(QUIET).await?;
        let copies = std::mem::take(&mut self.got.publishes);
        profile.quirks.replaces =
            Some(matches!(&copies[..], [only] if only.qos == QoS::AtLeastOnce));
        Ok(())
    }

    /// Each of the three filters is named once.
    fn all_came(&self) -> bool {
        let came = self.got.publishes.iter().flat_map(|c| &c.ids);
        let mut ids: Vec<u32> = came.copied().collect();
        ids.sort_unstable();
        ids == [1, 2, 3]
    }

    async fn retained(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        if !self.capabilities.retain_available {
            return Ok(());
        }
        let qos = self.maximum_qos().min(1);
        for n in 0..RETAINED {
            self.publish(&format!("r/{n}"), b"retained", qos, true)
                .await?;
        }
        let begun = Instant::now();
        // The marker goes out with the SUBSCRIBE.
        let mut out = Vec::new();
        let id = self.encode_subscribe("r/#", 0, 0, false, Some(4), &mut out);
        encode_pingreq(&mut out);
        self.got.pings = 0;
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        while self.got.pings == 0 {
            self.read().await?;
        }
        let before = self.got.publishes.len();
        self.granted(id).await?;
        let until = begun + RETAINED_LATE;
        while self.got.publishes.len() < RETAINED && self.read_until(until).await? {}
        let all = std::mem::take(&mut self.got.publishes).len();
        profile.quirks.retained_within =
            (all >= RETAINED).then(|| begun.elapsed().as_millis() as u32);
        profile.quirks.retained_wildcard = Some(all >= RETAINED);
        profile.quirks.retained_marker = (all > 0).then_some(before >= RETAINED);
        if all == 0 {
            profile.quirks.retained_within = self.retained_exact().await?;
        }
        Ok(())
    }

    /// Brokers that have none for wildcards may have one for its topic: milliseconds until it came.
    async fn retained_exact(&mut self) -> Result<Option<u32>, Cut> {
        let begun = Instant::now();
        self.subscribe("r/0", 0, 0, false, Some(4)).await?;
        let until = begun + QUIET_LATE;
        while self.got.publishes.is_empty() && self.read_until(until).await? {}
        let came = !std::mem::take(&mut self.got.publishes).is_empty();
        Ok(came.then(|| begun.elapsed().as_millis() as u32))
    }

    async fn window(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        if self.maximum_qos() == 0 {
            return Ok(());
        }
        self.subscribe("w", 1, 2, true, Some(5)).await?;
        self.hold = true;
        for _ in 0..WINDOW_PROBED {
            self.publish("w", b"window", 1, false).await?;
        }
        self.settle(QUIET).await?;
        if self.held.len() < usize::from(WINDOW_PROBED) {
            self.quiet(QUIET_LATE).await?;
        }
        self.hold = false;
        profile.quirks.window = u16::try_from(self.held.len()).ok();
        self.acknowledge().await?;
        self.settle(QUIET).await?;
        self.got.publishes.clear();
        Ok(())
    }

    async fn shared(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        if !self.capabilities.shared {
            return Ok(());
        }
        // Until it is seen to work it does not.
        profile.quirks.shared = SharedSubscriptions::Refused;
        let qos = self.maximum_qos().min(1);
        let name = format!("$share/tidegate-probe/{}/s", self.topic);
        let mut out = Vec::new();
        let id = self.encode_exact(&name, qos, 2, true, Some(6), &mut out);
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        if let Err(Cut(why)) = self.granted(id).await {
            profile.missing.push(format!("shared subscriptions: {why}"));
            return Ok(());
        }
        profile.quirks.shared = SharedSubscriptions::Dead;
        self.publish("s", b"shared", qos, false).await?;
        let until = Instant::now() + QUIET_LATE;
        while self.got.publishes.is_empty() && self.read_until(until).await? {}
        if !self.got.publishes.is_empty() {
            profile.quirks.shared = SharedSubscriptions::Alive;
            self.got.publishes.clear();
        }
        Ok(())
    }

    async fn software(&mut self, profile: &mut BrokerProfile) -> Result<(), Cut> {
        let mut out = Vec::new();
        let id = self.encode_exact("$SYS/broker/version", 0, 0, false, None, &mut out);
        // A core may close the connection at this: nothing is lost then.
        if self.io.write_all(&out).await.is_err() || self.granted(id).await.is_err() {
            return Ok(());
        }
        let until = Instant::now() + QUIET;
        while self.got.publishes.is_empty() && matches!(self.read_until(until).await, Ok(true)) {}
        if let Some(came) = self.got.publishes.pop() {
            let text = String::from_utf8_lossy(&came.payload);
            profile.software = Some(crate::telemetry::clean(&text, 100).to_string());
        }
        Ok(())
    }

    /// Takes the retained messages away again.
    async fn clean_up(&mut self) -> Result<(), Cut> {
        if !self.capabilities.retain_available {
            return Ok(());
        }
        self.publish("o/a", b"", 0, true).await?;
        for n in 0..RETAINED {
            self.publish(&format!("r/{n}"), b"", 0, true).await?;
        }
        self.settle(Duration::ZERO).await?;
        self.got.publishes.clear();
        Ok(())
    }

    /// Subscribes below the probe's topic; `Err` if it is refused.
    async fn subscribe(
        &mut self,
        name: &str,
        qos: u8,
        handling: u8,
        as_published: bool,
        identifier: Option<u32>,
    ) -> Result<(), Cut> {
        let mut out = Vec::new();
        let id = self.encode_subscribe(name, qos, handling, as_published, identifier, &mut out);
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        self.granted(id).await
    }

    fn encode_subscribe(
        &mut self,
        name: &str,
        qos: u8,
        handling: u8,
        as_published: bool,
        identifier: Option<u32>,
        out: &mut Vec<u8>,
    ) -> u16 {
        let filter = format!("{}/{name}", self.topic);
        self.encode_exact(&filter, qos, handling, as_published, identifier, out)
    }

    fn encode_exact(
        &mut self,
        filter: &str,
        qos: u8,
        handling: u8,
        as_published: bool,
        identifier: Option<u32>,
        out: &mut Vec<u8>,
    ) -> u16 {
        let id = self.next_id();
        let options = SubscribeOptions {
            qos: QoS::from_u8(qos).unwrap_or_default(),
            no_local: false,
            retain_as_published: as_published,
            retain_handling: handling,
        };
        let identifier = identifier.filter(|_| self.capabilities.identifiers);
        encode_subscribe(
            self.version,
            id,
            identifier,
            [(filter, options)].into_iter(),
            out,
        );
        id
    }

    async fn granted(&mut self, id: u16) -> Result<(), Cut> {
        loop {
            let known = self.got.subacks.iter().position(|(of, _)| *of == id);
            if let Some(at) = known {
                let (_, codes) = self.got.subacks.swap_remove(at);
                return match codes.first() {
                    Some(code) if *code < 0x80 => Ok(()),
                    Some(code) => Err(Cut(format!("SUBSCRIBE refused with 0x{code:02X}"))),
                    None => Err(Cut("SUBACK without a code".into())),
                };
            }
            self.read().await?;
        }
    }

    /// Publishes below the probe's topic, within the core's Receive Maximum.
    async fn publish(
        &mut self,
        name: &str,
        payload: &[u8],
        qos: u8,
        retain: bool,
    ) -> Result<(), Cut> {
        let qos = QoS::from_u8(qos).unwrap_or_default();
        let mut properties = Vec::new();
        let v5 = self.version == Version::V5;
        if v5 {
            for (key, value) in PROPERTIES {
                Property::UserProperty(key, value).write(&mut properties);
            }
        }
        let message = Message::new(&MessageSpec {
            topic: &format!("{}/{name}", self.topic),
            properties: Properties::own(&properties),
            payload,
            qos,
            retain,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        });
        let packet_id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.next_id(),
        };
        let delivery = Delivery {
            version: self.version,
            dup: false,
            qos,
            retain,
            packet_id,
            alias: Alias::None,
            subscription_ids: &[],
            message_expiry: (v5 && retain).then_some(EXPIRY),
            user_property: None,
            hidden: 0,
        };
        let mut out = Vec::new();
        delivery.encode(&message, &mut out);
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        // One at a time keeps within any Receive Maximum.
        while qos > QoS::AtMostOnce && !self.got.acknowledged.remove(&packet_id) {
            self.read().await?;
        }
        Ok(())
    }

    /// Waits until a PINGREQ is answered and it was quiet for a while.
    async fn settle(&mut self, quiet: Duration) -> Result<(), Cut> {
        let mut out = Vec::new();
        encode_pingreq(&mut out);
        self.got.pings = 0;
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        while self.got.pings == 0 {
            self.read().await?;
        }
        self.quiet(quiet).await
    }

    async fn quiet(&mut self, time: Duration) -> Result<(), Cut> {
        while self.read_until(Instant::now() + time).await? {}
        Ok(())
    }

    /// Reads once; `Err` at the deadline of the probe.
    async fn read(&mut self) -> Result<(), Cut> {
        match self.read_until(self.deadline).await? {
            true => Ok(()),
            false => Err(Cut("no answer in time".into())),
        }
    }

    /// Reads once; false: nothing came until then.
    async fn read_until(&mut self, until: Instant) -> Result<bool, Cut> {
        if self.take()? {
            return Ok(true);
        }
        let until = until.min(self.deadline);
        match timeout_at(until, self.io.read_buf(&mut self.input)).await {
            Err(_) => return Ok(false),
            Ok(Ok(0)) => return Err(Cut("the core closed the connection".into())),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error.into()),
        }
        self.take()?;
        self.acknowledge().await?;
        Ok(true)
    }

    /// PUBACK for what came, unless it is held back. Nothing is subscribed above QoS 1.
    async fn acknowledge(&mut self) -> Result<(), Cut> {
        if self.hold || self.held.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        for id in std::mem::take(&mut self.held) {
            let (version, done) = (self.version, ReasonCode::SUCCESS);
            encode_ack(version, AckKind::Puback, id, done, None, &mut out);
        }
        self.io.write_all(&out).await?;
        self.io.flush().await?;
        Ok(())
    }

    fn next_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    /// Takes the packets that are there; whether there was one.
    fn take(&mut self) -> Result<bool, Cut> {
        let mut some = false;
        loop {
            let (packet, used) = match self.decoder.next(&self.input) {
                Ok(Some(next)) => next,
                Ok(None) => return Ok(some),
                Err(e) => return Err(Cut(format!("a packet that is not legal: {e}"))),
            };
            some = true;
            match packet {
                Packet::Publish(p) => {
                    if p.qos > QoS::AtMostOnce {
                        self.held.push(p.packet_id);
                    }
                    let properties = p.properties.user_properties();
                    self.got.publishes.push(Came {
                        payload: p.payload.to_vec(),
                        qos: p.qos,
                        retain: p.retain,
                        ids: p.subscription_ids().collect(),
                        properties: properties.map(|(k, v)| (k.into(), v.into())).collect(),
                    });
                }
                Packet::Suback(s) => self.got.subacks.push((s.packet_id, s.codes.to_vec())),
                Packet::Puback(a) => {
                    if a.reason.is_error() {
                        return Err(Cut(format!("PUBLISH refused: {}", a.reason.name())));
                    }
                    self.got.acknowledged.insert(a.packet_id);
                }
                Packet::Pingresp => self.got.pings += 1,
                Packet::Disconnect(d) => {
                    return Err(Cut(format!(
                        "the core sent DISCONNECT: {}",
                        d.reason.name()
                    )));
                }
                _ => {}
            }
            let _ = self.input.split_to(used);
        }
    }
}

#[cfg(test)]
mod tests;
