//! The connection of a probe: requests to the broker, and the packets that arrived.

mod interrupted;
mod nagle;

use std::collections::BTreeSet;
use std::time::Duration;

use crate::transport::dial::QuickAck;
use crate::upstream::profile::probe::ANSWER_TIME;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::mqtt::{
    AckKind, Alias, Decoder, Delivery, Message, MessageSpec, Packet, Properties, Property, QoS,
    ReasonCode, Receiver, SubscribeOptions, Version, encode_ack, encode_disconnect, encode_pingreq,
    encode_subscribe,
};

pub(super) use interrupted::Interrupted;

/// The user properties of each message that a probe publishes.
pub(super) const PROPERTIES: [(&str, &str); 3] = [("a", "1"), ("b", "2"), ("a", "3")];

/// How long retained messages outlive a probe that was cut off, seconds.
const RETAINED_EXPIRY_SECONDS: u32 = 60;
/// Largest packet that is accepted: far more than the probe's own.
const PACKET_MAX_BYTES: u32 = 64 * 1024;
/// Bytes that may arrive in all: far more than the probe asks for.
const INPUT_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of a payload that are kept. The probe's own are shorter.
const PAYLOAD_KEPT_BYTES: usize = 100;
/// User properties of a message that are kept. The probe's own have fewer.
const PROPERTIES_KEPT: usize = 8;
/// Messages of the probe that may have arrived and not been looked at.
const ARRIVED_MAX: usize = 512;
/// Publishes that are sent at once, if the broker's Receive Maximum allows for it.
const AT_ONCE_MAX: usize = 64;
/// The least and the longest time that missing messages are waited for.
const LATE_MIN: Duration = Duration::from_millis(50);
const LATE_MAX: Duration = Duration::from_secs(1);
/// Once a PINGREQ is answered, nothing more arrives after this much quiet, or more if the broker's
/// answers take longer.
const QUIET_MIN: Duration = Duration::from_millis(20);
const QUIET_MAX: Duration = Duration::from_millis(200);
/// The topic of the broker's name and version.
pub(super) const VERSION_TOPIC: &str = "$SYS/broker/version";
/// The payload of the retained messages.
pub(super) const RETAINED_PAYLOAD: &[u8] = b"retained";
/// How long the DISCONNECT may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A PUBLISH that arrived on a topic of the probe.
pub(super) struct Arrived {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub retain: bool,
    pub ids: Vec<u32>,
    pub properties: Vec<(String, String)>,
}

impl Arrived {
    /// Whether it has this payload, and this topic or one below it if it ends in a slash.
    fn is(&self, topic: &str, payload: &[u8]) -> bool {
        let same = match topic.ends_with('/') {
            true => self.topic.starts_with(topic),
            false => self.topic == topic,
        };
        same && self.payload == payload
    }
}

/// A subscription of a probe.
#[derive(Clone, Copy)]
pub(super) struct Subscription<'a> {
    /// The filter: below the probe's topic, unless a call says otherwise.
    pub filter: &'a str,
    pub qos: QoS,
    /// Retain Handling 0: retained messages are wanted.
    pub replay: bool,
    pub retain_as_published: bool,
    pub identifier: Option<u32>,
}

impl<'a> Subscription<'a> {
    /// A subscription to live messages.
    pub(super) fn live(filter: &'a str, qos: QoS, identifier: u32) -> Self {
        Self {
            filter,
            qos,
            replay: false,
            retain_as_published: true,
            identifier: Some(identifier),
        }
    }

    /// A subscription to retained messages, at QoS 0.
    pub(super) fn retained(filter: &'a str, identifier: Option<u32>) -> Self {
        Self {
            filter,
            qos: QoS::AtMostOnce,
            replay: true,
            retain_as_published: false,
            identifier,
        }
    }
}

/// The connection, with the packets that arrived and have not been looked at.
pub(super) struct ProbeConnection<'a, IO> {
    io: &'a mut IO,
    version: Version,
    /// Everything is published below this topic.
    topic: &'a str,
    /// Whether SUBSCRIBE may carry an identifier.
    identifiers: bool,
    decoder: Decoder,
    input: BytesMut,
    /// Bytes that have arrived in all.
    arrived_bytes: usize,
    last_id: u16,
    deadline: Instant,
    /// When bytes were last sent.
    asked_at: Instant,
    /// Publishes that may be unacknowledged.
    at_once: usize,
    /// The longest time that the broker took for an answer.
    slowest: Duration,
    /// TCP acknowledgements may be delayed.
    delays_acks: bool,
    /// PUBLISH packets are not acknowledged for now.
    pub keep_unacknowledged: bool,
    /// Packet identifiers of PUBLISH packets without an acknowledgement.
    pub unacknowledged: Vec<u16>,
    /// PUBLISH packets that arrived.
    pub arrived: Vec<Arrived>,
    subacks: Vec<(u16, Vec<u8>)>,
    pubacks: BTreeSet<u16>,
    pingresps: usize,
}

