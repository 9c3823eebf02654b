//! The life of a connection after CONNACK.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::timeout;

use crate::auth::Identity;
use crate::mqtt::{Decoder, Error, Packet, ReasonCode, Receiver, Version, encode_disconnect};
use crate::router::wake::Wake;
use crate::router::{Place, SessionRef};
use crate::session::{Close, Effect};
use crate::telemetry::{DisconnectReason, Qos, clean, metrics};
use crate::transport::{CloseHow, Closed, OutBuf, Stream};

use super::{ClientPolicy, Clients};

/// How long a client is given to take what is left for it.
const GOODBYE: Duration = Duration::from_secs(1);
/// A partly received packet larger than this keeps its own buffer's capacity.
const KEEP: usize = 4096;

/// A connection with its session.
pub(super) struct Opened {
    /// Filled in by the CONNECT phase.
    pub stream: Option<Stream>,
    /// Bytes that came behind CONNECT.
    pub input: Vec<u8>,
    pub session: SessionRef,
    pub generation: u64,
    pub version: Version,
    pub packet_max: u32,
    pub wake: Arc<Wake>,
    pub identity: Box<Identity>,
    pub place: Arc<Place>,
}

thread_local! {
    // One read buffer per worker: an idle connection has none.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why the connection ends.
struct End {
    label: DisconnectReason,
    /// Sent to an MQTT 5 client; SUCCESS: nothing is sent.
    code: ReasonCode,
    why: std::borrow::Cow<'static, str>,
    /// DISCONNECT 0x00: the will is discarded.
    normal: bool,
    how: CloseHow,
}

struct Connection<'a> {
    clients: &'a Clients,
    stream: Stream,
    session: SessionRef,
    generation: u64,
    version: Version,
    packet_max: u32,
    wake: Arc<Wake>,
    identity: Box<Identity>,
    out: OutBuf,
    /// Output of QUIC data lanes, and incomplete packets of any lane.
    lanes: Vec<Lane>,
    /// The control lane's incomplete packet.
    partial: Vec<u8>,
    partial_since: u64,
    /// A 3.x client with too many publishes under way is not read from.
    held: bool,
}

struct Lane {
    number: u8,
    out: OutBuf,
    partial: Vec<u8>,
}

/// Serves the connection to its end.
pub(super) async fn run(clients: &Arc<Clients>, mut opened: Opened) {
    let Some(stream) = opened.stream.take() else {
        return;
    };
    let mut connection = Connection {
        clients,
        stream,
        session: opened.session,
        generation: opened.generation,
        version: opened.version,
        packet_max: opened.packet_max,
        wake: opened.wake,
        identity: opened.identity,
        out: OutBuf::default(),
        lanes: Vec::new(),
        partial: Vec::new(),
        partial_since: 0,
        held: false,
    };
    let place = opened.place;
    let early = std::mem::take(&mut opened.input);
    let mut end = match connection.received(0, &early) {
        Ok(()) => None,
        Err(end) => Some(end),
    };
    drop(early);
    let mut first = true;
    let end = match end.take() {
        Some(end) => end,
        None => poll_fn(|cx| connection.poll(cx, std::mem::take(&mut first))).await,
    };
    let session_ended = clients.router.disconnected(
        connection.session,
        connection.generation,
        // A drain fires no wills.
        end.normal || end.label == DisconnectReason::Draining,
        clients.clock.now(),
    );
    metrics().disconnects[end.label].increment(1);
    tracing::info!(
        client_id = clean(&connection.identity.client_id, 64),
        principal = clean(&connection.identity.principal, 64),
        listener = &*place.listener,
        transport = place.transport,
        peer = %connection.stream.peer_addr(),
        reason = %end.label,
        code = end.code.0,
        session_ended,
        "Connection ended: {}",
        end.why
    );
    let _ = timeout(GOODBYE, Box::pin(connection.goodbye(&end))).await;
}

