//! Moves bytes between a link's socket and its machine, until the connection ends.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep, timeout};
use tokio_util::io::poll_read_buf;

use crate::mqtt::{
    Decoder, Error, Oversized, Packet, Receiver, Version, encode_disconnect, encode_pingreq,
};
use crate::router::handle::TaskWaker;
use crate::transport::dial::{Dialed, QuickAck};

use crate::upstream::broker::LinkContext;
use crate::upstream::connect::Established;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::status::LinkStatus;

/// Bytes read at once. A large batch costs one pass over the router's shards.
const READ_BYTES: usize = 128 * 1024;
/// Capacity of an empty output buffer.
const OUTPUT_BYTES: usize = 4096;
/// With this much output waiting for the socket, nothing more is read.
const OUTPUT_MAX_BYTES: usize = 4 * 1024 * 1024;
/// With this much output, a write no longer waits for the machine's pace.
const PACED_OUTPUT_MAX_BYTES: usize = 16 * 1024;
/// Bytes that a packet of the broker may have beyond the largest that is forwarded.
const PACKET_OVERHEAD_BYTES: u32 = 1024;
/// How often a machine is told the time.
const TICK: Duration = Duration::from_millis(50);
/// A PINGREQ that is unanswered for this long means that the connection is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last bytes of a connection may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What holds while a connection is served; if it changes, the connection ends.
pub(super) struct Conditions {
    /// [`LinkContext::placement`].
    pub placement: u64,
    /// [`LinkContext::server`].
    pub server: usize,
}

/// Moves packets until the connection ends.
pub(super) async fn serve<M: Machine>(
    context: &LinkContext,
    link: &LinkStatus,
    machine: &mut M,
    wake: &TaskWaker,
    (established, handshake): (Established, &Handshake),
    conditions: Conditions,
) -> LinkEnd {
    let Established {
        mut io,
        rest,
        keep_alive,
        ..
    } = established;
    let mut pump = Pump::new(context, link, machine, handshake, keep_alive);
    pump.input.extend_from_slice(&rest);
    pump.machine
        .connected(handshake, context.clock.now(), &mut pump.out);
    let end = match pump.run(&mut io, wake, &conditions).await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    // Without a store the links' sessions end with the process, so the broker need not queue for them.
    let is_kept = link.role.has_filters() && context.router.keeps_link_sessions();
    let is_last = matches!(end, LinkEnd::Shutdown) && !is_kept;
    let expiry = (is_last && handshake.version == Version::V5).then_some(0);
    let remaining = &pump.out[pump.written..];
    close(&mut io, handshake.version, (&end, expiry), remaining).await;
    end
}

enum Event {
    /// The router has something for the link.
    Woken,
    /// Bytes have arrived.
    Read,
    /// Time has passed.
    Tick,
}

struct Pump<'a, M> {
    context: &'a LinkContext,
    link: &'a LinkStatus,
    machine: &'a mut M,
    decoder: Decoder,
    input: BytesMut,
    /// A packet that is too large, and the bytes of it that are still to come.
    skipping: Option<(Oversized, usize)>,
    out: Vec<u8>,
    /// Bytes of `out` that the socket has taken.
    written: usize,
    /// PINGREQs without an answer: when each was sent, and whether the machine asked for it.
    pings: VecDeque<(Instant, bool)>,
    last_sent: Instant,
    last_read: Instant,
    last_written: Instant,
    /// Fires when a paced write may go on.
    timer: Pin<Box<Sleep>>,
    keep_alive: Duration,
    /// [`Handshake::quick_ack`].
    quick_ack: bool,
    /// Bytes were read, and nothing was written since that would acknowledge them.
    unacknowledged: bool,
}

impl<'a, M: Machine> Pump<'a, M> {
    fn new(
        context: &'a LinkContext,
        link: &'a LinkStatus,
        machine: &'a mut M,
        handshake: &Handshake,
        keep_alive: Duration,
    ) -> Self {
        let packet_max = context.broker.access.packet_max;
        Self {
            context,
            link,
            machine,
            decoder: Decoder {
                version: handshake.version,
                receiver: Receiver::Client,
                max: packet_max.saturating_add(PACKET_OVERHEAD_BYTES),
            },
            input: BytesMut::with_capacity(READ_BYTES),
            skipping: None,
            out: Vec::with_capacity(OUTPUT_BYTES),
            written: 0,
            pings: VecDeque::new(),
            last_sent: Instant::now(),
            last_read: Instant::now(),
            last_written: Instant::now(),
            timer: Box::pin(sleep(Duration::ZERO)),
            keep_alive,
            quick_ack: handshake.quick_ack,
            unacknowledged: false,
        }
    }

