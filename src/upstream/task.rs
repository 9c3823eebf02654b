//! The task of one link: dials, reconnects with back-off, moves bytes between socket and machine.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep, timeout};
use tokio_util::io::poll_read_buf;

use crate::mqtt::{
    Decoder, Error, Packet, ReasonCode, Receiver, Version, encode_disconnect, encode_pingreq,
};
use crate::router::handle::TaskWaker;
use crate::telemetry::LinkDownReason;
use crate::transport::dial::Dialed;

use crate::upstream::connect::{Established, establish};
use crate::upstream::link::machine::{LinkEnd, Machine};
use crate::upstream::profile::cache::learn;
use crate::upstream::{LinkStatus, Role, Shared};

/// Bytes read at once: a large batch costs one pass over the shards.
const READ: usize = 128 * 1024;
/// Output that waits for the socket before nothing more is read.
const OUTPUT_MAX: usize = 4 * 1024 * 1024;
/// Output that is written whatever the pace.
const PACED_OUTPUT: usize = 16 * 1024;
/// How often a machine is told the time.
const TICK: Duration = Duration::from_millis(50);
/// A PINGREQ unanswered for this long means that the link is dead.
const PING_PATIENCE: Duration = Duration::from_secs(10);

/// Runs a link until it is told to stop.
pub(super) async fn run<M: Machine>(
    shared: Arc<Shared>,
    link: Arc<LinkStatus>,
    mut machine: M,
    wake: Arc<TaskWaker>,
) {
    // The server that has this process's session of the link.
    let mut session_at: Option<usize> = None;
    let mut placement = shared.placement.load(Ordering::Acquire);
    let mut backoff = Backoff::new(&shared);
    let mut rivals = Rivals::default();
    // A CONNECT may have begun a session at the core, and its answer did not come.
    let mut unanswered = false;
    // A link that only a need brings about.
    tokio::select! {
        () = wanted(&shared, &link, &wake) => {}
        () = shared.stop.cancelled() => return,
    }
    link.metrics().up.set(0.0);
    while !shared.stop.is_cancelled() {
        let index = shared.server.load(Ordering::Acquire);
        let server = &shared.core.config.servers[index];
        let placed = shared.placement.load(Ordering::Acquire);
        if matches!(link.role, Role::Data | Role::Shared) && placed != placement {
            session_at = None;
        }
        placement = placed;
        let clean = session_at != Some(index);
        let attempt = Box::pin(establish(&shared.core, &link, server, clean));
        let outcome = tokio::select! {
            outcome = attempt => outcome,
            () = shared.stop.cancelled() => return,
        };
        let (reason, why) = match outcome {
            Ok(mut up) => {
                session_at = Some(index);
                up.up.doubtful = std::mem::take(&mut unanswered) && up.up.session_present;
                // Already while the core is probed: another link's trouble is its own.
                shared.up.fetch_add(1, Ordering::AcqRel);
                learn(&shared.core, index, &mut up).await;
                let since = Instant::now();
                came_up(&shared, &link, &up);
                let end = serve(&shared, &link, &mut machine, &wake, up, (placement, index)).await;
                machine.down(&end, shared.clock.now());
                went_down(&shared, &link, &end);
                rivals.ended(&shared, &link, &end, since.elapsed());
                match end.reason {
                    // Two that take it from each other at every turn serve nobody.
                    LinkDownReason::TakenOver => backoff.wait = backoff.max,
                    LinkDownReason::Failover => backoff.reset(),
                    _ if since.elapsed() > Duration::from_secs(10) => backoff.reset(),
                    _ => {}
                }
                (end.reason, end.why)
            }
            Err(failed) => {
                use LinkDownReason::{Closed, Io, Protocol, Timeout};
                unanswered |= matches!(failed.reason, Closed | Io | Protocol | Timeout);
                shared.fail_over(index);
                // The core was away, which explains much.
                rivals.short = 0;
                (failed.reason, failed.why)
            }
        };
        link.metrics().disconnects[reason].increment(1);
        link.state.lock().last_error = Some(why.clone());
        if shared.stop.is_cancelled() {
            return;
        }
        let wait = backoff.next();
        if backoff.worth_a_line() {
            tracing::warn!(
                link = link.name,
                server = %server,
                attempts = backoff.attempts,
                wait_ms = wait.as_millis() as u64,
                "Link to the core is down: {why}"
            );
        }
        tokio::select! {
            () = sleep(wait) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

/// There is something for the link to do.
async fn wanted(shared: &Shared, link: &LinkStatus, wake: &TaskWaker) {
    let router = &shared.router;
    let now = || match link.role {
        Role::Data | Role::Retained => true,
        Role::Shared => router.filters_on(router.shared_link(link.number)) > 0,
        Role::Publish => link.number < router.publish_links_wanted(),
    };
    while !now() {
        poll_fn(|cx| match wake.take(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

fn came_up(shared: &Shared, link: &LinkStatus, up: &Established) {
    let protocol = match up.up.version {
        Version::V5 => "5",
        _ => "3.1.1",
    };
    let server = {
        let mut state = link.state.lock();
        state.up = true;
        state.protocol = Some(protocol);
        state.last_error = None;
        state.server.clone()
    };
    if shared
        .router
        .set_broker_features(&up.facts, shared.clock.now())
    {
        shared.placement.fetch_add(1, Ordering::AcqRel);
    }
    link.metrics().up.set(1.0);
    tracing::info!(
        link = link.name,
        server,
        protocol,
        session_present = up.up.session_present,
        receive_maximum = up.up.receive_maximum,
        identifiers = up.up.identifiers,
        "Link to the core is up"
    );
}

fn went_down(shared: &Shared, link: &LinkStatus, end: &LinkEnd) {
    shared.up.fetch_sub(1, Ordering::AcqRel);
    link.state.lock().up = false;
    link.metrics().up.set(0.0);
    link.set_window(0, 0);
    tracing::info!(link = link.name, reason = %end.reason, "Link to the core ended: {}", end.why);
}

/// Moves packets until the link ends.
async fn serve<M: Machine>(
    shared: &Shared,
    link: &LinkStatus,
    machine: &mut M,
    wake: &TaskWaker,
    established: Established,
    (placement, server): (u64, usize),
) -> LinkEnd {
    let Established {
        mut io,
        up,
        rest,
        keep_alive,
        ..
    } = established;
    let mut pump = Pump {
        shared,
        link,
        machine,
        decoder: Decoder {
            version: up.version,
            receiver: Receiver::Client,
            max: shared.core.packet_max.saturating_add(1024),
        },
        input: BytesMut::with_capacity(READ),
        out: Vec::with_capacity(4096),
        sent: 0,
        pings: std::collections::VecDeque::new(),
        last_sent: Instant::now(),
        last_read: Instant::now(),
        last_written: Instant::now(),
        timer: Box::pin(sleep(Duration::ZERO)),
        keep_alive,
    };
    pump.input.extend_from_slice(&rest);
    pump.machine.up(&up, shared.clock.now(), &mut pump.out);
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = loop {
        if let Err(end) = pump.decode() {
            break end;
        }
        let event = poll_fn(|cx| {
            // First, so that a busy link is looked after too.
            if ticks.poll_tick(cx).is_ready() {
                return Poll::Ready(Ok(Event::Tick));
            }
            if wake.take(cx.waker()) {
                return Poll::Ready(Ok(Event::Woken));
            }
            match pump.poll_io(&mut io, cx) {
                Poll::Ready(event) => Poll::Ready(event),
                Poll::Pending => Poll::Pending,
            }
        });
        let event = tokio::select! {
            biased;
            () = shared.stop.cancelled() => {
                break LinkEnd {
                    reason: LinkDownReason::Shutdown,
                    code: ReasonCode::SUCCESS,
                    why: "shutting down".into(),
                };
            }
            event = event => event,
        };
        match event {
            Ok(Event::Woken) => {
                pump.machine.poll(shared.clock.now(), &mut pump.out);
                pump.after();
            }
            Ok(Event::Read) => {}
            Ok(Event::Tick) => {
                if matches!(link.role, Role::Data | Role::Shared)
                    && shared.placement.load(Ordering::Acquire) != placement
                {
                    break LinkEnd {
                        reason: LinkDownReason::Protocol,
                        code: ReasonCode::SUCCESS,
                        why: "filters were placed anew".into(),
                    };
                }
                if shared.server.load(Ordering::Acquire) != server {
                    break LinkEnd {
                        reason: LinkDownReason::Failover,
                        code: ReasonCode::SUCCESS,
                        why: "the links go to another server".into(),
                    };
                }
                if let Err(end) = pump.tick() {
                    break end;
                }
            }
            Err(end) => break end,
        }
    };
    say_goodbye(&mut io, up.version, &end, &pump.out[pump.sent..]).await;
    end
}

enum Event {
    Woken,
    Read,
    Tick,
}

struct Pump<'a, M> {
    shared: &'a Shared,
    link: &'a LinkStatus,
    machine: &'a mut M,
    decoder: Decoder,
    input: BytesMut,
    out: Vec<u8>,
    sent: usize,
    /// PINGREQs under way: when sent, and whether the machine asked for it.
    pings: std::collections::VecDeque<(Instant, bool)>,
    last_sent: Instant,
    last_read: Instant,
    last_written: Instant,
    /// Fires when a paced write may go on.
    timer: Pin<Box<Sleep>>,
    keep_alive: Duration,
}

impl<M: Machine> Pump<'_, M> {
    fn decode(&mut self) -> Result<(), LinkEnd> {
        let now = self.shared.clock.now();
        let mut some = false;
        let mut used = 0;
        let result = loop {
            let (packet, size) = match self.decoder.next(&self.input[used..]) {
                Ok(Some(next)) => next,
                Ok(None) => break Ok(()),
                Err(e) => break Err(broken(&e)),
            };
            used += size;
            some = true;
            let handled = match packet {
                Packet::Pingresp => {
                    if let Some((_, true)) = self.pings.pop_front() {
                        self.machine.ping_answered(now);
                    }
                    Ok(())
                }
                Packet::Disconnect(d) => Err(LinkEnd {
                    reason: match d.reason {
                        ReasonCode::SESSION_TAKEN_OVER => LinkDownReason::TakenOver,
                        _ => LinkDownReason::Disconnect,
                    },
                    code: ReasonCode::SUCCESS,
                    why: format!("the core sent DISCONNECT: {}", d.reason.name()),
                }),
                other => self.machine.packet(&other, now, &mut self.out),
            };
            if let Err(end) = handled {
                break Err(end);
            }
        };
        self.input.advance(used);
        if some {
            self.machine.batch_ended(now, &mut self.out);
            self.after();
        }
        result
    }

    fn after(&mut self) {
        if self.machine.wants_ping() {
            self.ping(true);
        }
        let (in_flight, window) = self.machine.window();
        self.link.set_window(in_flight, window);
    }

    fn ping(&mut self, for_machine: bool) {
        encode_pingreq(&mut self.out);
        self.pings.push_back((Instant::now(), for_machine));
    }

    fn tick(&mut self) -> Result<(), LinkEnd> {
        self.machine.poll(self.shared.clock.now(), &mut self.out);
        self.after();
        let silent = self.last_read.elapsed() > PING_PATIENCE;
        let dead = |(sent, _): &(Instant, bool)| silent && sent.elapsed() > PING_PATIENCE;
        if self.pings.front().is_some_and(dead) {
            return Err(LinkEnd {
                reason: LinkDownReason::KeepAlive,
                code: ReasonCode::SUCCESS,
                why: "the core answers no PINGREQ".into(),
            });
        }
        // Also a link that only sends must hear from the core now and then.
        if self.pings.is_empty()
            && !self.keep_alive.is_zero()
            && self.last_sent.elapsed() > self.keep_alive / 2
        {
            self.last_sent = Instant::now();
            self.ping(false);
        }
        Ok(())
    }

    /// Whether `until` is still to come; then the task is woken at it.
    fn wait(&mut self, until: Instant, cx: &mut std::task::Context<'_>) -> bool {
        if until <= Instant::now() {
            return false;
        }
        if self.timer.is_elapsed() || self.timer.deadline() > until {
            self.timer.as_mut().reset(until);
        }
        self.timer.as_mut().poll(cx).is_pending()
    }

    fn poll_io(
        &mut self,
        io: &mut Dialed,
        cx: &mut std::task::Context<'_>,
    ) -> Poll<Result<Event, LinkEnd>> {
        let failed = |e: std::io::Error| LinkEnd {
            reason: LinkDownReason::Io,
            code: ReasonCode::SUCCESS,
            why: e.to_string(),
        };
        let pace = self.machine.pace();
        let mut wrote = false;
        let wait = match pace {
            Some(pace) if self.sent == 0 && self.out.len() < PACED_OUTPUT => {
                !self.out.is_empty() && self.wait(self.last_written + pace, cx)
            }
            _ => false,
        };
        while !wait && self.sent < self.out.len() {
            match Pin::new(&mut *io).poll_write(cx, &self.out[self.sent..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(LinkEnd::closed())),
                Poll::Ready(Ok(n)) => {
                    self.sent += n;
                    wrote = true;
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(failed(e))),
                Poll::Pending => break,
            }
        }
        if wrote {
            self.last_written = Instant::now();
        }
        if wrote && self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
            if self.out.capacity() > READ {
                self.out = Vec::with_capacity(4096);
            }
            if let Poll::Ready(Err(e)) = Pin::new(&mut *io).poll_flush(cx) {
                return Poll::Ready(Err(failed(e)));
            }
            // There is room again for what waits in the lanes.
            let before = self.out.len();
            self.machine.poll(self.shared.clock.now(), &mut self.out);
            if self.out.len() > before {
                cx.waker().wake_by_ref();
            }
        }
        if self.out.len() - self.sent > OUTPUT_MAX {
            return Poll::Pending;
        }
        if self.input.capacity() - self.input.len() < READ / 4 {
            self.input.reserve(READ);
        }
        match poll_read_buf(Pin::new(io), cx, &mut self.input) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(LinkEnd::closed())),
            Poll::Ready(Ok(_)) => {
                self.last_read = Instant::now();
                Poll::Ready(Ok(Event::Read))
            }
            Poll::Ready(Err(e)) => Poll::Ready(Err(failed(e))),
            Poll::Pending => Poll::Pending,
        }
    }
}

fn broken(error: &Error) -> LinkEnd {
    LinkEnd {
        reason: LinkDownReason::Protocol,
        code: error.reason_code(),
        why: format!("the core sent a packet that is not legal: {error}"),
    }
}

/// What was put out, and a DISCONNECT where one is due; bounded in time.
async fn say_goodbye(io: &mut Dialed, version: Version, end: &LinkEnd, rest: &[u8]) {
    let shutdown = end.reason == LinkDownReason::Shutdown;
    if !shutdown && end.code == ReasonCode::SUCCESS {
        return;
    }
    let mut out = rest.to_vec();
    // At the end of the process its sessions end too: the core need not queue for them.
    let expiry = (shutdown && version == Version::V5).then_some(0);
    encode_disconnect(version, end.code, expiry, None, &mut out);
    let goodbye = async {
        io.write_all(&out).await?;
        io.flush().await?;
        io.shutdown().await
    };
    // It is gone either way.
    let _ = timeout(Duration::from_secs(1), goodbye).await;
}

/// Looks out for a second process with the same `node.id` at the same core: the two take the
/// links' client identifiers from each other.
#[derive(Default)]
struct Rivals {
    /// Connections in a row that the core closed soon after it took them.
    short: u32,
}

impl Rivals {
    /// Connections that end within this time are short.
    const SHORT: Duration = Duration::from_secs(15);
    /// An MQTT 3.1.1 core does not say why: so many in a row are a sign.
    const SIGN: u32 = 4;

    fn ended(&mut self, shared: &Shared, link: &LinkStatus, end: &LinkEnd, lived: Duration) {
        let closed = matches!(end.reason, LinkDownReason::Closed | LinkDownReason::Io);
        self.short = match closed && lived < Self::SHORT {
            true => self.short + 1,
            false => 0,
        };
        let told = end.reason == LinkDownReason::TakenOver;
        if told || (self.short >= Self::SIGN && self.short.is_power_of_two()) {
            let client_id = format!(
                "{}-{}-{}",
                shared.core.config.client_id_prefix, shared.core.node, link.name
            );
            tracing::error!(
                link = link.name,
                client_id,
                node_id = shared.core.node,
                "{}; node.id must differ between processes at one core",
                match told {
                    true =>
                        "Another client took the link's client identifier: is there a second Tidegate with this node.id?",
                    false =>
                        "The core closes the link again and again soon after it took it: is there a second Tidegate with this node.id?",
                }
            );
        }
    }
}

/// Doubling waits with jitter.
struct Backoff {
    min: Duration,
    max: Duration,
    wait: Duration,
    attempts: u64,
}

impl Backoff {
    fn new(shared: &Shared) -> Self {
        let min = shared.core.config.backoff_min;
        Self {
            min,
            max: shared.core.config.backoff_max,
            wait: min,
            attempts: 0,
        }
    }

    fn reset(&mut self) {
        self.wait = self.min;
        self.attempts = 0;
    }

    fn next(&mut self) -> Duration {
        self.attempts += 1;
        let wait = self.wait;
        self.wait = (wait * 2).min(self.max);
        // Between a half and the whole of it.
        let random = getrandom::u32().unwrap_or(u32::MAX / 2);
        wait / 2 + wait.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
    }

    /// The first failures, then ever fewer.
    fn worth_a_line(&self) -> bool {
        self.attempts <= 2 || self.attempts.is_power_of_two() || self.attempts.is_multiple_of(64)
    }
}
