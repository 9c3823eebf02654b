//! One client's connection without its socket.
//!
//! Bytes, streams and time go in; output, the connection's end and a deadline come out. The machine
//! has no clock, no socket and no randomness. It lives between CONNACK and the connection's end, in
//! the task that owns the socket or in a simulation.

mod input;
mod read_buffer;
mod streams;
#[cfg(test)]
mod tests;

use std::num::NonZeroU8;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use crate::budget::Account;
use crate::mqtt::{ReasonCode, Version, encode_disconnect};
use crate::outbuf::OutBuf;
use crate::router::handle::ConnectionHandle;
use crate::router::{Caller, Connected, Router, SessionRef};
use crate::session::{CloseReason, Policy};
use crate::streams::{StreamId, StreamSet};
use crate::time::{Deadline, Millis};

use crate::client::end::End;
pub(in crate::client) use read_buffer::{KEEP_BYTES, ReadBuffer};
use streams::{DataStream, Network};
pub use streams::{ResetCause, StreamReset};

/// While the session has more output than this for a stream that takes none, nothing is read from
/// that stream.
const BACKLOG_MAX_BYTES: usize = 64 * 1024;
/// While the data streams of one connection have not taken this much output, none of them is read;
/// [`BACKLOG_MAX_BYTES`] while the output of all connections is over its budget.
const STREAMS_OUTPUT_MAX_BYTES: usize = 4 * 1024 * 1024;

/// The next packet of a stream has to wait.
#[derive(Clone, Copy, Debug)]
struct Pause {
    stream: StreamId,
    why: PauseReason,
}

/// The event for which a packet has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PauseReason {
    /// The answer to a SUBSCRIBE before it.
    Subscribing,
    /// Room among the publishes that wait for the broker, for a 3.x client.
    Room,
    /// The answer to a publish, for an MQTT 5 client that has sent more than our Receive Maximum.
    ReceiveMaximum,
    /// The connection's next turn.
    Turn,
    /// The disk: the connection's output is withheld until a change of the session is there.
    Commit,
}

/// The limits of every connection.
#[derive(Debug)]
pub struct Limits {
    /// Bytes of the incomplete packets of all connections.
    pub input: Arc<Account>,
    /// The budget of `input`.
    pub input_max_bytes: u64,
    /// The time from a packet's first byte to its last; a second more for each 8 KiB received.
    pub packet_deadline: Duration,
    /// The time in which a stream must take a part of its output.
    pub write_stall: Duration,
    /// Packets of one connection that are taken before other connections have their turn.
    pub turn_packets: NonZeroU8,
}

/// What a machine borrows for the time of one call.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The router that owns the session.
    pub router: &'a Router,
    /// What the client may do.
    pub policy: &'a dyn Policy,
    /// The limits of every connection.
    pub limits: &'a Limits,
    /// The time of the call.
    pub now: Millis,
}

/// A connection between CONNACK and its end.
///
/// After each wake-up the driver calls, in this order: [`Machine::woken`]; [`Machine::watch`]; then,
/// until nothing happens any more, [`Machine::transmit`] while there is output that the transport
/// takes, [`Machine::resume`] if the machine is [`Machine::paused`], and [`Machine::received`] with
/// bytes of the streams that [`Machine::unread`] does not name. Once [`Machine::turn_is_over`], the
/// driver lets other connections have their turn, and begins again. When all bytes are read, it calls
/// [`Machine::expired`]. While there is a [`Machine::deadline`], or the machine is
/// paused, it asks the router for a wake-up at the next tick. At the end it calls
/// [`Machine::ended`].
#[derive(Debug)]
pub struct Machine {
    handle: Arc<ConnectionHandle>,
    session: SessionRef,
    connection_no: u64,
    version: Version,
    packet_max_bytes: u32,
    /// The publish link of the session's publishes.
    publish_link: u8,
    /// The round of that link with which everything that it does not acknowledge has arrived at the
    /// broker: publishes of QoS 0, and publishes of earlier connections.
    publish_round: u32,
    /// The incomplete packet of the control stream.
    input: ReadBuffer,
    /// Output for the control stream.
    output: OutBuf,
    /// The data streams that were used.
    streams: Vec<DataStream>,
    /// Whether the network carries anything, once a data stream had output.
    network: Option<Box<Network>>,
    /// The stream whose next packet has to wait. Nothing is read meanwhile.
    paused: Option<Pause>,
    /// The streams that are left unread. The session knows whether there are any.
    unread: StreamSet,
    /// The streams for which the session had too much output after their last packets.
    full: StreamSet,
    /// Packets that may still be taken in this turn.
    turn: u8,
    /// The session may have output that was not taken.
    stale: bool,
    /// The transport has not passed on all bytes of the control stream.
    blocked: bool,
    /// The session's CONNACK was taken.
    greeted: bool,
}

