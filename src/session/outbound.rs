//! What goes to the client: the in-flight window and the queue behind it.

use std::collections::VecDeque;

use crate::mqtt::{AckKind, QoS, ReasonCode, encode_ack};
use crate::time::Millis;

use crate::session::connection::Connection;
use crate::session::delivery::write_to;
use crate::session::entry::{Entry, IdSets, Offer, Redelivery, State};
use crate::session::queue::Queue;
use crate::session::{DropReason, QueueFull, SessionLimits};

/// Bytes charged for each queued or in-flight entry beside its message: with what its queue
/// reserves ahead and what the allocator loses.
pub const ENTRY_BYTES: usize = size_of::<Entry>() * 3 / 2;

/// The result of offering one message to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Bytes were added to the connection's output.
    Written(QoS),
    /// Waits in the queue.
    Queued,
    /// Not kept, for this reason.
    Dropped(DropReason),
    /// The queue is full and `queue_full = "end_session"`.
    EndSession,
}

/// What happened while the queue was worked on, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shed {
    /// Messages whose expiry passed while they waited.
    pub expired: u32,
    /// Messages larger than the client's Maximum Packet Size.
    pub too_large: u32,
    /// Messages pushed out by newer ones, for their number.
    pub pushed_out: u32,
    /// Messages pushed out by newer ones, for their bytes.
    pub pushed_out_bytes: u32,
    /// QoS 0 that waited for a client that left.
    pub qos0: u32,
    /// Messages written from the queue, or again, by QoS.
    pub sent: [u32; 3],
    /// A sample of the time from a delivery to its acknowledgement, milliseconds.
    pub acknowledged_after: Option<u32>,
}

/// The sending half of a session: packet identifiers, window, queue.
#[derive(Debug, Default)]
pub struct Outbound {
    /// In order of sending. Front is never `Done`; identifiers are allocated in ascending order,
    /// so an entry is found by its distance from the front's.
    inflight: VecDeque<Entry>,
    queue: Queue,
    sets: IdSets,
    inflight_bytes: usize,
    last_packet_id: u16,
    /// PUBLISH and PUBREL outstanding on the current connection.
    window_used: u16,
    /// Entries before this index need no second sending on this connection.
    resend_at: usize,
    /// PUBRELs are to be sent again on this connection.
    releases_due: bool,
    /// What was let go; the caller takes it and counts it.
    pub shed: Shed,
}

impl Outbound {
    /// Messages waiting behind the window.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Bytes of the messages waiting behind the window, each counted in full.
    pub fn queued_bytes(&self) -> usize {
        self.queue.bytes()
    }

    /// Bytes of the messages that the client has not acknowledged.
    pub fn in_flight_bytes(&self) -> usize {
        self.inflight_bytes
    }

    /// Messages sent and not completely acknowledged.
    pub fn in_flight(&self) -> usize {
        self.inflight
            .iter()
            .filter(|e| e.state != State::Done)
            .count()
    }

    /// Entries held, waiting or in flight: what the entry account is charged for.
    pub fn entries(&self) -> usize {
        self.inflight.len() + self.queue.len()
    }

    /// Whether a pump could write something once there is room.
    pub fn has_backlog(&self) -> bool {
        !self.queue.is_empty() || self.resend_at < self.inflight.len()
    }

    /// Offers one message.
    pub fn deliver(
        &mut self,
        connection: Option<&mut Connection>,
        limits: &SessionLimits,
        now: Millis,
        offer: &Offer<'_>,
    ) -> Delivered {
        let Offer {
            message,
            qos,
            retain,
            ids,
            group,
            stream,
            fetched: _,
        } = *offer;
        if let Some(connection) = connection {
            let room = connection.has_room(limits, stream);
            if qos == QoS::AtMostOnce {
                // QoS 0 passes a queue that waits for the window only, but not its own kind.
                if room && self.queue.qos0() == 0 && self.resend_at >= self.inflight.len() {
                    return match write_to(connection, now, offer, 0, false) {
                        true => Delivered::Written(qos),
                        false => Delivered::Dropped(DropReason::TooLarge),
                    };
                }
            } else if room
                && self.queue.is_empty()
                && self.resend_at >= self.inflight.len()
                && self.window_open(connection, limits)
            {
                let packet_id = self.next_packet_id();
                if !write_to(connection, now, offer, packet_id, false) {
                    return Delivered::Dropped(DropReason::TooLarge);
                }
                self.last_packet_id = packet_id;
                self.window_used += 1;
                self.inflight_bytes += message.size();
                let ids = self.sets.keep(ids, group, self.inflight.iter());
                self.inflight.push_back(Entry {
                    message: Some(message.clone()),
                    ids,
                    at: now as u32,
                    packet_id,
                    qos,
                    state: State::Sent,
                    retain,
                    stream,
                });
                self.resend_at = self.inflight.len();
                return Delivered::Written(qos);
            }
        } else if qos == QoS::AtMostOnce && !limits.queue_qos0 {
            return Delivered::Dropped(DropReason::Qos0Offline);
        }
        self.enqueue(limits, now, offer)
    }

