//! The publish link's machine: it sends clients' publishes within the broker's Receive Maximum, and
//! brings back the broker's acknowledgements.

mod poison;
mod suspects;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::flow::{self, Stage, Window};
use crate::mqtt::{
    AckKind, Alias, Delivery, Oversized, Packet, QoS, ReasonCode, Version, encode_ack,
};
use crate::router::publish::QOS0_WAIT;
use crate::router::publish::queue::Outgoing;
use crate::router::{Answered, LinkSession, Router};
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;

use crate::upstream::link::common::RESERVED_KEY;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::role::Role;
use suspects::Suspects;

/// With this much output waiting for the socket, no more publishes are taken from the queues.
const OUTPUT_MAX_BYTES: usize = 128 * 1024;

/// The least time between two writes, so that publishes of many clients share one. The first write
/// after a pause goes at once.
const PACE: Duration = Duration::from_millis(1);

/// With so few publishes outstanding, writes do not wait for others.
const FEW_OPEN: usize = 3;

/// A publish of QoS 1 or 2 is a suspect once the broker has ended this many connections of the link, and of no
/// other link, while the publish had no acknowledgement. Suspects are sent one at a time: a suspect
/// that is alone on the link when this happens again is the reason (poison).
const SUSPECT_AFTER: u8 = 2;

/// Publishes that wait for the window for this long ask for another link.
const GROW_AFTER: Duration = Duration::from_millis(250);

/// How long a link that has connected waits for the data links to have their filters again. A
/// message that the broker takes before that reaches nobody.
const DATA_LINKS_WAIT: Duration = Duration::from_secs(5);

/// Publishes that may be in flight: fewer than there are packet identifiers, whatever the window.
const IN_FLIGHT_MAX: usize = 65_000;

/// A publish link.
#[derive(Debug)]
pub(crate) struct PublishLink {
    router: Arc<Router>,
    link: usize,
    /// Tells this process's No Local marks from those of others.
    instance: u64,
    connected: bool,
    version: Version,
    /// The broker's Receive Maximum.
    receive_maximum: usize,
    /// The broker's Maximum Packet Size, bytes; `None`: not limited.
    packet_max: Option<u32>,
    window: Window<InFlight>,
    /// Acknowledgements for the router.
    answers: Vec<Answered>,
    /// The last connection ended in a way that a packet may have caused.
    cut: bool,
    /// [`Router::unprovoked_losses`] when the link last connected.
    losses: u64,
    /// Since when publishes wait for the window.
    full_since: Option<Millis>,
    /// When it last connected.
    connected_at: Millis,
    /// Publishes were sent on this connection.
    has_sent: bool,
    /// Publishes in flight that are sent one at a time.
    suspect_publishes: usize,
    /// Clients whose publishes are sent one at a time.
    suspects: Suspects,
    /// Until then, nothing is sent unless the data links have their filters again.
    wait_until: Option<Millis>,
    /// A PINGREQ is to follow the publishes that were put out.
    ping_due: bool,
    /// PINGREQs without an answer.
    pings: VecDeque<Ping>,
}

/// Who asked for a PINGREQ.
#[derive(Clone, Copy, Debug)]
struct Ping {
    of_router: bool,
    of_suspects: bool,
}

#[derive(Debug)]
struct InFlight {
    id: u16,
    stage: Stage,
    /// PUBLISH is to be sent again as a new one, because the broker lost the session.
    renew: bool,
    /// How many connections of this link alone the broker has ended while this publish had no
    /// acknowledgement.
    deaths: u8,
    outgoing: Outgoing,
}

impl InFlight {
    /// Whether the publish is unacknowledged and one of the publishes that are sent one at a time.
    fn is_suspect(&self) -> bool {
        self.stage != Stage::Done && self.deaths >= SUSPECT_AFTER
    }
}

impl flow::InFlight for InFlight {
    fn packet_id(&self) -> u16 {
        self.id
    }

    fn stage(&self) -> Stage {
        self.stage
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }
}

