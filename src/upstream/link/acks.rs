//! Acknowledgements to the broker that wait for the log.
//!
//! Where messages are kept in a log, the broker may forget a message only once its record is on the disk, or
//! once nobody needs it any more. Most clients acknowledge a message within milliseconds, so the record of a
//! message of QoS 1 waits a little: if all receivers have it by then, it is never written. Acknowledgements
//! leave in the order of arrival.

use std::collections::VecDeque;
use std::time::Duration;

use crate::mqtt::{AckKind, Message, Numbered, QoS, ReasonCode, Version, encode_ack};
use crate::router::Committed;
use crate::time::Millis;

/// How long a record waits for the receivers at most.
const LINGER: Duration = Duration::from_millis(50);
/// The window toward us that a broker is taken to have if it was not probed.
const WINDOW_UNKNOWN: usize = 10;
/// The largest window that a probe sees: the true one may be larger.
pub(super) const WINDOW_PROBED: usize = 64;

/// The acknowledgements of one connection.
#[derive(Debug)]
pub(super) struct Acks {
    waiting: VecDeque<Ack>,
    /// Messages of earlier connections that are not safe yet. The broker may send them again.
    earlier: Vec<Message>,
    /// The first so many of `waiting` have no message whose record was not asked for.
    asked: usize,
    /// The messages behind them.
    lingering: usize,
    /// The broker's window toward us, as far as it is known.
    window: usize,
    /// The window is at least this large, and may be larger.
    is_large: bool,
}

#[derive(Debug)]
struct Ack {
    kind: AckKind,
    packet_id: u16,
    until: Until,
    since: Millis,
    /// The messages of QoS 1 of the link before this one, for the barrier.
    received: u64,
}

/// The event that an acknowledgement waits for.
#[derive(Debug)]
enum Until {
    /// None.
    Now,
    /// The message is in the batch that was not given to the sessions yet.
    Batch,
    /// Everybody has the message, or it is safe.
    Safe(Message),
    /// The messages of earlier connections are safe.
    Earlier,
    /// The release of a message of QoS 2 is in the log.
    Released(Committed),
}