    fn enqueue(&mut self, limits: &SessionLimits, now: Millis, offer: &Offer<'_>) -> Delivered {
        let Offer {
            message,
            qos,
            retain,
            ids,
            group,
            stream,
            fetched,
        } = *offer;
        let size = message.size();
        if !fetched && size > limits.queue_bytes_max {
            return Delivered::Dropped(DropReason::QueueBytes);
        }
        while let Some(reason) = self.queue.full(limits, size, fetched) {
            match limits.queue_full {
                _ if fetched => return Delivered::Dropped(reason),
                QueueFull::Newest => return Delivered::Dropped(reason),
                QueueFull::EndSession => return Delivered::EndSession,
                QueueFull::Oldest => {
                    if self.queue.pop_live().is_none() {
                        return Delivered::Dropped(reason);
                    }
                    let many = reason == DropReason::QueueFull;
                    self.shed.pushed_out += u32::from(many);
                    self.shed.pushed_out_bytes += u32::from(!many);
                }
            }
        }
        let entries = self.inflight.iter().chain(self.queue.iter());
        let ids = self.sets.keep(ids, group, entries);
        self.queue.push(Entry {
            message: Some(message.clone()),
            ids,
            at: now as u32,
            packet_id: 0,
            qos,
            state: match fetched {
                true => State::Fetched,
                false => State::Waiting,
            },
            retain,
            stream,
        });
        Delivered::Queued
    }

    /// Writes what the window, the client and the output buffer allow: first what an earlier
    /// connection left unacknowledged, in order [MQTT-4.4.0-1] [MQTT-4.6.0-1], then the queue.
    pub fn pump(&mut self, connection: &mut Connection, limits: &SessionLimits, now: Millis) {
        self.resend(connection, limits, now);
        while self.resend_at >= self.inflight.len() {
            let Some(front) = self.queue.front() else {
                break;
            };
            if !connection.has_room(limits, front.stream) {
                break;
            }
            if front.is_over(limits, now) {
                self.queue.pop();
                self.shed.expired += 1;
                continue;
            }
            if front.qos > QoS::AtMostOnce && !self.window_open(connection, limits) {
                break;
            }
            let Some(mut entry) = self.queue.pop() else {
                break;
            };
            let packet_id = match entry.qos {
                QoS::AtMostOnce => 0,
                _ => self.next_packet_id(),
            };
            let written = entry
                .offer(&self.sets)
                .is_some_and(|offer| write_to(connection, now, &offer, packet_id, false));
            if !written {
                self.shed.too_large += 1;
                continue;
            }
            self.shed.sent[entry.qos as usize] += 1;
            if packet_id != 0 {
                entry.at = now as u32;
                self.last_packet_id = packet_id;
                self.window_used += 1;
                self.inflight_bytes += entry.size();
                entry.packet_id = packet_id;
                entry.state = State::Sent;
                self.inflight.push_back(entry);
                self.resend_at = self.inflight.len();
            }
        }
        self.queue.shrink();
    }

    fn resend(&mut self, connection: &mut Connection, limits: &SessionLimits, now: Millis) {
        if std::mem::take(&mut self.releases_due) {
            self.release_again(connection);
        }
        while self.resend_at < self.inflight.len() && connection.has_room(limits, 0) {
            let window_open = self.window_used < connection.receive_maximum;
            let entry = &mut self.inflight[self.resend_at];
            if entry.state == State::Resend {
                if !window_open {
                    return;
                }
                let written = entry
                    .offer(&self.sets)
                    .is_some_and(|offer| write_to(connection, now, &offer, entry.packet_id, true));
                if written {
                    self.shed.sent[entry.qos as usize] += 1;
                    entry.at = now as u32;
                    entry.state = State::Sent;
                    self.window_used += 1;
                } else {
                    entry.state = State::Done;
                    self.inflight_bytes -= entry.size();
                    entry.message = None;
                    self.shed.too_large += 1;
                }
            }
            self.resend_at += 1;
        }
        self.trim();
    }

