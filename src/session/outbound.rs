//! The sending half of a session: the window of messages in flight, and the queue behind it.

mod answers;

use std::sync::LazyLock;

use crate::flow::{InFlight, Stage, Window};
use crate::mqtt::{AckKind, QoS, ReasonCode, encode_ack};
use crate::streams::StreamId;
use crate::time::Millis;

use crate::budget::{Allowance, QueueFull};
use crate::session::connection::Connection;
use crate::session::delivery::{leave_for, write_to};
use crate::session::entry::{Entry, IdSets, Kept, Offer, Redelivery, State};
use crate::session::queue::Queue;
use crate::session::{DropReason, SessionLimits};

/// Bytes charged for each queued or in-flight entry beside its message, with a share for the memory
/// that queues reserve ahead and the allocator loses.
pub const ENTRY_BYTES: usize = size_of::<Entry>() * 3 / 2;

/// Bytes charged for the sending half of a session whose client is away, beside its entries: a queue or a
/// window has room for four entries at least.
pub(super) const IDLE_BYTES: usize = size_of::<Outbound>() + 4 * size_of::<Entry>();

/// The result of offering one message to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Bytes were added to the connection's output.
    Written(QoS),
    /// The message waits in the queue.
    Queued,
    /// The message was not kept, for this reason.
    Dropped(DropReason),
    /// The queue is full and `queue_full = "end_session"`.
    EndSession,
}

/// Messages that left the queue since the driver last took these counts, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shed {
    /// Messages whose expiry passed while they waited.
    pub expired: u32,
    /// Messages that were too old for the queue when their client came back.
    pub aged: u32,
    /// Messages larger than the client's Maximum Packet Size.
    pub too_large: u32,
    /// Messages dropped for newer ones, because of `queue_messages_max`.
    pub pushed_out: u32,
    /// Messages dropped for newer ones, because of `queue_bytes_max`.
    pub pushed_out_bytes: u32,
    /// QoS 0 messages that waited when their client disconnected.
    pub qos0: u32,
    /// Messages written from the queue or sent again, by QoS.
    pub sent: [u32; 3],
    /// A sample of the time from a delivery to its acknowledgement, milliseconds.
    pub acknowledged_after: Option<u32>,
}

/// The sending half of a session.
#[derive(Debug, Default)]
pub struct Outbound {
    window: Window<Entry>,
    queue: Queue,
    sets: IdSets,
    inflight_bytes: usize,
    /// The log's numbers of messages of QoS 2 that the client has, until the session's record says so.
    done: Vec<u64>,
    /// Counts, which the driver takes.
    pub shed: Shed,
}

/// The sending half of a session that has nothing to send.
pub(super) static NOTHING: LazyLock<Outbound> = LazyLock::new(Outbound::default);

impl Outbound {
    /// The sending half of a session that gave the packet identifier `last_id` last.
    pub(super) fn after(last_id: u16) -> Self {
        Self {
            window: Window::after(last_id),
            ..Self::default()
        }
    }

    /// The messages of QoS 2 that the client has, by the log's numbers.
    pub fn done(&self) -> &[u64] {
        &self.done
    }

    /// The session's record says that the messages up to this number are done.
    pub fn forget_done(&mut self, through: u64) {
        self.done.retain(|number| *number > through);
    }

    /// The client, which is away, keeps what waits now.
    pub(super) fn client_left(&mut self) {
        self.queue.client_left();
    }

    /// Adds a message for a client that was connected when an earlier process ended: no limit of a queue
    /// counts.
    pub fn restore_later(&mut self, now: Millis, offer: &Offer<'_>) {
        self.enqueue(now, offer);
    }

    /// The messages in flight, the queue behind them, and the identifiers of both.
    pub(super) fn parts(&self) -> (&Window<Entry>, &Queue, &IdSets) {
        (&self.window, &self.queue, &self.sets)
    }

    /// The reverse of [`Outbound::parts`].
    pub(super) fn of_parts(window: Window<Entry>, queue: Queue, sets: IdSets) -> Self {
        Self {
            inflight_bytes: window.iter().map(Entry::size).sum(),
            window,
            queue,
            sets,
            ..Self::default()
        }
    }

    /// The packet identifier that was given last.
    pub(super) fn last_id(&self) -> u16 {
        self.window.last_id()
    }

    /// Whether nothing waits, is in flight, or is to be counted.
    pub(super) fn is_idle(&self) -> bool {
        self.entries() == 0 && self.done.is_empty() && self.shed == Shed::default()
    }

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

    /// Messages that are sent and not completely acknowledged.
    pub fn in_flight(&self) -> usize {
        let unacknowledged = |e: &&Entry| e.stage() != Stage::Done;
        self.window.iter().filter(unacknowledged).count()
    }

