//! From the clients to the core: into the lane of a P link, and the answers back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mqtt::{QoS, ReasonCode};
use crate::session::{Effect, Token};
use crate::telemetry::{DropReason as DropCause, HeldReason, metrics};

use super::lanes::{Lanes, Outgoing};
use super::wake::Wake;
use super::{Router, SessionRef};

impl Router {
    /// Hands a publish to the client's P link. What cannot wait any more is answered 0x97, or at
    /// QoS 0 dropped, and counted.
    pub fn publish(&self, session: SessionRef, effect: Effect, now: u64) {
        let Effect::Publish {
            token,
            message,
            no_local,
        } = effect
        else {
            return;
        };
        let link = &self.lanes[self.publish_link(session)];
        let used = self.limits.publish_account.used();
        let away = !link.up.load(Ordering::Acquire);
        let mut lanes = link.lanes.lock();
        let share = lanes.bytes_of(session);
        let full = if used > self.config.publishes_waiting {
            Some((HeldReason::Budget, DropCause::UpstreamBudget))
        } else if share > self.config.publishes_waiting_per_client {
            Some((HeldReason::ClientShare, DropCause::UpstreamBudget))
        } else {
            None
        };
        if message.qos() == QoS::AtMostOnce && token.is_none() {
            let cause = match full {
                Some((_, cause)) => Some(cause),
                // QoS 0 does not wait for a core that is away; wills and retained values do.
                None if away && !message.retain() => Some(DropCause::UpstreamAwayQos0),
                None => None,
            };
            if let Some(cause) = cause {
                drop(lanes);
                metrics().messages_dropped[cause].increment(1);
                return;
            }
        } else if let (Some((held, _)), Some(token)) = (full, token) {
            drop(lanes);
            metrics().publishes_held_back[held].increment(1);
            self.over_budget(session, token, no_local, message, now);
            return;
        }
        let tag = self.tag_of(session, no_local);
        let first = lanes.is_empty();
        lanes.push(Outgoing {
            session,
            token,
            message,
            tag,
            since: now,
        });
        drop(lanes);
        if first || !away {
            link.wake.raise();
        }
    }

    /// MQTT 5 is answered 0x97; a 3.x client's publish is kept, and its socket left unread until
    /// there is room again: it has no other way to be told.
    fn over_budget(
        &self,
        session: SessionRef,
        token: Token,
        no_local: bool,
        message: crate::mqtt::Message,
        now: u64,
    ) {
        let refused = self.with(session, 0, |s, _| {
            let refuse = s.version() == crate::mqtt::Version::V5;
            if refuse {
                s.answered(token, ReasonCode::QUOTA_EXCEEDED);
            }
            refuse
        });
        if refused == Some(true) {
            return;
        }
        let tag = self.tag_of(session, no_local);
        let link = &self.lanes[self.publish_link(session)];
        link.lanes.lock().push(Outgoing {
            session,
            token: Some(token),
            message,
            tag,
            since: now,
        });
        link.wake.raise();
    }

    /// Whether a 3.x client has to wait with further publishes.
    pub fn hold_reading(&self, session: SessionRef) -> bool {
        let link = &self.lanes[self.publish_link(session)];
        let bytes = link.lanes.lock().bytes_of(session);
        // Who publishes nothing is not made to wait for those who do.
        bytes > self.config.publishes_waiting_per_client
            || (bytes > 0 && self.limits.publish_account.used() > self.config.publishes_waiting)
    }

    fn tag_of(&self, session: SessionRef, no_local: bool) -> u64 {
        if !no_local || !self.core.properties.load(Ordering::Relaxed) {
            return 0;
        }
        self.with(session, 0, |s, _| s.tag).unwrap_or(0)
    }

    /// The P link of a session: always the same, so that its publishes stay in order.
    fn publish_link(&self, session: SessionRef) -> usize {
        (session.shard as usize + session.slot as usize) % self.lanes.len()
    }

    /// Works on what waits for P link `link`.
    pub fn lanes<R>(&self, link: usize, f: impl FnOnce(&mut Lanes) -> R) -> R {
        f(&mut self.lanes[link].lanes.lock())
    }

    /// Wakes P link `link`'s task.
    pub fn publish_wake(&self, link: usize) -> &Arc<Wake> {
        &self.lanes[link].wake
    }

    /// P link `link` is connected, or not.
    pub fn publish_link_up(&self, link: usize, up: bool) {
        self.lanes[link].up.store(up, Ordering::Release);
    }

    /// The core's answers, for the clients that wait for them.
    pub fn answered(&self, answers: &[Answered], now: u64) {
        let mut wakes = Vec::new();
        for answer in answers {
            metrics()
                .publish_ack_seconds
                .record(now.saturating_sub(answer.since) as f64 / 1000.0);
            let mut shard = self.shards[usize::from(answer.session.shard)].lock();
            let Some(slot) = shard.get(answer.session) else {
                continue;
            };
            slot.session.answered(answer.token, answer.reason);
            if slot.session.attached() && !slot.woken {
                slot.woken = true;
                wakes.extend(slot.wake.clone());
            }
        }
        for wake in wakes {
            wake.raise();
        }
    }

    /// Publishes that wait for P links.
    pub fn publishes_waiting(&self) -> usize {
        self.lanes.iter().map(|l| l.lanes.lock().len()).sum()
    }
}

/// One answer of the core to a client's publish.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    /// Whose publish it was.
    pub session: SessionRef,
    /// Which.
    pub token: Token,
    /// The core's reason code.
    pub reason: ReasonCode,
    /// When it was handed over, milliseconds.
    pub since: u64,
}
