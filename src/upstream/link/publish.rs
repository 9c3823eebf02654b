//! The P links' machine: clients' publishes out, in the core's window; its answers back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{AckKind, Alias, Delivery, Packet, QoS, ReasonCode, Version, encode_ack};
use crate::router::publish::queue::Outgoing;
use crate::router::{Answered, Router};
use crate::telemetry::{DropReason, clean, metrics};
use crate::time::Millis;

use crate::upstream::RESERVED_KEY;
use crate::upstream::link::machine::{LinkEnd, Machine, Up};

/// Bytes put out ahead of the socket.
const OUTPUT: usize = 128 * 1024;

/// The least time between two writes: publishes of many clients share one. The first after a
/// pause goes at once.
const PACE: Duration = Duration::from_millis(1);

/// A publish that was under way when the core ended so many connections of the link, and of no
/// other link, is sent alone: if it is alone when that happens again, it is the reason.
const SUSPECT: u8 = 2;

/// How long publishes have waited for the window when another link is asked for, milliseconds.
const GROWTH: u64 = 250;

/// How long a link that came up waits for the data links, milliseconds: a message that the core
/// takes before they have their filters again reaches nobody.
const PATIENCE: u64 = 5000;

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
    /// Entries before this index need no second sending.
    resend_at: usize,
    /// Sent on this connection and not done.
    open: usize,
    answers: Vec<Answered>,
    /// The last connection was ended by the core.
    cut: bool,
    /// [`Router::data_losses`] when the last connection came up.
    losses: u64,
    /// Since when publishes wait for the window.
    full_since: Option<u64>,
    /// Suspects that are sent one at a time, each alone on the link.
    suspects: usize,
    /// Until then nothing new is sent before the data links have their filters again.
    wait_until: u64,
}

