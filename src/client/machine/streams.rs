//! The data streams of a connection: their output, their incomplete packets, and the faults that
//! end one stream and spare the others.

use std::time::Duration;

use crate::mqtt::{Packet, ReasonCode};
use crate::outbuf::OutBuf;
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::{StreamReason, metrics};
use crate::time::Millis;
use crate::transport::Traffic;

use crate::client::end::End;
use crate::client::machine::{Context, Machine, ReadBuffer};

/// How long a stream may take nothing, while the network carries other data, before its
/// subscriptions' messages go on the control stream.
const PATIENCE: Duration = Duration::from_secs(1);

/// One data stream.
#[derive(Debug)]
pub(super) struct DataStream {
    pub number: StreamId,
    pub output: OutBuf,
    pub input: ReadBuffer,
    /// The client ended its direction.
    closed: bool,
    /// The transport takes none of its output.
    blocked: Option<Blocked>,
}

/// A stream on which output waits for the transport.
#[derive(Debug)]
struct Blocked {
    /// When all of the output must have been taken.
    until: Millis,
    /// When a part of the output was last taken.
    moved_at: Millis,
    alone: BlockedAlone,
}

/// How long a stream has been blocked while the rest of the connection made progress.
#[derive(Debug, Default)]
struct BlockedAlone {
    looked_at: Option<Millis>,
    total_ms: u64,
}

/// Whether the network carries data: in an outage nothing moves, and the control stream would be no
/// way around a blocked one.
#[derive(Debug, Default)]
pub(super) struct Network {
    /// The counts at the last look.
    last: Option<Traffic>,
    /// Something was sent since the last acknowledgement.
    unanswered: bool,
}

/// A data stream that a fault of its own has ended. The transport is to abort it in both directions.
#[derive(Debug)]
pub struct StreamReset {
    /// The stream.
    pub stream: StreamId,
    /// The label of the metric and of the log.
    pub reason: StreamReason,
    /// The fault.
    pub cause: ResetCause,
}

/// The fault of a data stream. `Display` gives the reason for the log.
#[derive(Debug, thiserror::Error)]
pub enum ResetCause {
    /// A fault of one of its packets, which would end the connection on the control stream.
    #[error("{0}")]
    Packet(End),
    /// It took too little output.
    #[error("it took too little within limits.write_stall")]
    WriteStall,
    /// The client ended it in the middle of a packet.
    #[error("it ended in the middle of a packet")]
    Incomplete,
}

impl ResetCause {
    /// The error code of the reset.
    pub fn code(&self) -> ReasonCode {
        match self {
            Self::Packet(end) => end.code(),
            Self::WriteStall => ReasonCode::QUOTA_EXCEEDED,
            Self::Incomplete => ReasonCode::MALFORMED_PACKET,
        }
    }
}

impl DataStream {
    fn new(number: StreamId) -> Self {
        Self {
            number,
            output: OutBuf::default(),
            input: ReadBuffer::default(),
            closed: false,
            blocked: None,
        }
    }

    /// Whether it is the stream with this number, and the client has ended its direction.
    pub(super) fn is_ended(&self, number: StreamId) -> bool {
        self.closed && self.number == number
    }

    /// Bytes of output that the transport has not taken.
    pub(super) fn waiting(&self) -> usize {
        self.output.len()
    }

    /// When the stream is given up unless the transport takes its output, if it is blocked.
    pub(super) fn blocked_until(&self) -> Option<Millis> {
        self.blocked.as_ref().map(|blocked| blocked.until)
    }
}

impl Network {
    /// Looks again. This is necessary at each write: the next look after a stream is blocked may be
    /// seconds away.
    fn carries(&mut self, traffic: Traffic) -> bool {
        if let Some(before) = self.last {
            if traffic.acknowledged > before.acknowledged {
                self.unanswered = false;
            } else if traffic.sent > before.sent {
                self.unanswered = true;
            }
        }
        self.last = Some(traffic);
        !self.unanswered
    }
}

impl BlockedAlone {
    /// Looks again; `others` says whether the rest of the connection makes progress.
    fn look(&mut self, now: Millis, others: bool) -> Duration {
        if let Some(at) = self.looked_at.replace(now)
            && others
        {
            self.total_ms += now.since(at).as_millis() as u64;
        }
        Duration::from_millis(self.total_ms)
    }
}

/// Whether a packet may travel on a data stream: types 3 to 11 may.
pub(super) fn may_travel_on_data_stream(packet: &Packet<'_>) -> bool {
    use Packet as P;
    !matches!(
        packet,
        P::Connect(_) | P::Connack(_) | P::Pingreq | P::Pingresp | P::Disconnect(_) | P::Auth(_)
    )
}

