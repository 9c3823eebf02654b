//! MQTT over WebSocket: a byte stream in binary messages [MQTT-6.0.0-1]. A
//! packet may straddle messages, and a message may hold several packets
//! [MQTT-6.0.0-2].

mod frame;
mod handshake;
mod request;

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::protocol::frame::coding::Control;

use crate::transport::tcp::{self, Closing, READ_MAX, with_scratch};
use crate::transport::{CloseHow, Closed, OutBuf};
use frame::{Asked, Decoder, Fault, Stopped, code};
pub(super) use handshake::accept;
pub(super) use request::stranger;

/// A WebSocket whose handshake is done.
#[derive(Debug)]
pub(super) struct Ws<S> {
    io: S,
    decoder: Decoder,
    /// Bytes read but not yet judged: what came behind the request, or behind
    /// a message that was too large. Fed first.
    early: Vec<u8>,
    asked: Asked,
    /// An end found behind bytes, for the next call.
    ended: Option<Closed>,
    /// The rule that the peer broke; its code goes into the close frame.
    fault: Option<Fault>,
    /// Header of the data frame under way; its payload is the caller's buffer.
    head: [u8; 10],
    head_at: u8,
    head_len: u8,
    payload_left: usize,
    /// Control frames on their way out, sent between data frames.
    control: Vec<u8>,
    control_at: usize,
    pinging: bool,
    /// Something was written but not flushed.
    unflushed: bool,
    closing: ClosePhase,
    limit_after: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClosePhase {
    Open,
    /// Our close frame is queued.
    Sending,
    /// Our close frame is out, the peer's is awaited.
    Awaiting,
    Ending(Closing),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Ws<S> {
    /// Messages may have `limit_before` bytes until [`Ws::authenticated`], and
    /// `limit_after` then.
    pub(super) fn new(io: S, early: Vec<u8>, limit_before: usize, limit_after: usize) -> Self {
        Self {
            io,
            decoder: Decoder::new(limit_before),
            early,
            asked: Asked::default(),
            ended: None,
            fault: None,
            head: [0; 10],
            head_at: 0,
            head_len: 0,
            payload_left: 0,
            control: Vec::new(),
            control_at: 0,
            pinging: false,
            unflushed: false,
            closing: ClosePhase::Open,
            limit_after,
        }
    }

    pub(super) fn authenticated(&mut self) {
        self.decoder.set_limit(self.limit_after);
    }

    pub(super) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<usize, Closed>> {
        if let Some(closed) = self.ended.take().or_else(|| self.over()) {
            return Poll::Ready(Err(closed));
        }
        let before = buf.len();
        if !self.early.is_empty() {
            let mut early = std::mem::take(&mut self.early);
            self.feed(&mut early, buf, before);
        }
        while self.ended.is_none() && self.early.is_empty() && buf.len() - before < READ_MAX {
            let read = with_scratch(|scratch| {
                let room = READ_MAX - (buf.len() - before);
                let read = tcp::poll_read(&mut self.io, cx, &mut scratch[..room]);
                if let Poll::Ready(Ok(n)) = read {
                    self.feed(&mut scratch[..n], buf, before);
                }
                read
            });
            match read {
                Poll::Ready(Ok(0)) => self.ended = Some(Closed::Eof),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => self.ended = Some(error.into()),
                Poll::Pending => break,
            }
        }
        // Pongs go out here too: a client that only listens gets them.
        if (self.control_waits() || self.unflushed)
            && let Poll::Ready(Err(closed)) = self.poll_control(cx)
        {
            self.ended.get_or_insert(closed);
        }
        match (buf.len() - before, self.ended.take()) {
            (0, Some(closed)) => Poll::Ready(Err(closed)),
            (0, None) => Poll::Pending,
            (n, ended) => {
                self.ended = ended;
                Poll::Ready(Ok(n))
            }
        }
    }

    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut OutBuf,
    ) -> Poll<Result<(), Closed>> {
        loop {
            if self.mid_frame() {
                ready!(self.poll_frame(cx, out))?;
            } else if self.control_waits() {
                ready!(self.poll_control_write(cx))?;
            } else if out.is_empty() {
                break;
            } else {
                self.payload_left = out.rest().len();
                self.head_len = frame::binary_header(self.payload_left, &mut self.head);
                self.head_at = 0;
            }
        }
        out.reset();
        self.poll_flush(cx)
    }

    /// Queues one ping, unless one is on its way, and sends what is queued.
    pub(super) fn poll_ping(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.closing == ClosePhase::Open && !self.pinging {
            frame::control_frame(Control::Ping, b"", &mut self.control);
            self.pinging = true;
        }
        self.poll_control(cx)
    }

    /// Sends the close frame, awaits the peer's, closes. A peer that does not
    /// answer is the caller's timeout to end.
    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>, how: CloseHow) -> Poll<()> {
        loop {
            match self.closing {
                ClosePhase::Open => self.begin_close(how),
                ClosePhase::Sending => {
                    let sent = ready!(self.poll_control(cx)).is_ok();
                    // After a violation the input makes no sense any more.
                    self.closing = if sent && self.fault.is_none() && self.asked.close.is_none() {
                        ClosePhase::Awaiting
                    } else {
                        ClosePhase::Ending(Closing::Open)
                    };
                }
                ClosePhase::Awaiting => {
                    let mut ignored = Vec::new();
                    if ready!(self.poll_recv(cx, &mut ignored)).is_err() {
                        self.closing = ClosePhase::Ending(Closing::Open);
                    }
                }
                // Both close frames are through, so nothing is in flight that a
                // reset could destroy, and the server closes first (section
                // 7.1.1).
                ClosePhase::Ending(_) if self.asked.close.is_some() => {
                    return Pin::new(&mut self.io).poll_shutdown(cx).map(drop);
                }
                ClosePhase::Ending(mut closing) => {
                    let done = tcp::poll_close(&mut self.io, cx, &mut closing);
                    self.closing = ClosePhase::Ending(closing);
                    return done;
                }
            }
        }
    }

