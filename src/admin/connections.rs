//! A listener that bounds the number of its connections, and how long each may stay silent.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, timeout};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::backoff::Backoff;

/// The time that an evicted connection has to give its place back, before the next one is evicted too.
const EVICTED_LEAVES_WITHIN: Duration = Duration::from_millis(100);

/// The listener.
pub(super) struct Bounded {
    listener: Arc<TcpListener>,
    free: Arc<Semaphore>,
    silence_max: Duration,
    evict_after: Duration,
    places: Arc<Places>,
}

/// The connections that are open, by their numbers.
#[derive(Default)]
struct Places(Mutex<HashMap<u64, Place>>);

struct Place {
    /// When the connection was accepted, or last answered.
    since: Instant,
    evict: CancellationToken,
}

impl Places {
    /// The connection that has been without an answer for longest.
    fn oldest(&self) -> Option<(Instant, CancellationToken)> {
        let places = self.0.lock();
        let kept = places.values().filter(|place| !place.evict.is_cancelled());
        let oldest = kept.min_by_key(|place| place.since)?;
        Some((oldest.since, oldest.evict.clone()))
    }
}

impl Bounded {
    /// A listener for `most` connections at once. `silence_max`: from accept, or from the last byte of
    /// an answer, to the first byte of the next one. `evict_after`: this time while another connection
    /// waits for a place.
    pub(super) fn new(
        listener: Arc<TcpListener>,
        most: usize,
        silence_max: Duration,
        evict_after: Duration,
    ) -> Self {
        Self {
            listener,
            free: Arc::new(Semaphore::new(most)),
            silence_max,
            evict_after,
            places: Arc::default(),
        }
    }

    /// Waits for a place for one more connection. If all places are taken, the connection that has been
    /// without an answer for longest is ended.
    async fn place(&self) -> OwnedSemaphorePermit {
        let mut free = std::pin::pin!(Arc::clone(&self.free).acquire_owned());
        loop {
            let oldest = self.places.oldest();
            let until = oldest.as_ref().map(|(since, _)| *since + self.evict_after);
            let evict = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                permit = &mut free => return permit.expect("the semaphore is never closed"),
                () = evict => {}
            }
            // It may have answered meanwhile.
            match self.places.oldest() {
                Some((since, evict)) if since + self.evict_after <= Instant::now() => {
                    evict.cancel();
                    // The caller needs one place only.
                    if let Ok(permit) = timeout(EVICTED_LEAVES_WITHIN, &mut free).await {
                        return permit.expect("the semaphore is never closed");
                    }
                }
                _ => {}
            }
        }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let mut backoff = Backoff::for_accept();
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let permit = self.place().await;
                    let (silence_max, places) = (self.silence_max, self.places.clone());
                    return (Connection::new(stream, permit, silence_max, places), peer);
                }
                Err(error) => {
                    tracing::debug!(%error, "The admin side cannot accept");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends after a time without answers, or when another connection needs its place.
pub(super) struct Connection {
    stream: TcpStream,
    silence: Pin<Box<Sleep>>,
    silence_max: Duration,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    number: u64,
    places: Arc<Places>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn new(
        stream: TcpStream,
        permit: OwnedSemaphorePermit,
        silence_max: Duration,
        places: Arc<Places>,
    ) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let evict = CancellationToken::new();
        let evicted = Box::pin(evict.clone().cancelled_owned());
        let since = Instant::now();
        places.0.lock().insert(number, Place { since, evict });
        Self {
            stream,
            silence: Box::pin(tokio::time::sleep(silence_max)),
            silence_max,
            evicted,
            number,
            places,
            _permit: permit,
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let silent = self.silence.as_mut().poll(cx).is_ready();
        match silent || self.evicted.as_mut().poll(cx).is_ready() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }

    fn answered(&mut self) {
        let now = Instant::now();
        self.silence.as_mut().reset(now + self.silence_max);
        if let Some(place) = self.places.0.lock().get_mut(&self.number) {
            place.since = now;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.places.0.lock().remove(&self.number);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        self.answered();
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs));
        self.answered();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
