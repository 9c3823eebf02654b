//! An MQTT client for tests: it sends the packets that a test gives it, decodes every packet that
//! arrives, and hides none.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use thiserror::Error;
use tokio::time::timeout;

use crate::dial::Dialer;
use crate::link::{Abandoned, Cut, Link};
use crate::wire::{
    Ack, Codes, ConnAck, Connect, Packet, Publish, Reason, Subscribe, Unsubscribe, Version,
    WireError, decode, encode, kind, put_ack,
};

/// How long one answer may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The errors of a test client.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The transport failed.
    #[error("transport: {0}")]
    Io(#[from] io::Error),
    /// The server sent an illegal packet.
    #[error("illegal packet from the server: {0}")]
    Wire(#[from] WireError),
    /// The server ended the stream.
    #[error("the server closed the connection")]
    Closed,
    /// The server refused the connection.
    #[error("refused with code {:#04x}", .0.code)]
    Refused(ConnAck),
    /// No packet came in time.
    #[error("no {0} within the time allowed")]
    Timeout(&'static str),
    /// The client waited for one packet, and another came.
    #[error("waited for {wanted}, got {got:?}")]
    Unexpected {
        /// The expected packet.
        wanted: &'static str,
        /// The packet that came.
        got: Box<Packet>,
    },
}

/// One MQTT connection.
#[derive(Debug)]
pub struct Client {
    link: Link,
    version: Version,
    received: BytesMut,
    out: BytesMut,
    scratch: Vec<u8>,
    last_id: u16,
    /// Packets that came while the client waited for another, oldest first.
    aside: std::collections::VecDeque<Packet>,
}

impl Client {
    /// Opens a link, sends CONNECT and waits for a CONNACK that grants it.
    ///
    /// # Errors
    /// The transport failed, the server refused or was silent.
    pub async fn connect(
        dialer: &Dialer,
        connect: &Connect,
    ) -> Result<(Self, ConnAck), ClientError> {
        timeout(PATIENCE, async {
            let mut client = Self::over(dialer.open().await?, connect.version);
            client
                .send(&Packet::Connect(Box::new(connect.clone())))
                .await?;
            match client.next().await? {
                Packet::ConnAck(ack) if ack.code == 0 => Ok((client, ack)),
                Packet::ConnAck(ack) => Err(ClientError::Refused(ack)),
                got => Err(ClientError::Unexpected {
                    wanted: "CONNACK",
                    got: Box::new(got),
                }),
            }
        })
        .await
        .map_err(|_| ClientError::Timeout("CONNACK"))?
    }

    /// A client over an open link; it has not sent CONNECT yet.
    pub fn over(link: Link, version: Version) -> Self {
        Self {
            link,
            version,
            received: BytesMut::new(),
            out: BytesMut::new(),
            scratch: Vec::new(),
            last_id: 0,
            aside: std::collections::VecDeque::new(),
        }
    }

    /// Takes the client apart into its link and the bytes already read from it, for a caller with a
    /// faster loop of its own.
    pub fn into_parts(self) -> (Link, BytesMut) {
        (self.link, self.received)
    }

    /// The protocol version that this client speaks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The link below.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// A packet identifier that was not used lately.
    pub fn new_id(&mut self) -> u16 {
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.last_id
    }

    /// Sends one packet. The client reads meanwhile, so that a link that is full in both directions
    /// cannot block it.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn send(&mut self, packet: &Packet) -> Result<(), ClientError> {
        self.queue(packet);
        self.flush().await
    }

    /// Puts one packet into the output buffer; [`next`](Self::next) and [`flush`](Self::flush) send it.
    pub fn queue(&mut self, packet: &Packet) {
        self.scratch.clear();
        encode(packet, self.version, &mut self.scratch);
        self.out.extend_from_slice(&self.scratch);
    }

    /// Puts raw bytes into the output buffer.
    pub fn queue_raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Sends the output buffer.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        while !self.out.is_empty() {
            if !self.link.drive(&mut self.out, &mut self.received).await?.1 {
                return Err(ClientError::Closed);
            }
        }
        // A WebSocket message may have been taken over and not yet be on the wire.
        Ok(self.link.flush(&mut self.out).await?)
    }

    /// The next packet, in the order of the wire. Cancel safe.
    ///
    /// # Errors
    /// The transport failed, ended, or carried an illegal packet.
    pub async fn next(&mut self) -> Result<Packet, ClientError> {
        if let Some(packet) = self.aside.pop_front() {
            return Ok(packet);
        }
        self.fresh().await
    }

    /// The next packet, or `None` if none comes within `wait`.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn next_within(&mut self, wait: Duration) -> Result<Option<Packet>, ClientError> {
        match timeout(wait, self.next()).await {
            Ok(packet) => packet.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// A packet that is already here, without waiting.
    ///
    /// # Errors
    /// An illegal packet.
    pub fn buffered(&mut self) -> Result<Option<Packet>, ClientError> {
        if let Some(packet) = self.aside.pop_front() {
            return Ok(Some(packet));
        }
        self.decoded()
    }

    /// The next PUBLISH; a PINGRESP is passed over, anything else is an error.
    ///
    /// # Errors
    /// As [`next`](Self::next), and nothing within [`PATIENCE`].
    pub async fn next_publish(&mut self) -> Result<Publish, ClientError> {
        let wait = async {
            loop {
                match self.next().await? {
                    Packet::Publish(publish) => return Ok(publish),
                    Packet::PingResp => {}
                    got => {
                        return Err(ClientError::Unexpected {
                            wanted: "PUBLISH",
                            got: Box::new(got),
                        });
                    }
                }
            }
        };
        timeout(PATIENCE, wait)
            .await
            .map_err(|_| ClientError::Timeout("PUBLISH"))?
    }

    /// Subscribes to filters at one QoS and waits for the SUBACK; PUBLISHes that come first are kept
    /// for [`next`](Self::next).
    ///
    /// # Errors
    /// The transport failed or no SUBACK came.
    pub async fn subscribe(&mut self, filters: &[&str], qos: u8) -> Result<Codes, ClientError> {
        let id = self.new_id();
        let filters = filters.iter().map(|f| ((*f).to_owned(), qos)).collect();
        self.subscribe_with(Subscribe {
            id,
            filters,
            ..Subscribe::default()
        })
        .await
    }

    /// Sends a SUBSCRIBE as it is and waits for its SUBACK.
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    pub async fn subscribe_with(&mut self, subscribe: Subscribe) -> Result<Codes, ClientError> {
        let id = subscribe.id;
        self.send(&Packet::Subscribe(subscribe)).await?;
        let is = |p: &Packet| matches!(p, Packet::SubAck(codes) if codes.id == id);
        match self.wait_for("SUBACK", is).await? {
            Packet::SubAck(codes) => Ok(codes),
            _ => unreachable!("the predicate above takes a SUBACK only"),
        }
    }

    /// Unsubscribes and waits for the UNSUBACK.
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    pub async fn unsubscribe(&mut self, filters: &[&str]) -> Result<Codes, ClientError> {
        let id = self.new_id();
        let filters = filters.iter().map(|f| (*f).to_owned()).collect();
        let unsubscribe = Unsubscribe {
            id,
            filters,
            ..Unsubscribe::default()
        };
        self.send(&Packet::Unsubscribe(unsubscribe)).await?;
        let is = |p: &Packet| matches!(p, Packet::UnsubAck(codes) if codes.id == id);
        match self.wait_for("UNSUBACK", is).await? {
            Packet::UnsubAck(codes) => Ok(codes),
            _ => unreachable!("the predicate above takes an UNSUBACK only"),
        }
    }

    /// Publishes and, for QoS 1 and 2, completes the exchange. Returns the reason code of the PUBACK
    /// or PUBREC.
    ///
    /// # Errors
    /// The transport failed or no answer came.
    pub async fn publish(
        &mut self,
        topic: &str,
        payload: impl Into<Vec<u8>>,
        qos: u8,
    ) -> Result<u8, ClientError> {
        let id = if qos > 0 { self.new_id() } else { 0 };
        let (topic, payload) = (topic.to_owned(), payload.into());
        self.publish_with(Publish {
            qos,
            topic,
            id,
            payload,
            ..Publish::default()
        })
        .await
    }

    /// Sends a PUBLISH as it is and completes the exchange.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub async fn publish_with(&mut self, publish: Publish) -> Result<u8, ClientError> {
        let (id, qos) = (publish.id, publish.qos);
        self.send(&Packet::Publish(publish)).await?;
        if qos == 0 {
            return Ok(0);
        }
        let is = |p: &Packet| matches!(p, Packet::PubAck(a) | Packet::PubRec(a) if a.id == id);
        match self.wait_for("PUBACK or PUBREC", is).await? {
            Packet::PubRec(ack) if ack.code < 0x80 => {
                self.send(&Packet::PubRel(Ack {
                    id,
                    ..Ack::default()
                }))
                .await?;
                let is = |p: &Packet| matches!(p, Packet::PubComp(a) if a.id == id);
                self.wait_for("PUBCOMP", is).await?;
                Ok(ack.code)
            }
            Packet::PubAck(ack) | Packet::PubRec(ack) => Ok(ack.code),
            _ => unreachable!("the predicate above takes acknowledgements only"),
        }
    }

    /// Answers a delivery: PUBACK for QoS 1, PUBREC for QoS 2 (PUBREL is the caller's to answer).
    ///
    /// # Errors
    /// The transport failed.
    pub async fn acknowledge(&mut self, publish: &Publish) -> Result<(), ClientError> {
        self.scratch.clear();
        match publish.qos {
            0 => return Ok(()),
            1 => put_ack(kind::PUBACK, publish.id, &mut self.scratch),
            _ => put_ack(kind::PUBREC, publish.id, &mut self.scratch),
        }
        self.out.extend_from_slice(&self.scratch);
        self.flush().await
    }

    /// Sends PINGREQ and waits for PINGRESP: everything sent before has then been read by the server.
    ///
    /// # Errors
    /// The transport failed or no answer came.
    pub async fn ping(&mut self) -> Result<(), ClientError> {
        self.send(&Packet::PingReq).await?;
        self.wait_for("PINGRESP", |p| matches!(p, Packet::PingResp))
            .await
            .map(drop)
    }

    /// Sends DISCONNECT with a normal reason and closes the link. A server that closes it first, having
    /// read the packet, is in its right [MQTT-3.14.4-3].
    ///
    /// # Errors
    /// The transport failed before.
    pub async fn disconnect(mut self) -> Result<(), ClientError> {
        match self.send(&Packet::Disconnect(Reason::default())).await {
            Ok(()) | Err(ClientError::Closed) => {}
            Err(e) => return Err(e),
        }
        self.link.close().await;
        Ok(())
    }

    /// Another stream of a QUIC connection or WebTransport session: a data stream.
    ///
    /// # Errors
    /// The connection is lost, or has one stream only.
    pub async fn open_stream(&self) -> Result<Self, ClientError> {
        Ok(Self::over(self.link.open_stream().await?, self.version))
    }

    /// Ends the sending direction of a data stream with FIN, behind all that was flushed.
    ///
    /// # Errors
    /// The stream has ended, or the transport has no streams.
    pub fn finish(&mut self) -> io::Result<()> {
        self.link.finish()
    }

    /// Ends the sending direction of a data stream with RESET_STREAM; bytes still queued are lost.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn reset(&mut self, code: u32) -> io::Result<()> {
        self.out.clear();
        self.link.reset(code)
    }

    /// Refuses further data on a data stream (STOP_SENDING); resolves when the server refuses
    /// further data on it too.
    pub fn stop(self, code: u32) -> impl Future<Output = ()> + Send + 'static {
        self.link.stop(code)
    }

    /// Breaks the connection off without DISCONNECT; see [`Cut`].
    pub fn cut(self, how: Cut) -> Abandoned {
        self.link.cut(how)
    }

    /// Waits for a packet; other packets that come first are kept for [`next`](Self::next).
    async fn wait_for(
        &mut self,
        name: &'static str,
        is: impl Fn(&Packet) -> bool,
    ) -> Result<Packet, ClientError> {
        if let Some(at) = self.aside.iter().position(&is) {
            return Ok(self.aside.remove(at).expect("the position was just found"));
        }
        let wait = async {
            loop {
                let packet = self.fresh().await?;
                if is(&packet) {
                    return Ok(packet);
                }
                self.aside.push_back(packet);
            }
        };
        timeout(PATIENCE, wait)
            .await
            .map_err(|_| ClientError::Timeout(name))?
    }

    async fn fresh(&mut self) -> Result<Packet, ClientError> {
        loop {
            if let Some(packet) = self.decoded()? {
                return Ok(packet);
            }
            if !self.link.drive(&mut self.out, &mut self.received).await?.1 {
                return Err(ClientError::Closed);
            }
        }
    }

    fn decoded(&mut self) -> Result<Option<Packet>, ClientError> {
        let Some((packet, len)) = decode(self.version, &self.received)? else {
            return Ok(None);
        };
        self.received.advance(len);
        Ok(Some(packet))
    }
}