    fn begin_close(&mut self, how: CloseHow) {
        if self.mid_frame() {
            // A close frame inside a data frame would be payload.
            self.closing = ClosePhase::Ending(Closing::Open);
            return;
        }
        // The peer's own close was answered when it was read.
        if self.asked.close.is_none() {
            let of_how = match how {
                CloseHow::Normal => code::NORMAL,
                CloseHow::GoingAway => code::GOING_AWAY,
                CloseHow::Protocol => code::PROTOCOL,
                CloseHow::Overload => code::TRY_LATER,
            };
            // The reason is for those who write clients: a browser shows it.
            let (code, reason) = match self.fault {
                Some(fault) => (fault.code, fault.reason),
                None => (of_how, ""),
            };
            let payload = [&code.to_be_bytes(), reason.as_bytes()].concat();
            frame::control_frame(Control::Close, &payload, &mut self.control);
        }
        self.closing = ClosePhase::Sending;
    }

    /// `buf` had `before` bytes when this call to `poll_recv` began.
    fn feed(&mut self, input: &mut [u8], buf: &mut Vec<u8>, before: usize) {
        if let Err(Stopped { fault, left }) = self.decoder.feed(input, buf, &mut self.asked) {
            if fault.code == code::TOO_BIG && buf.len() > before {
                // The caller may raise the limit when it has seen what came
                // first, a CONNECT say; then this is judged anew.
                self.early = input[input.len() - left..].to_vec();
                return;
            }
            self.fault = Some(fault);
            self.ended = self.over();
            return;
        }
        if let Some(echo) = self.asked.close {
            // Section 5.5.1: answered once, and not if we closed first.
            if self.closing == ClosePhase::Open {
                let echo = echo.map(u16::to_be_bytes);
                let payload = echo.as_ref().map_or(&[][..], |code| &code[..]);
                self.asked.pong = None;
                frame::control_frame(Control::Close, payload, &mut self.control);
            }
            self.ended = Some(Closed::Eof);
        }
    }

    /// The end that the peer's frames brought, if they did.
    fn over(&self) -> Option<Closed> {
        match self.fault {
            Some(fault) if fault.code == code::TOO_BIG => Some(Closed::TooLarge),
            Some(fault) => Some(Closed::Violation {
                reason: fault.reason,
                ws_code: fault.code,
            }),
            None => self.asked.close.is_some().then_some(Closed::Eof),
        }
    }

    fn mid_frame(&self) -> bool {
        self.head_at < self.head_len || self.payload_left > 0
    }

    fn control_waits(&self) -> bool {
        self.control_at < self.control.len() || self.asked.pong.is_some()
    }

    /// Writes and flushes control frames, unless a data frame is under way.
    fn poll_control(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.mid_frame() {
            // poll_send goes on with them when the frame is done.
            return Poll::Pending;
        }
        ready!(self.poll_control_write(cx))?;
        self.poll_flush(cx)
    }

    fn poll_control_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        loop {
            if self.control_at < self.control.len() {
                let rest = &self.control[self.control_at..];
                let n = ready!(Pin::new(&mut self.io).poll_write(cx, rest))?;
                self.control_at += some(n)?;
                self.unflushed = true;
            } else if let Some(payload) = self.asked.pong.take() {
                self.control.clear();
                self.control_at = 0;
                if self.closing == ClosePhase::Open {
                    frame::control_frame(Control::Pong, &payload, &mut self.control);
                }
            } else {
                // Rarely needed, so nothing is kept.
                self.control = Vec::new();
                self.control_at = 0;
                self.pinging = false;
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Writes header and payload together.
    fn poll_frame(&mut self, cx: &mut Context<'_>, out: &mut OutBuf) -> Poll<Result<(), Closed>> {
        while self.mid_frame() {
            let head = &self.head[usize::from(self.head_at)..usize::from(self.head_len)];
            let rest = out.rest();
            let payload = &rest[..rest.len().min(self.payload_left)];
            let slices = [IoSlice::new(head), IoSlice::new(payload)];
            let n = some(ready!(
                Pin::new(&mut self.io).poll_write_vectored(cx, &slices)
            )?)?;
            self.unflushed = true;
            let of_head = n.min(head.len());
            self.head_at += of_head as u8;
            self.payload_left -= n - of_head;
            out.at += n - of_head;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

fn some(n: usize) -> Result<usize, Closed> {
    if n == 0 {
        Err(Closed::Reset("nothing can be written".into()))
    } else {
        Ok(n)
    }
}
