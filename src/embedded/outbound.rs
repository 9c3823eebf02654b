//! The messages that wait for one client, and those in flight to it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use smallvec::SmallVec;

use crate::budget::Account;
use crate::embedded::options::EmbeddedOptions;
use crate::embedded::stats::EmbeddedStats;
use crate::hashing::LookUp;
use crate::mqtt::{AckKind, Alias, Delivery, Message, QoS, ReasonCode, Version, encode_ack};
use crate::time::Millis;

/// Bytes of a queue entry that are charged beside the message itself.
const ENTRY_BYTES: usize = size_of::<Queued>();

/// One delivery that waits or has no acknowledgement.
pub(crate) struct Queued {
    pub(crate) message: Message,
    pub(crate) ids: SmallVec<[u32; 2]>,
    pub(crate) qos: QoS,
    pub(crate) retain: bool,
}

/// The sending half of a session (MQTT 5 §4.3, §4.4, §4.9): a bounded queue, and then a window of
/// packets without an acknowledgement, in their order.
pub(crate) struct Outbound {
    /// Charged for the entries; their messages are charged where they are made.
    account: Arc<Account>,
    queue: VecDeque<Queued>,
    queue_bytes: usize,
    /// By order of first sending.
    inflight: BTreeMap<u64, Inflight>,
    by_id: LookUp<u16, u64>,
    next_seq: u64,
    next_id: u16,
    /// Entries from here up to `resend_end` are still to be sent again on this connection.
    resend: u64,
    resend_end: u64,
    /// PUBLISH packets sent on this connection that use the client's Receive Maximum.
    outstanding: u16,
    window: u16,
    /// The client's Maximum Packet Size, bytes; `None`: not limited.
    max_packet: Option<u32>,
    version: Option<Version>,
}

struct Inflight {
    id: u16,
    awaits: Awaits,
    /// Whether it uses the window of this connection.
    counted: bool,
    /// `None` once PUBREC has arrived.
    entry: Option<Queued>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaits {
    Puback,
    Pubrec,
    Pubcomp,
}

/// An acknowledgement of the wrong kind for the packet that it names.
pub(crate) struct WrongAck;

impl Outbound {
    /// An empty queue whose entries are charged to `account`.
    pub(crate) fn new(account: Arc<Account>) -> Self {
        Self {
            account,
            queue: VecDeque::new(),
            queue_bytes: 0,
            inflight: BTreeMap::new(),
            by_id: LookUp::default(),
            next_seq: 0,
            next_id: 0,
            resend: 0,
            resend_end: 0,
            outstanding: 0,
            window: 0,
            max_packet: None,
            version: None,
        }
    }

    /// Begins a connection: everything unacknowledged is to be sent again.
    pub(crate) fn attach(&mut self, version: Version, window: u16, max_packet: Option<u32>) {
        self.version = Some(version);
        self.window = window.max(1);
        self.max_packet = max_packet;
        self.outstanding = 0;
        self.resend = 0;
        self.resend_end = self.next_seq;
        for entry in self.inflight.values_mut() {
            entry.counted = false;
        }
    }

    /// Adds a delivery. At its limits the queue drops its oldest messages. Returns how many were
    /// dropped.
    pub(crate) fn push(&mut self, entry: Queued, options: &EmbeddedOptions) -> u64 {
        let bytes = entry.message.size() + ENTRY_BYTES;
        self.queue_bytes += bytes;
        self.account.charge(ENTRY_BYTES);
        self.queue.push_back(entry);
        let mut dropped = 0;
        while (self.queue.len() > options.queue_max || self.queue_bytes > options.queue_bytes_max)
            && self.pop().is_some()
        {
            dropped += 1;
        }
        dropped
    }

    /// Bytes of the messages that wait, each counted in full, and of their entries.
    pub(crate) fn queue_bytes(&self) -> usize {
        self.queue_bytes
    }

    /// Drops the oldest waiting messages, at least one, until no more than `bytes` wait or `until` holds.
    /// Returns how many were dropped.
    pub(crate) fn drop_oldest(&mut self, bytes: usize, until: impl Fn() -> bool) -> u64 {
        let mut dropped = 0;
        while self.pop().is_some() {
            dropped += 1;
            if self.queue_bytes <= bytes || until() {
                break;
            }
        }
        dropped
    }

    /// Messages waiting or in flight.
    pub(crate) fn len(&self) -> usize {
        self.queue.len() + self.inflight.len()
    }

