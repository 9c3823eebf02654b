//! The P links' machine: clients' publishes out, in the core's window; its answers back.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::mqtt::{AckKind, Alias, Delivery, Packet, QoS, ReasonCode, Version, encode_ack};
use crate::router::lanes::Outgoing;
use crate::router::{Answered, Router};
use crate::telemetry::{DropReason, metrics};

use super::RESERVED_KEY;
use super::machine::{LinkEnd, Machine, Up};

/// Bytes put out ahead of the socket.
const OUTPUT: usize = 128 * 1024;

/// A P link.
#[derive(Debug)]
pub struct Publisher {
    router: Arc<Router>,
    link: usize,
    instance: u64,
    up: bool,
    version: Version,
    window: usize,
    packet_max: usize,
    last_id: u16,
    /// In order of sending; identifiers ascend, so an entry is found by its distance from the first.
    inflight: VecDeque<InFlight>,
    /// Entries that are not done.
    open: usize,
    answers: Vec<Answered>,
}

#[derive(Debug)]
struct InFlight {
    id: u16,
    state: State,
    outgoing: Outgoing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Sent,
    Released,
    Done,
}

impl Publisher {
    /// The machine of P link `link`.
    pub fn new(router: Arc<Router>, link: usize, instance: u64) -> Self {
        Self {
            router,
            link,
            instance,
            up: false,
            version: Version::V5,
            window: 0,
            packet_max: usize::MAX,
            last_id: 0,
            inflight: VecDeque::new(),
            open: 0,
            answers: Vec::new(),
        }
    }

    fn fill(&mut self, now: u64, out: &mut Vec<u8>) {
        if !self.up {
            return;
        }
        let router = self.router.clone();
        while out.len() < OUTPUT && self.open < self.window && self.inflight.len() < 65_000 {
            // A few at a time: clients wait for the same lock to hand over theirs.
            let mut some: smallvec::SmallVec<[Outgoing; 16]> = smallvec::SmallVec::new();
            let room = (self.window - self.open).min(16);
            router.lanes(self.link, |lanes| {
                while some.len() < room
                    && let Some(outgoing) = lanes.pop()
                {
                    some.push(outgoing);
                }
            });
            if some.is_empty() {
                return;
            }
            for outgoing in some {
                self.send(outgoing, now, out);
            }
        }
    }

    fn send(&mut self, outgoing: Outgoing, now: u64, out: &mut Vec<u8>) {
        let message = &outgoing.message;
        if message.expires_at() <= now {
            metrics().messages_dropped[DropReason::Expired].increment(1);
            // To the publisher it is done: nobody is to see it any more.
            self.answer(&outgoing, ReasonCode::SUCCESS);
            return;
        }
        let qos = message.qos().min(self.router.maximum_qos());
        let id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.next_id(),
        };
        if !self.write(&outgoing, qos, id, false, now, out) {
            metrics().messages_dropped[DropReason::UpstreamLimit].increment(1);
            self.answer(&outgoing, ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
            return;
        }
        metrics().upstream_publishes[super::qos_label(qos)].increment(1);
        if qos == QoS::AtMostOnce {
            self.answer(&outgoing, ReasonCode::SUCCESS);
            return;
        }
        self.last_id = id;
        self.open += 1;
        self.inflight.push_back(InFlight {
            id,
            state: State::Sent,
            outgoing,
        });
    }

    fn write(
        &self,
        outgoing: &Outgoing,
        qos: QoS,
        id: u16,
        dup: bool,
        now: u64,
        out: &mut Vec<u8>,
    ) -> bool {
        let message = &outgoing.message;
        let tag;
        let user_property = if outgoing.tag != 0 && self.version == Version::V5 {
            tag = format!("{:x}.{:x}", self.instance, outgoing.tag);
            Some((RESERVED_KEY, &*tag))
        } else {
            None
        };
        let delivery = Delivery {
            version: self.version,
            dup,
            qos,
            retain: message.retain(),
            packet_id: id,
            alias: Alias::None,
            message_expiry: super::remaining(message.expires_at(), now),
            subscription_ids: &[],
            user_property,
        };
        if delivery.size(message) > self.packet_max {
            return false;
        }
        delivery.encode(message, out);
        true
    }

    fn answer(&mut self, outgoing: &Outgoing, reason: ReasonCode) {
        if let Some(token) = outgoing.token {
            self.answers.push(Answered {
                session: outgoing.session,
                token,
                reason,
                since: outgoing.since,
            });
        }
    }

    /// Ascending, never 0; free, since fewer are in flight than there are identifiers.
    fn next_id(&self) -> u16 {
        match self.last_id.wrapping_add(1) {
            0 => 1,
            id => id,
        }
    }