impl Connection<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, first: bool) -> Poll<End> {
        let mut woken = self.wake.take(cx.waker()) || first;
        if let Some(close) = self.wake.closing() {
            return Poll::Ready(End::from_close(close));
        }
        if self.wake.take_ping() {
            // What cannot be sent now is sent with the next output.
            let _ = self.stream.poll_ping(cx);
        }
        // A busy connection gives the others their turn.
        for _ in 0..8 {
            if let Err(end) = self.poll_write(cx, woken) {
                return Poll::Ready(end);
            }
            if self.held {
                self.held = self.must_hold();
                if self.held {
                    // Woken by the core's next answer; the tick is a second chance.
                    return Poll::Pending;
                }
            }
            match self.poll_read(cx) {
                Poll::Ready(Ok(())) => woken = true,
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes until nothing is left or the socket takes no more.
    fn poll_write(&mut self, cx: &mut Context<'_>, mut fresh: bool) -> Result<(), End> {
        loop {
            if !self.out.is_empty() {
                let before = self.out.buf.len() - self.out.at;
                match self.stream.poll_send(cx, 0, &mut self.out) {
                    Poll::Ready(Ok(())) => {
                        metrics().bytes_sent.increment(before as u64);
                        fresh = true;
                    }
                    Poll::Ready(Err(closed)) => return Err(End::from_closed(closed)),
                    Poll::Pending => return Ok(()),
                }
            }
            self.poll_lanes(cx)?;
            if !fresh {
                return Ok(());
            }
            fresh = false;
            let now = self.clients.clock.now();
            let taken = self.clients.router.take_output(
                self.session,
                self.generation,
                &mut self.out.buf,
                now,
            );
            let Some(side) = taken else {
                return Err(self.replaced());
            };
            for (number, bytes) in side {
                self.lane(number).out.buf.extend_from_slice(&bytes);
            }
            if self.out.is_empty() && self.lanes.iter().all(|l| l.out.is_empty()) {
                return Ok(());
            }
        }
    }

    fn poll_lanes(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        for i in 0..self.lanes.len() {
            if self.lanes[i].out.is_empty() {
                continue;
            }
            let lane = &mut self.lanes[i];
            match self.stream.poll_send(cx, lane.number, &mut lane.out) {
                Poll::Ready(Ok(())) | Poll::Pending => {}
                Poll::Ready(Err(Closed::Lane(_))) => {
                    // Whole packets stay valid on the control lane.
                    if lane.out.at == 0 {
                        self.out.buf.append(&mut lane.out.buf);
                    }
                    lane.out = OutBuf::default();
                }
                Poll::Ready(Err(closed)) => return Err(End::from_closed(closed)),
            }
        }
        Ok(())
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut scratch = SCRATCH.with(RefCell::take);
        scratch.clear();
        let polled = self.stream.poll_recv(cx, &mut scratch);
        let result = match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(Closed::Lane(number))) => {
                self.lanes.retain(|l| l.number != number);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(closed)) => Poll::Ready(Err(End::from_closed(closed))),
            Poll::Ready(Ok(recv)) => {
                metrics().bytes_received.increment(recv.bytes as u64);
                let result = self.received(recv.lane, &scratch);
                if recv.lane_closed {
                    self.lanes.retain(|l| l.number != recv.lane);
                }
                Poll::Ready(result)
            }
        };
        SCRATCH.with(|s| s.replace(scratch));
        result
    }

    /// Takes bytes of one lane.
    fn received(&mut self, lane: u8, bytes: &[u8]) -> Result<(), End> {
        let mut partial = match lane {
            0 => std::mem::take(&mut self.partial),
            n => std::mem::take(&mut self.lane(n).partial),
        };
        let used = if partial.is_empty() {
            let used = self.packets(lane, bytes)?;
            partial.extend_from_slice(&bytes[used..]);
            used
        } else {
            partial.extend_from_slice(bytes);
            let used = self.packets(lane, &partial)?;
            partial.drain(..used);
            used
        };
        if partial.is_empty() && partial.capacity() > KEEP {
            partial = Vec::new();
        }
        if partial.is_empty() {
            self.partial_since = 0;
        } else {
            let now = self.clients.clock.now();
            if used > 0 || self.partial_since == 0 {
                self.partial_since = now;
            }
            // Judged when bytes come; one that sends none meets its keep alive.
            if self.partial_since + self.clients.limits.packet_deadline.as_millis() as u64 <= now {
                return Err(End {
                    label: DisconnectReason::PacketDeadline,
                    code: ReasonCode::QUOTA_EXCEEDED,
                    why: "a packet was not complete within limits.packet_deadline".into(),
                    normal: false,
                    how: CloseHow::Protocol,
                });
            }
        }
        match lane {
            0 => self.partial = partial,
            n => self.lane(n).partial = partial,
        }
        Ok(())
    }

