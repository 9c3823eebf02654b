//! A client that says exactly what a test tells it to, and nothing else.

use std::time::Duration;

use tidegate::embedded::EmbeddedBroker;
use tidegate::mqtt::{
    AckKind, Alias, Connect, Decoder, Delivery, Message, MessageSpec, Packet, Properties, QoS,
    ReasonCode, Receiver, SubscribeOptions, Version, encode_ack, encode_disconnect,
    encode_subscribe, encode_unsubscribe,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

pub(super) const NEVER: u32 = u32::MAX;

pub(super) struct Client {
    io: DuplexStream,
    buf: Vec<u8>,
    decoder: Decoder,
}

/// What a test wants to know of a packet that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Got {
    Connack {
        present: bool,
        reason: u8,
    },
    Publish(Publish),
    /// First byte without its flags, packet id, reason code.
    Ack(AckKind, u16, u8),
    Suback(u16, Vec<u8>),
    Unsuback(u16, Vec<u8>),
    Pingresp,
    Disconnect(u8),
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Publish {
    pub topic: String,
    pub payload: String,
    pub qos: u8,
    pub dup: bool,
    pub retain: bool,
    pub id: u16,
    pub ids: Vec<u32>,
    pub expiry: Option<u32>,
    pub user: Vec<(String, String)>,
}

pub(super) fn v5(client_id: &str) -> Connect<'_> {
    Connect {
        client_id,
        ..Connect::default()
    }
}

/// MQTT 5, Clean Start 0, a session that never ends.
pub(super) fn kept(client_id: &str) -> Connect<'_> {
    Connect {
        client_id,
        clean_start: false,
        session_expiry: Some(NEVER),
        ..Connect::default()
    }
}

pub(super) fn options(qos: u8) -> SubscribeOptions {
    SubscribeOptions {
        qos: QoS::from_u8(qos).expect("0 to 2"),
        no_local: false,
        retain_as_published: false,
        retain_handling: 0,
    }
}

impl Client {
    /// A connection without CONNECT.
    pub(super) fn open(broker: &EmbeddedBroker, version: Version) -> Client {
        let decoder = Decoder {
            version,
            receiver: Receiver::Client,
            max: 1 << 24,
        };
        Client {
            io: broker.connect(),
            buf: Vec::new(),
            decoder,
        }
    }

    pub(super) async fn try_connect(
        broker: &EmbeddedBroker,
        connect: &Connect<'_>,
    ) -> (Client, Got) {
        let mut client = Client::open(broker, connect.version);
        client.send(|out| connect.encode(out)).await;
        let got = client.next().await;
        (client, got)
    }