#[derive(Debug)]
struct InFlight {
    id: u16,
    state: State,
    /// Connections that the core ended, and no other link's, while it was unacknowledged.
    deaths: u8,
    outgoing: Outgoing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// PUBLISH sent on this connection.
    Sent,
    /// To be sent again, by the session that the core kept.
    Resend,
    /// To be sent as new: the core lost the session.
    Renew,
    /// PUBREL sent on this connection.
    Released,
    /// PUBREL to be sent again.
    ReleaseAgain,
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
            resend_at: 0,
            open: 0,
            answers: Vec::new(),
            wait_until: 0,
            cut: false,
            losses: 0,
            suspects: 0,
            full_since: None,
        }
    }

    fn fill(&mut self, now: Millis, out: &mut Vec<u8>) {
        if !self.up {
            return;
        }
        if now < self.wait_until {
            if !self.router.data_settled() {
                return;
            }
            self.wait_until = 0;
        }
        self.resend(now, out);
        if self.resend_at < self.inflight.len() {
            return;
        }
        let router = self.router.clone();
        while out.len() < OUTPUT && self.open < self.room() && self.inflight.len() < 65_000 {
            // A few at a time: clients wait for the same lock to hand over theirs.
            let mut some: smallvec::SmallVec<[Outgoing; 16]> = smallvec::SmallVec::new();
            let room = (self.room() - self.open).min(16);
            router.lanes(self.link, |lanes| {
                while some.len() < room
                    && let Some(outgoing) = lanes.pop()
                {
                    some.push(outgoing);
                }
            });
            if some.is_empty() {
                self.full_since = None;
                return;
            }
            for outgoing in some {
                self.send(outgoing, now, out);
            }
        }
        self.judge_window(now);
    }

    /// Where publishes have waited for the window for a while, another link brings one more.
    fn judge_window(&mut self, now: Millis) {
        let full = self.open >= self.window && !self.router.lanes(self.link, |l| l.is_empty());
        let since = match full {
            true => *self.full_since.get_or_insert(now),
            false => return self.full_since = None,
        };
        if now >= since + GROWTH {
            self.full_since = None;
            if self.router.add_publish_link() {
                tracing::info!(
                    link = self.link,
                    window = self.window,
                    "A publish link is added: publishes wait for the core's window"
                );
            }
        }
    }

    /// First what was under way on the last connection, in order [MQTT-4.4.0-1] [MQTT-4.6.0-1],
    /// within the window of this one.
    fn resend(&mut self, now: Millis, out: &mut Vec<u8>) {
        while self.resend_at < self.inflight.len() && out.len() < OUTPUT {
            let index = self.resend_at;
            match self.inflight[index].state {
                State::Resend | State::Renew => {
                    if self.open >= self.room() {
                        return;
                    }
                    self.send_again(index, now, out);
                }
                State::Sent | State::Released | State::ReleaseAgain | State::Done => {}
            }
            self.resend_at += 1;
        }
        self.trim();
    }

    /// PUBRELs wait for no quota [MQTT-3.3.4-8], and keep the order of the PUBRECs [MQTT-4.6.0-4].
    fn release_again(&mut self, out: &mut Vec<u8>) {
        for entry in &mut self.inflight {
            if entry.state == State::ReleaseAgain {
                let code = ReasonCode::SUCCESS;
                encode_ack(self.version, AckKind::Pubrel, entry.id, code, None, out);
                entry.state = State::Released;
                self.open += 1;
            }
        }
    }

    fn send_again(&mut self, index: usize, now: Millis, out: &mut Vec<u8>) {
        let entry = &self.inflight[index];
        let qos = entry.outgoing.message.qos().min(self.router.maximum_qos());
        let dup = entry.state == State::Resend && qos > QoS::AtMostOnce;
        let id = if qos == QoS::AtMostOnce { 0 } else { entry.id };
        let written = self.write(&self.inflight[index].outgoing, qos, id, dup, now, out);
        if written && qos > QoS::AtMostOnce {
            self.inflight[index].state = State::Sent;
            self.open += 1;
            return;
        }
        let reason = match written {
            true => ReasonCode::SUCCESS,
            false => ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR,
        };
        let outgoing = &self.inflight[index].outgoing;
        let answer = outgoing.token.map(|token| Answered {
            session: outgoing.session,
            token,
            reason,
            since: outgoing.since,
        });
        self.answers.extend(answer);
        if self.inflight[index].deaths >= SUSPECT {
            self.suspects -= 1;
        }
        self.inflight[index].state = State::Done;
    }

    fn send(&mut self, outgoing: Outgoing, now: Millis, out: &mut Vec<u8>) {
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
        metrics().upstream_publishes[crate::upstream::qos_label(qos)].increment(1);
        if qos == QoS::AtMostOnce {
            self.answer(&outgoing, ReasonCode::SUCCESS);
            return;
        }
        self.last_id = id;
        self.open += 1;
        self.inflight.push_back(InFlight {
            id,
            state: State::Sent,
            deaths: 0,
            outgoing,
        });
        self.resend_at = self.inflight.len();
    }

    fn write(
        &self,
        outgoing: &Outgoing,
        qos: QoS,
        id: u16,
        dup: bool,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> bool {
        let message = &outgoing.message;
        let mark = outgoing.origin_mark.filter(|_| self.version == Version::V5);
        let mark = mark.map(|mark| format!("{:x}.{:x}", self.instance, mark.get()));
        let user_property = mark.as_deref().map(|mark| (RESERVED_KEY, mark));
        let delivery = Delivery {
            version: self.version,
            dup,
            qos,
            // Of a 3.x client, that cannot be told [MQTT-3.2.2-14].
            retain: message.retain() && self.router.retain_available(),
            packet_id: id,
            alias: Alias::None,
            message_expiry: crate::upstream::remaining(message.expires_at(), now),
            subscription_ids: &[],
            user_property,
            hidden: 0,
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
        if self.inflight[index].deaths >= SUSPECT {
            self.suspects -= 1;
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self
            .inflight
            .front()
            .is_some_and(|e| e.state == State::Done)
        {
            self.inflight.pop_front();
            self.resend_at = self.resend_at.saturating_sub(1);
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

    /// How many may be open.
    fn room(&self) -> usize {
        if self.suspects > 0 { 1 } else { self.window }
    }

    /// Before what was under way is sent again: finds the publish that the core ends the connection
    /// for, lest it do so for ever.
    fn find_poison(&mut self) {
        let losses = self.router.data_losses();
        // A core that is gone, or restarts, takes the data links with it.
        let only_ours = self.cut && self.losses == losses;
        self.losses = losses;
        self.cut = false;
        let sent = self.inflight.iter().filter(|e| e.state == State::Sent);
        let alone = sent.count() == 1;
        let mut poison = None;
        for (index, entry) in self.inflight.iter_mut().enumerate() {
            if only_ours && entry.state == State::Sent {
                // Sent alone, as a suspect: before that it may have been another's fault, of QoS 0 too.
                if alone && entry.deaths >= SUSPECT {
                    poison = Some(index);
                }
                entry.deaths = entry.deaths.saturating_add(1);
            }
        }
        if let Some(index) = poison {
            self.quarantine(index);
        }
    }

    fn quarantine(&mut self, index: usize) {
        let outgoing = &self.inflight[index].outgoing;
        let client = self.router.client_id(outgoing.session);
        let message = &outgoing.message;
        tracing::error!(
            client_id = %clean(client.as_deref().unwrap_or(""), 256),
            topic = %clean(message.topic(), 256),
            payload_bytes = message.payload().len(),
            qos = message.qos() as u8,
            link = self.link,
            "A publish was taken out: the core closed the connection each time it was sent it"
        );
        metrics().messages_dropped[DropReason::Quarantined].increment(1);
        let (session, token, since) = (outgoing.session, outgoing.token, outgoing.since);
        let reason = ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR;
        self.answers.extend(token.map(|token| Answered {
            session,
            token,
            reason,
            since,
        }));
        self.inflight[index].state = State::Done;
    }

    fn flush(&mut self, now: Millis) {
        if !self.answers.is_empty() {
            self.router.answered(&self.answers, now);
            self.answers.clear();
        }
    }
}

impl Machine for Publisher {
    fn up(&mut self, up: &Up, now: Millis, out: &mut Vec<u8>) {
        self.find_poison();
        self.up = true;
        self.version = up.version;
        self.window = usize::from(up.receive_maximum);
        self.packet_max = up.packet_max as usize;
        self.router.publish_link_up(self.link, true);
        self.wait_until = now + PATIENCE;
        self.open = 0;
        self.resend_at = 0;
        for entry in &mut self.inflight {
            entry.state = match (entry.state, up.session_present) {
                (State::Done, _) => State::Done,
                (State::Released | State::ReleaseAgain, true) => State::ReleaseAgain,
                // The core took it over before it lost the session.
                (State::Released | State::ReleaseAgain, false) => State::Done,
                (State::Sent | State::Resend, true) => State::Resend,
                (State::Sent | State::Resend, false) | (State::Renew, _) => State::Renew,
            };
        }
        let open = self.inflight.iter().filter(|e| e.state != State::Done);
        self.suspects = open.filter(|e| e.deaths >= SUSPECT).count();
        self.trim();
        self.release_again(out);
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

    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.poll(now, out);
    }

    fn poll(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.fill(now, out);
        self.flush(now);
    }

    fn down(&mut self, end: &LinkEnd, now: Millis) {
        self.up = false;
        self.cut = end.by_core();
        self.router.publish_link_up(self.link, false);
        self.flush(now);
    }

    fn pace(&self) -> Option<Duration> {
        // A small window is better used at once: the core's answers are what limits then.
        (self.open < self.window / 4).then_some(PACE)
    }

    fn window(&self) -> (usize, usize) {
        (self.open, self.window)
    }
}

#[cfg(test)]
mod tests;
