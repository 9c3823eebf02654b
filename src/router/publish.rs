//! From the clients to the core: into the lane of a P link, and the answers back.

pub mod queue;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mqtt::{Message, QoS, ReasonCode, Version};
use crate::session::{Incarnation, Token};
use crate::telemetry::{DeferReason, DropReason as DropCause, metrics};
use crate::time::Millis;

use crate::router::Router;
use crate::router::handle::TaskWaker;
use crate::router::publish::queue::{Lanes, Outgoing};
use crate::router::types::SessionRef;

impl Router {
    /// Hands a publish to the client's P link. What cannot wait any more is answered 0x97, or at
    /// QoS 0 dropped, and counted.
    pub fn publish(
        &self,
        session: SessionRef,
        publish_link: u8,
        publish: ClientPublish,
        now: Millis,
    ) {
        let ClientPublish {
            token,
            message,
            origin_mark,
        } = publish;
        let link = &self.lanes[usize::from(publish_link)];
        let away = !link.up.load(Ordering::Acquire);
        let mut lanes = link.lanes.lock();
        let refused = if self.limits.publish_account.used() > self.config.publishes_waiting {
            Some(DeferReason::Budget)
        } else if lanes.bytes_of(session) > self.config.publishes_waiting_per_client {
            Some(DeferReason::ClientShare)
        } else {
            None
        };
        let qos0 = message.qos() == QoS::AtMostOnce && token.is_none();
        // QoS 0 does not wait for a core that is away; wills and retained values do.
        if qos0 && (refused.is_some() || (away && !message.retain())) {
            drop(lanes);
            let cause = match refused {
                Some(_) => DropCause::UpstreamBudget,
                None => DropCause::UpstreamAwayQos0,
            };
            metrics().messages_dropped[cause].increment(1);
            return;
        }
        if let (Some(held), Some(token)) = (refused, token) {
            drop(lanes);
            metrics().publishes_deferred[held].increment(1);
            // A 3.x client was not read from before it came to this; what two of them pass at
            // once is kept.
            let answered = self.with(session, 0, |s, _| {
                let v5 = s.version() == Version::V5;
                if v5 {
                    s.answered(token, ReasonCode::QUOTA_EXCEEDED);
                }
                v5
            });
            if answered != Some(false) {
                return;
            }
            lanes = link.lanes.lock();
        }
        let first = lanes.is_empty();
        lanes.push(Outgoing {
            session,
            token,
            message,
            origin_mark,
            since: now,
        });
        drop(lanes);
        if first || !away {
            link.wake.raise();
        }
    }

    /// Whether a 3.x client's next publish, of `size` bytes, has to wait in its socket: it cannot
    /// be told to come again.
    pub fn hold_publish(
        &self,
        session: SessionRef,
        publish_link: u8,
        waiting: usize,
        size: usize,
    ) -> bool {
        let used = self.limits.publish_account.used();
        if waiting >= self.limits.v3_publishes_max {
            return true;
        }
        // What other workers add in the same moment fits into what is kept free.
        let budget = self.config.publishes_waiting;
        let free = (budget / 64).min(1024 * 1024);
        if used > 0 && used + size as u64 + MESSAGE_OVERHEAD > budget - free {
            return true;
        }
        let link = &self.lanes[usize::from(publish_link)];
        let bytes = link.lanes.lock().bytes_of(session);
        bytes > 0 && bytes + size > self.config.publishes_waiting_per_client
    }

    /// The P link that a session's publishes would begin on: the same for all of them, so that they
    /// stay in order.
    pub fn publish_link(&self, session: SessionRef) -> u8 {
        let links = u32::from(self.publish_links.load(Ordering::Relaxed));
        // Fewer than 256.
        (u32::from(session.shard).wrapping_add(session.slot) % links) as u8
    }

    /// Moves a session to the P link that it would begin on now, if nothing of it waits for its old
    /// one: to be called before what it has just sent is handed over. Returns the one that holds.
    pub fn move_publishes(&self, session: SessionRef, from: u8) -> u8 {
        let to = self.publish_link(session);
        let mut shard = self.shards[usize::from(session.shard)].lock();
        let Some(slot) = shard.get(session) else {
            return from;
        };
        let idle = self.lanes[usize::from(from)].lanes.lock().bytes_of(session) == 0;
        if idle {
            slot.publish_link = to;
        }
        slot.publish_link
    }

    /// P links that are dialled.
    pub fn publish_links_wanted(&self) -> usize {
        usize::from(self.publish_wanted.load(Ordering::Acquire))
    }

    /// Asks for another P link, once the last that was asked for is there. Whether there will be
    /// one.
    pub fn add_publish_link(&self) -> bool {
        let links = self.publish_links.load(Ordering::Acquire);
        if usize::from(links) >= self.lanes.len() {
            return false;
        }
        let (order, lax) = (Ordering::AcqRel, Ordering::Relaxed);
        let added = self
            .publish_wanted
            .compare_exchange(links, links + 1, order, lax);
        if added.is_ok() {
            self.lanes[usize::from(links)].wake.raise();
        }
        added.is_ok()
    }

    /// Works on what waits for P link `link`.
    pub fn lanes<R>(&self, link: usize, f: impl FnOnce(&mut Lanes) -> R) -> R {
        f(&mut self.lanes[link].lanes.lock())
    }

    /// Wakes P link `link`'s task.
    pub fn publish_wake(&self, link: usize) -> &Arc<TaskWaker> {
        &self.lanes[link].wake
    }

    /// P link `link` is connected, or not.
    pub fn publish_link_up(&self, link: usize, up: bool) {
        self.lanes[link].up.store(up, Ordering::Release);
        // Links come up for the first time in the order of their numbers.
        if up && self.publish_links.load(Ordering::Acquire) == link as u8 {
            self.publish_links.store(link as u8 + 1, Ordering::Release);
        }
    }

    /// The core's answers, for the clients that wait for them.
    pub fn answered(&self, answers: &[Answered], now: Millis) {
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
                wakes.extend(slot.handle.clone());
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

/// What a message takes beside its packet's bytes.
const MESSAGE_OVERHEAD: u64 = 96;

/// A publish of a client for the broker.
#[derive(Debug)]
pub struct ClientPublish {
    /// Names the publish in the broker's answer; `None`: nobody waits for an answer.
    pub token: Option<Token>,
    /// The message to publish.
    pub message: Message,
    /// Not 0: the publisher has a No Local subscription that matches; the mark of its session.
    pub origin_mark: Option<Incarnation>,
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
