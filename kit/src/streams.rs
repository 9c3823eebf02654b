//! A client that uses several streams of one QUIC connection or WebTransport session.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::timeout;

use crate::client::{Client, ClientError};
use crate::dial::Dialer;
use crate::link::{Abandoned, Cut};
use crate::wire::{ConnAck, Connect, Packet};

/// The number of the control stream.
pub const CONTROL: u32 = 0;

/// A connection with its control stream and any number of data streams. The opened streams are
/// numbered from 1, and no number is used twice.
#[derive(Debug)]
pub struct Streams {
    control: Client,
    data: Vec<(u32, Data)>,
    opened: u32,
    /// The stream at which the next round begins.
    turn: usize,
}

/// An event on a stream.
#[derive(Debug)]
pub enum Event {
    /// A packet.
    Packet(Packet),
    /// The data stream has ended in both directions.
    Gone,
}

enum Data {
    Open(Box<Client>),
    /// Refuses further data on a stream; resolves when the server refuses further data too.
    Stopped(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open(_) => "Open",
            Self::Stopped(_) => "Stopped",
        })
    }
}

impl Data {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, ClientError>> {
        match self {
            Self::Open(client) => pin!(client.next()).poll(cx).map(|next| match next {
                Ok(packet) => Ok(Event::Packet(packet)),
                // The control stream reports the end of the connection.
                Err(ClientError::Closed | ClientError::Io(_)) => Ok(Event::Gone),
                Err(error) => Err(error),
            }),
            Self::Stopped(end) => end.as_mut().poll(cx).map(|()| Ok(Event::Gone)),
        }
    }
}

impl Streams {
    /// As [`Client::connect`].
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect(
        dialer: &Dialer,
        connect: &Connect,
    ) -> Result<(Self, ConnAck), ClientError> {
        let (control, ack) = Client::connect(dialer, connect).await?;
        let streams = Self {
            control,
            data: Vec::new(),
            opened: CONTROL,
            turn: 0,
        };
        Ok((streams, ack))
    }

    /// Opens a data stream, once the server allows for one more. The server sees the stream when
    /// the first bytes are sent on it.
    ///
    /// # Errors
    /// The connection is lost, or has one stream only.
    pub async fn open(&mut self) -> Result<u32, ClientError> {
        let client = self.control.open_stream().await?;
        self.opened += 1;
        self.data.push((self.opened, Data::Open(Box::new(client))));
        Ok(self.opened)
    }

    /// A stream that can be written to and read.
    pub fn on(&mut self, number: u32) -> Option<&mut Client> {
        if number == CONTROL {
            return Some(&mut self.control);
        }
        match &mut self.data.iter_mut().find(|(n, _)| *n == number)?.1 {
            Data::Open(client) => Some(client),
            Data::Stopped(_) => None,
        }
    }

    /// Puts a packet into a stream's output buffer; the packet is lost if the stream has ended.
    pub fn queue(&mut self, number: u32, packet: &Packet) {
        if let Some(client) = self.on(number) {
            client.queue(packet);
        }
    }

    /// Sends the queued packets of all streams.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        for (_, data) in &mut self.data {
            if let Data::Open(client) = data {
                // The end of a stream is an event, not an error.
                let _ = client.flush().await;
            }
        }
        self.control.flush().await
    }

    /// The next event on any stream; meanwhile sends queued packets. Cancel safe.
    ///
    /// # Errors
    /// The connection is lost, or an illegal packet came.
    pub async fn next(&mut self) -> Result<(u32, Event), ClientError> {
        poll_fn(|cx| {
            let streams = self.data.len() + 1;
            for i in 0..streams {
                let turn = (self.turn + i) % streams;
                let Some(at) = turn.checked_sub(1) else {
                    if let Poll::Ready(packet) = pin!(self.control.next()).poll(cx) {
                        self.turn = turn + 1;
                        return Poll::Ready(packet.map(|p| (CONTROL, Event::Packet(p))));
                    }
                    continue;
                };
                let (number, data) = &mut self.data[at];
                let number = *number;
                if let Poll::Ready(event) = data.poll(cx) {
                    self.turn = turn + 1;
                    if matches!(event, Ok(Event::Gone)) {
                        self.data.remove(at);
                    }
                    return Poll::Ready(event.map(|event| (number, event)));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next event on any stream, or `None` if none comes within `wait`.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn next_within(
        &mut self,
        wait: Duration,
    ) -> Result<Option<(u32, Event)>, ClientError> {
        match timeout(wait, self.next()).await {
            Ok(event) => event.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Waits until the server has read all packets sent on all open streams, and the packets that
    /// the server sent before its answer have arrived; those are kept for [`next`](Self::next).
    ///
    /// # Errors
    /// The connection or a stream is lost.
    pub async fn barrier(&mut self) -> Result<(), ClientError> {
        for (_, data) in &mut self.data {
            if let Data::Open(client) = data {
                // PINGREQ belongs on the control stream.
                client.unsubscribe(&["marker"]).await?;
            }
        }
        self.control.ping().await
    }

    /// Sends a data stream's queued packets and FIN; packets that the server still sends on the
    /// stream arrive.
    ///
    /// # Errors
    /// The stream is gone.
    pub async fn finish(&mut self, number: u32) -> Result<(), ClientError> {
        let client = self.data_stream(number)?;
        client.flush().await?;
        Ok(client.finish()?)
    }

    /// RESET_STREAM on a data stream. The other direction is left open; its end shows that the
    /// server has noticed.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn reset(&mut self, number: u32, code: u32) -> Result<(), ClientError> {
        Ok(self.data_stream(number)?.reset(code)?)
    }

    /// STOP_SENDING on a data stream. The other direction is left open until the server refuses
    /// further data on it.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn stop(&mut self, number: u32, code: u32) -> Result<(), ClientError> {
        self.data_stream(number)?;
        self.data = std::mem::take(&mut self.data)
            .into_iter()
            .map(|one| match one {
                (n, Data::Open(client)) if n == number => {
                    (n, Data::Stopped(Box::pin(client.stop(code))))
                }
                other => other,
            })
            .collect();
        Ok(())
    }

    /// Breaks the connection off without DISCONNECT.
    pub fn cut(self, how: Cut) -> Abandoned {
        // The connection is cut before the data streams are dropped, since dropping finishes them.
        self.control.cut(how)
    }

    fn data_stream(&mut self, number: u32) -> Result<&mut Client, ClientError> {
        let gone = io::Error::other(format!("data stream {number} is gone"));
        if number == CONTROL {
            return Err(gone.into());
        }
        self.on(number).ok_or_else(|| gone.into())
    }
}