    /// Works off the whole packets in `bytes`; returns how many bytes they were.
    fn packets(&mut self, lane: u8, bytes: &[u8]) -> Result<usize, End> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clients = self.clients;
        let now = clients.clock.now();
        let decoder = Decoder {
            version: self.version,
            receiver: Receiver::Server,
            max: self.packet_max,
        };
        let policy = ClientPolicy {
            clients,
            identity: &self.identity,
        };
        let mut effects: Vec<Effect> = Vec::new();
        let mut used = 0;
        let mut counts = [0u64; 3];
        let outcome = clients
            .router
            .with(self.session, self.generation, |session, limits| {
                let mut end = None;
                loop {
                    let (packet, size) = match decoder.next(&bytes[used..]) {
                        Ok(Some(next)) => next,
                        Ok(None) => break,
                        Err(error) => {
                            end = Some(End::from_error(&error));
                            break;
                        }
                    };
                    used += size;
                    if let Packet::Publish(p) = &packet {
                        counts[p.qos as usize] += 1;
                    }
                    let handled = session.packet(lane, &packet, limits, &policy, now, &mut effects);
                    if let Err(close) = handled {
                        end = Some(End::from_close(close));
                        break;
                    }
                }
                session.pump(limits, now);
                (end, session.stop_reading(limits))
            });
        let qos = [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce];
        for (qos, count) in qos.into_iter().zip(counts) {
            if count > 0 {
                metrics().messages_received[qos].increment(count);
            }
        }
        self.execute(effects, now);
        let Some((end, stop)) = outcome else {
            return Err(self.replaced());
        };
        if let Some(end) = end {
            return Err(end);
        }
        self.held = self.version < Version::V5 && (stop || self.must_hold());
        Ok(used)
    }

    fn execute(&self, effects: Vec<Effect>, now: u64) {
        let router = &self.clients.router;
        for effect in effects {
            match effect {
                Effect::Publish { .. } => router.publish(self.session, effect, now),
                Effect::Subscribe {
                    packet_id,
                    identifier,
                    wanted,
                } => router.subscribe(
                    self.session,
                    self.generation,
                    packet_id,
                    identifier,
                    &wanted,
                    now,
                ),
                Effect::Unsubscribe { filters } => router.unsubscribe(self.session, &filters, now),
            }
        }
    }

    fn must_hold(&self) -> bool {
        let router = &self.clients.router;
        if router.hold_reading(self.session) {
            return true;
        }
        router
            .with(self.session, self.generation, |s, l| s.stop_reading(l))
            .unwrap_or(false)
    }

    fn lane(&mut self, number: u8) -> &mut Lane {
        let at = match self.lanes.iter().position(|l| l.number == number) {
            Some(at) => at,
            None => {
                self.lanes.push(Lane {
                    number,
                    out: OutBuf::default(),
                    partial: Vec::new(),
                });
                self.lanes.len() - 1
            }
        };
        &mut self.lanes[at]
    }

    /// The session has another connection, or none: the wake says why.
    fn replaced(&self) -> End {
        match self.wake.closing() {
            Some(close) => End::from_close(close),
            None => End {
                label: DisconnectReason::SessionEnded,
                code: ReasonCode::SESSION_TAKEN_OVER,
                why: "the session was ended under the connection".into(),
                normal: false,
                how: CloseHow::Normal,
            },
        }
    }

    /// What is left in the output, DISCONNECT where one is due, and the transport's own end.
    async fn goodbye(&mut self, end: &End) {
        if matches!(end.label, DisconnectReason::Closed | DisconnectReason::Io) {
            return;
        }
        if self.version == Version::V5 && end.code != ReasonCode::SUCCESS {
            encode_disconnect(self.version, end.code, None, None, &mut self.out.buf);
        }
        if !self.out.is_empty()
            && poll_fn(|cx| self.stream.poll_send(cx, 0, &mut self.out))
                .await
                .is_err()
        {
            return;
        }
        poll_fn(|cx| self.stream.poll_close(cx, end.how)).await;
    }
}

