//! The packet loop: bytes of a stream in, the session's state and effects for the router out.

use crate::mqtt::{Decoder, Packet, Publish, QoS, Receiver, Version};
use crate::session::{CloseReason, Effect, Session, SessionLimits};
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::{DeferReason, metrics};
use crate::time::Deadline;

use crate::client::end::End;
use crate::client::machine::read_buffer::SLOWEST_BYTES_PER_SECOND;
use crate::client::machine::streams::{StreamReset, may_travel_on_data_stream};
use crate::client::machine::{
    BACKLOG_MAX_BYTES, Context, KEEP_BYTES, Machine, Pause, PauseReason, ReadBuffer,
};

/// How far the packets of one read were taken.
enum Step {
    /// Up to a SUBSCRIBE: the next packet is judged once the subscription is made.
    Again,
    /// Up to an incomplete packet, or to the end.
    Done,
    /// Up to a publish that has to wait for the broker.
    Paused(PauseReason),
}

/// The packets that the session takes at once, under its shard's lock.
struct Batch<'a> {
    stream: StreamId,
    bytes: &'a [u8],
    /// How many of the bytes were taken.
    used: usize,
    version: Version,
    packet_max_bytes: u32,
    /// Publishes by QoS.
    publishes: [u64; 3],
    /// Packets that may still be taken in this turn.
    turn: u8,
}

/// What a batch left behind.
struct Outcome {
    result: Result<Step, End>,
    /// The broker had answered all of the client's publishes before the batch.
    idle: bool,
    /// The streams for which the session has too much output.
    full: StreamSet,
}

impl Machine {
    /// Takes bytes that arrived on a stream. A fault of a data stream comes
    /// back as its reset, which is the caller's to carry out.
    ///
    /// # Errors
    /// The connection must end.
    pub fn received(
        &mut self,
        cx: &Context<'_>,
        stream: StreamId,
        bytes: &[u8],
    ) -> Result<Option<StreamReset>, End> {
        // The session may have answers.
        self.stale = true;
        match self.take_bytes(cx, stream, bytes) {
            Ok(()) => Ok(None),
            Err(end) => self.fault(cx, stream, end),
        }
    }

    fn take_bytes(&mut self, cx: &Context<'_>, stream: StreamId, bytes: &[u8]) -> Result<(), End> {
        let mut input = std::mem::take(self.read_buffer(stream));
        let before = input.bytes().len() / SLOWEST_BYTES_PER_SECOND;
        let limits = cx.limits;
        let used = if input.is_empty() {
            let used = self.take_packets(cx, stream, bytes)?;
            input.extend(&limits.input, &bytes[used..]);
            used
        } else {
            input.extend(&limits.input, bytes);
            let used = self.take_packets(cx, stream, input.bytes())?;
            input.consume(used);
            used
        };
        if used == 0 && input.bytes().len() / SLOWEST_BYTES_PER_SECOND > before {
            self.is_uploading(cx);
        }
        let deadline = Some(Deadline::at(cx.now + limits.packet_deadline));
        input.settle(used > 0, deadline);
        // A client that only waits brings nothing, whoever has used up the budget since.
        let brings = !bytes.is_empty() && input.bytes().len() > KEEP_BYTES;
        if brings && limits.input.used() > limits.input_max_bytes {
            return Err(End::InputBudget);
        }
        *self.read_buffer(stream) = input;
        Ok(())
    }

    /// The client cannot send PINGREQ in the middle of a large packet: that its bytes flow shows that it
    /// is there.
    fn is_uploading(&self, cx: &Context<'_>) {
        let (session, connection_no) = (self.session, self.connection_no);
        cx.router.with(session, connection_no, |session, _| {
            if let Some(connection) = session.connection() {
                connection.last_seen = cx.now;
            }
        });
    }

    fn read_buffer(&mut self, stream: StreamId) -> &mut ReadBuffer {
        match stream {
            StreamId::CONTROL => &mut self.input,
            stream => &mut self.stream(stream).input,
        }
    }