impl<'a, IO> ProbeConnection<'a, IO>
where
    IO: AsyncRead + AsyncWrite + QuickAck + Unpin + Send,
{
    /// A connection that CONNACK has arrived on. `rest`: bytes that arrived after it.
    pub(super) fn new(
        io: &'a mut IO,
        version: Version,
        topic: &'a str,
        identifiers: bool,
        receive_maximum: u16,
        rest: BytesMut,
        deadline: Instant,
    ) -> Self {
        Self {
            io,
            version,
            topic,
            identifiers,
            decoder: Decoder {
                version,
                receiver: Receiver::Client,
                max: PACKET_MAX_BYTES,
            },
            arrived_bytes: rest.len(),
            input: rest,
            last_id: 0,
            deadline,
            asked_at: Instant::now(),
            at_once: usize::from(receive_maximum).clamp(1, AT_ONCE_MAX),
            slowest: Duration::ZERO,
            delays_acks: false,
            keep_unacknowledged: false,
            unacknowledged: Vec::new(),
            arrived: Vec::new(),
            subacks: Vec::new(),
            pubacks: BTreeSet::new(),
            pingresps: 0,
        }
    }

    /// The filter below the probe's topic.
    pub(super) fn below(&self, name: &str) -> String {
        format!("{}/{name}", self.topic)
    }

    /// Subscribes below the probe's topic. `Err` if the broker refuses it.
    pub(super) async fn subscribe(
        &mut self,
        subscription: Subscription<'_>,
    ) -> Result<(), Interrupted> {
        let filter = self.below(subscription.filter);
        let id = self
            .send_subscribe(&Subscription {
                filter: &filter,
                ..subscription
            })
            .await?;
        self.granted(id).await
    }

    /// Subscribes to exactly this filter, and returns the packet identifier at once.
    pub(super) async fn send_subscribe(
        &mut self,
        subscription: &Subscription<'_>,
    ) -> Result<u16, Interrupted> {
        let mut out = Vec::new();
        let id = self.encode_subscribe(subscription, &mut out);
        self.write(&out).await?;
        Ok(id)
    }

    /// Sends a SUBSCRIBE below the probe's topic and a PINGREQ in one write. Waits for the PINGRESP,
    /// and returns how many messages of the probe arrived before it.
    pub(super) async fn subscribe_and_ping(
        &mut self,
        subscription: Subscription<'_>,
    ) -> Result<usize, Interrupted> {
        let filter = self.below(subscription.filter);
        let mut out = Vec::new();
        let id = self.encode_subscribe(
            &Subscription {
                filter: &filter,
                ..subscription
            },
            &mut out,
        );
        self.ping(out).await?;
        let before = self.count("r/", RETAINED_PAYLOAD);
        self.granted(id).await?;
        Ok(before)
    }

    fn encode_subscribe(&mut self, subscription: &Subscription<'_>, out: &mut Vec<u8>) -> u16 {
        let id = self.next_id();
        let options = SubscribeOptions {
            qos: subscription.qos,
            no_local: false,
            retain_as_published: subscription.retain_as_published,
            retain_handling: if subscription.replay { 0 } else { 2 },
        };
        let identifier = subscription.identifier.filter(|_| self.identifiers);
        let filters = [(subscription.filter, options)].into_iter();
        encode_subscribe(self.version, id, identifier, filters, out);
        id
    }

    /// Waits for the SUBACK of this packet identifier. `Err` if the broker refuses.
    pub(super) async fn granted(&mut self, id: u16) -> Result<(), Interrupted> {
        let begun = Instant::now();
        loop {
            let known = self.subacks.iter().position(|(of, _)| *of == id);
            if let Some(at) = known {
                let (_, codes) = self.subacks.swap_remove(at);
                self.answered_since(begun);
                return match codes.first() {
                    Some(code) if *code < 0x80 => Ok(()),
                    Some(code) => Err(Interrupted::SubscribeRefused(*code)),
                    None => Err(Interrupted::EmptySuback),
                };
            }
            self.read().await?;
        }
    }

    /// Publishes below the probe's topic, and waits for the acknowledgement.
    pub(super) async fn publish(
        &mut self,
        name: &str,
        payload: &[u8],
        qos: QoS,
        retain: bool,
    ) -> Result<(), Interrupted> {
        let names = [name.to_owned()];
        self.publish_all(&names, payload, qos, retain).await
    }

    /// Publishes to topics below the probe's, as many at once as the broker's Receive Maximum allows, and
    /// waits for the acknowledgements.
    pub(super) async fn publish_all(
        &mut self,
        names: &[String],
        payload: &[u8],
        qos: QoS,
        retain: bool,
    ) -> Result<(), Interrupted> {
        for names in names.chunks(self.at_once) {
            let mut out = Vec::new();
            let mut ids = Vec::new();
            for name in names {
                let id = match qos {
                    QoS::AtMostOnce => 0,
                    _ => self.next_id(),
                };
                self.encode_publish(name, payload, (qos, id), retain, &mut out);
                ids.extend((id > 0).then_some(id));
            }
            let begun = Instant::now();
            self.write(&out).await?;
            for id in ids {
                while !self.pubacks.remove(&id) {
                    self.read().await?;
                }
            }
            self.answered_since(begun);
        }
        Ok(())
    }

    fn encode_publish(
        &self,
        name: &str,
        payload: &[u8],
        (qos, packet_id): (QoS, u16),
        retain: bool,
        out: &mut Vec<u8>,
    ) {
        let v5 = self.version == Version::V5;
        let mut properties = Vec::new();
        if v5 {
            for (key, value) in PROPERTIES {
                Property::UserProperty(key, value).write(&mut properties);
            }
        }
        let message = Message::new(&MessageSpec {
            topic: &self.below(name),
            properties: Properties::own(&properties),
            payload,
            qos,
            retain,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let delivery = Delivery {
            version: self.version,
            dup: false,
            qos,
            retain,
            packet_id,
            alias: Alias::None,
            subscription_ids: &[],
            message_expiry: (v5 && retain).then_some(RETAINED_EXPIRY_SECONDS),
            user_property: None,
            hidden: 0,
        };
        delivery.encode(&message, out);
    }

    /// The broker has answered a request that was sent then.
    fn answered_since(&mut self, begun: Instant) {
        self.slowest = self.slowest.max(begun.elapsed());
    }

    /// How long to wait for messages that may arrive later than the answers.
    pub(super) fn late(&self) -> Duration {
        (self.slowest * 4).clamp(LATE_MIN, LATE_MAX)
    }

    /// Takes the messages that arrived with this payload on a topic below the probe's, and forgets the
    /// others.
    pub(super) fn take(&mut self, name: &str, payload: &[u8]) -> Vec<Arrived> {
        let topic = self.below(name);
        let mut arrived = std::mem::take(&mut self.arrived);
        arrived.retain(|a| a.is(&topic, payload));
        arrived
    }

    /// The messages that have arrived with this payload on topics that begin so below the probe's.
    fn count(&self, name: &str, payload: &[u8]) -> usize {
        let topic = self.below(name);
        let matching = self.arrived.iter().filter(|a| a.is(&topic, payload));
        matching.count()
    }

    /// Waits until a PINGREQ is answered and nothing has arrived for a while.
    pub(super) async fn settle(&mut self) -> Result<(), Interrupted> {
        self.ping(Vec::new()).await?;
        self.quiet(self.slowest.clamp(QUIET_MIN, QUIET_MAX)).await
    }

    /// Sends these bytes and a PINGREQ, and waits for its answer.
    async fn ping(&mut self, mut out: Vec<u8>) -> Result<(), Interrupted> {
        encode_pingreq(&mut out);
        self.pingresps = 0;
        let begun = Instant::now();
        self.write(&out).await?;
        while self.pingresps == 0 {
            self.read().await?;
        }
        self.answered_since(begun);
        Ok(())
    }

    /// Reads until nothing has arrived for this long.
    pub(super) async fn quiet(&mut self, time: Duration) -> Result<(), Interrupted> {
        while self.read_until(Instant::now() + time).await? {}
        Ok(())
    }

    /// Reads until this many messages have arrived with this payload on topics that begin so below the
    /// probe's, at most until then. Returns how many there are.
    pub(super) async fn wait_for(
        &mut self,
        count: usize,
        (name, payload): (&str, &[u8]),
        until: Instant,
    ) -> Result<usize, Interrupted> {
        while self.count(name, payload) < count && self.read_until(until).await? {}
        Ok(self.count(name, payload))
    }

    /// Reads until the broker's version has arrived, at most until then.
    pub(super) async fn version(&mut self, until: Instant) -> Result<Option<Vec<u8>>, Interrupted> {
        loop {
            let said = |a: &Arrived| a.topic == VERSION_TOPIC;
            if let Some(at) = self.arrived.iter().position(said) {
                return Ok(Some(self.arrived.swap_remove(at).payload));
            }
            if !self.read_until(until).await? {
                return Ok(None);
            }
        }
    }

    /// Reads once, for the answer to a request that was sent last. `Err` if it takes too long.
    async fn read(&mut self) -> Result<(), Interrupted> {
        match self.read_until(self.asked_at + ANSWER_TIME).await? {
            true => Ok(()),
            false => Err(Interrupted::Timeout),
        }
    }

    /// Reads once. Returns false if nothing arrived until then.
    async fn read_until(&mut self, until: Instant) -> Result<bool, Interrupted> {
        if self.decode()? {
            return Ok(true);
        }
        let until = until.min(self.deadline);
        if !self.delays_acks {
            self.io.quick_ack(true);
        }
        match timeout_at(until, self.io.read_buf(&mut self.input)).await {
            Err(_) => return Ok(false),
            Ok(Ok(0)) => return Err(Interrupted::Closed),
            Ok(Ok(read)) => self.arrived_bytes += read,
            Ok(Err(error)) => return Err(error.into()),
        }
        if self.arrived_bytes > INPUT_MAX_BYTES {
            return Err(Interrupted::TooMuch);
        }
        self.decode()?;
        self.acknowledge().await?;
        Ok(true)
    }

    /// Acknowledges all PUBLISH packets, unless that is suspended. All subscriptions have QoS 1 or 0.
    pub(super) async fn acknowledge(&mut self) -> Result<(), Interrupted> {
        if self.keep_unacknowledged || self.unacknowledged.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        for id in std::mem::take(&mut self.unacknowledged) {
            let (version, done) = (self.version, ReasonCode::SUCCESS);
            encode_ack(version, AckKind::Puback, id, done, None, &mut out);
        }
        self.write(&out).await
    }

    /// Sends DISCONNECT and closes the connection.
    pub(super) async fn close(self) {
        let mut out = Vec::new();
        encode_disconnect(self.version, ReasonCode::SUCCESS, None, None, &mut out);
        let io = self.io;
        let closing = async {
            io.write_all(&out).await?;
            io.shutdown().await
        };
        // The session is clean: it ends with the connection whether or not this succeeds.
        let _ = timeout(CLOSE_TIMEOUT, closing).await;
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Interrupted> {
        self.asked_at = Instant::now();
        self.io.write_all(bytes).await?;
        Ok(self.io.flush().await?)
    }

    fn next_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    /// Takes the packets that have arrived. Returns whether there was one.
    fn decode(&mut self) -> Result<bool, Interrupted> {
        let mut any = false;
        loop {
            let (packet, used) = match self.decoder.next(&self.input) {
                Ok(Some(next)) => next,
                Ok(None) => return Ok(any),
                Err(e) => return Err(Interrupted::Malformed(e)),
            };
            any = true;
            match packet {
                Packet::Publish(p) => {
                    if p.qos > QoS::AtMostOnce {
                        self.unacknowledged.push(p.packet_id);
                    }
                    // A broker may send messages that the probe did not ask for.
                    let below = p.topic.strip_prefix(self.topic);
                    let ours = below.is_some_and(|rest| rest.starts_with('/'));
                    if !ours && p.topic != VERSION_TOPIC {
                        let _ = self.input.split_to(used);
                        continue;
                    }
                    if self.arrived.len() >= ARRIVED_MAX {
                        return Err(Interrupted::TooMuch);
                    }
                    let properties = p.properties.user_properties();
                    self.arrived.push(Arrived {
                        topic: p.topic.to_owned(),
                        payload: p.payload[..p.payload.len().min(PAYLOAD_KEPT_BYTES)].to_vec(),
                        qos: p.qos,
                        retain: p.retain,
                        ids: p.subscription_ids().collect(),
                        properties: properties
                            .take(PROPERTIES_KEPT)
                            .map(|(k, v)| (k.into(), v.into()))
                            .collect(),
                    });
                }
                Packet::Suback(s) if s.packet_id <= self.last_id => {
                    self.subacks.push((s.packet_id, s.codes.to_vec()));
                }
                Packet::Puback(a) => {
                    if a.reason.is_error() {
                        return Err(Interrupted::PublishRefused(a.reason));
                    }
                    self.pubacks.insert(a.packet_id);
                }
                Packet::Pingresp => self.pingresps += 1,
                Packet::Disconnect(d) => return Err(Interrupted::Disconnect(d.reason)),
                _ => {}
            }
            let _ = self.input.split_to(used);
        }
    }
}