impl End {
    fn from_close(close: Close) -> Self {
        use DisconnectReason as D;
        let code = close.reason;
        let (label, how) = match code {
            ReasonCode::SUCCESS => (D::Normal, CloseHow::Normal),
            ReasonCode::DISCONNECT_WITH_WILL_MESSAGE => (D::NormalWithWill, CloseHow::Normal),
            ReasonCode::SESSION_TAKEN_OVER => (D::TakenOver, CloseHow::Normal),
            ReasonCode::KEEP_ALIVE_TIMEOUT => (D::KeepAlive, CloseHow::Normal),
            ReasonCode::SERVER_SHUTTING_DOWN => (D::Draining, CloseHow::GoingAway),
            ReasonCode::RECEIVE_MAXIMUM_EXCEEDED => (D::ReceiveMaximum, CloseHow::Protocol),
            ReasonCode::TOPIC_ALIAS_INVALID => (D::TopicAlias, CloseHow::Protocol),
            ReasonCode::TOPIC_NAME_INVALID | ReasonCode::TOPIC_FILTER_INVALID => {
                (D::Topic, CloseHow::Protocol)
            }
            ReasonCode::QOS_NOT_SUPPORTED | ReasonCode::RETAIN_NOT_SUPPORTED => {
                (D::NotSupported, CloseHow::Protocol)
            }
            ReasonCode::QUOTA_EXCEEDED => (D::Quota, CloseHow::Overload),
            ReasonCode::PROTOCOL_ERROR => (D::Protocol, CloseHow::Protocol),
            _ => (D::Other, CloseHow::Normal),
        };
        let client_ended = matches!(label, D::Normal | D::NormalWithWill);
        if !client_ended && how == CloseHow::Protocol {
            metrics().packet_rejected(code.0, code.name());
        }
        Self {
            label,
            code: if client_ended {
                ReasonCode::SUCCESS
            } else {
                code
            },
            why: close.why.into(),
            normal: label == D::Normal,
            how,
        }
    }

    fn from_error(error: &Error) -> Self {
        use DisconnectReason as D;
        let code = error.reason_code();
        metrics().packet_rejected(code.0, code.name());
        let label = match code {
            ReasonCode::PACKET_TOO_LARGE => D::TooLarge,
            ReasonCode::PROTOCOL_ERROR => D::Protocol,
            ReasonCode::TOPIC_NAME_INVALID | ReasonCode::TOPIC_FILTER_INVALID => D::Topic,
            ReasonCode::TOPIC_ALIAS_INVALID => D::TopicAlias,
            _ => D::Malformed,
        };
        Self {
            label,
            code,
            why: error.to_string().into(),
            normal: false,
            how: CloseHow::Protocol,
        }
    }

    fn from_closed(closed: Closed) -> Self {
        use DisconnectReason as D;
        let (label, code, how) = match &closed {
            Closed::Eof | Closed::Reset(_) => (D::Closed, ReasonCode::SUCCESS, CloseHow::Normal),
            Closed::TooLarge => (
                D::TooLarge,
                ReasonCode::PACKET_TOO_LARGE,
                CloseHow::Protocol,
            ),
            Closed::Violation { .. } => {
                (D::Protocol, ReasonCode::PROTOCOL_ERROR, CloseHow::Protocol)
            }
            Closed::Lane(_) | Closed::Io(_) => (D::Io, ReasonCode::SUCCESS, CloseHow::Normal),
        };
        Self {
            label,
            code,
            why: closed.to_string().into(),
            normal: false,
            how,
        }
    }
}