    /// Entries, waiting or in flight, for which the entry account is charged.
    pub fn entries(&self) -> usize {
        self.window.len() + self.queue.len()
    }

    /// Bytes of the sets of Subscription Identifiers to which entries refer.
    pub fn identifier_bytes(&self) -> usize {
        self.sets.bytes()
    }

    /// Whether [`Outbound::pump`] could write something once there is room.
    pub fn has_backlog(&self) -> bool {
        !self.queue.is_empty() || self.window.has_resends()
    }

    /// Offers one message: writes it if the window and the output have room and nothing waits before
    /// it, else queues it.
    pub fn deliver(
        &mut self,
        connection: Option<&mut Connection>,
        limits: &SessionLimits,
        now: Millis,
        offer: &Offer<'_>,
        output: &mut Allowance,
    ) -> Delivered {
        let Offer {
            message,
            qos,
            retain,
            ids,
            group,
            stream,
            fetched: _,
            position: _,
        } = *offer;
        let attached = connection.is_some();
        if let Some(connection) = connection {
            let room = connection.has_room(limits, stream);
            if qos == QoS::AtMostOnce {
                // QoS 0 overtakes messages that wait for the window, but not other QoS 0.
                if room
                    && self.queue.qos0() == 0
                    && !self.window.has_resends()
                    && let Some(leave) = leave_for(connection, message, output)
                {
                    return match write_to(connection, now, offer, (0, false), leave) {
                        true => Delivered::Written(qos),
                        false => Delivered::Dropped(DropReason::TooLarge),
                    };
                }
            } else if room
                && self.queue.is_empty()
                && !self.window.has_resends()
                && self.window_open(connection, limits)
                && (qos == QoS::AtLeastOnce || connection.takes_qos2())
                && let Some(leave) = leave_for(connection, message, output)
            {
                let packet_id = self.window.next_id();
                if !write_to(connection, now, offer, (packet_id, false), leave) {
                    return Delivered::Dropped(DropReason::TooLarge);
                }
                if qos == QoS::ExactlyOnce {
                    connection.commit_first();
                }
                self.inflight_bytes += message.size();
                let ids = self.sets.keep(ids, group, self.window.iter());
                self.window.push(Entry {
                    message: Some(message.clone()),
                    ids,
                    at: now.low_bits(),
                    packet_id,
                    qos,
                    state: State::InFlight(Stage::Sent),
                    retain,
                    stream,
                });
                return Delivered::Written(qos);
            }
        } else if qos == QoS::AtMostOnce && !limits.queue_qos0 {
            return Delivered::Dropped(DropReason::Qos0Offline);
        }
        if !attached {
            if let Some(refused) = self.make_room(limits, offer) {
                return refused;
            }
            if let Some(numbered) = message.numbered() {
                numbered.hurry();
            }
        }
        self.enqueue(now, offer);
        Delivered::Queued
    }

    /// Makes room for a message to a client that is away, as `queue_full` says. Returns the outcome if
    /// the message is not to be queued. An attached client has no limit of its own: the budget of all
    /// queues and the rule for stalled clients bound its queue.
    fn make_room(&mut self, limits: &SessionLimits, offer: &Offer<'_>) -> Option<Delivered> {
        let (size, fetched) = (offer.message.size(), offer.fetched);
        if !fetched && size > limits.queue_bytes_max {
            return Some(Delivered::Dropped(DropReason::QueueBytes));
        }
        while let Some(reason) = self.queue.full(limits, size, fetched) {
            match limits.queue_full {
                _ if fetched => return Some(Delivered::Dropped(reason)),
                QueueFull::Newest => return Some(Delivered::Dropped(reason)),
                QueueFull::EndSession => return Some(Delivered::EndSession),
                QueueFull::Oldest => {
                    if self.queue.pop_live().is_none() {
                        return Some(Delivered::Dropped(reason));
                    }
                    let many = reason == DropReason::QueueFull;
                    self.shed.pushed_out += u32::from(many);
                    self.shed.pushed_out_bytes += u32::from(!many);
                }
            }
        }
        None
    }

    /// Live messages that may wait for the client while it is away.
    pub fn live_max(&self, limits: &SessionLimits) -> usize {
        self.queue.live_max(limits)
    }

    /// Takes messages that were kept elsewhere while the client was away, in the order of their
    /// arrival. Where the queue becomes too long, the oldest live messages go.
    pub fn take_kept(&mut self, limits: &SessionLimits, now: Millis, kept: Vec<Kept>) {
        let entries = kept.into_iter().map(Entry::from).collect();
        self.queue.merge(entries, now);
        while let Some(reason) = self.queue.exceeded(limits) {
            if self.queue.pop_live().is_none() {
                break;
            }
            let many = reason == DropReason::QueueFull;
            self.shed.pushed_out += u32::from(many);
            self.shed.pushed_out_bytes += u32::from(!many);
        }
    }