impl PublishLink {
    /// The machine of publish link `link`. `instance` is a number that no other process has.
    pub(crate) fn new(router: Arc<Router>, link: usize, instance: u64) -> Self {
        Self {
            router,
            link,
            instance,
            connected: false,
            version: Version::V5,
            receive_maximum: 0,
            packet_max: None,
            window: Window::default(),
            answers: Vec::new(),
            wait_until: None,
            cut: false,
            losses: 0,
            connected_at: Millis::ZERO,
            has_sent: false,
            suspect_publishes: 0,
            suspects: Suspects::default(),
            full_since: None,
            ping_due: false,
            pings: VecDeque::new(),
        }
    }

    fn fill(&mut self, now: Millis, out: &mut Vec<u8>) {
        if !self.connected {
            return;
        }
        if self.wait_until.is_some_and(|until| now < until) && !self.router.data_settled() {
            return;
        }
        self.wait_until = None;
        self.resend(now, out);
        if self.window.has_resends() {
            return;
        }
        if !self.suspects.is_idle() && !self.try_suspect(now, out) {
            return;
        }
        let router = self.router.clone();
        while out.len() < OUTPUT_MAX_BYTES
            && self.open() < self.room()
            && self.window.len() < IN_FLIGHT_MAX
        {
            // A few at a time, because clients wait for the same lock to queue theirs.
            let mut some: smallvec::SmallVec<[Outgoing; 16]> = smallvec::SmallVec::new();
            let room = (self.room() - self.open()).min(16);
            let mut room = room.min(self.suspects.room());
            let limited = router.publishes_limited();
            if limited {
                room = router.take_allowance(self.link, room);
            }
            if room == 0 {
                // They wait for something else than the broker's window.
                self.full_since = None;
                return;
            }
            router.publish_queues(self.link, |queues| {
                while some.len() < room
                    && let Some(outgoing) = match limited {
                        true => queues.pop_one_each(),
                        false => queues.pop(),
                    }
                {
                    some.push(outgoing);
                }
            });
            if limited && some.len() < room {
                router.return_allowance(self.link, room - some.len());
            }
            if some.is_empty() {
                self.full_since = None;
                return;
            }
            for outgoing in some {
                self.send(outgoing, now, out);
            }
        }
        self.check_window(now);
    }

    /// Asks for another link, which has a window of its own, if publishes have waited for a while.
    fn check_window(&mut self, now: Millis) {
        let full = self.open() >= self.receive_maximum
            && !self.router.publish_queues(self.link, |l| l.is_empty());
        let since = match full {
            true => *self.full_since.get_or_insert(now),
            false => return self.full_since = None,
        };
        if now >= since + GROW_AFTER {
            self.full_since = None;
            if self.router.add_publish_link() {
                tracing::info!(
                    link = self.link,
                    window = self.receive_maximum,
                    "A publish link is added: publishes wait for the broker's window"
                );
            }
        }
    }

    /// Sends the publishes again that the last connection left without an acknowledgement, in their
    /// order [MQTT-4.4.0-1] [MQTT-4.6.0-1], within the window of this connection.
    fn resend(&mut self, now: Millis, out: &mut Vec<u8>) {
        while out.len() < OUTPUT_MAX_BYTES
            && let Some(index) = self.window.next_resend()
        {
            if self.open() >= self.room() {
                return;
            }
            self.send_again(index, now, out);
        }
    }

    /// Sends PUBRELs again.
    fn release_again(&mut self, out: &mut Vec<u8>) {
        let (version, code) = (self.version, ReasonCode::SUCCESS);
        self.window
            .release_again(|id| encode_ack(version, AckKind::Pubrel, id, code, None, out));
    }

    fn send_again(&mut self, index: usize, now: Millis, out: &mut Vec<u8>) {
        let entry = self.window.get(index);
        let qos = entry.outgoing.message.qos().min(self.router.maximum_qos());
        let dup = !entry.renew && qos > QoS::AtMostOnce;
        let id = if qos == QoS::AtMostOnce { 0 } else { entry.id };
        let written = self.write(&entry.outgoing, qos, id, dup, now, out);
        self.has_sent |= written;
        if written && qos > QoS::AtMostOnce {
            self.window.get_mut(index).renew = false;
            self.window.resent(index);
            return;
        }
        let reason = match written {
            true => ReasonCode::SUCCESS,
            false => ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR,
        };
        self.answers.extend(answer(&entry.outgoing, reason));
        self.suspect_publishes -= usize::from(entry.is_suspect());
        self.suspects.gives_up(entry.id);
        self.window.finish_resend(index);
    }

