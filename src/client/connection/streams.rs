//! The data streams of a connection: their output, their incomplete packets, and the faults that
//! end one of them and spare the others.

use std::task::{Context, Poll};
use std::time::Duration;

use crate::mqtt::{Packet, ReasonCode};
use crate::telemetry::{DisconnectReason, RateLimited, StreamReason, clean, metrics};
use crate::time::Millis;
use crate::transport::{CloseHow, Closed, OutBuf, Traffic};

use crate::client::connection::{Connection, End, Partial, SCRATCH};

/// How long a stream may take nothing, while the network carries what is sent, before its
/// subscriptions' messages go on the control stream.
const PATIENCE: Duration = Duration::from_secs(1);
/// Reads that follow a DISCONNECT: what came on data streams before it is not lost.
const LAST_READS: usize = 256;

static RESETS: RateLimited = RateLimited::new(Duration::from_millis(20));

/// One data stream.
pub(super) struct Lane<'a> {
    pub number: u8,
    pub out: OutBuf,
    pub partial: Partial<'a>,
    /// The client ended its direction.
    closed: bool,
    /// By when it must have taken all that waits for it, milliseconds; 0: nothing does.
    stuck_until: u64,
    /// When it last took some of it.
    moved_at: u64,
    stuck: Stuck,
}

/// Whether the network carries what is sent: in an outage nothing moves, and control would be no way
/// around a stream.
#[derive(Default)]
pub(super) struct Network {
    /// What had been sent and acknowledged at the last look.
    last: Option<Traffic>,
    /// Something was sent since the last acknowledgement.
    unanswered: bool,
}

impl Network {
    /// Looks again. To be done at each write as well: what goes out after a stream is stuck may be
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

/// How long a stream that is stuck is so by itself, and not for want of a network.
#[derive(Default)]
struct Stuck {
    /// The last look, milliseconds.
    at: Option<u64>,
    /// Milliseconds.
    by_itself: u64,
}

impl Stuck {
    /// Looks again; `others`: what others send goes through.
    fn look(&mut self, now: Millis, others: bool) -> u64 {
        if let Some(at) = self.at.replace(now)
            && others
        {
            self.by_itself += now.saturating_sub(at);
        }
        self.by_itself
    }
}

/// What may travel on a data stream: types 3 to 11.
pub(super) fn allowed(packet: &Packet<'_>) -> bool {
    use Packet as P;
    !matches!(
        packet,
        P::Connect(_) | P::Connack(_) | P::Pingreq | P::Pingresp | P::Disconnect(_) | P::Auth(_)
    )
}

/// The end of a stream that a packet of its own brings about; `None`: the connection's.
fn own_fault(end: &End) -> Option<StreamReason> {
    use DisconnectReason as D;
    match end.label {
        D::Malformed => Some(StreamReason::Malformed),
        D::TooLarge => Some(StreamReason::TooLarge),
        D::Protocol | D::Topic | D::TopicAlias | D::NotSupported => Some(StreamReason::Protocol),
        D::PacketDeadline => Some(StreamReason::PacketDeadline),
        D::Quota => Some(StreamReason::Quota),
        _ => None,
    }
}

fn fault(label: DisconnectReason, code: ReasonCode, why: &'static str) -> End {
    End {
        label,
        code,
        why: why.into(),
        normal: false,
        how: CloseHow::Protocol,
    }
}

impl<'a> Connection<'a> {
    pub(super) fn lane(&mut self, number: u8) -> &mut Lane<'a> {
        let at = match self.lanes.iter().position(|l| l.number == number) {
            Some(at) => at,
            None => {
                self.lanes.push(Lane {
                    number,
                    out: OutBuf::default(),
                    partial: Partial::default(),
                    closed: false,
                    stuck_until: 0,
                    moved_at: 0,
                    stuck: Stuck::default(),
                });
                self.lanes.len() - 1
            }
        };
        &mut self.lanes[at]
    }

