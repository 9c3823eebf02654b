//! The deliveries that a session is owed, as a log keeps them.

use smallvec::SmallVec;

use crate::flow::{InFlight as _, Stage, Window};
use crate::mqtt::{Message, QoS};
use crate::streams::StreamId;
use crate::topics::FilterId;

use crate::session::Session;
use crate::session::entry::{Entry, IdSets, State};
use crate::session::outbound::Outbound;
use crate::session::queue::Queue;

/// How far a delivery of QoS 1 or 2 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwedStage {
    /// It waits.
    Waiting,
    /// It waits, and is a retained message that was fetched.
    Fetched,
    /// It was sent with this packet identifier.
    Sent(u16),
    /// The client has it, and PUBREL was sent with this packet identifier.
    Released(u16),
}

/// A delivery of QoS 1 or 2 that is not complete.
#[derive(Clone, Debug)]
pub struct Owed<'a> {
    /// `None` once the client has the message.
    pub message: Option<&'a Message>,
    /// How far it is.
    pub stage: OwedStage,
    /// The QoS of the delivery.
    pub qos: QoS,
    /// RETAIN of the delivery.
    pub retain: bool,
    /// The client's Subscription Identifiers.
    pub identifiers: &'a [u32],
    /// The filter of the shared subscription that it is for.
    pub group: Option<FilterId>,
}

/// A delivery that a session is owed since an earlier process.
#[derive(Clone, Debug)]
pub struct RestoredDelivery {
    /// `None` once the client has the message.
    pub message: Option<Message>,
    /// How far it is.
    pub stage: OwedStage,
    /// The QoS of the delivery.
    pub qos: QoS,
    /// RETAIN of the delivery.
    pub retain: bool,
    /// The client's Subscription Identifiers.
    pub identifiers: SmallVec<[u32; 1]>,
    /// The filter of the shared subscription that it is for.
    pub group: Option<FilterId>,
    /// When it was queued: the low 32 bits of the time in milliseconds.
    pub at: u32,
}

impl Session {
    /// The deliveries of QoS 1 and 2 that are not complete, in the order of sending.
    pub fn owed(&self) -> impl Iterator<Item = Owed<'_>> {
        let connection = self.phase.connection();
        let waiting = connection.and_then(|c| c.waiting.as_deref());
        let waiting = waiting.into_iter().flat_map(|w| w.all());
        let waiting = waiting.filter(|d| d.qos > QoS::AtMostOnce);
        let waiting = waiting.map(|deferred| Owed {
            message: Some(&deferred.message),
            stage: match deferred.fetched {
                true => OwedStage::Fetched,
                false => OwedStage::Waiting,
            },
            qos: deferred.qos,
            retain: deferred.retain,
            identifiers: &deferred.ids,
            group: None,
        });
        self.outbound().owed().chain(waiting)
    }

    /// The messages of QoS 2 that were sent, and that the client may not have.
    pub fn sent_exactly_once(&self) -> impl Iterator<Item = &Message> {
        let sent = |owed: &Owed<'_>| {
            owed.qos == QoS::ExactlyOnce && matches!(owed.stage, OwedStage::Sent(_))
        };
        let owed = self.outbound().owed().filter(sent);
        owed.filter_map(|owed| owed.message)
    }

    /// The lowest sequence number in the log among these deliveries.
    pub fn lowest_owed(&self) -> Option<u64> {
        self.owed()
            .filter_map(|o| o.message.and_then(Message::sequence))
            .min()
    }
}

impl Outbound {
    fn owed(&self) -> impl Iterator<Item = Owed<'_>> {
        let (window, queue, sets) = self.parts();
        let owed = |entry: &'_ Entry, stage| -> Option<OwedStage> {
            (entry.qos > QoS::AtMostOnce).then_some(stage)
        };
        let in_flight = window.iter().filter_map(move |entry| {
            let id = entry.packet_id();
            let stage = match entry.stage() {
                Stage::Sent | Stage::Resend => OwedStage::Sent(id),
                Stage::Released | Stage::ReleaseAgain => OwedStage::Released(id),
                Stage::Done => return None,
            };
            Some((entry, owed(entry, stage)?))
        });
        let waiting = queue.iter().filter_map(move |entry| {
            let stage = match entry.state {
                State::Fetched => OwedStage::Fetched,
                State::Waiting | State::InFlight(_) => OwedStage::Waiting,
            };
            Some((entry, owed(entry, stage)?))
        });
        in_flight.chain(waiting).map(|(entry, stage)| Owed {
            message: entry.message.as_ref(),
            stage,
            qos: entry.qos,
            retain: entry.retain,
            identifiers: sets.get(&entry.ids),
            group: sets.group(entry.ids),
        })
    }

    /// The sending half of a session of an earlier process, which gave the packet identifier `last_id` last.
    pub(super) fn restored(last_id: u16, deliveries: Vec<RestoredDelivery>) -> Self {
        let mut sets = IdSets::default();
        let mut queue = Queue::default();
        let mut in_flight: Vec<Entry> = Vec::new();
        for delivery in deliveries {
            let (packet_id, state) = match delivery.stage {
                OwedStage::Waiting => (0, State::Waiting),
                OwedStage::Fetched => (0, State::Fetched),
                OwedStage::Sent(id) => (id, State::InFlight(Stage::Resend)),
                OwedStage::Released(id) => (id, State::InFlight(Stage::ReleaseAgain)),
            };
            let entries = in_flight.iter().chain(queue.iter());
            let ids = sets.keep(&delivery.identifiers, delivery.group, entries);
            let entry = Entry {
                message: delivery.message,
                ids,
                at: delivery.at,
                packet_id,
                qos: delivery.qos,
                state,
                retain: delivery.retain,
                stream: StreamId::CONTROL,
            };
            match state {
                State::InFlight(_) => in_flight.push(entry),
                State::Waiting | State::Fetched => queue.push(entry),
            }
        }
        Self::of_parts(Window::restored(in_flight, last_id), queue, sets)
    }
}