/// The remains of a connection that ended: the last output, and the session's fate.
#[derive(Debug)]
pub struct Remains {
    /// The last output of the control stream.
    pub output: OutBuf,
    /// The last output of the data streams, with their streams.
    pub streams: Vec<(StreamId, OutBuf)>,
    /// Whether the session ended with the connection.
    pub session_ended: bool,
}

impl Machine {
    /// The machine of a connection that the router has just given its session. `packet_max_bytes`
    /// is the Maximum Packet Size that CONNACK announced.
    pub fn new(
        connected: &Connected,
        handle: Arc<ConnectionHandle>,
        version: Version,
        packet_max_bytes: u32,
    ) -> Self {
        Self {
            handle,
            session: connected.session,
            connection_no: connected.connection_no,
            version,
            packet_max_bytes,
            publish_link: connected.publish_link,
            publish_round: connected.publish_round,
            input: ReadBuffer::default(),
            output: OutBuf::default(),
            streams: Vec::new(),
            network: None,
            paused: None,
            unread: StreamSet::EMPTY,
            full: StreamSet::EMPTY,
            // The first turn begins before anybody wakes the machine.
            turn: u8::MAX,
            stale: true,
            blocked: false,
            greeted: false,
        }
    }

    /// The router's handle on this connection.
    pub fn handle(&self) -> &Arc<ConnectionHandle> {
        &self.handle
    }

    /// The connection, as the router knows it.
    pub fn caller(&self) -> Caller {
        Caller {
            session: self.session,
            connection_no: self.connection_no,
            publish_link: self.publish_link,
        }
    }

    /// To be called after a wake-up, with the waker for the next one. A turn begins.
    ///
    /// # Errors
    /// The router asked the connection to end.
    pub fn woken(&mut self, limits: &Limits, waker: &Waker) -> Result<(), End> {
        self.begin_turn(limits);
        self.stale |= self.handle.take(waker);
        match self.handle.closing() {
            Some(close) => Err(End::from_close(close)),
            None => Ok(()),
        }
    }

    /// Whether a packet that has arrived must wait: for the answer to a SUBSCRIBE or to a publish before
    /// it, for room among the publishes that wait for the broker, for the disk, or for the next turn. Nothing is to be
    /// read meanwhile.
    pub fn paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Whether no more packets are taken before the next turn.
    pub fn turn_is_over(&self) -> bool {
        self.turn == 0
    }

    fn begin_turn(&mut self, limits: &Limits) {
        self.turn = limits.turn_packets.get();
    }

    /// Takes the packets that wait for the next turn: the connection is lost, and has no other one.
    ///
    /// # Errors
    /// The connection ends for another reason, such as its client's DISCONNECT.
    pub fn take_rest(&mut self, cx: &Context<'_>) -> Result<Vec<StreamReset>, End> {
        let mut resets = Vec::new();
        while self.paused.is_some_and(|p| p.why == PauseReason::Turn) {
            self.begin_turn(cx.limits);
            resets.extend(self.resume(cx)?);
        }
        Ok(resets)
    }