    /// PUBRELs do not wait for the window [MQTT-3.3.4-10], nor behind a PUBLISH that does.
    fn release_again(&mut self, connection: &mut Connection) {
        for entry in &mut self.inflight {
            if entry.state == State::ReleaseAgain {
                encode_ack(
                    connection.version,
                    AckKind::Pubrel,
                    entry.packet_id,
                    ReasonCode::SUCCESS,
                    None,
                    connection.control(),
                );
                entry.state = State::Released;
                self.window_used += 1;
            }
        }
    }

    /// The client's PUBACK, or a PUBREC of 0x80 and above [MQTT-4.4.0-2]. False: unknown identifier.
    pub fn acknowledged(&mut self, packet_id: u16, now: Millis) -> bool {
        if let Some(index) = self.find(packet_id) {
            let after = (now as u32).wrapping_sub(self.inflight[index].at);
            self.shed.acknowledged_after = Some(after);
        }
        self.complete(packet_id, |s| matches!(s, State::Sent | State::Resend))
    }

    /// The client's PUBREC: the answer is PUBREL, whatever we know [MQTT-4.3.3-4], on the stream
    /// that it came on. False: unknown.
    pub fn received(&mut self, packet_id: u16, stream: u8) -> bool {
        let Some(index) = self.find(packet_id) else {
            return false;
        };
        let entry = &mut self.inflight[index];
        entry.stream = stream;
        match entry.state {
            State::Sent | State::Resend if entry.qos == QoS::ExactlyOnce => {
                if entry.state == State::Resend {
                    self.window_used += 1;
                }
                entry.state = State::Released;
                // The client has it [MQTT-4.3.3-6]: only the identifier is still of use.
                self.inflight_bytes -= entry.size();
                entry.message = None;
                true
            }
            State::Released => true,
            State::ReleaseAgain => {
                self.window_used += 1;
                entry.state = State::Released;
                true
            }
            _ => false,
        }
    }

    /// The client's PUBCOMP. False: unknown identifier.
    pub fn completed(&mut self, packet_id: u16) -> bool {
        self.complete(packet_id, |s| {
            matches!(s, State::Released | State::ReleaseAgain)
        })
    }

    fn complete(&mut self, packet_id: u16, expected: impl Fn(State) -> bool) -> bool {
        let Some(index) = self.find(packet_id) else {
            return false;
        };
        let entry = &mut self.inflight[index];
        if !expected(entry.state) {
            return false;
        }
        let counted = matches!(entry.state, State::Sent | State::Released);
        entry.state = State::Done;
        self.inflight_bytes -= entry.size();
        entry.message = None;
        self.window_used -= u16::from(counted);
        self.trim();
        true
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
        if self.inflight.is_empty() {
            self.resend_at = 0;
            if self.queue.is_empty() {
                self.sets.clear();
            }
            if self.inflight.capacity() > 64 {
                self.inflight = VecDeque::new();
            }
        }
    }

    fn find(&self, packet_id: u16) -> Option<usize> {
        let first = self.inflight.front()?.packet_id;
        let distance = |id: u16| id.wrapping_sub(first);
        let index = self
            .inflight
            .binary_search_by_key(&distance(packet_id), |e| distance(e.packet_id))
            .ok()?;
        (self.inflight[index].state != State::Done).then_some(index)
    }

    /// Forgets what belongs to the lost connection; what was sent is to be sent again.
    pub fn connection_ended(&mut self, limits: &SessionLimits) {
        self.window_used = 0;
        self.resend_at = 0;
        for entry in &mut self.inflight {
            entry.state = match entry.state {
                State::Sent => State::Resend,
                State::Released => State::ReleaseAgain,
                other => other,
            };
            self.releases_due |= entry.state == State::ReleaseAgain;
        }
        for entry in self.inflight.iter_mut().chain(self.queue.iter_mut()) {
            entry.stream = 0;
        }
        if !limits.queue_qos0 && self.queue.qos0() > 0 {
            self.shed.qos0 += self.queue.qos0();
            self.queue.retain(|e| e.qos != QoS::AtMostOnce);
        }
    }