impl Acks {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            earlier: Vec::new(),
            asked: 0,
            lingering: 0,
            window: WINDOW_UNKNOWN,
            is_large: false,
        }
    }

    /// A connection begins, to a broker with this window; `None`: it is not known.
    pub(super) fn connected(&mut self, window: Option<u16>) {
        self.is_large = window.is_some_and(|w| usize::from(w) >= WINDOW_PROBED);
        self.window = window.map_or(WINDOW_UNKNOWN, usize::from).max(1);
    }

    /// An acknowledgement that waits for nothing but those before it.
    pub(super) fn push(&mut self, kind: AckKind, packet_id: u16, received: u64, now: Millis) {
        self.add(kind, packet_id, Until::Now, received, now);
    }

    /// The acknowledgement of a message that was received on an earlier connection, too.
    pub(super) fn push_again(&mut self, kind: AckKind, packet_id: u16, received: u64, now: Millis) {
        self.add(kind, packet_id, Until::Earlier, received, now);
    }

    /// The acknowledgement of a message that is added to the batch now.
    pub(super) fn push_batched(
        &mut self,
        kind: AckKind,
        packet_id: u16,
        received: u64,
        now: Millis,
    ) {
        self.add(kind, packet_id, Until::Batch, received, now);
    }

    /// PUBCOMP for a message of QoS 2 whose release is on its way to the log.
    pub(super) fn push_release(
        &mut self,
        packet_id: u16,
        committed: Committed,
        received: u64,
        now: Millis,
    ) {
        let until = Until::Released(committed);
        self.add(AckKind::Pubcomp, packet_id, until, received, now);
    }

    fn add(&mut self, kind: AckKind, packet_id: u16, until: Until, received: u64, now: Millis) {
        self.waiting.push_back(Ack {
            kind,
            packet_id,
            until,
            since: now,
            received,
        });
        if self.is_large {
            self.window = self.window.max(self.waiting.len());
        }
    }

    /// The messages of the batch were given to the sessions. Returns the messages whose records are to be
    /// written now.
    pub(super) fn flushed<'a>(
        &mut self,
        batch: impl DoubleEndedIterator<Item = &'a Message>,
    ) -> Vec<Message> {
        let mut urgent = false;
        let mut batch = batch.filter(|m| m.qos() > QoS::AtMostOnce).rev();
        for ack in self.waiting.iter_mut().rev() {
            if !matches!(ack.until, Until::Batch) {
                continue;
            }
            let Some(message) = batch.next() else {
                break;
            };
            let Some(numbered) = message.numbered() else {
                ack.until = Until::Now;
                continue;
            };
            let is_qos2 = message.qos() == QoS::ExactlyOnce;
            // The batch has a reference.
            if !is_qos2 && message.refs() <= 1 {
                ack.until = Until::Now;
                continue;
            }
            urgent |= is_qos2 || numbered.is_urgent();
            self.lingering += 1;
            ack.until = Until::Safe(message.clone());
        }
        match urgent {
            true => self.write(),
            false => Vec::new(),
        }
    }

    /// Takes the messages that are still needed: their records do not wait any longer. A later message is not
    /// written before an earlier one.
    fn write(&mut self) -> Vec<Message> {
        let rest = self.waiting.range(self.asked..);
        let messages = rest.filter_map(|ack| match &ack.until {
            Until::Safe(message) if !is_done(message) => Some(message.clone()),
            _ => None,
        });
        let messages = messages.collect();
        self.asked = self.waiting.len();
        self.lingering = 0;
        messages
    }

    /// Puts out the acknowledgements that need not wait. Returns the messages whose records are to be written
    /// now. `barrier`: a PINGREQ is to follow.
    pub(super) fn let_go(
        &mut self,
        version: Version,
        barrier: bool,
        now: Millis,
        out: &mut Vec<u8>,
        mut released: impl FnMut(u16),
    ) -> Vec<Message> {
        self.earlier.retain(|message| !is_done(message));
        while let Some(ack) = self.waiting.front() {
            let may_go = match &ack.until {
                Until::Now => true,
                Until::Batch => false,
                Until::Safe(message) => is_done(message),
                Until::Earlier => self.earlier.is_empty(),
                Until::Released(committed) => committed.is_set(),
            };
            if !may_go {
                break;
            }
            let (kind, id, code) = (ack.kind, ack.packet_id, ReasonCode::SUCCESS);
            encode_ack(version, kind, id, code, None, out);
            if kind == AckKind::Pubcomp {
                released(id);
            }
            if self.asked == 0 {
                self.lingering -= usize::from(matches!(ack.until, Until::Safe(_)));
            }
            self.asked = self.asked.saturating_sub(1);
            self.waiting.pop_front();
        }
        let first = self.waiting.get(self.asked);
        let overdue = first.is_some_and(|ack| ack.since + LINGER <= now);
        let many = self.lingering >= (self.window / 4).max(1);
        match self.lingering > 0 && (barrier || overdue || many) {
            true => self.write(),
            false => Vec::new(),
        }
    }

    /// The messages of QoS 1 of the link whose acknowledgements were sent, given that so many were received.
    pub(super) fn acknowledged(&self, received: u64) -> u64 {
        self.waiting.front().map_or(received, |ack| ack.received)
    }

    /// The connection has ended, and its acknowledgements with it. Returns the messages whose records are to be
    /// written now, because the broker may send them again.
    pub(super) fn disconnected(&mut self) -> Vec<Message> {
        let messages = self.write();
        self.asked = 0;
        let waiting = std::mem::take(&mut self.waiting);
        self.earlier
            .extend(waiting.into_iter().filter_map(|ack| match ack.until {
                Until::Safe(message) => Some(message),
                Until::Now | Until::Batch | Until::Earlier | Until::Released(_) => None,
            }));
        messages
    }
}

