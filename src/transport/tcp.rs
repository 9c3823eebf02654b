//! Plain byte streams: reading through a shared scratch buffer, writing from an [`OutBuf`], and a
//! close that does not lose the last bytes that were sent.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::outbuf::OutBuf;
use crate::transport::closed::{Closed, ResetReason};

/// The most bytes that one call reads.
pub(super) const READ_MAX_BYTES: usize = 64 * 1024;
/// The most reads of one call: a TLS record or a WebSocket frame may have a single byte, or none.
pub(super) const READS_MAX: usize = 64;

thread_local! {
    // One per worker thread: an idle connection holds no read buffer, and the buffer of a busy one
    // grows only by the bytes received.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_MAX_BYTES]);
}

/// Lends the thread's scratch buffer of [`READ_MAX_BYTES`] to `f`, which must not call this again.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| f(scratch))
}

/// One read into `scratch`; 0 is the end of the stream.
pub(super) fn poll_read<S: AsyncRead + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    scratch: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut read = ReadBuf::new(scratch);
    ready!(Pin::new(io).poll_read(cx, &mut read))?;
    Poll::Ready(Ok(read.filled().len()))
}

/// Whether bytes, an end or an error have arrived in the system's buffer. The runtime learns of them
/// later, when it looks for events: until then a read is pending.
pub(super) fn has_arrivals(io: &TcpStream) -> bool {
    let mut sockets = [PollFd::new(io, PollFlags::IN)];
    let at_once = Timespec::default();
    // An error would leave the question open, and the socket is read later anyway.
    poll(&mut sockets, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Appends received bytes to `buf`. The number of bytes is never 0.
///
/// Reads until nothing is left, or [`READ_MAX_BYTES`] or [`READS_MAX`] is reached, because one read of a
/// TLS stream returns at most one record. `ended` keeps an end that was found behind bytes for the next call.
pub(super) fn poll_recv<S: AsyncRead + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    buf: &mut Vec<u8>,
    ended: &mut Option<Closed>,
) -> Poll<Result<usize, Closed>> {
    if let Some(closed) = ended.take() {
        return Poll::Ready(Err(closed));
    }
    with_scratch(|scratch| {
        let mut total = 0;
        for _ in 0..READS_MAX {
            if total == READ_MAX_BYTES {
                break;
            }
            match poll_read(io, cx, &mut scratch[total..]) {
                Poll::Ready(Ok(0)) => *ended = Some(Closed::Eof),
                Poll::Ready(Ok(n)) => {
                    total += n;
                    continue;
                }
                Poll::Ready(Err(error)) => *ended = Some(error.into()),
                Poll::Pending => {}
            }
            break;
        }
        if total > 0 {
            buf.extend_from_slice(&scratch[..total]);
            return Poll::Ready(Ok(total));
        }
        match ended.take() {
            Some(closed) => Poll::Ready(Err(closed)),
            None => Poll::Pending,
        }
    })
}

/// Writes all of `out` and flushes; `out` is empty when this is ready.
pub(super) fn poll_send<S: AsyncWrite + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    out: &mut OutBuf,
) -> Poll<Result<(), Closed>> {
    while !out.is_empty() {
        let n = ready!(Pin::new(&mut *io).poll_write(cx, out.rest()))?;
        if n == 0 {
            return Poll::Ready(Err(Closed::Reset(ResetReason::NothingWritten)));
        }
        out.advance(n);
    }
    out.reset();
    ready!(Pin::new(io).poll_flush(cx))?;
    Poll::Ready(Ok(()))
}

/// How far a graceful close has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Closing {
    #[default]
    Open,
    /// Our half is closed, and the peer's remaining bytes (so many so far) are discarded: a socket that
    /// is closed with unread bytes sends a reset, which can destroy the last packet that we sent.
    Draining(usize),
    Done,
}

/// The most bytes that are discarded while the peer's end is awaited.
const DRAIN_MAX_BYTES: usize = 1024 * 1024;