    /// Sends a publish, and returns its QoS. `None`: it was not sent, and its client has the answer.
    fn send(&mut self, outgoing: Outgoing, now: Millis, out: &mut Vec<u8>) -> Option<QoS> {
        let message = &outgoing.message;
        if message.has_expired(now) {
            metrics().messages_dropped[DropReason::Expired].increment(1);
            // For its publisher it is done: an expired message reaches nobody.
            self.answers.extend(answer(&outgoing, ReasonCode::SUCCESS));
            return None;
        }
        let qos = message.qos().min(self.router.maximum_qos());
        let id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.window.next_id(),
        };
        if qos == QoS::AtMostOnce && self.is_late(&outgoing) {
            metrics().messages_dropped[DropReason::UpstreamAwayQos0].increment(1);
            return None;
        }
        if !self.write(&outgoing, qos, id, false, now, out) {
            metrics().messages_dropped[DropReason::UpstreamLimit].increment(1);
            let reason = ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR;
            self.answers.extend(answer(&outgoing, reason));
            return None;
        }
        metrics().upstream_publishes[qos].increment(1);
        self.has_sent = true;
        if qos == QoS::AtMostOnce {
            self.suspects.sent(outgoing.session, message);
            self.answers.extend(answer(&outgoing, ReasonCode::SUCCESS));
            return Some(qos);
        }
        self.window.push(InFlight {
            id,
            stage: Stage::Sent,
            renew: false,
            deaths: 0,
            outgoing,
        });
        Some(qos)
    }

    /// Whether a QoS 0 publish has waited for the link for too long.
    fn is_late(&self, outgoing: &Outgoing) -> bool {
        let late = outgoing.since + QOS0_WAIT < self.connected_at;
        late && outgoing.token.is_none() && !outgoing.message.retain()
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
            // A 3.x client cannot be told that the broker keeps no retained messages
            // [MQTT-3.2.2-14].
            retain: message.retain() && self.router.retain_available(),
            packet_id: id,
            alias: Alias::None,
            message_expiry: message.remaining_expiry(now),
            subscription_ids: &[],
            user_property,
            hidden: 0,
        };
        let too_large = |max| delivery.size(message) > max as usize;
        if self.packet_max.is_some_and(too_large) {
            return false;
        }
        delivery.encode(message, out);
        true
    }

    /// The packets that are outstanding on this connection.
    fn open(&self) -> usize {
        usize::from(self.window.open())
    }

    fn done(&mut self, index: usize) {
        self.suspect_publishes -= usize::from(self.window.get(index).is_suspect());
        self.window.finish(index);
    }

    fn acknowledged(&mut self, id: u16, reason: ReasonCode, qos: QoS, now: Millis) {
        let Some(index) = self.window.find(id) else {
            return;
        };
        let entry = self.window.get(index);
        if entry.stage != Stage::Sent || entry.outgoing.message.qos() < qos {
            return;
        }
        let trusted = self.suspects.acknowledged(id, now);
        self.trust(trusted);
        let entry = self.window.get(index);
        if reason.is_error() {
            metrics().messages_dropped[DropReason::UpstreamRefused].increment(1);
        }
        self.answers.extend(answer(&entry.outgoing, reason));
        if qos == QoS::ExactlyOnce && !reason.is_error() {
            self.window.release(index);
        } else {
            self.done(index);
        }
    }

    /// How many publishes may be open.
    fn room(&self) -> usize {
        if self.suspect_publishes > 0 {
            1
        } else {
            self.receive_maximum
        }
    }

    fn flush(&mut self, now: Millis) {
        if !self.answers.is_empty() {
            self.router.answered(&self.answers, now);
            self.answers.clear();
        }
    }
}