/// Whether the broker may forget a message: it is safe, or, at QoS 1, only this link has it still.
fn is_done(message: &Message) -> bool {
    let settled = message.numbered().is_none_or(Numbered::is_settled);
    settled || (message.qos() == QoS::AtLeastOnce && message.refs() <= 1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mqtt::{MessageSpec, Properties, RecordPlace, Records};
    use crate::sim::testing::read;
    use crate::time::UnixMillis;

    #[derive(Debug)]
    struct Nothing;

    impl Records for Nothing {
        fn release(&self, _: RecordPlace) {}
    }

    fn message(qos: QoS) -> Message {
        let mut message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: b"x",
            qos,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        let records = Arc::new(Nothing);
        message.number(Numbered::new(1, None, None, UnixMillis::default(), records));
        message
    }

    /// A link that has received messages, which their receivers have still.
    struct Link {
        acks: Acks,
        held: Vec<Option<Message>>,
    }

    impl Link {
        fn new(window: Option<u16>) -> Self {
            let mut acks = Acks::new();
            acks.connected(window);
            let held = Vec::new();
            Self { acks, held }
        }

        /// A batch of messages arrives. Returns the number of records to write.
        fn arrive(&mut self, qos: &[QoS], at: u64) -> usize {
            let batch: Vec<Message> = qos.iter().map(|qos| message(*qos)).collect();
            for message in &batch {
                let id = self.held.len() as u16 + 1;
                let kind = match message.qos() {
                    QoS::ExactlyOnce => AckKind::Pubrec,
                    _ => AckKind::Puback,
                };
                (self.acks).push_batched(kind, id, self.held.len() as u64, Millis::new(at));
                self.held.push(Some(message.clone()));
            }
            self.acks.flushed(batch.iter()).len()
        }

        /// The packet identifiers of the acknowledgements that go out, and the number of records to write.
        fn go(&mut self, at: u64) -> (Vec<u16>, usize) {
            let mut out = Vec::new();
            let now = Millis::new(at);
            let write = self.acks.let_go(Version::V5, false, now, &mut out, |_| {});
            let ids = read(&mut out).into_iter().map(|(_, id)| id);
            (ids.collect(), write.len())
        }

        fn settle(&self, at: usize) {
            let message = self.held[at].as_ref().expect("it is held");
            message.numbered().expect("it has a number").settle();
        }
    }

    const QOS1: QoS = QoS::AtLeastOnce;
    const QOS2: QoS = QoS::ExactlyOnce;

    #[test]
    fn a_message_that_its_receivers_have_in_time_needs_no_record() {
        let mut link = Link::new(Some(64));
        assert_eq!(link.arrive(&[QOS1, QOS1], 0), 0);
        assert_eq!(link.go(10), (vec![], 0));
        link.held[1] = None;
        assert_eq!(link.go(20), (vec![], 0), "in their order");
        link.held[0] = None;
        assert_eq!(link.go(49), (vec![1, 2], 0));
        assert_eq!(link.go(500), (vec![], 0));
    }

    #[test]
    fn a_record_is_written_after_50_ms_or_once_a_quarter_of_the_window_waits() {
        for (window, at_once) in [(Some(8), 2), (Some(20), 5), (Some(1), 1), (None, 2)] {
            let mut link = Link::new(window);
            for n in 1..at_once {
                assert_eq!(link.arrive(&[QOS1], 0), 0);
                assert_eq!(link.go(49), (vec![], 0), "{n} of {window:?}");
            }
            link.arrive(&[QOS1], 0);
            assert_eq!(link.go(49), (vec![], at_once), "{window:?}");
            assert_eq!(link.go(49), (vec![], 0), "it was asked for");
        }
        let mut link = Link::new(Some(64));
        link.arrive(&[QOS1], 100);
        assert_eq!(link.go(149), (vec![], 0));
        assert_eq!(link.go(150), (vec![], 1));
        link.settle(0);
        assert_eq!(link.go(151), (vec![1], 0));
    }

    #[test]
    fn a_message_of_qos_2_and_one_for_a_client_that_is_away_do_not_wait() {
        let mut link = Link::new(Some(64));
        link.arrive(&[QOS1], 0);
        assert_eq!(link.arrive(&[QOS2], 0), 2, "with the message before it");
        link.held[1] = None;
        assert_eq!(link.go(1), (vec![], 0), "although nobody needs it");
        let away = message(QOS1);
        away.numbered().expect("it has a number").hurry();
        link.acks
            .push_batched(AckKind::Puback, 3, 2, Millis::new(1));
        let batch = [away.clone()];
        assert_eq!(link.acks.flushed(batch.iter()).len(), 1);
    }

    #[test]
    fn a_redelivery_waits_for_the_messages_of_the_connection_before() {
        let mut link = Link::new(Some(64));
        link.arrive(&[QOS1, QOS1], 0);
        link.held[0] = None;
        assert_eq!(link.acks.acknowledged(2), 0);
        assert_eq!(link.acks.disconnected().len(), 1, "the one that is needed");
        link.acks.push_again(AckKind::Puback, 2, 2, Millis::new(5));
        link.acks.push(AckKind::Puback, 9, 2, Millis::new(5));
        assert_eq!(link.go(1000), (vec![], 0));
        link.settle(1);
        assert_eq!(link.go(1000), (vec![2, 9], 0));
        assert_eq!(link.acks.acknowledged(2), 2);
    }
}