    /// Bytes of a stream that arrived and whose packets were not taken: they are incomplete, or have
    /// to wait.
    pub fn untaken(&self, stream: StreamId) -> usize {
        let mut streams = self.streams.iter().filter(|s| s.number == stream);
        match stream {
            StreamId::CONTROL => self.input.bytes().len(),
            _ => streams.next().map_or(0, |s| s.input.bytes().len()),
        }
    }

    /// Tries again to take the packets that had to wait.
    ///
    /// # Errors
    /// The connection must end.
    pub fn resume(&mut self, cx: &Context<'_>) -> Result<Option<StreamReset>, End> {
        let Some(Pause { stream, .. }) = self.paused else {
            return Ok(None);
        };
        let reset = self.received(cx, stream, &[])?;
        let waits = self.paused.is_some_and(|pause| pause.stream == stream);
        match reset.is_none() && !waits && self.streams.iter().any(|s| s.is_ended(stream)) {
            true => Ok(self.end_of_stream(cx, stream)),
            false => Ok(reset),
        }
    }

    /// The streams that must be left unread now: a client that sends and does not read gets
    /// no further answers. With the control stream all of them are.
    pub fn unread(&mut self, cx: &Context<'_>) -> StreamSet {
        // Nearly always.
        if self.full.is_empty() && self.streams.is_empty() && self.unread.is_empty() {
            return StreamSet::EMPTY;
        }
        let full = self.full & !self.free_streams().0;
        let unread = if full.contains(StreamId::CONTROL) {
            StreamSet::ALL
        } else if self.streams.is_empty() {
            full
        } else {
            let waiting: usize = self.streams.iter().map(DataStream::waiting).sum();
            let max = match cx.router.output_pressed() {
                true => BACKLOG_MAX_BYTES,
                false => STREAMS_OUTPUT_MAX_BYTES,
            };
            if waiting > max { StreamSet::DATA } else { full }
        };
        self.set_unread(cx, unread);
        unread
    }

    /// Tells the session whether anything is left unread: as long as there is, silence is not the
    /// client's.
    fn set_unread(&mut self, cx: &Context<'_>, streams: StreamSet) {
        let before = std::mem::replace(&mut self.unread, streams);
        if before == streams {
            return;
        }
        // The rest of a packet may be among the bytes that were not read.
        let again = before & !streams;
        let deadline = Deadline::at(cx.now + cx.limits.packet_deadline);
        if again.contains(StreamId::CONTROL) {
            self.input.restart(deadline);
        }
        for stream in &mut self.streams {
            if again.contains(stream.number) {
                stream.input.restart(deadline);
            }
        }
        let unread = !streams.is_empty();
        if unread == before.is_empty() {
            let (session, connection_no) = (self.session, self.connection_no);
            cx.router.set_unread(session, connection_no, unread, cx.now);
        }
    }

    /// Fills the output of the streams that have taken all of theirs with what the session has for
    /// them. Returns whether there is new output.
    ///
    /// # Errors
    /// The session has another connection, or none.
    pub fn transmit(&mut self, router: &Router, now: Millis) -> Result<bool, End> {
        if !std::mem::take(&mut self.stale) {
            return Ok(false);
        }
        let free = (self.free_streams().0, self.untaken_output());
        self.full = self.full & !free.0;
        let (session, connection_no) = (self.session, self.connection_no);
        let output = &mut self.output;
        let taken = router.take_streams(session, connection_no, free, output, now);
        let Some(taken) = taken else {
            return Err(self.replaced());
        };
        let control = free.0.contains(StreamId::CONTROL);
        // Nothing is taken while the output is withheld.
        self.greeted |= control && !self.output.is_empty();
        if taken.is_empty() {
            return Ok(control && !self.output.is_empty());
        }
        self.append(taken);
        Ok(true)
    }

    /// The output of a stream.
    pub fn output(&mut self, stream: StreamId) -> &mut OutBuf {
        match stream {
            StreamId::CONTROL => &mut self.output,
            stream => &mut self.stream(stream).output,
        }
    }