    pub(super) fn enqueue(&mut self, now: Millis, offer: &Offer<'_>) {
        let Offer {
            message,
            qos,
            retain,
            ids,
            group,
            stream,
            fetched,
            position,
        } = *offer;
        let entries = self.window.iter().chain(self.queue.iter());
        let ids = self.sets.keep(ids, group, entries);
        self.queue.push(Entry {
            message: Some(message.clone()),
            ids,
            at: now.low_bits(),
            packet_id: position as u16,
            qos,
            state: match fetched {
                true => State::Fetched,
                false => State::Waiting,
            },
            retain,
            stream,
        });
    }

    /// Writes what the window, the client and the output buffer allow: first the unacknowledged
    /// messages of an earlier connection, in order [MQTT-4.4.0-1] [MQTT-4.6.0-1], then the queue.
    pub fn pump(
        &mut self,
        connection: &mut Connection,
        limits: &SessionLimits,
        now: Millis,
        output: &mut Allowance,
    ) {
        self.resend(connection, limits, now, output);
        while !self.window.has_resends() {
            let Some(front) = self.queue.front() else {
                break;
            };
            if !connection.has_room(limits, front.stream) {
                break;
            }
            if front.has_expired(now) {
                self.queue.pop();
                self.shed.expired += 1;
                continue;
            }
            if front.qos > QoS::AtMostOnce && !self.window_open(connection, limits) {
                break;
            }
            if front.qos == QoS::ExactlyOnce && !connection.takes_qos2() {
                break;
            }
            let message = front.message.as_ref();
            let Some(leave) = message.and_then(|m| leave_for(connection, m, output)) else {
                break;
            };
            let Some(mut entry) = self.queue.pop() else {
                break;
            };
            let packet_id = match entry.qos {
                QoS::AtMostOnce => 0,
                _ => self.window.next_id(),
            };
            let written = entry
                .offer(&self.sets)
                .is_some_and(|offer| write_to(connection, now, &offer, (packet_id, false), leave));
            if !written {
                self.shed.too_large += 1;
                continue;
            }
            if entry.qos == QoS::ExactlyOnce {
                connection.commit_first();
            }
            self.shed.sent[entry.qos as usize] += 1;
            if entry.qos > QoS::AtMostOnce {
                entry.at = now.low_bits();
                self.inflight_bytes += entry.size();
                entry.packet_id = packet_id;
                entry.state = State::InFlight(Stage::Sent);
                self.window.push(entry);
            }
        }
        self.queue.shrink();
    }

    fn resend(
        &mut self,
        connection: &mut Connection,
        limits: &SessionLimits,
        now: Millis,
        output: &mut Allowance,
    ) {
        let version = connection.version;
        self.window.release_again(|packet_id| {
            // The connection before may have ended between PUBREC and the record of it.
            connection.commit_first();
            let (kind, code) = (AckKind::Pubrel, ReasonCode::SUCCESS);
            encode_ack(version, kind, packet_id, code, None, connection.control());
        });
        while connection.has_room(limits, StreamId::CONTROL)
            && let Some(index) = self.window.next_resend()
        {
            if self.window.open() >= connection.receive_maximum {
                return;
            }
            let entry = self.window.get_mut(index);
            let mut written = false;
            if let Some(offer) = entry.offer(&self.sets) {
                let Some(leave) = leave_for(connection, offer.message, output) else {
                    return;
                };
                written = write_to(connection, now, &offer, (entry.packet_id, true), leave);
            }
            if written {
                if entry.qos == QoS::ExactlyOnce {
                    connection.commit_first();
                }
                self.shed.sent[entry.qos as usize] += 1;
                entry.at = now.low_bits();
                self.window.resent(index);
            } else {
                self.inflight_bytes -= entry.size();
                entry.message = None;
                self.window.finish_resend(index);
                self.shed.too_large += 1;
            }
        }
        self.tidy();
    }

    /// The connection ended: everything unacknowledged is to be sent again, on the control stream of
    /// the next one.
    pub fn connection_ended(&mut self, limits: &SessionLimits) {
        self.window
            .connection_ended(|entry| entry.stream = StreamId::CONTROL);
        for entry in self.queue.iter_mut() {
            entry.stream = StreamId::CONTROL;
        }
        if !limits.queue_qos0 && self.queue.qos0() > 0 {
            self.shed.qos0 += self.queue.qos0();
            self.queue.retain(|e| e.qos != QoS::AtMostOnce);
        }
        self.queue.client_left();
    }

