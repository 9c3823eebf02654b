//! The connection of a probe: requests to the broker, and the packets that arrived.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::mqtt::{
    AckKind, Alias, Decoder, Delivery, Error, Message, MessageSpec, Packet, Properties, Property,
    QoS, ReasonCode, Receiver, SubscribeOptions, Version, encode_ack, encode_disconnect,
    encode_pingreq, encode_subscribe,
};

/// The user properties of each message that a probe publishes.
pub(super) const PROPERTIES: [(&str, &str); 3] = [("a", "1"), ("b", "2"), ("a", "3")];

/// How long retained messages outlive a probe that was cut off, seconds.
const RETAINED_EXPIRY_SECONDS: u32 = 60;
/// Largest packet that is accepted.
const PACKET_MAX_BYTES: u32 = 1024 * 1024;
/// How long the DISCONNECT may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a step of a probe could not be completed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Interrupted {
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The broker closed the connection.
    #[error("the broker closed the connection")]
    Closed,
    /// The broker sent DISCONNECT.
    #[error("the broker sent DISCONNECT: {}", .0.name())]
    Disconnect(ReasonCode),
    /// The broker sent bytes that are not a legal packet.
    #[error("a packet that is not legal: {0}")]
    Malformed(Error),
    /// An answer did not arrive before the deadline of the probe.
    #[error("no answer in time")]
    Timeout,
    /// A SUBACK refuses the filter with this code.
    #[error("SUBSCRIBE refused with 0x{0:02X}")]
    SubscribeRefused(u8),
    /// A SUBACK has no code.
    #[error("SUBACK without a code")]
    EmptySuback,
    /// A PUBACK refuses the publish.
    #[error("PUBLISH refused: {}", .0.name())]
    PublishRefused(ReasonCode),
    /// The broker delivered no copy of a publish.
    #[error("nothing came back")]
    NothingDelivered,
}

/// A PUBLISH that arrived.
pub(super) struct Arrived {
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub retain: bool,
    pub ids: Vec<u32>,
    pub properties: Vec<(String, String)>,
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
    last_id: u16,
    deadline: Instant,
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
    IO: AsyncRead + AsyncWrite + Unpin + Send,
{
    /// A connection that CONNACK has arrived on. `rest`: bytes that arrived after it.
    pub(super) fn new(
        io: &'a mut IO,
        version: Version,
        topic: &'a str,
        identifiers: bool,
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
            input: rest,
            last_id: 0,
            deadline,
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
    /// and returns how many messages arrived before it.
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
        let before = self.arrived.len();
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
        loop {
            let known = self.subacks.iter().position(|(of, _)| *of == id);
            if let Some(at) = known {
                let (_, codes) = self.subacks.swap_remove(at);
                return match codes.first() {
                    Some(code) if *code < 0x80 => Ok(()),
                    Some(code) => Err(Interrupted::SubscribeRefused(*code)),
                    None => Err(Interrupted::EmptySuback),
                };
            }
            self.read().await?;
        }
    }

    /// Publishes below the probe's topic, and waits for the acknowledgement: one publish at a time is
    /// within any Receive Maximum.
    pub(super) async fn publish(
        &mut self,
        name: &str,
        payload: &[u8],
        qos: QoS,
        retain: bool,
    ) -> Result<(), Interrupted> {
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
            message_expiry: (v5 && retain).then_some(RETAINED_EXPIRY_SECONDS),
            user_property: None,
            hidden: 0,
        };
        let mut out = Vec::new();
        delivery.encode(&message, &mut out);
        self.write(&out).await?;
        while qos > QoS::AtMostOnce && !self.pubacks.remove(&packet_id) {
            self.read().await?;
        }
        Ok(())
    }

    /// Waits until a PINGREQ is answered and nothing has arrived for a while.
    pub(super) async fn settle(&mut self, quiet: Duration) -> Result<(), Interrupted> {
        self.ping(Vec::new()).await?;
        self.quiet(quiet).await
    }

    /// Sends these bytes and a PINGREQ, and waits for its answer.
    async fn ping(&mut self, mut out: Vec<u8>) -> Result<(), Interrupted> {
        encode_pingreq(&mut out);
        self.pingresps = 0;
        self.write(&out).await?;
        while self.pingresps == 0 {
            self.read().await?;
        }
        Ok(())
    }

    /// Reads until nothing has arrived for this long.
    pub(super) async fn quiet(&mut self, time: Duration) -> Result<(), Interrupted> {
        while self.read_until(Instant::now() + time).await? {}
        Ok(())
    }

    /// Reads until this many messages have arrived, at most until then.
    pub(super) async fn wait_for(
        &mut self,
        count: usize,
        until: Instant,
    ) -> Result<(), Interrupted> {
        while self.arrived.len() < count && self.read_until(until).await? {}
        Ok(())
    }

    /// Reads once. `Err` at the deadline of the probe.
    async fn read(&mut self) -> Result<(), Interrupted> {
        match self.read_until(self.deadline).await? {
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
        match timeout_at(until, self.io.read_buf(&mut self.input)).await {
            Err(_) => return Ok(false),
            Ok(Ok(0)) => return Err(Interrupted::Closed),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error.into()),
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
                    let properties = p.properties.user_properties();
                    self.arrived.push(Arrived {
                        payload: p.payload.to_vec(),
                        qos: p.qos,
                        retain: p.retain,
                        ids: p.subscription_ids().collect(),
                        properties: properties.map(|(k, v)| (k.into(), v.into())).collect(),
                    });
                }
                Packet::Suback(s) => self.subacks.push((s.packet_id, s.codes.to_vec())),
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
