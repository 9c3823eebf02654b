//! The life of a connection after CONNACK.

mod farewell;
mod streams;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::auth::Identity;
use crate::mqtt::{Decoder, Packet, QoS, Receiver, Version};
use crate::router::handle::ConnectionHandle;
use crate::router::{Caller, Peer, SessionRef};
use crate::session::{CloseReason, Effect};
use crate::telemetry::{DeferReason, DisconnectReason, Qos, clean, metrics};
use crate::transport::{Closed, ConnectionTask, OutBuf, Stream};

use crate::client::end::End;
use crate::client::partial::{KEEP, Partial};
use crate::client::scope::sender_moved;
use crate::client::{ClientPolicy, Clients, Open};
use streams::{Lane, Network, allowed};

/// Output of the session for a lane that takes none beyond which nothing is read from that lane, bytes.
const BACKLOG_MAX: usize = 64 * 1024;
/// Output that the data streams of one connection have not taken beyond which none of them is read,
/// bytes: so much when all connections' is within its budget, [`BACKLOG_MAX`] when it is not.
const HELD_MAX: usize = 4 * 1024 * 1024;

/// A connection with its session.
pub(super) struct Opened {
    pub stream: Stream,
    /// Bytes that came behind CONNECT.
    pub input: Vec<u8>,
    pub admitted: Admitted,
}

/// What came of a CONNECT.
pub(super) struct Admitted {
    pub session: SessionRef,
    pub connection_no: u64,
    pub version: Version,
    pub packet_max: u32,
    pub wake: Arc<ConnectionHandle>,
    pub identity: Box<Identity>,
    pub place: Arc<Peer>,
    /// The P link of its publishes.
    pub publish_link: u8,
}

thread_local! {
    // One read buffer per worker: an idle connection has none.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How far the packets of one read were worked off, in bytes.
enum Step {
    /// Once what the last packet brought about is done.
    Again(usize),
    /// Until bytes come.
    Done(usize),
    /// Until the core has answered.
    Held(usize),
}

struct Connection<'a> {
    clients: &'a Clients,
    stream: Stream,
    session: SessionRef,
    connection_no: u64,
    version: Version,
    packet_max: u32,
    wake: Arc<ConnectionHandle>,
    identity: Box<Identity>,
    place: Arc<Peer>,
    out: OutBuf,
    /// Data streams on which something came.
    lanes: Vec<Lane<'a>>,
    /// While there are any.
    network: Option<Box<Network>>,
    /// The control lane's incomplete packet.
    partial: Partial<'a>,
    /// The lane whose next packet has to wait: nothing is read meanwhile.
    held: Option<u8>,
    /// Lanes that are left unread, as bits; the session knows whether there are any.
    unread: u16,
    /// The session may have output that was not taken.
    fresh: bool,
    /// The transport has bytes that it could not pass on yet.
    flushing: bool,
    /// Lanes for which the session had too much output after the last packets, as bits.
    full: u16,
    /// When a publish of QoS 0 came last, seconds: it may still be on its way.
    qos0_at: u32,
    /// The P link of its publishes.
    publish_link: u8,
}

/// Serves the connection to its end.
pub(super) fn serve(clients: Arc<Clients>, opened: Box<Opened>, open: Open) -> ConnectionTask {
    Box::pin(async move {
        let mut opened = opened;
        let early = std::mem::take(&mut opened.input);
        let mut connection = Connection::new(&clients, opened);
        let end = connection.run(early).await;
        // Boxed, and small while the connection lives.
        Box::pin(connection.depart(end)).await;
        drop(open);
    })
}

impl<'a> Connection<'a> {
    fn new(clients: &'a Clients, opened: Box<Opened>) -> Self {
        let Opened {
            stream, admitted, ..
        } = *opened;
        Self {
            clients,
            stream,
            session: admitted.session,
            connection_no: admitted.connection_no,
            version: admitted.version,
            packet_max: admitted.packet_max,
            wake: admitted.wake,
            identity: admitted.identity,
            place: admitted.place,
            out: OutBuf::default(),
            lanes: Vec::new(),
            network: None,
            partial: Partial::default(),
            held: None,
            unread: 0,
            fresh: true,
            qos0_at: 0,
            publish_link: admitted.publish_link,
            flushing: false,
            full: 0,
        }
    }