    /// The client is back: drops the messages that became too old for the queue while it was away.
    pub fn drop_aged(&mut self, limits: &SessionLimits, now: Millis) {
        if limits.queue_age_max.is_some() {
            let before = self.queue.len();
            self.queue.retain(|e| !e.is_too_old(limits, now));
            self.shed.aged += (before - self.queue.len()) as u32;
        }
    }

    /// Messages that wait for a data stream go on the control stream.
    pub fn leave_stream(&mut self, stream: StreamId) {
        for entry in self.queue.iter_mut().filter(|e| e.stream == stream) {
            entry.stream = StreamId::CONTROL;
        }
    }

    /// A data stream ended: the unacknowledged messages that were sent on it are sent again on the
    /// control stream, as after a lost connection.
    pub fn stream_ended(&mut self, stream: StreamId) {
        self.leave_stream(stream);
        self.window.unsend(|entry| {
            let lost = entry.stream == stream;
            if lost {
                entry.stream = StreamId::CONTROL;
            }
            lost
        });
    }

    /// Drops every waiting message and every unacknowledged PUBLISH; returns how many messages.
    /// Identifiers that wait for PUBCOMP stay. For a session whose connection ended or will end.
    pub fn evict(&mut self) -> usize {
        let mut dropped = self.drop_queue();
        let before = self.window.len();
        self.window
            .retain(|e| matches!(e.stage(), Stage::Released | Stage::ReleaseAgain));
        dropped += before - self.window.len();
        self.sets.keep_of(self.window.iter());
        self.inflight_bytes = self.window.iter().map(Entry::size).sum();
        dropped
    }

    /// Whether deliveries of shared subscriptions may be among the entries.
    pub fn has_shared(&self) -> bool {
        self.sets.grouped()
    }

    /// Takes out the shared deliveries that another member may get: those never sent, and QoS 1
    /// without an acknowledgement. QoS 2 in flight stays [MQTT-4.8.2-4] [MQTT-4.8.2-5].
    pub fn take_shared(&mut self) -> Vec<Redelivery> {
        let mut redeliveries = Vec::new();
        if !self.sets.grouped() {
            return redeliveries;
        }
        let Self {
            window,
            queue,
            sets,
            ..
        } = self;
        window.finish_where(|entry| {
            if entry.qos == QoS::AtLeastOnce
                && let Some(filter) = sets.group(entry.ids)
                && let Some(message) = entry.message.take()
            {
                redeliveries.push(Redelivery { filter, message });
                return true;
            }
            false
        });
        queue.retain(|entry| match (sets.group(entry.ids), &entry.message) {
            (Some(filter), Some(message)) => {
                let message = message.clone();
                redeliveries.push(Redelivery { filter, message });
                false
            }
            _ => true,
        });
        self.inflight_bytes = self.window.iter().map(Entry::size).sum();
        self.tidy();
        redeliveries
    }

    /// Whether a new message of QoS 1 or 2 would be written at once.
    pub fn window_free(&self, connection: &Connection, limits: &SessionLimits) -> bool {
        connection.has_room(limits, StreamId::CONTROL) && self.window_open(connection, limits)
    }

    /// Drops every waiting message; returns how many.
    pub fn drop_queue(&mut self) -> usize {
        let dropped = self.queue.len();
        self.queue = Queue::default();
        self.sets.keep_of(self.window.iter());
        dropped
    }

    /// Drops waiting messages that are past their expiry or too old, and QoS 0 where `qos0`; returns
    /// (expired, QoS 0 dropped). For a session whose client is away.
    pub fn purge(&mut self, limits: &SessionLimits, now: Millis, qos0: bool) -> (usize, usize) {
        let (mut expired, mut zero) = (0, 0);
        self.queue.retain(|e| {
            if e.has_expired(now) || e.is_too_old(limits, now) {
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

    /// Drops waiting messages that are past their expiry, and QoS 0, for a connected client; returns
    /// (expired, QoS 0 dropped).
    pub fn purge_connected(&mut self, now: Millis) -> (usize, usize) {
        let before = self.queue.len();
        let zero = self.queue.qos0() as usize;
        self.queue
            .retain(|e| e.qos != QoS::AtMostOnce && !e.has_expired(now));
        let all = before - self.queue.len();
        (all - zero, zero)
    }

    /// Room in the client's Receive Maximum [MQTT-3.3.4-9] and in what we keep in flight for it.
    fn window_open(&self, connection: &Connection, limits: &SessionLimits) -> bool {
        self.window.open() < connection.receive_maximum
            && self.window.len() < limits.in_flight_max()
            && self.inflight_bytes < limits.queue_bytes_max
    }
}