    /// Whether the transport is to be offered the control stream's output: there are bytes, or it
    /// has not passed on earlier ones.
    pub fn wants_to_send(&self) -> bool {
        !self.output.is_empty() || self.blocked
    }

    /// Reports that the transport was offered the control stream's output, `offered` bytes, and
    /// whether it has passed on all of it.
    pub fn sent(&mut self, offered: usize, done: bool, now: Millis) {
        self.blocked = !done;
        if done {
            self.stale = true;
        } else if self.output.len() < offered {
            self.handle.moved(now);
        }
    }

    /// When an incomplete packet or a blocked stream is due, if there is one: [`Machine::watch`] and
    /// [`Machine::expired`] are to be called at each of the router's ticks until then.
    pub fn deadline(&self) -> Option<Millis> {
        let input = self.read_buffers().filter_map(|(_, input)| input.due_at());
        let blocked = self.streams.iter().filter_map(DataStream::blocked_until);
        input.chain(blocked).min()
    }

    /// Ends the connection, or a data stream, whose packet is not complete at its deadline. To be
    /// called when all bytes that have arrived are taken.
    ///
    /// # Errors
    /// The connection must end.
    pub fn expired(&mut self, cx: &Context<'_>) -> Result<Option<StreamReset>, End> {
        let late = |(_, input): &(StreamId, &ReadBuffer)| input.is_late(cx.now);
        let late = self.read_buffers().find(late).map(|(stream, _)| stream);
        match late {
            None => Ok(None),
            Some(stream) => self.fault(cx, stream, End::PacketDeadline),
        }
    }

    /// The incomplete packets of the streams that are read.
    fn read_buffers(&self) -> impl Iterator<Item = (StreamId, &ReadBuffer)> {
        let streams = self.streams.iter().map(|s| (s.number, &s.input));
        let all = streams.chain([(StreamId::CONTROL, &self.input)]);
        all.filter(|(stream, input)| !input.is_empty() && !self.unread.contains(*stream))
    }

    /// Ends the connection at the router. The rest of the session's output, and DISCONNECT where one
    /// is due, are in [`Remains`].
    pub fn ended(mut self, router: &Router, end: &End, now: Millis) -> Remains {
        let (session, connection_no) = (self.session, self.connection_no);
        if !end.is_lost() && !matches!(end, End::Session(CloseReason::QueueBudget)) {
            let (mut rest, all) = (OutBuf::default(), (StreamSet::ALL, (0, 0)));
            if let Some(taken) = router.take_streams(session, connection_no, all, &mut rest, now) {
                self.greeted |= !rest.is_empty();
                self.output.append(rest);
                self.append(taken);
            }
        }
        // A drain publishes no wills.
        let drains = matches!(end, End::Session(CloseReason::ShuttingDown));
        let no_will = drains || end.discards_will();
        let suspended = drains && router.suspend(session, connection_no);
        let session_ended = !suspended && router.disconnected(session, connection_no, no_will, now);
        if matches!(end, End::Session(CloseReason::QueueBudget)) {
            // The memory of this output is needed. DISCONNECT cannot follow a part of a packet.
            self.greeted &= self.output.is_empty();
            self.output = OutBuf::default();
            self.streams.clear();
        }
        // A CONNECT of the same client may have begun to wait for this end.
        drop(self.handle.take_successors());
        // Nothing goes before CONNACK [MQTT-3.2.0-1].
        let code = end.code();
        let says_why = self.version == Version::V5 && code != ReasonCode::SUCCESS;
        if says_why && self.greeted && !end.is_lost() {
            encode_disconnect(self.version, code, None, None, &mut self.output.buf);
        }
        Remains {
            output: self.output,
            streams: (self.streams.into_iter())
                .map(|stream| (stream.number, stream.output))
                .collect(),
            session_ended,
        }
    }

    /// The session has another connection, or none: the handle says why.
    fn replaced(&self) -> End {
        let reason = self.handle.closing();
        End::from_close(reason.unwrap_or(CloseReason::SessionEnded))
    }
}
