//! The task of one connection to an embedded broker. It handles all packets that have arrived under
//! one short lock, and writes one buffer at a time.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Duration, Instant};

use crate::embedded::inbound::{End, Protocol, encode_end};
use crate::embedded::locked::LockedState;
use crate::embedded::state::ConnectionHandle;
use crate::mqtt::ReasonCode;

/// Free space that is offered to each read.
const READ_BYTES: usize = 64 * 1024;
/// A batch of deliveries ends once it has this many bytes.
const BATCH_BYTES: usize = 128 * 1024;
/// With this much unsent output nothing more is read, because the client does not read.
const OUTPUT_MAX_BYTES: usize = 1024 * 1024;
/// How long a new connection may take to send CONNECT.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last bytes to a client that may not read can take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a connection without Keep Alive may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(86_400);
/// A buffer that has grown beyond this is freed when it is empty.
const BUFFER_KEPT_BYTES: usize = 4 * BATCH_BYTES;

/// Runs a connection to its end.
pub(crate) async fn run<S>(broker: Arc<LockedState>, handle: Arc<ConnectionHandle>, stream: S)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut connection = Connection {
        broker,
        handle,
        protocol: Protocol::default(),
        to_wake: Vec::new(),
        input: BytesMut::new(),
        out: Vec::new(),
        writing: Vec::new(),
        written: 0,
        more: false,
        opened: Instant::now(),
        heard: Instant::now(),
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let end = connection.serve(&mut read, &mut write).await;
    connection.finish(end);
    if connection.handle.ended() == Some(None) {
        return;
    }
    // A packet that is half written must be completed first.
    let last = async {
        write
            .write_all(&connection.writing[connection.written..])
            .await?;
        write.write_all(&connection.out).await?;
        write.shutdown().await
    };
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, last).await;
}

struct Connection {
    broker: Arc<LockedState>,
    handle: Arc<ConnectionHandle>,
    protocol: Protocol,
    /// A buffer that is used again: connections to be woken.
    to_wake: Vec<Arc<ConnectionHandle>>,
    input: BytesMut,
    /// The output that is to be written next.
    out: Vec<u8>,
    /// The output that is being written, from `written` on.
    writing: Vec<u8>,
    written: usize,
    /// Whether the session may have more to send.
    more: bool,
    opened: Instant,
    /// When bytes last arrived.
    heard: Instant,
}

impl Connection {
    async fn serve<R, W>(&mut self, read: &mut R, write: &mut W) -> Option<End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        // It is set again when it fires, and not with every packet.
        let alarm = tokio::time::sleep_until(self.silence_ends());
        tokio::pin!(alarm);
        let handle = self.handle.clone();
        loop {
            if let Some(reason) = handle.ended() {
                return Some(match reason {
                    Some(reason) => End::Refused(reason),
                    None => End::Superseded,
                });
            }
            if self.written == self.writing.len()
                && let Err(end) = self.refill()
            {
                return Some(end);
            }
            self.input.reserve(READ_BYTES);
            tokio::select! {
                () = handle.wake.notified() => self.more = true,
                sent = write.write(&self.writing[self.written..]),
                    if self.written < self.writing.len() => match sent {
                        Ok(n) if n > 0 => self.written += n,
                        _ => return None,
                    },
                got = read.read_buf(&mut self.input), if self.out.len() < OUTPUT_MAX_BYTES => {
                    match got {
                        Ok(n) if n > 0 => {}
                        _ => return None,
                    }
                    self.heard = Instant::now();
                    let was_connected = self.protocol.connected.is_some();
                    if let Err(end) = self.take_input() {
                        return Some(end);
                    }
                    if !was_connected {
                        alarm.as_mut().reset(self.silence_ends());
                    }
                }
                () = alarm.as_mut() => {
                    let at = self.silence_ends();
                    if at <= Instant::now() {
                        return Some(End::Refused(ReasonCode::KEEP_ALIVE_TIMEOUT));
                    }
                    alarm.as_mut().reset(at);
                }
            }
        }
    }

    /// Handles all packets that have arrived, and takes the output that they make possible.
    fn take_input(&mut self) -> Result<(), End> {
        let Connection {
            broker,
            handle,
            protocol,
            to_wake,
            input,
            out,
            more,
            ..
        } = self;
        let (n, end) = broker.with(to_wake, |st| {
            let (n, end) = protocol.feed(st, handle, input, out);
            if let (Some(connected), None) = (&protocol.connected, end) {
                *more = st.pump(connected.session, out, BATCH_BYTES);
            }
            (n, end)
        });
        input.advance(n);
        if input.is_empty() && input.capacity() > BUFFER_KEPT_BYTES {
            *input = BytesMut::new();
        }
        end.map_or(Ok(()), Err)
    }

    /// Takes the next batch, once everything is written.
    fn refill(&mut self) -> Result<(), End> {
        let Connection {
            broker,
            handle,
            protocol,
            to_wake,
            out,
            more,
            ..
        } = self;
        if *more
            && out.len() < BATCH_BYTES
            && let Some(connected) = &protocol.connected
        {
            let session = connected.session;
            *more = broker.with(to_wake, |st| match st.owns(session, handle) {
                true => Ok(st.pump(session, out, BATCH_BYTES)),
                false => Err(End::Superseded),
            })?;
        }
        self.writing.clear();
        self.written = 0;
        if self.writing.capacity() > BUFFER_KEPT_BYTES {
            self.writing = Vec::new();
        }
        std::mem::swap(&mut self.out, &mut self.writing);
        self.protocol.unseen_acks = 0;
        Ok(())
    }

    /// When the connection ends unless bytes arrive: after 1.5 times the Keep Alive
    /// [MQTT-3.1.2-22], or when CONNECT is due.
    fn silence_ends(&self) -> Instant {
        match &self.protocol.connected {
            None => self.opened + CONNECT_TIMEOUT,
            Some(connected) => {
                let keep_alive = connected.keep_alive;
                self.heard + keep_alive.map_or(SILENCE_MAX, |time| time * 3 / 2)
            }
        }
    }

    /// Gives the session back, and encodes a DISCONNECT if one is due.
    fn finish(&mut self, end: Option<End>) {
        let Connection {
            broker,
            handle,
            protocol,
            to_wake,
            out,
            ..
        } = self;
        let will = !matches!(end, Some(End::Disconnected { will: false }));
        broker.with(to_wake, |st| {
            if let Some(connected) = &protocol.connected
                && st.owns(connected.session, handle)
            {
                st.detach(connected.session, will);
            }
            st.close(handle);
        });
        // The state may have ended the connection while this task waited for the lock.
        let ((Some(End::Refused(reason)), _) | (Some(End::Superseded), Some(Some(reason)))) =
            (end, handle.ended())
        else {
            return;
        };
        if let Some(connected) = &protocol.connected {
            encode_end(connected.version, reason, out);
        }
    }
}