    async fn run(
        &mut self,
        io: &mut Dialed,
        wake: &TaskWaker,
        conditions: &Conditions,
    ) -> Result<std::convert::Infallible, LinkEnd> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let context = self.context;
        loop {
            self.decode()?;
            let event = poll_fn(|cx| {
                // First, so that a busy link is looked after too.
                if ticks.poll_tick(cx).is_ready() {
                    return Poll::Ready(Ok(Event::Tick));
                }
                if wake.take(cx.waker()) {
                    return Poll::Ready(Ok(Event::Woken));
                }
                self.poll_io(io, cx)
            });
            let event = tokio::select! {
                biased;
                () = context.stop.cancelled() => return Err(LinkEnd::Shutdown),
                event = event => event?,
            };
            match event {
                Event::Woken => {
                    self.machine.poll(context.clock.now(), &mut self.out);
                    self.after_machine();
                }
                Event::Read => {}
                Event::Tick => {
                    self.check(conditions)?;
                    self.tick()?;
                }
            }
        }
    }

    /// `Err` if the connection is not what the links need now.
    fn check(&self, conditions: &Conditions) -> Result<(), LinkEnd> {
        let context = self.context;
        let placement = context.placement.load(Ordering::Acquire);
        if self.link.role.has_filters() && placement != conditions.placement {
            return Err(LinkEnd::PlacedAnew);
        }
        if context.server.load(Ordering::Acquire) != conditions.server {
            return Err(LinkEnd::Failover);
        }
        Ok(())
    }

    /// Gives the machine all packets that have arrived.
    fn decode(&mut self) -> Result<(), LinkEnd> {
        if self.input.is_empty() && self.skipping.is_none() {
            return Ok(());
        }
        let now = self.context.clock.now();
        let mut any = false;
        let mut used = 0;
        let result = loop {
            if let Some((packet, remaining)) = &mut self.skipping {
                let skipped = (*remaining).min(self.input.len() - used);
                used += skipped;
                *remaining -= skipped;
                self.machine.skipping(packet, now);
                if *remaining > 0 {
                    break Ok(());
                }
                any = true;
                if let Err(end) = self.machine.oversized(packet, now, &mut self.out) {
                    break Err(end);
                }
                self.skipping = None;
            }
            let (packet, size) = match self.decoder.next(&self.input[used..]) {
                Ok(Some(next)) => next,
                Ok(None) => break Ok(()),
                Err(Error::TooLarge { .. }) => match self.decoder.oversized(&self.input[used..]) {
                    Ok(Some(packet)) => {
                        let size = packet.size;
                        self.skipping = Some((packet, size));
                        continue;
                    }
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(LinkEnd::Malformed(error)),
                },
                Err(error) => break Err(LinkEnd::Malformed(error)),
            };
            used += size;
            any = true;
            let handled = match packet {
                Packet::Pingresp => {
                    if let Some((_, true)) = self.pings.pop_front() {
                        self.machine.ping_answered(now);
                    }
                    Ok(())
                }
                Packet::Disconnect(d) => Err(LinkEnd::Disconnect(d.reason)),
                other => self.machine.packet(&other, now, &mut self.out),
            };
            if handled.is_err() {
                break handled;
            }
        };
        self.input.advance(used);
        if any {
            self.machine.batch_ended(now, &mut self.out);
            self.after_machine();
        }
        result
    }

    fn after_machine(&mut self) {
        if self.machine.wants_ping() {
            self.ping(true);
        }
        let (in_flight, window) = self.machine.window();
        self.link.set_window(in_flight, window);
        if let Some(lag) = self.machine.lag() {
            self.link.set_lag(lag);
        }
    }

    fn ping(&mut self, for_machine: bool) {
        encode_pingreq(&mut self.out);
        self.pings.push_back((Instant::now(), for_machine));
    }

    fn tick(&mut self) -> Result<(), LinkEnd> {
        self.machine.poll(self.context.clock.now(), &mut self.out);
        self.after_machine();
        let silent = self.last_read.elapsed() > PING_TIMEOUT;
        let dead = |(sent, _): &(Instant, bool)| silent && sent.elapsed() > PING_TIMEOUT;
        if self.pings.front().is_some_and(dead) {
            return Err(LinkEnd::KeepAlive);
        }
        // A link that only sends must hear from the broker now and then, too.
        if self.pings.is_empty()
            && !self.keep_alive.is_zero()
            && self.last_sent.elapsed() > self.keep_alive / 2
        {
            self.last_sent = Instant::now();
            self.ping(false);
        }
        Ok(())
    }

    /// Whether `until` is still to come. If so, the task is woken then.
    fn waits_until(&mut self, until: Instant, cx: &mut Context<'_>) -> bool {
        if until <= Instant::now() {
            return false;
        }
        if self.timer.is_elapsed() || self.timer.deadline() > until {
            self.timer.as_mut().reset(until);
        }
        self.timer.as_mut().poll(cx).is_pending()
    }

    /// Whether the next write waits, so that it serves more packets.
    fn is_paced(&mut self, cx: &mut Context<'_>) -> bool {
        match self.machine.pace() {
            Some(pace) if self.written == 0 && self.out.len() < PACED_OUTPUT_MAX_BYTES => {
                !self.out.is_empty() && self.waits_until(self.last_written + pace, cx)
            }
            _ => false,
        }
    }

    fn poll_io(&mut self, io: &mut Dialed, cx: &mut Context<'_>) -> Poll<Result<Event, LinkEnd>> {
        if !self.is_paced(cx)
            && let Err(end) = self.write(io, cx)
        {
            return Poll::Ready(Err(end));
        }
        if self.out.len() - self.written > OUTPUT_MAX_BYTES {
            return Poll::Pending;
        }
        if self.input.capacity() - self.input.len() < READ_BYTES / 4 {
            self.input.reserve(READ_BYTES);
        }
        match poll_read_buf(Pin::new(io), cx, &mut self.input) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(LinkEnd::Closed)),
            Poll::Ready(Ok(_)) => {
                self.last_read = Instant::now();
                self.unacknowledged = true;
                Poll::Ready(Ok(Event::Read))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
            Poll::Pending => {
                if std::mem::take(&mut self.unacknowledged)
                    && self.quick_ack
                    && self.machine.awaits_packets()
                {
                    io.quick_ack(true);
                }
                Poll::Pending
            }
        }
    }

    /// Writes as much as the socket takes.
    fn write(&mut self, io: &mut Dialed, cx: &mut Context<'_>) -> Result<(), LinkEnd> {
        let before = self.written;
        while self.written < self.out.len() {
            match Pin::new(&mut *io).poll_write(cx, &self.out[self.written..]) {
                Poll::Ready(Ok(0)) => return Err(LinkEnd::Closed),
                Poll::Ready(Ok(n)) => self.written += n,
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
        }
        if self.written == before {
            return Ok(());
        }
        self.last_written = Instant::now();
        self.unacknowledged = false;
        if self.written < self.out.len() {
            return Ok(());
        }
        self.out.clear();
        self.written = 0;
        if self.out.capacity() > READ_BYTES {
            self.out = Vec::with_capacity(OUTPUT_BYTES);
        }
        if let Poll::Ready(Err(error)) = Pin::new(&mut *io).poll_flush(cx) {
            return Err(error.into());
        }
        // There is room again for publishes that wait in the queues.
        self.machine.poll(self.context.clock.now(), &mut self.out);
        if !self.out.is_empty() {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }
}

/// Writes the remaining output and a DISCONNECT where one is due, bounded in time.
/// `expiry`: a Session Expiry Interval in place of the one of CONNECT.
async fn close(
    io: &mut Dialed,
    version: Version,
    (end, expiry): (&LinkEnd, Option<u32>),
    remaining: &[u8],
) {
    let Some(code) = end.disconnect_code() else {
        return;
    };
    let mut out = remaining.to_vec();
    encode_disconnect(version, code, expiry, None, &mut out);
    let closing = async {
        io.write_all(&out).await?;
        io.flush().await?;
        io.shutdown().await
    };
    // The connection is gone whether or not this succeeds.
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}
