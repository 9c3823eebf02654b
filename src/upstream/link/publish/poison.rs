//! Finds the publishes for which the broker ends the link.

use crate::flow::Stage;
use crate::mqtt::{QoS, ReasonCode};
use crate::router::SessionRef;
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;

use crate::upstream::link::publish::suspects::{Turn, log_quarantined};
use crate::upstream::link::publish::{PublishLink, SUSPECT_AFTER, answer};

impl PublishLink {
    /// Gives the clients that may be the reason for the link's ends their turn. Returns whether others
    /// may send as well.
    pub(super) fn try_suspect(&mut self, now: Millis, out: &mut Vec<u8>) -> bool {
        let (router, suspects) = (self.router.clone(), &mut self.suspects);
        let (resumed, forgotten) = (suspects.resumed(now), suspects.forget(now));
        let waiting = router.publish_queues(self.link, |queues| {
            for session in resumed {
                let dropped = queues.drop_qos0(session) as u64;
                metrics().messages_dropped[DropReason::Quarantined].increment(dropped);
            }
            forgotten.into_iter().for_each(|s| queues.trust(s));
            queues.has_suspect(|session| suspects.is_due(session, now))
        });
        let alone = match self.suspects.turn(waiting, self.window.open() > 0, now) {
            Turn::Others => return true,
            Turn::Wait => return false,
            Turn::Suspect { alone } => alone,
        };
        if self.open() >= self.room() {
            return false;
        }
        let suspects = &self.suspects;
        let next = router.publish_queues(self.link, |queues| {
            queues.pop_suspect(|session| suspects.is_due(session, now))
        });
        let Some(outgoing) = next else {
            return true;
        };
        let (session, id) = (outgoing.session, self.window.next_id());
        let Some(qos) = self.send(outgoing, now, out) else {
            // Nothing is tried, and others wait.
            return true;
        };
        let id = (qos > QoS::AtMostOnce).then_some(id);
        self.suspects.tries(session, id, alone);
        false
    }

    pub(super) fn trust(&self, session: Option<SessionRef>) {
        if let Some(session) = session {
            self.router
                .publish_queues(self.link, |queues| queues.trust(session));
        }
    }

    /// Finds the publish that the broker ends the connection for, before publishes are sent again:
    /// otherwise it would end every connection.
    pub(super) fn find_poison(&mut self, now: Millis) {
        let losses = self.router.unprovoked_losses();
        // A broker that ends or restarts takes idle links with it.
        let only_ours = self.cut && self.losses == losses;
        self.losses = losses;
        self.cut = false;
        let sent = self.window.iter().filter(|e| e.stage == Stage::Sent);
        let alone = sent.count() == 1;
        let mut poison = None;
        for (index, entry) in self.window.iter_mut().enumerate() {
            if only_ours && entry.stage == Stage::Sent {
                // Until it was sent alone, another publish may have been the reason, even of QoS 0.
                let tried = self.suspects.is_tried(entry.id) && entry.deaths > 0;
                if alone && (tried || entry.deaths >= SUSPECT_AFTER) {
                    poison = Some(index);
                }
                entry.deaths = entry.deaths.saturating_add(1);
            }
        }
        let mut suspects = Vec::new();
        if only_ours {
            let (reason, others) = self.suspects.link_ended(now);
            suspects = others;
            if let Some((session, message)) = reason {
                log_quarantined(&self.router, self.link, session, &message);
            }
        }
        if let Some(index) = poison {
            let session = self.window.get(index).outgoing.session;
            self.quarantine(index);
            suspects.extend(self.suspects.convict(session, now).then_some(session));
        }
        let window = &self.window;
        self.suspects
            .connection_ended(|id| window.find(id).is_some());
        if !suspects.is_empty() {
            self.router.publish_queues(self.link, |queues| {
                suspects.into_iter().for_each(|s| queues.suspect(s));
            });
        }
    }

    fn quarantine(&mut self, index: usize) {
        let outgoing = &self.window.get(index).outgoing;
        log_quarantined(&self.router, self.link, outgoing.session, &outgoing.message);
        let reason = ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR;
        self.answers.extend(answer(outgoing, reason));
        self.window.finish(index);
    }
}