    /// Takes the complete packets at the start of `bytes`; returns their length.
    fn take_packets(
        &mut self,
        cx: &Context<'_>,
        stream: StreamId,
        bytes: &[u8],
    ) -> Result<usize, End> {
        let mut used = 0;
        let mut paused = None;
        while used < bytes.len() {
            let (step, taken) = self.take_batch(cx, stream, &bytes[used..])?;
            used += taken;
            match step {
                Step::Again => {}
                Step::Done => break,
                // Bytes that nobody has room for do not wait.
                Step::Paused(PauseReason::Turn)
                    if cx.limits.input.used() + (bytes.len() - used) as u64
                        > cx.limits.input_max_bytes =>
                {
                    self.begin_turn(cx.limits);
                }
                Step::Paused(why) => {
                    paused = Some(Pause { stream, why });
                    break;
                }
            }
        }
        self.pause(cx, paused);
        Ok(used)
    }

    /// Takes packets up to the first SUBSCRIBE, and carries out their effects.
    fn take_batch(
        &mut self,
        cx: &Context<'_>,
        stream: StreamId,
        bytes: &[u8],
    ) -> Result<(Step, usize), End> {
        let mut effects: Vec<Effect> = Vec::new();
        let mut batch = Batch {
            stream,
            bytes,
            used: 0,
            version: self.version,
            packet_max_bytes: self.packet_max_bytes,
            publishes: [0; 3],
            turn: self.turn,
        };
        let (session, connection_no) = (self.session, self.connection_no);
        let outcome = cx.router.feed(
            session,
            connection_no,
            &mut effects,
            |session, limits, output, effects| {
                let idle = session.publishes_under_way() == 0;
                let result = batch.run(self, cx, session, limits, effects);
                session.pump(limits, cx.now, output);
                let connection = session.connection_ref();
                let full =
                    connection.map_or(StreamSet::EMPTY, |c| c.full_streams(BACKLOG_MAX_BYTES));
                Outcome { result, idle, full }
            },
        );
        batch.count();
        self.turn = batch.turn;
        if outcome.as_ref().is_some_and(|outcome| outcome.idle) {
            self.choose_publish_link(cx);
        }
        cx.router.apply(self.caller(), effects, cx.now);
        if batch.has_unacknowledged(cx) {
            self.publish_round = cx.router.next_publish_round(self.publish_link);
        }
        let Some(outcome) = outcome else {
            return Err(self.replaced());
        };
        self.full = outcome.full;
        Ok((outcome.result?, batch.used))
    }

    /// Moves the session to the publish link that it would begin on now, once nothing of its client
    /// waits for the old one or is under way there: its publishes stay in order.
    fn choose_publish_link(&mut self, cx: &Context<'_>) {
        let (session, from) = (self.session, self.publish_link);
        if cx.router.publish_link(session) == from {
            return;
        }
        let round = self.publish_round;
        self.publish_link = cx.router.move_publishes(session, from, round);
        if self.publish_link != from {
            // Nothing was handed to the new one.
            self.publish_round = 0;
        }
    }

    /// Leaves the client unread, or reads it again.
    fn pause(&mut self, cx: &Context<'_>, pause: Option<Pause>) {
        let before = std::mem::replace(&mut self.paused, pause);
        let [before, why] = [before, pause].map(|pause| pause.map(|pause| pause.why));
        if before == why {
            return;
        }
        let reason = match why {
            Some(PauseReason::Room) => Some(DeferReason::V3Unread),
            Some(PauseReason::ReceiveMaximum) => Some(DeferReason::ReceiveMaximum),
            Some(PauseReason::Subscribing | PauseReason::Commit | PauseReason::Turn) | None => None,
        };
        if let Some(reason) = reason {
            metrics().publishes_deferred[reason].increment(1);
        }
        // The next turn comes at once.
        let unread = |why| why != PauseReason::Turn;
        let (before, unread) = (before.is_some_and(unread), why.is_some_and(unread));
        if before != unread {
            self.set_unread(
                cx,
                match unread {
                    true => StreamSet::ALL,
                    false => StreamSet::EMPTY,
                },
            );
        }
    }