    /// The lanes that can take output, as bits, and the bytes that the others still have.
    pub(super) fn free_lanes(&self) -> (u16, usize) {
        let control = !self.out.is_empty() || self.flushing;
        let (mut taken, mut held) = (u16::from(control), self.out.rest().len());
        for lane in self.lanes.iter().filter(|l| !l.out.is_empty()) {
            taken |= 1 << lane.number;
            held += lane.out.rest().len();
        }
        (!taken, held)
    }

    pub(super) fn give_lanes(&mut self, side: Vec<(u8, Vec<u8>)>) {
        for (number, bytes) in side {
            let out = &mut self.lane(number).out;
            match out.is_empty() {
                true => out.buf = bytes,
                false => out.buf.extend_from_slice(&bytes),
            }
        }
    }

    /// Writes what the data streams take, and ends those that have got all.
    pub(super) fn poll_lanes(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        let mut at = 0;
        let held = self.free_lanes().1;
        while at < self.lanes.len() {
            let lane = &mut self.lanes[at];
            let number = lane.number;
            if !lane.out.is_empty() {
                let before = lane.out.rest().len();
                let sent = self.stream.poll_send(cx, number, &mut lane.out);
                let network = self.network.get_or_insert_default();
                network.carries(self.stream.traffic());
                let left = lane.out.rest().len();
                metrics().bytes_sent.increment((before - left) as u64);
                match sent {
                    Poll::Ready(Ok(())) => {
                        lane.stuck_until = 0;
                        self.fresh = true;
                    }
                    Poll::Pending => {
                        let now = self.clients.clock.now();
                        if left < before || lane.stuck_until == 0 {
                            lane.moved_at = now;
                            lane.stuck = Stuck::default();
                        }
                        if lane.stuck_until == 0 {
                            // All share the way.
                            lane.stuck_until = self.clients.router.stalled_at(now, held);
                        }
                        // For `watch_lanes`.
                        self.clients.router.wake_soon(&self.wake);
                    }
                    Poll::Ready(Err(Closed::StreamReset(_))) => {
                        self.lane_gone(number);
                        continue;
                    }
                    Poll::Ready(Err(closed)) => return Err(End::from_closed(closed)),
                }
            }
            if self.lanes[at].closed && self.lanes[at].out.is_empty() && !self.lane_busy(number) {
                self.stream.finish_stream(number);
                self.lane_gone(number);
                continue;
            }
            at += 1;
        }
        Ok(())
    }

    fn lane_busy(&self, number: u8) -> bool {
        let busy = self
            .clients
            .router
            .with(self.session, self.connection_no, |session, _| {
                session.stream_busy(number)
            });
        busy == Some(true)
    }

    /// What does not move for a moment is gone around, what does not for long is given up.
    pub(super) fn watch_lanes(&mut self) {
        if self.lanes.iter().all(|l| l.stuck_until == 0) {
            return;
        }
        let now = self.clients.clock.now();
        let write_stall = self.clients.limits.write_stall.as_millis() as u64;
        let network = self.network.get_or_insert_default();
        let carries = network.carries(self.stream.traffic());
        let mut given_up = Vec::new();
        let mut around = Vec::new();
        for lane in self.lanes.iter_mut().filter(|l| l.stuck_until > 0) {
            let since = now.saturating_sub(lane.stuck.at.unwrap_or(now));
            let by_itself = lane.stuck.look(now, carries && !self.flushing);
            if !carries {
                // An outage is not its fault.
                lane.stuck_until += since;
            }
            if now >= lane.stuck_until || now >= lane.moved_at + write_stall {
                given_up.push(lane.number);
            } else if by_itself >= PATIENCE.as_millis() as u64 {
                // Again each time: it may have been subscribed on anew.
                around.push(lane.number);
            }
        }
        for number in given_up {
            let code = ReasonCode::QUOTA_EXCEEDED;
            let why = "it took too little within limits.write_stall";
            let end = fault(DisconnectReason::WriteStall, code, why);
            self.break_lane(number, StreamReason::WriteStall, &end);
        }
        for number in around {
            self.on_session(|session| session.stream_blocked(number));
        }
    }