    /// Appends the packets that may be sent now, until `out` holds `limit` bytes. Returns whether more
    /// could be sent at once. `dup0`: redeliveries have DUP 0.
    pub(crate) fn pump(
        &mut self,
        out: &mut Vec<u8>,
        limit: usize,
        now: Millis,
        dup0: bool,
        stats: &mut EmbeddedStats,
    ) -> bool {
        let Some(version) = self.version else {
            return false;
        };
        while self.resend < self.resend_end {
            if out.len() >= limit {
                return true;
            }
            let next = self.inflight.range_mut(self.resend..self.resend_end).next();
            let Some((&seq, entry)) = next else {
                self.resend = self.resend_end;
                break;
            };
            let id = entry.id;
            match &entry.entry {
                None => encode_ack(version, AckKind::Pubrel, id, ReasonCode::SUCCESS, None, out),
                Some(queued) => {
                    if self.outstanding >= self.window {
                        return false;
                    }
                    if send(queued, version, id, !dup0, now, self.max_packet, out) {
                        entry.counted = true;
                        self.outstanding += 1;
                        stats.delivered += 1;
                    } else {
                        stats.dropped_too_large += 1;
                        self.inflight.remove(&seq);
                        self.by_id.remove(&id);
                    }
                }
            }
            self.resend = seq + 1;
        }
        while let Some(front) = self.queue.front() {
            if out.len() >= limit {
                return true;
            }
            let expired = front.message.has_expired(now);
            let acknowledged = front.qos != QoS::AtMostOnce;
            if acknowledged
                && !expired
                && (self.outstanding >= self.window || self.by_id.len() >= usize::from(u16::MAX))
            {
                return false;
            }
            let Some(entry) = self.pop() else { break };
            if expired {
                stats.dropped_expired += 1;
                continue;
            }
            let id = if acknowledged { self.free_id() } else { 0 };
            if !send(&entry, version, id, false, now, self.max_packet, out) {
                stats.dropped_too_large += 1;
                continue;
            }
            stats.delivered += 1;
            if acknowledged {
                self.track(id, entry);
            }
        }
        false
    }

    /// Takes a PUBACK. An unknown packet identifier is ignored, because it can belong to a session that
    /// has ended.
    pub(crate) fn puback(&mut self, id: u16) -> Result<(), WrongAck> {
        self.settle(id, Awaits::Puback)
    }

    /// Takes a PUBREC. Returns the reason code of the PUBREL to send, if one is due.
    pub(crate) fn pubrec(
        &mut self,
        id: u16,
        reason: ReasonCode,
    ) -> Result<Option<ReasonCode>, WrongAck> {
        let Some(seq) = self.by_id.get(&id) else {
            let unknown = ReasonCode::PACKET_IDENTIFIER_NOT_FOUND;
            return Ok((!reason.is_error()).then_some(unknown));
        };
        let Some(entry) = self.inflight.get_mut(seq) else {
            return Ok(None);
        };
        match entry.awaits {
            Awaits::Puback => Err(WrongAck),
            Awaits::Pubrec if reason.is_error() => self.settle(id, Awaits::Pubrec).map(|()| None),
            Awaits::Pubrec | Awaits::Pubcomp => {
                entry.awaits = Awaits::Pubcomp;
                entry.entry = None;
                Ok(Some(ReasonCode::SUCCESS))
            }
        }
    }

    /// Takes a PUBCOMP.
    pub(crate) fn pubcomp(&mut self, id: u16) -> Result<(), WrongAck> {
        self.settle(id, Awaits::Pubcomp)
    }

    fn settle(&mut self, id: u16, awaits: Awaits) -> Result<(), WrongAck> {
        let Some(&seq) = self.by_id.get(&id) else {
            return Ok(());
        };
        if self.inflight.get(&seq).is_some_and(|e| e.awaits != awaits) {
            return Err(WrongAck);
        }
        self.by_id.remove(&id);
        if self.inflight.remove(&seq).is_some_and(|e| e.counted) {
            self.outstanding -= 1;
        }
        Ok(())
    }

    fn pop(&mut self) -> Option<Queued> {
        let entry = self.queue.pop_front()?;
        self.queue_bytes -= entry.message.size() + ENTRY_BYTES;
        self.account.release(ENTRY_BYTES);
        Some(entry)
    }

    fn track(&mut self, id: u16, entry: Queued) {
        let awaits = match entry.qos {
            QoS::ExactlyOnce => Awaits::Pubrec,
            _ => Awaits::Puback,
        };
        self.by_id.insert(id, self.next_seq);
        let inflight = Inflight {
            id,
            awaits,
            counted: true,
            entry: Some(entry),
        };
        self.inflight.insert(self.next_seq, inflight);
        self.next_seq += 1;
        self.outstanding += 1;
        // A packet of this connection is never sent again on it.
        self.resend = self.next_seq;
        self.resend_end = self.next_seq;
    }