    fn find(&self, id: u16) -> Option<usize> {
        let first = self.inflight.front()?.id;
        let distance = |id: u16| id.wrapping_sub(first);
        let index = self
            .inflight
            .binary_search_by_key(&distance(id), |e| distance(e.id))
            .ok()?;
        (self.inflight[index].state != State::Done).then_some(index)
    }

    fn done(&mut self, index: usize) {
        self.inflight[index].state = State::Done;
        self.open -= 1;
        while self
            .inflight
            .front()
            .is_some_and(|e| e.state == State::Done)
        {
            self.inflight.pop_front();
        }
    }

    fn acknowledged(&mut self, id: u16, reason: ReasonCode, qos: QoS) {
        let Some(index) = self.find(id) else {
            return;
        };
        let entry = &self.inflight[index];
        if entry.state != State::Sent || entry.outgoing.message.qos() < qos {
            return;
        }
        if reason.is_error() {
            metrics().messages_dropped[DropReason::UpstreamRefused].increment(1);
        }
        let (session, token, since) = (
            entry.outgoing.session,
            entry.outgoing.token,
            entry.outgoing.since,
        );
        if let Some(token) = token {
            self.answers.push(Answered {
                session,
                token,
                reason,
                since,
            });
        }
        if qos == QoS::ExactlyOnce && !reason.is_error() {
            self.inflight[index].state = State::Released;
        } else {
            self.done(index);
        }
    }

    fn flush(&mut self, now: u64) {
        if !self.answers.is_empty() {
            self.router.answered(&self.answers, now);
            self.answers.clear();
        }
    }
}

impl Machine for Publisher {
    fn up(&mut self, up: &Up, now: u64, out: &mut Vec<u8>) {
        self.up = true;
        self.version = up.version;
        self.window = usize::from(up.receive_maximum);
        self.packet_max = up.packet_max as usize;
        self.router.publish_link_up(self.link, true);
        // First what was under way, in order [MQTT-4.4.0-1] [MQTT-4.6.0-1]. More than the window
        // cannot be: what no longer fits a smaller one goes back to wait its turn.
        let mut all = std::mem::take(&mut self.inflight);
        self.open = 0;
        for mut entry in all.drain(..) {
            match entry.state {
                State::Done => {}
                State::Released if up.session_present => {
                    encode_ack(
                        self.version,
                        AckKind::Pubrel,
                        entry.id,
                        ReasonCode::SUCCESS,
                        None,
                        out,
                    );
                    self.open += 1;
                    self.inflight.push_back(entry);
                }
                // The core took it over before it lost the session.
                State::Released => {}
                State::Sent => {
                    if !up.session_present {
                        entry.id = self.next_id();
                        self.last_id = entry.id;
                    }
                    let qos = entry.outgoing.message.qos().min(self.router.maximum_qos());
                    let dup = up.session_present;
                    if self.write(&entry.outgoing, qos, entry.id, dup, now, out) {
                        self.open += 1;
                        self.inflight.push_back(entry);
                    } else {
                        let outgoing = entry.outgoing;
                        self.answer(&outgoing, ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR);
                    }
                }
            }
        }
        self.poll(now, out);
    }

    fn packet(&mut self, packet: &Packet<'_>, _now: u64, out: &mut Vec<u8>) -> Result<(), LinkEnd> {
        match packet {
            Packet::Puback(a) => self.acknowledged(a.packet_id, a.reason, QoS::AtLeastOnce),
            Packet::Pubrec(a) => {
                self.acknowledged(a.packet_id, a.reason, QoS::ExactlyOnce);
                if !a.reason.is_error() {
                    encode_ack(
                        self.version,
                        AckKind::Pubrel,
                        a.packet_id,
                        ReasonCode::SUCCESS,
                        None,
                        out,
                    );
                }
            }
            Packet::Pubcomp(a) => {
                if let Some(index) = self.find(a.packet_id)
                    && self.inflight[index].state == State::Released
                {
                    self.done(index);
                }
            }
            _ => {
                return Err(LinkEnd::protocol(
                    "a packet that a publish link does not expect",
                ));
            }
        }
        Ok(())
    }

    fn batch_ended(&mut self, now: u64, out: &mut Vec<u8>) {
        self.poll(now, out);
    }

    fn poll(&mut self, now: u64, out: &mut Vec<u8>) {
        self.fill(now, out);
        self.flush(now);
    }

    fn down(&mut self, now: u64) {
        self.up = false;
        self.router.publish_link_up(self.link, false);
        self.flush(now);
    }

    fn window(&self) -> (usize, usize) {
        (self.open, self.window)
    }
}