    /// Connects and expects success; the flag is Session Present.
    pub(super) async fn connect(broker: &EmbeddedBroker, connect: &Connect<'_>) -> (Client, bool) {
        let (client, got) = Client::try_connect(broker, connect).await;
        match got {
            Got::Connack { present, reason: 0 } => (client, present),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn send(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut out = Vec::new();
        encode(&mut out);
        // A closed connection is seen by the read that follows.
        let _ = self.io.write_all(&out).await;
    }

    /// The next packet, as `f` sees it; None at the end of the connection.
    pub(super) async fn next_with<R>(&mut self, f: impl FnOnce(&Packet<'_>) -> R) -> Option<R> {
        loop {
            let found = self.decoder.next(&self.buf).expect("a legal packet");
            if let Some((packet, n)) = found {
                let result = f(&packet);
                self.buf.drain(..n);
                return Some(result);
            }
            if self.io.read_buf(&mut self.buf).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub(super) async fn next(&mut self) -> Got {
        let wait = self.next_with(got);
        let packet = tokio::time::timeout(Duration::from_secs(3600), wait).await;
        packet
            .expect("a packet within an hour")
            .unwrap_or(Got::Closed)
    }

    pub(super) async fn publish_got(&mut self) -> Publish {
        match self.next().await {
            Got::Publish(publish) => publish,
            other => panic!("{other:?}"),
        }
    }

    /// Nothing comes for a while.
    pub(super) async fn quiet(&mut self) {
        let wait = self.next_with(got);
        if let Ok(found) = tokio::time::timeout(Duration::from_millis(20), wait).await {
            panic!("{found:?}");
        }
    }

    pub(super) async fn ack(&mut self, kind: AckKind, id: u16) {
        let version = self.decoder.version;
        self.send(|out| encode_ack(version, kind, id, ReasonCode::SUCCESS, None, out))
            .await;
    }

    pub(super) async fn publish_as(&mut self, delivery: Delivery<'_>, topic: &str, payload: &str) {
        let message = Message::new(&MessageSpec {
            topic,
            properties: Properties::default(),
            payload: payload.as_bytes(),
            qos: delivery.qos,
            retain: delivery.retain,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        self.send(|out| delivery.encode(&message, out)).await;
    }

    pub(super) async fn publish(&mut self, topic: &str, payload: &str, qos: u8, id: u16) {
        let delivery = self.delivery(qos, id);
        self.publish_as(delivery, topic, payload).await;
    }

    pub(super) async fn retain(&mut self, topic: &str, payload: &str) {
        let delivery = Delivery {
            retain: true,
            ..self.delivery(0, 0)
        };
        self.publish_as(delivery, topic, payload).await;
    }

    pub(super) fn delivery(&self, qos: u8, packet_id: u16) -> Delivery<'static> {
        Delivery {
            version: self.decoder.version,
            dup: false,
            qos: QoS::from_u8(qos).expect("0 to 2"),
            retain: false,
            packet_id,
            alias: Alias::None,
            message_expiry: None,
            subscription_ids: &[],
            user_property: None,
            hidden: 0,
        }
    }

    /// Subscribes, and returns the SUBACK codes.
    pub(super) async fn subscribe(
        &mut self,
        id: Option<u32>,
        filters: &[(&str, SubscribeOptions)],
    ) -> Vec<u8> {
        let version = self.decoder.version;
        self.send(|out| encode_subscribe(version, 7, id, filters.iter().copied(), out))
            .await;
        match self.next().await {
            Got::Suback(7, codes) => codes,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn unsubscribe(&mut self, filter: &str) -> Vec<u8> {
        let version = self.decoder.version;
        self.send(|out| encode_unsubscribe(version, 8, std::iter::once(filter), out))
            .await;
        match self.next().await {
            Got::Unsuback(8, codes) => codes,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn disconnect(mut self, reason: ReasonCode, expiry: Option<u32>) -> Got {
        let version = self.decoder.version;
        self.send(|out| encode_disconnect(version, reason, expiry, None, out))
            .await;
        self.next().await
    }
}

fn got(packet: &Packet<'_>) -> Got {
    match packet {
        Packet::Connack(c) => Got::Connack {
            present: c.session_present,
            reason: c.reason.0,
        },
        Packet::Publish(p) => Got::Publish(Publish {
            topic: p.topic.into(),
            payload: String::from_utf8_lossy(p.payload).into(),
            qos: p.qos as u8,
            dup: p.dup,
            retain: p.retain,
            id: p.packet_id,
            ids: p.subscription_ids().collect(),
            expiry: p.message_expiry,
            user: p
                .properties
                .user_properties()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        }),
        Packet::Puback(a) => Got::Ack(AckKind::Puback, a.packet_id, a.reason.0),
        Packet::Pubrec(a) => Got::Ack(AckKind::Pubrec, a.packet_id, a.reason.0),
        Packet::Pubrel(a) => Got::Ack(AckKind::Pubrel, a.packet_id, a.reason.0),
        Packet::Pubcomp(a) => Got::Ack(AckKind::Pubcomp, a.packet_id, a.reason.0),
        Packet::Suback(s) => Got::Suback(s.packet_id, s.codes.to_vec()),
        Packet::Unsuback(s) => Got::Unsuback(s.packet_id, s.codes.to_vec()),
        Packet::Pingresp => Got::Pingresp,
        Packet::Disconnect(d) => Got::Disconnect(d.reason.0),
        other => panic!("{other:?}"),
    }
}
