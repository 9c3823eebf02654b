//! A member of a shared subscription gets a message.

use std::num::NonZeroU32;

use crate::mqtt::{Message, QoS};
use crate::session::{Delivered, Offer, SessionLimits};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::sessions::came::Replayed;
use crate::router::sessions::shard::Shard;
use crate::router::sessions::tally::Tally;
use crate::router::types::SessionRef;

impl Shard {
    /// Delivers to one member of a group. True: its queue is full, and the session is to end.
    pub(super) fn hand_shared(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        number: FilterId,
        session: SessionRef,
        tally: &mut Tally,
    ) -> bool {
        let Some((slot, accounts)) = self.with_accounts(session) else {
            return false;
        };
        let Some(subscription) = slot.session.subscription(number) else {
            return false;
        };
        if subscription.hides(message.topic()) {
            return false;
        }
        let identifier = subscription.identifier.map(NonZeroU32::get);
        let options = subscription.options;
        let name = message.numbered().map(|_| subscription.name.clone());
        let qos: QoS = options.qos.min(message.qos());
        let offer = Offer {
            message,
            qos,
            retain: options.retain_as_published && message.retain(),
            ids: identifier.as_slice(),
            group: Some(number),
            stream: slot.session.stream_of(number),
            fetched: false,
            position: accounts.position,
        };
        let incarnation = slot.session.incarnation;
        let outcome = accounts.offer(slot, session.slot, limits, now, &offer, tally);
        if let (Some(name), Some(journal)) = (name, &self.journal) {
            journal.numbers.hand_to(message, &name, incarnation);
        }
        self.settle(session.slot);
        outcome == Delivered::EndSession
    }

    /// Gives a member of a group a message of an earlier process, if it is owed it.
    pub(super) fn restore_shared(
        &mut self,
        limits: &SessionLimits,
        now: Millis,
        message: &Message,
        (number, session): (FilterId, SessionRef),
        replayed: Replayed,
        tally: &mut Tally,
    ) {
        let journal = self.journal.as_ref();
        let progress = journal.and_then(|j| j.progress.get(&session.slot));
        let Some(connected) = progress
            .filter(|p| p.owes(replayed))
            .map(|progress| progress.connected)
        else {
            return;
        };
        let Some((slot, accounts)) = self.with_accounts(session) else {
            return;
        };
        let Some(subscription) = slot.session.subscription(number) else {
            return;
        };
        let identifier = subscription.identifier.map(NonZeroU32::get);
        let options = subscription.options;
        let offer = Offer {
            message,
            qos: options.qos.min(message.qos()),
            retain: options.retain_as_published && message.retain(),
            ids: identifier.as_slice(),
            group: Some(number),
            stream: slot.session.stream_of(number),
            fetched: false,
            position: accounts.position,
        };
        if offer.qos == QoS::AtMostOnce {
            return;
        }
        match connected {
            true => slot.session.outbound_mut().restore_later(now, &offer),
            false => {
                accounts.offer(slot, session.slot, limits, now, &offer, tally);
            }
        }
        self.settle(session.slot);
    }
}