/// Closes our half, then waits for the peer's end or an error.
pub(super) fn poll_close<S: AsyncRead + AsyncWrite + Unpin>(
    io: &mut S,
    cx: &mut Context<'_>,
    closing: &mut Closing,
) -> Poll<()> {
    loop {
        match closing {
            Closing::Open => {
                *closing = match ready!(Pin::new(&mut *io).poll_shutdown(cx)) {
                    Ok(()) => Closing::Draining(0),
                    Err(_) => Closing::Done,
                }
            }
            Closing::Draining(drained) => {
                let read = with_scratch(|scratch| poll_read(io, cx, scratch));
                match ready!(read) {
                    Ok(n) if n > 0 && *drained < DRAIN_MAX_BYTES => *drained += n,
                    _ => *closing = Closing::Done,
                }
            }
            Closing::Done => return Poll::Ready(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::task::Waker;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn bytes_before_an_end_come_first() {
        let (mut ours, mut theirs) = duplex(64);
        theirs.write_all(b"last words").await.expect("room");
        drop(theirs);
        let (mut buf, mut ended) = (Vec::new(), None);
        let n = poll_fn(|cx| poll_recv(&mut ours, cx, &mut buf, &mut ended)).await;
        assert_eq!(n.expect("bytes first"), 10);
        assert_eq!(buf, b"last words");
        let end = poll_fn(|cx| poll_recv(&mut ours, cx, &mut buf, &mut ended)).await;
        assert!(matches!(end, Err(Closed::Eof)));
    }

    /// A peer whose every read has a single byte, as TLS records may have.
    struct Drops;

    impl AsyncRead for Drops {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            buf.put_slice(b"x");
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn one_call_reads_a_bounded_number_of_records() {
        let (mut buf, mut ended) = (Vec::new(), None);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let polled = poll_recv(&mut Drops, &mut cx, &mut buf, &mut ended);
        assert!(matches!(polled, Poll::Ready(Ok(READS_MAX))));
        assert_eq!(buf.len(), READS_MAX);
    }

    #[tokio::test]
    async fn bytes_and_an_end_in_the_systems_buffer_are_arrivals() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let mut theirs = std::net::TcpStream::connect(address).expect("connects");
        let (mut ours, _) = listener.accept().await.expect("accepts");
        let read = |ours: &mut TcpStream| {
            let (mut buf, mut ended) = (Vec::new(), None);
            let mut cx = Context::from_waker(Waker::noop());
            poll_recv(ours, &mut cx, &mut buf, &mut ended)
        };
        assert!(read(&mut ours).is_pending() && !has_arrivals(&ours));
        // The runtime does not look for events before the test awaits something.
        theirs.write_all(b"x").expect("sent");
        assert!(read(&mut ours).is_pending() && has_arrivals(&ours));
        ours.readable().await.expect("no error");
        assert!(read(&mut ours).is_ready() && !has_arrivals(&ours));
        drop(theirs);
        assert!(read(&mut ours).is_pending() && has_arrivals(&ours));
    }

    #[tokio::test]
    async fn a_pending_read_allocates_nothing() {
        let (mut ours, _theirs) = duplex(64);
        let (mut buf, mut ended) = (Vec::new(), None);
        let pending =
            poll_fn(|cx| Poll::Ready(poll_recv(&mut ours, cx, &mut buf, &mut ended).is_pending()))
                .await;
        assert!(pending);
        assert_eq!(buf.capacity(), 0);
    }

    #[tokio::test]
    async fn a_partial_write_goes_on_where_it_stopped() {
        let (mut ours, mut theirs) = duplex(4);
        let mut out = OutBuf::from(b"0123456789".to_vec());
        let pending =
            poll_fn(|cx| Poll::Ready(poll_send(&mut ours, cx, &mut out).is_pending())).await;
        assert!(pending);
        assert_eq!(out.rest(), b"456789");
        // More bytes may be appended between calls.
        out.buf.extend_from_slice(b"ab");
        let mut got = [0; 12];
        let (sent, read) = tokio::join!(
            poll_fn(|cx| poll_send(&mut ours, cx, &mut out)),
            theirs.read_exact(&mut got)
        );
        sent.expect("sent");
        read.expect("read");
        assert_eq!(&got, b"0123456789ab");
        assert!(out.is_empty() && out.buf.is_empty());
    }
}