impl Machine for PublishLink {
    fn connected(&mut self, handshake: &Handshake, now: Millis, out: &mut Vec<u8>) {
        self.find_poison(now);
        self.connected = true;
        self.connected_at = now;
        self.has_sent = false;
        self.version = handshake.version;
        self.receive_maximum = usize::from(handshake.receive_maximum);
        self.packet_max = handshake.packet_max;
        self.router.publish_link_up(self.link, true, now);
        self.wait_until = Some(now + DATA_LINKS_WAIT);
        let session_present = handshake.session != LinkSession::New;
        self.window.connection_ended(|_| {});
        if !session_present {
            // The broker owned released messages before it lost the session.
            self.window
                .finish_where(|entry| entry.stage == Stage::ReleaseAgain);
            for entry in self.window.iter_mut() {
                entry.renew = true;
            }
        }
        let suspects = self.window.iter().filter(|entry| entry.is_suspect());
        self.suspect_publishes = suspects.count();
        self.release_again(out);
        self.poll(now, out);
    }

    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        match packet {
            Packet::Puback(a) => self.acknowledged(a.packet_id, a.reason, QoS::AtLeastOnce, now),
            Packet::Pubrec(a) => {
                self.acknowledged(a.packet_id, a.reason, QoS::ExactlyOnce, now);
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
                if let Some(index) = self.window.find(a.packet_id)
                    && self.window.get(index).stage == Stage::Released
                {
                    self.done(index);
                }
            }
            _ => {
                return Err(LinkEnd::Unexpected(Role::Publish));
            }
        }
        Ok(())
    }

    fn oversized(&mut self, _: &Oversized, _: Millis, _: &mut Vec<u8>) -> Result<(), LinkEnd> {
        Err(LinkEnd::Unexpected(Role::Publish))
    }

    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.poll(now, out);
    }

    fn poll(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.fill(now, out);
        self.flush(now);
        // Everything that was taken from the queues is sent on this connection, before a PINGREQ.
        if self.connected && !self.window.has_resends() {
            self.ping_due |= self.router.publish_ping_due(self.link, now);
        }
    }

    fn wants_ping(&mut self) -> bool {
        let ping = Ping {
            of_router: std::mem::take(&mut self.ping_due),
            of_suspects: self.suspects.wants_ping(),
        };
        let wanted = ping.of_router || ping.of_suspects;
        self.pings.extend(wanted.then_some(ping));
        wanted
    }

    fn ping_answered(&mut self, now: Millis) {
        let Some(ping) = self.pings.pop_front() else {
            return;
        };
        if ping.of_suspects {
            let trusted = self.suspects.ping_answered(now);
            self.trust(trusted);
        }
        if ping.of_router {
            self.router.publish_ping_answered(self.link);
        }
    }

    fn has_sent(&self) -> bool {
        self.has_sent
    }

    fn disconnected(&mut self, end: &LinkEnd, now: Millis) {
        self.connected = false;
        self.ping_due = false;
        self.pings.clear();
        self.cut = end.may_be_for_a_packet();
        self.router.publish_link_up(self.link, false, now);
        if !self.has_sent {
            self.router.link_lost_unprovoked();
        }
        self.flush(now);
    }

    fn pace(&self) -> Option<Duration> {
        // With a small window the broker's answers are the limit, so publishes go at once. With few
        // clients their own waiting is: one that sends QoS 2 messages one after the other waits for
        // each of the broker's answers.
        let open = self.open();
        let few = (1..=FEW_OPEN).contains(&open);
        (!few && open < self.receive_maximum / 4).then_some(PACE)
    }

    fn awaits_packets(&self) -> bool {
        self.open() > 0 || !self.pings.is_empty()
    }

    fn window(&self) -> (usize, usize) {
        (self.open(), self.receive_maximum)
    }
}

/// The answer to a publish, if its client waits for one.
fn answer(outgoing: &Outgoing, reason: ReasonCode) -> Option<Answered> {
    Some(Answered {
        session: outgoing.session,
        token: outgoing.token?,
        reason,
        since: outgoing.since,
    })
}

#[cfg(test)]
mod tests;
