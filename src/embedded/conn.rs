//! The task of one connection to an embedded core: bytes to packets under one
//! short lock, and one buffer out.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Duration, Instant};

use crate::embedded::Inner;
use crate::embedded::inbound::{End, Link, say_goodbye};
use crate::embedded::state::Wire;
use crate::mqtt::ReasonCode;

/// Free space offered to each read.
const READ_BYTES: usize = 64 * 1024;
/// A batch of deliveries ends past this many bytes.
const BATCH_BYTES: usize = 128 * 1024;
/// With this much unsent output no more is read: the client does not read.
const OUT_HIGH_BYTES: usize = 1024 * 1024;
/// From the connection to its CONNECT.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// For the last words to a client that may not read.
const GOODBYE_DEADLINE: Duration = Duration::from_secs(1);
/// A buffer that grew past this is given back when empty.
const KEEP_BYTES: usize = 4 * BATCH_BYTES;

/// Runs a connection to its end.
pub(crate) async fn run<S>(core: Arc<Inner>, wire: Arc<Wire>, stream: S)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut conn = Conn {
        core,
        wire,
        link: Link::default(),
        wakes: Vec::new(),
        input: BytesMut::new(),
        out: Vec::new(),
        writing: Vec::new(),
        written: 0,
        more: false,
        opened: Instant::now(),
        heard: Instant::now(),
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let end = conn.serve(&mut read, &mut write).await;
    conn.finish(end);
    if conn.wire.ended() == Some(None) {
        return;
    }
    // What is half written must go first, or the client sees garbage.
    let words = async {
        write.write_all(&conn.writing[conn.written..]).await?;
        write.write_all(&conn.out).await?;
        write.shutdown().await
    };
    let _ = tokio::time::timeout(GOODBYE_DEADLINE, words).await;
}

struct Conn {
    core: Arc<Inner>,
    wire: Arc<Wire>,
    link: Link,
    wakes: Vec<Arc<Wire>>,
    input: BytesMut,
    /// What is to be written next.
    out: Vec<u8>,
    /// What is being written, from `written` on.
    writing: Vec<u8>,
    written: usize,
    /// Whether the session may have more to send.
    more: bool,
    opened: Instant,
    /// When the last bytes came.
    heard: Instant,
}

impl Conn {
    async fn serve<R, W>(&mut self, read: &mut R, write: &mut W) -> Option<End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        // Set again only when it fires, not with every packet.
        let alarm = tokio::time::sleep_until(self.silence_ends());
        tokio::pin!(alarm);
        let wire = self.wire.clone();
        loop {
            if let Some(reason) = wire.ended() {
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
                () = wire.wake.notified() => self.more = true,
                sent = write.write(&self.writing[self.written..]),
                    if self.written < self.writing.len() => match sent {
                        Ok(n) if n > 0 => self.written += n,
                        _ => return None,
                    },
                got = read.read_buf(&mut self.input), if self.out.len() < OUT_HIGH_BYTES => {
                    match got {
                        Ok(n) if n > 0 => {}
                        _ => return None,
                    }
                    self.heard = Instant::now();
                    let was_up = self.link.up.is_some();
                    if let Err(end) = self.take_input() {
                        return Some(end);
                    }
                    if !was_up {
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

    /// All packets that have come, and what may be sent in turn.
    fn take_input(&mut self) -> Result<(), End> {
        let Conn {
            core,
            wire,
            link,
            wakes,
            input,
            out,
            more,
            ..
        } = self;
        let (n, end) = core.with(wakes, |st| {
            let (n, end) = link.feed(st, wire, input, out);
            if let (Some(up), None) = (&link.up, end) {
                *more = st.pump(up.session, out, BATCH_BYTES);
            }
            (n, end)
        });
        input.advance(n);
        if input.is_empty() && input.capacity() > KEEP_BYTES {
            *input = BytesMut::new();
        }
        end.map_or(Ok(()), Err)
    }

    /// Everything is written: takes the next batch.
    fn refill(&mut self) -> Result<(), End> {
        let Conn {
            core,
            wire,
            link,
            wakes,
            out,
            more,
            ..
        } = self;
        if *more
            && out.len() < BATCH_BYTES
            && let Some(up) = &link.up
        {
            *more = core.with(wakes, |st| match st.owns(up.session, wire) {
                true => Ok(st.pump(up.session, out, BATCH_BYTES)),
                false => Err(End::Superseded),
            })?;
        }
        self.writing.clear();
        self.written = 0;
        if self.writing.capacity() > KEEP_BYTES {
            self.writing = Vec::new();
        }
        std::mem::swap(&mut self.out, &mut self.writing);
        self.link.unseen_acks = 0;
        Ok(())
    }

    /// 1.5 times the keep alive [MQTT-3.1.2-22], or the CONNECT deadline.
    fn silence_ends(&self) -> Instant {
        match &self.link.up {
            None => self.opened + CONNECT_DEADLINE,
            Some(up) if up.keep_alive == 0 => self.heard + Duration::from_secs(86_400),
            Some(up) => self.heard + Duration::from_millis(u64::from(up.keep_alive) * 1500),
        }
    }

    /// Gives the session back and prepares the last words.
    fn finish(&mut self, end: Option<End>) {
        let Conn {
            core,
            wire,
            link,
            wakes,
            out,
            ..
        } = self;
        let will = !matches!(end, Some(End::Disconnected { will: false }));
        core.with(wakes, |st| {
            if let Some(up) = &link.up
                && st.owns(up.session, wire)
            {
                st.detach(up.session, will);
            }
            st.close(wire);
        });
        // A reason may have come while the lock was waited for.
        let reason = match (end, wire.ended()) {
            (Some(End::Refused(reason)), _) | (Some(End::Superseded), Some(Some(reason))) => reason,
            _ => return,
        };
        if let Some(up) = &link.up {
            say_goodbye(up.version, reason, out);
        }
    }
}
