//! The fast loop of one connection: frames are read in place, acknowledgements leave in one write.

use std::io;

use bytes::{Buf, BytesMut};

use crate::client::{Client, ClientError};
use crate::dial::Dialer;
use crate::link::{Abandoned, Cut, Link};
use crate::wire::{Connect, PublishRef, Version, ack_of, frame, kind, put_ack, put_publish};

/// One connection of a load.
#[derive(Debug)]
pub struct Peer {
    link: Link,
    version: Version,
    received: BytesMut,
    out: BytesMut,
    scratch: Vec<u8>,
    last_id: u16,
    /// Whether bytes came with the handshake.
    unread: bool,
}

/// The events of one turn of the loop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    /// Own publishes that the server has completed: PUBACK or PUBCOMP.
    pub completed: u32,
    /// The number of those publishes that the server answered with an error.
    pub refused: u32,
    /// Deliveries.
    pub delivered: u32,
}

impl Peer {
    /// Connects; returns whether the session was present and the server's Receive Maximum.
    ///
    /// # Errors
    /// The transport failed or the server refused.
    pub async fn connect(
        dialer: &Dialer,
        connect: &Connect,
        filter: Option<(&str, u8)>,
    ) -> Result<(Self, bool, u16), ClientError> {
        let (mut client, ack) = Client::connect(dialer, connect).await?;
        if let Some((filter, qos)) = filter {
            let codes = client.subscribe(&[filter], qos).await?;
            if codes.codes.iter().any(|code| *code >= 0x80) {
                let reason = format!("SUBSCRIBE {filter} refused: {:?}", codes.codes);
                return Err(io::Error::other(reason).into());
            }
        }
        let max = ack
            .props
            .number(crate::wire::prop::RECEIVE_MAX)
            .unwrap_or(65_535);
        let (link, received) = client.into_parts();
        let peer = Self {
            link,
            version: connect.version,
            unread: !received.is_empty(),
            received,
            out: BytesMut::new(),
            scratch: Vec::new(),
            last_id: 0,
        };
        Ok((
            peer,
            ack.session_present,
            u16::try_from(max).unwrap_or(u16::MAX),
        ))
    }

    /// Queues one PUBLISH; [`turn`](Self::turn) sends it.
    pub fn publish(&mut self, topic: &str, payload: &[u8], qos: u8) {
        if qos > 0 {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        }
        self.scratch.clear();
        let head = (false, qos, self.last_id);
        put_publish(self.version, head, topic, payload, &mut self.scratch);
        self.out.extend_from_slice(&self.scratch);
    }

    /// The number of bytes that wait to be written.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Writes queued bytes and waits for bytes; returns when either has happened. Cancel safe.
    ///
    /// # Errors
    /// The transport failed or ended.
    pub async fn wait(&mut self) -> io::Result<()> {
        // The first deliveries of a resumed session may have come together with CONNACK.
        if std::mem::take(&mut self.unread) {
            return Ok(());
        }
        match self.link.drive(&mut self.out, &mut self.received).await? {
            (_, true) => Ok(()),
            (_, false) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// [`wait`](Self::wait), then [`take`](Self::take). Cancel safe.
    ///
    /// # Errors
    /// The errors of [`wait`](Self::wait) and [`take`](Self::take).
    pub async fn turn(&mut self, deliver: impl FnMut(&PublishRef<'_>)) -> io::Result<Turn> {
        self.wait().await?;
        self.take(deliver)
    }

    /// Writes everything that waits, reading meanwhile.
    ///
    /// # Errors
    /// As [`turn`](Self::turn).
    pub async fn flush(&mut self, mut deliver: impl FnMut(&PublishRef<'_>)) -> io::Result<Turn> {
        let mut all = Turn::default();
        while !self.out.is_empty() {
            let (_, open) = self.link.drive(&mut self.out, &mut self.received).await?;
            let turn = self.take(&mut deliver)?;
            all.completed += turn.completed;
            all.refused += turn.refused;
            all.delivered += turn.delivered;
            if !open {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.link.flush(&mut self.out).await?;
        Ok(all)
    }

    /// Breaks off.
    pub fn cut(self, how: Cut) -> Abandoned {
        self.link.cut(how)
    }

    /// Sends DISCONNECT and closes.
    pub async fn disconnect(mut self) {
        self.out.extend_from_slice(&[kind::DISCONNECT << 4, 0]);
        let _ = self.flush(|_| {}).await;
        self.link.close().await;
    }

    /// Takes in the packets that have come, and queues their answers.
    ///
    /// # Errors
    /// The server sent DISCONNECT or something illegal.
    pub fn take(&mut self, mut deliver: impl FnMut(&PublishRef<'_>)) -> io::Result<Turn> {
        let mut turn = Turn::default();
        let mut at = 0;
        self.scratch.clear();
        while let Some(f) = frame(&self.received[at..]).map_err(io::Error::other)? {
            at += f.len;
            match f.kind() {
                kind::PUBLISH => {
                    let publish = PublishRef::read(self.version, &f).map_err(io::Error::other)?;
                    turn.delivered += 1;
                    deliver(&publish);
                    match publish.qos {
                        1 => {
                            put_ack(kind::PUBACK, publish.id, &mut self.scratch);
                        }
                        2 => {
                            put_ack(kind::PUBREC, publish.id, &mut self.scratch);
                        }
                        _ => {}
                    }
                }
                kind::PUBACK | kind::PUBCOMP => {
                    turn.completed += 1;
                    turn.refused += u32::from(ack_of(&f).is_some_and(|(_, code)| code >= 0x80));
                }
                kind::PUBREC => match ack_of(&f) {
                    Some((id, code)) if code < 0x80 => {
                        put_ack(kind::PUBREL, id, &mut self.scratch);
                    }
                    _ => {
                        turn.completed += 1;
                        turn.refused += 1;
                    }
                },
                kind::PUBREL => {
                    if let Some((id, _)) = ack_of(&f) {
                        put_ack(kind::PUBCOMP, id, &mut self.scratch);
                    }
                }
                kind::DISCONNECT => {
                    let code = f.body.first().copied().unwrap_or(0);
                    return Err(io::Error::other(format!("DISCONNECT {code:#04x}")));
                }
                _ => {}
            }
        }
        self.received.advance(at);
        self.out.extend_from_slice(&self.scratch);
        Ok(turn)
    }
}