    /// The client ended its direction of a data stream.
    pub(super) fn lane_closed(&mut self, number: u8) {
        let lane = self.lane(number);
        if !lane.partial.bytes.is_empty() {
            let code = ReasonCode::MALFORMED_PACKET;
            let why = "it ended in the middle of a packet";
            let end = fault(DisconnectReason::Malformed, code, why);
            metrics().packet_rejected(code.0, code.name());
            self.break_lane(number, StreamReason::Incomplete, &end);
            return;
        }
        lane.closed = true;
        self.on_session(|session| session.stream_closed(number));
    }

    /// A data stream is gone in both directions.
    pub(super) fn lane_gone(&mut self, number: u8) {
        self.lanes.retain(|l| l.number != number);
        if self.held == Some(number) {
            self.hold(None);
        }
        self.on_session(|session| session.stream_ended(number));
    }

    /// A fault of one stream is not the others': `end` comes back if it is the connection's.
    pub(super) fn fault(&mut self, lane: u8, end: End) -> Result<(), End> {
        match own_fault(&end).filter(|_| lane != 0) {
            Some(reason) => self.break_lane(lane, reason, &end),
            None => return Err(end),
        }
        Ok(())
    }

    fn break_lane(&mut self, number: u8, reason: StreamReason, end: &End) {
        metrics().quic_streams_reset[reason].increment(1);
        if let Some(suppressed) = RESETS.permit(self.clients.clock.now()) {
            tracing::info!(
                client_id = clean(&self.identity.client_id, 64),
                listener = &*self.place.listener,
                peer = %self.stream.peer_addr(),
                %reason,
                code = end.code.0,
                suppressed,
                "Data stream reset: {}",
                end.why
            );
        }
        self.stream.reset_stream(number, end.code.0.into());
        self.lane_gone(number);
    }

    fn on_session(&mut self, f: impl FnOnce(&mut crate::session::Session)) {
        self.clients
            .router
            .with(self.session, self.connection_no, |session, _| f(session));
        // It may have something else to send now.
        self.fresh = true;
    }

    /// Streams keep no order with each other: what came on data streams with or before the client's
    /// DISCONNECT still counts.
    pub(super) fn read_on(&mut self, cx: &mut Context<'_>) {
        if !self.stream.has_data_streams() {
            return;
        }
        self.stream.pause_streams(0);
        let mut scratch = SCRATCH.with(std::cell::RefCell::take);
        for _ in 0..LAST_READS {
            scratch.clear();
            match self.stream.poll_recv(cx, &mut scratch) {
                Poll::Ready(Ok(recv)) if recv.stream != 0 => {
                    if self.received(recv.stream, &scratch).is_err() {
                        break;
                    }
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(Closed::StreamReset(number))) => self.lane_gone(number),
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        SCRATCH.with(|s| s.replace(scratch));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(sent: u64, acknowledged: u64) -> Traffic {
        Traffic { sent, acknowledged }
    }

    #[test]
    fn a_stream_that_is_not_read_is_stuck_by_itself() {
        let (mut network, mut stuck) = (Network::default(), Stuck::default());
        let mut look = |now, sent, acknowledged| {
            let others = network.carries(traffic(sent, acknowledged));
            stuck.look(now, others)
        };
        assert_eq!(look(1000, 10, 5), 0);
        // Nothing is under way.
        assert_eq!(look(1200, 10, 5), 200);
        // Other streams are busy.
        assert_eq!(look(1400, 90, 20), 400);
        assert_eq!(stuck.look(1600, false), 400);
    }

    #[test]
    fn an_outage_is_nothing_of_a_stream_s_own() {
        let (mut network, mut stuck) = (Network::default(), Stuck::default());
        // Written before the stream was stuck, when the outage had begun.
        assert!(network.carries(traffic(10, 5)));
        assert!(!network.carries(traffic(11, 5)));
        let mut look = |now, sent, acknowledged| {
            let others = network.carries(traffic(sent, acknowledged));
            stuck.look(now, others)
        };
        // The next attempt is far away.
        assert_eq!(look(1000, 11, 5), 0);
        assert_eq!(look(9000, 11, 5), 0);
        assert_eq!(look(9200, 12, 5), 0);
        assert_eq!(look(9400, 20, 6), 200);
    }
}
