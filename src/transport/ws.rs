//! MQTT over WebSocket: a byte stream in binary messages [MQTT-6.0.0-1]. A packet may straddle
//! messages, and a message may hold several packets [MQTT-6.0.0-2].

pub(super) mod frame;
pub(super) mod handshake;
pub(super) mod request;

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Control};

use crate::outbuf::OutBuf;
use crate::transport::closed::{Closed, ResetReason, Violation};
use crate::transport::tcp::{self, Closing, READ_MAX_BYTES, READS_MAX, with_scratch};
use crate::transport::types::CloseHow;
pub use frame::FrameError;
use frame::{Decoder, Requests, Stopped};

/// A WebSocket whose handshake is done.
#[derive(Debug)]
pub(super) struct Ws<S> {
    io: S,
    decoder: Decoder,
    /// Bytes that were read but not decoded yet, from behind the request or from a message that was too
    /// large. They are decoded first.
    early: Vec<u8>,
    requests: Requests,
    /// An end that was found behind bytes, for the next call.
    ended: Option<Closed>,
    /// The rule that the peer broke. Its code goes into the close frame.
    fault: Option<FrameError>,
    /// The header of the data frame that is being sent. Its payload is the caller's buffer.
    head: [u8; 10],
    head_at: u8,
    head_len: u8,
    payload_left: usize,
    /// Control frames to send between data frames.
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
    /// A message may have `limit_before` bytes until [`Ws::authenticated`], and `limit_after` bytes
    /// from then on.
    pub(super) fn new(io: S, early: Vec<u8>, limit_before: usize, limit_after: usize) -> Self {
        Self {
            io,
            decoder: Decoder::new(limit_before),
            early,
            requests: Requests::default(),
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

    /// The byte stream below.
    pub(super) fn io(&self) -> &S {
        &self.io
    }

    pub(super) fn authenticated(&mut self) {
        self.decoder.set_limit(self.limit_after);
    }

    pub(super) fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut Vec<u8>,
    ) -> Poll<Result<usize, Closed>> {
        if let Some(closed) = self.ended.take().or_else(|| self.end()) {
            return Poll::Ready(Err(closed));
        }
        let before = buf.len();
        if !self.early.is_empty() {
            let mut early = std::mem::take(&mut self.early);
            self.feed(&mut early, buf, before);
        }
        let (mut reads, mut raw_bytes) = (0, 0);
        let mut yields = false;
        while self.ended.is_none() && self.early.is_empty() && buf.len() - before < READ_MAX_BYTES {
            // Control frames bring no bytes for `buf`.
            yields = reads == READS_MAX || raw_bytes >= READ_MAX_BYTES;
            if yields {
                break;
            }
            reads += 1;
            let read = with_scratch(|scratch| {
                let room = READ_MAX_BYTES - (buf.len() - before);
                let read = tcp::poll_read(&mut self.io, cx, &mut scratch[..room]);
                if let Poll::Ready(Ok(n)) = read {
                    self.feed(&mut scratch[..n], buf, before);
                }
                read
            });
            match read {
                Poll::Ready(Ok(0)) => self.ended = Some(Closed::Eof),
                Poll::Ready(Ok(n)) => raw_bytes += n,
                Poll::Ready(Err(error)) => self.ended = Some(error.into()),
                Poll::Pending => break,
            }
        }
        // Pongs are sent here as well, so that a client that gets no messages gets its pongs.
        if (self.control_waits() || self.unflushed)
            && let Poll::Ready(Err(closed)) = self.poll_control(cx)
        {
            self.ended.get_or_insert(closed);
        }
        match (buf.len() - before, self.ended.take()) {
            (0, Some(closed)) => Poll::Ready(Err(closed)),
            (0, None) => {
                if yields {
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
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
            } else if out.is_empty() || self.requests.close.is_some() {
                // After close frames no data frame begins (section 5.5.1).
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

    /// Queues a ping, unless one is queued already, and sends the queued control frames.
    pub(super) fn poll_ping(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.closing == ClosePhase::Open && !self.pinging {
            frame::control_frame(Control::Ping, b"", &mut self.control);
            self.pinging = true;
        }
        self.poll_control(cx)
    }

    /// Sends the close frame, awaits the peer's, and closes. The caller has a timeout for a peer that
    /// does not answer.
    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>, how: CloseHow) -> Poll<()> {
        loop {
            match self.closing {
                ClosePhase::Open => self.begin_close(how),
                ClosePhase::Sending => {
                    let sent = ready!(self.poll_control(cx)).is_ok();
                    // The input cannot be decoded after a violation.
                    let awaiting = sent && self.fault.is_none() && self.requests.close.is_none();
                    self.closing = if awaiting {
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
                // Both close frames have arrived, so no bytes are in flight that a reset could destroy,
                // and the server closes first (section 7.1.1).
                ClosePhase::Ending(_) if self.requests.close.is_some() => {
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
        if self.requests.close.is_none() {
            // The reason helps authors of clients: a browser shows it.
            let (code, reason) = match self.fault {
                Some(fault) => (fault.close_code(), fault.to_string()),
                None => (close_code(how), String::new()),
            };
            let payload = [&u16::from(code).to_be_bytes(), reason.as_bytes()].concat();
            frame::control_frame(Control::Close, &payload, &mut self.control);
        }
        self.closing = ClosePhase::Sending;
    }

    /// `buf` had `before` bytes when this call to `poll_recv` began.
    fn feed(&mut self, input: &mut [u8], buf: &mut Vec<u8>, before: usize) {
        if let Err(Stopped { fault, rest }) = self.decoder.feed(input, buf, &mut self.requests) {
            if fault == FrameError::TooLarge && buf.len() > before {
                // The caller may raise the limit once it has the bytes before this message, for
                // example a CONNECT. Then the message is decoded again.
                self.early = input[input.len() - rest..].to_vec();
                return;
            }
            self.fault = Some(fault);
            self.ended = self.end();
            return;
        }
        if let Some(echo) = self.requests.close {
            // A close frame is answered once, and not if we closed first (section 5.5.1).
            if self.closing == ClosePhase::Open {
                let echo = echo.map(u16::to_be_bytes);
                let payload = echo.as_ref().map_or(&[][..], |code| &code[..]);
                self.requests.pong = None;
                frame::control_frame(Control::Close, payload, &mut self.control);
            }
            self.ended = Some(Closed::Eof);
        }
    }

    /// Why the peer's frames have ended the connection, if they have.
    fn end(&self) -> Option<Closed> {
        match self.fault {
            Some(FrameError::TooLarge) => Some(Closed::TooLarge),
            Some(fault) => Some(Closed::Violation(Violation::WebSocket(fault))),
            None => self.requests.close.is_some().then_some(Closed::Eof),
        }
    }

    /// Whether the peer has sent a close frame, and our answer or the data frame before it is not sent yet.
    pub(super) fn owes_close(&self) -> bool {
        self.requests.close.is_some() && (self.mid_frame() || self.control_waits())
    }

    fn mid_frame(&self) -> bool {
        self.head_at < self.head_len || self.payload_left > 0
    }

    fn control_waits(&self) -> bool {
        self.control_at < self.control.len() || self.requests.pong.is_some()
    }

    /// Writes and flushes control frames, unless a data frame is being sent.
    fn poll_control(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Closed>> {
        if self.mid_frame() {
            // poll_send sends them when the frame is done.
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
                self.control_at += not_zero(n)?;
                self.unflushed = true;
            } else if let Some(payload) = self.requests.pong.take() {
                self.control.clear();
                self.control_at = 0;
                if self.closing == ClosePhase::Open {
                    frame::control_frame(Control::Pong, &payload, &mut self.control);
                }
            } else {
                // Control frames are rare, so their buffer is freed.
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
            let n = not_zero(ready!(
                Pin::new(&mut self.io).poll_write_vectored(cx, &slices)
            )?)?;
            self.unflushed = true;
            let of_head = n.min(head.len());
            self.head_at += of_head as u8;
            self.payload_left -= n - of_head;
            out.advance(n - of_head);
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

fn not_zero(n: usize) -> Result<usize, Closed> {
    if n == 0 {
        Err(Closed::Reset(ResetReason::NothingWritten))
    } else {
        Ok(n)
    }
}

const fn close_code(how: CloseHow) -> CloseCode {
    match how {
        CloseHow::Normal => CloseCode::Normal,
        CloseHow::GoingAway => CloseCode::Away,
        CloseHow::Protocol => CloseCode::Protocol,
        CloseHow::Overload => CloseCode::Again,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Wake, Waker};

    use tokio::io::ReadBuf;

    use super::*;

    /// A peer that sends unsolicited pongs, which need no answer.
    struct Pongs {
        sent: usize,
        most: usize,
    }

    impl AsyncRead for Pongs {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.sent == self.most {
                return Poll::Pending;
            }
            while buf.remaining() > 0 && self.sent < self.most {
                buf.put_slice(&[[0x8A, 0x80, 0, 0, 0, 0][self.sent % 6]]);
                self.sent += 1;
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Pongs {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn control_frames_are_read_in_turns() {
        let most = 4 * READ_MAX_BYTES;
        let mut ws = Ws::new(Pongs { sent: 0, most }, Vec::new(), 1024, 1024);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        for turn in 1..=5 {
            let polled = ws.poll_recv(&mut Context::from_waker(&waker), &mut Vec::new());
            assert!(polled.is_pending());
            assert_eq!(ws.io.sent, most.min(turn * READ_MAX_BYTES));
            assert_eq!(woken.0.swap(false, Ordering::Relaxed), turn <= 4);
        }
    }

    /// A peer that has sent `input`, and takes only a part of the output.
    struct Narrow {
        input: Vec<u8>,
        room: usize,
        written: Vec<u8>,
    }

    impl AsyncRead for Narrow {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.input.is_empty() {
                return Poll::Pending;
            }
            buf.put_slice(&std::mem::take(&mut self.input));
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            let n = buf.len().min(self.room);
            if n == 0 {
                return Poll::Pending;
            }
            self.room -= n;
            self.written.extend_from_slice(&buf[..n]);
            Poll::Ready(Ok(n))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_frame_under_way_is_completed_before_the_answer_to_a_close() {
        let close = [0x88, 2, 0x03, 0xE8];
        let io = Narrow {
            input: vec![0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8],
            room: 10,
            written: Vec::new(),
        };
        let mut ws = Ws::new(io, Vec::new(), 1024, 1024);
        let mut cx = Context::from_waker(Waker::noop());
        let mut out = OutBuf::default();
        out.buf.extend_from_slice(&[7; 100]);
        assert!(ws.poll_send(&mut cx, &mut out).is_pending());
        out.buf.extend_from_slice(&[8; 50]);
        assert!(!ws.owes_close());
        let received = ws.poll_recv(&mut cx, &mut Vec::new());
        assert!(matches!(received, Poll::Ready(Err(Closed::Eof))));
        assert!(ws.owes_close());
        ws.io.room = 1000;
        assert!(matches!(
            ws.poll_send(&mut cx, &mut out),
            Poll::Ready(Ok(()))
        ));
        let expected = [&[0x82, 100][..], &[7; 100], &close].concat();
        assert_eq!(ws.io.written, expected, "and no further frame");
        assert!(!ws.owes_close());
        assert!(ws.poll_close(&mut cx, CloseHow::Normal).is_ready());
        assert_eq!(ws.io.written.len(), expected.len());
    }
}