    /// What waits for a data stream goes on the control stream.
    pub fn leave_stream(&mut self, stream: u8) {
        for entry in self.queue.iter_mut().filter(|e| e.stream == stream) {
            entry.stream = 0;
        }
    }

    /// A data stream is gone: what was sent on it and is not acknowledged is sent again, on the
    /// control stream, as if the connection had been lost.
    pub fn stream_ended(&mut self, stream: u8) {
        self.leave_stream(stream);
        for (at, entry) in self.inflight.iter_mut().enumerate() {
            if entry.stream != stream {
                continue;
            }
            entry.stream = 0;
            entry.state = match entry.state {
                State::Sent => State::Resend,
                State::Released => State::ReleaseAgain,
                _ => continue,
            };
            self.window_used -= 1;
            self.resend_at = self.resend_at.min(at);
            self.releases_due |= entry.state == State::ReleaseAgain;
        }
    }

    /// Drops every waiting message and every unacknowledged PUBLISH; returns how many messages.
    /// For a detached session only: identifiers in PUBREL state stay.
    pub fn evict(&mut self) -> usize {
        let mut dropped = self.drop_queue();
        let before = self.inflight.len();
        self.inflight
            .retain(|e| matches!(e.state, State::Released | State::ReleaseAgain));
        dropped += before - self.inflight.len();
        self.inflight_bytes = self.inflight.iter().map(|e| e.size()).sum();
        self.resend_at = 0;
        dropped
    }

    /// Whether deliveries of shared subscriptions may be among what waits.
    pub fn has_shared(&self) -> bool {
        self.sets.grouped()
    }

    /// Takes out what another member of its group may have: what was never sent, and QoS 1 that
    /// was not acknowledged. QoS 2 under way stays [MQTT-4.8.2-4] [MQTT-4.8.2-5].
    pub fn take_shared(&mut self) -> Vec<Redelivery> {
        let mut unclaimed = Vec::new();
        if !self.sets.grouped() {
            return unclaimed;
        }
        let Self {
            inflight,
            queue,
            sets,
            ..
        } = self;
        for entry in inflight.iter_mut().filter(|e| e.qos == QoS::AtLeastOnce) {
            if let Some(filter) = sets.group(entry.ids)
                && let Some(message) = entry.message.take()
            {
                entry.state = State::Done;
                unclaimed.push(Redelivery { filter, message });
            }
        }
        queue.retain(|entry| match (sets.group(entry.ids), &entry.message) {
            (Some(filter), Some(message)) => {
                let message = message.clone();
                unclaimed.push(Redelivery { filter, message });
                false
            }
            _ => true,
        });
        self.inflight_bytes = self.inflight.iter().map(|e| e.size()).sum();
        self.trim();
        unclaimed
    }

    /// Whether a new message of QoS 1 or 2 would be written at once.
    pub fn window_free(&self, connection: &Connection, limits: &SessionLimits) -> bool {
        connection.has_room(limits, 0) && self.window_open(connection, limits)
    }

    /// Drops every waiting message; returns how many.
    pub fn drop_queue(&mut self) -> usize {
        let dropped = self.queue.len();
        self.queue = Queue::default();
        dropped
    }

    /// Drops waiting messages that are past their expiry, and QoS 0 where `qos0`; returns
    /// (expired, QoS 0 dropped).
    pub fn purge(&mut self, limits: &SessionLimits, now: Millis, qos0: bool) -> (usize, usize) {
        let (mut expired, mut zero) = (0, 0);
        self.queue.retain(|e| {
            if e.is_over(limits, now) {
                expired += 1;
                return false;
            }
            if qos0 && e.qos == QoS::AtMostOnce {
                zero += 1;
                return false;
            }
            true
        });
        (expired, zero)
    }

    /// Room in the client's Receive Maximum [MQTT-3.3.4-9] and in what we keep in flight for it.
    fn window_open(&self, connection: &Connection, limits: &SessionLimits) -> bool {
        self.window_used < connection.receive_maximum
            && self.inflight.len() < limits.in_flight_max()
            && (self.inflight_bytes < limits.queue_bytes_max)
    }

    /// The next identifier in ascending order, never 0 [MQTT-2.2.1-4]. It is free: entries in
    /// flight are fewer than identifiers and hold a contiguous run behind it.
    fn next_packet_id(&self) -> u16 {
        match self.last_packet_id.wrapping_add(1) {
            0 => 1,
            id => id,
        }
    }
}