    /// Forgets that a packet of this stream has to wait: the stream is gone.
    pub(super) fn forget_pause(&mut self, cx: &Context<'_>, stream: StreamId) {
        if self.paused.is_some_and(|pause| pause.stream == stream) {
            self.pause(cx, None);
        }
    }
}

impl Batch<'_> {
    /// Gives the session packets until one of them has to wait or has consequences for the next.
    fn run(
        &mut self,
        machine: &Machine,
        cx: &Context<'_>,
        session: &mut Session,
        limits: &SessionLimits,
        effects: &mut Vec<Effect>,
    ) -> Result<Step, End> {
        let decoder = Decoder {
            version: self.version,
            receiver: Receiver::Server,
            max: self.packet_max_bytes,
        };
        if session.is_withheld() {
            return Ok(Step::Paused(PauseReason::Commit));
        }
        loop {
            let next = decoder.next(&self.bytes[self.used..]);
            let Some((packet, size)) = next.map_err(End::from_error)? else {
                return Ok(Step::Done);
            };
            if self.turn == 0 {
                return Ok(Step::Paused(PauseReason::Turn));
            }
            if !self.stream.is_control() && !may_travel_on_data_stream(&packet) {
                return Err(End::from_close(CloseReason::ControlStreamOnly));
            }
            if let Packet::Publish(p) = &packet {
                let waiting = session.publishes_waiting();
                // A 3.x client cannot be told to send a publish again later.
                let v3 = self.version < Version::V5 && p.qos > QoS::AtMostOnce;
                let full = || {
                    let (session, link) = (machine.session, machine.publish_link);
                    cx.router.defers_publish(session, link, waiting, size)
                };
                if session.subscribing() {
                    return Ok(Step::Paused(PauseReason::Subscribing));
                }
                if v3 && full() {
                    return Ok(Step::Paused(PauseReason::Room));
                }
                if session.defers(self.stream, p, limits) {
                    return self.defer(machine, session, limits, &decoder);
                }
                self.publishes[p.qos as usize] += 1;
            }
            self.used += size;
            self.turn -= 1;
            session
                .packet(self.stream, &packet, limits, cx.policy, cx.now, effects)
                .map_err(End::from_close)?;
            match packet {
                Packet::Subscribe(_) => return Ok(Step::Again),
                Packet::Unsubscribe(_) if session.is_withheld() => return Ok(Step::Again),
                _ => {}
            }
        }
    }

    /// An MQTT 5 client has sent more than our Receive Maximum. The publishes that have arrived wait
    /// with those in its socket, as long as they are not too many.
    #[cold]
    fn defer(
        &self,
        machine: &Machine,
        session: &Session,
        limits: &SessionLimits,
        decoder: &Decoder,
    ) -> Result<Step, End> {
        let why = PauseReason::ReceiveMaximum;
        // While it lasts, no bytes arrive, and the number only falls.
        if machine.paused.is_none_or(|pause| pause.why != why) {
            let mut unanswered = session.publishes_open();
            let mut rest = &self.bytes[self.used..];
            while let Ok(Some((packet, size))) = decoder.next(rest) {
                // A copy may be counted already.
                let new = |p: &Publish<'_>| p.qos > QoS::AtMostOnce && !p.dup;
                unanswered += usize::from(matches!(&packet, Packet::Publish(p) if new(p)));
                rest = &rest[size..];
            }
            if unanswered > limits.receive_max_hard() {
                return Err(End::from_close(CloseReason::ReceiveMaximumExceeded));
            }
        }
        Ok(Step::Paused(why))
    }

    /// Whether the batch has publishes that the broker does not acknowledge.
    fn has_unacknowledged(&self, cx: &Context<'_>) -> bool {
        let all = cx.router.maximum_qos() == QoS::AtMostOnce;
        self.publishes[0] > 0 || all && self.publishes.iter().any(|n| *n > 0)
    }

    fn count(&self) {
        let qos = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce];
        for (qos, count) in qos.into_iter().zip(self.publishes) {
            if count > 0 {
                metrics().messages_received[qos].increment(count);
            }
        }
    }
}