    /// The next free packet identifier. The caller has made sure that one is free.
    fn free_id(&mut self) -> u16 {
        loop {
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
            if !self.by_id.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.account.release(self.queue.len() * ENTRY_BYTES);
    }
}

/// Appends a PUBLISH. Returns false, and appends nothing, if it exceeds the client's Maximum Packet
/// Size.
fn send(
    queued: &Queued,
    version: Version,
    id: u16,
    dup: bool,
    now: Millis,
    max_packet: Option<u32>,
    out: &mut Vec<u8>,
) -> bool {
    let delivery = Delivery {
        version,
        dup,
        qos: queued.qos,
        retain: queued.retain,
        packet_id: id,
        alias: Alias::None,
        // A message that expires while it is in flight is completed all the same.
        message_expiry: (queued.message.remaining_expiry(now)).map(|seconds| seconds.max(1)),
        subscription_ids: &queued.ids,
        user_property: None,
        hidden: 0,
    };
    if max_packet.is_some_and(|max| delivery.size(&queued.message) > max as usize) {
        return false;
    }
    delivery.encode(&queued.message, out);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::{Decoder, MessageSpec, Packet, Properties, Receiver};

    fn entry(qos: QoS) -> Queued {
        Queued {
            message: Message::new(&MessageSpec {
                topic: "t",
                properties: Properties::default(),
                payload: b"x",
                qos,
                retain: false,
                expires_at: None,
                strip_key: None,
                account: None,
            }),
            ids: SmallVec::new(),
            qos,
            retain: false,
        }
    }

    /// Packet ids and DUP flags of all that `pump` sends.
    fn pumped(out: &mut Outbound) -> Vec<(u16, bool)> {
        let mut bytes = Vec::new();
        let stats = &mut EmbeddedStats::default();
        assert!(!out.pump(&mut bytes, usize::MAX, Millis::ZERO, false, stats));
        let decoder = Decoder {
            version: Version::V5,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let (mut at, mut ids) = (0, Vec::new());
        while let Ok(Some((packet, n))) = decoder.next(&bytes[at..]) {
            at += n;
            match packet {
                Packet::Publish(p) => ids.push((p.packet_id, p.dup)),
                Packet::Pubrel(a) => ids.push((a.packet_id, false)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(at, bytes.len());
        ids
    }

    #[test]
    fn packet_ids_wrap_around_those_in_use() {
        let options = EmbeddedOptions::default();
        let mut out = Outbound::new(Arc::default());
        out.attach(Version::V5, 3, None);
        assert_eq!(out.push(entry(QoS::ExactlyOnce), &options), 0);
        assert_eq!(pumped(&mut out), [(1, false)]);
        for n in 0..70_000u32 {
            assert_eq!(out.push(entry(QoS::AtLeastOnce), &options), 0);
            let id = (n % 65_534) as u16 + 2;
            assert_eq!(pumped(&mut out), [(id, false)]);
            assert!(out.puback(id).is_ok());
        }
        assert_eq!((out.len(), out.outstanding, out.queue_bytes), (1, 1, 0));
    }

    #[test]
    fn acknowledgements_must_fit() {
        let options = EmbeddedOptions::default();
        let mut out = Outbound::new(Arc::default());
        out.attach(Version::V5, 10, None);
        out.push(entry(QoS::AtLeastOnce), &options);
        out.push(entry(QoS::ExactlyOnce), &options);
        out.push(entry(QoS::ExactlyOnce), &options);
        pumped(&mut out);
        assert!(out.pubrec(1, ReasonCode::SUCCESS).is_err());
        assert!(out.pubcomp(1).is_err());
        assert!(out.puback(2).is_err());
        assert!(out.pubcomp(2).is_err());
        // A refusing PUBREC ends the exchange [MQTT-4.3.3-4].
        assert_eq!(out.pubrec(2, ReasonCode::QUOTA_EXCEEDED).ok(), Some(None));
        let rel = Some(Some(ReasonCode::SUCCESS));
        assert_eq!(out.pubrec(3, ReasonCode::SUCCESS).ok(), rel);
        assert_eq!(out.pubrec(3, ReasonCode::SUCCESS).ok(), rel);
        let unknown = Some(Some(ReasonCode::PACKET_IDENTIFIER_NOT_FOUND));
        assert_eq!(out.pubrec(9, ReasonCode::SUCCESS).ok(), unknown);
        assert!(out.puback(9).is_ok() && out.pubcomp(9).is_ok());
        out.attach(Version::V5, 10, None);
        assert_eq!(pumped(&mut out), [(1, true), (3, false)]);
        assert!(out.pubcomp(3).is_ok() && out.puback(1).is_ok());
        assert_eq!((out.len(), out.outstanding), (0, 0));
    }
}