    /// Runs until something ends the connection; `early` is what came behind CONNECT.
    fn run(&mut self, early: Vec<u8>) -> impl Future<Output = End> {
        let mut end = self.received(0, &early).err();
        poll_fn(move |cx| match end.take() {
            Some(end) => Poll::Ready(end),
            None => self.poll(cx),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.fresh |= self.wake.take(cx.waker());
        if let Some(close) = self.wake.closing() {
            return Poll::Ready(End::from_close(close));
        }
        if self.wake.take_ping() {
            // What cannot be sent now is sent with the next output.
            let _ = self.stream.poll_ping(cx);
        }
        self.watch_lanes();
        // A busy connection gives the others their turn.
        for _ in 0..8 {
            if let Err(end) = self.poll_write(cx) {
                return Poll::Ready(end);
            }
            if let Some(lane) = self.held {
                // Woken by the core's answers; the tick is a second chance.
                if let Err(end) = self.received(lane, &[]) {
                    return Poll::Ready(end);
                }
                if self.held.is_some() {
                    self.clients.router.wake_soon(&self.wake);
                    return Poll::Pending;
                }
                self.fresh = true;
                continue;
            }
            let unread = self.unread_lanes();
            self.tell_unread(unread);
            if unread & 1 != 0 {
                return Poll::Pending;
            }
            self.stream.pause_streams(unread);
            if unread != 0 {
                self.wait_for_unread(unread);
            }
            match self.poll_read(cx) {
                Poll::Ready(Ok(())) => self.fresh = true,
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => {
                    if let Err(end) = self.check_partial() {
                        return Poll::Ready(end);
                    }
                    // A stream that was given up left something to do.
                    if !self.fresh {
                        return Poll::Pending;
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes until nothing is left or the socket takes no more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            if !self.out.is_empty() || self.flushing {
                let before = self.out.buf.len() - self.out.at;
                match self.stream.poll_send(cx, 0, &mut self.out) {
                    Poll::Ready(Ok(())) => {
                        metrics().bytes_sent.increment(before as u64);
                        self.flushing = false;
                        self.fresh = true;
                    }
                    Poll::Ready(Err(closed)) => return Err(End::from_closed(closed)),
                    Poll::Pending => {
                        if self.out.buf.len() - self.out.at < before {
                            self.wake.moved(self.clients.clock.now());
                        }
                        self.flushing = true;
                        if self.lanes.is_empty() {
                            return Ok(());
                        }
                    }
                }
            }
            self.poll_lanes(cx)?;
            if !self.fresh {
                return Ok(());
            }
            self.fresh = false;
            let now = self.clients.clock.now();
            let free = self.free_lanes();
            self.full &= !free.0;
            let taken = self.clients.router.take_lanes(
                self.session,
                self.connection_no,
                free,
                &mut self.out.buf,
                now,
            );
            let Some(side) = taken else {
                return Err(self.replaced());
            };
            if side.is_empty() && (free.0 & 1 == 0 || self.out.is_empty()) {
                return Ok(());
            }
            self.give_lanes(side);
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut scratch = SCRATCH.with(RefCell::take);
        scratch.clear();
        let polled = self.stream.poll_recv(cx, &mut scratch);
        let result = match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(Closed::StreamReset(number))) => {
                self.lane_gone(number);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(closed)) => Poll::Ready(Err(End::from_closed(closed))),
            Poll::Ready(Ok(recv)) => {
                metrics().bytes_received.increment(recv.bytes as u64);
                if let Some(peer) = self.stream.take_new_peer() {
                    self.moved(peer);
                }
                let result = self.received(recv.stream, &scratch);
                if recv.finished {
                    self.lane_closed(recv.stream);
                }
                Poll::Ready(result)
            }
        };
        SCRATCH.with(|s| s.replace(scratch));
        result
    }

    /// The client's address is another now.
    fn moved(&mut self, peer: SocketAddr) {
        tracing::info!(
            client_id = clean(&self.identity.client_id, 64),
            listener = &*self.place.listener,
            transport = self.place.transport,
            from = %self.place.address,
            %peer,
            "Client's address changed"
        );
        let place = Peer {
            address: peer,
            ..(*self.place).clone()
        };
        self.place = Arc::new(place);
        let (router, place) = (&self.clients.router, self.place.clone());
        router.moved(self.session, self.connection_no, place);
        let listener = &self.place.listener;
        if let Some(sender) = sender_moved(self.clients, listener, &self.identity, peer) {
            router.with(self.session, self.connection_no, |session, _| {
                session.connection().map(|c| c.set_sender(sender))
            });
        }
    }

    /// Takes bytes of one lane.
    fn received(&mut self, lane: u8, bytes: &[u8]) -> Result<(), End> {
        match self.take_in(lane, bytes) {
            Ok(()) => Ok(()),
            Err(end) => self.fault(lane, end),
        }
    }

    fn take_in(&mut self, lane: u8, bytes: &[u8]) -> Result<(), End> {
        let mut partial = std::mem::take(match lane {
            0 => &mut self.partial,
            n => &mut self.lane(n).partial,
        });
        let used = if partial.bytes.is_empty() {
            let used = self.packets(lane, bytes)?;
            partial.bytes.extend_from_slice(&bytes[used..]);
            used
        } else {
            partial.bytes.extend_from_slice(bytes);
            let used = self.packets(lane, &partial.bytes)?;
            partial.bytes.drain(..used);
            used
        };
        let clients = self.clients;
        partial.settle(&clients.input, used > 0, clients.clock.now());
        if clients.input.used() > clients.input_max && partial.bytes.len() > KEEP {
            return Err(End::quota(
                "incomplete packets of all clients use up their budget",
            ));
        }
        *match lane {
            0 => &mut self.partial,
            n => &mut self.lane(n).partial,
        } = partial;
        Ok(())
    }

    /// The rest of a packet may lie in streams that we do not read: its time stands still.
    fn wait_for_unread(&mut self, unread: u16) {
        let now = self.clients.clock.now();
        for lane in &mut self.lanes {
            if unread & (1 << lane.number) != 0 {
                lane.partial.since = now;
            }
        }
    }

    /// Ends a connection, or a data stream, whose packet takes too long; asks to be woken while one
    /// is incomplete.
    fn check_partial(&mut self) -> Result<(), End> {
        let all =
            || (self.lanes.iter().map(|l| (l.number, &l.partial))).chain([(0, &self.partial)]);
        if all().all(|(_, p)| p.bytes.is_empty()) {
            return Ok(());
        }
        let limit = self.clients.limits.packet_deadline.as_millis() as u64;
        let now = self.clients.clock.now();
        let late = |(_, p): &(u8, &Partial<'_>)| !p.bytes.is_empty() && p.since + limit <= now;
        let late = all().find(late).map(|(lane, _)| lane);
        self.clients.router.wake_soon(&self.wake);
        match late {
            None => Ok(()),
            Some(lane) => {
                let why = "a packet was not complete within limits.packet_deadline";
                let end = End {
                    label: DisconnectReason::PacketDeadline,
                    ..End::quota(why)
                };
                self.fault(lane, end)
            }
        }
    }

    /// Works off the whole packets in `bytes`; returns how many bytes they were.
    fn packets(&mut self, lane: u8, bytes: &[u8]) -> Result<usize, End> {
        let mut used = 0;
        while used < bytes.len() {
            match self.some_packets(lane, &bytes[used..])? {
                Step::Again(n) => used += n,
                Step::Done(n) => {
                    used += n;
                    self.hold(None);
                    return Ok(used);
                }
                Step::Held(n) => {
                    used += n;
                    self.hold(Some(lane));
                    return Ok(used);
                }
            }
        }
        self.hold(None);
        Ok(used)
    }

    /// Works off packets up to the first SUBSCRIBE.
    fn some_packets(&mut self, lane: u8, bytes: &[u8]) -> Result<Step, End> {
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
        let (router, reference) = (&clients.router, self.session);
        let publish_link = self.publish_link;
        let mut idle = false;
        let outcome = clients.router.feed(
            self.session,
            self.connection_no,
            &mut effects,
            |session, limits, effects| {
                let mut end = None;
                let mut step = Step::Done(0);
                idle = session.publishes_waiting() == 0;
                loop {
                    let (packet, size) = match decoder.next(&bytes[used..]) {
                        Ok(Some(next)) => next,
                        Ok(None) => {
                            step = Step::Done(used);
                            break;
                        }
                        Err(error) => {
                            end = Some(End::from_error(&error));
                            break;
                        }
                    };
                    if lane != 0 && !allowed(&packet) {
                        end = Some(End::from_close(CloseReason::ControlStreamOnly));
                        break;
                    }
                    if let Packet::Publish(p) = &packet {
                        let v3 = self.version < Version::V5 && p.qos > QoS::AtMostOnce;
                        let waiting = session.publishes_waiting();
                        if session.subscribing()
                            || (v3 && router.hold_publish(reference, publish_link, waiting, size))
                        {
                            step = Step::Held(used);
                            break;
                        }
                        counts[p.qos as usize] += 1;
                    }
                    used += size;
                    let handled = session.packet(lane, &packet, limits, &policy, now, effects);
                    if let Err(close) = handled {
                        end = Some(End::from_close(close));
                        break;
                    }
                    // The next packet is judged by what this one brought about.
                    if matches!(packet, Packet::Subscribe(_)) {
                        step = Step::Again(used);
                        break;
                    }
                }
                session.pump(limits, now);
                let full = session
                    .connection_ref()
                    .map_or(0, |c| c.full_streams(BACKLOG_MAX));
                (end, step, full)
            },
        );
        let qos = [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce];
        for (qos, count) in qos.into_iter().zip(counts) {
            if count > 0 {
                metrics().messages_received[qos].increment(count);
            }
        }
        let seconds = (now / 1000) as u32;
        // Nothing of it may be on its way to the core when it moves to another link.
        let moves = idle && router.publish_link(self.session) != self.publish_link;
        if moves && seconds.saturating_sub(self.qos0_at) > 2 {
            self.publish_link = router.move_publishes(self.session, self.publish_link);
        }
        if counts[0] > 0 {
            self.qos0_at = seconds;
        }
        let caller = Caller {
            session: self.session,
            connection_no: self.connection_no,
            publish_link: self.publish_link,
        };
        router.apply(caller, effects, now);
        let Some((end, step, full)) = outcome else {
            return Err(self.replaced());
        };
        self.full = full;
        if let Some(end) = end {
            return Err(end);
        }
        Ok(step)
    }

    /// Leaves the socket unread, or reads it again.
    fn hold(&mut self, lane: Option<u8>) {
        let before = std::mem::replace(&mut self.held, lane);
        if before.is_some() == lane.is_some() {
            return;
        }
        if lane.is_some() {
            metrics().publishes_deferred[DeferReason::V3Unread].increment(1);
        }
        self.tell_unread(if lane.is_some() { u16::MAX } else { 0 });
    }

    /// Lanes that are left unread, as bits: where a peer sends and does not read it gets no further
    /// answers.
    fn unread_lanes(&self) -> u16 {
        let full = self.full & !self.free_lanes().0;
        if self.lanes.is_empty() {
            return full;
        }
        let held: usize = self.lanes.iter().map(|l| l.out.rest().len()).sum();
        let held_max = match self.clients.router.output_pressed() {
            true => BACKLOG_MAX,
            false => HELD_MAX,
        };
        match held > held_max {
            true => u16::MAX << 1 | full,
            false => full,
        }
    }

    /// What the client may have sent on these lanes is left unread, as bits: as long as there are any,
    /// silence is not the client's.
    fn tell_unread(&mut self, lanes: u16) {
        let before = std::mem::replace(&mut self.unread, lanes);
        if before == lanes {
            return;
        }
        let now = self.clients.clock.now();
        // What it said meanwhile may be on its way yet.
        let again = before & !lanes;
        if again & 1 != 0 {
            self.partial.since = now;
        }
        for lane in self.lanes.iter_mut().filter(|l| again & 1 << l.number != 0) {
            lane.partial.since = now;
        }
        let unread = lanes != 0;
        if unread == (before != 0) {
            return;
        }
        self.clients
            .router
            .with(self.session, self.connection_no, |session, _| {
                if let Some(connection) = session.connection() {
                    connection.unread = unread;
                    connection.last_seen = now;
                }
            });
    }
}