impl Machine {
    /// The data streams that were used.
    pub fn streams(&self) -> StreamSet {
        self.streams.iter().map(|s| s.number).collect()
    }

    /// Whether a data stream was used and is not forgotten.
    pub fn has_streams(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Whether the transport has not taken all output of a data stream: [`Machine::watch`] looks
    /// after it.
    pub fn has_blocked_streams(&self) -> bool {
        self.streams.iter().any(|s| s.blocked.is_some())
    }

    pub(super) fn stream(&mut self, number: StreamId) -> &mut DataStream {
        let at = match self.streams.iter().position(|s| s.number == number) {
            Some(at) => at,
            None => {
                self.streams.push(DataStream::new(number));
                self.streams.len() - 1
            }
        };
        &mut self.streams[at]
    }

    /// The streams that can take output, and the bytes that wait for the others.
    pub(super) fn free_streams(&self) -> (StreamSet, usize) {
        let mut taken = match self.wants_to_send() {
            true => StreamSet::CONTROL,
            false => StreamSet::EMPTY,
        };
        let mut waiting = self.output.len();
        for stream in self.streams.iter().filter(|s| !s.output.is_empty()) {
            taken = taken.with(stream.number);
            waiting += stream.waiting();
        }
        (!taken, waiting)
    }

    /// Own and shared bytes of output that the transport has not taken.
    pub(super) fn untaken_output(&self) -> (usize, usize) {
        let data = self.streams.iter().map(|s| &s.output);
        data.chain([&self.output])
            .fold((0, 0), |(own, shared), output| {
                (own + output.own_len(), shared + output.shared_len())
            })
    }

    pub(super) fn append(&mut self, outputs: Vec<(StreamId, OutBuf)>) {
        for (number, more) in outputs {
            self.stream(number).output.append(more);
        }
    }

    /// Reports that the transport was offered a data stream's output, `offered` bytes, and whether
    /// it has taken all of it. `traffic` is what the whole connection has sent so far.
    pub fn stream_sent(
        &mut self,
        cx: &Context<'_>,
        number: StreamId,
        offered: usize,
        done: bool,
        traffic: Traffic,
    ) {
        self.network.get_or_insert_default().carries(traffic);
        // All streams share the way.
        let waiting = self.free_streams().1;
        let stream = self.stream(number);
        if done {
            stream.blocked = None;
            self.stale = true;
            return;
        }
        let moved = stream.waiting() < offered;
        match &mut stream.blocked {
            None => {
                stream.blocked = Some(Blocked {
                    until: cx.router.stalled_at(cx.now, waiting),
                    moved_at: cx.now,
                    alone: BlockedAlone::default(),
                });
            }
            Some(blocked) if moved => {
                blocked.moved_at = cx.now;
                blocked.alone = BlockedAlone::default();
            }
            Some(_) => {}
        }
    }

    /// Whether a data stream that its client has ended is done: all answers are sent. The transport
    /// is to end our direction, and the machine forgets the stream.
    pub fn finish(&mut self, cx: &Context<'_>, number: StreamId) -> bool {
        let mut streams = self.streams.iter();
        let Some(stream) = streams.find(|s| s.number == number) else {
            return false;
        };
        let (session, connection_no) = (self.session, self.connection_no);
        let done = stream.closed
            && stream.input.is_empty()
            && stream.output.is_empty()
            && !cx.router.stream_busy(session, connection_no, number);
        if done {
            self.forget(cx, number);
        }
        done
    }

    /// Sends the messages of a stream that takes nothing around it, and gives the stream up if it
    /// takes too little for too long. `traffic` is what the whole connection has sent so far.
    pub fn watch(&mut self, cx: &Context<'_>, traffic: Traffic) -> Vec<StreamReset> {
        if self.streams.iter().all(|s| s.blocked.is_none()) {
            return Vec::new();
        }
        let now = cx.now;
        let carries = self.network.get_or_insert_default().carries(traffic);
        let others = carries && !self.blocked;
        let mut given_up = Vec::new();
        let mut around = Vec::new();
        for stream in &mut self.streams {
            let Some(blocked) = &mut stream.blocked else {
                continue;
            };
            let since = now.since(blocked.alone.looked_at.unwrap_or(now));
            let alone = blocked.alone.look(now, others);
            if !carries {
                // An outage is not the stream's fault.
                blocked.until += since;
            }
            if now >= blocked.until || now >= blocked.moved_at + cx.limits.write_stall {
                given_up.push(stream.number);
            } else if alone >= PATIENCE {
                // Again each time: the client may have subscribed on the stream anew.
                around.push(stream.number);
            }
        }
        let (session, connection_no) = (self.session, self.connection_no);
        for number in around {
            cx.router.stream_blocked(session, connection_no, number);
            self.stale = true;
        }
        let give_up = |number| {
            let cause = ResetCause::WriteStall;
            self.reset(cx, number, StreamReason::WriteStall, cause)
        };
        given_up.into_iter().map(give_up).collect()
    }

    /// The client ended its direction of a data stream. A reset comes back if the stream ended in
    /// the middle of a packet. Packets that have to wait are taken first.
    pub fn stream_closed(&mut self, cx: &Context<'_>, number: StreamId) -> Option<StreamReset> {
        self.stream(number).closed = true;
        match self.paused.is_some_and(|pause| pause.stream == number) {
            true => None,
            false => self.end_of_stream(cx, number),
        }
    }

    /// All complete packets of a data stream that its client has ended are taken.
    pub(super) fn end_of_stream(
        &mut self,
        cx: &Context<'_>,
        number: StreamId,
    ) -> Option<StreamReset> {
        if !self.stream(number).input.is_empty() {
            let cause = ResetCause::Incomplete;
            let code = cause.code();
            metrics().packet_rejected(code.0, code.name());
            return Some(self.reset(cx, number, StreamReason::Incomplete, cause));
        }
        cx.router
            .stream_closed(self.session, self.connection_no, number);
        self.stale = true;
        None
    }

    /// The client, or the transport, ended a data stream in both directions.
    pub fn stream_ended(&mut self, cx: &Context<'_>, number: StreamId) {
        self.forget(cx, number);
    }

    fn forget(&mut self, cx: &Context<'_>, number: StreamId) {
        self.streams.retain(|s| s.number != number);
        self.forget_pause(cx, number);
        cx.router
            .stream_ended(self.session, self.connection_no, number);
        // The session may have something else to send now.
        self.stale = true;
    }

    /// A fault of one data stream spares the others: `end` comes back if it is the connection's.
    pub(super) fn fault(
        &mut self,
        cx: &Context<'_>,
        stream: StreamId,
        end: End,
    ) -> Result<Option<StreamReset>, End> {
        match end.stream_reason().filter(|_| !stream.is_control()) {
            Some(reason) => Ok(Some(self.reset(
                cx,
                stream,
                reason,
                ResetCause::Packet(end),
            ))),
            None => Err(end),
        }
    }

    fn reset(
        &mut self,
        cx: &Context<'_>,
        stream: StreamId,
        reason: StreamReason,
        cause: ResetCause,
    ) -> StreamReset {
        metrics().quic_streams_reset[reason].increment(1);
        self.forget(cx, stream);
        StreamReset {
            stream,
            reason,
            cause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(sent: u64, acknowledged: u64) -> Traffic {
        Traffic { sent, acknowledged }
    }

    #[test]
    fn a_stream_that_is_not_read_is_blocked_alone() {
        let (mut network, mut alone) = (Network::default(), BlockedAlone::default());
        let mut look = |now, sent, acknowledged| {
            let others = network.carries(traffic(sent, acknowledged));
            alone.look(now, others)
        };
        assert_eq!(look(Millis::new(1000), 10, 5), Duration::ZERO);
        // Nothing is on the way.
        assert_eq!(look(Millis::new(1200), 10, 5), Duration::from_millis(200));
        // Other streams are busy.
        assert_eq!(look(Millis::new(1400), 90, 20), Duration::from_millis(400));
        assert_eq!(
            alone.look(Millis::new(1600), false),
            Duration::from_millis(400)
        );
    }

    #[test]
    fn an_outage_does_not_count_against_a_stream() {
        let (mut network, mut alone) = (Network::default(), BlockedAlone::default());
        // Written after the outage began and before the stream was blocked.
        assert!(network.carries(traffic(10, 5)));
        assert!(!network.carries(traffic(11, 5)));
        let mut look = |now, sent, acknowledged| {
            let others = network.carries(traffic(sent, acknowledged));
            alone.look(now, others)
        };
        // The next retransmission is far away.
        assert_eq!(look(Millis::new(1000), 11, 5), Duration::ZERO);
        assert_eq!(look(Millis::new(9000), 11, 5), Duration::ZERO);
        assert_eq!(look(Millis::new(9200), 12, 5), Duration::ZERO);
        assert_eq!(look(Millis::new(9400), 20, 6), Duration::from_millis(200));
    }
}
